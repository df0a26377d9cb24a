"""Counts what warps have asked of global memory and not yet waited for.

A load names a scoreboard that is released when its result has been written, and the instruction
that reads the result waits for that scoreboard. cp.async copies are committed in groups, each of
which is like a load of scoreboard 0. A bulk copy is in flight until a warp has waited for the
mbarrier that it completes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .arithmetic import Array

SCOREBOARDS = 6
_COPY_SCOREBOARD = 0
_VECTOR_BYTES = 16


@dataclass
class _Pending:
    """Accesses that are waited for together, by warp."""

    exists: Array
    bytes: Array
    vectors: Array  # accesses of 16 bytes


class InFlight:
    def __init__(self, warps: int) -> None:
        self._warps = warps
        self._by_scoreboard: list[list[_Pending]] = [[] for _ in range(SCOREBOARDS)]
        self.busy = 0  # a bit for each scoreboard that some warp has something pending for
        self._uncommitted = self._nothing()
        self._bulk_bytes: dict[tuple[int, int], Array] = defaultdict(self._zeros)  # by mbarrier
        # The most at any time.
        self.bytes = self._zeros()
        self.vectors = self._zeros()

    def _zeros(self) -> Array:
        return np.zeros(self._warps, np.int64)

    def _nothing(self) -> _Pending:
        return _Pending(self._zeros().astype(bool), self._zeros(), self._zeros())

    def issue_load(self, addresses: Array, mask: Array, width: int, scoreboard: int | None) -> None:
        if scoreboard is None:
            return
        pending = self._nothing()
        _add(pending, addresses, mask, width)
        self._push(scoreboard, pending)
        self._update()

    def issue_copy(self, addresses: Array, mask: Array, width: int) -> None:
        _add(self._uncommitted, addresses, mask, width)
        self._update()

    def commit_copies(self, mask: Array) -> None:
        warps = mask.any(axis=1)
        group = _Pending(warps, self._uncommitted.bytes * warps, self._uncommitted.vectors * warps)
        self._uncommitted.bytes[warps] = 0
        self._uncommitted.vectors[warps] = 0
        self._push(_COPY_SCOREBOARD, group)

    def issue_bulk_copy(self, warp: int, mbarrier: tuple[int, int], size_bytes: int) -> None:
        self._bulk_bytes[mbarrier][warp] += size_bytes
        self._update()

    def wait_for_mbarrier(self, mbarrier: tuple[int, int]) -> None:
        self._bulk_bytes.pop(mbarrier, None)

    def wait(self, scoreboard: int, warps: Array, most: int = 0) -> None:
        """Warps wait until at most so many of a scoreboard are pending: the latest."""
        remaining = np.full(self._warps, most)
        for pending in reversed(self._by_scoreboard[scoreboard]):
            is_complete = warps & pending.exists & (remaining == 0)
            remaining -= pending.exists & (remaining > 0)
            pending.exists &= ~is_complete
            pending.bytes[is_complete] = 0
            pending.vectors[is_complete] = 0
        kept = [p for p in self._by_scoreboard[scoreboard] if p.exists.any()]
        self._by_scoreboard[scoreboard] = kept
        if not kept:
            self.busy &= ~(1 << scoreboard)

    def _push(self, scoreboard: int, pending: _Pending) -> None:
        self._by_scoreboard[scoreboard].append(pending)
        self.busy |= 1 << scoreboard

    def _update(self) -> None:
        pending = [self._uncommitted, *(p for queue in self._by_scoreboard for p in queue)]
        in_flight = sum((p.bytes for p in pending), self._zeros())
        in_flight = sum(self._bulk_bytes.values(), in_flight)
        np.maximum(self.bytes, in_flight, out=self.bytes)
        np.maximum(self.vectors, sum(p.vectors for p in pending), out=self.vectors)


def _add(pending: _Pending, addresses: Array, mask: Array, width: int) -> None:
    """Lanes that access the same bytes count once."""
    ordered = np.sort(np.where(mask, addresses, np.uint64(0)), axis=1)
    distinct = (np.diff(ordered, axis=1, prepend=np.uint64(0)) != 0).sum(axis=1)
    pending.exists |= distinct > 0
    pending.bytes += distinct * width
    if width == _VECTOR_BYTES:
        pending.vectors += distinct > 0
