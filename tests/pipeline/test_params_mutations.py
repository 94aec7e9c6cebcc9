"""Sixty ways to write params.yaml wrongly: whoever reads it refuses it alike, in one line that names the key.

`dvc repro` reads the file by itself first. What it makes nothing of ends there; with all else it runs the first stage,
whose command refuses it. Nothing is made in either case.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project_folder import ROOT, Project

Invoke = Callable[..., tuple[int, str, str]]
Mutation = Callable[[Project], None]

CELL = ("--task", "lra-listops", "--attn", "softmax", "--former", "transformer")
COMMANDS = (
    *(("run", "--grid"), ("run", "--cell", "x"), ("status",), ("status", "--json"), ("list",)),
    *(("download", "--task", "lra-listops"), ("train", *CELL)),
)


def put(key: str, value: Any) -> Mutation:
    return lambda project: project.set(key, value)


def drop(key: str) -> Mutation:
    def apply(project: Project) -> None:
        *parents, last = key.split(".")
        place = project.settings
        for parent in parents:
            place = place[parent]
        del place[last]
        project.write()

    return apply


def text(before: str, after: str) -> Mutation:
    """Replace a piece of the file as it was written."""

    def apply(project: Project) -> None:
        path = project.folder / "params.yaml"
        written = path.read_text(encoding="utf-8")
        assert before in written
        path.write_bytes(written.replace(before, after, 1).encode("utf-8", "surrogatepass"))

    return apply


def raw(change: Callable[[str], bytes]) -> Mutation:
    def apply(project: Project) -> None:
        path = project.folder / "params.yaml"
        path.write_bytes(change(path.read_text(encoding="utf-8")))

    return apply


MODEL, TRAINING = "task.lra-listops.model", "task.lra-listops.training"
REFUSED: dict[str, tuple[Mutation, str]] = {
    "a key twice": (text("profile: tiny", "profile: tiny\nprofile: other"), 'duplicate key "profile"'),
    "a tab as indentation": (text("  lra-listops:\n", "\tlra-listops:\n"), "params.yaml line"),
    "UTF-16": (raw(lambda content: content.encode("utf-16")), "params.yaml is not UTF-8 text"),
    "Latin-1": (raw(lambda content: content.replace("For", "F\xfcr").encode("latin-1")), "not UTF-8 text"),
    "binary": (raw(lambda content: bytes(range(256))), "params.yaml is not UTF-8 text"),
    "a NUL": (raw(lambda content: content.encode() + b"\0"), "special characters are not allowed"),
    "empty": (raw(lambda content: b""), "missing key 'profile'"),
    "a list": (raw(lambda content: b"- profile\n"), "params.yaml must be a mapping"),
    "one word": (raw(lambda content: b"quick\n"), "params.yaml must be a mapping"),
    "two documents": (raw(lambda content: content.encode() + b"---\na: 1\n"), "another document"),
    "cut short": (text("note: For tests.", 'note: "For tests.'), "params.yaml line"),
    "nested too deeply": (text("note: For tests.", f"note: {'[' * 1500}"), "params.yaml: not valid YAML: nested"),
    "an undefined alias": (text("note: For tests.", "note: *x"), "undefined alias 'x'"),
    "code in a tag": (text("note: For tests.", "note: !!python/object/apply:os.system [touch made]"), "tag"),
    "a date that is none": (text("note: For tests.", "note: 2020-13-45"), "month must be in 1..12"),
    "a date": (text("note: For tests.", "note: 2020-12-24"), "note must be a str"),
    "half a character": (text("note: For tests.", r'note: "\ud800"'), "note has half a character"),
    "a key that is a number": (
        text("  mean: null", "  mean: null\n  1: null"),
        "a key must be a str, not 1",
    ),
    "an unknown key": (put("grid.sedes", [1]), "unknown key 'sedes'; known keys: seeds, "),
    "no note": (drop("note"), "missing key 'note'"),
    "no errors": (drop("errors"), "missing key 'errors'"),
    "no errors.trained": (drop("errors.trained"), "errors: missing key 'trained'"),
    "no bench": (drop("bench"), "missing key 'bench'"),
    "no model": (drop(MODEL), "task.lra-listops: missing key 'model'"),
    "null for errors": (put("errors", None), "errors: missing key"),
    "null for the grid": (put("grid", None), "grid: missing key"),
    "null for an axis": (put("grid.plain.attn", None), "grid.plain.attn must be a list"),
    "null for the tasks": (put("task", None), "task must be a mapping"),
    "a word for a number": (put(f"{TRAINING}.steps", "many"), "training.steps must be an int, not 'many'"),
    "a fraction for a count": (put(f"{TRAINING}.steps", 2.5), "training.steps must be an int"),
    "a number for a switch": (put("former.maclauformer.power", 1), "former.maclauformer.power must be a bool"),
    "a learning rate of NaN": (put(f"{TRAINING}.learning_rate", float("nan")), "learning_rate must be a finite number"),
    "a learning rate of infinity": (put(f"{TRAINING}.learning_rate", float("inf")), "learning_rate must be a finite"),
    "a learning rate below 0": (put(f"{TRAINING}.learning_rate", -1.0), "learning_rate must be positive"),
    "dropout of NaN": (put(f"{MODEL}.dropout", float("nan")), "dropout must be a finite number"),
    "a huge width": (put(f"{MODEL}.width", 10**9), "width must be at most 65536"),
    "more digits than are read": (text("width: 8", f"width: {'1' * 5000}"), "params.yaml: not valid YAML: Exceeds"),
    "more bits than are kept": (text("width: 8", f"width: 0x{'f' * 5000}"), "width must fit into 64 bits, which 0xf"),
    "a seed of 64 bits": (put("grid.seeds", [2**63]), "grid.seeds[0] must fit into 64 bits"),
    "a seed below 0": (put("grid.seeds", [-1]), "grid.seeds must not be negative"),
    "a seed twice": (put("grid.seeds", [3, 3]), "grid.seeds lists 3 more than once"),
    "a seed with a command in it": (put("grid.seeds", ["0; touch made"]), "grid.seeds[0] must be an int"),
    "a seed with an expression in it": (put("grid.seeds", ["$(touch made)"]), "grid.seeds[0] must be an int"),
    "a seed that is a mapping": (put("grid.seeds", [{"x; touch made": 1}]), "grid.seeds[0] must be an int"),
    "a task with a command in it": (put("grid.tasks", ["a'; touch made; '"]), "grid.tasks: unknown task"),
    "a former with a line break in it": (
        put("grid.plain.former", ["a\ntouch made"]),
        "unknown former",
    ),
    "a huge number of features": (put("attention.rmfa.num_features", 10**12), "num_features must be at most 65536"),
    "a huge option of a mechanism": (
        put("attention.performer", {"num_features": 10**12}),
        "num_features must be at most",
    ),
    "a huge data set": (put("task.lra-text.data.train_size", 2 * 10**12), "train_size must be at most 100000000"),
    "a huge degree": (put("attention.rmfa.max_degree", 10**6), "max_degree must be at most 100"),
    "a huge number of threads": (put("run.threads", 2**31), "threads must be at most 1024"),
    "a profile that is a path": (put("profile", "../elsewhere"), "profile must be 1 to 64 lower-case letters"),
    "a profile of one dot": (put("profile", "."), "profile must be 1 to 64 lower-case letters"),
    "a profile that is a number": (put("profile", 2024), "profile must be a str, not 2024 (int)"),
    "a profile of 300 letters": (put("profile", "a" * 300), "profile must be 1 to 64 lower-case letters"),
    "a cell that is not in the grid": (
        put("errors.trained", ["lra-text-mean-transformer-0"]),
        "the grid has no 'lra-text-mean-transformer-0'",
    ),
    "a kernel beyond its radius": (put("grid.kernel.former", ["transformer"]), "dotf 'inverse'"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    project = Project(folder)
    project.add_dvc()
    return folder


def repro(*arguments: str) -> tuple[int, str]:
    """`dvc repro` with this environment's schoenbat-exp: exit code and output."""
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def made(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not {"__pycache__", ".dvc"} & set(path.parts)}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "nested too deeply" else []) for name in REFUSED],
)
def test_every_reader_refuses_it_in_one_line_that_names_the_key(name: str, project: Project, invoke: Invoke) -> None:
    mutate, message = REFUSED[name]
    mutate(project)
    before = made(project.folder)
    lines = set()
    for arguments in COMMANDS:
        code, _, err = invoke(*arguments)
        assert code == 2, (arguments, err)
        assert err.startswith("error: params.yaml")
        assert message in err
        assert len(err.splitlines()) == 1
        assert len(err) < 1000
        lines.add(err)
    assert len(lines) == 1, "two commands say different things"
    assert made(project.folder) == before


