"""Trace every picture of a Pathfinder test set and print its statistics as a row of the table in docs/data.md.

    python tests/lra/tasks/verify_pathfinder.py --level hard --count 20000 --processes 2

The pictures are those of task lra-pathfinder with the same level, seed and split. The exit code is 1 if the dashes
contradict a label.
"""

import argparse
import functools
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tracer import Segment, labels_of

from schoenbat.lra.data.pathfinder import LEVELS, Picture, draw

Row = tuple[float, float, float, float, float, float, float, float, float, int, int]


def segments(picture: Picture) -> list[Segment]:
    dashes = [dash for line in (*picture.contours, *picture.distractors) for dash in line]
    return [Segment(dash.tail, dash.head, dash.pivot, dash.angle) for dash in dashes]


def measure(level: str, seed: int, split: str, index: int) -> Row:
    picture = draw(level, seed, split, index)
    pixels = picture.pixels.astype(float)
    found = labels_of(segments(picture), picture.discs, LEVELS[level].target)
    return (
        float((pixels == 0).mean()),
        float((pixels >= 64).mean()),
        float((pixels >= 100).sum()),
        float((pixels >= 128).mean()),
        float(pixels.mean()),
        float(np.square(pixels).mean()),
        picture.attempts,
        len(picture.distractors),
        picture.label,
        int(picture.label not in found),
        int(len(found) > 1),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", choices=list(LEVELS), default="hard")
    parser.add_argument("--split", choices=["train", "dev", "test"], default="test")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    work = functools.partial(measure, options.level, options.seed, options.split)
    with ProcessPoolExecutor(options.processes) as pool:
        rows = np.array(list(pool.map(work, range(options.count), chunksize=50)))
    mean, error = rows.mean(axis=0), rows.std(axis=0) / np.sqrt(len(rows))
    std = np.sqrt(mean[5] - mean[4] ** 2)
    print(
        f"| {options.level}, {len(rows):,} | {mean[0]:.3f} ± {error[0]:.3f} | {mean[1]:.3f} | "
        f"{mean[2]:.1f} ± {error[2]:.1f} | {mean[3]:.3f} | {mean[4]:.1f} | {std:.1f} | "
        f"{mean[6]:.1f} ± {error[6]:.1f} | {mean[7]:.2f} ± {error[7]:.2f} | {100 * mean[8]:.1f} % |"
    )
    wrong, unclear = int(rows[:, 9].sum()), int(rows[:, 10].sum())
    print(f"{wrong} labels contradicted by the dashes; {unclear} that two contours through one pivot leave open")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
