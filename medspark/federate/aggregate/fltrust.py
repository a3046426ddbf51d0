"""FLTrust: weigh each update by its cosine with the server's own update (Cao et al. 2021)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from medspark.federate.aggregate.rule import Measured, Needs, Rule, Weighing

__all__ = ["FLTrust"]


class FLTrust(Rule):
    """The mean of the updates, scaled to the length of the server's update and weighted by trust.

    Trust is the cosine with the reference ``root``, the update that the server makes from its own
    images; a negative cosine counts as 0. If no client is trusted, the weights do not change.
    """

    needs: ClassVar[Needs] = "products"
    references: ClassVar[tuple[str, ...]] = ("root",)

    def weigh(self, seen: Measured) -> Weighing:
        """Return trust times the length of the root update over that of the client's update."""
        trust = np.maximum(seen.cosines[:-1, -1], 0.0)
        length = np.sqrt(seen.products[-1, -1])
        scale = np.divide(length, seen.norms, out=np.zeros_like(trust), where=seen.norms > 0)
        return Weighing(trust * scale, float(trust.sum()) or 1.0, rejected=trust == 0)
