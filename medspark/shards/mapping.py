"""Map files into memory without keeping them open.

Python's mmap keeps a descriptor for each mapping. A dataset has more files than most systems let a
process open (1,024), and a process may have many more mappings (65,530 on Linux).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["map_file"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | Path) -> npt.NDArray[np.uint8]:
    """Return the bytes of a file that is not empty, read when they are accessed.

    The array cannot be written, and the mapping lives as long as the array and its views. Raises
    OSError if the file cannot be mapped.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    held = (ctypes.c_ubyte * size).from_address(address)
    # Not when the interpreter ends: other objects may still read the mapping then.
    weakref.finalize(held, _libc.munmap, address, size).atexit = False
    mapped: npt.NDArray[np.uint8] = np.frombuffer(memoryview(held), np.uint8)
    mapped.flags.writeable = False
    return mapped
