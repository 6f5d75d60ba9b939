"""Which cell of a run is taken next, by whom, how often it may fail: the ledger of a run on many workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sanity.records import Cell, Key

ATTEMPTS = 3
"""A cell that failed this often is given up, so that it does not keep the others waiting."""


@dataclass(frozen=True)
class Failure:
    """A cell that was given up: the steps it lacks, how often it was tried, the last reason."""

    cell: Cell
    stages: tuple[int, ...]
    attempts: int
    reason: str


@dataclass
class Ledger:
    """Cells of a run that are not done: waiting, running, failed. Every step is counted once, whoever made it.

    pending: the steps each cell still lacks, none empty. Workers keep the trained network's maps of the chunk
    they hold, so a worker is given cells of that chunk first, then a chunk nobody has begun, and only then does
    it join another worker's chunk, that with most cells waiting.
    """

    pending: Mapping[Cell, Sequence[Key]]
    attempts: int = ATTEMPTS
    failures: list[Failure] = field(default_factory=list)
    running: set[Cell] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.total = len(self.pending)
        self._lacking = {cell: set(keys) for cell, keys in self.pending.items()}
        self._tried = dict.fromkeys(self.pending, 0)
        self._waiting: dict[int, deque[Cell]] = {}
        for cell in sorted(self.pending, key=lambda cell: cell.chunk):
            self._waiting.setdefault(cell.chunk, deque()).append(cell)
        self._untouched = deque(self._waiting)

    @property
    def unfinished(self) -> int:
        """Cells waiting or running."""
        return len(self._lacking)

    @property
    def finished(self) -> int:
        """Cells done."""
        return self.total - self.unfinished - len(self.failures)

    @property
    def waiting(self) -> int:
        """Cells that nobody has taken."""
        return self.unfinished - len(self.running)

    def take(self, held: int | None = None) -> Cell | None:
        """Hand out a cell to a worker that holds the chunk `held`; None if none is waiting."""
        chunk = held if held in self._waiting else self._next_chunk()
        if chunk is None:
            return None
        cell = self._waiting[chunk].popleft()
        if not self._waiting[chunk]:
            del self._waiting[chunk]
        self.running.add(cell)
        return cell

    def _next_chunk(self) -> int | None:
        while self._untouched:
            if (chunk := self._untouched.popleft()) in self._waiting:
                return chunk
        return max(self._waiting, key=lambda chunk: len(self._waiting[chunk]), default=None)

    def lacking(self, cell: Cell) -> list[Key]:
        """Steps of a cell that nobody has delivered."""
        return sorted(self._lacking[cell])

    def deliver(self, cell: Cell, keys: Sequence[Key], last: bool) -> None:
        """Note steps that are written; the cell is finished with the last. Raises ValueError for a step given twice."""
        if not self._lacking[cell].issuperset(keys):
            raise ValueError(f"steps delivered twice: {sorted(set(keys) - self._lacking[cell])}")
        self._lacking[cell].difference_update(keys)
        if last:
            self.running.remove(cell)
            del self._lacking[cell]

    def fail(self, cell: Cell, reason: str, blame: bool = True) -> Failure | None:
        """Put a cell back, behind those nobody has tried, or give it up; blame: whether it may be its own fault."""
        self.running.remove(cell)
        self._tried[cell] += blame
        if self._tried[cell] < self.attempts:
            self._waiting.setdefault(cell.chunk, deque()).append(cell)
            return None
        stages = tuple(key.stage_index for key in sorted(self._lacking.pop(cell)))
        self.failures.append(Failure(cell, stages, self._tried[cell], reason))
        return self.failures[-1]
