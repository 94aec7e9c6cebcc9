"""The reference of params.yaml and of the command line, made from the code; `docs/conf.py` puts it into pages.

A key's meaning is its entry under "Attributes:" in the docstring of its dataclass. Its bounds are what the dataclass
says when it is given something far beyond them.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer.main

from pipeline.cli import app as cli
from pipeline.grid import params
from pipeline.stages.commands import PROGRAM
from schoenbat.attention import ATTENTIONS
from schoenbat.lra.multihead import FORMERS, FormerConfig
from schoenbat.lra.tasks import TASKS

ROOT = Path(__file__).parents[1]
FAR = 2**62
SHARED = {
    "task": {
        "max_length": "tokens of a text, or of a sequence; longer texts are cut.",
        "train_size": "examples for training.",
        "dev_size": "examples of dev.",
        "test_size": "examples of test.",
        "seed": "of what is drawn.",
    },
    "grid": {
        "tasks": "names of tasks; each has a section `task.NAME`.",
        "seeds": "of weights, features and the order of the batches.",
        "attn": "names of mechanisms; each has a section `attention.NAME`.",
        "dotf": "names of kernels.",
        "former": "transformer, the mechanism alone, or maclauformer, with ppSBN; each has a section `former.NAME`.",
    },
    "trained": {"options": "of that mechanism, as in a section `attention.NAME`."},
}
"""Meanings of keys that many sections have, by the first word of the section."""
_MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Key:
    """One key of params.yaml.

    Attributes:
        name: without its section.
        kind: its type, as Python writes it.
        default: as YAML writes it; empty where the key must be given.
        bounds: what is refused otherwise; empty where anything of the type is taken.
        meaning: what it says.
    """

    name: str
    kind: str
    default: str
    bounds: str
    meaning: str


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Yield of each section its name, the first sentence of its docstring, and its keys."""
    given = params.load_params(ROOT / "params.yaml")
    task = next(iter(given.task.values()))
    slurm, yes = params.SlurmParams(), {"share": 0.5}
    model = params.ModelParams("package/file.zip", "", "", 2, 4)
    whole = [
        Key("profile", "str", "", "", "the name that the folders of runs and reports carry."),
        Key("note", "str", "", "", "one sentence that the report shows."),
    ]
    yield "", "", whole
    for name, config in (
        ("grid", given.grid),
        ("grid.plain", given.grid.plain),
        ("grid.kernel", given.grid.kernel),
        ("task.NAME.model", task.model),
        ("task.NAME.training", task.training),
        *((f"task.{name}.data", _example(TASKS.get(name).Config)) for name in TASKS.names()),
        *((f"attention.{name}", _example(ATTENTIONS.get(name).Config)) for name in ATTENTIONS.names()),
        (f"former.NAME, of {' and '.join(sorted(FORMERS))}", FormerConfig()),
        ("data", given.data),
        ("run", given.run),
        ("run.slurm", slurm),
        ("bench", given.bench),
        ("errors", given.errors),
        ("trained", given.trained),
        ("trained.cells.NAME", params.ReplacementParams(**yes)),
        ("trained.model.NAME", model),
    ):
        keys = _keys(name.partition(".")[0], config)
        if keys:
            about = inspect.cleandoc(type(config).__doc__ or "").partition("\n")[0]
            # A dataclass without a docstring is given its signature as one.
            yield name, "" if about.startswith("Config(") else about, keys


def commands() -> Iterator[tuple[str, str, str, list[tuple[str, str]], list[str]]]:
    """Yield of each command its group, its name with its arguments, its help, its options with help, and examples."""
    group: Any = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        shown = " ".join([f"{PROGRAM} {name}", *(p.metavar or p.name.upper() for p in arguments)])
        options = [(p.metavar or p.name.upper(), p.help or "") for p in arguments]
        for option in (p for p in command.params if p.param_type_name == "option"):
            flags = ", ".join(option.opts) + (f" / {', '.join(option.secondary_opts)}" if option.secondary_opts else "")
            told = [option.help or ""]
            if option.default not in (None, False, ()) and not option.is_flag:
                told.append(f"Default: {option.default}.")
            if option.required:
                told.append("Must be given.")
            if option.envvar:
                told.append(f"Environment variable: {option.envvar}.")
            options.append(
                (
                    flags if option.is_flag else f"{flags} {option.bare_type().removeprefix('list[').rstrip(']')}",
                    " ".join(told),
                )
            )
        examples = re.findall(rf"^ *({PROGRAM} .*)", command.epilog or "", re.MULTILINE)
        yield command.rich_help_panel, shown, " ".join((command.help or "").split()), options, examples


