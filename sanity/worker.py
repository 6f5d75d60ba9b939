"""What one worker of many does: it holds the network once, takes cells, and gives back files to be written."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

import sanity
from sanity.blocks import packed
from sanity.engine import Engine
from sanity.images import Images
from sanity.models import Classifier
from sanity.observation import Baseline, glance, working
from sanity.plan import Plan
from sanity.randomization import Draws, Other, steps
from sanity.records import PROTOCOL_VERSION, Cell, Key, Step
from sanity.run import walk
from sanity.stages import Stage

SECONDS = 10.0
"""Steps are sent as soon as they are this old: no more is lost with a worker, and quick cells stay in one piece."""


@dataclass(frozen=True)
class Task:
    """What all workers of a run share."""

    plan: Plan
    classifier: Classifier
    stages: Sequence[Stage]
    sources: Mapping[str, Draws | Other]
    batch_size: int
    device: str
    threads: int


@dataclass(frozen=True)
class Packet:
    """Steps that a worker finished, as files; the last packet of a cell may be empty."""

    keys: Sequence[Key]
    files: Mapping[str, bytes]
    evaluations: int
    last: bool


class Worker:
    """Takes cells, one at a time, with the loop that a run in one process has."""

    def __init__(self, task: Task, seconds: float = SECONDS) -> None:
        # Ray's own choice of threads must not undercut ours, nor OpenMP take the whole machine's.
        torch.set_num_threads(task.threads)
        self.task, self.seconds = task, seconds
        self.engine = Engine(task.plan.explainers(), task.batch_size, self._count)
        self.evaluations = 0
        self.steps: Iterator[Step] = iter(())
        self._base: tuple[int, Baseline] | None = None
        task.classifier.network.to(task.device)

    def about(self) -> dict[str, str | int]:
        """What the driver must know of a worker before it gives it anything to do."""
        device = self.task.device
        return {
            "sanity": f"{sanity.__version__}, protocol {PROTOCOL_VERSION}",
            "host": platform.node(),
            "pid": os.getpid(),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
            "threads": torch.get_num_threads(),
        }

    def start(self, cell: Cell, chunk: Images, wanted: Sequence[Key]) -> Packet:
        """Begin a cell with its chunk of images, to take the steps that are wanted; its first packet."""
        self.steps = self._walk(cell, chunk, frozenset(wanted))
        return self.go_on()

    def go_on(self) -> Packet:
        """Take steps until they are SECONDS old, or the cell is at its end."""
        self.evaluations, end, taken = 0, time.monotonic() + self.seconds, list[Step]()
        for step in self.steps:
            taken.append(step)
            if time.monotonic() > end:
                return self._packet(taken, last=False)
        return self._packet(taken, last=True)

    def _packet(self, taken: Sequence[Step], last: bool) -> Packet:
        return Packet([step.key for step in taken], packed(taken), self.evaluations, last)

    def _walk(self, cell: Cell, chunk: Images, wanted: frozenset[Key]) -> Iterator[Step]:
        task = self.task
        with working(task.classifier.network, task.plan, task.device):
            if self._base is None or self._base[0] != cell.chunk:
                # The old one goes first: two would need twice the memory.
                self._base = None
                start = glance(self.engine, task.plan, task.classifier, chunk, task.device)
                self._base = cell.chunk, Baseline(start)
            source, base = task.sources[cell.order], self._base[1]
            done = frozenset(Key(*cell, i) for i in range(len(steps(task.stages, cell.order)))) - wanted
            yield from walk(self.engine, task.plan, task.classifier, task.stages, source, base, cell, done)

    def _count(self, evaluations: int) -> None:
        self.evaluations += evaluations
