"""The typed result document of a denoiser's training, and its part of reports."""

from __future__ import annotations

from pydantic import Field

from medspark.defend.detect.config import Action
from medspark.defend.detect.report import rate_text, table
from medspark.defend.detect.result import AdaptiveFigures, DetectorFigures, FalsePositives
from medspark.eps import eps_text
from medspark.evaluate.result import QUALITY
from medspark.evaluate.sanity import SIGN, Flag
from medspark.evaluate.tables import piped_table
from medspark.train.result import TrainResult

__all__ = ["DenoiseResult"]


class DenoiseResult(TrainResult):
    """The result document of jobs/denoise.py: a training's, with the detector and its guard."""

    detectors: tuple[DetectorFigures, ...]
    detector_flags: tuple[Flag, ...] = ()
    guard: str = Field(description="folder of the guard, inside the model's")
    action: Action
    false_positives: FalsePositives

    def more_lines(self) -> list[str]:
        """Return what the denoiser makes of images, and the detector under attacks."""
        found = self.false_positives
        triggered = [flag for flag in self.detector_flags if flag.triggered]
        return [
            *super().more_lines(),
            "",
            "Denoised images against the clean ones:",
            "",
            *piped_table(self._quality()),
            "",
            f"The detector flags {rate_text(found)} of the clean test images (asked: "
            f"{found.asked:.1%}). Beside the figures under attacks that do not know it are those "
            "under the worst of all attacks, on network and detector together:",
            "",
            *piped_table(table(self.detectors, triggered)),
            *(f"\n{SIGN} Do not trust the detector's figures: {f.sentence}." for f in triggered),
        ]

    def more_metrics(self) -> dict[str, float]:
        """Return the detector's figures by their MLflow names."""
        found: dict[str, float | None] = {"false_positive_rate": self.false_positives.rate}
        for each in self.detectors:
            found[f"detector/{each.attack}/auroc"] = each.auroc
            if isinstance(each.adaptive, AdaptiveFigures):
                found["detector/adaptive/auroc"] = each.adaptive.auroc
                undetected = each.adaptive.undetected_and_wrong
                found["detector/adaptive/undetected_and_wrong"] = undetected
        return {name: float(value) for name, value in found.items() if value is not None}

    def _quality(self) -> list[list[str]]:
        conditions = [("clean", 0.0, self.clean), *((a.name, a.eps, a) for a in self.attacks)]
        return [
            ["images", "eps", "PSNR (dB)", "SSIM"],
            *(
                [name, eps_text(eps), *(_text(getattr(of, quality)) for quality in QUALITY)]
                for name, eps, of in conditions
            ),
        ]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
