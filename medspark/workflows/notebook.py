"""Helpers with which the notebooks run unchanged on Databricks and elsewhere."""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from pyspark.sql import SparkSession

from medspark.launch.distributor import SPARK_SETTINGS
from medspark.spark.session import SparkConfig, spark_session

__all__ = ["contact_sheet", "open_session", "parameters", "show"]


def parameters(dbutils: Any, **defaults: str) -> dict[str, str]:
    """Return the notebook's parameters, read from widgets if ``dbutils`` is not None.

    Otherwise the environment variable MEDSPARK_NAME replaces the widget ``name``.
    """
    if dbutils is None:
        return {
            name: os.environ.get(f"MEDSPARK_{name.upper()}", default)
            for name, default in defaults.items()
        }
    for name, default in defaults.items():
        dbutils.widgets.text(name, default)
    return {name: str(dbutils.widgets.get(name)) for name in defaults}


def open_session() -> SparkSession:
    """Return the running session, as on Databricks, or else start a local one that stays open."""
    # A notebook's session lives as long as its kernel.
    return _KERNEL.enter_context(
        spark_session(SparkConfig(settings=SPARK_SETTINGS), name="medspark notebook")
    )


_KERNEL = ExitStack()
atexit.register(_KERNEL.close)


def show(figure: Figure, *, name: str, folder: str | Path) -> Path:
    """Save ``figure`` as PNG, display it if this is a notebook, and return the file's path."""
    path = Path(folder) / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    if "IPython" in sys.modules:
        from IPython import get_ipython  # type: ignore[import-not-found]
        from IPython.display import Image, display  # type: ignore[import-not-found]

        if get_ipython() is not None:
            display(Image(filename=str(path)))
    return path


def contact_sheet(
    images: Sequence[npt.NDArray[Any]], titles: Sequence[str], *, columns: int = 6
) -> Figure:
    """Draw ``images`` (H, W) or (H, W, C) with ``titles``, each scaled to its own grey range."""
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 1.95 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for place in axes:
        place.set_axis_off()
    for place, image, title in zip(axes, images, titles, strict=False):
        place.imshow(np.squeeze(image), cmap="gray")
        place.set_title(title, fontsize=8, parse_math=False)
    return figure
