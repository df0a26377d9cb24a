"""Control flow: branches, and barriers of a warp, a block and a cluster.

Lanes of a warp that diverge are executed one part after the other, as compute capability 7.0 and
later does: each part runs until it exits or waits, and then the next one. So a warp issues the
instructions of all paths that its lanes take, in an order that makes no difference to their number.
They converge where the compiler says so: a convergence barrier (B0 to B15) is set by BSSY to the
active lanes, and BSYNC waits until all of them have arrived, have been taken out by BREAK, or have
exited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import Array
from .listing import INSTRUCTION_BYTES, Instruction, SassError
from .operands import near_address, predicate, uint, unknown, writer

if TYPE_CHECKING:
    from .machine import Machine

NOWHERE = 1 << 30  # the address of a warp that cannot run
_BARRIERS = 16


@dataclass
class _Part:
    """Lanes of a warp that run later, or wait."""

    address: int
    mask: Array


class ControlFlow:
    def __init__(self, machine: Machine, live: Array) -> None:
        self._machine = machine
        self._launch = machine.launch
        self.live = live  # lanes that have not exited
        # The part of each warp that is executed.
        self.address = np.zeros(machine.warps, np.int64)
        self.mask = live.copy()
        self._ready: list[list[_Part]] = [[] for _ in range(machine.warps)]
        # By warp and convergence barrier.
        shape = (machine.warps, _BARRIERS)
        self._barrier_mask = np.zeros((*shape, live.shape[1]), bool)
        self._barrier_arrived = np.zeros((*shape, live.shape[1]), bool)
        self._barrier_target = np.zeros(shape, np.int64)
        # WARPSYNC, with the lanes that must arrive; BAR; the cluster's barrier; mbarriers.
        self._warp_waits: list[list[tuple[_Part, Array]]] = [[] for _ in range(machine.warps)]
        self._block_waits: list[list[tuple[int, _Part]]] = [[] for _ in self._launch.blocks]
        self._cluster_arrivals = np.zeros(machine.warps, np.int64)
        self._cluster_waits: list[tuple[int, _Part]] = []
        self._mbarrier_waits: list[tuple[int, _Part, tuple[int, int, int]]] = []

    def execute(self, i: Instruction, chosen: Array, mask: Array, active: Array) -> None:
        """`chosen` warps have issued the instruction; `mask` are their lanes, and `active` those
        that its guard is true for.
        """
        self.address[chosen] = i.address + INSTRUCTION_BYTES
        if i.opcode == "SYNCS":
            self._wait_for_mbarrier(i, active)
        else:
            _EXECUTIONS[i.opcode](self, i, mask, active)

    # Parts of warps

    def _split(self, warp: int, active: Array, elsewhere: int) -> None:
        """Sends active lanes to an address; the others go on."""
        rest = self.mask[warp] & ~active
        if not rest.any():
            self.address[warp] = elsewhere
        elif active.any():
            self._ready[warp].append(_Part(elsewhere, active.copy()))
            self.mask[warp] = rest

    def _suspend(self, warp: int, active: Array) -> _Part:
        """Takes active lanes from what the warp executes."""
        part = _Part(int(self.address[warp]), active.copy())
        self.mask[warp] &= ~active
        if not self.mask[warp].any():
            self.address[warp] = NOWHERE
            self._continue(warp)
        return part

    def _resume(self, warp: int, part: _Part) -> None:
        self._ready[warp].append(part)
        self._continue(warp)

    def _continue(self, warp: int) -> None:
        if self.address[warp] == NOWHERE and self._ready[warp]:
            part = self._ready[warp].pop()
            self.address[warp], self.mask[warp] = part.address, part.mask

    def _jump(self, active: Array, target: int) -> None:
        taken = active.any(axis=1)
        diverges = taken & (self.mask & ~active).any(axis=1)
        self.address[taken & ~diverges] = target
        for warp in np.flatnonzero(diverges):
            self._split(warp, active[warp], target)

    # Branches

    def _branch(self, i: Instruction, mask: Array, active: Array) -> None:
        *conditions, target = i.operands
        if i.modifiers == ("DIV",) and conditions[0].kind == "UR":
            # Taken by warps whose active lanes are not all of the mask.
            expected = self._lanes_of(uint(conditions[0])(self._machine), mask)
            active = active & (expected != mask).any(axis=1)[:, None]
        elif i.modifiers == ("U", "ANY"):  # taken by a warp if any of its lanes takes it
            active = mask & active.any(axis=1)[:, None]
        elif i.modifiers in ((), ("U",)):
            for condition in conditions:
                active = active & predicate(condition)(self._machine)
        else:
            raise unknown(i)
        self._jump(active, target.number)

    @staticmethod
    def _lanes_of(bits: Array, mask: Array) -> Array:
        lanes = np.arange(mask.shape[1], dtype=np.uint32)
        return np.broadcast_to(bits, mask.shape) >> lanes & np.uint32(1) == 1

    def _branch_to_register(self, i: Instruction, mask: Array, active: Array) -> None:
        """RET; and BRX, which counts from the next instruction."""
        register, offset = i.operands[:2]
        values = self._machine.registers[register.number].view(np.int32).astype(np.int64)
        base = i.address + INSTRUCTION_BYTES if i.opcode == "BRX" else 0
        targets = values + offset.number + base
        for warp in np.flatnonzero(active.any(axis=1)):
            for target in np.unique(targets[warp][active[warp]]):
                self._split(warp, active[warp] & (targets[warp] == target), int(target))

    def _call(self, i: Instruction, mask: Array, active: Array) -> None:
        """The program keeps the address to return to."""
        self._jump(active, i.operands[-1].number)

    def _exit(self, i: Instruction, mask: Array, active: Array) -> None:
        self.live &= ~active
        for warp in np.flatnonzero(active.any(axis=1)):
            self._suspend(warp, active[warp])
            for barrier in np.flatnonzero(self._barrier_arrived[warp].any(axis=1)):
                self._release_convergence(warp, barrier)
            self._release_warp(warp)
            self._release_block(self._machine.block_of_warp[warp])
        self._release_clusters()

    # Convergence barriers

    def _set_convergence(self, i: Instruction, mask: Array, active: Array) -> None:
        name, target = i.operands
        barrier = int(name.text[1:])
        warps = active.any(axis=1)
        self._barrier_mask[warps, barrier] = active[warps]
        self._barrier_arrived[warps, barrier] = False
        self._barrier_target[warps, barrier] = target.number

    def _converge(self, i: Instruction, mask: Array, active: Array) -> None:
        barrier = int(i.operands[0].text[1:])
        warps = active.any(axis=1)
        following = i.address + INSTRUCTION_BYTES
        if (self._barrier_target[warps, barrier] != following).any():
            raise SassError(f"expected a barrier that was set for {following:#x}")
        # Nothing to do for a warp all of whose lanes arrive together.
        expected = self._barrier_mask[:, barrier] & self.live
        is_apart = (expected != active).any(axis=1) | (self.mask != active).any(axis=1)
        for warp in np.flatnonzero(warps & is_apart):
            self._barrier_arrived[warp, barrier] |= active[warp]
            self._suspend(warp, active[warp])
            self._release_convergence(warp, barrier)

    def _release_convergence(self, warp: int, barrier: int) -> None:
        expected = self._barrier_mask[warp, barrier] & self.live[warp]
        arrived = self._barrier_arrived[warp, barrier] & self.live[warp]
        if arrived.any() and not (expected & ~arrived).any():
            self._barrier_arrived[warp, barrier] = False
            self._resume(warp, _Part(int(self._barrier_target[warp, barrier]), arrived))

    def _break(self, i: Instruction, mask: Array, active: Array) -> None:
        *conditions, name = i.operands
        barrier = int(name.text[1:])
        for condition in conditions:
            active = active & predicate(condition)(self._machine)
        for warp in np.flatnonzero(active.any(axis=1)):
            self._barrier_mask[warp, barrier] &= ~active[warp]
            self._release_convergence(warp, barrier)

    # WARPSYNC

    def _sync_warp(self, i: Instruction, mask: Array, active: Array) -> None:
        expected = self.live
        if i.modifiers != ("ALL",):
            if i.modifiers:
                raise unknown(i)
            # The mask is in a register of each lane, and the same in all.
            bits = np.broadcast_to(uint(i.operands[0])(self._machine), mask.shape)
            bits = np.where(active, bits, np.uint32(0)).max(axis=1, keepdims=True)
            expected = expected & self._lanes_of(bits, mask)
        # Nothing to do for a warp whose lanes arrive together.
        is_apart = (expected & ~active).any(axis=1)
        for warp in np.flatnonzero(active.any(axis=1) & is_apart):
            self._warp_waits[warp].append((self._suspend(warp, active[warp]), expected[warp]))
            self._release_warp(warp)

    def _release_warp(self, warp: int) -> None:
        for address in {part.address for part, _ in self._warp_waits[warp]}:
            here = [wait for wait in self._warp_waits[warp] if wait[0].address == address]
            arrived = np.logical_or.reduce([part.mask for part, _ in here]) & self.live[warp]
            if not (here[0][1] & self.live[warp] & ~arrived).any():
                others = [wait for wait in self._warp_waits[warp] if wait[0].address != address]
                self._warp_waits[warp] = others
                self._resume(warp, _Part(address, arrived))

    # Barriers of a block and of a cluster

    def _sync_block(self, i: Instruction, mask: Array, active: Array) -> None:
        if not set(i.modifiers) <= {"SYNC", "DEFER_BLOCKING"} or i.operands[0].text != "0x0":
            raise unknown(i)
        warps = np.flatnonzero(active.any(axis=1))
        for warp in warps:
            block = self._machine.block_of_warp[warp]
            self._block_waits[block].append((warp, self._suspend(warp, active[warp])))
        for block in np.unique(self._machine.block_of_warp[warps]):
            self._release_block(block)

    def _release_block(self, block: int) -> None:
        waiting = self._block_waits[block]
        arrived = sum(int((part.mask & self.live[warp]).sum()) for warp, part in waiting)
        if waiting and arrived == int(self.live[self._machine.block_of_warp == block].sum()):
            self._block_waits[block] = []
            for warp, part in waiting:
                self._resume(warp, part)

    def _arrive_at_cluster(self, i: Instruction, mask: Array, active: Array) -> None:
        self._cluster_arrivals += active.any(axis=1)
        self._release_clusters()

    def _wait_for_cluster(self, i: Instruction, mask: Array, active: Array) -> None:
        for warp in np.flatnonzero(active.any(axis=1)):
            self._cluster_waits.append((warp, self._suspend(warp, active[warp])))
        self._release_clusters()

    def _release_clusters(self) -> None:
        blocks = np.array(self._launch.blocks)[self._machine.block_of_warp]
        clusters = blocks // self._launch.cluster_blocks
        waiting, self._cluster_waits = self._cluster_waits, []
        for warp, part in waiting:
            others = (clusters == clusters[warp]) & self.live.any(axis=1)
            if (self._cluster_arrivals[others] >= self._cluster_arrivals[warp]).all():
                self._resume(warp, part)
            else:
                self._cluster_waits.append((warp, part))

    # mbarriers

    def _wait_for_mbarrier(self, i: Instruction, active: Array) -> None:
        """The program tries again and again: here, it waits, and succeeds at its first try."""
        if i.modifiers != ("PHASECHK", "TRANS64", "TRYWAIT"):
            raise unknown(i)
        to, barrier, parity_ = i.operands
        machine = self._machine
        addresses = np.broadcast_to(near_address(barrier)(machine), active.shape)
        parities = np.broadcast_to(uint(parity_)(machine), active.shape) >> np.uint32(31)
        writer(to)(machine, np.ones((1, 1), bool), active)
        for warp in np.flatnonzero(active.any(axis=1)):
            lane = int(active[warp].argmax())
            place = (
                int(machine.block_of_warp[warp]),
                int(addresses[warp, lane]),
                int(parities[warp, lane]),
            )
            self._mbarrier_waits.append((warp, self._suspend(warp, active[warp]), place))
        self.release_mbarriers()

    def release_mbarriers(self) -> None:
        """Called when mbarriers may have completed phases."""
        waiting, self._mbarrier_waits = self._mbarrier_waits, []
        for warp, part, place in waiting:
            if self._machine.mbarriers.is_complete(*place):
                self._machine.in_flight.wait_for_mbarrier(place[:2])
                self._resume(warp, part)
            else:
                self._mbarrier_waits.append((warp, part, place))


_EXECUTIONS: dict[str, Callable[[ControlFlow, Instruction, Array, Array], None]] = {
    "BRA": ControlFlow._branch,
    "BRX": ControlFlow._branch_to_register,
    "RET": ControlFlow._branch_to_register,
    "CALL": ControlFlow._call,
    "EXIT": ControlFlow._exit,
    "BSSY": ControlFlow._set_convergence,
    "BSYNC": ControlFlow._converge,
    "BREAK": ControlFlow._break,
    "WARPSYNC": ControlFlow._sync_warp,
    "BAR": ControlFlow._sync_block,
    "UCGABAR_ARV": ControlFlow._arrive_at_cluster,
    "UCGABAR_WAIT": ControlFlow._wait_for_cluster,
}
CONTROL_OPCODES = frozenset(_EXECUTIONS)
