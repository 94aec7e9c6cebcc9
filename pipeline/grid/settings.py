"""params.yaml as plain values."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from schoenbat.errors import UserError

PARAMS_FILE = Path("params.yaml")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-4` is a number, as in YAML 1.2 and so in DVC, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.absolute().parent
        raise UserError(f"no {path.name} in {folder}; run this in the root folder of the project") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
