"""How images are attacked: which attacks, at which budgets, how hard."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import Field

from medspark.attacks.config import BLACK_BOX, AttackName, Effort
from medspark.attacks.threat import Norm, ThreatModel
from medspark.config import Config
from medspark.eps import Eps
from medspark.errors import UsageError
from medspark.evaluate.sanity import PROBED_IMAGES, SanityConfig
from medspark.evaluate.summary import Array, Trial
from medspark.seeding import derive
from medspark.shards.plan import permute

__all__ = ["AttackSettings", "check_attacks"]


class AttackSettings(Config):
    """How images are attacked, in an evaluation and at the end of a training."""

    attacks: tuple[AttackName, ...] = Field(("fgsm", "pgd"), description="by name")
    norm: Norm = Field("linf", description="how a perturbation is measured")
    eps: tuple[Eps, ...] = Field(
        (1 / 255, 2 / 255, 4 / 255), description="budgets, fractions of [0, 1] as 2/255"
    )
    steps: int = Field(
        20, ge=1, description="steps of PGD; APGD takes five times as many, FAB 2.5 times"
    )
    restarts: int = Field(1, ge=1, description="random starts of PGD; more only for images held")
    queries: int = Field(1000, ge=1, description="answers that Square may ask for per image")
    images: int | None = Field(
        None, ge=1, description="attack only so many images, always the same; all by default"
    )
    batch_size: int = Field(128, ge=1, description="images attacked together")
    seed: int = Field(0, ge=0, description="of the random starts and the choice of images")
    sanity_images: int = Field(
        PROBED_IMAGES,
        ge=0,
        description="images that the sanity probes attack once more, 0 for no probes",
    )
    sanity: SanityConfig = SanityConfig()

    def rows(self, total: int) -> Array:
        """Return which of ``total`` images are attacked, in order."""
        if self.images is None or self.images >= total:
            return np.arange(total)
        return np.sort(permute(np.arange(self.images), total, derive(self.seed, "test")))

    def probed_below(self, rows: Array) -> int:
        """Return the row below which the sanity probes take images, where ``rows`` are attacked.

        They take the first ``sanity_images`` of them, or all where there are fewer.
        """
        probed = np.sort(rows)[: self.sanity_images]
        return int(probed[-1]) + 1 if len(probed) else 0

    @property
    def effort(self) -> Effort:
        """How hard the attacks try."""
        return Effort(steps=self.steps, restarts=self.restarts, queries=self.queries)

    def threat(self, eps: float) -> ThreatModel:
        """Return the threat model of one budget."""
        return ThreatModel(norm=self.norm, eps=eps)

    def trials(self, own: Iterable[str] = ()) -> list[Trial]:
        """Return every attack at every budget, those of ``own`` names last."""
        names = [*self.attacks, *own]
        return [Trial(name, self.effort.steps_of(name), eps) for name in names for eps in self.eps]


def check_attacks(attacks: Sequence[str], *, gradients: bool, surrogates: int) -> None:
    """Raise UsageError for an attack that cannot run on such a model."""
    if "transfer" in attacks and surrogates == 0:
        raise UsageError("attacks: transfer needs a surrogate, another model to make images for.")
    blocked = [name for name in attacks if name not in BLACK_BOX]
    if not gradients and blocked:
        raise UsageError(
            f"attacks: {', '.join(blocked)} cannot run on a model without gradients; square and "
            "transfer can."
        )
