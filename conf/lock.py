"""Write the lock anew: the versions of conf/constraints.txt, with the hash of every file of theirs.

Reads   pyproject.toml, conf/constraints.txt, and the package index through uv (pip install uv)
Writes  conf/lock/build.txt      what builds and installs packages
        conf/lock/libraries.txt  what medspark needs with the extras that setup installs
        conf/lock/cuda.txt       torch as the index serves it for Linux, and what that needs besides
        conf/lock/cpu.txt        torch as the WHEEL has it: the build for CPUs, which the index does
                                 not serve; the file stays as it is where no WHEEL is given

    python conf/lock.py [WHEEL]
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

CONF = Path(__file__).resolve().parent
CONSTRAINTS, LOCK = CONF / "constraints.txt", CONF / "lock"
BUILD_TOOLS = ("pip", "setuptools", "wheel")
EXTRAS = ("petastorm", "connect", "edge", "openvino", "privacy", "prune", "s3", "dev")

Hashes = dict[str, list[str]]  # "torch==2.13.0" -> ["sha256:…", …]


def read_lock(text: str) -> Hashes:
    """Return the hashes of each requirement of a lock, as pip reads it."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    requirements = "\n".join(lines).replace("\\\n", " ").splitlines()
    parts = [requirement.split() for requirement in requirements if requirement.strip()]
    return {first: [h.removeprefix("--hash=") for h in hashes] for first, *hashes in parts}


def read_pins(text: str) -> dict[str, str]:
    """Return the version of each package of a file of constraints, by normalised name."""
    pins = re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    return {normalised(name): version for name, version in pins}


def normalised(name: str) -> str:
    """Return the one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def of_wheel(path: Path) -> Hashes:
    """Return the requirement that only this wheel fulfils, and its hash."""
    name, version = path.name.split("-")[:2]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {f"{normalised(name)}=={version}": [f"sha256:{digest}"]}


def resolved(*sources: str, requirements: Iterable[str] = ()) -> Hashes:
    """Return what the ``sources`` need on Linux, with the hash of every file in the index.

    The source ``-`` stands for the ``requirements``.
    """
    command = [
        "uv", "pip", "compile", *sources, "--quiet", "--no-config", "--no-header", "--no-annotate",
        "--generate-hashes", "--constraint", str(CONSTRAINTS), "--python-version", "3.11",
        "--python-platform", "x86_64-manylinux_2_28",
    ]  # fmt: skip
    told = subprocess.run(
        command, input="\n".join(requirements), text=True, check=True, stdout=subprocess.PIPE
    )
    return read_lock(told.stdout)


def rendered(comment: str, hashes: Mapping[str, Sequence[str]]) -> str:
    """Return one file of the lock."""
    lines = textwrap.wrap(comment, 98, initial_indent="# ", subsequent_indent="# ")
    for requirement, allowed in sorted(hashes.items()):
        lines.append(" \\\n    ".join([requirement, *(f"--hash={h}" for h in allowed)]))
    return "\n".join(lines) + "\n"


def write(name: str, comment: str, hashes: Mapping[str, Sequence[str]]) -> None:
    """Write the file ``name`` of the lock."""
    (LOCK / name).write_text(
        rendered(f"{comment} Written by conf/lock.py.", hashes), encoding="utf-8"
    )


def main(argv: Sequence[str]) -> int:
    """Write the files; return the exit status."""
    pins = read_pins(CONSTRAINTS.read_text(encoding="utf-8"))
    build = resolved("-", requirements=BUILD_TOOLS)
    needed = resolved(str(CONF.parent / "pyproject.toml"), *(f"--extra={name}" for name in EXTRAS))
    unpinned = {key for key in needed if key.partition("==")[0] not in pins}
    if stray := unpinned - resolved("-", requirements=["torch"]).keys():
        print(f"conf/constraints.txt does not pin {', '.join(sorted(stray))}", file=sys.stderr)
        return 1
    cuda = {key: needed[key] for key in needed if key in unpinned or key.startswith("torch==")}
    libraries = {key: needed[key] for key in needed.keys() - cuda.keys() - build.keys()}
    write("build.txt", "What builds and installs packages.", build)
    write(
        "libraries.txt",
        "What medspark needs, but for torch. Tried with Python 3.11 on Linux, x86_64; the files "
        "for others are untried, their hashes as the index tells them.",
        libraries,
    )
    write(
        "cuda.txt",
        "Torch as the index serves it for Linux, for CUDA, and what that needs. Tried with Python "
        "3.11 on Linux, x86_64, without a GPU; the other files are untried.",
        cuda,
    )
    for path in map(Path, argv):
        comment = f"Torch for CPUs, as {path.name} has it, which the index does not serve."
        write("cpu.txt", comment, of_wheel(path))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
