"""The names of the attacks, and their numbers of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "BLACK_BOX", "CW_SEARCHES", "CW_STEPS", "DEEPFOOL_STEPS", "KNOWS_LESS", "OF_DENOISED",
    "AttackName", "Effort",
]  # fmt: skip

AttackName = Literal[
    "fgsm", "pgd", "pgd_margin", "pgd_rescaled", "apgd", "apgd_ce", "apgd_dlr", "fab",
    "deepfool", "cw", "square", "transfer", "autoattack", "bpda_pgd", "unguarded_pgd",
]  # fmt: skip

# These attacks use the model's outputs only, not its gradients.
BLACK_BOX = frozenset({"square", "transfer"})
# These attacks are for a network behind a denoiser: its gradient replaced by the identity's, and
# the classifier attacked as if there were no denoiser.
OF_DENOISED: tuple[AttackName, ...] = ("bpda_pgd", "unguarded_pgd")
# Sanity checks expect attacks that know the whole network to do at least as much harm as these.
KNOWS_LESS = BLACK_BOX | {"unguarded_pgd"}
# These attacks go on until they have found a near image, whatever the steps of PGD.
DEEPFOOL_STEPS = 50
CW_STEPS, CW_SEARCHES = 100, 6


@dataclass(frozen=True)
class Effort:
    """The numbers of steps, restarts and queries of the attacks; those of C&W and DeepFool stay."""

    steps: int = 20  # of PGD and transfer; APGD takes five times as many, FAB 2.5 times
    restarts: int = 1  # of PGD
    queries: int = 1000  # of Square

    def steps_of(self, name: str) -> int:
        """Return the most gradients (or queries) per image that attack ``name`` uses."""
        factors = {"apgd": 5, "apgd_ce": 5, "apgd_dlr": 5, "autoattack": 5, "fab": 2.5}
        fixed = {
            "fgsm": 1,
            "deepfool": DEEPFOOL_STEPS,
            "cw": CW_STEPS * CW_SEARCHES,
            "square": self.queries,
        }
        return fixed.get(name) or round(factors.get(name, 1) * self.steps)
