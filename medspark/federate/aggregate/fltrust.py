"""FLTrust: trust an update as far as it points where the server's own does (Cao et al. 2021)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from medspark.federate.aggregate.rule import Measured, Needs, Rule, Weighing

__all__ = ["FLTrust"]


class FLTrust(Rule):
    """The mean of the updates, brought to the length of the server's own and weighted by trust.

    Trust is the cosine with the reference ``root``, the update that the server makes from images of
    its own, or 0 where it is negative. If nobody is trusted the weights stay.
    """

    needs: ClassVar[Needs] = "products"
    references: ClassVar[tuple[str, ...]] = ("root",)

    def weigh(self, seen: Measured) -> Weighing:
        """Count trust, times the length of the root update over the client's own."""
        trust = np.maximum(seen.cosines[:-1, -1], 0.0)
        length = np.sqrt(seen.products[-1, -1])
        scale = np.divide(length, seen.norms, out=np.zeros_like(trust), where=seen.norms > 0)
        return Weighing(trust * scale, float(trust.sum()) or 1.0, rejected=trust == 0)
