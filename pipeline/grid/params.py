"""The only reader of params.yaml: what the grid is made of, checked before anything runs.

Every name is looked up in its registry, every section is built strictly, and what does not fit is a UserError of one
line that names the key and the choices.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.grid.axes import Cell, GridParams
from pipeline.grid.numerics import REPLACING
from pipeline.grid.settings import MIRROR_VARIABLE, PARAMS_FILE, read_yaml
from schoenbat.attention import ATTENTIONS, MAX_FEATURES
from schoenbat.errors import UserError, shorten, unknown_name
from schoenbat.estimate import Estimate
from schoenbat.kernels import KERNELS
from schoenbat.lra.config import build_config
from schoenbat.lra.encoder import ModelConfig
from schoenbat.lra.multihead import FORMERS, FormerConfig
from schoenbat.lra.tasks import MAX_LENGTH, TASKS
from schoenbat.lra.training import TrainingConfig
from schoenbat.registry import VARIANT_MARK, base_name, check_bounds

T = TypeVar("T")
MAX_SEED = 2**63 - 1
"""The largest that torch's generators take on every device."""
MAX_THREADS = 1024
_MAX_OPTION, _MAX_DATA_OPTION = 2**20, 10**8
"""Of any whole number among the options of a mechanism, and of a task's data but its seed; components bound their own
more closely where it matters."""
_KINDS: dict[str, tuple[str, Callable[[], Sequence[str]]]] = {
    "task": ("task", TASKS.names),
    "attention": ("attn", ATTENTIONS.names),
    "former": ("former", lambda: FORMERS),
    "dotf": ("dotf", KERNELS.names),
}
"""By section: what one of its names is called, and which there are."""
_PROFILE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_DEVICE_NAME = re.compile(r"cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class TaskParams:
    """One section of `task`: `data` is the task's own Config."""

    data: Any
    model: ModelConfig
    training: TrainingConfig


@dataclass(frozen=True)
class DataParams:
    """Where data comes from.

    Attributes:
        mirror: a folder with copies of the sources, tried first; the variable SCHOENBAT_DATA_MIRROR wins over it.
        download_limit_mb: a larger download is not begun; null for no limit.
    """

    mirror: str | None = None
    download_limit_mb: int | None = 500

    def __post_init__(self) -> None:
        check_bounds(self, download_limit_mb=(0, 2**40))

    @property
    def mirror_folder(self) -> Path | None:
        folder = os.environ.get(MIRROR_VARIABLE) or self.mirror
        return Path(folder) if folder else None

    @property
    def limit_bytes(self) -> int | None:
        return None if self.download_limit_mb is None else self.download_limit_mb * 10**6


@dataclass(frozen=True)
class SlurmParams:
    """What `--backend slurm` asks of Slurm, in one job for each attempt at a cell.

    A cell asks for `run.threads` cores and, if `run.device` is cuda and no option speaks of a GPU, for one GPU.

    Attributes:
        partition: null for the default of the cluster, as for `account`.
        account: which is charged.
        walltime_minutes: of a job, of which starting and saving take one; shortly before it is over, the cell saves its
            work and goes on in another.
        max_jobs: at most so many at once, waiting or running.
        worker_init: shell commands at the start of a job, such as "module load cuda".
        options: further options of sbatch, such as "--mem=16G" or "--gres=gpu:a100:1".
    """

    partition: str | None = None
    account: str | None = None
    walltime_minutes: int = 240
    max_jobs: int = 1
    worker_init: str = ""
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_bounds(self, walltime_minutes=(2, 10**6), max_jobs=(1, 10**6))
        for option in self.options:
            if not option.startswith("-"):
                raise ValueError(f"options are those of sbatch, such as --mem=16G, not {option!r}")


@dataclass(frozen=True)
class RunParams:
    """The device and the CPU threads of one cell, and what a grid does about a cell that does not succeed.

    Attributes:
        device: "cpu", "cuda" or "cuda:N".
        threads: they decide the last bits of the numbers, so they are set here and not by how many cells run at once.
        retries: how often a cell that crashed or ran out of memory is tried again.
        timeout_minutes: an attempt at a cell that takes longer is ended; null for no limit.
        slurm: what `--backend slurm` asks for.
    """

    device: str = "cpu"
    threads: int = 2
    retries: int = 2
    timeout_minutes: float | None = None
    slurm: SlurmParams = field(default_factory=SlurmParams)

    def __post_init__(self) -> None:
        if not _DEVICE_NAME.fullmatch(self.device):
            raise ValueError(f"unknown device {self.device!r}; choose one of: cpu, cuda, cuda:0, cuda:1, ...")
        check_bounds(self, threads=(1, MAX_THREADS), retries=(0, 1000))
        if self.timeout_minutes is not None and self.timeout_minutes <= 0:
            raise ValueError("timeout_minutes must be positive; null means no limit")


@dataclass(frozen=True)
class BenchParams:
    """The benchmarks.

    Attributes:
        lengths: of the sequences.
        repeats: timings of each mechanism and length.
        num_features: of `dot_product_kernel_attention`, which is timed beside the mechanisms of the grid.
        threads: CPU threads while timing; `run.threads` is for the cells.
        max_quadratic_length: mechanisms of quadratic cost, torch's own excepted, are left out above it.
    """

    lengths: list[int]
    repeats: int
    num_features: list[int] = field(default_factory=lambda: [128])
    threads: int = 2
    max_quadratic_length: int = 16384

    def __post_init__(self) -> None:
        check_bounds(
            self,
            lengths=(1, MAX_LENGTH),
            repeats=(1, 100_000),
            num_features=(1, MAX_FEATURES),
            threads=(1, MAX_THREADS),
            max_quadratic_length=(0, MAX_LENGTH),
        )


@dataclass(frozen=True)
class ErrorsParams:
    """The measurements of the estimators' errors.

    Attributes:
        num_features: the budgets.
        tokens: queries, and keys, of a set.
        draws: of the features, for mean and spread.
        trained: cells of the grid without their seeds, whose queries, keys and values are used once they are trained.
    """

    num_features: list[int]
    tokens: int
    draws: int
    trained: list[str]

    def __post_init__(self) -> None:
        check_bounds(self, num_features=(1, MAX_FEATURES), tokens=(2, 2**14), draws=(2, 10_000))


@dataclass(frozen=True)
class ModelParams:
    """A trained model whose attention is replaced.

    Attributes:
        source: a file of an installed package, PACKAGE/FILE, or a folder that `from_pretrained` reads.
        sha256: of that file, or of the folder's model.safetensors.
        install: what to do where the package is not installed.
        texts: reviews, and pairs of parts of papers; or windows.
        tokens: of a text or window.
        causal: a language model, whose loss is measured; else an encoder, whose embeddings are.
    """

    source: str
    sha256: str
    install: str
    texts: int
    tokens: int
    causal: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, texts=(2, 10**5), tokens=(4, 2**20))


