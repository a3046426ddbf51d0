"""Hide secrets: the user info of URLs, and values whose names sound like a secret.

Everything that leaves a process is redacted: MLflow, ``run.json``, result documents, logs and error
messages. The secrets themselves are used and never stored.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "RedactingFormatter", "is_secret", "redacted", "redacted_command", "safe_text"]

HIDDEN = "***"

_NAMES = r"secret|token|passw|passphrase|passcode|pwd|credential|key|\bsas\b"
_SECRET = re.compile(_NAMES, re.IGNORECASE)
# The path of a key file may be shown: the file itself is private.
_PLACE = re.compile(r"key_?file$", re.IGNORECASE)
# RFC 3986, section 3.2.1: user info ends at the last @ before the path. A password that was not
# percent-encoded may contain slashes. Digits after a colon are a port, not a password.
_USER_INFO = re.compile(r"(?<=://)(?:[^\s/?#]*@|[^\s/?#@:]*:(?!\d*[/?#])\S*@)")
# orderByKey is MLflow's, in the links to its pages.
_QUERY = re.compile(
    rf"([?&;](?!orderByKey=)[^\s=&;]*(?:{_NAMES}|sig)[^\s=&;]*=)[^\s&;#]+", re.IGNORECASE
)


def is_secret(name: str) -> bool:
    """Return whether a setting of this name, dotted or not, holds a secret."""
    return bool(_SECRET.search(name)) and not _PLACE.search(name)


def safe_text(text: str) -> str:
    """Return ``text`` without the user info, passwords and tokens of the URLs in it."""
    return _QUERY.sub(rf"\g<1>{HIDDEN}", _USER_INFO.sub(f"{HIDDEN}@", text))


def redacted(value: Any) -> Any:
    """Return a document (mappings, sequences, plain values) with its secrets hidden.

    All text below a secret name is hidden. Names and numbers stay: a class of images may have any
    name, and a count is no secret.
    """
    if isinstance(value, Mapping):
        return {
            key: _hidden(item) if is_secret(str(key)) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, str):
        return safe_text(value)
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


def redacted_command(words: Sequence[str]) -> str:
    """Return a command line as one would type it, without the secrets among its options."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.partition("=")
        after = shown[-1] if shown else ""
        if equals and _option_is_secret(name):
            word = f"{name}={HIDDEN}"
        elif after.startswith("-") and "=" not in after and _option_is_secret(after):
            word = HIDDEN
        shown.append(safe_text(word))
    return shlex.join(shown)


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without the secrets in URLs."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line or lines of ``record``."""
        return safe_text(super().format(record))


def _option_is_secret(name: str) -> bool:
    return is_secret(name) or name.lstrip("-") == "spark.settings"


def _hidden(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item) for item in value]
    return HIDDEN if isinstance(value, str) else value
