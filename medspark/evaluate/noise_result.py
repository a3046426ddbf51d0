"""The result of judging a network with noisy weights, and its lines in reports."""

from __future__ import annotations

from pydantic import Field

from medspark.eps import eps_text
from medspark.job import Result

__all__ = ["NoiseResult", "noise_lines"]


class NoiseResult(Result):
    """Accuracies with and without noise, means over images; with noise, over draws as well."""

    images: int
    draws: int
    steps: int
    eps: float = Field(description="budget of all attacks, a fraction of [0, 1]")
    clean: float = Field(description="with noise, clean")
    clean_deviation: float = Field(description="standard deviation over draws of `clean`")
    pgd: float = Field(description="with noise, under PGD on one draw per step")
    eot: float = Field(description="with noise, under PGD on the mean of the draws per step")
    transfer: float = Field(description="with noise, images that PGD finds without noise")
    worst: float = Field(description="with noise, each image under the worst of these three")
    silent_clean: float = Field(description="without noise, clean")
    silent_pgd: float = Field(description="without noise, under PGD")
    silent_transfer: float = Field(description="without noise, images of EOT with noise")
    silent_worst: float = Field(description="without noise, the worst of these two")

    @property
    def gain(self) -> float:
        """The accuracy under plain PGD that the noise seems to add."""
        return self.pgd - self.silent_pgd

    @property
    def masked(self) -> float | None:
        """The share of the gain that attacks which know of the noise take back; None: no gain."""
        if self.gain <= 0:
            return None
        return min(1.0, max(0.0, (self.pgd - self.worst) / self.gain))

    @property
    def sentence(self) -> str:
        """All figures in words, for a report that is no table of them."""

        def percent(value: float) -> str:
            return f"{100 * value:.1f} %"

        return (
            f"the figures above are without the noise in the weights. On {self.images} images at "
            f"{eps_text(self.eps)}, with noise: clean {percent(self.clean)}, PGD "
            f"{percent(self.pgd)}, EOT-PGD {percent(self.eot)}, PGD without noise "
            f"{percent(self.transfer)}, worst {percent(self.worst)}; without noise: clean "
            f"{percent(self.silent_clean)}, PGD {percent(self.silent_pgd)}, EOT-PGD with noise "
            f"{percent(self.silent_transfer)}, worst {percent(self.silent_worst)}. {_gain(self)}"
        )


def _gain(result: NoiseResult) -> str:
    if result.masked is None:
        return "The noise adds no accuracy under PGD."
    return (
        f"The noise seems to add {100 * result.gain:.1f} points under PGD; "
        f"{100 * result.masked:.0f} % of that is masking of gradients."
    )


def noise_lines(result: NoiseResult) -> list[str]:
    """Return the figures as lines of Markdown: a table, and what share of the gain is masking."""

    def row(name: str, *values: float | None) -> str:
        cells = ["–" if value is None else f"{100 * value:.1f}" for value in values]
        return f"| {name} | {' | '.join(cells)} |"

    lines = [
        f"Accuracy (%) on {result.images} test images with and without the noise in the weights, "
        f"attacks at {eps_text(result.eps)}, {result.steps} steps, {result.draws} draws:",
        "",
        "| weights | clean | PGD | EOT-PGD | PGD from the other | worst case |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        row("with noise", result.clean, result.pgd, result.eot, result.transfer, result.worst),
        row(
            "without noise",
            result.silent_clean,
            result.silent_pgd,
            None,
            result.silent_transfer,
            result.silent_worst,
        ),
        "",
    ]
    lines.append(_gain(result))
    return lines
