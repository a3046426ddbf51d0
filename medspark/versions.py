"""List the native code in use with its versions, and name the parts with known vulnerabilities.

    python -m medspark.versions [--json]

The version of a native library comes from the library itself if its module is loaded, from its
file name if a wheel bundles it, or from its package. Every job stores the table of its process with
its result and in MLflow.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Versions", "Weakness", "of_machine", "of_process", "weaknesses"]

# By package: its own "version", and the version of each library inside.
Versions = dict[str, dict[str, str]]

NOT_INSTALLED, UNKNOWN = "not installed", "unknown"

# Packages that are listed even if they are missing. Other native packages are found.
_EXPECTED = (
    "medspark", "numpy", "scipy", "torch", "torchvision", "pyarrow", "pillow", "python-gdcm",
    "pyjpegls", "pylibjpeg-openjpeg", "onnxruntime", "pyspark", "mlflow",
)  # fmt: skip
# Library names by the names of their files, which carry the version.
_OF_FILES = {"openjp2": "OpenJPEG", "gdcmopenjp2": "OpenJPEG", "gdcmcharls": "CharLS"}
# Folders in which a package bundles libraries, if not the one that auditwheel makes.
_FOLDERS = {"python-gdcm": "_gdcm"}


@dataclass(frozen=True)
class Weakness:
    """A published weakness of the ``affected`` versions (a PEP 440 specifier) of ``code``."""

    cve: str
    code: str
    affected: str


# As of November 2026. Left out: CVE-2026-107080 (OpenJPEG 2.4.0 to 2.5.4), which concerns
# encoding, and CVE-2026-25087 (Arrow 15 to 23), which cannot be reached from Python.
WEAKNESSES = (
    Weakness("CVE-2025-54874", "OpenJPEG", ">=2.5.1,<=2.5.3"),
    Weakness("CVE-2024-22391", "python-gdcm", "<=3.0.23"),
    Weakness("CVE-2024-22373", "python-gdcm", "<=3.0.23"),
    Weakness("CVE-2024-25569", "python-gdcm", "<=3.0.23"),
    Weakness("CVE-2026-3650", "python-gdcm", "==3.2.2"),
    Weakness("CVE-2026-40192", "pillow", ">=10.3,<=12.1.1"),
    Weakness("CVE-2023-47248", "pyarrow", ">=0.14,<=14.0.0"),
    Weakness("CVE-2025-32434", "torch", "<2.6"),
    Weakness("CVE-2026-24747", "torch", "<2.10"),
    Weakness("CVE-2026-2033", "mlflow", "<3.8"),
    Weakness("CVE-2026-53995", "mlflow", "<=3.17.1"),
    Weakness("CVE-2025-55039", "pyspark", "<4.0.0"),
)


def of_machine() -> Versions:
    """Return the versions of everything that is installed; modules are imported to ask them."""
    return _table(importlib.import_module)


def of_process() -> Versions:
    """Return the same for this process; nothing is imported, only loaded modules are asked."""
    return _table(sys.modules.get)


def weaknesses(versions: Versions) -> list[str]:
    """Return one sentence for each known vulnerability in the table."""
    from packaging.specifiers import SpecifierSet  # not for --help
    from packaging.version import InvalidVersion, Version

    found = []
    for package, parts in versions.items():
        for part, text in parts.items():
            code = package if part == "version" else part
            within = "" if part == "version" else f" in {package}"
            try:
                version = Version(text)
            except InvalidVersion:
                continue
            found += [
                f"{code} {text}{within} is affected by {known.cve} (versions {known.affected}): "
                f"install another version of {package}."
                for known in WEAKNESSES
                if known.code == code
                and SpecifierSet(known.affected).contains(version, prereleases=True)
            ]
    return found


def _table(module_of: Callable[[str], Any]) -> Versions:
    versions: Versions = {"python": {"version": platform.python_version()}}
    versions["python"]["libc"] = " ".join(platform.libc_ver()).strip() or UNKNOWN
    versions["java"] = {"version": _java()}
    native = dict(sorted(_native_packages()))
    versions |= {name: {"version": native.get(name) or _version(name)} for name in _EXPECTED}
    versions |= {name: {"version": version} for name, version in native.items()}
    for package, parts in versions.items():
        if parts["version"] != NOT_INSTALLED:
            parts |= _files_of(package, parts["version"])
    versions["pyspark"] |= _jars()
    for package, module, ask in _QUESTIONS:
        if versions[package]["version"] != NOT_INSTALLED:
            versions[package] |= _answer(module_of, module, ask)
    return {
        package: {"version": parts.pop("version")} | dict(sorted(parts.items()))
        for package, parts in versions.items()
    }


def _answer(
    module_of: Callable[[str], Any], name: str, ask: Callable[[Any], dict[str, str]]
) -> dict[str, str]:
    try:
        module = module_of(name)
        return {} if module is None else {k: v for k, v in ask(module).items() if v}
    except Exception as error:  # noqa: BLE001 - a library without a version must not end a job
        return {name: f"{UNKNOWN} ({type(error).__name__})"}


def _native_packages() -> Iterator[tuple[str, str]]:
    """Yield name and version of each installed package whose wheel is for one platform."""
    for found in importlib.metadata.distributions():
        tags = re.findall(r"^Tag: \S+-(\S+)$", found.read_text("WHEEL") or "", re.MULTILINE)
        if any(tag != "any" for tag in tags):
            metadata = found.metadata  # parsed anew each time
            yield re.sub(r"[-_.]+", "-", metadata["Name"]).lower(), metadata["Version"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _files_of(package: str, version: str) -> dict[str, str]:
    """Return the libraries that a wheel brings along, and the numbers of their files."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return {}
    names = {f"{package.replace('-', '_')}.libs", _FOLDERS.get(package, "")} - {""}
    files = [path for name in names for path in Path(str(found.locate_file(name))).glob("lib*.so*")]
    # A library has links beside it, whose numbers are shorter.
    numbered = dict(_numbered(path.name) for path in sorted(files, key=lambda path: len(path.name)))
    return {name: number for name, number in numbered.items() if number != version}


