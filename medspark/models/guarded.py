"""A guarded classifier: a denoiser before a classifier, and an embedding that shows attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from torch import Tensor

from medspark.models.card import DenoiserShape
from medspark.models.classifier import Classifier
from medspark.models.denoiser import ContrastHead, Denoiser

__all__ = ["GuardedClassifier", "Passed", "guard_classifier"]


@dataclass(frozen=True, slots=True)
class Passed:
    """What one pass of a guarded classifier gives for images (B, C, H, W).

    ``features`` are the last feature map of the backbone, ``embedding`` (B, E) has unit length.
    """

    logits: Tensor
    denoised: Tensor
    features: Tensor
    embedding: Tensor


class GuardedClassifier(Classifier):
    """Logits (B, K) of images (B, C, H, W) in [0, 1], which are denoised first.

    It is a classifier whose first layer is the denoiser: gradients, attacks, exports and
    fine-tuning go through it. Its other tensors have the names of the classifier's own.
    """

    def __init__(self, classifier: Classifier, denoiser: Denoiser, contrast: ContrastHead) -> None:
        mean, std = (t.flatten().tolist() for t in classifier.normalise.buffers())
        super().__init__(
            classifier.backbone, architecture=classifier.architecture, mean=mean, std=std
        )
        self.widths = classifier.widths
        self.denoiser, self.contrast = denoiser, contrast
        self.classifier_frozen = False

    def inputs(self, images: Tensor) -> Tensor:
        """Return the denoised and normalised images, which the backbone takes."""
        return self.normalise(self.denoiser(images))  # type: ignore[no-any-return]

    def classify(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of images as they are, without the denoiser."""
        logits: Tensor = self.backbone(self.normalise(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return the last feature map of images as they are, without the denoiser."""
        backbone: Any = self.backbone
        found: Tensor = backbone.forward_features(self.normalise(images))
        return found

    # Not a keyword with a default: the exporter to ONNX would make an input of it.
    def forward(self, images: Tensor, *asked: Literal["whole"]) -> Any:
        """Return the logits (B, K), or with "whole" everything that the pass gives."""
        if "whole" not in asked:
            return super().forward(images)
        backbone: Any = self.backbone
        denoised = self.denoiser(images)
        features = self.features(denoised)
        logits = backbone.forward_head(features)
        return Passed(logits, denoised, features, self.contrast(images, denoised))

    def freeze_classifier(self) -> None:
        """Let only the denoiser and the embedding learn; the classifier stays in eval mode."""
        self.classifier_frozen = self.batch_norm_frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of every layer except frozen ones."""
        super().train(mode)
        if self.classifier_frozen:
            self.backbone.eval()
        return self


def guard_classifier(
    classifier: Classifier, shape: DenoiserShape, *, size: tuple[int, int]
) -> GuardedClassifier:
    """Return ``classifier`` behind a new denoiser, which changes nothing yet.

    ``size`` is that of the images, (height, width) in pixels.
    """
    channels = classifier.channels
    denoiser = Denoiser(shape, channels=channels, size=size)
    guarded = GuardedClassifier(classifier, denoiser, ContrastHead(shape, channels=channels))
    return guarded.train(classifier.training)
