"""Pseudonyms whose key is never sent: driver and executors read it from their local files."""

from __future__ import annotations

import hmac
import socket
from collections.abc import Callable
from pathlib import Path

from medspark.errors import RunError, UsageError
from medspark.images.deidentify import Privacy, Pseudonyms, load_key

__all__ = ["ResidentPseudonyms", "pseudonyms_of"]


class ResidentPseudonyms(Pseudonyms):
    """Pseudonyms that are pickled without their key. Unpickling reads the key from ``file``.

    Unpickling raises RunError if the machine's file cannot be read or holds another key.
    """

    def __init__(self, key: bytes, *, file: Path) -> None:
        super().__init__(key)
        self._file = file

    def __reduce__(self) -> tuple[Callable[[Path, str], ResidentPseudonyms], tuple[Path, str]]:
        return _read_here, (self._file, self.check)


def pseudonyms_of(privacy: Privacy, key: bytes) -> Pseudonyms:
    """Return the pseudonyms of ``key``; executors read it themselves if ``privacy`` says where."""
    file = privacy.executor_key_file
    return Pseudonyms(key) if file is None else ResidentPseudonyms(key, file=file)


def _read_here(path: Path, check: str) -> ResidentPseudonyms:
    host = socket.gethostname()
    try:
        # The dataset is unknown here. A path below the key file is no dataset, so any check passes.
        key = load_key(Privacy(key_file=path), dataset=str(path / "none"))
    except UsageError as error:
        raise RunError(f"On the executor {host}: {error}") from None
    pseudonyms = ResidentPseudonyms(key, file=path)
    if not hmac.compare_digest(pseudonyms.check, check):
        raise RunError(f"On the executor {host}: {path} holds another key than the driver's.")
    return pseudonyms