def _numbered(file: str) -> tuple[str, str]:
    """Return ``OpenJPEG`` and ``2.5.4`` for ``libopenjp2-e530e1bf.so.2.5.4``."""
    match = re.fullmatch(r"lib(.+?)(?:[-.][0-9a-f]{8})*(?:\..*)?\.so\.?(.*)", file)
    assert match is not None, "it was found as lib*.so*"
    return _OF_FILES.get(match[1], f"lib{match[1]}.so"), match[2] or UNKNOWN


def _java() -> str:
    """Return the version of the Java that Spark starts."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(Path(home, "bin", "java") if home else "java")
    if java is None:
        return NOT_INSTALLED
    release = Path(java).resolve().parents[1] / "release"
    if release.is_file():
        match = re.search(r'^JAVA_VERSION="(.+)"$', release.read_text("utf-8"), re.MULTILINE)
    else:
        asked = subprocess.run([java, "-version"], capture_output=True, text=True, check=False)
        match = re.search(r'version "(.+?)"', asked.stderr)
    return match[1] if match else UNKNOWN


def _jars() -> dict[str, str]:
    """Return Spark's Scala and those of its jars that hold native code for this machine."""
    spec = importlib.util.find_spec("pyspark")
    if spec is None or not spec.submodule_search_locations:
        return {}
    pattern = re.compile(
        r"(scala-library|snappy-java|zstd-jni|lz4-java|rocksdbjni|leveldbjni-all|commons-crypto|"
        rf"netty-(?:transport-native-epoll|tcnative-boringssl-static))-(\d[\w.]*(?:-\d+)?)"
        rf"(?:-linux-{platform.machine().replace('aarch64', 'aarch_64')})?\.jar"
    )
    files = sorted(Path(spec.submodule_search_locations[0], "jars").glob("*.jar"))
    matches = [pattern.fullmatch(file.name) for file in files]
    return {match[1]: match[2] for match in matches if match}


def _blas(module: Any) -> dict[str, str]:
    built = module.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {"BLAS": f"{built['name']} {built['version']}"}


def _torch(torch: Any) -> dict[str, str]:
    text = torch.__config__.show()
    patterns = {
        "oneDNN": r"(?:MKL-DNN|oneDNN) v([\d.]+)",
        "MKL": r"Math Kernel Library Version ([\d.]+)",
        "OpenMP": r"OpenMP (\d+)",
    }
    found = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    versions = {name: match[1] for name, match in found.items() if match}
    if torch.distributed.is_available() and torch.distributed.is_gloo_available():
        versions["gloo"] = f"as of torch {torch.__version__}"
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
        versions["cuDNN"] = str(torch.backends.cudnn.version() or "")
        if torch.distributed.is_available() and torch.distributed.is_nccl_available():
            versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _pillow(features: Any) -> dict[str, str]:
    named = {
        "libjpeg-turbo": "libjpeg_turbo",
        "OpenJPEG": "jpg_2000",
        "zlib": "zlib",
        "zlib-ng": "zlib_ng",
        "LibTIFF": "libtiff",
        "libwebp": "webp",
    }
    known = {*features.modules, *features.codecs, *features.features}
    return {name: features.version(key) or "" for name, key in named.items() if key in known}


def _charls(module: Any) -> dict[str, str]:
    ask = ctypes.CDLL(module.__file__).charls_get_version_string
    ask.restype = ctypes.c_char_p
    return {"CharLS": ask().decode()}


# The package, the module to have loaded, and how that is asked.
_QUESTIONS: tuple[tuple[str, str, Callable[[Any], dict[str, str]]], ...] = (
    ("python", "ssl", lambda ssl: {"OpenSSL": ssl.OPENSSL_VERSION.split()[1]}),
    ("python", "zlib", lambda zlib: {"zlib": zlib.ZLIB_RUNTIME_VERSION}),
    ("python", "sqlite3", lambda sqlite3: {"SQLite": sqlite3.sqlite_version}),
    ("python", "pyexpat", lambda pyexpat: {"Expat": pyexpat.EXPAT_VERSION.removeprefix("expat_")}),
    ("numpy", "numpy", _blas),
    ("scipy", "scipy", _blas),
    ("torch", "torch", _torch),
    ("pyarrow", "pyarrow", lambda pa: {"Arrow C++": pa.cpp_version}),
    ("pillow", "PIL.features", _pillow),
    ("python-gdcm", "gdcm", lambda gdcm: {"GDCM": gdcm.Version.GetVersion()}),
    ("pyjpegls", "_CharLS", _charls),
    (
        "pylibjpeg-openjpeg",
        "openjpeg.utils",
        lambda utils: {"OpenJPEG": ".".join(map(str, utils.get_openjpeg_version()))},
    ),
    ("onnxruntime", "onnxruntime", lambda ort: {"ONNX Runtime": ort.get_version_string()}),
)


def _printed(versions: Versions) -> str:
    lines = []
    for package, parts in versions.items():
        lines.append(f"{package:<22} {parts['version']}")
        lines += [f"  {part:<20} {text}" for part, text in parts.items() if part != "version"]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Print the table, and a warning for each known weakness; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m medspark.versions", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    asked = parser.parse_args(argv)
    versions = of_machine()
    print(json.dumps(versions, indent=1) if asked.json else _printed(versions))
    for sentence in weaknesses(versions):
        print(f"Warning: {sentence}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
