"""The mbarriers of blocks: barriers in shared memory that threads and bulk copies arrive at.

A phase completes when the expected number of threads have arrived and all bytes that they announced
have been copied."""

from __future__ import annotations

from dataclasses import dataclass

from .listing import SassError


@dataclass
class _Mbarrier:
    arrivals: int  # that a phase expects
    missing_arrivals: int
    missing_bytes: int = 0
    phase: int = 0

    def update(self) -> None:
        if self.missing_arrivals == 0 and self.missing_bytes == 0:
            self.phase += 1
            self.missing_arrivals = self.arrivals


class Mbarriers:
    """By block and address."""

    def __init__(self) -> None:
        self._by_place: dict[tuple[int, int], _Mbarrier] = {}

    def initialize(self, block: int, address: int, arrivals: int) -> None:
        self._by_place[block, address] = _Mbarrier(arrivals, arrivals)

    def _at(self, block: int, address: int) -> _Mbarrier:
        if (block, address) not in self._by_place:
            raise SassError(f"expected an mbarrier at {address:#x} of shared memory, got none")
        return self._by_place[block, address]

    def arrive(self, block: int, address: int, expected_bytes: int) -> None:
        barrier = self._at(block, address)
        if barrier.missing_arrivals == 0:
            raise SassError(f"expected at most {barrier.arrivals} arrivals at an mbarrier's phase")
        barrier.missing_bytes += expected_bytes
        barrier.missing_arrivals -= 1
        barrier.update()

    def complete_bytes(self, block: int, address: int, size_bytes: int) -> None:
        barrier = self._at(block, address)
        barrier.missing_bytes -= size_bytes
        barrier.update()

    def is_complete(self, block: int, address: int, parity: int) -> bool:
        """Whether the phase of this parity is over: the current one has the other parity."""
        return self._at(block, address).phase % 2 != parity
