"""Draw docs/figures/pathfinder.png: pictures of each level, with and without a contour from disc to disc."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from schoenbat.lra.data.pathfinder import LEVELS, draw

COLUMNS = 6


def main() -> None:
    figure, axes = plt.subplots(len(LEVELS), COLUMNS, figsize=(1.25 * COLUMNS, 1.45 * len(LEVELS)))
    for row, level in zip(axes, LEVELS, strict=True):
        pictures = [draw(level, 0, "train", index) for index in range(40)]
        for number, axis in enumerate(row):
            label = number % 2
            picture = [picture for picture in pictures if picture.label == label][number // 2]
            axis.imshow(picture.pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(f"{level}, label {label}", fontsize=7)
            axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(Path(__file__).with_name("pathfinder.png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
