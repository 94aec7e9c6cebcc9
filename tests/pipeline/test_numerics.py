"""Digests of what code computes: they follow each change of it, not that of its text, and no code is left out."""

import ast
import dataclasses
import functools
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from project_folder import ROOT, Project
from small_grid import MEAN, RMFA, make_small, start_grid

from pipeline.grid import numerics
from pipeline.grid.axes import stage_names
from pipeline.grid.cells import expand, resolve
from pipeline.grid.freshness import data_folder
from pipeline.grid.numerics import component_digests, digest, write_numerics
from pipeline.grid.params import cell_training, load_params
from pipeline.grid.results import CellResults
from pipeline.host.files import read_json
from pipeline.stages import download, preprocess
from pipeline.stages.golden import golden_record
from schoenbat.attention import ATTENTIONS
from schoenbat.kernels import KERNELS
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.training import fit, load_model, predict, save_model

Digests = dict[tuple[str, str], str]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
COMPONENTS = [("attention", name) for name in ATTENTIONS.names()] + [("kernel", name) for name in KERNELS.names()]
FOLDERS = {"attention": "attention", "kernel": "kernels"}
IDS = [f"{kind} {name}" for kind, name in COMPONENTS]
COMPUTE_NOTHING = (
    "schoenbat.errors",
    "schoenbat.files",
    "schoenbat.registry",
    "schoenbat.lra.config",
    # Its hook runs for each module of torch as soon as another test of this process has imported it; no cell does.
    "schoenbat.integrations.huggingface",
)


