"""The cluster that these tests run on."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "standalone", Path(__file__).with_name("standalone.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
standalone = importlib.util.module_from_spec(_SPEC)
sys.modules["standalone"] = standalone
_SPEC.loader.exec_module(standalone)

if TYPE_CHECKING:
    from standalone import StandaloneCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneCluster]:
    """A master and two workers of one core each, whose Python does not have medspark."""
    with standalone.StandaloneCluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running
