"""The two kinds of error of a medspark command, and the exit status of each."""

from __future__ import annotations


class MedsparkError(Exception):
    """Base of every error that medspark raises on purpose."""


class UsageError(MedsparkError):
    """An error in the configuration or the input, which the user can correct.

    The message is one clear sentence that says what to change. Jobs print it without a
    traceback and exit with status 2.
    """


class RunError(MedsparkError):
    """A run that started and failed. Jobs print the message and exit with status 1."""
