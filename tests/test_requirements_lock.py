"""The lock: complete, of the versions that were tested, and all that a locked setup installs by."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("lock", ROOT / "conf" / "lock.py")
assert _SPEC is not None
assert _SPEC.loader is not None
lock = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(lock)

FILES = {path.stem: lock.read_lock(path.read_text()) for path in sorted(lock.LOCK.glob("*.txt"))}
TESTED = [pin for name in ("build", "libraries", "cpu") for pin in FILES[name]]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64).map("sha256:{}".format)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,20}==[0-9][0-9.]{0,6}", fullmatch=True)


def _pins(requirements: list[str]) -> dict[str, str]:
    """Return the versions by name, without what tells one build of a version from another."""
    pairs = (requirement.partition("+")[0].split("==") for requirement in requirements)
    return {lock.normalised(name): version for name, version in pairs}


@pytest.mark.parametrize("name", ["build", "libraries", "cpu", "cuda"])
def test_every_requirement_has_one_version_and_hashes(name: str) -> None:
    assert FILES[name]
    for requirement, hashes in FILES[name].items():
        assert re.fullmatch(r"[a-z0-9-]+==[\w.+]+", requirement)
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", digest) for digest in hashes)


def test_lock_and_constraints_name_the_same_versions() -> None:
    pinned = lock.read_pins(lock.CONSTRAINTS.read_text())
    locked = _pins(TESTED)

    assert locked.items() <= pinned.items()
    assert _pins(list(FILES["cuda"])).keys() & pinned.keys() == {"torch"}
    assert _pins(["torch==" + pinned["torch"]]) == {"torch": _pins(list(FILES["cuda"]))["torch"]}


def test_a_package_is_in_one_file_but_torch_which_has_two_builds() -> None:
    names = [name for pins in FILES.values() for name in _pins(list(pins))]

    assert {name for name in names if names.count(name) > 1} == {"torch"}
    assert not set(FILES["cpu"].popitem()[1]) & set(FILES["cuda"]["torch==2.13.0"])


def test_everything_that_pyproject_asks_for_is_locked_in_a_version_that_it_admits() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    asked += [one for name in lock.EXTRAS for one in extras[name]]
    locked = _pins(TESTED)

    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(locked[lock.normalised(requirement.name)])


def test_setup_installs_the_extras_that_are_locked() -> None:
    installed = re.search(r"--editable '\.\[(.*)\]'", (ROOT / "conf" / "setup.sh").read_text())

    assert installed is not None
    assert tuple(installed[1].split(",")) == lock.EXTRAS


@pytest.mark.parametrize("pin", TESTED)
def test_what_a_locked_package_needs_is_locked_too(pin: str) -> None:
    ((name, version),) = _pins([pin]).items()
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    if found.version.partition("+")[0] != version:
        pytest.skip(f"{name} is installed in another version")
    needed = [Requirement(one) for one in found.requires or []]
    wanted = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    cuda = [] if "+cpu" in found.version or name != "torch" else list(FILES["cuda"])

    assert {lock.normalised(one.name) for one in wanted} <= _pins([*TESTED, *cuda]).keys()


@given(
    st.dictionaries(NAMES, st.lists(DIGESTS, min_size=1, max_size=3), max_size=5),
    st.text("a =#\\-."),
)
def test_a_lock_is_read_as_it_was_written(hashes: dict[str, list[str]], comment: str) -> None:
    assert lock.read_lock(lock.rendered(comment, hashes)) == hashes


def test_pip_takes_no_file_whose_hash_is_not_in_the_lock(tmp_path: Path) -> None:
    wheel = _wheel(tmp_path)
    requirement, hashes = next(iter(lock.of_wheel(wheel).items()))
    forged = [digest.replace(digest[-1], "0" if digest[-1] != "0" else "1") for digest in hashes]

    assert _pip(tmp_path, lock.rendered("", {requirement: hashes})).returncode == 0
    refused = _pip(tmp_path, lock.rendered("", {requirement: forged}))
    assert refused.returncode != 0
    assert "HASH" in refused.stderr.upper()


def _wheel(folder: Path) -> Path:
    path = folder / "tiny-1.0+ours-py3-none-any.whl"
    info = "tiny-1.0+ours.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0+ours\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def _pip(folder: Path, locked: str) -> subprocess.CompletedProcess[str]:
    (folder / "lock.txt").write_text(locked)
    return subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-index",
            "--find-links", str(folder), "--require-hashes", "--requirement", "lock.txt",
        ],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


# A Python that does nothing but say what it was asked to do, in a file.
_STUB = """#!/bin/bash
echo "$*" >>"$STUB_LOG"
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip" ;;
    *--dry-run*) [ -z "${STUB_NO_CPU:-}" ] ;;
    *"$STUB_FAILS"*) [ -z "$STUB_FAILS" ] ;;
