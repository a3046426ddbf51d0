"""medspark: train medical-image classifiers that an attacker cannot fool, at the scale of Spark."""

__version__ = "0.1.0"
