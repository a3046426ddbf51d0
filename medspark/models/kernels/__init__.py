"""Faster CPU implementations of layers, with the same results up to rounding."""
