"""What can be done with trained cells: four small ones, of a table of texts, are trained once for all tests here."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import yaml
from project_folder import ROOT, Project

from pipeline.cli import app as cli
from pipeline.grid.results import CellResults, pack_predictions, read_predictions
from pipeline.models.trained import load_trained
from schoenbat.errors import UserError
from schoenbat.lra.data.arrays import Dataset
from schoenbat.lra.pretrained import PretrainedClassifier

pytestmark = pytest.mark.xdist_group("trained")

Invoke = Callable[..., tuple[int, str, str]]

SOFTMAX, MEAN = "table-softmax-transformer-0", "table-mean-transformer-0"
WORDS = {"bad": ["dull", "flat", "weak"], "good": ["fine", "bold", "warm"]}


def file_of(kind: str, cell: str, profile: str = "tiny") -> Path:
    group, _, seed = cell.rpartition("-")
    return Path("runs", profile, group, kind, f"{seed}.{'npz' if kind == 'predictions' else 'json'}")


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 0


def write_table(path: Path) -> None:
    rows = [
        (f"a {word} film, number {number}", label)
        for label, words in WORDS.items()
        for word in words
        for number in range(40)
    ]
    path.write_text("review,verdict\n" + "".join(f'"{text}",{label}\n' for text, label in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder with trained and tested cells; one of a profile of pairs."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("SCHOENBAT_DATA_MIRROR", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        project = Project(folder)
        project.add_dvc()
        write_table(folder / "reviews.csv")
        data = {"path": "reviews.csv", "text": "review", "label": "verdict", "tokens": "words", "max_length": 16}
        project.set("task", {"table": {**project.settings["task"]["lra-text"], "data": data}})
        project.set("task.table.training", {**project.settings["task"]["table"]["training"], "learning_rate": 0.02})
        project.set("task.table.training.steps", 60)
        project.set("task.table.training.eval_every", 30)
        project.set("grid.tasks", ["table"])
        for command in ("download", "preprocess"):
            run(command, "--task", "table")
        for attn in ("softmax", "mean"):
            for seed in ("0", "1"):
                for stage in ("train", "eval"):
                    run(stage, "--task", "table", "--attn", attn, "--former", "transformer", "--seed", seed)
        yield folder


@pytest.fixture
def trained(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    for name in ("SCHOENBAT_DATA_MIRROR", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_predict_names_the_classes_of_texts_it_has_never_seen(trained: Path, invoke: Invoke) -> None:
    code, out, err = invoke("predict", "--cell", SOFTMAX, "a dull thing", "a warm thing", "--top", "1")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["bad", "good"]
    assert out.splitlines()[0].endswith("%  a dull thing")


def test_predict_says_of_a_text_of_unknown_words_that_its_answer_says_little(trained: Path, invoke: Invoke) -> None:
    code, out, err = invoke("predict", "--cell", SOFTMAX, "a dull thing", "quibble zounds", "zounds, a film")
    assert (code, len(out.splitlines())) == (0, 3)
    assert err == ("warning: text 2: 2 of its 2 words are in no training text, so its answer says little\n")
    with pytest.warns(UserWarning, match="2 of its 2 words"):
        load_trained(SOFTMAX).classifier.predict(["quibble zounds"])


def test_predict_reads_standard_input_and_speaks_json(
    trained: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("a dull thing\n\na warm thing\n"))
    code, out, _ = invoke("predict", "--cell", SOFTMAX, "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["cell"], answer["profile"]) == (SOFTMAX, "tiny")
    assert [each["text"] for each in answer["predictions"]] == ["a dull thing", "a warm thing"]
    for each, likeliest in zip(answer["predictions"], ("bad", "good"), strict=True):
        assert next(iter(each["classes"])) == likeliest
        assert sum(each["classes"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "the input is not utf-8 (byte 0xe9)"), (b"\n", "standard input holds no text")],
)
def test_predict_says_what_is_wrong_with_standard_input(
    trained: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(content), encoding="utf-8"))
    assert invoke("predict", "--cell", SOFTMAX) == (2, "", f"error: {message}\n")


def test_predict_gives_the_logits_that_the_test_was_scored_with(trained: Path) -> None:
    found = load_trained(SOFTMAX)
    batch = Dataset(trained / "data/processed/tiny/table").batch("test", torch.arange(24).numpy())
    rows = [line.rpartition(",") for line in (trained / "reviews.csv").read_text().splitlines()[1:]]
    known = {found.classifier.encode([text.strip('"')]).numpy().tobytes(): text.strip('"') for text, _, _ in rows}
    texts = [known[tokens.numpy().tobytes()] for tokens in batch.tokens]
    predicted = [next(iter(classes)) for classes in found.classifier.predict(texts)]
    truth = [found.classifier.class_names[label] for label in batch.labels]
    score = json.loads(file_of("test", SOFTMAX).read_text())
    assert score["examples"] == 24
    assert sum(map(str.__eq__, predicted, truth)) / 24 == score["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cell", "table-sofmax-transformer-0", "x"), f"choose one of: {SOFTMAX}"),
        (("--cell", SOFTMAX, "x", "--top", "0"), "--top must be at least 1, not 0"),
        (("--cell", SOFTMAX, " "), "a text is empty"),
        (("--cell", SOFTMAX, "x", "--profile", "other"), "no trained cell"),
        (("--cell", SOFTMAX, "x", "--device", "gpu"), "unknown device 'gpu'"),
    ],
)
def test_what_cannot_be_classified_is_one_line(
    trained: Path, invoke: Invoke, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = invoke("predict", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_export_loads_elsewhere_without_a_network_and_gives_the_same_bits(
    trained: Path, invoke: Invoke, tmp_path: Path
) -> None:
    target = tmp_path / "deep/exported"
    code, out, err = invoke("export", SOFTMAX, str(target))
    assert code == 0, err
    assert [Path(line).name for line in out.splitlines()] == [
        "README.md",
        "config.json",
        "model.safetensors",
        "params.yaml",
    ]
    found = load_trained(SOFTMAX).classifier
    texts = ["a dull thing", "a warm and rather long thing, number 7"]
    expected = found.model(found.encode(texts))
    script = """
