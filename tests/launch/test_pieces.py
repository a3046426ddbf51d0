"""Pieces are done once despite failures, and Spark workers are reused unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from medspark.errors import RunError
from medspark.launch.pieces import _do_piece, do_pieces


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


def work_in(folder: Path, pieces: int, *, bad: int | None = None, lost: bool = False) -> Any:
    """Return work of ``pieces`` files; one piece may fail, or all files may get lost."""

    class Work:  # inside a function, so that it is pickled whole: workers cannot import tests
        work = folder

        def __init__(self) -> None:
            self.pieces = pieces

        def missing(self) -> list[int]:
            return [n for n in range(pieces) if not (folder / str(n)).exists()]

        def done(self) -> int:
            return pieces - len(self.missing())

        def do(self, number: int) -> None:
            if number == bad:
                raise RunError("This piece cannot be done.")
            if not lost:
                (folder / str(number)).write_text("done")

    return Work()


def run(spark: Any, work: Any) -> None:
    do_pieces(spark, work, total=work.pieces, unit="piece", doing="done")


@pytest.mark.spark
def test_what_is_done_is_not_done_again_when_a_piece_failed(spark, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be done"):
        run(spark, work_in(tmp_path / "work", 4, bad=2))
    (tmp_path / "work" / "0").write_text("before")

    run(spark, work_in(tmp_path / "work", 4))

    texts = [(tmp_path / "work" / str(number)).read_text() for number in range(4)]
    assert texts == ["before", "done", "done", "done"]


@pytest.mark.spark
def test_pieces_that_no_worker_kept_where_the_driver_looks_are_an_error(spark, tmp_path) -> None:
    with pytest.raises(RunError, match="Pieces are missing"):
        run(spark, work_in(tmp_path / "work", 2, lost=True))
