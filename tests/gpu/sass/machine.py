"""Runs blocks of a kernel, all their warps side by side, and counts what they issue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .control import CONTROL_OPCODES, NOWHERE, ControlFlow
from .in_flight import SCOREBOARDS, InFlight
from .instructions import compile_instruction
from .listing import INSTRUCTION_BYTES, PREDICATE_TRUE, Function, Instruction, SassError
from .mbarriers import Mbarriers
from .memory import Array, Memory, load_words, store_words
from .operands import Execute, Read, predicate

WARP_LANES = 32
LOCAL_BYTES = 1024  # of a lane; its stack grows down from here
# Blocks' shared memory begins here, on compute capability 9.0 and later.
_RESERVED_SHARED_BYTES = 1024
# From compute capability 9.0 on, the upper byte of an address of shared memory is the block's rank
# in its cluster.
_RANK_SHIFT = 24
# The upper half of a generic address of shared memory: no region of Memory has it.
_SHARED_WINDOW = 0xFFFF


@dataclass(frozen=True)
class Launch:
    """The grid of a kernel, and which of its blocks are run."""

    grid_blocks: int
    block_threads: int
    blocks: Sequence[int] = (0,)
    cluster_blocks: int = 1
    shared_bytes: int = 0  # static and dynamic


@dataclass(frozen=True)
class _Decoded:
    instruction: Instruction
    execute: Execute | None  # None: control flow
    guard: Read | None  # None: always executed
    waits: int


class Program:
    """A function, whose instructions are compiled at their first execution."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self._decoded: dict[int, _Decoded] = {}

    def __getitem__(self, address: int) -> _Decoded:
        decoded = self._decoded.get(address)
        if decoded is None:
            decoded = self._decoded[address] = self._decode(address)
        return decoded

    def _decode(self, address: int) -> _Decoded:
        number = address // INSTRUCTION_BYTES
        if not 0 <= number < len(self.function.instructions):
            raise SassError(f"expected an instruction at {address:#x}, got none")
        instruction = self.function.instructions[number]
        guard = instruction.guard
        if guard is not None and guard.number == PREDICATE_TRUE and not guard.is_inverted:
            guard = None
        is_control = instruction.opcode in CONTROL_OPCODES or "PHASECHK" in instruction.modifiers
        return _Decoded(
            instruction,
            None if is_control else compile_instruction(instruction),
            None if guard is None else predicate(guard),
            instruction.control.wait_scoreboards,
        )


