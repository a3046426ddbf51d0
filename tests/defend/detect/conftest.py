"""The small world, made once for all tests of guards."""

from __future__ import annotations

import copy

import pytest
from small_world import World


@pytest.fixture(scope="session")
def world(plain_network, digits) -> World:
    return World(copy.deepcopy(plain_network), digits)
