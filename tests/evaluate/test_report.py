"""The report in Markdown and HTML."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medspark.attacks.threat import ThreatModel
from medspark.evaluate.gallery import exhibits, typical_rows
from medspark.evaluate.gradcam import grad_cam
from medspark.evaluate.operating_point import OperatingPoint
from medspark.evaluate.plots import (
    accuracy_curves,
    calibration_error,
    decision_curve,
    reliability_diagram,
    roc_curves,
)
from medspark.evaluate.report import class_table, markdown, table, verdict, write_report
from medspark.evaluate.result import RobustnessResult
from medspark.evaluate.sanity import HOLLOW_MEANS, SanityConfig
from medspark.evaluate.summary import Arrays, Detail, Predictions, Trial, predictions, summarise
from medspark.models.backbones import build
from medspark.models.card import Decision, Rate
from medspark.models.config import ModelConfig
from medspark.models.prediction import probabilities_of

CLASSES = ("NORMAL", "PNEUMONIA")
TRIAL = Trial("pgd", 20, 2 / 255)


@pytest.fixture
def report() -> RobustnessResult:
    """The report on a network without a gradient for most images."""
    return found(30)


@pytest.fixture
def honest() -> RobustnessResult:
    """The report on a network without flags."""
    return found(0)


def found(without_gradient: int) -> RobustnessResult:
    detail = Detail(samples=20, classes=CLASSES)
    return summarise(arrays(without_gradient), [TRIAL], limits=SanityConfig(), detail=detail)


def arrays(without_gradient: int = 30) -> Arrays:
    random = np.random.default_rng(0)
    ill = random.random(40)
    return {
        "rows": np.arange(40),
        "labels": (ill + 0.2 * random.standard_normal(40) > 0.5).astype(int),
        "clean": np.stack([1 - ill, ill], axis=1),
        TRIAL.key: np.stack([ill, 1 - ill], axis=1),
        "zero_gradient": np.arange(40) < without_gradient,
    }


def predicted() -> Predictions:
    return predictions(arrays(), [TRIAL])


def test_flagged_figures_are_called_so_with_the_reason_and_what_it_was_measured_on(
    report: RobustnessResult,
) -> None:
    first, *reasons = verdict(report)

    assert first.startswith("⚠ Do not trust these figures")
    seen = "75.0% of the images have an input gradient of exactly zero"
    (reason,) = [reason for reason in reasons if seen in reason]
    assert reason.endswith("(measured on 40 images).")
    assert reason in markdown(report, title="title", facts={})


def test_an_honest_report_has_no_sign_and_no_hollow_point(honest: RobustnessResult) -> None:
    assert "⚠" not in markdown(honest, title="title", facts={})
    assert accuracy_curves(honest).get_supxlabel() == ""
    assert faces(honest) != {"white"}


def test_a_flagged_report_has_hollow_points_and_says_what_they_are(
    report: RobustnessResult,
) -> None:
    assert faces(report) == {"white"}
    for drawn in (accuracy_curves(report), reliability_diagram(report, predicted())):
        assert drawn.get_supxlabel() == HOLLOW_MEANS


def faces(report: RobustnessResult) -> set[str]:
    (axes,) = accuracy_curves(report).axes
    return {str(line.get_markerfacecolor()) for line in axes.lines}


def test_the_table_has_a_row_for_each_attack_and_the_worst_case(report: RobustnessResult) -> None:
    head, *rows = table(report)

    assert [row[0] for row in rows] == ["clean", "⚠ pgd-20", "⚠ worst case"]
    assert all(len(row) == len(head) for row in rows)
    assert "[" in rows[0][2]


def test_every_class_has_a_row_for_each_attack(report: RobustnessResult) -> None:
    _, *rows = class_table(report)

    assert [row[:3] for row in rows] == [
        [attack, eps, name]
        for attack, eps in (("clean", "0"), ("⚠ pgd-20", "2/255"), ("⚠ worst case", "2/255"))
        for name in CLASSES
    ]
    assert "## Classes" in markdown(report, title="title", facts={})


def test_the_page_needs_nothing_else(report: RobustnessResult, tmp_path: Path) -> None:
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    shown = exhibits(
        model, torch.rand(2, 1, 32, 32), torch.tensor([0, 1]), threat=ThreatModel(), steps=2
    )

    write_report(
        tmp_path, report, predicted(), title="a <title>", facts={"model": "m & n"},
        classes=CLASSES, positive=1, shown=shown, shown_eps=2 / 255,
    )  # fmt: skip

    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "a &lt;title&gt;" in page
    assert "m &amp; n" in page
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "report.md", "report.html", "accuracy.png", "reliability.png", "roc.png", "images.png",
    }  # fmt: skip


HOSTILE = ("$\\frac{$ a$", "<script>x</script>|" + "y" * 300)


@pytest.mark.parametrize("positive", [0, 1, None])
def test_classes_of_any_name_are_reported(tmp_path: Path, positive: int | None) -> None:
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=1)
    shown = exhibits(
        model, torch.rand(2, 1, 32, 32), torch.tensor([0, 1]), threat=ThreatModel(), steps=1
    )
    arrays = {
        "rows": np.arange(4),
        "labels": np.array([0, 1, 0, 1]),
        "clean": np.full((4, 2), 0.5),
        TRIAL.key: np.full((4, 2), 0.5),
        "zero_gradient": np.zeros(4, bool),
    }
    found = summarise(arrays, [TRIAL], limits=SanityConfig(), detail=Detail(classes=HOSTILE))

    write_report(
        tmp_path, found, predictions(arrays, [TRIAL]), title="$a_{$ <b>",
        facts={"model": "<i>|$^$"}, classes=HOSTILE, positive=positive, shown=shown,
    )  # fmt: skip

    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text().replace("\\<", "")
        assert not any(tag in text for tag in ("<script", "<b>", "<i>"))
    lines = (tmp_path / "report.md").read_text().replace("\\|", "").splitlines()
    assert {line.count("|") for line in lines if "y" * 300 in line} == {7}


def test_the_gallery_shows_every_class_in_turn() -> None:
    assert typical_rows(np.array([0, 0, 0, 1, 2, 1]), 4).tolist() == [0, 3, 4, 1]


def test_exhibits_are_attacked_within_the_threat_model() -> None:
    model = build(ModelConfig(name="test_resnet"), num_classes=2, channels=3).train()
    images, threat = torch.rand(3, 3, 32, 32), ThreatModel(eps=4 / 255)

    shown = exhibits(model, images, torch.tensor([0, 1, 0]), threat=threat, steps=3)

    assert model.training
    for exhibit in shown:
        assert 0 < np.abs(exhibit.attacked - exhibit.clean).max() <= 4 / 255 + 1e-6
        assert exhibit.clean_map.shape == (32, 32)


def test_grad_cam_of_a_vision_transformer_marks_the_patches_that_count() -> None:
    torch.manual_seed(0)
    model = build(ModelConfig(name="test_vit"), num_classes=2, channels=1, size=(64, 32)).eval()
    images = torch.rand(3, 1, 64, 32)

    maps = grad_cam(model.requires_grad_(False), images, torch.tensor([0, 1, 1]))

    assert maps.shape == (3, 64, 32)
    assert (maps >= 0).all()
    assert maps.amax((1, 2)).tolist() == pytest.approx([1, 1, 1])
    assert not torch.equal(maps[1], grad_cam(model, images, torch.tensor([0, 0, 1]))[1])


def test_grad_cam_of_swin_averages_gradients_over_places_and_not_over_channels() -> None:
    torch.manual_seed(0)
    name, size = "swin_tiny_patch4_window7_224", (64, 96)
    model = build(ModelConfig(name=name), num_classes=2, channels=1, size=size).eval()
    images, classes = torch.rand(2, 1, *size), torch.tensor([0, 1])
    features = model.backbone.forward_features(model.inputs(images)).detach().requires_grad_(True)
    logits = model.backbone.forward_head(features)
    (gradient,) = torch.autograd.grad(logits[0, 0] + logits[1, 1], features)
    evidence = (gradient.mean((1, 2), keepdim=True) * features).sum(3).relu().detach()
    expected = torch.nn.functional.interpolate(
        evidence[:, None], size, mode="bilinear", align_corners=False
    )[:, 0]

    maps = grad_cam(model, images, classes)

    assert evidence.shape == (2, 2, 3)
    peaks = expected.amax((1, 2), keepdim=True).clamp_min(1e-12)
    assert torch.allclose(maps, expected / peaks, atol=1e-4)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "densenet121", "resnet50"])
def test_grad_cam_works_on_the_three_networks(name: str) -> None:
    model = build(ModelConfig(name=name), num_classes=2, channels=1).eval()

    maps = grad_cam(model, torch.rand(2, 1, 64, 64), torch.tensor([0, 1]))

    assert maps.shape == (2, 64, 64)
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_calibration_is_worked_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.25, 0.75], [0.25, 0.75]])

    # Sure of .95 and right half the time; sure of .75 and always right.
    assert calibration_error(probabilities, np.array([0, 1, 1, 1])) == pytest.approx(
        0.5 * 0.45 + 0.5 * 0.25
    )


RATE = Rate(right=19, images=20)
DECISION = Decision(
    positive="PNEUMONIA", threshold=0.3, criterion="sensitivity", target=0.95, under="pgd",
    eps=2 / 255, sensitivity=RATE, specificity=RATE,
)  # fmt: skip
POINT = OperatingPoint(positive=1, threshold=0.3, temperature=2.0)


def test_an_operating_point_is_a_section_with_intervals_clean_and_under_attack(
    honest: RobustnessResult,
) -> None:
    text = markdown(honest.model_copy(update={"decision": DECISION}), title="t", facts={})

    section = text.partition("## Operating point")[2]
    assert "PNEUMONIA is called from a probability of 0.3 on" in section
    assert "a sensitivity of 0.95 under PGD at 2/255" in section
    low, high = honest.clean.intervals["sensitivity"]
    assert f"- clean: sensitivity {honest.clean.sensitivity:.3f} [{low:.3f}, {high:.3f}]" in section
    assert "- pgd at 2/255: sensitivity" in section
    assert "## Operating point" not in markdown(honest, title="t", facts={})


def test_the_report_of_an_operating_point_has_a_decision_curve(honest, tmp_path: Path) -> None:
    write_report(
        tmp_path, honest.model_copy(update={"decision": DECISION}), predicted(), title="t",
        facts={}, classes=CLASSES, positive=1, point=POINT,
    )  # fmt: skip

    assert (tmp_path / "decision.png").stat().st_size > 1000
    assert "Operating point" in (tmp_path / "report.html").read_text()


def test_the_decision_curve_shows_calibrated_probabilities_clean_and_attacked(honest) -> None:
    axes = decision_curve(honest, POINT.calibrated(predicted()), POINT).axes[0]

    curves = {line.get_label(): line for line in axes.lines}
    assert {"clean", "worst case at 2/255", "all positive", "none positive"} <= curves.keys()
    share = arrays()["labels"].mean()
    assert curves["clean"].get_ydata()[0] == pytest.approx(share, abs=0.02)
    assert curves["clean"].get_ydata().max() <= share
    assert (curves["worst case at 2/255"].get_ydata() <= curves["clean"].get_ydata() + 1e-9).all()


@given(st.floats(0.01, 0.99), st.floats(0.3, 5), st.integers(0, 1))
def test_what_attacks_saw_is_turned_back_into_calibrated_probabilities(
    threshold: float, temperature: float, positive: int
) -> None:
    logits = np.array([[0.0, 2.0], [1.0, -1.0], [0.5, 0.4]])
    seen = logits.copy()
    seen[:, positive] -= temperature * np.log(threshold / (1 - threshold))
    kept = Predictions(np.array([1, 0, 1]), {"clean": probabilities_of(seen, multi_label=False)})

    found = OperatingPoint(positive, threshold, temperature).calibrated(kept)

    wanted = probabilities_of(logits / temperature, multi_label=False)
    assert found.probabilities["clean"] == pytest.approx(wanted, abs=1e-5)


def test_a_dot_on_the_roc_curve_is_where_the_answers_lie(honest: RobustnessResult) -> None:
    axes = roc_curves(honest, predicted(), classes=CLASSES, positive=1).axes[0]

    dots = [line for line in axes.lines if line.get_marker() == "o"]
    (false,), (true,) = dots[0].get_xdata(), dots[0].get_ydata()
    assert true == pytest.approx(honest.clean.sensitivity)
    assert 1 - false == pytest.approx(honest.clean.specificity)
