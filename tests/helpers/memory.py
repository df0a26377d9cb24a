"""The memory of this process: its size, and tensors next to pages that cannot be read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def status_bytes(field: str) -> int:
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise LookupError(field)


@dataclass(frozen=True)
class GuardPages:
    """How a tensor lies in pages of memory, some of which are made unreadable.

    Its rows are laid so that the valid columns end where, or begin where, an unreadable page does.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int
    pages: int
    unreadable: Sequence[int]

    def around(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor within the fence."""
        memory = mmap.mmap(-1, self.pages * mmap.PAGESIZE)
        flat = torch.frombuffer(memory, dtype=tensor.dtype)
        view = flat.as_strided(self.shape, self.strides, self.first)
        view.copy_(tensor)
        protect(flat.data_ptr(), self.unreadable)
        return view


def protect(address: int, pages: Sequence[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for page in pages:
        start, size = (
            ctypes.c_void_p(address + page * mmap.PAGESIZE),
            ctypes.c_size_t(mmap.PAGESIZE),
        )
        if libc.mprotect(start, size, ctypes.c_int(0)) != 0:  # 0: PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect failed")
