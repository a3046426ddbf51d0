"""Sign flipping: the opposite of the client's own update (Li et al. 2019)."""

from __future__ import annotations

from pydantic import Field

from medspark.federate.adversary.adversary import Adversary, Known
from medspark.federate.aggregate.rule import Vector

__all__ = ["SignFlip"]


class SignFlip(Adversary):
    """Send the update turned round."""

    strength: float = Field(1.0, gt=0, description="length of what is sent, in honest updates")

    def send(self, update: Vector, known: Known) -> Vector:  # noqa: ARG002
        """Return the opposite of the update."""
        return -self.strength * update
