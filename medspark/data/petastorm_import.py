"""Import Petastorm, or report what to install."""

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
            f"data.reader petastorm needs pyarrow below 15, but {pa.__version__} is installed: "
            "pip install 'medspark[petastorm]', or use data.reader native."
        )
    try:
        # Petastorm imports names that pyarrow 14 deprecates, with a warning for each.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import petastorm.reader
    except ImportError as error:
        raise UsageError(
            f"data.reader petastorm cannot be used here ({error}): "
            "pip install 'medspark[petastorm]', or use data.reader native."
        ) from None
    # Petastorm would log for each file that its own metadata, which medspark refuses, is missing.
    logging.getLogger("petastorm").setLevel(logging.ERROR)
    module: ModuleType = petastorm.reader
    return module