class Machine:
    """Blocks of one launch. Arrays have an entry for each warp, or for each lane of each warp."""

    def __init__(
        self, program: Program, launch: Launch, memory: Memory, constants: dict[int, Array]
    ) -> None:
        self.program = program
        self.launch = launch
        self.memory = memory
        self._constants = constants
        warps_per_block = -(-launch.block_threads // WARP_LANES)
        self.warps = warps_per_block * len(launch.blocks)
        self.block_of_warp = np.repeat(np.arange(len(launch.blocks)), warps_per_block)
        thread = np.arange(warps_per_block * WARP_LANES, dtype=np.uint32)
        self.thread = np.tile(thread.reshape(warps_per_block, WARP_LANES), (len(launch.blocks), 1))

        shape = (self.warps, WARP_LANES)
        self.registers = np.zeros((256, *shape), np.uint32)
        self.uniform_registers = np.zeros((256, self.warps, 1), np.uint32)
        self.return_address = np.zeros((2, *shape), np.uint32)  # Rpc
        self.predicates = np.zeros((8, *shape), bool)
        self.uniform_predicates = np.zeros((8, self.warps, 1), bool)
        self.predicates[PREDICATE_TRUE] = True
        self.uniform_predicates[PREDICATE_TRUE] = True

        shared_bytes = _RESERVED_SHARED_BYTES + -(-launch.shared_bytes // 16) * 16
        self._shared = np.zeros((len(launch.blocks), shared_bytes), np.uint8)
        self._local = np.zeros((self.warps * WARP_LANES, LOCAL_BYTES), np.uint8)
        self.mbarriers = Mbarriers()

        self.in_flight = InFlight(self.warps)
        self.issued: Counter[int] = Counter()  # warp instructions, by address
        self.control = ControlFlow(self, self.thread < launch.block_threads)

    def run(self, max_steps: int = 10_000_000) -> None:
        with np.errstate(all="ignore"):
            for _ in range(max_steps):
                if not self._step():
                    break
            else:
                raise self._error(f"expected to end within {max_steps} branches")
        waiting = np.flatnonzero(self.control.live.any(axis=1))
        if waiting.size > 0:
            raise self._error(f"warps {waiting.tolist()} wait for a barrier that nobody reaches")

    def _error(self, message: str) -> SassError:
        return SassError(f"{self.program.function.name}: {message}")

    def _step(self) -> bool:
        """Runs the warps that are furthest behind, up to a branch or to another warp's address."""
        control, program = self.control, self.program
        address = int(control.address.min())
        if address == NOWHERE:
            return False
        chosen = control.address == address
        others = control.address[~chosen]
        stop = int(others.min()) if others.size > 0 else NOWHERE
        mask = control.mask & chosen[:, None]
        warps = int(chosen.sum())
        while address < stop:
            decoded = program[address]
            self.issued[address] += warps
            waits = decoded.waits & self.in_flight.busy
            for scoreboard in range(SCOREBOARDS if waits else 0):
                if waits >> scoreboard & 1:
                    self.in_flight.wait(scoreboard, chosen)
            active = mask if decoded.guard is None else mask & decoded.guard(self)
            try:
                if decoded.execute is None:
                    control.execute(decoded.instruction, chosen, mask, active)
                    return True
                if decoded.guard is None or active.any():
                    decoded.execute(self, active)
            except (SassError, ValueError, IndexError) as error:
                raise self._error(f"{decoded.instruction}: {error}") from error
            address += INSTRUCTION_BYTES
        control.address[chosen] = address
        return True

    # What instructions access

    def special_register(self, name: str) -> Array:
        """Of each lane."""
        ones = np.ones_like(self.thread)
        block = ones * np.array(self.launch.blocks, np.uint32)[self.block_of_warp][:, None]
        values = {
            "SR_TID.X": self.thread,
            "SR_LANEID": ones * np.arange(WARP_LANES, dtype=np.uint32),
            "SR_CTAID.X": block,
            "SR_CgaCtaId": block % np.uint32(self.launch.cluster_blocks),
            "SR_SWINHI": ones * np.uint32(_SHARED_WINDOW),
            # An index of the constants that describe the launch: see _LAUNCH_CONSTANTS in
            # performance_model.py.
            "SR_CgaSize": ones * np.uint32(0),
            "SRZ": ones * np.uint32(0),
        }
        if name not in values:
            raise SassError(f"the interpreter does not know the special register {name}")
        return values[name]

    def load_constant(self, bank: int, address: Array, width: int, word: int) -> Array:
        """`width` bytes, 4 at most, that are `word` words after the address."""
        if bank not in self._constants:
            raise SassError(f"expected a constant bank of {sorted(self._constants)}, got {bank}")
        first = address.astype(np.int64) + 4 * word
        if (first % width).any():
            raise SassError(f"expected constants at multiples of {width} bytes")
        words = self._constants[bank].view(f"u{width}")
        # Lanes that are not active may have any address.
        return words[np.minimum(first // width, words.size - 1)].astype(np.uint32)

    def is_shared(self, addresses: Array) -> bool:
        """Whether generic addresses are in shared memory."""
        is_shared = addresses >> np.uint64(32) == _SHARED_WINDOW
        if is_shared.any() and not is_shared.all():
            raise SassError("expected generic addresses in one kind of memory")
        return bool(is_shared.any())

    def load_shared(self, addresses: Array, width: int, mask: Array) -> list[Array]:
        """Words of 4 bytes or less. `addresses`: of active lanes only."""
        return load_words(self._shared, *self._shared_places(addresses, width, mask), width)

    def store_shared(self, addresses: Array, width: int, values: list[Array], mask: Array) -> None:
        store_words(self._shared, *self._shared_places(addresses, width, mask), width, values)

    def shared_bytes(self, block: int, address: int, size_bytes: int) -> Array:
        """A view, of the block's own memory."""
        first = address & (1 << _RANK_SHIFT) - 1
        if first + size_bytes > self._shared.shape[1]:
            raise SassError(
                f"expected {self._shared.shape[1]} bytes of shared memory, got {address:#x}"
            )
        return self._shared[block, first : first + size_bytes]

    def _shared_places(self, addresses: Array, width: int, mask: Array) -> tuple[Array, Array]:
        """The block, as numbered in Launch.blocks, and the offset of each active lane's address."""
        place = np.broadcast_to(self.block_of_warp[:, None], mask.shape)[mask]
        if self.launch.cluster_blocks > 1:
            blocks = np.array(self.launch.blocks)
            first = blocks[place] - blocks[place] % self.launch.cluster_blocks
            wanted = first + (addresses >> np.uint32(_RANK_SHIFT)).astype(np.int64)
            place = np.searchsorted(blocks, wanted)
            if (blocks[np.minimum(place, blocks.size - 1)] != wanted).any():
                raise SassError("expected all blocks of a cluster to run together")
        offsets = (addresses & np.uint32((1 << _RANK_SHIFT) - 1)).astype(np.int64)
        return place, _checked(offsets, width, self._shared.shape[1], "shared")

    def load_local(self, addresses: Array, width: int, mask: Array) -> list[Array]:
        return load_words(self._local, *self._local_places(addresses, width, mask), width)

    def store_local(self, addresses: Array, width: int, values: list[Array], mask: Array) -> None:
        store_words(self._local, *self._local_places(addresses, width, mask), width, values)

    def _local_places(self, addresses: Array, width: int, mask: Array) -> tuple[Array, Array]:
        offsets = _checked(addresses.astype(np.int64), width, LOCAL_BYTES, "local")
        return np.flatnonzero(mask), offsets


def _checked(offsets: Array, width: int, size_bytes: int, kind: str) -> Array:
    if (offsets + width > size_bytes).any():
        raise SassError(
            f"expected an access within {size_bytes} bytes of {kind} memory, got {offsets.max()}"
        )
    if (offsets % width).any():
        raise SassError(f"expected accesses of {kind} memory at multiples of {width} bytes")
    return offsets
