"""Runs blocks of a kernel, all their warps side by side, and counts what they issue.

A warp's lanes that diverge are executed one after the other, as compute capability 7.0 and later
does: each part runs until it exits or waits (BSYNC, WARPSYNC, BAR), and then the next one. Warps
that are at the same instruction execute it together, in numpy; the one that is furthest behind goes
first. No count depends on this order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .instructions import Execute, compile_instruction, predicate, uint, unknown
from .listing import (
    INSTRUCTION_BYTES,
    PREDICATE_TRUE,
    REGISTER_ZERO,
    Function,
    Instruction,
    SassError,
)
from .memory import Array, Memory

WARP_LANES = 32
SCOREBOARDS = 6
_NOWHERE = 1 << 30  # the address of a warp that cannot run
_BARRIERS = 16

LOCAL_BYTES = 1024  # of a lane; the stack grows down from here

# What compute capability 9.0 and later adds to an address in shared memory for the block's rank in
# its cluster.
_RANK_SHIFT = 24
# The upper half of a generic address of shared memory: outside of any region.
_SHARED_WINDOW = 0xFFFF


@dataclass(frozen=True)
class Launch:
    """The grid of a kernel, and which of its blocks are run."""

    grid_blocks: int
    block_threads: int
    blocks: Sequence[int] = (0,)
    cluster_blocks: int = 1
    shared_bytes: int = 0  # static and dynamic


@dataclass
class Parked:
    """Lanes of a warp that are not executing: they run later, or wait."""

    address: int
    mask: Array


@dataclass
class _PendingLoad:
    """A load from global memory that was issued, and not waited for."""

    bytes_of_warp: Array
    width: int


@dataclass
class Decoded:
    instruction: Instruction
    execute: Execute | None  # None: control flow
    guard: Any
    waits: int
    scoreboard: int | None


class Program:
    """A function and its instructions, compiled at their first execution."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self._decoded: dict[int, Decoded] = {}

    def __getitem__(self, address: int) -> Decoded:
        decoded = self._decoded.get(address)
        if decoded is None:
            decoded = self._decoded[address] = self._decode(address)
        return decoded

    def _decode(self, address: int) -> Decoded:
        number = address // INSTRUCTION_BYTES
        if not 0 <= number < len(self.function.instructions):
            raise SassError(
                f"{self.function.name}: expected an instruction at {address:#x}, got none"
            )
        instruction = self.function.instructions[number]
        guard = instruction.guard
        is_unguarded = guard is None or (guard.number == PREDICATE_TRUE and not guard.is_inverted)
        control = instruction.control
        return Decoded(
            instruction,
            None if instruction.opcode in CONTROL else compile_instruction(instruction),
            None if is_unguarded or guard is None else predicate(guard),
            control.wait_scoreboards,
            control.write_scoreboard,
        )


