# make demo    set everything up and train a robust model on built-in data
# make test    set everything up and run the test suite
# make ui      open the MLflow dashboard of the runs logged here
# make check   format, lint, types
# make setup   set everything up (LOCKED=1, for every target: check the hashes of conf/lock)
# make bench   benchmarks, medspark and the reference in turn (ONLY=name for one)
# make readme  write the figures of every README from the records in tests/claims
# make claims  measure the records again and check them against their intervals (ONLY=name for one)
# make edge     build build/edge/medspark_edge-….whl, which predicts on devices without torch
# make modern   test the wheel with the newest libraries that it admits, without Petastorm (ONLY=words for pytest)
# make chaos   kill processes while they work, and check that nothing is lost (ONLY=row for one)
# make scale   ingest, cut and train on 10^4 to 10^6 files (SIZES=10000 for less)
# make hosts   train across hosts in network namespaces, disconnect one (ONLY=row for one; root)

SHELL := /bin/bash
PORT ?= 5000
ONLY ?=
SIZES ?= 10000,100000,1000000
LOCKED ?=
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export SPARK_CONF_DIR := $(CURDIR)/conf
export PYTHON
export LOCKED
export ONLY

.PHONY: demo test ui check bench readme claims edge modern chaos hosts scale setup clean

setup: .venv/.ready$(if $(LOCKED),-locked)

.venv/.ready .venv/.ready-locked: pyproject.toml conf/constraints.txt conf/setup.sh $(wildcard conf/lock/*)
	@conf/setup.sh

demo: setup
	spark-submit jobs/train_at.py --config conf/jobs/demo.yaml --profile conf/profiles/local.yaml \
		--output build/demo/result.json

test: setup
	python -m pytest

ui: setup
	@echo 'The runs: http://127.0.0.1:$(PORT)/#/experiments/1/runs?viewStateShareKey=medspark&workflowType=machine_learning'
	mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --port $(PORT)

check: setup
	ruff format --check .
	ruff check .
	mypy

bench: setup
	python -m pip install --quiet --constraint conf/constraints.txt --editable '.[bench]'
	python tests/benchmarks/run.py --output build/bench.json $(if $(ONLY),--only $(ONLY))

readme: setup
	python tests/claims/measure.py readme
	python tests/claims/picture.py draw

claims: setup
	python tests/claims/measure.py again $(if $(ONLY),--only $(ONLY))

edge: setup
	python conf/edge.py build/edge

modern:
	conf/modern.sh

chaos: setup
	python tests/chaos/run.py $(if $(ONLY),--only $(ONLY))

hosts: setup
	python tests/hosts/run.py $(if $(ONLY),--only $(ONLY))

scale: setup
	python tests/scale/run.py --sizes $(SIZES)

clean:
	rm -rf build .venv
