"""The table of native code: complete, told by the libraries themselves, kept, and no burden."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark import versions
from medspark.versions import NOT_INSTALLED, of_process, weaknesses

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "scipy", "pyarrow", "PIL", "gdcm", "pyspark", "mlflow", "onnxruntime")


def _in_new_process(statement: str) -> str:
    probe = f"import json, sys; from medspark import versions; {statement}"
    command = [sys.executable, "-c", probe]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_installed_package_with_native_code_is_in_the_table():
    table = of_process()

    for found in importlib.metadata.distributions():
        if any(file.name.endswith((".so", ".abi3.so", ".pyd")) for file in found.files or []):
            name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
            assert table[name]["version"] == found.version


def test_a_library_is_asked_where_its_module_is_loaded():
    from PIL import features

    told = of_process()["pillow"]

    assert told["OpenJPEG"] == features.version("jpg_2000")
    assert told["LibTIFF"] == features.version("libtiff")
    assert told["zlib"] == features.version("zlib")


def test_a_running_job_loads_nothing_to_tell_its_versions():
    loaded = _in_new_process(
        f"versions.of_process(); print(sorted(set({HEAVY!r}) & sys.modules.keys()))"
    )

    assert loaded.strip() == "[]"


def test_who_asks_the_machine_is_told_by_each_library_that_is_installed():
    import gdcm  # its own word, to compare with

    table = json.loads(_in_new_process("print(json.dumps(versions.of_machine()))"))

    asked = {"torch": "oneDNN", "numpy": "BLAS", "pyarrow": "Arrow C++", "pyjpegls": "CharLS"}
    asked |= {"pylibjpeg-openjpeg": "OpenJPEG", "python": "SQLite", "pillow": "libjpeg-turbo"}
    assert all(re.search(r"\d+\.\d", table[package][part]) for package, part in asked.items())
    assert table["python-gdcm"]["GDCM"] == gdcm.Version.GetVersion()
    assert table["python"]["version"] == platform.python_version()


def test_libraries_that_a_wheel_brings_along_are_told_by_their_files():
    table = json.loads(_in_new_process("print(json.dumps(versions.of_process()))"))

    (opj,) = Path(importlib.metadata.distribution("python-gdcm").locate_file("_gdcm")).glob(
        "libgdcmopenjp2.so.*.*.*"
    )
    assert table["python-gdcm"]["OpenJPEG"] == opj.name.partition(".so.")[2]


@given(
    st.from_regex(r"[a-z]{2,8}(_[a-z0-9]{1,4})?", fullmatch=True),
    st.lists(st.from_regex(r"[-.][0-9a-f]{8}", fullmatch=True), max_size=2),
    st.from_regex(r"[0-9]{1,2}(\.[0-9]{1,2}){0,3}[a-z]?", fullmatch=True),
)
def test_the_number_of_a_file_is_read_past_what_wheels_put_into_its_name(name, hashes, number):
    file = f"lib{name}{''.join(hashes)}.so"

    assert versions._numbered(f"{file}.{number}") == (f"lib{name}.so", number)
    assert versions._numbered(file) == (f"lib{name}.so", "unknown")


def test_what_is_missing_is_said_to_be_and_ends_nothing(monkeypatch, capsys):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distributions", list)
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert versions.main(["--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    packages = table.keys() - {"python", "java"}
    assert packages >= {"torch", "pillow", "python-gdcm", "pyspark", "onnxruntime"}
    assert all(table[name] == {"version": NOT_INSTALLED} for name in packages)


def test_a_library_that_does_not_say_its_version_ends_no_job(monkeypatch):
    monkeypatch.setitem(sys.modules, "gdcm", object())

    assert of_process()["python-gdcm"]["gdcm"] == "unknown (AttributeError)"


@pytest.mark.parametrize("has_release_file", [True, False])
def test_java_is_the_one_that_spark_will_start(monkeypatch, tmp_path: Path, has_release_file: bool):
    java = tmp_path / "home" / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text("#!/bin/sh\necho 'openjdk version \"99.0.1\" 2030-01-01' >&2\n")
    java.chmod(0o755)
    if has_release_file:
        (tmp_path / "home" / "release").write_text('OS="x"\nJAVA_VERSION="99.0.1"\nLIBC="gnu"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))

    assert of_process()["java"] == {"version": "99.0.1"}


def test_a_machine_without_java_has_none(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    assert of_process()["java"] == {"version": NOT_INSTALLED}


def test_spark_tells_the_native_libraries_for_this_machine_alone():
    told = of_process()["pyspark"]

    assert {"zstd-jni", "snappy-java", "lz4-java", "scala-library"} <= told.keys()
    assert all(re.fullmatch(r"\d[\w.]*(-\d+)?", version) for version in told.values())


@pytest.mark.parametrize(
    ("code", "affected", "safe"),
    [
        ("OpenJPEG", ["2.5.1", "2.5.3"], ["2.5.0", "2.5.4"]),
        ("python-gdcm", ["2.8", "3.0.23", "3.2.2"], ["3.0.24", "3.2.1", "3.2.3"]),
        ("pillow", ["10.3.0", "12.1.1"], ["10.2.0", "12.1.2", "13.0.0"]),
        ("pyarrow", ["0.14.0", "14.0.0"], ["0.13.0", "14.0.2"]),
        ("torch", ["2.5.1+cpu", "2.6.0", "2.9.1"], ["2.10.0", "2.13.0+cpu"]),
        ("mlflow", ["3.7.0", "3.8.0", "3.17.1"], ["3.17.2"]),
        ("pyspark", ["3.5.7"], ["4.0.0", "4.0.5"]),
    ],
)
def test_exactly_the_affected_versions_are_warned_of(code, affected, safe):
    def table(version: str) -> versions.Versions:
        return (
            {"p": {"version": "0", code: version}}
            if code[0].isupper()
            else {code: {"version": version}}
        )

    assert all(weaknesses(table(version)) for version in affected)
    assert not any(weaknesses(table(version)) for version in safe)


def test_a_warning_names_the_weakness_and_what_to_install():
    (told,) = weaknesses({"pillow": {"version": "13.0.0", "OpenJPEG": "2.5.3"}})

    assert told == (
        "OpenJPEG 2.5.3 in pillow is affected by CVE-2025-54874 (versions >=2.5.1,<=2.5.3): "
        "install another version of pillow."
    )
    assert len(weaknesses({"torch": {"version": "2.5.0"}})) == 2
    assert len(weaknesses({"python-gdcm": {"version": "3.0.23"}})) == 3


def test_the_tested_versions_have_no_known_weakness():
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "conf/constraints.txt").read_text(), re.M)

    assert len(pins) > 100
    assert weaknesses({name: {"version": version} for name, version in pins}) == []


def test_the_command_prints_each_part_below_its_package_and_warns_apart(monkeypatch, capsys):
    table = {"pillow": {"version": "12.0.0", "OpenJPEG": "2.5.4"}, "java": {"version": "17.0.1"}}
    monkeypatch.setattr(versions, "of_machine", lambda: table)

    assert versions.main([]) == 0
    told = capsys.readouterr()
    lines = [line.split() for line in told.out.splitlines()]
    assert lines == [["pillow", "12.0.0"], ["OpenJPEG", "2.5.4"], ["java", "17.0.1"]]
    assert told.err.startswith("Warning: pillow 12.0.0 is affected by CVE-2026-40192")


def test_a_job_keeps_the_table_with_its_result_and_warns(monkeypatch, tmp_path, capsys):
    from medspark import job

    monkeypatch.setattr(job, "of_process", lambda: {"torch": {"version": "2.5.0"}})
    job.run_job(job.JobConfig, lambda _: {"a": 1}, ["--output", str(tmp_path / "r.json")])

    result = json.loads((tmp_path / "r.json").read_text())
    assert result["a"] == 1
    assert result["versions"] == {"torch": {"version": "2.5.0"}}
    assert "CVE-2025-32434" in capsys.readouterr().err
