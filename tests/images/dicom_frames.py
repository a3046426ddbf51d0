"""Decode DICOM files in tests: their frames, or the reason why they are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydicom
import pytest

from medspark.images.decode import decode
from medspark.images.frame import Frame
from medspark.images.reasons import Reason, Unreadable
from medspark.images.rendering import Rendering

SMALL = Rendering(size=16)
PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def frames_of(source: bytes | Path, **settings: Any) -> list[Frame]:
    rendering = settings.pop("rendering", SMALL)
    return list(decode(source, rendering=rendering, **settings))


def refused(source: bytes | Path, **settings: Any) -> Reason:
    with pytest.raises(Unreadable) as caught:
        frames_of(source, **settings)
    return caught.value.reason
