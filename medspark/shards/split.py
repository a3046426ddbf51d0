"""Assign patients to splits by a keyed hash, so that new data never moves a patient.

The sizes of the splits are therefore right on average, not exact. Of n patients, a share p is met
within a standard deviation of sqrt(p (1 - p) / n): about 0.1 % for 100,000 patients, and less than
1 % from 2,500 patients on. The hash is independent of class and site, so the same holds within each
class and site. Quotas by class and site would be exact, but new data would move patients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

from pydantic import Field, model_validator

from medspark.config import Config
from medspark.seeding import derive

Member = TypeVar("Member", int, str)

_RANGE = 2.0**64
_HELD_OUT_FIRST = ("test", "val", "train")


class SplitConfig(Config):
    """Shares of train, val and test, and the use of hints."""

    val: float = Field(0.1, ge=0, lt=1, description="share of the patients for validation")
    test: float = Field(0.2, ge=0, lt=1, description="share of the patients for the test")
    folds: int | None = Field(
        None, ge=2, description="k-fold: number of folds of the patients that are not in test"
    )
    fold: int = Field(0, ge=0, description="the fold that is val, from 0; the others are train")
    use_hints: bool = Field(True, description="use the split that a label table or folder gives")

    @model_validator(mode="after")
    def _fits(self) -> SplitConfig:
        if self.val + self.test >= 1:
            raise ValueError("split.val and split.test leave nothing to train on")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"split.fold should be below {self.folds}, the number of folds")
        return self


def patient_split(
    patient: str, hints: Collection[str], config: SplitConfig, *, seed: int, own: Collection[str]
) -> str:
    """Return train, val or test for a patient.

    ``hints`` are the splits given for the patient's images. ``own`` are the splits given for any
    image of the data; a split that is missing there is taken out of train. If a patient has several
    hints, the most held-out one counts, so that no image of a test patient is trained on.
    """
    known = [split for split in _HELD_OUT_FIRST if split in hints] if config.use_hints else []
    hint = known[0] if known else None
    if hint == "test" or (hint == "val" and config.folds is None):
        return hint
    carve_test = hint is None or "test" not in own
    if carve_test and _uniform(seed, "test", patient) < config.test:
        return "test"
    if hint == "train" and "val" in own and config.folds is None:
        return "train"
    return "val" if _is_val(patient, config, seed) else "train"


def together(pairs: Iterable[tuple[Member, Member]]) -> dict[Member, Member]:
    """Return {member: smallest member of its connected component}; ``pairs`` are the edges."""
    parents: dict[Member, Member] = {}

    def root(member: Member) -> Member:
        while (parent := parents.setdefault(member, member)) != member:
            parents[member] = member = parents[parent]
        return member

    for one, other in pairs:
        low, high = sorted((root(one), root(other)))
        parents[high] = low
    return {member: root(member) for member in parents}


def _is_val(patient: str, config: SplitConfig, seed: int) -> bool:
    u = _uniform(seed, "val", patient)
    if config.folds is not None:
        return int(u * config.folds) == config.fold
    return u < config.val / (1 - config.test)


def _uniform(seed: int, purpose: str, patient: str) -> float:
    return derive(seed, "split", purpose, patient) / _RANGE
