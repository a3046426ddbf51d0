"""One answering task, called without Spark."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medspark.images.deidentify import Privacy, Pseudonyms
from medspark.images.frame import Pixels
from medspark.images.rendering import Rendering
from medspark.ingest.config import ArchiveLimits
from medspark.ingest.discover import SCHEMA, Walk
from medspark.ingest.listing import Annotate
from medspark.ingest.reading import ArchiveReader
from medspark.predict import answer_task
from medspark.predict.answer_task import AnswerFiles, _ahead

PSEUDONYMS = Pseudonyms(b"k" * 32)


class Mean:
    """Answers with the mean of an image, and remembers how many images it was given."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, images: Sequence[Pixels]) -> list[dict[str, Any]]:
        self.asked.append(len(images))
        return [
            {"label": "a", "probability": 1.0, "probabilities": [("a", float(image.mean()))]}
            for image in images
        ]


def task(source: Path, answers: Path, **values: Any) -> AnswerFiles:
    reader = ArchiveReader(
        source=str(source), run="r", rendering=Rendering(size=8), limits=ArchiveLimits(),
        privacy=Privacy(), pseudonyms=PSEUDONYMS, guarded=False,
    )  # fmt: skip
    (answers / "work").mkdir(parents=True, exist_ok=True)
    return AnswerFiles(
        reader, **({"model": Mean(), "answers": str(answers), "batch_size": 64} | values)
    )


def listed(source: Path) -> list[pa.RecordBatch]:
    rows = [
        dict(zip(SCHEMA.names, row, strict=True)) for row in Walk(str(source)).below(str(source))
    ]
    annotate = Annotate(str(source), PSEUDONYMS, Privacy(), by_folder=False)
    return list(annotate([pa.RecordBatch.from_pylist(rows, schema=SCHEMA)]))


def rows(answers: Path) -> list[dict[str, Any]]:
    return [row for path in (answers / "work").iterdir() for row in pq.read_table(path).to_pylist()]


def test_each_file_has_one_row_with_an_answer_or_a_reason(pictures, tmp_path):
    (pictures / "empty.png").touch()
    (pictures / "cut.png").write_bytes((pictures / "mary-0.png").read_bytes()[:100])

    (told,) = task(pictures, tmp_path / "out")(listed(pictures))

    found = rows(tmp_path / "out")
    assert told["files"].to_pylist() == [len(found)] == [7]
    assert len({row["file_key"] for row in found}) == 7
    answered = [row for row in found if row["reason"] is None]
    assert [(row["label"], row["frame"]) for row in answered] == [("a", 1)] * 4
    assert len({row["probabilities"][0][1] for row in answered}) == 4
    assert {row["reason"] for row in found} - {None} == {
        "not_an_image", "empty_file", "truncated",
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 64])
def test_a_network_is_given_a_batch_at_a_time_and_no_file_that_failed(pictures, tmp_path, size):
    model = Mean()

    list(task(pictures, tmp_path / "out", model=model, batch_size=size)(listed(pictures)))

    assert sum(model.asked) == 4
    assert max(model.asked) <= size


def test_nothing_in_a_row_tells_its_file(pictures, tmp_path):
    list(task(pictures, tmp_path / "out")(listed(pictures)))

    assert "mary" not in repr(rows(tmp_path / "out"))


def test_a_task_that_fails_leaves_no_row(pictures, tmp_path):
    def broken(images: Sequence[Pixels]) -> list[dict[str, Any]]:
        raise MemoryError

    with pytest.raises(MemoryError):
        list(task(pictures, tmp_path / "out", model=broken)(listed(pictures)))

    assert list((tmp_path / "out" / "work").iterdir()) == []


def test_a_batch_is_made_while_the_one_before_is_used():
    begun = threading.Event()

    def batches():
        yield 1
        begun.set()
        yield 2

    found = []
    for batch in _ahead(batches()):
        assert begun.wait(30)  # would never be set if the second batch waited for the first
        found.append(batch)

    assert found == [1, 2]


def test_an_error_of_a_batch_is_raised_where_the_batches_are_used():
    def batches():
        yield 1
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(_ahead(batches()))


@pytest.mark.parametrize("local", [True, False])
def test_batches_are_read_ahead_from_remote_archives_alone(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
):
    ahead: list[bool] = []
    monkeypatch.setattr(answer_task, "_ahead", lambda batches: ahead.append(True) or batches)
    monkeypatch.setattr(answer_task.storage, "is_local", lambda _: local)

    list(task(pictures, tmp_path / "out")(listed(pictures)))

    assert bool(ahead) is not local
    assert len(rows(tmp_path / "out")) > 0
