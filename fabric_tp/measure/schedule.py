"""How long a step takes: its operations one after the other, and collectives beside them, each axis on its own link.

The device computes in the order in which operations were issued; the host runs ahead of it. A collective starts when
what it needs is computed and the collectives before it on the same axis are done. FSDP2's gathers need parameters only,
and start when what the gather before brought is in use, so that there are never more than two layers' parameters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fabric_tp.measure.hardware import Hardware
from fabric_tp.measure.operations import Event, Issue, Operation, Wait


@dataclass
class StepTime:
    """Where the time of a step goes, in seconds."""

    computing: dict[str, float] = field(default_factory=dict)
    """By kind of work."""
    exposed: dict[str, float] = field(default_factory=dict)
    """By axis: in which the device waits for a collective."""
    hidden: dict[str, float] = field(default_factory=dict)
    """By axis: in which a collective runs while the device computes."""
    phases: dict[str, float] = field(default_factory=dict)
    """By what was running; waiting is in it."""
    flops: int = 0
    """Of products and attention, as torch counts them, with what is computed again."""

    @property
    def seconds(self) -> float:
        return sum(self.computing.values()) + sum(self.exposed.values())


def schedule(
    events: Iterable[Event], hardware: Hardware, strides: Mapping[str, int], *, compiled: bool = False
) -> StepTime:
    """Run the events of one rank's step in thought.

    Args:
        events: In the order of the program.
        hardware: That it runs on.
        strides: By axis of the mesh: how many devices neighbouring ranks are apart.
        compiled: Whether operations of the blocks are fused.
    """
    return _Run(hardware, strides, compiled).run(events)


@dataclass(frozen=True)
class _Running:
    """A collective that was issued."""

    axis: str
    end: float
    seconds: float
    processor: float
    """Seconds for which the device would compute nothing."""


class _Run:
    def __init__(self, hardware: Hardware, strides: Mapping[str, int], compiled: bool) -> None:
        self._hardware, self._strides, self._compiled = hardware, strides, compiled
        self._now = 0.0
        self._free: dict[str, float] = {}
        """When the link of each axis has nothing more to do."""
        self._ends: dict[int, _Running] = {}
        self._gathers: deque[_Running] = deque()
        self._reductions: deque[_Running] = deque()
        self._gathers_from = 0.0
        self._busy: dict[str, float] = {}
        self._time = StepTime()

    def run(self, events: Iterable[Event]) -> StepTime:
        phase = ""
        for event in events:
            before = self._now
            if isinstance(event, Operation):
                if event.phase != phase:
                    if phase == "backward":  # FSDP2 waits for all it reduces when the backward ends
                        self._wait_for_all(self._reductions)
                    phase = event.phase
                self._compute(event)
            elif isinstance(event, Issue):
                self._issue(event)
            else:
                self._wait_for(event)
            self._add(self._time.phases, phase, self._now - before)
        for axis, busy in self._busy.items():
            self._time.hidden[axis] = max(0.0, busy - self._time.exposed.get(axis, 0.0))
        return self._time

    def _compute(self, operation: Operation) -> None:
        seconds = self._hardware.seconds(operation, fused=self._compiled)
        self._now += seconds
        self._add(self._time.computing, operation.work, seconds)
        self._time.flops += operation.flops

    def _issue(self, issue: Issue) -> None:
        collective = issue.collective
        axis = collective.axis
        gather = issue.number is None and collective.kind == "all-gather"
        ready = self._gathers_from if gather else self._now
        seconds = self._hardware.collective_seconds(collective, self._strides.get(axis, 1))
        start = max(ready, self._free.get(axis, 0.0))
        self._free[axis] = start + self._hardware.link_seconds(collective, self._strides.get(axis, 1))
        self._add(self._busy, axis, seconds)
        running = _Running(axis, start + seconds, seconds, self._hardware.processor_seconds(collective))
        if issue.number is not None:
            self._ends[issue.number] = running
        else:
            (self._gathers if gather else self._reductions).append(running)

    def _wait_for(self, wait: Wait) -> None:
        if wait.number is not None:
            if wait.number in self._ends:
                self._wait_until(self._ends[wait.number])
        elif wait.kind == "reduce-scatter":
            self._wait_for_all(self._reductions)
        elif self._gathers:
            self._wait_until(self._gathers.popleft())
            self._gathers_from = self._now

    def _wait_for_all(self, waiting: deque[_Running]) -> None:
        while waiting:
            self._wait_until(waiting.popleft())

    def _wait_until(self, running: _Running) -> None:
        """Or until the operations beside it are done, which then took longer."""
        exposed = max(0.0, running.end - self._now)
        beside = max(0.0, 1.0 - exposed / running.seconds) if running.processor else 0.0
        lost = exposed + beside * running.processor
        if lost > 0:
            self._add(self._time.exposed, running.axis, lost)
            self._now += lost

    @staticmethod
    def _add(times: dict[str, float], key: str, seconds: float) -> None:
        times[key] = times.get(key, 0.0) + seconds
