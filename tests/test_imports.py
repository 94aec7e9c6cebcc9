"""The library stands on torch, numpy and torchquad alone."""

import subprocess
import sys


def test_library_imports_nothing_of_the_experiment() -> None:
    code = (
        "import pkgutil, importlib, sys, schoenbat\n"
        "for module in pkgutil.walk_packages(schoenbat.__path__, 'schoenbat.'):\n"
        "    if not module.name.startswith('schoenbat.integrations.'):\n"
        "        importlib.import_module(module.name)\n"
        "print([name for name in ('pipeline', 'mlflow', 'dvc', 'typer', 'transformers', 'pandas', 'matplotlib')"
        " if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