def settings_page() -> str:
    """Return the sections as Markdown."""
    parts = []
    for name, about, keys in sections():
        rows = [
            f"| `{key.name}` | {_plain(key.kind)} | {_default(key)} | {_plain(key.meaning)}{_bounds(key)} |"
            for key in keys
        ]
        head = ["| key | type | default | meaning |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {name or 'The file'}", "", _plain(about), "", *head, *rows]))
    return "\n\n".join(parts)


def commands_page() -> str:
    """Return the commands as Markdown."""
    parts: dict[str, list[str]] = {}
    for group, shown, about, options, examples in commands():
        rows = [f"| `{flags}` | {_plain(told)} |" for flags, told in options]
        table = ["| argument or option | meaning |", "|---|---|", *rows, ""] if rows else []
        lines = [f"### {shown}", "", _plain(about), "", *table, "```", *examples, "```"]
        parts.setdefault(group, []).append("\n".join(lines))
    return "\n\n".join(f"## {group}\n\n" + "\n\n".join(each) for group, each in parts.items())


def _example(config: type) -> Any:
    """Return an instance, with 1 or a single letter for what has no default."""
    simple = {int: 1, str: "a", float: 0.5}
    hints = typing.get_type_hints(config)
    needed = {f.name: simple[hints[f.name]] for f in dataclasses.fields(config) if _default_of(f) is _MISSING}
    return config(**needed)


def _default_of(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not _MISSING else field.default


def _keys(kind: str, config: Any) -> list[Key]:
    meanings = dict(SHARED.get(kind, {}))
    for base in reversed(type(config).__mro__):
        meanings |= _attributes(base)
    hints = typing.get_type_hints(type(config))
    keys = []
    for field in dataclasses.fields(config):
        inner = [hints[field.name], *typing.get_args(hints[field.name])]
        if any(map(dataclasses.is_dataclass, inner)):
            continue
        default = _default_of(field)
        shown = "" if default is _MISSING else _yaml(default)
        limits = _limits(config, field.name, hints[field.name])
        meaning = meanings[field.name]
        if field.name.endswith("_size") and type(None) in inner:
            meaning += " null: all that there are."
        keys.append(Key(field.name, _type(hints[field.name]), shown, limits, meaning))
    return keys


def _attributes(cls: type) -> dict[str, str]:
    """Return the entries under "Attributes:" of a docstring."""
    block = re.search(
        r"^Attributes:\n((?:    .*\n?|\n)+)", inspect.cleandoc(vars(cls).get("__doc__") or ""), re.MULTILINE
    )
    if block is None:
        return {}
    entries = re.findall(r"^    ([\w, ]+): ((?:.*\n?)(?:^        .*\n?)*)", block[1], re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _limits(config: Any, name: str, hint: Any) -> str:
    """Return what `config` says of a number, or of a list with one, that is far too small or too large."""
    kinds = {hint, *typing.get_args(hint)}
    if not kinds & {int, float}:
        return ""
    found: list[str] = []
    for extreme in (-FAR, FAR):
        try:
            dataclasses.replace(config, **{name: [extreme] if typing.get_origin(hint) is list else extreme})
        except ValueError as error:
            text = str(error).partition(", not ")[0].partition(", but ")[0]
            if text.startswith(f"{name} must "):
                text = text.removeprefix(f"{name} must ").replace(f", {getattr(config, 'steps', None)})", ", steps)")
                found.append(text)
    # What is wrong on both sides is said once; "be at least 1" and "be at most 9" share their verb.
    return ", ".join(dict.fromkeys(found)).replace(", be ", ", ")


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return text.replace("None", "null").replace("typing.", "")


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false", "": "empty"}
    return words[value] if isinstance(value, (bool, str, type(None))) and value in words else str(value)


def _default(key: Key) -> str:
    return f"`{key.default}`" if key.default else "must be given"


def _bounds(key: Key) -> str:
    return f" Must {key.bounds}." if key.bounds else ""


def _plain(text: str) -> str:
    """Return text whose marks mean themselves in a cell of a Markdown table."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*|<_\[\]])", r"\\\1", part) for part in parts[::2]]
    # Elsewhere than in code two hyphens become a dash.
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*)", r"`\1`", "".join(parts))


if __name__ == "__main__":
    print(settings_page(), commands_page(), sep="\n\n")