SHOWN_TO_DVC = (
    *("a key twice", "UTF-16", "nested too deeply", "half a character", "an undefined alias", "null for an axis"),
    *("a seed with a command in it", "a profile that is a path"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN_TO_DVC)
def test_dvc_refuses_it_by_itself_or_by_its_first_stage(
    name: str, project: Project, sources: Path, invoke: Invoke
) -> None:
    mutate, _ = REFUSED[name]
    shutil.copytree(sources, project.folder, dirs_exist_ok=True)
    project.write()
    mutate(project)
    before = made(project.folder)
    _, _, line = invoke("status")
    code, output = repro()
    assert code != 0
    assert "Traceback" not in output
    if "Running stage" in output:
        assert line in output
    assert {path.name for path in made(project.folder) - before} <= {"logs", "data", "raw", ".gitignore"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "value"),
    [
        ("grid.seeds", "0; touch made #"),
        ("grid.seeds", "$(touch made)"),
        ("grid.seeds", "'; touch made; '"),
        ("grid.seeds", "0\ntouch made"),
        ("grid.plain.attn", "`touch made`"),
        ("grid.plain.former", '"; touch made; "'),
        ("grid.seeds", {"0; touch made #": 1}),
        ("grid.seeds", ["0; touch made #"]),
    ],
)
def test_nothing_that_stands_in_an_axis_is_run_by_the_shell_of_dvc(
    axis: str, value: Any, project: Project, sources: Path
) -> None:
    shutil.copytree(sources, project.folder, dirs_exist_ok=True)
    project.set(axis, [value])
    data = Path("data/processed/tiny/lra-listops/meta.json")
    data.parent.mkdir(parents=True)
    data.write_text("{}")
    if axis == "grid.plain.attn":
        shutil.copy("schoenbat/attention/mean.py", f"schoenbat/attention/{value}.py")
    code, output = repro("--single-item", "--glob", "train@tiny-lra-listops-*")
    assert code != 0
    assert "Traceback" not in output
    assert not Path("made").exists()


