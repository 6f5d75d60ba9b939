"""The same run on many workers: who works, what is in flight, what becomes of faults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sanity
from sanity.cells import Failure, Ledger
from sanity.cluster import Connection
from sanity.images import Images, carried
from sanity.observation import CHUNK
from sanity.plan import Plan
from sanity.records import PROTOCOL_VERSION, Cell, Key
from sanity.registry import first_line
from sanity.run import keys
from sanity.stages import Stage
from sanity.worker import Packet, Task

TICK = 1.0
"""Seconds between two looks at the cluster, for nodes that join or leave."""
PATIENCE = 600.0
"""Seconds without any worker after which a run ends; what is finished is kept."""
STARTS = 3
"""Workers that may die one after the other before their first cell."""


@dataclass(eq=False)
class Hand:
    """A worker as the driver knows it; cell: what it is working at; held: the chunk whose maps it holds."""

    actor: Any
    about: Mapping[str, Any] = field(default_factory=dict)
    cell: Cell | None = None
    held: int | None = None


class Crew:
    """The workers of one run. At most one cell a worker is in flight, so the driver's memory does not grow.

    on_change is told whenever cells, workers or failures have changed. Raises ValueError if the task cannot be
    sent to workers.
    """

    def __init__(
        self,
        connection: Connection,
        task: Task,
        images: Images,
        ledger: Ledger,
        on_change: Callable[[Crew], object] = lambda crew: None,
    ) -> None:
        self.ray, self.connection, self.images, self.ledger = connection.ray, connection, images, ledger
        self.on_change = on_change
        try:
            # Once for all workers; each node that has one fetches it once.
            self._task = self.ray.put(task)
        except (TypeError, AttributeError, ValueError, self.ray.exceptions.RayError) as error:
            raise ValueError(f"{task.classifier.name} cannot be sent to workers: {first_line(error)}") from None
        self._calls: dict[Any, Hand] = {}
        self._idle: list[Hand] = []
        self._chunks: dict[int, Any] = {}
        self._stillborn = 0
        self._seen = time.monotonic()
        self.veterans: dict[tuple[str, int], int] = {}
        """(device, threads) -> workers that ever stood ready."""

    @property
    def present(self) -> int:
        """Workers that are there, busy or not."""
        return len(self._idle) + sum(bool(hand.about) for hand in self._calls.values())

    def run(self) -> Iterator[Packet]:
        """Yield finished steps as they come, to be written at once; ends when every cell is done or given up.

        Raises ValueError if no worker can be had.
        """
        try:
            while self.ledger.unfinished:
                self._enlist()
                self._assign()
                ready, _ = self.ray.wait(list(self._calls), timeout=TICK) if self._calls else ([], [])
                for call in ready:
                    if packet := self._settle(call):
                        # The worker goes on while this is written.
                        self._assign()
                        yield packet
                self._look_after()
        finally:
            for hand in [*self._calls.values(), *self._idle]:
                self.ray.kill(hand.actor)

    def _enlist(self) -> None:
        """Replace workers that were lost, and follow the cluster's size."""
        if self._stillborn < STARTS:
            for _ in range(min(self.connection.wanted, self.ledger.unfinished) - len(self._calls) - len(self._idle)):
                hand = Hand(self.connection.hire(self._task))
                self._calls[hand.actor.about.remote()] = hand

    def _assign(self) -> None:
        for hand in list(self._idle):
            if (cell := self.ledger.take(hand.held)) is None:
                return
            hand.cell = cell
            try:
                chunk = self._chunk(cell.chunk)
            except OSError as error:
                self._failed(hand, f"{type(error).__name__}: {error}")
                continue
            self._idle.remove(hand)
            self._calls[hand.actor.start.remote(cell, chunk, self.ledger.lacking(cell))] = hand
            hand.held = cell.chunk

    def _chunk(self, number: int) -> Any:
        """A chunk's pictures in the object store, there for as long as somebody works at them."""
        busy = {cell.chunk for cell in self.ledger.running}
        self._chunks = {one: kept for one, kept in self._chunks.items() if one in busy}
        if number not in self._chunks:
            part = Images(self.images.name, self.images.pictures[number * CHUNK : (number + 1) * CHUNK])
            self._chunks[number] = self.ray.put(carried(part))
        return self._chunks[number]

    def _settle(self, call: Any) -> Packet | None:
        """Take in what a call came to: a worker that is there, steps, or a fault."""
        hand = self._calls.pop(call)
        try:
            found = self.ray.get(call)
        except self.ray.exceptions.RayTaskError as error:
            self._mishap(hand, error)
        except self.ray.exceptions.RayError as error:
            self._lost(hand, error)
        else:
            if hand.cell is not None:
                return self._delivered(hand, hand.cell, found)
            self._welcome(hand, found)
        return None

    def _delivered(self, hand: Hand, cell: Cell, packet: Packet) -> Packet:
        self.ledger.deliver(cell, packet.keys, packet.last)
        if packet.last:
            hand.cell = None
            self._idle.append(hand)
        else:
            self._calls[hand.actor.go_on.remote()] = hand
        self.on_change(self)
        return packet

    def _welcome(self, hand: Hand, about: Mapping[str, Any]) -> None:
        own = f"{sanity.__version__}, protocol {PROTOCOL_VERSION}"
        if about["sanity"] != own:
            raise ValueError(f"node {about['host']} has saliency-sanity {about['sanity']}, this machine {own}")
        hand.about, self._stillborn = about, 0
        kind = about["device"], about["threads"]
        self.veterans[kind] = self.veterans.get(kind, 0) + 1
        self._idle.append(hand)
        self.on_change(self)

    def _mishap(self, hand: Hand, error: Any) -> None:
        """An exception in a worker: the cell fails; the worker stays, unless it may have been harmed."""
        if hand.cell is None:
            self._lost(hand, error)
            return
        self._failed(hand, f"{type(error.cause).__name__}: {first_line(error.cause)}")
        if isinstance(error.cause, ValueError | OSError):
            hand.held = None
            self._idle.append(hand)
        else:
            # Memory in pieces, a GPU in an error state: the next cell would fail as well.
            self.ray.kill(hand.actor)

    def _lost(self, hand: Hand, error: Exception) -> None:
        """A worker that is no more: its cell goes to another, and may be to blame unless the whole node went."""
        if hand.cell is not None:
            self._failed(hand, _why(error), blame=self.connection.alive(hand.about["node"]))
            return
        self._stillborn += 1
        if self._stillborn >= STARTS and not self.present:
            raise ValueError(f"no worker can start, tried {self._stillborn} times: {_why(error)}") from None

    def _failed(self, hand: Hand, reason: str, blame: bool = True) -> None:
        if hand.cell is not None:
            self.ledger.fail(hand.cell, reason, blame)
        hand.cell = None
        self.on_change(self)

    def _look_after(self) -> None:
        if self.present:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > PATIENCE:
            needed = f"{self.connection.threads} cores and {self.connection.gpus:g} GPU"
            raise ValueError(f"no worker for {PATIENCE:.0f} s: no node of the cluster has {needed} to spare")


