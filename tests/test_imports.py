"""The library stands on torch, numpy and torchquad alone."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import schoenbat


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


def test_no_modules_of_the_library_import_each_other() -> None:
    folder = Path(schoenbat.__file__).parent
    sources = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in folder.rglob("*.py")
    }
    graph = {}
    for module, path in sources.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{name.name}" for name in node.names} & sources.keys()
                named |= inner or {node.module}
        graph[module] = named & sources.keys()
    assert len(list(TopologicalSorter(graph).static_order())) == len(sources)