@dataclass(frozen=True)
class ReplacementParams:
    """How a trained model attends instead; exactly where nothing is said.

    Attributes:
        estimate: arguments of `schoenbat.Estimate`, for all layers.
        share: what `schoenbat.replace` is asked for, which chooses for each layer.
        attention: a mechanism, with its `options`.
        bare: of the estimate the near and heavy keys alone.
        fit: let `schoenbat.transfer` fit kernels to a few texts.
        rank: of the low-rank updates of queries and keys that `schoenbat.transfer` fits; 0 for none.
        steps: in which they are fitted to the outputs of layers.
        own_steps: in which they are then fitted to what the whole model gives.
        fitting: texts, or windows, that are not measured, to choose settings on and to fit to.
        draws: of the features.
    """

    estimate: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    attention: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    bare: bool = False
    fit: bool = False
    rank: int = 0
    steps: int = 0
    own_steps: int = 0
    fitting: int = 16
    draws: int = 1

    def __post_init__(self) -> None:
        check_bounds(self, draws=(1, 1000), rank=(0, 1024), steps=(0, 10**6), own_steps=(0, 10**6), fitting=(2, 10**5))
        if bool(self.estimate) + (self.share is not None) + (self.attention is not None) > 1:
            raise ValueError("give one of estimate, share and attention")
        if (self.bare or self.fit or self.rank) and not self.estimate:
            raise ValueError("bare, fit and rank are for an estimate")
        if bool(self.rank) != bool(self.steps + self.own_steps):
            raise ValueError("a rank takes steps or own_steps, and these a rank")
        if self.estimate:
            known = [field.name for field in fields(Estimate) if field.init]
            for name in self.estimate:
                if name not in known:
                    raise unknown_name("argument of estimate", name, known)
            Estimate(**self.estimate)
        if self.attention is not None:
            if self.attention not in REPLACING:
                raise unknown_name("attention", self.attention, REPLACING)
            build_config(ATTENTIONS.get(self.attention).Config, self.options, "options")


