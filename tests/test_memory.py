"""Freed memory is kept by a process that will want it again."""

from __future__ import annotations

import mmap
import subprocess
import sys

import pytest

PAGES = (64 << 20) // mmap.PAGESIZE

BLOCKS = f"""
import mmap
import resource
from medspark.memory import keep_freed_memory

def page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

KEPT = {{keep}}
for block in range(3):
    before = page_faults()
    bytearray({PAGES} * mmap.PAGESIZE)
print(KEPT, page_faults() - before)
"""


def _faults(keep: str) -> tuple[str, int]:
    """Return what ``keep`` said, and the page faults of the third of three equal blocks."""
    run = subprocess.run(
        [sys.executable, "-c", BLOCKS.format(keep=keep)], capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    return kept, int(faults)


def test_a_block_that_was_freed_serves_the_next_one_without_a_page_fault():
    kept, faults = _faults("keep_freed_memory()")
    if kept == "False":
        pytest.skip("this C library has no mallopt")

    assert faults < _faults("None")[1] / 10  # which may be few, where pages are huge
