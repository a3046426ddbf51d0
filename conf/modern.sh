#!/usr/bin/env bash
# Test the wheel with the newest libraries that its ranges admit, in an environment of its own: build/modern.
# Petastorm, which needs an old pyarrow, is not there, and its tests are skipped; torch stays at the tested version,
# because pip's indexes have newer builds for CUDA alone. Run through make; ONLY="tests/data -x" passes words to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
place=$PWD/build/modern

mkdir -p "$place"
rm -rf "$place"/*.whl "$place/tree" build/lib
grep -E '^(torch|torchvision)==' conf/constraints.txt > "$place/constraints.txt"
[ -x "$place/venv/bin/pip" ] || "$python" -m venv "$place/venv"
install() { "$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install --upgrade pip
"$place/venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$place" .
wheel=$(echo "$place"/medspark-*.whl)
install --upgrade --upgrade-strategy eager --constraint "$place/constraints.txt" \
    "medspark[connect,edge,privacy,prune,s3,dev] @ file://$wheel"
install --force-reinstall --no-deps "$wheel"

# Everything but the package, so that the tests import the wheel.
git ls-files -z -- . ':!medspark' | xargs -0 cp --parents --target-directory="$(mkdir -p "$place/tree" && echo "$place/tree")"
cd "$place/tree"
export PATH="$place/venv/bin:$PATH" SPARK_CONF_DIR="$place/tree/conf"
unset PYTHONPATH
"$place/venv/bin/python" -m pip list --format freeze |
    grep -E '^(pyspark|pyarrow|numpy|pandas|torch|mlflow|pydantic|scikit-learn|timm)=='
# What looks at the sources, at git or at the tested versions is the checkout's business, as are workers without medspark.
# shellcheck disable=SC2086 - several words
pytest --ignore tests/architecture --ignore tests/claims --ignore tests/test_mutants.py \
    --ignore tests/test_requirements_lock.py --ignore tests/mutants.py --ignore tests/export/test_distribution.py \
    --deselect tests/cluster/test_train_at.py::test_the_workers_do_not_have_medspark ${ONLY:-}
