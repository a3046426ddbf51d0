"""The figures that MLflow shows, under short names that stay."""

from medspark.workflows.figures import robustness


def test_a_budget_is_in_the_name_of_a_metric_and_is_no_metric_itself() -> None:
    attack = {"name": "pgd", "steps": 20, "eps": 2 / 255, "accuracy": 0.5, "rms_255": 1.5}
    worst = {"name": "worst_case", "steps": 0, "eps": 0.5 / 255, "accuracy": 0.25, "auroc": None}

    found = robustness({"clean": {"accuracy": 1}, "attacks": [attack], "worst_case": [worst]})

    assert found == {
        "test/clean/accuracy": 1.0,
        "test/pgd/eps_2_255/accuracy": 0.5,
        "test/pgd/eps_2_255/rms_255": 1.5,
        "test/worst_case/eps_0.5_255/accuracy": 0.25,
    }
