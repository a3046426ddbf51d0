"""eps: one unit, read as it is shown, and what was meant as grey levels is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medspark.attacks.threat import ThreatModel
from medspark.config import Config, load_config
from medspark.eps import LARGEST, Eps, eps_name, eps_text, with_eps
from medspark.errors import UsageError
from medspark.evaluate.config import AttackSettings
from medspark.workflows.evaluate_config import EvaluationConfig
from medspark.workflows.paper_plan import TableEvaluation

allowed = st.floats(0, LARGEST) | st.integers(0, 6400).map(lambda n: n / 100 / 255)
too_large = st.floats(LARGEST, 1e6, exclude_min=True) | st.integers(1, 255)
KEYS = [(ThreatModel, "{}"), (AttackSettings, "[0, {}]"), (TableEvaluation, "[0, {}]")]


class Job(Config):
    """A job."""

    eps: Eps = 0.0
    budgets: tuple[Eps, ...] = ()


def given_as(text: object) -> tuple[float, tuple[float, ...]]:
    job = load_config(Job, ["--eps", f"{text}", "--budgets", f"0,{text}"])
    return job.eps, job.budgets


@given(allowed)
def test_what_is_shown_is_read_back_as_the_same_value(eps: float) -> None:
    assert given_as(eps_text(eps)) == (eps, (0.0, eps))


@given(allowed)
def test_a_fraction_and_a_number_say_the_same_on_the_command_line_and_in_code(eps: float) -> None:
    assert given_as(eps) == (eps, (0.0, eps))
    assert ThreatModel(eps=eps).eps == eps


@given(st.integers(0, 64))
def test_grey_levels_are_written_over_255(levels: int) -> None:
    assert given_as(f"{levels}/255") == given_as(f"{levels} / 255") == given_as(levels / 255)
    assert eps_text(levels / 255) == (f"{levels}/255" if levels else "0")


@pytest.mark.parametrize(
    ("eps", "text"),
    [(0.5 / 255, "0.5/255"), (0.05, "12.75/255"), (0.0078, "0.0078"), (1e-9, "1e-09"), (0, "0")],
)
def test_levels_of_few_digits_are_a_fraction_and_others_a_number(eps: float, text: str) -> None:
    assert eps_text(eps) == text


@given(too_large)
def test_what_is_above_64_grey_levels_is_refused_with_the_way_to_write_it(eps: float) -> None:
    meant = f"{eps:g}/255" if eps <= 64 else "2/255"

    with pytest.raises(UsageError) as caught:
        load_config(Job, ["--eps", str(eps)])

    assert str(caught.value) == (
        f"eps: the budget is a fraction of [0, 1], at most 64/255, so it cannot be {eps:g}; write "
        f"grey levels of 255 as {meant}."
    )


@pytest.mark.parametrize("text", ["65/255", "1", "2", "-0.001", "-2/255", "nan", "inf", "nan/1"])
def test_no_budget_is_outside_of_nothing_and_64_grey_levels(text: str) -> None:
    with pytest.raises(UsageError, match="at most 64/255"):
        load_config(Job, [f"--eps={text}"])


@pytest.mark.parametrize("text", ["1/0", "a/255", "2/", "/255", "2/255/1", "two"])
def test_what_is_no_number_is_said_to_be_none(text: str) -> None:
    with pytest.raises(UsageError, match=f"eps cannot be '{text}': input should be a valid number"):
        load_config(Job, ["--eps", text])


@pytest.mark.parametrize(("section", "form"), KEYS)
@pytest.mark.parametrize("text", ["2/255", "0.0078", "0.5/255", "0"])
def test_a_file_may_hold_fractions_and_numbers(
    section: type[Config], form: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(f"eps: {form.format(text)}")

    found: Any = load_config(section, ["--config", str(tmp_path / "c.yaml")])

    above, _, below = text.partition("/")
    assert found.eps in (eps := float(above) / float(below or 1), (0.0, eps))


@pytest.mark.parametrize(("section", "form"), KEYS)
def test_a_file_of_grey_levels_is_refused(section: type[Config], form: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"eps: {form.format(1)}")

    with pytest.raises(UsageError, match="write grey levels of 255 as 1/255"):
        load_config(section, ["--config", str(tmp_path / "c.yaml")])


def test_an_evaluation_attacks_with_the_budgets_it_is_given() -> None:
    words = ["--model", "m", "--shards", "s", "--eps", "0,2/255,0.0078"]

    assert load_config(EvaluationConfig, words).attack_settings().eps == (0.0, 2 / 255, 0.0078)


@pytest.mark.parametrize(
    ("eps", "name"), [(2 / 255, "eps_2_255"), (0.5 / 255, "eps_0.5_255"), (0.0, "eps_0")]
)
def test_mlflow_has_names_without_a_stroke_in_the_budget(eps: float, name: str) -> None:
    assert eps_name(eps) == name


def test_a_document_of_an_earlier_version_is_read_with_its_budgets_as_fractions() -> None:
    before = {"clean": {"accuracy": 1}, "attacks": [{"name": "pgd", "eps_255": 2, "linf_255": 1}]}
    after = {"clean": {"accuracy": 1}, "attacks": [{"name": "pgd", "eps": 2 / 255, "linf_255": 1}]}

    assert with_eps({"baseline": before, **before}) == {"baseline": after, **after}
    assert with_eps(after) == after
