"""Trained models that come as files of installed packages, or as folders; verified before use."""

import hashlib
import importlib.util
import shutil
import zipfile
from pathlib import Path

from pipeline.grid.params import ModelParams
from pipeline.host.files import locked
from schoenbat.errors import DataUnavailable

FOLDER = Path("data/models")


def find_model(name: str, model: ModelParams) -> Path:
    """Return a folder that `from_pretrained` reads; what a package packs is unpacked into data/models once.

    Raises:
        DataUnavailable: there is no such folder or package, or its file is another one.
    """
    where, source = f"trained.model.{name}", Path(model.source)
    if source.is_dir():
        _verify(source / "model.safetensors", model.sha256, where)
        return source
    package, _, file = model.source.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise DataUnavailable(f"{where}: {source} is neither a folder nor in an installed package; {model.install}")
    folder = FOLDER / f"{name}-{model.sha256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), lambda: print(f"waits for {folder}", flush=True)):
        if not folder.is_dir():
            packed, part = Path(found.origin).parent / file, folder.with_name(f".{folder.name}.part")
            _verify(packed, model.sha256, where)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            if packed.suffix == ".zip":
                zipfile.ZipFile(packed).extractall(part)
            else:
                _convert(packed, part)
            part.rename(folder)
    return folder


def _verify(file: Path, sha256: str, where: str) -> None:
    if not file.is_file():
        raise DataUnavailable(f"{where}: no {file}")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != sha256:
        raise DataUnavailable(f"{where}: {file} has the SHA-256 {found}, not {sha256}")


def _convert(packed: Path, folder: Path) -> None:
    """Write the model of a GGUF file in the form of transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = {"gguf_file": packed.name}
    try:
        AutoTokenizer.from_pretrained(packed.parent, **given).save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(packed.parent, **given, dtype=torch.float32)
    except ImportError as error:
        raise DataUnavailable(f"{packed.name} cannot be read: {str(error).split('.')[0]}") from None
    # The config of what was read calls it quantised.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
