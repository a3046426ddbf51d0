"""Import Petastorm where it can be used, and say what it lacks where not."""

from __future__ import annotations

import logging
import warnings
from types import ModuleType

import pyarrow as pa

from medspark.errors import UsageError

__all__ = ["import_petastorm"]


def import_petastorm() -> ModuleType:
    """Return Petastorm's reader module. Raises UsageError that says what to install."""
    version = int(pa.__version__.split(".")[0])
    if version >= 15:
        raise UsageError(
            f"data.reader petastorm needs pyarrow below 15, and here is {pa.__version__}: "
            "pip install 'medspark[petastorm]', or use data.reader native."
        )
    try:
        # It imports what pyarrow 14 deprecates, and says so at length.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import petastorm.reader
    except ImportError as error:
        raise UsageError(
            f"data.reader petastorm cannot be used here ({error}): "
            "pip install 'medspark[petastorm]', or use data.reader native."
        ) from None
    # For each file it would report that Petastorm's own metadata, which we refuse, is not there.
    logging.getLogger("petastorm").setLevel(logging.ERROR)
    module: ModuleType = petastorm.reader
    return module
