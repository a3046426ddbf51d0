"""The pretended device lists what a host would wait for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pretended = pytest.importorskip("pretended", exc_type=ImportError)

READS: dict[str, Callable[[Tensor], object]] = {
    "float": lambda there: float(there[0]),
    "bool": lambda there: bool(there[0] > 0),
    "cpu": lambda there: there.cpu(),
    "tolist": lambda there: there.tolist(),
    "mask": lambda there: there[there > 1],
    "equal": lambda there: torch.equal(there, there),
    "from a number": lambda there: torch.tensor(1.0, device=there.device),
    "from the host": lambda there: torch.ones(3).to(there.device),
    "copy_": lambda there: there.copy_(torch.ones(3)),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda there: there.sum() * 2 + 1,
    "filled": lambda there: torch.full((), 3.0, device=there.device),
    "rows": lambda there: there[torch.arange(2, device=there.device)],
    "from the host": lambda there: torch.ones(3).to(there.device, non_blocking=True),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_from_the_device_or_copies_to_it_is_waited_for(
    read: Callable[[Tensor], object],
) -> None:
    with pretended.pretended_device() as device:
        there = torch.arange(3.0).to(device)
        with pretended.waits() as heard:
            read(there)

    assert len(heard) == 1


@pytest.mark.parametrize("free", FREE.values(), ids=FREE)
def test_what_stays_on_the_device_is_not_waited_for(free: Callable[[Tensor], object]) -> None:
    with pretended.pretended_device() as device:
        there = torch.arange(3.0).to(device)
        with pretended.waits() as heard:
            free(there)

    assert heard == []
