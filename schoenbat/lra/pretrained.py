"""A trained classifier in a folder of its own: it is written by `save_pretrained` and read, without a network, by
`from_pretrained`, with the same bits.

The folder holds `model.safetensors`, the weights and the drawn features, and `config.json`, what the model is built
from and how a text becomes tokens. Needs safetensors (extra `schoenbat[pretrained]`).
"""

import dataclasses
import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from schoenbat.errors import UserError
from schoenbat.files import write_bytes
from schoenbat.lra.config import build_config
from schoenbat.lra.encoder import Classifier, ModelConfig, build_model
from schoenbat.lra.multihead import FormerConfig
from schoenbat.lra.tasks import TASKS, Task
from schoenbat.lra.tasks.table import UNKNOWN

WEIGHTS, CONFIG, ONNX = "model.safetensors", "config.json", "model.onnx"


@dataclass(frozen=True)
class PretrainedConfig:
    """The settings that a trained classifier is built from.

    Attributes:
        task, attn, dotf, former, seed: the names that params.yaml uses, and the seed of the features.
        model, attention, former_options: the settings of the encoder, the mechanism and the former.
        data: what the task's `prepare` said of its data: sizes, `class_names`, and how a text becomes tokens.
    """

    task: str
    attn: str
    dotf: str | None
    former: str
    seed: int
    model: ModelConfig
    attention: dict[str, Any]
    former_options: FormerConfig
    data: dict[str, Any]

    def build(self) -> Classifier:
        """Build the model, with its initial weights; raises UserError for a name that is not installed here."""
        return build_model(
            vocab_size=self.data["vocab_size"],
            num_classes=self.data["num_classes"],
            num_texts=self.data["num_texts"],
            max_length=self.data["max_length"],
            model=self.model,
            attn=self.attn,
            attention=self.attention,
            dotf=self.dotf,
            former=self.former,
            former_config=self.former_options,
            seed=self.seed,
            per_position=self.data["per_position"],
            causal=self.data["causal"],
        )


