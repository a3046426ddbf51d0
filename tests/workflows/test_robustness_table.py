"""The table at the end of a training."""

from medspark.evaluate.result import RobustnessResult
from medspark.workflows.robustness_table import robustness_table

ATTACK = {"name": "pgd", "steps": 20, "eps": 2 / 255, "accuracy": 0.25}


def test_a_row_for_each_result_and_a_column_for_each_attack():
    result = RobustnessResult.model_validate(
        {"images": 4, "clean": {"accuracy": 0.5, "auroc": 0.75}, "attacks": [ATTACK]}
    )
    results = dict.fromkeys("ab", result)

    head, _, *rows = robustness_table(results).splitlines()

    assert head.split("|")[2:5] == [" clean AUROC ", " clean acc. ", " PGD-20 2/255 "]
    assert [row.split()[1::2] for row in rows] == [
        ["a", "0.750", "50.0", "25.0"],
        ["b", "0.750", "50.0", "25.0"],
    ]


def test_a_figure_that_is_undefined_is_a_dash():
    result = RobustnessResult.model_validate({"images": 4, "clean": {"accuracy": 1.0}})

    assert "–" in robustness_table({"": result})
