"""The two ways a medspark command can end badly, and the exit status that goes with each."""

from __future__ import annotations


class MedsparkError(Exception):
    """Base of every error that medspark raises on purpose."""


class UsageError(MedsparkError):
    """Configuration or input that the user can mend.

    The message is one clear sentence that says what to change. Jobs print it without a
    traceback and exit with status 2.
    """


class RunError(MedsparkError):
    """A run that started and failed. Jobs print the message and exit with status 1."""
