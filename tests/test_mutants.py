"""The planted mistakes of tests/mutants still fit the code (tests/mutants.py plants them)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
mutants = importlib.util.module_from_spec(_SPEC)
sys.modules["mutants"] = mutants
_SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("mutant", mutants.read_mutants(), ids=lambda mutant: mutant.name)
def test_a_planted_mistake_changes_one_place_and_names_tests_that_exist(mutant):
    text = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")

    assert text.count(mutant.before) == 1
    assert mutant.before != mutant.after
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (mutants.ROOT / file).read_text(encoding="utf-8")


def test_no_two_planted_mistakes_have_one_name():
    names = [mutant.name for mutant in mutants.read_mutants()]

    assert len(names) == len(set(names))