class Tree:
    """A copy of the code whose digests are taken; edits end with the test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._written: dict[Path, str] = {}
        self.before = self.digests()

    def file(self, module: str) -> Path:
        path = self.root.joinpath(*module.split("."))
        return path / "__init__.py" if path.is_dir() else path.with_name(f"{path.name}.py")

    def source(self, module: str) -> str:
        return self.file(module).read_text()

    def write(self, module: str, source: str) -> None:
        compile(source, module, "exec")
        self._written.setdefault(self.file(module), self.source(module))
        self.file(module).write_text(source)

    def replace(self, module: str, old: str, new: str) -> None:
        assert self.source(module).count(old) == 1, f"{module} must have this line once: {old}"
        self.write(module, self.source(module).replace(old, new))

    def restore(self) -> None:
        for path, source in self._written.items():
            path.write_text(source)
        self._written.clear()

    def digests(self) -> Digests:
        return {(kind, name): digest(component_digests(kind, name)) for kind, name in COMPONENTS}

    def changed(self) -> set[tuple[str, str]]:
        """Return the components whose digest is another than that of the code as it is."""
        return {component for component, found in self.digests().items() if found != self.before[component]}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    root = tmp_path_factory.mktemp("code")
    for package in ("schoenbat", "pipeline"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "package_folder", lambda package: str(root / package))
        yield Tree(root)


@pytest.fixture
def tree(copied: Tree) -> Iterator[Tree]:
    yield copied
    copied.restore()


def module_of(kind: str, name: str) -> str:
    return f"schoenbat.{FOLDERS[kind]}.{name}"


def functions(tree: ast.Module) -> Iterator[Function]:
    """Yield the functions of a module that lie inside no other."""
    for node in tree.body:
        yield from (each for each in ast.walk(node) if isinstance(node, ast.ClassDef) and isinstance(each, Function))
        if isinstance(node, Function):
            yield node


def with_other_texts(source: str) -> str:
    """Return a module with other docstrings and messages, without comments, and laid out in another way."""
    module = ast.parse(source)
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:]
            node.body.insert(0, ast.Expr(ast.Constant("Another text.")))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc.args = [ast.Constant("another message")]
    # Not before `from __future__`, which has to come first.
    return f"# Another comment.\n{ast.unparse(ast.fix_missing_locations(module))}\n"


def with_other_variables(source: str) -> str:
    """Return a module whose functions call their variables, but for arguments, something else."""
    module = ast.parse(source)
    for function in functions(module):
        nodes = list(ast.walk(function))
        kept = {node.arg for node in nodes if isinstance(node, ast.arg)}
        kept |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        kept |= {name for node in nodes if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
        kept |= {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names = [node for node in nodes if isinstance(node, ast.Name)]
        local = {node.id for node in names if isinstance(node.ctx, ast.Store)} - kept
        for node in names:
            if node.id in local:
                node.id = f"{node.id}_renamed"
    return f"{ast.unparse(module)}\n"


def with_functions_moved(source: str) -> str:
    """Return a module whose functions stand at its end, the last of them first."""
    module = ast.parse(source)
    moved = [node for node in module.body if isinstance(node, Function)]
    rest = [node for node in module.body if not isinstance(node, Function)]
    return f"{ast.unparse(ast.Module([*rest, *moved[::-1]], []))}\n"


def with_another_result(source: str) -> str:
    """Return a module in which every function that returns a value returns it twice."""
    module = ast.parse(source)
    for node in ast.walk(module):
        if isinstance(node, ast.Return) and node.value is not None:
            node.value = ast.Tuple([node.value, node.value], ast.Load())
    return f"{ast.unparse(ast.fix_missing_locations(module))}\n"


def with_comments(source: str) -> str:
    return f"# A comment.\n{source}# Another.\n"


@pytest.mark.parametrize(
    "edit",
    [
        with_other_texts,
        *(
            pytest.param(edit, marks=pytest.mark.slow)
            for edit in (with_comments, with_other_variables, with_functions_moved)
        ),
    ],
)
def test_an_edit_of_the_text_of_all_modules_changes_no_digest(tree: Tree, edit: Callable[[str], str]) -> None:
    edited = 0
    for file in sorted(tree.root.joinpath("schoenbat").rglob("*.py")):
        module = ".".join(file.relative_to(tree.root).with_suffix("").parts).removesuffix(".__init__")
        before = tree.source(module)
        tree.write(module, edit(before))
        edited += ast.dump(ast.parse(tree.source(module))) != ast.dump(ast.parse(before))
    assert edited > 30 or edit is with_comments
    assert tree.changed() == set()


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        ("sinusoidal_positions", "schoenbat.lra.encoder", "schoenbat.lra.multihead"),
        ("add_gradients", "schoenbat.lra.training", "schoenbat.lra.encoder"),
        ("sums_bytes", "schoenbat.attention", "schoenbat.kernels"),
    ],
)
def test_a_function_that_moves_to_another_module_changes_no_digest(
    tree: Tree, function: str, old: str, new: str
) -> None:
    source = tree.source(old)
    (found,) = [node for node in ast.parse(source).body if isinstance(node, Function) and node.name == function]
    text = ast.get_source_segment(source, found)
    assert text is not None
    tree.write(new, f"{tree.source(new)}\n\n{text}\n")
    tree.write(old, source.replace(text, f"from {new} import {function}"))
    assert tree.changed() == set()


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=IDS)
def test_a_change_of_one_component_changes_its_digest_and_no_other(tree: Tree, kind: str, name: str) -> None:
    module = module_of(kind, name)
    tree.write(module, with_another_result(tree.source(module)))
    assert tree.changed() == {(kind, name)}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mean", "sum(-2, keepdim=True).clamp_min(1)", "sum(-2, keepdim=True).clamp_min(2)"),
        ("rmfa", "num_features: int = ", "num_features: int = 1 + "),
        ("cosformer", "math.pi", "3.0 * math.pi"),
    ],
)
def test_a_changed_constant_of_a_mechanism_changes_its_digest_and_no_other(
    tree: Tree, name: str, old: str, new: str
) -> None:
    module = module_of("attention", name)
    source = tree.source(module)
    tree.write(module, source.replace(old, new, 1))
    assert tree.source(module) != source
    assert tree.changed() == {("attention", name)}


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("schoenbat.lra.encoder", "self.mlp_norm = nn.LayerNorm(config.width)", "self.mlp_norm = nn.Identity()"),
        ("schoenbat.lra.encoder", "EMBEDDING_STD = ", "EMBEDDING_STD = 2 * "),
        ("schoenbat.lra.training", "CLIP_VALUE = ", "CLIP_VALUE = 2 * "),
    ],
)
def test_a_change_of_what_all_share_changes_the_digest_of_every_mechanism(
    tree: Tree, module: str, old: str, new: str
) -> None:
    tree.replace(module, old, new)
    assert tree.changed() == {component for component in COMPONENTS if component[0] == "attention"}


def test_a_constant_in_cpp_changes_the_digests_of_the_mechanisms_that_run_it_and_a_comment_none(tree: Tree) -> None:
    source = tree.root / "schoenbat/ops/native/attention.cpp"
    text = source.read_text()
    assert text.count("STANDARD_ERRORS = 3,") == 1
    try:
        source.write_text(text.replace("STANDARD_ERRORS = 3,", "STANDARD_ERRORS = 4,"))
        changed = tree.changed()
        source.write_text("// Another comment.\n" + text.replace("\n  ", "\n      "))
        assert tree.changed() == set()
    finally:
        source.write_text(text)
    assert {("attention", "rmfa"), ("attention", "rmfa-sketch")} <= changed
    assert ("attention", "mean") not in changed
    assert all(kind == "attention" for kind, _ in changed)


EDITS: dict[str, tuple[str, str]] = {
    "a default of an argument": ("def f(x, k=1): return x", "def f(x, k=2): return x"),
    "an argument's name": ("def f(x, k=1): return x", "def f(x, m=1): return x"),
    "an operator": ("def f(x): return x + 1", "def f(x): return x - 1"),
    "a condition before an error": ("def f(x):\n if x > 1: raise ValueError", "def f(x):\n if x > 2: raise ValueError"),
    "a type of number": ("def f(x): return x * 1", "def f(x): return x * 1.0"),
    "which variable is meant": (
        "def f(x):\n a = b = x\n a = a + 1\n return a",
        "def f(x):\n a = b = x\n a = a + 1\n return b",
    ),
    "a name from outside": ("def f(x):\n a = g(x)\n return a", "def f(x):\n a = h(x)\n return a"),
    "the order of statements": ("def f(x):\n g(x)\n h(x)", "def f(x):\n h(x)\n g(x)"),
    "an attribute": ("def f(x): return x.a", "def f(x): return x.b"),
    "a decorator": ("def f(x): return x", "@g\ndef f(x): return x"),
    "the type of a field": ("class F:\n x: int", "class F:\n x: float"),
    "a base class": ("class F(A): pass", "class F(B): pass"),
    "a constant behind a condition": ("if g:\n f = 1\nelse:\n f = 2", "if g:\n f = 1\nelse:\n f = 3"),
    "a function behind a condition": ("if g:\n def f(): return 1", "if g:\n def f(): return 2"),
    "what runs on import": ("g(1)", "g(2)"),
}


@pytest.mark.parametrize("what", EDITS)
def test_what_computes_something_else_has_another_digest(tree: Tree, what: str) -> None:
    source = tree.source("schoenbat.attention.mean").replace("        return mean", "        f, F\n        return mean")
    digests = []
    for edit in EDITS[what]:
        tree.write("schoenbat.attention.mean", f"{source}\n{edit}\n")
        digests.append(component_digests("attention", "mean"))
    assert digests[0] != digests[1]


def test_files_of_numerics_follow_the_components(project: Project) -> None:
    write_numerics({"attention": ["rmfa+wide"]})
    written = {str(path) for path in Path("numerics").rglob("*.json")}
    assert {f"numerics/{kind}/{name}.json" for kind, name in COMPONENTS} < written
    assert {"numerics/task/lra-text.json", "numerics/stage/bench.json", "numerics/attention/rmfa+wide.json"} < written
    for kind, name in COMPONENTS:
        assert json.loads(Path(f"numerics/{kind}/{name}.json").read_text()) == component_digests(kind, name)
    before = {path: path.stat().st_mtime_ns for path in Path("numerics").rglob("*.json")}
    Path("numerics/attention/gone.json").write_text("{}")
    Path("numerics/kernel/exp.json").write_text("{}")
    write_numerics({})
    # What is right is not touched, and another profile's variants stay.
    after = {path: path.stat().st_mtime_ns for path in Path("numerics").rglob("*.json")}
    assert {path for path in before.keys() | after if before.get(path) != after.get(path)} == {
        Path("numerics/kernel/exp.json")
    }


class Executed:
    """Collects the functions of the library that run while it is entered."""

    def __init__(self) -> None:
        self._codes: set[CodeType] = set()

    def __enter__(self) -> None:
        sys.setprofile(self._see)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            self._codes.add(frame.f_code)

    def definitions(self) -> set[tuple[str, str]]:
        """Return the modules, and the functions, classes and constants of them, in which something ran."""
        found: set[tuple[str, str]] = set()
        for code in self._codes:
            path = Path(code.co_filename)
            # What runs on import, bodies of modules and classes, is not meant.
            if path.is_relative_to(ROOT / "schoenbat") and code.co_flags & inspect.CO_OPTIMIZED:
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                *_, within = (node for node in statements(path) if begins(node) <= code.co_firstlineno)
                if isinstance(within, Definition):
                    found.add((module, within.name))
                else:
                    names = (node for node in ast.walk(within) if isinstance(node, ast.Name))
                    found |= {(module, node.id) for node in names if isinstance(node.ctx, ast.Store)}
        return found


@functools.cache
def statements(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_bytes()).body


def begins(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, Definition) else []
    return min(each.lineno for each in (node, *decorators))


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with one task that sees all and one that is causal, whose data is prepared."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trainable")
        patch.chdir(folder)
        project = Project(folder)
        section = project.settings["task"].pop("lra-text")
        section["data"] = {"max_length": 32, "num_pairs": 4, "num_symbols": 16}
        section["data"] |= {"train_size": 64, "dev_size": 16, "test_size": 16}
        project.settings["task"]["recall-mqar"] = section
        for task in project.settings["task"].values():
            task["training"] |= {"steps": 3, "eval_every": 3}
        kernels = {name: ATTENTIONS.get(name).needs_kernel for name in ATTENTIONS.names()}
        project.settings["attention"] = {
            name: {"max_length": 64} if ATTENTIONS.get(name).needs_max_length else {} for name in kernels
        }
        project.settings["grid"] = {
            "tasks": ["lra-listops", "recall-mqar"],
            "seeds": [0],
            "plain": {
                "attn": [name for name, needs in kernels.items() if not needs],
                "former": ["transformer", "maclauformer"],
            },
            "kernel": {
                "attn": [name for name, needs in kernels.items() if needs],
                "dotf": ["exp"],
                "former": ["maclauformer"],
            },
        }
        project.write()
        params = load_params()
        for task in params.grid.tasks:
            download.run(params, task)
            preprocess.run(params, task)
        yield project


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_every_function_that_runs_for_a_cell_is_in_its_digests(
    trainable: Project, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trainable.folder)
    params = load_params()
    cells = [cell for cell in expand(params) if cell.attn == name]
    assert cells
    for cell in cells:
        folder = data_folder("tiny", cell.task)
        meta = read_json(folder / "meta.json")
        if meta["causal"] and not ATTENTIONS.get(name).has_causal_form:
            continue
        # For what is imported meanwhile.
        resolve(params, cell).build_model(meta)
        executed, device = Executed(), torch.device("cpu")
        with executed:
            dataset, model = Dataset(folder), resolve(params, cell).build_model(meta)
            config, checkpoint = cell_training(params, cell), tmp_path / f"{cell.id}.pt"
            fit(model, dataset, config, seed=0, device=device, checkpoint=checkpoint, on_step=lambda report: None)
            save_model(tmp_path / "best.pt", model, {})
            model.load_state_dict(load_model(tmp_path / "best.pt")[0])
            predict(model, dataset, "test", batch_size=config.batch_size, device=device).score()
        ran = executed.definitions()
        assert {"Block", "fit", "predict", "Dataset"} < {name for _, name in ran}
        digests = [component_digests("attention", name)]
        digests += [] if cell.dotf is None else [component_digests("kernel", cell.dotf)]
        listed = {(name, each) for found in digests for name, digest in found.items() for each in digest.split("+")}
        for module, defined in ran:
            if module not in COMPUTE_NOTHING:
                (definition,) = numerics._read(numerics._source(module), module).definitions[defined]
                assert (defined, definition.digest) in listed, f"{module}.{defined} runs for {cell.id}"


def lines_of(run: Callable[[], object]) -> set[tuple[str, int]]:
    """Return the lines of the library's functions that a call runs."""
    found: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    def enter(frame: FrameType, _event: str, _: object) -> Any:
        inside = frame.f_code.co_filename.startswith(str(ROOT / "schoenbat"))
        return note if inside and frame.f_code.co_flags & inspect.CO_OPTIMIZED else None

    sys.settrace(enter)
    try:
        run()
    finally:
        sys.settrace(None)
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("softmax", "rmfa", "rmfa-sketch") else [pytest.mark.slow])
        for name in ATTENTIONS.names()
    ],
)
def test_golden_steps_run_what_a_cell_runs(
    trainable: Project, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """95 % of the lines at least; the others write progress and resume from a checkpoint."""
    monkeypatch.chdir(trainable.folder)
    params = load_params()
    cell = next(cell for cell in expand(params) if cell.attn == name)
    folder, device = data_folder("tiny", cell.task), torch.device("cpu")
    config = dataclasses.replace(cell_training(params, cell), steps=12, eval_every=4)

    def whole() -> None:
        dataset, model = Dataset(folder), resolve(params, cell).build_model(read_json(folder / "meta.json"))
        fit(model, dataset, config, seed=0, device=device, checkpoint=tmp_path / "a.pt", on_step=lambda report: None)
        save_model(tmp_path / "best.pt", model, {})
        model.load_state_dict(load_model(tmp_path / "best.pt")[0])
        predict(model, dataset, "test", batch_size=config.batch_size, device=device).score()

    # What is imported and cached meanwhile is not meant.
    golden_record(params, cell)
    of_cell, of_golden = lines_of(whole), lines_of(lambda: golden_record(params, cell))
    assert len(of_cell - of_golden) <= 0.05 * len(of_cell), sorted(of_cell - of_golden)


@pytest.mark.slow
def test_dvc_and_status_follow_what_the_code_computes_and_not_its_text(project: Project) -> None:
    folder = make_small(project.folder).folder
    scripts = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(folder)}
    train = {cell.id: stage_names("tiny", cell)[0] for cell in expand(load_params())}

    def call(module: str, *arguments: str) -> str:
        command = [sys.executable, "-m", module, *arguments]
        ended = subprocess.run(command, env=os.environ | scripts, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def to_run() -> set[str]:
        """Return the cells that `status` says are to run."""
        states = {row["cell"]: row["state"] for row in json.loads(call("pipeline.cli", "status", "--json"))["cells"]}
        assert set(states.values()) <= {"done", "to run"}
        return {cell for cell, state in states.items() if state == "to run"}

    def changed() -> set[str]:
        """Return the stages that DVC finds changed, but those that have not run."""
        return set(json.loads(call("dvc", "status", "--json"))) - {"bench@tiny", "errors@tiny"}

    grid = start_grid(folder)
    out, _ = grid.communicate()
    assert grid.returncode == 0, out
    assert (to_run(), changed()) == (set(), set())
    trained = {file: file.read_bytes() for cell in train for file in CellResults("tiny", cell).files()}

    mean, encoder = folder / "schoenbat/attention/mean.py", folder / "schoenbat/lra/encoder.py"
    before = mean.read_text()
    mean.write_text(f"# Another comment.\n{before}")
    assert (to_run(), changed()) == (set(), {"numerics"})
    call("dvc", "repro", "--quiet", "numerics")
    assert (to_run(), changed()) == (set(), set())

    mean.write_text(before.replace("clamp_min(1)", "clamp_min(2)"))
    assert to_run() == {MEAN}
    call("dvc", "repro", "--quiet", "numerics")
    assert (to_run(), changed()) == ({MEAN}, {train[MEAN]})

    shared = encoder.read_text()
    encoder.write_text(shared.replace("nn.LayerNorm(config.width)", "nn.LayerNorm(config.width, 1e-3)"))
    assert to_run() == {MEAN, RMFA}
    call("dvc", "repro", "--quiet", "numerics")
    assert (to_run(), changed()) == ({MEAN, RMFA}, set(train.values()))

    # Back to what they computed, nothing has to be trained.
    mean.write_text(before)
    encoder.write_text(shared)
    call("dvc", "repro", "--quiet", "numerics")
    assert (to_run(), changed()) == (set(), set())
    assert {file: file.read_bytes() for file in trained} == trained
