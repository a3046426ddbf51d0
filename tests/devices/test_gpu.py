"""The script for a GPU: time limits, the tests that it chooses, and its table."""

from __future__ import annotations

import gpu
from gpu import SECTIONS, gpu_tests, table


def test_all_sections_together_take_at_most_eight_minutes() -> None:
    assert sum(section.limit for section in SECTIONS) <= 8 * 60


def test_files_without_a_test_for_a_gpu_are_left_out() -> None:
    chosen = {str(path) for path in gpu_tests()}

    assert {"tests/train/test_engine.py", "tests/attacks/test_suite.py"} <= chosen
    assert not any(
        path.startswith(("tests/spark", "tests/ingest", "tests/jobs")) for path in chosen
    )


def test_the_table_has_ratios_with_their_goals_and_sections_that_ended_early() -> None:
    ratio = {"name": "ours ÷ theirs", "ratio": 0.5, "low": 0.4, "high": 0.6, "goal": 1.0}
    met = ratio | {"reached": True, "higher_is_better": False}
    missed = met | {"name": "speed", "goal": 2.0, "reached": False, "higher_is_better": True}
    document = {
        "machine": {"card": "H"},
        "small": False,
        "sections": {
            "step": {"ended": "done", "rows": [met, missed]},
            "attack": {"ended": "stopped after 5 s", "rows": [{"name": "GB", "figure": 1.25}]},
        },
    }

    lines = table(document).splitlines()

    assert lines[0] == "card H"
    assert lines[4:] == [
        "| ours ÷ theirs | 0.5 [0.4, 0.6] | ≤ 1 |",
        "| speed | 0.5 [0.4, 0.6] | ≥ 2, not reached |",
        "| GB | 1.25 |  |",
        "| attack | stopped after 5 s | |",
    ]


def test_the_last_counts_of_pytest_are_told() -> None:
    assert gpu._counts("x\n== 3 passed, 1 failed in 2.00s ==\n") == "3 passed, 1 failed in 2.00s"
    assert gpu._counts("Traceback") == "no result"
