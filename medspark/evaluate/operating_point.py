"""Where a model of two classes decides, and its calibrated probabilities, for reports."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from medspark.eps import eps_text
from medspark.evaluate.answers import answers_of
from medspark.evaluate.bootstrap import Interval
from medspark.evaluate.decision import probability
from medspark.evaluate.names import in_markdown, short
from medspark.evaluate.result import ConditionFigures, RobustnessResult
from medspark.evaluate.summary import Predictions
from medspark.models.card import Decision, ModelCard, Rate

__all__ = ["OperatingPoint", "decision_lines", "decision_sentence", "rate_lines"]


@dataclass(frozen=True)
class OperatingPoint:
    """The threshold of the calibrated probability of class ``positive``."""

    positive: int
    threshold: float
    temperature: float

    @classmethod
    def of(cls, card: ModelCard) -> OperatingPoint | None:
        """Return where the model decides: at one half without a decision. None for findings."""
        if card.multi_label or len(card.classes) != 2:
            return None
        if card.decision is None or card.positive is None:
            return cls(1, 0.5, card.temperature)
        return cls(card.positive, card.decision.threshold, card.temperature)

    def calibrated(self, predictions: Predictions) -> Predictions:
        """Return the calibrated probabilities (N, 2) behind the answers of ``deciding``."""
        odds = np.log(self.threshold) - np.log1p(-self.threshold)
        found = {}
        for name, values in predictions.probabilities.items():
            scores = answers_of(predictions.labels, values).log_odds(self.positive)
            likely = probability(scores / self.temperature + odds)
            columns = (1 - likely, likely) if self.positive else (likely, 1 - likely)
            found[name] = np.stack(columns, axis=1)
        return replace(predictions, probabilities=found)


def decision_sentence(decision: Decision) -> str:
    """Return where the threshold lies and what it was chosen for, as a sentence."""
    goal = {
        "sensitivity": f"a sensitivity of {decision.target}",
        "specificity": f"a specificity of {decision.target}",
        "youden": "the largest sum of sensitivity and specificity",
    }[decision.criterion]
    attacked = "" if decision.under == "clean" else f" under PGD at {eps_text(decision.eps)}"
    return (
        f"{short(decision.positive)} is called from a probability of {decision.threshold:.3g} on, "
        f"chosen for {goal}{attacked}. Where it was chosen, the sensitivity is "
        f"{_rate(decision.sensitivity)} and the specificity {_rate(decision.specificity)}."
    )


def decision_lines(result: RobustnessResult) -> list[str]:
    """Return the decision, and sensitivity and specificity at it, as a Markdown list."""
    if result.decision is None:
        return []
    return [in_markdown(decision_sentence(result.decision)), "", *rate_lines(result)]


def rate_lines(result: RobustnessResult) -> list[str]:
    """Return sensitivity and specificity, clean and under attack, as a Markdown list."""
    attacked = [
        f"- {attack.name.replace('_', ' ')} at {eps_text(attack.eps)}: {_both(attack)}"
        for attack in result.under_attack
    ]
    return [f"- clean: {_both(result.clean)}", *attacked]


def _both(figures: ConditionFigures) -> str:
    named = ("sensitivity", "specificity")
    return ", ".join(
        f"{name} {_text(getattr(figures, name), figures.intervals.get(name))}" for name in named
    )


def _text(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _rate(rate: Rate) -> str:
    return f"{rate.right}/{rate.images}"
