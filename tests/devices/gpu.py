"""Run what needs a GPU section by section, and write gpu.json and gpu.md; see gpu.sh.

Each section is a process with a limit of its own: what fails or takes too long costs the others
nothing, and the rows that it had written stay.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Section:
    """A part of the run, and the seconds after which it is stopped."""

    name: str
    limit: float


# Together within eight minutes, with a part of a minute for the start.
SECTIONS = (
    Section("tests", 110),
    Section("step/mobilenetv2_100", 60),
    Section("step/resnet50", 70),
    Section("step/densenet121", 80),
    Section("attack", 50),
    Section("loader", 45),
    Section("waits", 35),
)


def main() -> int:
    """Run the sections; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="32 px, batches of 4, few turns")
    parser.add_argument("--only", default="", help="sections whose name begins with this")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"machine": _machine(), "small": args.small, "sections": {}}
    for section in SECTIONS:
        if section.name.startswith(args.only):
            document["sections"][section.name] = _run(section, args)
            (args.output / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
            (args.output / "gpu.md").write_text(table(document))
    print(table(document))
    failed = [n for n, kept in document["sections"].items() if kept["ended"] != "done"]
    print(f"{args.output / 'gpu.json'}" + (f"; not done: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _run(section: Section, args: argparse.Namespace) -> dict[str, Any]:
    """Run one section; return how it ended, its seconds and its rows."""
    stem = args.output.resolve() / section.name.replace("/", "_")
    rows, log = stem.with_suffix(".rows"), stem.with_suffix(".log")
    rows.unlink(missing_ok=True)
    limit = section.limit * (10 if args.small else 1)  # a CPU may be busy
    began = time.monotonic()
    with log.open("w") as told:
        process = subprocess.Popen(
            _command(section, args, rows),
            cwd=ROOT, stdout=told, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
            ended = "done" if status == 0 else f"exit status {status}: see {log.name}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"stopped after {limit:g} s"
    seconds = time.monotonic() - began
    print(f"{section.name}: {ended}, {seconds:.0f} s", flush=True)
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if section.name == "tests":
        found.append({"name": "pytest -m gpu", "figure": _counts(log.read_text())})
    return {"ended": ended, "seconds": round(seconds, 1), "rows": found}


def _command(section: Section, args: argparse.Namespace, rows: Path) -> list[str]:
    if section.name == "tests":
        files = map(str, gpu_tests())
        # No cache: the checkout may be read-only.
        return [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
    small = ["--small"] if args.small else []
    script = [sys.executable, str(HERE / "gpu_sections.py"), section.name]
    return [*script, "--device", args.device, "--rows", str(rows), *small]


def gpu_tests() -> Iterator[Path]:
    """Yield the test files with a test for a GPU: one that takes a device, or is marked gpu.

    The others need libraries that a machine without Spark does not have.
    """
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        if "mark.gpu" in text or any(_takes_device(node) for node in ast.walk(ast.parse(text))):
            yield path.relative_to(ROOT)


def _takes_device(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(a.arg == "device" for a in node.args.args)


def _counts(log: str) -> str:
    lines = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|skipped)", line)]
    return lines[-1].strip("= ") if lines else "no result"


def _machine() -> dict[str, str]:
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "card": card,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
    }


def table(document: dict[str, Any]) -> str:
    """Return the document as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    lines = [f"{machine}{'; small: figures mean nothing' if document['small'] else ''}", ""]
    lines += ["| what | figure | goal |", "| --- | --- | --- |"]
    for name, section in document["sections"].items():
        lines += [f"| {row['name']} | {_figure(row)} | {_goal(row)} |" for row in section["rows"]]
        if section["ended"] != "done":
            lines.append(f"| {name} | {section['ended']} | |")
    return "\n".join(lines) + "\n"


def _figure(row: dict[str, Any]) -> str:
    if "ratio" in row:
        return f"{row['ratio']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
    return f"{row['figure']:.4g}" if isinstance(row["figure"], float) else str(row["figure"])


def _goal(row: dict[str, Any]) -> str:
    if row.get("goal") is None:
        return ""
    met = "" if row["reached"] else ", not reached"
    return f"{'≥' if row['higher_is_better'] else '≤'} {row['goal']:g}{met}"


if __name__ == "__main__":
    sys.exit(main())
