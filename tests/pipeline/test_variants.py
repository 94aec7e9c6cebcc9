"""Named settings of a mechanism, a former or a task: NAME+VARIANT, a name like any other wherever cells are named."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from project_folder import ROOT, Project

from pipeline.grid.axes import Cell, stage_names
from pipeline.grid.cells import expand, make_cells, resolve
from pipeline.grid.checked import load_checked
from pipeline.grid.numerics import component_digests
from pipeline.grid.params import cell_training, load_params
from schoenbat.attention import ATTENTIONS
from schoenbat.errors import UserError
from schoenbat.kernels import KERNELS
from schoenbat.lra.encoder import ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig, SelfAttention

Invoke = Callable[..., tuple[int, str, str]]

SMALL = Cell("lra-listops", "rmfa+4", "exp", "maclauformer+gain2", 0)


@pytest.fixture
def varied(project: Project) -> Project:
    """Half as many features, another gain and another training, each as a variant."""
    project.add_dvc()
    project.set("grid.tasks", ["lra-listops"])
    project.set("grid.seeds", [0])
    project.set("grid.plain.attn", ["mean", "mean+fast"])
    project.set("grid.kernel", {"attn": ["rmfa", "rmfa+4"], "dotf": ["exp"], "former": ["maclauformer+gain2"]})
    project.settings["attention"] |= {
        "rmfa+4": {"num_features": 4},
        "mean+fast": {"training": {"learning_rate": 0.01, "steps": 4}},
    }
    project.settings["former"] |= {"maclauformer+gain2": {"gain": 2.0}}
    project.write()
    return project


def dvc(*arguments: str) -> str:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_variant_is_a_point_of_its_axis_with_a_section_of_its_own(varied: Project) -> None:
    params = load_params()
    assert [cell.id for cell in expand(params)] == [
        "lra-listops-mean-transformer-0",
        "lra-listops-mean+fast-transformer-0",
        "lra-listops-rmfa-exp-maclauformer+gain2-0",
        "lra-listops-rmfa+4-exp-maclauformer+gain2-0",
    ]
    assert make_cells(params, "lra-listops", "rmfa+4", "exp", "maclauformer+gain2", 0) == [SMALL]
    found = resolve(params, SMALL).settings()
    assert (found["attention"], found["former"]["gain"]) == ({"num_features": 4}, 2.0)


def test_a_training_of_its_own_replaces_what_it_names_and_nothing_else(varied: Project) -> None:
    params = load_params()
    plain, fast, *_ = (cell_training(params, cell) for cell in expand(params))
    assert plain == params.task["lra-listops"].training
    assert (fast.learning_rate, fast.steps) == (0.01, 4)
    assert (fast.batch_size, fast.warmup_steps) == (plain.batch_size, plain.warmup_steps)
    assert params.attention["mean+fast"] == {}, "the mechanism would be asked for an option called training"
    varied.set("former.transformer", {"training": {"steps": 5}})
    with pytest.raises(
        UserError, match=r"training\.steps is set by both attention\.mean\+fast and former\.transformer"
    ):
        load_checked()


def test_the_model_of_a_variant_is_that_of_its_settings() -> None:
    model = build_model(
        vocab_size=4,
        num_classes=2,
        num_texts=1,
        max_length=8,
        model=ModelConfig(num_layers=1, width=8, ffn_width=8, num_heads=2, dropout=0.0, head_width=8),
        attn="rmfa+4",
        attention={"num_features": 4},
        dotf="exp",
        former="maclauformer+gain2",
        former_config=FormerConfig(gain=2.0),
        seed=0,
    )
    (heads,) = (module for module in model.modules() if isinstance(module, SelfAttention))
    assert type(heads.attention) is ATTENTIONS.get("rmfa")
    assert heads.attention.config.num_features == 4
    assert (heads.normalised, heads.gain) == (True, 2.0)


def test_what_has_no_settings_has_no_variants() -> None:
    with pytest.raises(UserError, match=r"unknown dotf 'exp\+2'"):
        KERNELS.get("exp+2")
    assert "rmfa+4" not in ATTENTIONS.names()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid.kernel.attn": ["rmfx+4"]}, "grid.kernel.attn: unknown attn 'rmfx+4'; choose one of: rmfa, "),
        ({"grid.kernel.attn": ["rmfa", "rmfa+"]}, "'rmfa+': a variant is NAME+VARIANT"),
        ({"grid.kernel.attn": ["rmfa", "rmfa+a+b"]}, "'rmfa+a+b': a variant is NAME+VARIANT"),
        ({"grid.kernel.attn": ["rmfa", "rmfa+; touch made"]}, "'rmfa+; touch made': a variant is NAME+VARIANT"),
        ({"grid.kernel.attn": ["rmfa", "rmfa+8"]}, "'rmfa+8' has no section attention.rmfa+8"),
        ({"grid.kernel.attn": ["rmfa"]}, "attention.rmfa+4 is a variant that no axis of grid lists"),
        ({"grid.kernel.former": ["maclauformer"]}, "former.maclauformer+gain2 is a variant that no axis of grid lists"),
        ({"grid.kernel.dotf": ["exp+2"]}, "grid.kernel.dotf: unknown dotf 'exp+2'"),
        ({"attention": {"rmfx+4": {}}}, "attention.rmfx+4 is a variant that no axis"),
        ({"former": {"maclaufromer+a": {}}}, "former.maclaufromer+a is a variant that no axis"),
        ({"attention.rmfa+4": {"num_featrues": 4}}, "attention.rmfa+4: unknown key 'num_featrues'"),
        ({"attention.rmfa+4": {"training": {"lr": 1.0}}}, "attention.rmfa+4.training: unknown key 'lr'"),
        ({"attention.rmfa+4": {"training": 3}}, "attention.rmfa+4.training must be a mapping, not 3"),
        (
            {"attention.rmfa+4": {"training": {"steps": 2}}},
            "attention.rmfa+4.training: warmup_steps must lie in [2, 2)",
        ),
        ({"attention.rmfa+4": {"training": {"steps": "many"}}}, "training.steps must be an int, not 'many'"),
        (
            {"grid.plain": {"attn": ["mean+exp", "mean+fast"], "former": ["transformer"]}, "attention.mean+exp": {}}
            | {"grid.kernel.attn": ["rmfa", "rmfa+4", "mean"]},
            "'mean' takes no kernel",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_it(varied: Project, changes: dict[str, Any], message: str) -> None:
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if section == "attention" and name:
            # Names of variants have no dots, but are no part of the helper's keys.
            varied.settings["attention"][name] = value
            varied.write()
        elif isinstance(value, dict) and section in ("attention", "former"):
            varied.settings[section] |= value
            varied.write()
        else:
            varied.set(key, value)
    with pytest.raises(UserError) as caught:
        load_params()
    assert str(caught.value).startswith("params.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_variant_is_computed_by_the_code_of_its_mechanism_and_dvc_sees_it(varied: Project, invoke: Invoke) -> None:
    assert component_digests("attention", "rmfa+4") == component_digests("attention", "rmfa")
    assert invoke("numerics")[0] == 0
    folder = Path("numerics/attention")
    assert (folder / "rmfa+4.json").read_bytes() == (folder / "rmfa.json").read_bytes()
    assert (folder / "rmfa+4.json").read_bytes() != (folder / "mean+fast.json").read_bytes()
    listed = {line.split()[0] for line in dvc("stage", "list", "--all").splitlines()}
    assert {stage for cell in expand(load_params()) for stage in stage_names("tiny", cell)} <= listed


@pytest.mark.slow
def test_dvc_alone_trains_a_variant_and_sees_when_what_its_mechanism_computes_changes(
    varied: Project, invoke: Invoke
) -> None:
    stage, evaluate = stage_names("tiny", SMALL)
    dvc("repro", "--quiet", stage)
    metrics = Path(f"runs/tiny/{SMALL.group}/metrics/0.json")
    assert json.loads(metrics.read_text())["attention"] == {"num_features": 4}
    assert json.loads(dvc("status", "--json", stage)) == {}
    assert list(json.loads(dvc("status", "--json", evaluate))) == [evaluate]
    (job, *_) = json.loads(invoke("run", "--cell", SMALL.id, "--dry-run", "--json")[1])["jobs"]
    assert job == {"job": SMALL.id, "stages": [stage, evaluate]}
    numerics = Path("numerics/attention/rmfa+4.json")
    numerics.write_text(json.dumps({**json.loads(numerics.read_text()), "added": "0"}))
    changed = json.loads(dvc("status", "--json", stage))
    assert changed[stage] == [{"changed deps": {str(numerics): "modified"}}]