ACCEPTED: dict[str, tuple[Mutation, Any]] = {
    "a byte order mark": (raw(lambda content: b"\xef\xbb\xbf" + content.encode()), {}),
    "Windows line ends": (raw(lambda content: content.replace("\n", "\r\n").encode()), {}),
    "an octal of YAML 1.1": (text("train_size: 64", "train_size: 064"), {"task.lra-listops.data.train_size": 64}),
    "an octal": (text("train_size: 64", "train_size: 0o100"), {"task.lra-listops.data.train_size": 64}),
    "an exponent without a point": (
        text("learning_rate: 0.001", "learning_rate: 1e-3"),
        {f"{TRAINING}.learning_rate": 0.001},
    ),
    "a number in a list with a zero before it": (text("seeds:\n  - 0", "seeds:\n  - 010"), {"grid.seeds": [10, 1]}),
    "a merge key": (
        text("note: For tests.", "note: For tests.\ndata:\n  <<: {download_limit_mb: 7}"),
        {"data.download_limit_mb": 7},
    ),
    "null where all has defaults": (put(MODEL, None), {}),
}


def lookup(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings[part]
    return settings


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_means_what_it_means_to_dvc(
    name: str, project: Project, sources: Path, invoke: Invoke
) -> None:
    from dvc.repo import Repo

    from pipeline.grid.axes import stage_names
    from pipeline.grid.cells import expand
    from pipeline.grid.params import load_params
    from pipeline.grid.settings import read_yaml

    mutate, expected = ACCEPTED[name]
    shutil.copytree(sources, project.folder, dirs_exist_ok=True)
    project.write()
    mutate(project)
    assert invoke("status")[0] == 0
    params = load_params()
    with Repo() as repo:
        stages = {stage.name for stage in repo.index.stages if stage.name.startswith("train")}
        (seen,) = repo.params.show(targets=["params.yaml"])[""]["data"].values()
    assert stages == {stage_names(params.profile, cell)[0] for cell in expand(params)}
    assert seen["data"] == read_yaml(Path("params.yaml"))
    for key, value in expected.items():
        assert lookup(seen["data"], key) == value
