"""Of the quantised graphs, the fastest of those that keep the answers is chosen."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from networks import SIDE, images, network

from medspark.export import choose as chooser
from medspark.export.choose import Attempt, Candidate, choose
from medspark.export.judge import Judge, in_batches
from medspark.export.onnx import export_onnx
from medspark.export.processor import dot_product
from medspark.export.quantise import Format, formats, prepared, quantised
from medspark.models.onnx_session import OnnxSession

BATCH = images(100).numpy()
LOGITS = np.stack([np.linspace(-1, 1, 100), np.zeros(100)], axis=1).astype(np.float32)
JUDGE = Judge(BATCH, LOGITS.argmax(1), LOGITS)


def _candidate(name: str, *, wrong: int, seconds: float = 0.0) -> Candidate:
    """Return a graph with so many answers that differ from the float graph's."""
    logits = LOGITS.copy()
    logits[:wrong] = logits[:wrong, ::-1]
    answers = {image.tobytes(): row for image, row in zip(BATCH, logits, strict=True)}

    def run(batch: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return np.stack([answers[image.tobytes()] for image in batch])

    return Candidate(name, {}, run, b"")


def test_the_fastest_that_keeps_the_answers_is_chosen() -> None:
    made = [
        _candidate("slow", wrong=0, seconds=0.004),
        _candidate("fast", wrong=0, seconds=0.002),
        _candidate("fastest, but wrong", wrong=20),
    ]

    choice = choose(lambda _: iter(made), [JUDGE], prepared=b"")

    assert choice.chosen.numbers == "fast"
    assert len(choice.tried) == 3


def test_every_judge_has_to_find_the_answers_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "layer_errors", lambda *_: {})
    other = Judge(BATCH, LOGITS.argmax(1), -LOGITS)

    choice = choose(lambda _: iter([_candidate("x", wrong=0)]), [JUDGE, other], prepared=b"")

    assert [verdict.keeps_answers for verdict in choice.chosen.verdicts] == [True, False]
    assert not choice.chosen.keeps_answers


def test_layers_with_the_largest_errors_stay_in_float_until_the_answers_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chooser, "layer_errors", lambda *_: {"bad": 3.0, "poor": 2.0, "fine": 0.1})

    def make(attempt: Attempt) -> Iterator[Candidate]:
        kept = {"bad", "poor"} <= set(attempt.keep_float)
        yield _candidate(str(attempt), wrong=0 if kept else 20)

    choice = choose(make, [JUDGE], prepared=b"")

    assert choice.chosen.numbers == "2 layers in float"
    assert [each.numbers for each in choice.tried][:2] == ["all layers", "1 layer in float"]
    assert choice.layers["bad"] == 3.0


def test_where_no_graph_keeps_the_answers_the_closest_is_chosen(monkeypatch) -> None:
    monkeypatch.setattr(chooser, "layer_errors", lambda *_: {"bad": 3.0})

    def make(attempt: Attempt) -> Iterator[Candidate]:
        yield _candidate(str(attempt), wrong=10 if attempt.keep_float else 20)

    chosen = choose(make, [JUDGE], prepared=b"").chosen

    assert not chosen.keeps_answers
    assert chosen.numbers == "1 layer in float"


@pytest.mark.parametrize(
    ("flags", "found", "narrow"),
    [
        ("flags : fpu avx2 avx512f", "", True),
        ("flags : fpu avx2 avx512_vnni", "avx512_vnni", False),
        ("flags : avx2 amx_int8 avx_vnni", "amx_int8", False),
        ("Features : fp asimd asimddp", "asimddp", False),
    ],
)
def test_weights_of_seven_bits_are_for_processors_that_saturate(
    tmp_path, monkeypatch, flags: str, found: str, narrow: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")

    instructions = dot_product(tmp_path / "cpuinfo")

    assert instructions == found
    tried = formats(dot_product=instructions)
    assert any(each.reduce_range for each in tried if each.weights == "S8") is narrow


def test_the_forms_of_a_format_have_the_same_numbers() -> None:
    ready = prepared(export_onnx(network(), height=SIDE, width=SIDE))
    form = Format("U8", "S8", "QOperator")
    graphs = [quantised(ready, BATCH[:16], each) for each in (form, form.as_qdq())]

    one, other = (in_batches(OnnxSession(graph, name="test"), BATCH) for graph in graphs)

    np.testing.assert_allclose(one, other, atol=0.01)  # a few steps of the last rounding
    assert all(len(graph) < len(ready) / 2 for graph in graphs)
