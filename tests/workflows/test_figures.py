"""The figures that MLflow shows, under short names that stay."""

from medspark.evaluate.result import RobustnessResult
from medspark.workflows.figures import compared, robustness

PGD = {"name": "pgd", "steps": 20, "eps": 2 / 255, "accuracy": 0.5, "rms_255": 1.5}
WORST = {"name": "worst_case", "steps": 0, "eps": 0.5 / 255, "accuracy": 0.25, "auroc": None}
RESULT = RobustnessResult.model_validate(
    {
        "images": 4,
        "clean": {"accuracy": 1, "auroc": 0.75},
        "attacks": [PGD],
        "worst_case": [WORST],
    }
)


def test_a_budget_is_in_the_name_of_a_metric_and_is_no_metric_itself() -> None:
    assert robustness(RESULT) == {
        "test/clean/accuracy": 1.0,
        "test/clean/auroc": 0.75,
        "test/pgd/eps_2_255/accuracy": 0.5,
        "test/pgd/eps_2_255/rms_255": 1.5,
        "test/worst_case/eps_0.5_255/accuracy": 0.25,
    }


def test_the_run_list_shows_the_worst_case_at_the_eps_of_the_training_alone() -> None:
    assert compared(RESULT, eps=0.5 / 255) == {"clean_auroc": 0.75, "worst_case": 0.25}
    assert compared(RESULT, eps=4 / 255) == {"clean_auroc": 0.75}