def _load_words(data: Array, rows: Array, offsets: Array, width: int) -> list[Array]:
    """Words of 4 bytes, or of `width` bytes if that is less."""
    word_bytes = min(width, 4)
    words = data.view(f"u{word_bytes}")
    first = offsets // word_bytes
    return [words[rows, first + k].astype(np.uint32) for k in range(max(1, width // 4))]


def _store_words(data: Array, rows: Array, offsets: Array, width: int, values: list[Array]) -> None:
    word_bytes = min(width, 4)
    words = data.view(f"u{word_bytes}")
    first = offsets // word_bytes
    for k, value in enumerate(values):
        words[rows, first + k] = value.astype(words.dtype)


class Machine:
    """Blocks of one launch."""

    def __init__(
        self, program: Program, launch: Launch, memory: Memory, constants: dict[int, Array]
    ) -> None:
        self.program = program
        self.launch = launch
        self.memory = memory
        self.constants = constants
        self.warps_per_block = -(-launch.block_threads // WARP_LANES)
        self.warps = self.warps_per_block * len(launch.blocks)
        shape = (self.warps, WARP_LANES)
        self.registers = np.zeros((256, *shape), np.uint32)
        self.uniform_registers = np.zeros((256, self.warps, 1), np.uint32)
        self.predicates = np.zeros((8, *shape), bool)
        self.uniform_predicates = np.zeros((8, self.warps, 1), bool)
        self.predicates[PREDICATE_TRUE] = True
        self.uniform_predicates[PREDICATE_TRUE] = True
        self.shared = np.zeros(
            (len(launch.blocks), -(-launch.shared_bytes // 16) * 16 + 1024), np.uint8
        )

        self._local = np.zeros((self.warps * WARP_LANES, LOCAL_BYTES), np.uint8)  # by lane

        self.block_of_warp = np.repeat(np.arange(len(launch.blocks)), self.warps_per_block)
        thread = np.arange(self.warps_per_block * WARP_LANES).reshape(
            self.warps_per_block, WARP_LANES
        )
        self.thread = np.tile(thread, (len(launch.blocks), 1)).astype(np.uint32)
        self.live = self.thread < launch.block_threads
        self.cluster_of_block = np.array([b // launch.cluster_blocks for b in launch.blocks])

        self._address = np.zeros(self.warps, np.int64)
        self._mask = self.live.copy()
        self._parked: list[list[Parked]] = [[] for _ in range(self.warps)]
        self._barrier_mask = np.zeros((self.warps, _BARRIERS, WARP_LANES), bool)
        self._barrier_arrived = np.zeros((self.warps, _BARRIERS, WARP_LANES), bool)
        self._barrier_target = np.zeros((self.warps, _BARRIERS), np.int64)
        self._warp_sync: list[list[tuple[Parked, Array]]] = [[] for _ in range(self.warps)]
        self._block_sync: list[list[tuple[int, Parked]]] = [[] for _ in launch.blocks]
        self._cluster_arrivals = np.zeros(self.warps, np.int64)
        self._cluster_waits: list[tuple[int, Parked]] = []

        self.issued: Counter[int] = Counter()  # warp instructions, by address
        # By scoreboard.
        self._pending: list[list[_PendingLoad]] = [[] for _ in range(SCOREBOARDS)]
        self._pending_scoreboards = 0
        self.most_pending_bytes = np.zeros(self.warps, np.int64)
        self.most_pending_loads = np.zeros(self.warps, np.int64)  # of 16 bytes
        self._current: Decoded | None = None

    # What instructions read

    def special_register(self, name: str) -> Array:
        values: dict[str, Any] = {
            "SR_TID.X": self.thread,
            "SR_LANEID": np.broadcast_to(np.arange(WARP_LANES, dtype=np.uint32), self.thread.shape),
        }
        if name in values:
            return np.asarray(values[name])
        blocks = np.array(self.launch.blocks)[self.block_of_warp][:, None]
        by_warp: dict[str, Any] = {
            "SR_CTAID.X": blocks,
            "SR_CgaCtaId": blocks % self.launch.cluster_blocks,
            "SR_CgaSize": 0 * blocks,
            "SR_SWINHI": 0 * blocks + _SHARED_WINDOW,
            "SRZ": 0 * blocks,
        }
        for zero in ("SR_CTAID.Y", "SR_CTAID.Z", "SR_TID.Y", "SR_TID.Z"):
            by_warp[zero] = 0 * blocks
        if name not in by_warp:
            raise SassError(f"the interpreter does not know the special register {name}")
        return np.broadcast_to(by_warp[name].astype(np.uint32), self.thread.shape)

    def load_constant(self, bank: int, address: Array, width: int, word: int) -> Array:
        """`width` bytes at most 4, `word` words after the address."""
        if bank not in self.constants:
            raise SassError(f"expected a constant bank of {sorted(self.constants)}, got {bank}")
        data = self.constants[bank]
        first = address.astype(np.int64) + 4 * word
        if (first % width).any():
            raise SassError(f"expected constants at multiples of {width} bytes")
        words = data.view(f"u{width}")
        # Lanes that are not active may have any address.
        return words[np.minimum(first // width, words.size - 1)].astype(np.uint32)

    def _shared_places(self, addresses: Array, width: int, mask: Array) -> tuple[Array, Array]:
        """Block and byte of each active lane's address."""
        own = np.broadcast_to(self.block_of_warp[:, None], mask.shape)[mask]
        rank = (addresses >> np.uint32(_RANK_SHIFT)).astype(np.int64)
        block = own
        if self.launch.cluster_blocks > 1:
            blocks = np.array(self.launch.blocks)
            wanted = blocks[own] // self.launch.cluster_blocks * self.launch.cluster_blocks + rank
            order = np.argsort(blocks)
            place = np.minimum(np.searchsorted(blocks[order], wanted), len(blocks) - 1)
            block = order[place]
            if (blocks[block] != wanted).any():
                raise SassError("expected all blocks of a cluster to run together")
        offset = (addresses & np.uint32((1 << _RANK_SHIFT) - 1)).astype(np.int64)
        if (offset + width > self.shared.shape[1]).any():
            raise SassError(
                f"expected an address in {self.shared.shape[1]} bytes of shared memory, "
                f"got {offset.max()}"
            )
        if (offset % width).any():
            raise SassError(f"expected accesses at multiples of {width} bytes of shared memory")
        return block, offset

    def load_shared(self, addresses: Array, width: int, mask: Array) -> list[Array]:
        return _load_words(self.shared, *self._shared_places(addresses, width, mask), width)

    def store_shared(self, addresses: Array, width: int, values: list[Array], mask: Array) -> None:
        _store_words(self.shared, *self._shared_places(addresses, width, mask), width, values)

    def _local_places(self, addresses: Array, width: int, mask: Array) -> tuple[Array, Array]:
        offset = addresses.astype(np.int64)
        if (offset + width > LOCAL_BYTES).any() or (offset % width).any():
            raise SassError(
                f"expected addresses in {LOCAL_BYTES} bytes of local memory, at multiples of {width}"
            )
        return np.flatnonzero(mask), offset

    def load_local(self, addresses: Array, width: int, mask: Array) -> list[Array]:
        return _load_words(self._local, *self._local_places(addresses, width, mask), width)

    def store_local(self, addresses: Array, width: int, values: list[Array], mask: Array) -> None:
        _store_words(self._local, *self._local_places(addresses, width, mask), width, values)

    def is_shared(self, addresses: Array) -> bool:
        """Whether generic addresses are in shared memory."""
        is_shared = addresses >> np.uint64(32) == _SHARED_WINDOW
        if is_shared.any() and not is_shared.all():
            raise SassError("expected generic addresses in one kind of memory")
        return bool(is_shared.any())

    def count_load(self, addresses: Array, mask: Array, width: int, scoreboard: int | None) -> None:
        """Called when a load from global memory is issued. Lanes that load the same bytes count
        once.
        """
        if scoreboard is None:
            return
        ordered = np.sort(np.where(mask, addresses, np.uint64(0)), axis=1)
        distinct = (np.diff(ordered, axis=1, prepend=np.uint64(0)) != 0).sum(axis=1)
        self._pending[scoreboard].append(_PendingLoad(distinct * width, width))
        self._pending_scoreboards |= 1 << scoreboard
        pending = [load for loads in self._pending for load in loads]
        in_flight = np.sum([load.bytes_of_warp for load in pending], axis=0)
        np.maximum(self.most_pending_bytes, in_flight, out=self.most_pending_bytes)
        wide = [load.bytes_of_warp > 0 for load in pending if load.width == 16]
        if wide:
            np.maximum(self.most_pending_loads, np.sum(wide, axis=0), out=self.most_pending_loads)

    def wait(self, scoreboard: int, mask: Array, most: int = 0) -> None:
        """The warps of active lanes wait until at most so many loads of a scoreboard are pending."""
        remaining = np.where(mask.any(axis=1), most, _NOWHERE)
        for load in reversed(self._pending[scoreboard]):
            is_pending = load.bytes_of_warp > 0
            load.bytes_of_warp[is_pending & (remaining == 0)] = 0
            remaining -= is_pending & (remaining > 0)
        self._pending[scoreboard] = [l for l in self._pending[scoreboard] if l.bytes_of_warp.any()]
        if not self._pending[scoreboard]:
            self._pending_scoreboards &= ~(1 << scoreboard)

    # Execution

    def run(self, max_steps: int = 10_000_000) -> None:
        with np.errstate(all="ignore"):
            steps = 0
            while self._step():
                steps += 1
                if steps > max_steps:
                    raise SassError(
                        f"{self.program.function.name}: expected to end within {max_steps} branches"
                    )
        waiting = [w for w in range(self.warps) if self.live[w].any()]
        if waiting:
            raise SassError(
                f"{self.program.function.name}: "
                f"warps {waiting} wait for a barrier that nobody reaches"
            )

    def _step(self) -> bool:
        """Runs the warps that are furthest behind, up to the next branch or the next warp's
        address.
        """
        address = int(self._address.min())
        if address == _NOWHERE:
            return False
        chosen = self._address == address
        others = self._address[~chosen]
        stop = int(others.min()) if others.size else _NOWHERE
        mask = self._mask & chosen[:, None]
        warp_count = int(chosen.sum())
        program, issued = self.program, self.issued
        while True:
            decoded = program[address]
            issued[address] += warp_count
            if decoded.waits & self._pending_scoreboards:
                for scoreboard in range(SCOREBOARDS):
                    if decoded.waits >> scoreboard & 1:
                        self.wait(scoreboard, mask)
            active = mask if decoded.guard is None else mask & decoded.guard(self)
            if decoded.execute is None:
                self._control(decoded.instruction, address, chosen, mask, active)
                return True
            if decoded.guard is None or active.any():
                try:
                    decoded.execute(self, active)
                except (SassError, ValueError, IndexError) as error:
                    name = self.program.function.name
                    raise SassError(f"{name}: {decoded.instruction}: {error}") from error
            address += INSTRUCTION_BYTES
            if address >= stop:
                break
        self._address[chosen] = address
        return True

    # Control flow

    def _control(
        self, instruction: Instruction, address: int, chosen: Array, mask: Array, active: Array
    ) -> None:
        following = address + INSTRUCTION_BYTES
        self._address[chosen] = following
        CONTROL[instruction.opcode](self, instruction, following, mask, active)

    def _split(self, warp: int, active: Array, elsewhere: int) -> None:
        """Sends the active lanes of a warp to an address; the others go on."""
        rest = self._mask[warp] & ~active
        if not rest.any():
            self._address[warp] = elsewhere
        elif active.any():
            self._parked[warp].append(Parked(elsewhere, active.copy()))
            self._mask[warp] = rest

    def _remove(self, warp: int, active: Array) -> None:
        """Takes active lanes from what the warp executes."""
        self._mask[warp] &= ~active
        if not self._mask[warp].any():
            self._resume(warp)

    def _resume(self, warp: int) -> None:
        """Goes on with lanes that can run. Precondition: nothing of the warp is executing."""
        if self._parked[warp]:
            parked = self._parked[warp].pop()
            self._address[warp] = parked.address
            self._mask[warp] = parked.mask
        else:
            self._address[warp] = _NOWHERE

    def _make_runnable(self, warp: int, parked: Parked) -> None:
        self._parked[warp].append(parked)
        if self._address[warp] == _NOWHERE:
            self._resume(warp)

    def _release_barrier(self, warp: int, barrier: int) -> None:
        """If all lanes of a convergence barrier have arrived, lets them go on."""
        expected = self._barrier_mask[warp, barrier] & self.live[warp]
        arrived = self._barrier_arrived[warp, barrier] & self.live[warp]
        if arrived.any() and not (expected & ~arrived).any():
            self._barrier_arrived[warp, barrier] = False
            self._make_runnable(
                warp, Parked(int(self._barrier_target[warp, barrier]), arrived.copy())
            )

    def _warps_of(self, mask: Array) -> list[int]:
        return [int(w) for w in np.flatnonzero(mask.any(axis=1))]

    def _branch(self, instruction: Instruction, following: int, mask: Array, active: Array) -> None:
        *conditions, target = instruction.operands
        if (
            "DIV" in instruction.modifiers
        ):  # taken by a warp whose lanes are not all of the given mask
            (wanted,) = conditions
            bits = self.uniform_registers[wanted.number, :, 0] if wanted.kind == "UR" else None
            if bits is None:
                raise unknown(instruction)
            weights = np.uint64(1) << np.arange(WARP_LANES, dtype=np.uint64)
            have = (mask * weights).sum(axis=1).astype(np.uint32)
            active = active & (have != bits)[:, None]
        elif not set(instruction.modifiers) <= {"U"}:
            raise unknown(instruction)
        else:
            for condition in conditions:
                active = active & predicate(condition)(self)
        self._jump(active, target.number)

    def _jump(self, active: Array, target: int) -> None:
        """Sends the active lanes to an address."""
        taken = active.any(axis=1)
        diverged = taken & (self._mask & ~active).any(axis=1)
        self._address[taken & ~diverged] = target
        for warp in np.flatnonzero(diverged):
            self._split(int(warp), active[warp], target)

    def _indexed_branch(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        """BRX and RET: to the address in a register. BRX counts from the next instruction."""
        register, offset = instruction.operands[:2]
        base = following if instruction.opcode == "BRX" else 0
        targets = self.registers[register.number].astype(np.int64)
        if instruction.opcode == "BRX":
            targets = self.registers[register.number].view(np.int32).astype(np.int64)
        targets = targets + offset.number + base
        for warp in self._warps_of(active):
            for target in np.unique(targets[warp][active[warp]]):
                self._split(
                    warp, active[warp] & (targets[warp] == target) & self._mask[warp], int(target)
                )

    def _call(self, instruction: Instruction, following: int, mask: Array, active: Array) -> None:
        self._jump(active, instruction.operands[-1].number)

    def _exit(self, instruction: Instruction, following: int, mask: Array, active: Array) -> None:
        for warp in self._warps_of(active):
            self.live[warp] &= ~active[warp]
            self._remove(warp, active[warp])
            for barrier in range(_BARRIERS):
                if self._barrier_arrived[warp, barrier].any():
                    self._release_barrier(warp, barrier)
            self._release_warp_sync(warp)
            self._release_block(int(self.block_of_warp[warp]))
        self._release_clusters()

    def _set_barrier(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        name, target = instruction.operands
        barrier = int(name.text[1:])
        warps = active.any(axis=1)
        self._barrier_mask[warps, barrier] = active[warps]
        self._barrier_arrived[warps, barrier] = False
        self._barrier_target[warps, barrier] = target.number

    def _sync_barrier(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        barrier = int(instruction.operands[0].text[1:])
        targets = self._barrier_target[active.any(axis=1), barrier]
        if (targets != following).any():
            raise SassError(
                f"{instruction}: expected a barrier that was set for {following:#x}, "
                f"got one for {targets.max():#x}"
            )
        # Nothing to do for a warp all of whose lanes arrive together.
        expected = self._barrier_mask[:, barrier] & self.live
        is_apart = (expected != active).any(axis=1) | (self._mask != active).any(axis=1)
        for warp in self._warps_of(active & is_apart[:, None]):
            self._barrier_arrived[warp, barrier] |= active[warp]
            self._remove(warp, active[warp])
            self._release_barrier(warp, barrier)

    def _break_barrier(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        barrier = int(instruction.operands[-1].text[1:])
        for condition in instruction.operands[:-1]:
            active = active & predicate(condition)(self)
        for warp in self._warps_of(active):
            self._barrier_mask[warp, barrier] &= ~active[warp]
            self._release_barrier(warp, barrier)

    def _sync_warp(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        expected = self.live.copy()
        if instruction.modifiers != ("ALL",):
            if instruction.modifiers:
                raise unknown(instruction)
            bits = np.broadcast_to(uint(instruction.operands[0])(self), active.shape)
            chosen = np.where(active, bits, 0).max(axis=1)
            if ((bits != chosen[:, None]) & active).any():
                raise SassError(f"{instruction}: expected the same mask in all lanes")
            expected &= (chosen[:, None] >> np.arange(WARP_LANES, dtype=np.uint32) & 1).astype(bool)
        # Nothing to do for a warp whose lanes arrive together.
        is_apart = (expected & ~active).any(axis=1)
        for warp in self._warps_of(active & is_apart[:, None]):
            self._warp_sync[warp].append((Parked(following, active[warp].copy()), expected[warp]))
            self._remove(warp, active[warp])
            self._release_warp_sync(warp)

    def _release_warp_sync(self, warp: int) -> None:
        waiting = self._warp_sync[warp]
        for address in {parked.address for parked, _ in waiting}:
            here = [
                (parked.mask, expected) for parked, expected in waiting if parked.address == address
            ]
            arrived = np.logical_or.reduce([mask for mask, _ in here]) & self.live[warp]
            if not (here[0][1] & self.live[warp] & ~arrived).any():
                self._warp_sync[warp] = [w for w in waiting if w[0].address != address]
                self._make_runnable(warp, Parked(address, arrived))
                return

    def _sync_block(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        allowed = {"SYNC", "DEFER_BLOCKING"}
        if not set(instruction.modifiers) <= allowed or [
            o.number for o in instruction.operands
        ] != [0]:
            raise unknown(instruction)
        blocks = set()
        for warp in self._warps_of(active):
            block = int(self.block_of_warp[warp])
            blocks.add(block)
            self._block_sync[block].append((warp, Parked(following, active[warp].copy())))
            self._remove(warp, active[warp])
        for block in blocks:
            self._release_block(block)

    def _release_block(self, block: int) -> None:
        waiting = self._block_sync[block]
        if not waiting:
            return
        arrived = sum(int((parked.mask & self.live[warp]).sum()) for warp, parked in waiting)
        if arrived < int(self.live[self.block_of_warp == block].sum()):
            return
        self._block_sync[block] = []
        for warp, parked in waiting:
            self._make_runnable(warp, parked)

    def _arrive_at_cluster(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        self._cluster_arrivals += active.any(axis=1)
        self._release_clusters()

    def _wait_for_cluster(
        self, instruction: Instruction, following: int, mask: Array, active: Array
    ) -> None:
        for warp in self._warps_of(active):
            self._cluster_waits.append((warp, Parked(following, active[warp].copy())))
            self._remove(warp, active[warp])
        self._release_clusters()

    def _release_clusters(self) -> None:
        waiting = self._cluster_waits
        if not waiting:
            return
        self._cluster_waits = []
        clusters = self.cluster_of_block[self.block_of_warp]
        for warp, parked in waiting:
            together = (clusters == clusters[warp]) & self.live.any(axis=1)
            if (self._cluster_arrivals[together] >= self._cluster_arrivals[warp]).all():
                self._make_runnable(warp, parked)
            else:
                self._cluster_waits.append((warp, parked))


CONTROL = {
    "BRA": Machine._branch,
    "BRX": Machine._indexed_branch,
    "RET": Machine._indexed_branch,
    "CALL": Machine._call,
    "EXIT": Machine._exit,
    "BSSY": Machine._set_barrier,
    "BSYNC": Machine._sync_barrier,
    "BREAK": Machine._break_barrier,
    "WARPSYNC": Machine._sync_warp,
    "BAR": Machine._sync_block,
    "UCGABAR_ARV": Machine._arrive_at_cluster,
    "UCGABAR_WAIT": Machine._wait_for_cluster,
}
assert REGISTER_ZERO == 255
