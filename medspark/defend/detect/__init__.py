"""Detectors of attacked images, the guards made from them, and attacks through a guard."""
