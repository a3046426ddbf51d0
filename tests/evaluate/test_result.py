"""Result documents: typed, one way to their figures, and the same JSON as before."""

import json

from hypothesis import given
from hypothesis import strategies as st

from medspark.evaluate.result import ConditionFigures, RobustnessResult
from medspark.train.result import TrainResult

SHARE = st.one_of(st.none(), st.floats(0, 1))
METRICS = st.fixed_dictionaries(
    {"accuracy": SHARE, "auroc": SHARE}, optional={"label_accuracy": SHARE}
)
ATTACKS = st.builds(
    lambda metrics, name, eps: {"name": name, "steps": 20, "eps": eps / 255} | metrics,
    METRICS,
    st.sampled_from(["fgsm", "pgd"]),
    st.integers(0, 8),
)
DOCUMENTS = st.builds(
    lambda clean, attacks, extra: {"images": 3, "clean": clean, "attacks": attacks} | extra,
    METRICS,
    st.lists(ATTACKS, max_size=4),
    st.sampled_from([{}, {"of_another_version": {"a": [1]}}]),
)


@given(DOCUMENTS)
def test_a_document_comes_back_as_it_was_with_what_other_versions_wrote(document: dict) -> None:
    assert RobustnessResult.model_validate(document).as_json() == document


@given(DOCUMENTS)
def test_every_defined_figure_comes_once_under_its_condition(document: dict) -> None:
    figures = RobustnessResult.model_validate(document).figures()

    conditions = [document["clean"], *document["attacks"]]
    metrics = ("accuracy", "auroc", "label_accuracy")
    values = [c[m] for c in conditions for m in metrics if c.get(m) is not None]
    assert [figure.value for figure in figures] == values


def test_a_figure_carries_its_interval() -> None:
    clean = ConditionFigures(accuracy=0.5, auroc=None, intervals={"accuracy": (0.25, 0.75)})

    (figure,) = clean.figures()

    assert (figure.name, figure.low, figure.high) == ("clean/accuracy", 0.25, 0.75)


def test_figures_are_read_from_a_document_with_their_intervals() -> None:
    def found(value: float) -> dict[str, object]:
        undefined = dict.fromkeys(("auroc", "balanced_accuracy", "sensitivity", "specificity"))
        return {"accuracy": value, "intervals": {"accuracy": [0.0, 1.0]}} | undefined

    attacks = [{"name": "fgsm", "steps": 1, "eps": 2 / 255} | found(0.5)]
    worst = [{"name": "worst_case", "steps": 0, "eps": 2 / 255} | found(0.25)]
    document = {"images": 4, "clean": found(1.0), "attacks": attacks, "worst_case": worst}
    figures = RobustnessResult.model_validate(document).figures()

    assert [(f.attack, f.eps, f.value, f.high) for f in figures] == [
        ("clean", 0, 1.0, 1.0), ("fgsm", 2 / 255, 0.5, 1.0), ("worst_case", 2 / 255, 0.25, 1.0),
    ]  # fmt: skip


def test_a_kept_training_result_is_read_again_word_for_word() -> None:
    one = {
        "mode": "standard", "images": 2, "clean": {"accuracy": 1.0, "auroc": None}, "attacks": [],
        "worst_case": [], "believable": True, "flags": [], "epochs": 1, "alarms": [], "steps": 4,
        "validation": {"epoch": 1, "score": 0.5, "clean": {"accuracy": 0.5}, "pgd": {}},
        "model": "m", "architecture": "resnet50", "batch_norm": "frozen", "precision": "fp32",
        "world_size": 1, "threads_per_rank": 2, "global_batch": 8, "images_per_second": 9.5,
        "data_wait_share": 0.0, "communication_share": 0.0, "peak_memory_mb": 1.5,
        "timeline": {"joined": 1.0}, "train_images": 30, "dataset_digest": "d",
    }  # fmt: skip
    document = json.loads(json.dumps(one | {"baseline": one, "job": "train_at"}))

    assert TrainResult.model_validate(document).as_json() == document
