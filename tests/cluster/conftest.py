"""The cluster that these tests run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from standalone import StandaloneCluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneCluster]:
    """A master and two workers of one core each, whose Python does not have medspark."""
    with StandaloneCluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running
