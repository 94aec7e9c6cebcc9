"""Print the lowest versions that the two distributions allow of what they need, as constraints for pip.

torch is left out: its older builds for CPUs are not on every package index.
"""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
EXTRAS = ("hf", "pretrained")


def lowest(requirement: Requirement) -> str:
    """`name==version` of its lower bound."""
    (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return f"{requirement.name}=={bound}"


def main() -> None:
    for file in ("pyproject.toml", "pipeline/pyproject.toml"):
        project = tomllib.loads((ROOT / file).read_text(encoding="utf-8"))["project"]
        extras = project.get("optional-dependencies", {})
        for text in project["dependencies"] + [each for extra in EXTRAS for each in extras.get(extra, [])]:
            requirement = Requirement(text)
            if requirement.name not in ("torch", "schoenbat"):
                print(lowest(requirement))


if __name__ == "__main__":
    main()
