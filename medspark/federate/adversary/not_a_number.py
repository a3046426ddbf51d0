"""An update of numbers that are none, as a broken client sends too."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from medspark.federate.adversary.adversary import Adversary, Known
from medspark.federate.aggregate.rule import Vector

__all__ = ["NotANumber"]


class NotANumber(Adversary):
    """Send NaN for every weight. The server leaves out such updates, whatever the rule."""

    reaches_rules: ClassVar[bool] = False

    def send(self, update: Vector, known: Known) -> Vector:  # noqa: ARG002
        """Return NaN (d,)."""
        return np.full_like(update, np.nan)
