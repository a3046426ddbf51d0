#!/usr/bin/env bash
# Set up everything that medspark needs in .venv: a virtual environment, the tested versions of its
# libraries, and a Java runtime for Spark if there is none. Run through make; safe to run again.
# LOCKED=1 installs only packages with a hash in conf/lock, into a new .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'medspark setup: %s\n' "$*" >&2; }
stop() { say "$*"; exit 1; }

# Debian packages, if we may install them.
apt_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say "installing $* with apt-get"
    apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >&2
}

java_is_recent() {
    command -v java >/dev/null || return 1
    local major
    major=$(java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
    [ "${major:-0}" -ge 17 ]
}

find_python() {
    local name
    for name in "${PYTHON:-}" python3.11 python3.12 python3 python; do
        if [ -n "$name" ] && command -v "$name" >/dev/null &&
            "$name" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

python=$(find_python) || { apt_install python3 python3-venv && python=$(find_python); } ||
    stop "Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python3.11"

java_is_recent || apt_install openjdk-17-jre-headless || apt_install default-jre-headless ||
    stop "Spark needs Java 17 or newer; install a JRE (Debian: openjdk-17-jre-headless) and run make again."

install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

# Packages already in an environment were not checked against hashes, so LOCKED=1 starts with an
# empty one. It empties only an environment that this script made.
if [ -n "${LOCKED:-}" ] && [ -e .venv ]; then
    [ -e .venv/.medspark ] || [ -e .venv/.ready ] ||
        stop "LOCKED=1 would empty .venv, which this setup did not make; move it away and run make again."
    rm -rf .venv
fi
rm -f .venv/.ready .venv/.ready-locked
if [ ! -x .venv/bin/pip ]; then
    say "creating .venv with $($python --version)"
    "$python" -m venv .venv 2>/dev/null || { apt_install python3-venv && "$python" -m venv .venv; } ||
        stop "$python cannot create virtual environments; install its venv module (Debian: python3-venv)."
    touch .venv/.medspark
fi

if [ -n "${LOCKED:-}" ]; then
    say "installing by the hashes of conf/lock; this takes minutes"
    install --require-hashes --requirement conf/lock/build.txt
    install --require-hashes --no-deps --no-build-isolation --requirement conf/lock/libraries.txt
    torch=conf/lock/cpu.txt
    if ! install --dry-run --no-deps "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $torch)" >/dev/null 2>&1; then
        say "torch for CPUs is not to be had from pip's indexes here; installing the one for CUDA, gigabytes"
        torch=conf/lock/cuda.txt
    fi
    install --require-hashes --no-deps --requirement $torch
    PYTHONWARNINGS='ignore:Editable installation' install --no-deps --no-build-isolation --no-index --editable .
    .venv/bin/python -m pip check >&2 || stop "conf/lock is not complete for this machine; see the line above."
else
    say "installing the tested versions of the libraries (conf/constraints.txt); the first time takes minutes"
    install --constraint conf/constraints.txt pip setuptools wheel
    PYTHONWARNINGS='ignore:Editable installation' install --constraint conf/constraints.txt --no-build-isolation --editable '.[petastorm,connect,edge,openvino,privacy,prune,s3,dev]'
fi
.venv/bin/python -c '
import sys, zipfile
from pathlib import Path
import pyspark
from medspark.spark.ship import repack
try:
    for zipped in Path(pyspark.__file__).parent.glob("python/lib/*.zip"):
        repack(zipped)
except (OSError, zipfile.BadZipFile) as error:
    sys.exit(f"medspark setup: {zipped} stays as it is, and every start takes seconds longer: {error}")
' || true
touch ".venv/.ready${LOCKED:+-locked}"
say "done"
