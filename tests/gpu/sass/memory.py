"""The memory that interpreted kernels access."""

from __future__ import annotations

from typing import Any

import numpy as np

from .listing import SassError

Array = np.ndarray[Any, Any]

# Regions begin at multiples of this, so that an address tells its region.
REGION_BITS = 40
_VECTOR_BYTES = 16


class Region:
    """A range of global memory. Its address is Memory's choice."""

    def __init__(self, name: str, data: Array, size_bytes: int | None = None) -> None:
        """`data` repeats up to `size_bytes`, if it is shorter."""
        self.name = name
        self.data = data.reshape(-1).view(np.uint8)
        self.size_bytes = self.data.size if size_bytes is None else size_bytes
        self.is_periodic = self.size_bytes != self.data.size
        self.address = 0
        # Offsets and widths of all stores, and of all loads.
        self.stores: list[tuple[Array, int]] = []
        self.loads: list[tuple[Array, int]] = []
        if self.is_periodic and self.data.size % 16 != 0:
            raise ValueError(
                f"expected a period of whole 16-byte accesses, got {self.data.size} bytes"
            )

    def offsets(self, addresses: Array, width: int) -> Array:
        offsets = addresses - np.uint64(self.address)
        if (offsets > np.uint64(self.size_bytes - width)).any():
            bad = int(offsets[offsets > np.uint64(self.size_bytes - width)][0])
            raise SassError(
                f"{self.name}: expected an access within {self.size_bytes} bytes, "
                f"got offset {bad}, {width} bytes"
            )
        if (offsets % np.uint64(width)).any():
            raise SassError(f"{self.name}: expected accesses at multiples of {width} bytes")
        return offsets.astype(np.int64)

    def within_data(self, offsets: Array) -> Array:
        return offsets % self.data.size if self.is_periodic else offsets


def load_words(data: Array, rows: Array, offsets: Array, width: int) -> list[Array]:
    """Words of 4 bytes, or of `width` bytes if that is less."""
    word_bytes = min(width, 4)
    words = data.view(f"u{word_bytes}")
    first = offsets // word_bytes
    return [words[rows, first + k].astype(np.uint32) for k in range(max(1, width // 4))]


def store_words(data: Array, rows: Array, offsets: Array, width: int, values: list[Array]) -> None:
    word_bytes = min(width, 4)
    words = data.view(f"u{word_bytes}")
    first = offsets // word_bytes
    for k, value in enumerate(values):
        words[rows, first + k] = value.astype(words.dtype)


class Memory:
    def __init__(self) -> None:
        self.regions: list[Region] = []

    def add(self, region: Region, misalignment_bytes: int = 0) -> int:
        """Returns the region's address."""
        self.regions.append(region)
        region.address = (len(self.regions) << REGION_BITS) + misalignment_bytes
        return region.address

    def load(self, addresses: Array, width: int) -> list[Array]:
        """Words of 4 bytes, or of `width` bytes if that is less."""
        result = [np.zeros(addresses.shape, np.uint32) for _ in range(max(1, width // 4))]
        for region, chosen in self._by_region(addresses):
            offsets = region.offsets(addresses[chosen], width)
            region.loads.append((offsets, width))
            offsets = region.within_data(offsets)
            word_bytes = min(width, 4)
            words = region.data.view(f"u{word_bytes}")
            first = offsets // word_bytes
            for number, word in enumerate(result):
                word[chosen] = words[first + number]
        return result

    def store(self, addresses: Array, width: int, values: list[Array]) -> None:
        for region, chosen in self._by_region(addresses):
            offsets = region.offsets(addresses[chosen], width)
            region.stores.append((offsets, width))
            if region.is_periodic:
                raise SassError(f"{region.name}: expected no stores to an input")
            word_bytes = min(width, 4)
            words = region.data.view(f"u{word_bytes}")
            first = offsets // word_bytes
            for number, value in enumerate(values):
                words[first + number] = value[chosen].astype(words.dtype)

    def _by_region(self, addresses: Array) -> list[tuple[Region, Any]]:
        if addresses.size == 0:
            return []
        numbers = (addresses >> np.uint64(REGION_BITS)).astype(np.int64)
        first = int(numbers[0])
        groups = [first] if (numbers == first).all() else list(np.unique(numbers))
        result: list[tuple[Region, Any]] = []
        for number in groups:
            if not 1 <= number <= len(self.regions):
                bad = int(addresses[numbers == number][0])
                raise SassError(f"expected the address of a region, got {bad:#x}")
            chosen = slice(None) if len(groups) == 1 else numbers == number
            result.append((self.regions[number - 1], chosen))
        return result

    def load_bytes(self, address: int, size_bytes: int) -> Array:
        words = self.load(_vectors(address, size_bytes), _VECTOR_BYTES)
        return np.stack(words, axis=1).reshape(-1).view(np.uint8)

    def store_bytes(self, address: int, data: Array) -> None:
        words = data.view(np.uint32).reshape(-1, _VECTOR_BYTES // 4)
        self.store(_vectors(address, data.size), _VECTOR_BYTES, list(words.T))


def _vectors(address: int, size_bytes: int) -> Array:
    return np.arange(address, address + size_bytes, _VECTOR_BYTES, dtype=np.uint64)