import socket, sys, torch
socket.socket.connect = None
from schoenbat import PretrainedClassifier
classifier = PretrainedClassifier.from_pretrained(sys.argv[1])
print(classifier.model(classifier.encode(sys.argv[2:])).flatten().tolist())
print(sorted({"mlflow", "dvc", "typer", "pipeline"} & set(sys.modules)))
"""
    moved = tmp_path / "moved"
    shutil.move(target, moved)
    elsewhere = subprocess.run(
        [sys.executable, "-c", script, str(moved), *texts],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert elsewhere == [str(expected.flatten().tolist()), "[]"]


@pytest.mark.slow
def test_an_export_as_onnx_gives_the_same_logits(trained: Path, invoke: Invoke, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra schoenbat[onnx]")
    code, out, err = invoke("export", SOFTMAX, str(tmp_path / "exported"), "--format", "onnx")
    assert (code, Path(out.splitlines()[2]).name) == (0, "model.onnx"), err
    found = load_trained(SOFTMAX).classifier
    session = onnxruntime.InferenceSession(tmp_path / "exported/model.onnx")
    for texts in (["dull"], ["a dull thing", "a warm and rather long thing, number 7", "so so"]):
        tokens = found.encode(texts)
        (logits,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), found.model(tokens), rtol=1e-5, atol=1e-5)
    code, _, err = invoke("export", SOFTMAX, str(tmp_path / "other"), "--format", "onx")
    assert code == 2
    assert "onnx" in err


def test_the_card_states_results_data_seed_revision_and_its_code_runs(
    trained: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke("export", SOFTMAX, str(tmp_path / "exported"))[0] == 0
    card = (tmp_path / "exported/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "mit"
    test = json.loads(file_of("test", SOFTMAX).read_text())
    metrics = json.loads(file_of("metrics", SOFTMAX).read_text())
    for row in (
        f"| test accuracy | {100 * test['accuracy']:.2f} % of 24 examples |",
        "| data | reviews.csv, words; reviews.csv |",
        "| seed | 0 |",
        f"| git revision | `{metrics['git_revision']}` |",
        "| without a model: majority class | 50.00 % |",
        f"| data fingerprint | `{metrics['fingerprint']['data']}` |",
    ):
        assert row in card, row
    assert f"schoenbat-exp run --cell {SOFTMAX}" in card
    (code,) = [block.removeprefix("python\n") for block in card.split("```") if block.startswith("python\n")]
    monkeypatch.chdir(tmp_path / "exported")
    exec(compile(code, "README.md", "exec"), {})


def test_the_settings_of_an_export_are_a_grid_of_that_cell_alone(trained: Path, invoke: Invoke, tmp_path: Path) -> None:
    from pipeline.grid.cells import expand, resolve
    from pipeline.grid.params import load_params

    assert invoke("export", MEAN, str(tmp_path / "exported"))[0] == 0
    params = load_params(tmp_path / "exported/params.yaml")
    (cell,) = expand(params)
    assert cell.id == MEAN
    assert resolve(params, cell).settings() == resolve(load_params(), cell).settings()


def test_an_export_is_refused_where_it_could_not_be_made_again(trained: Path, invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "is no empty folder" in invoke("export", SOFTMAX, str(tmp_path / "full"))[2]
    target = tmp_path / "exported"
    code = load_trained(SOFTMAX).metrics.fingerprint.code
    for file, text, changed, message in (
        (file_of("metrics", SOFTMAX), code, "of other code", "the code has changed since"),
        (Path("params.yaml"), "steps: 60", "steps: 90", "trained with other settings than those of params.yaml"),
    ):
        before = file.read_text()
        file.write_text(before.replace(text, changed))
        code, _, err = invoke("export", SOFTMAX, str(target))
        assert (code, len(err.splitlines())) == (2, 1), err
        assert message in err
        file.write_text(before)
        assert list(tmp_path.iterdir()) == [tmp_path / "full"]


def test_a_damaged_export_is_one_line(trained: Path, invoke: Invoke, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    assert invoke("export", SOFTMAX, str(target))[0] == 0
    with pytest.raises(UserError, match=r"holds no exported model: config\.json is missing"):
        PretrainedClassifier.from_pretrained(tmp_path)
    weights = (target / "model.safetensors").read_bytes()
    for content in (weights[:100], weights[:-4], b""):
        (target / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"does not fit config\.json") as raised:
            PretrainedClassifier.from_pretrained(target)
        assert "\n" not in str(raised.value)
    (target / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        PretrainedClassifier.from_pretrained(target)


def compared(invoke: Invoke, *arguments: str) -> dict[str, Any]:
    code, out, err = invoke("compare", *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_two_cells_differ_in_what_they_were_told_and_in_their_numbers(trained: Path, invoke: Invoke) -> None:
    found = compared(invoke, SOFTMAX, MEAN)
    assert found["settings"] == {"attn": {"a": "softmax", "b": "mean"}}
    assert (found["data"], found["code_differs"]) == ({}, None)
    numbers = {number["name"]: number for number in found["numbers"]}
    for side, cell in (("a", SOFTMAX), ("b", MEAN)):
        metrics = json.loads(file_of("metrics", cell).read_text())
        test = json.loads(file_of("test", cell).read_text())
        assert numbers["parameters"][side] == metrics["num_parameters"]
        assert numbers["dev loss"][side] == metrics["best_dev_loss"]
        assert numbers["test accuracy"][side] == test["accuracy"]
    right = [read_predictions(file_of("predictions", cell)).correct for cell in (SOFTMAX, MEAN)]
    apart = [int(((right[0] - right[1]) * sign > 0).sum()) for sign in (1, -1)]
    expected = scipy.stats.binomtest(apart[0], sum(apart)).pvalue if sum(apart) else 1.0
    assert numbers["test accuracy"]["p"] == expected
    assert numbers["parameters"]["p"] is None
    code, out, _ = invoke("compare", SOFTMAX, MEAN)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "table softmax transformer | table mean transformer, seed 0" in out
    assert re.search(r"test accuracy +[\d.]+ % +[\d.]+ % ", out)


def test_two_profiles_are_paired_by_seed_and_tested(trained: Path, invoke: Invoke) -> None:
    other = trained / "runs/other"
    shutil.copytree(trained / "runs/tiny", other)
    for file in other.glob("*/*/*.json"):
        file.write_text(file.read_text().replace('"profile": "tiny"', '"profile": "other"'))
    losses = {}
    for seed, loss in ((0, 0.1), (1, 0.3)):
        path = file_of("metrics", f"table-mean-transformer-{seed}", "other")
        content = json.loads(path.read_text())
        losses[seed] = content["best_dev_loss"]
        path.write_text(json.dumps({**content, "best_dev_loss": losses[seed] + loss, "git_revision": "abc"}))
    for file in CellResults("other", "table-softmax-transformer-1").files()[1:]:
        file.unlink()
    file = file_of("predictions", SOFTMAX, "other")
    predicted = read_predictions(file)
    wrong = predicted.correct.copy()
    wrong[:10] = 1 - wrong[:10]
    file.write_bytes(pack_predictions(dataclasses.replace(predicted, correct=wrong)))
    file = file_of("test", SOFTMAX, "other")
    file.write_text(json.dumps({**json.loads(file.read_text()), "accuracy": float(wrong.mean())}))
    found = compared(invoke, "tiny", "other")
    numbers = {(number["of"].split()[1], number["name"]): number for number in found["numbers"]}
    changed = numbers["mean", "dev loss"]
    assert changed["difference"] == pytest.approx(0.2)
    assert changed["p"] == pytest.approx(scipy.stats.ttest_rel([0.1, 0.3], [0, 0]).pvalue)
    assert changed["p"] <= changed["adjusted"] <= 1
    changed = numbers["softmax", "test accuracy"]
    assert changed["difference"] == pytest.approx(wrong.mean() - predicted.correct.mean())
    assert changed["p"] == pytest.approx(scipy.stats.binomtest(int((wrong[:10] == 0).sum()), 10).pvalue)
    assert numbers["mean", "test accuracy"]["p"] == 1
    assert numbers["mean", "test loss"]["same"]
    assert numbers["softmax", "dev loss"]["seeds"] == [0]
    assert found["only_a"] == ["table softmax transformer, seed 1"]
    assert (found["only_b"], found["code_differs"]) == ([], False)
    out = invoke("compare", "tiny", "other")[1]
    assert "only in A: table softmax transformer, seed 1" in out
    assert "Code: the same where cells depend on it" in out
    shutil.rmtree(other)


@pytest.mark.slow
def test_a_revision_is_compared_by_what_git_and_dvc_have_of_it(
    trained: Path, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(trained, folder, symlinks=True)
    monkeypatch.chdir(folder)

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True, capture_output=True
        )

    git("init", "-q")
    Path(".dvc/config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    Path(".gitignore").write_text("/data\n/mlflow.db\n/mlruns\n/logs\n/checkpoints\n/weights\n/.dvc/cache\n/.dvc/tmp\n")
    run("numerics")
    stages = [f"{stage}@tiny-{SOFTMAX.removesuffix('-0')}" for stage in ("train", "evaluate")]
    commit = [sys.executable, "-m", "dvc", "commit", "--force", "--quiet", *stages]
    subprocess.run(commit, check=True, capture_output=True)
    git("add", ".")
    git("commit", "-q", "-m", "before")
    git("tag", "before")
    metrics = file_of("metrics", SOFTMAX)
    content = json.loads(metrics.read_text())
    metrics.unlink()
    metrics.write_text(json.dumps({**content, "best_dev_loss": content["best_dev_loss"] + 1}))
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("dropout: 0.1", "dropout: 0.2"))
    found = compared(invoke, "before")
    assert found["settings"] == {"task.table.model.dropout": {"a": 0.1, "b": 0.2}}
    numbers = {(number["of"].split()[1], number["name"]): number for number in found["numbers"]}
    assert numbers["softmax", "dev loss"]["difference"] == pytest.approx(0.5), "one of two seeds has changed by 1"
    assert numbers["softmax", "test accuracy"]["same"]
    assert numbers["mean", "dev loss"]["same"]
    assert found["only_a"] == found["only_b"] == []
    assert compared(invoke, "before", "before")["settings"] == {}


@pytest.mark.parametrize("name", ["tinny", "table-sofmax-transformer-0", "--", "nowhere/x"])
def test_what_cannot_be_compared_is_one_line(trained: Path, invoke: Invoke, name: str) -> None:
    arguments = ("--", name) if name == "--" else (name,)
    code, out, err = invoke("compare", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "no profile or cell with results, and no git revision; choose from: " in err