@dataclass(frozen=True)
class TrainedParams:
    """Trained models whose attention is replaced.

    Attributes:
        cells: by name, MODEL-METHOD.
        model: by name, without a hyphen.
        lengths: at which the attention of each cell is timed by `bench`.
    """

    cells: dict[str, ReplacementParams]
    model: dict[str, ModelParams] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_bounds(self, lengths=(1, MAX_LENGTH))
        for name in self.cells:
            if not _PROFILE_NAME.fullmatch(name) or model_of(name) not in self.model:
                raise ValueError(f"cells must be called MODEL-METHOD after a section of model, not {shorten(name)}")


def model_of(cell: str) -> str:
    """Return the model of a cell of `trained.cells`."""
    return cell.partition("-")[0]


@dataclass(frozen=True, kw_only=True)
class _Written:
    """params.yaml as it is written; what dvc.yaml names has no default, as DVC would not know it.

    Attributes:
        profile: the name that the folders of runs and reports carry.
        note: one sentence that the report shows.
    """

    profile: str
    note: str
    grid: GridParams
    task: dict[str, TaskParams]
    attention: dict[str, dict[str, Any] | None]
    former: dict[str, dict[str, Any] | None]
    bench: BenchParams
    errors: ErrorsParams
    trained: TrainedParams
    data: DataParams = field(default_factory=DataParams)
    run: RunParams = field(default_factory=RunParams)


