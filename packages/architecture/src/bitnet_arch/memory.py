"""The process's memory, where Python's own ways do not reach."""

import ctypes
import sys


def return_memory() -> None:
    """Give freed memory back to the system: glibc keeps the holes that large tensors leave, and the next may not fit.

    Does nothing where the C library has no `malloc_trim`.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
