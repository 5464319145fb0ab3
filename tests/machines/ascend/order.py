"""What must have ended before what: vector clocks over the pipes of the cores that share a block.

A core's scalar unit hands instructions to its pipes in order, and goes on. Each pipe takes its own in order, but one
may begin before those before it have ended, and pipes know nothing of each other. So an instruction may touch what
another one wrote, or write what it reads, only if it is known to have ended: by a flag, a barrier, or a flag between
cores.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from ..memory import Fault

PIPES = ("S", "V", "M", "MTE1", "MTE2", "MTE3", "FIX")
At = np.ndarray | slice
"""Offsets of bytes."""

# The matrix unit adds to what it wrote without a barrier.
_IN_ORDER = ("S", "M")


class Order:
    """An agent is a pipe of a core: `core * len(PIPES) + pipe`."""

    def __init__(self, cores: int) -> None:
        count = cores * len(PIPES)
        self._issued = np.zeros(count, np.int64)
        self._known = np.zeros((count, count), np.int64)
        """Of each agent: how many of another one's instructions it knows to have ended."""
        self._flags: dict[tuple[int, str, str, int], np.ndarray] = {}
        self._between: dict[tuple[int, int, int], deque[np.ndarray]] = {}

    @property
    def moment(self) -> tuple[int, int]:
        """Another one whenever anything has happened."""
        return int(self._issued.sum()), sum(map(len, self._between.values()))

    def known(self, agent: int) -> np.ndarray:
        return self._known[agent]

    def issue(self, core: int, pipe: str) -> tuple[int, int]:
        """(agent, number) of the next instruction of a pipe, which the scalar unit hands over now."""
        agent, scalar = _agent(core, pipe), _agent(core, "S")
        self._join(agent, self._known[scalar])
        self._issued[agent] += 1
        if pipe in _IN_ORDER:
            self._known[agent, agent] = self._issued[agent]
        return agent, int(self._issued[agent])

    def barrier(self, core: int, pipe: str) -> None:
        """Of a pipe, or of `ALL`: what was handed over has ended before what comes."""
        if pipe != "ALL":
            agent = _agent(core, pipe)
            self._known[agent, agent] = self._issued[agent]
            return
        agents = [_agent(core, each) for each in PIPES]
        for agent in agents:
            self._known[agent, agent] = self._issued[agent]
        every = self._known[agents].max(0)
        for agent in agents:
            self._join(agent, every)

    def set_flag(self, core: int, of: str, to: str, event: int) -> None:
        key = (core, of, to, event)
        if key in self._flags:
            raise Fault(f"the flag {event} from {of} to {to} is set twice")
        self._flags[key] = self._ended(core, of)

    def wait_flag(self, core: int, of: str, to: str, event: int) -> None:
        key = (core, of, to, event)
        if key not in self._flags:
            raise Fault(f"{to} waits for the flag {event} of {of}, which nothing has set")
        self._join(_agent(core, to), self._flags.pop(key))

    def signal(self, core: int, of: str, others: list[int], flag: int) -> None:
        """A flag for other cores, when what this pipe was handed has ended."""
        for other in others:
            self._between.setdefault((core, other, flag), deque()).append(self._ended(core, of))

    def signalled(self, core: int, others: list[int], flag: int) -> bool:
        return all(self._between.get((other, core, flag)) for other in others)

    def take(self, core: int, others: list[int], flag: int, pipe: str) -> None:
        for other in others:
            self._join(_agent(core, pipe), self._between[other, core, flag].popleft())

    def end(self) -> None:
        """A flag that is still set would be taken for the next kernel's."""
        if self._flags:
            _, of, to, event = next(iter(self._flags))
            raise Fault(f"the flag {event} from {of} to {to} is left set")
        for (core, other, flag), left in self._between.items():
            if left:
                raise Fault(f"the flag {flag} from core {core} to core {other} is left set")

    def _ended(self, core: int, pipe: str) -> np.ndarray:
        """What is known once the pipe has done what it was handed."""
        agent = _agent(core, pipe)
        self._join(agent, self._known[_agent(core, "S")])
        snapshot = self._known[agent].copy()
        snapshot[agent] = self._issued[agent]
        return snapshot

    def _join(self, agent: int, known: np.ndarray) -> None:
        np.maximum(self._known[agent], known, out=self._known[agent])


def _agent(core: int, pipe: str) -> int:
    return core * len(PIPES) + PIPES.index(pipe)


class Touched:
    """Who wrote and read each byte of a memory last, and by which of his instructions."""

    def __init__(self, size: int) -> None:
        # Zeros take no memory until they are touched.
        self._writer = np.zeros(size, np.int8)
        self._written = np.zeros(size, np.int32)
        self._room = np.zeros(size, bool)
        self._read: dict[int, np.ndarray] = {}

    def read(self, at: At, agent: int, number: int, order: Order) -> None:
        self._wait_for_writer(at, agent, order, "reads")
        if agent not in self._read:
            self._read[agent] = np.zeros(len(self._writer), np.int32)
        self._read[agent][at] = number

    def write(self, at: At, agent: int, number: int, order: Order, room: bool = False) -> None:
        """room: for the instruction's own use, which its pipe has ended with when the next one begins."""
        self._wait_for_writer(at, agent, order, "writes")
        for reader, numbers in self._read.items():
            if reader != agent:  # a pipe begins its own in order
                self._require(numbers[at], order.known(agent)[reader], agent, "writes", "is reading")
        self._writer[at], self._written[at], self._room[at] = agent, number, room

    def _wait_for_writer(self, at: At, agent: int, order: Order, does: str) -> None:
        own_room = self._room[at] & (self._writer[at] == agent)
        numbers = np.where(own_room, 0, self._written[at])
        self._require(numbers, order.known(agent)[self._writer[at]], agent, does, "is writing")

    def _require(self, numbers: np.ndarray, known: np.ndarray, agent: int, does: str, others: str) -> None:
        if (numbers > known).any():
            core, pipe = divmod(agent, len(PIPES))
            raise Fault(
                f"core {core}'s {PIPES[pipe]} {does} what an instruction that may not have ended {others}"
            )
