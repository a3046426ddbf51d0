"""The fixtures of tests of predictions."""

from prediction_runs import key_file, model, phantom, pictures, run, settings

__all__ = ["key_file", "model", "phantom", "pictures", "run", "settings"]
