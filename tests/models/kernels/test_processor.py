"""The processor decides the precision of training and which layers are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medspark.models.kernels import processor as processors
from medspark.models.kernels.processor import Thresholds, processor, thresholds
from medspark.train import learner
from medspark.train.learner import bf16_pays, pass_type

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("tiles", "flags", "found"),
    [
        (True, "flags : avx512f avx512_bf16 amx_bf16 amx_tile", "amx"),
        (False, "flags : avx512f avx512_bf16 avx512_vnni", "avx512_bf16"),
        (False, "flags : avx512f avx512bw amx_bf16", "plain"),  # no system that lets us use them
        (False, "flags : fpu avx2", "plain"),
        (False, None, "plain"),
    ],
)
def test_a_processor_is_known_by_its_products_of_bf16_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiles: bool, flags: str | None, found: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"model name : x\n{flags}\n")

    assert processor.__wrapped__(tmp_path / "cpuinfo") == found


@pytest.mark.parametrize(
    ("found", "pays"), [("amx", True), ("avx512_bf16", True), ("plain", False)]
)
def test_training_is_in_bf16_where_the_processor_multiplies_bf16_numbers(
    monkeypatch: pytest.MonkeyPatch, found: str, pays: bool
) -> None:
    monkeypatch.setattr(learner, "processor", lambda: found)

    assert bf16_pays(CPU) == pays


@pytest.mark.parametrize(
    ("precision", "found", "computed"),
    [
        ("auto", "plain", None),
        ("auto", "amx", torch.bfloat16),
        ("fp32", "amx", None),
        ("bf16", "plain", torch.bfloat16),
    ],
)
def test_a_precision_that_is_asked_for_does_not_depend_on_the_processor(
    monkeypatch: pytest.MonkeyPatch, precision: Any, found: str, computed: torch.dtype | None
) -> None:
    monkeypatch.setattr(learner, "processor", lambda: found)

    assert pass_type(precision, CPU) == computed


def test_each_class_has_thresholds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Thresholds(pointwise=1, window=2, padding=3, unfolding=4)
    monkeypatch.setitem(processors._THRESHOLDS, "avx512_bf16", other)
    monkeypatch.setattr(processors, "processor", lambda: "avx512_bf16")

    assert thresholds() == other