class PretrainedClassifier:
    """A trained model and what it needs to classify texts.

        classifier = PretrainedClassifier.from_pretrained("exported")
        classifier.predict(["A gem of a film."])    # [{"positive": 0.93, "negative": 0.07}]

    Args:
        config: what the model is built from.
        model: with its trained weights; it is put into evaluation mode.
    """

    def __init__(self, config: PretrainedConfig, model: Classifier) -> None:
        self.config = config
        self.model = model.eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PretrainedClassifier":
        """Read a folder that `save_pretrained` wrote; on the CPU.

        Raises:
            UserError: a file is missing or is not what it should be, or a component is not installed here.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder} holds no exported model: {name} is missing")
        path = folder / CONFIG
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from None
        config = build_config(PretrainedConfig, written, str(path))
        model = config.build()
        safetensors = _safetensors()
        try:
            model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise UserError(f"{folder / WEIGHTS} does not fit {CONFIG}: {str(error).splitlines()[0]}") from None
        return cls(config, model)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model into a folder, which is made; each file is whole or is not there."""
        folder = Path(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        write_bytes(folder / WEIGHTS, _safetensors().torch.save(state, metadata={"format": "pt"}))
        config = json.dumps(dataclasses.asdict(self.config), indent=2, sort_keys=True, ensure_ascii=False)
        write_bytes(folder / CONFIG, f"{config}\n".encode())

    def save_onnx(self, path: str | Path) -> None:
        """Write the model as ONNX: int64 tokens [B, num_texts, N], padded with 0, to logits, for any B and N.

        Raises:
            UserError: onnx and onnxscript are missing, or the mechanism is not the same graph at every length.
        """
        if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
            raise UserError('ONNX needs onnx and onnxscript: pip install "schoenbat[onnx]"')
        data = self.config.data
        tokens = torch.ones(2, data["num_texts"], min(40, data["max_length"]), dtype=torch.int64)
        sizes = {0: Dim("batch", min=1), 2: Dim("length", min=1, max=data["max_length"])}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                program = torch.export.export(self.model, (tokens,), dynamic_shapes=(sizes,))
                converted = torch.onnx.export(program, dynamo=True, verbose=False)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"attn {self.config.attn!r} cannot be exported for all lengths: {reason}") from None
        assert converted is not None
        write_bytes(Path(path), converted.model_proto.SerializeToString())

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, by their numbers."""
        names = self.config.data.get("class_names") or TASKS.get(self.config.task).class_names
        return list(names) or [str(number) for number in range(self.config.data["num_classes"])]

    @property
    def reads_texts(self) -> bool:
        """Whether `predict` can be used: the task is of texts, with a label for each."""
        own = TASKS.get(self.config.task).encode.__func__  # type: ignore[attr-defined]
        return not self.config.data["per_position"] and own is not Task.encode.__func__  # type: ignore[attr-defined]

    def encode(self, examples: Sequence[str | Sequence[str]]) -> Tensor:
        """Encode examples as in training: int64 [B, num_texts, N], cut at the greatest length, padded with 0.

        Args:
            examples: a text each, or a pair of texts where the task compares two.

        Raises:
            UserError: an example of too few or too many texts, or a text that the task cannot read.
        """
        data = self.config.data
        encode = TASKS.get(self.config.task).encode
        rows = []
        for example in examples:
            texts = [example] if isinstance(example, str) else list(example)
            if len(texts) != data["num_texts"]:
                wanted = "one text" if data["num_texts"] == 1 else "two texts"
                raise UserError(f"an example of {self.config.task} is {wanted}, not {len(texts)}")
            rows.append([encode(text, data)[: data["max_length"]] for text in texts])
            if not all(map(len, rows[-1])):
                raise UserError("a text is empty")
        longest = max((len(tokens) for row in rows for tokens in row), default=1)
        length = -(-longest // data["pad_to_multiple"]) * data["pad_to_multiple"]
        padded = torch.zeros(len(rows), data["num_texts"], length, dtype=torch.int64)
        for index, row in enumerate(rows):
            for place, tokens in enumerate(row):
                padded[index, place, : len(tokens)] = torch.from_numpy(tokens.astype("int64"))
        return padded

    @torch.inference_mode()
    def predict(self, examples: Sequence[str | Sequence[str]], batch_size: int = 32) -> list[dict[str, float]]:
        """Return for each example the probabilities of all classes by their names, the likeliest first.

        Warns of an example most of whose words or characters no text of the training has: its answer says little.

        Raises:
            UserError: as `encode` does, or the task has labels at positions and not of texts.
        """
        if self.config.data["per_position"]:
            raise UserError(f"{self.config.task} has labels at positions of a text, and not of texts")
        device = next(self.model.parameters()).device
        found = []
        for start in range(0, len(examples), batch_size):
            tokens = self.encode(examples[start : start + batch_size])
            if "vocabulary" in self.config.data:
                for number, of_example in enumerate(tokens, start=start + 1):
                    unknown, total = (int(found.sum()) for found in (of_example == UNKNOWN, of_example != 0))
                    if 2 * unknown > total:
                        warnings.warn(
                            f"text {number}: {unknown} of its {total} {self.config.data['tokens']} are in no training "
                            "text, so its answer says little",
                            stacklevel=2,
                        )
            logits = self.model(tokens.to(device))
            for row in logits.double().softmax(-1).tolist():
                ranked = sorted(zip(self.class_names, row, strict=True), key=lambda named: -named[1])
                found.append(dict(ranked))
        return found


def model_data(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a data set's description that a model needs: `PretrainedConfig.data`."""
    needed = ("vocab_size", "num_classes", "num_texts", "max_length", "per_position", "causal", "pad_to_multiple")
    optional = ("class_names", "tokens", "vocabulary")
    return {key: meta[key] for key in needed} | {key: meta[key] for key in optional if key in meta}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("exported models need safetensors: pip install safetensors") from None
    return safetensors