esac
"""


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A checkout's conf/ in an empty folder, and its setup with a Python that installs nothing."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for name, text in (("python", _STUB), ("java", "#!/bin/sh\necho 'version \"17.0.1\"' >&2\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**settings: str) -> subprocess.CompletedProcess[str]:
        stub = {"PYTHON": str(tmp_path / "bin/python"), "STUB_LOG": str(tmp_path / "log")}
        path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "STUB_FAILS": "", "LOCKED": ""}
        return subprocess.run(
            [tmp_path / "conf" / "setup.sh"], env=os.environ | stub | path | settings,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def _installs(folder: Path) -> list[str]:
    told = (folder / "log").read_text().splitlines()
    return [line for line in told if " pip install " in line and "--dry-run" not in line]


def test_a_locked_setup_installs_by_hash_and_then_ours_alone(setup, tmp_path: Path) -> None:
    assert setup(LOCKED="1").returncode == 0

    *libraries, ours = _installs(tmp_path)
    assert all("--require-hashes" in line for line in libraries)
    names = [re.search(r"conf/lock/(\w+)\.txt", line)[1] for line in libraries]  # type: ignore[index]
    assert names == ["build", "libraries", "cpu"]
    assert ours.endswith("--no-deps --no-build-isolation --no-index --editable .")


def test_where_torch_for_cpus_is_not_to_be_had_the_lock_of_the_other_build_is_used(
    setup, tmp_path: Path
) -> None:
    assert setup(LOCKED="1", STUB_NO_CPU="1").returncode == 0

    assert "torch==2.13.0+cpu" in (tmp_path / "log").read_text()
    assert [line for line in _installs(tmp_path) if "conf/lock/cuda.txt" in line]
    assert not [line for line in _installs(tmp_path) if "conf/lock/cpu.txt" in line]


@pytest.mark.parametrize("locked", ["", "1"])
def test_no_setup_builds_with_tools_that_are_not_pinned(setup, locked: str, tmp_path: Path) -> None:
    assert setup(LOCKED=locked).returncode == 0

    tools, *others = [line for line in _installs(tmp_path) if "conf/lock/cpu" not in line]
    assert "conf/lock/build.txt" in tools or "conf/constraints.txt pip setuptools wheel" in tools
    assert all("--no-build-isolation" in line for line in others)


@pytest.mark.parametrize("fails", ["build.txt", "libraries.txt", "cpu.txt", "--editable", "check"])
def test_a_locked_setup_that_fails_is_not_ready(setup, fails: str, tmp_path: Path) -> None:
    assert setup().returncode == 0

    assert setup(LOCKED="1", STUB_FAILS=fails).returncode != 0
    assert not list((tmp_path / ".venv").glob(".ready*"))


@pytest.mark.parametrize("first", ["", "1"])
def test_a_setup_that_fails_leaves_none_ready(setup, first: str, tmp_path: Path) -> None:
    assert setup(LOCKED=first).returncode == 0
    assert list((tmp_path / ".venv").glob(".ready*"))

    assert setup(STUB_FAILS="--editable").returncode != 0
    assert not list((tmp_path / ".venv").glob(".ready*"))


def test_a_locked_setup_begins_anew_but_empties_no_environment_of_another(
    setup, tmp_path: Path
) -> None:
    setup()
    (tmp_path / ".venv" / "unlocked").touch()
    assert setup(LOCKED="1").returncode == 0
    assert not (tmp_path / ".venv" / "unlocked").exists()

    shutil.rmtree(tmp_path / ".venv")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "theirs").touch()
    refused = setup(LOCKED="1")
    assert refused.returncode != 0
    assert "move it away" in refused.stderr
    assert (tmp_path / ".venv" / "theirs").exists()


@pytest.mark.parametrize(("first", "then"), [("", "1"), ("1", "")])
def test_a_setup_of_the_other_kind_installs_again(
    setup, first: str, then: str, tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    setup(LOCKED=first)

    assert "conf/setup.sh" not in _make(tmp_path, first)
    assert "conf/setup.sh" in _make(tmp_path, then)
    setup(LOCKED=then)
    assert "conf/setup.sh" in _make(tmp_path, first)


def _make(folder: Path, locked: str) -> str:
    command = ["make", "--dry-run", "setup", f"LOCKED={locked}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
