"""The size of this process's memory, and tensors next to unreadable pages."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS (resident memory)."""
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(field)


@dataclass(frozen=True)
class GuardPages:
    """The layout of a tensor in mapped pages, some of them unreadable.

    The strides place each row's valid columns directly before or behind an unreadable page.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    pages: int
    unreadable: Sequence[int]

    def around(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor, in pages of its own."""
        memory = mmap.mmap(-1, self.pages * mmap.PAGESIZE)
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
        view = flat.as_strided(self.shape, self.strides, self.offset)
        view.copy_(tensor)
        protect(flat.data_ptr(), self.unreadable)
        return view


def protect(address: int, pages: Sequence[int]) -> None:
    """Makes these pages, counted from the address, unreadable."""
    libc = ctypes.CDLL(None, use_errno=True)
    for page in pages:
        start = ctypes.c_void_p(address + page * mmap.PAGESIZE)
        size = ctypes.c_size_t(mmap.PAGESIZE)
        if libc.mprotect(start, size, ctypes.c_int(0)) != 0:  # 0: PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect failed")
