"""All tables of a report in one document, set by a real TeX."""

import re
import shutil
import subprocess
from pathlib import Path

OVERFULL = re.compile(r"Overfull \\[hv]box \(([\d.]+)pt too (?:wide|high|large)\)")


def has_tex() -> bool:
    """Return whether there are pdflatex and the packages that the tables need, which smaller installations lack."""
    if shutil.which("pdflatex") is None:
        return False
    return subprocess.run(["kpsewhich", "adjustbox.sty"], capture_output=True, check=False).returncode == 0


def set_tables(tables: Path, folder: Path) -> list[float]:
    """Set every .tex of a folder with the article class at its defaults; by how many points what does not fit is off.

    Raises:
        AssertionError: TeX finds an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in tables.glob("*.tex"))
    inputs = [f"\\input{{{(tables / name).as_posix()}.tex}}\\clearpage" for name in names]
    named = "lmodern,adjustbox,array,booktabs,longtable,pdflscape"
    packages = rf"\usepackage[utf8]{{inputenc}}\usepackage[T1]{{fontenc}}\usepackage{{{named}}}"
    document = [r"\documentclass{article}", packages, r"\begin{document}", *inputs, r"\end{document}"]
    (folder / "tables.tex").write_text("\n".join(document), encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    # A longtable knows its widths the second time.
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, done.stdout[-2000:]
    assert "Float too large" not in done.stdout, re.findall(r".*Float too large.*", done.stdout)
    return [float(points) for points in OVERFULL.findall(done.stdout.replace("\n", ""))]