def _why(error: Exception) -> str:
    """What Ray says of a worker's end, in a line."""
    words = str(error)
    if "Worker exit detail:" in words:
        detail = words.partition("Worker exit detail:")[2].partition("Some common causes")[0]
        return f"its worker died, as for want of memory or by a signal: {' '.join(detail.split())}"
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    # Of an exception where the worker was made, the last line is the exception.
    telling = [line for line in lines if "because its node" in line] or lines[-1:]
    return f"{type(error).__name__}: {''.join(telling[:1])}"


def lacking(plan: Plan, stages: Sequence[Stage], images: Images, done: frozenset[Key]) -> dict[Cell, list[Key]]:
    """Cells of a run that lack steps, and these, in the order of an embedded run."""
    found: dict[Cell, list[Key]] = {}
    for chunk in range(-(-len(images) // CHUNK)):
        for key in keys(plan, stages, chunk):
            if key not in done:
                found.setdefault(Cell(*key[:3]), []).append(key)
    return found


def reported(failure: Failure, images: Images) -> dict[str, Any]:
    """A cell that was given up, as the manifest has it."""
    start = failure.cell.chunk * CHUNK
    return {
        "images": list(images.ids[start : start + CHUNK]),
        "seed": failure.cell.seed,
        "order": failure.cell.order,
        "stages": list(failure.stages),
        "attempts": failure.attempts,
        "reason": failure.reason,
    }


def manifest(crew: Crew) -> dict[str, Any]:
    """What `run.json` says of the workers and of what failed."""
    kinds = [{"device": d, "threads": t, "workers": n} for (d, t), n in crew.veterans.items()]
    places = {cell: place for place, cell in enumerate(crew.ledger.pending)}
    given_up = sorted(crew.ledger.failures, key=lambda failure: places[failure.cell])
    failures = [reported(failure, crew.images) for failure in given_up]
    return {"engine": f"ray {crew.ray.__version__}", "workers": kinds, "failures": failures}
