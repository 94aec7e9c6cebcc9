"""The documents quote what was generated, lead nowhere that is not there, and say nothing that cannot be typed."""

import ast
import itertools
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import dvc.cli
import pytest
import typer.main

from pipeline.cli import app as cli
from pipeline.grid.params import load_params
from pipeline.reporting._comparison import Comparison
from pipeline.reporting._results import collect
from pipeline.stages.commands import PROGRAM

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]

TESTED_BY = {
    ("docs/library.md", "from schoenbat"): "tests/test_library_document.py",
    ("docs/adding.md", "class Cosh(Kernel)"): "tests/pipeline/test_plugins.py",
    ("docs/adding.md", "class Taylor(KernelAttention)"): "tests/pipeline/test_plugins.py",
    ("docs/adding.md", "class Tags(Task)"): "tests/pipeline/test_plugins.py",
    ("docs/adding.md", "Kernel.from_callable"): "tests/pipeline/test_plugins.py",
    ("docs/data.md", "reviews.jsonl"): "tests/lra/tasks/test_table.py",
    ("docs/replace.md", ""): "tests/test_replace_document.py",
    ("README.md", "schoenbat.replace(model"): "tests/test_replace_document.py",
    ("docs/tutorial.md", ""): "tests/test_tutorial.py",
    # It needs an exported model; there the same lines stand in the model card.
    ("docs/pipeline.md", 'from_pretrained("exported")'): "tests/pipeline/test_trained.py",
}
"""Which test runs the snippets that are not run here: those of a document that hold a text."""

NOT_RUN = {
    "source": "it is for the shell of a person",
    ".": "it is for the shell of a person",
    "tar": "it unpacks what pip has downloaded",
    "pip": "it needs a network; tests/test_packaging.py and tests/pipeline/test_plugins.py install both distributions",
    ".venv/bin/python": "it is pip, as above",
    "git": "git is not ours",
}
"""Programs whose commands are neither run nor parsed, and why not."""


def blocks(document: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line of a shell, and of every `schoenbat-exp ...` within a sentence."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
        lines += [line for block in blocks(document, "") for line in block.splitlines() if line.startswith(PROGRAM)]
        lines += re.findall(rf"`({PROGRAM} [^`]+|make [a-z]+)`", text)
        for line in lines:
            words = shlex.split(" ".join(line.split()), comments=True)
            for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
                found.append((name(document), part))
    return sorted({pair for pair in found if pair[1]})


SNIPPETS = [(name(document), text) for document in DOCUMENTS for text in blocks(document, "python")]


def test_tables_in_the_documents_are_the_generated_ones() -> None:
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    quotes = [re.findall(r"<!-- begin: (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL) for text in texts]
    assert sum(map(len, quotes)) >= 4
    for path, quoted in itertools.chain(*quotes):
        assert quoted.strip() == (ROOT / path).read_text(encoding="utf-8").strip(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, target


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = {"index"}
    for page in PAGES:
        for toctree in re.findall(r"```{toctree}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            listed |= set(toctree.split())
    assert {page.stem for page in PAGES} <= listed


@pytest.mark.parametrize(("document", "snippet"), SNIPPETS, ids=lambda text: text[:40])
def test_every_snippet_runs_here_or_in_the_test_that_is_named(document: str, snippet: str) -> None:
    tests = {path for (of, part), path in TESTED_BY.items() if of == document and part in snippet}
    if not tests:
        exec(compile(snippet, document, "exec"), {})
    for path in tests:
        assert Path(document).stem in (ROOT / path).read_text(encoding="utf-8") or document == "docs/pipeline.md"


def test_the_example_of_the_method_prints_an_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(ROOT / "docs/method.md", "python")
    exec(compile(example, "docs/method.md", "exec"), {})
    assert "256 features, expected relative error" in capsys.readouterr().out


def test_the_report_of_the_document_makes_its_table(tmp_path: Path) -> None:
    (example,) = (text for document, text in SNIPPETS if document == "docs/adding.md" and "Report" in text)
    names: dict[str, Any] = {"__name__": "parameters"}
    exec(compile(example, "docs/adding.md", "exec"), names)
    results = collect(load_params(ROOT / "profiles/quick.yaml"), tmp_path)
    results.cells.loc[0, "num_parameters"] = 12345.0
    (table,) = names["Parameters"]().make(Comparison(results))
    assert table.shown.num_parameters.tolist() == ["12345.0"]


@pytest.mark.parametrize(("document", "command"), commands(), ids=lambda text: text)
def test_every_command_is_one_that_its_program_takes(document: str, command: str) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    program, *arguments = words
    if program == PROGRAM:
        parse(arguments)
    elif program == "make":
        (target,) = [word for word in arguments if "=" not in word]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "dvc":
        dvc.cli.parse_args(arguments)
    elif program in ("python", "pytest"):
        written = {"films.py"}
        files = [word for word in arguments if word.startswith(("tests/", "docs/", "benchmarks/")) or ".py" in word]
        assert all((ROOT / file).exists() or file in written for file in files), files
    else:
        assert program in NOT_RUN, f"{document}: {command}"


def parse(arguments: list[str]) -> None:
    """Parse as the command line does, and do nothing."""
    group: Any = typer.main.get_command(cli.app)
    command, *rest = arguments
    if command.startswith("-"):
        # These act while they are parsed.
        assert not rest
        assert command in {option for parameter in group.params for option in parameter.opts}
        return
    assert command in group.commands, command
    # A command that is only named need not be complete.
    if not rest:
        return
    group.commands[command].make_context(command, rest)


def test_the_map_of_the_code_names_every_part_and_imports_lead_upwards() -> None:
    map_of_code = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| where | what |")[2]
    rank: dict[str, int] = {}
    for row, line in enumerate(re.findall(r"^\| (`(?:schoenbat|pipeline)/.*?) \|", map_of_code, re.MULTILINE)):
        first, *others = re.findall(r"`([\w/]+)`", line)
        package, _, part = first.partition("/")
        rank |= dict.fromkeys((f"{package}.{each}" for each in (part, *others)), row)

    imports: set[tuple[str, str]] = set()
    parts: set[str] = set()
    for package in ("schoenbat", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            inside = path.relative_to(ROOT / package).parts
            if inside[0] in ("__init__.py", "build"):
                continue
            here = f"{package}.{inside[0].removesuffix('.py')}"
            parts.add(here)
            for module in imported(ast.parse(path.read_text(encoding="utf-8"))):
                imports.add((here, ".".join(module.split(".")[:2])))
    assert parts == set(rank)
    downwards = {(here, there) for here, there in imports if there in rank and rank[there] > rank[here]}
    assert downwards == {("pipeline.monitor", "pipeline.launch")}


def imported(tree: ast.Module) -> list[str]:
    """Modules that a module imports, other than for its types alone."""
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in for_types:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_the_diff_that_adds_a_mechanism_applies_and_is_what_is_here(tmp_path: Path) -> None:
    (diff,) = blocks(ROOT / "docs/adding.md", "diff")
    shutil.copy(ROOT / "profiles/quick.yaml", tmp_path / "params.yaml")
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    added = "schoenbat/attention/linear.py"
    assert (tmp_path / added).read_text(encoding="utf-8") == (ROOT / added).read_text(encoding="utf-8")
    params = load_params(tmp_path / "params.yaml")
    assert params.grid.plain.attn == ["softmax", "mean", "linear"]
