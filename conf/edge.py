"""Build the wheel of medspark-edge: the part of medspark that predicts on a device.

Reads   medspark/ and pyproject.toml
Writes  OUTPUT/medspark_edge-VERSION-py3-none-any.whl

    python conf/edge.py OUTPUT

It holds ``python -m medspark.export.predict`` and every module that this imports when it starts. On
the device: pip install 'medspark_edge-….whl[onnxruntime]', or [openvino]. It is the package
``medspark`` in small, so install it where medspark itself is not.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ("medspark.export.predict", "medspark.export.latency", "medspark.images.fork_server")
NEEDED = (
    "numpy", "pillow", "pydantic", "pydicom", "pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg",
    "python-gdcm",
)  # fmt: skip
BACKENDS = {"onnxruntime": "edge", "openvino": "openvino"}  # and the extra that has its range


def modules(*entries: str) -> set[str]:
    """Return the modules that ``entries`` import when they start, and the packages of these."""
    found: set[str] = set()
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if name in found or not _file(name).is_file():
            continue
        found.add(name)
        waiting += _imported(ast.parse(_file(name).read_text("utf-8")).body)
        if "." in name:
            waiting.append(name.rpartition(".")[0])
    return found


def _imported(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Yield what the top level of a module imports; not what only a type checker reads."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _file(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def project() -> str:
    """Return the pyproject.toml of the distribution, with the ranges of medspark's own."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ranges = {re.split(r"[^\w-]", each)[0].lower(): each for each in whole["dependencies"]}
    lines = [
        "[build-system]",
        'requires = ["setuptools>=77"]',
        'build-backend = "setuptools.build_meta"',
        "[project]",
        'name = "medspark-edge"',
        'description = "Predict with a model that medspark exported, on a device without torch."',
        f'license = "{whole["license"]}"',
        f"license-files = {whole['license-files']}",
        f'requires-python = "{whole["requires-python"]}"',
        'dynamic = ["version"]',
        f"dependencies = {[ranges[name] for name in NEEDED]}",
        "[project.optional-dependencies]",
    ]
    for backend, extra in BACKENDS.items():
        (needed,) = (
            each for each in whole["optional-dependencies"][extra] if each.startswith(f"{backend}>")
        )
        lines.append(f"{backend} = ['{needed}']")
    lines += [
        "[tool.setuptools.dynamic]",
        'version = { attr = "medspark.__version__" }',
        "[tool.setuptools.packages.find]",
        'include = ["medspark*"]',
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Build the wheel; return the exit status."""
    (output,) = map(Path, argv)
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(modules(*ENTRIES)):
            target = Path(folder) / _file(name).relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(_file(name), target)
        shutil.copy(ROOT / "LICENSE", folder)
        Path(folder, "pyproject.toml").write_text(project(), encoding="utf-8")
        return subprocess.run(
            [
                sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                "--no-build-isolation", "--wheel-dir", str(output), folder,
            ],
            check=False,
        ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
