#!/usr/bin/env bash
# What needs a GPU, within eight minutes on one: its tests, and the speed of a step, an attack and the loader.
#
#     tests/devices/gpu.sh [--wheels FOLDER] [--output FOLDER] [--device cpu --small]
#
# It needs neither a network nor Spark: Python 3.11 or newer with torch, timm, pytest, hypothesis, pyarrow, pandas and
# scikit-learn ($PYTHON; python3 by default), and pydantic, pydantic-settings, pydicom, foolbox, ART and what they need,
# installed or as wheels in FOLDER. It writes gpu.json, gpu.md and a log of each section to build/gpu (--output).
# "--device cpu --small" goes through every line on a CPU, in about a minute; its figures mean nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
paths=$PWD
if [[ ${1:-} == --wheels ]]; then
    [[ $# -ge 2 ]] || { echo "--wheels needs a folder." >&2; exit 2; }
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$2"/*.whl
    paths=$PWD:$site
    shift 2
fi
export PYTHONPATH=$paths${PYTHONPATH:+:$PYTHONPATH}
"$python" tests/devices/gpu.py "$@"