@dataclass(frozen=True, kw_only=True)
class Params(_Written):
    """All of params.yaml.

    Attributes:
        attention: the section of each mechanism as it was written (its Config has been built once as a check), less
            `training`.
        written: the content of the file, which fingerprints are made from.
        own_training: what `training` of the sections of mechanisms and formers replaces of that of the task, by
            ("attention" or "former", name).
    """

    attention: dict[str, dict[str, Any]]  # type: ignore[assignment]
    former: dict[str, FormerConfig]  # type: ignore[assignment]
    own_training: dict[tuple[str, str], dict[str, Any]]
    written: Mapping[str, Any]


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check one params file; raises UserError for whatever is wrong in it."""
    written = read_yaml(path)
    raw = build_config(_Written, written, str(path))
    if not _PROFILE_NAME.fullmatch(raw.profile):
        raise UserError(
            f"{path}: profile must be 1 to 64 lower-case letters, digits, - and _, not {shorten(raw.profile)}"
        )
    _check_grid(raw, path)
    for kind in ("task", "attention", "former"):
        _check_names(getattr(raw, kind), kind, f"{path}: {kind}: ")
    own, attention = {}, {name: dict(section or {}) for name, section in raw.attention.items()}
    former = {name: dict(section or {}) for name, section in raw.former.items()}
    for kind, sections in (("attention", attention), ("former", former)):
        for name, section in sections.items():
            if "training" in section:
                own[kind, name] = section.pop("training")
    tasks = {}
    for name, task in raw.task.items():
        where = f"{path}: task.{name}.data"
        tasks[name] = replace(task, data=_bounded(TASKS.get(name).Config, task.data, where, _MAX_DATA_OPTION))
        for (kind, owner), replaced in own.items():
            _replaced(task.training, replaced, f"{path}: {kind}.{owner}.training")
    for name, options in attention.items():
        _bounded(ATTENTIONS.get(name).Config, options, f"{path}: attention.{name}", _MAX_OPTION)
    formers = {name: build_config(FormerConfig, each, f"{path}: former.{name}") for name, each in former.items()}
    checked = vars(raw) | {"task": tasks, "attention": attention, "former": formers}
    return Params(**checked, own_training=own, written=written)


def section_of(sections: Mapping[str, T], kind: str, name: str) -> T:
    """Return the options of a task, an attention or a former; raises UserError if it is unknown or has no section."""
    _check_names([name], kind)
    if name not in sections:
        defaults = "" if kind == "task" else f" (`{name}: {{}}` takes the defaults)"
        raise UserError(f"{PARAMS_FILE}: missing section {kind}.{name}{defaults}")
    return sections[name]


def cell_training(params: Params, cell: Cell) -> TrainingConfig:
    """Return how a cell is trained: as its task says, but for what its mechanism's and its former's sections replace.

    Raises:
        UserError: both replace the same, or what comes out is no training.
    """
    task = section_of(params.task, "task", cell.task)
    attention = params.own_training.get(("attention", cell.attn), {})
    former = params.own_training.get(("former", cell.former), {})
    if twice := attention.keys() & former.keys():
        raise UserError(
            f"{PARAMS_FILE}: training.{min(twice)} is set by both attention.{cell.attn} and former.{cell.former}"
        )
    return _replaced(task.training, attention | former, f"{PARAMS_FILE}: training of {cell.id}")


def _check_grid(raw: _Written, path: Path) -> None:
    """Raise UserError for a name that is unknown, given twice or without a section, and one in the wrong half."""
    grid = raw.grid
    axes: list[tuple[str, list[Any], str]] = [
        ("tasks", grid.tasks, "task"),
        ("seeds", grid.seeds, "seed"),
        ("plain.attn", grid.plain.attn, "attention"),
        ("plain.former", grid.plain.former, "former"),
        ("kernel.attn", grid.kernel.attn, "attention"),
        ("kernel.dotf", grid.kernel.dotf, "dotf"),
        ("kernel.former", grid.kernel.former, "former"),
    ]
    for axis, values, kind in axes:
        where, sections = f"{path}: grid.{axis}", getattr(raw, kind, None)
        if kind in _KINDS:
            _check_names(values, kind, f"{where}: ")
        for value, count in Counter(values).items():
            if count > 1:
                raise UserError(f"{where} lists {value!r} more than once")
            if sections is not None and value not in sections:
                raise UserError(f"{where}: {value!r} has no section {kind}.{value}")
            if kind == "seed" and value < 0:
                raise UserError(f"{where} must not be negative, not {value}")
    used = {(kind, value) for _, values, kind in axes for value in values}
    for kind in ("task", "attention", "former"):
        for name in getattr(raw, kind):
            if VARIANT_MARK in name and (kind, name) not in used:
                raise UserError(f"{path}: {kind}.{name} is a variant that no axis of grid lists")
    for half, attns in (("plain", grid.plain.attn), ("kernel", grid.kernel.attn)):
        for attn in attns:
            needs_kernel = ATTENTIONS.get(attn).needs_kernel
            if needs_kernel != (half == "kernel"):
                does, other = ("needs a", "kernel") if needs_kernel else ("takes no", "plain")
                raise UserError(f"{path}: grid.{half}.attn: {attn!r} {does} kernel; list it under grid.{other}.attn")


def _bounded(config_class: type[T], section: Mapping[str, Any], where: str, highest: int) -> T:
    """Build a component's options; raise UserError for a whole number, but a seed, above `highest`."""
    config = build_config(config_class, section, where)
    for name, value in vars(config).items():
        if name != "seed" and isinstance(value, int) and abs(value) > highest:
            raise UserError(f"{where}: {name} must be at most {highest}, not {value}")
    return config


def _replaced(training: TrainingConfig, own: Any, where: str) -> TrainingConfig:
    """Return `training` with what `own` replaces of it."""
    if not isinstance(own, dict):
        raise UserError(f"{where} must be a mapping, not {shorten(own)}")
    return build_config(TrainingConfig, asdict(training) | own, where)


def _check_names(values: Iterable[str], kind: str, where: str = "") -> None:
    """Raise UserError, which begins with `where`, for a name that no component of the kind has."""
    noun, known = _KINDS[kind][0], _KINDS[kind][1]()
    for value in values:
        try:
            if (value if kind == "dotf" else base_name(value)) not in known:
                raise unknown_name(noun, value, known)
        except UserError as error:
            raise UserError(f"{where}{error}") from None
