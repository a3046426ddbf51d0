"""Which split a patient is in: a pure function of the patient, so that new data moves nobody.

The price of that is that sizes are right on average, not exactly: of n patients, a share p is
met within about sqrt(p (1 - p) / n). That is a tenth of a percent of 100,000, and less than one
percent from some 2,500 patients on, in every class and at every site alike because the hash knows
nothing of them: at scale, a keyed hash is stratified by whatever there is. Quotas by class and
site would be exact today and would move patients tomorrow.
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
    """How patients are dealt to train, val and test."""

    val: float = Field(0.1, ge=0, lt=1, description="share of the patients for validation")
    test: float = Field(0.2, ge=0, lt=1, description="share of the patients for the test")
    folds: int | None = Field(
        None, ge=2, description="k-fold: deal the patients that are not in test into this many"
    )
    fold: int = Field(0, ge=0, description="which fold is val, from 0; the others are train")
    use_hints: bool = Field(True, description="honour the split that a label table or folder gives")

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

    ``hints`` are the splits that the patient's images came with, ``own`` those that any image of
    the data came with: what the data do not have is carved out of train. Of several hints for one
    patient the held-out one counts, so that no image of a test patient is ever trained on.
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
    """Return the smallest member of its group for everything that ``pairs`` connect."""
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
