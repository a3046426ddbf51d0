"""The tiny network and its images, as fixtures."""

from tiny_network import gradients, sample, tiny

__all__ = ["gradients", "sample", "tiny"]
