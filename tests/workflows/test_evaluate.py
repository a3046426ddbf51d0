"""A Spark worker outlives the piece of an evaluation that it does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from medspark.workflows.evaluate import _do_piece


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Piece:
    def __init__(self, error: type[Exception] | None) -> None:
        self.error = error
        self.threads = 0

    def do(self, number: int) -> None:
        self.threads = torch.get_num_threads()
        if self.error:
            raise self.error


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_piece_has_its_tasks_threads_and_leaves_the_workers_own(error) -> None:
    piece = Piece(error)

    if error is None:
        _do_piece(piece, 0, 1)
    else:
        with pytest.raises(error):
            _do_piece(piece, 0, 1)

    assert piece.threads == 1
    assert torch.get_num_threads() == 2
