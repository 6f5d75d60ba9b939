from __future__ import annotations

import random

import pytest

from sanity.cells import Ledger
from sanity.records import Cell, Key


def cells(chunks: int, seeds: int = 1, stages: int = 3) -> dict[Cell, list[Key]]:
    found = [Cell(chunk, seed, "cascading") for chunk in range(chunks) for seed in range(seeds)]
    return {cell: [Key(*cell, i) for i in range(stages)] for cell in found}


def test_a_worker_stays_with_its_chunk_then_begins_another_then_helps() -> None:
    ledger = Ledger(cells(chunks=2, seeds=3))
    first = ledger.take()
    second = ledger.take()
    assert (first.chunk, second.chunk) == (0, 1)
    assert ledger.take(held=1) == Cell(1, 1, "cascading")
    assert ledger.take(held=1) == Cell(1, 2, "cascading")
    # Chunk 1 has none left, no chunk is untouched: chunk 0 is joined.
    assert ledger.take(held=1) == Cell(0, 1, "cascading")
    assert ledger.take(held=0) == Cell(0, 2, "cascading")
    assert ledger.take(held=0) is None
    assert (ledger.waiting, ledger.unfinished, len(ledger.running)) == (0, 6, 6)


def test_a_cell_is_tried_again_for_what_it_lacks_and_given_up_at_last() -> None:
    ledger = Ledger(cells(chunks=1))
    cell = ledger.take()
    ledger.deliver(cell, [Key(*cell, 0)], last=False)
    assert ledger.fail(cell, "first") is None
    assert ledger.take() == cell
    assert ledger.lacking(cell) == [Key(*cell, 1), Key(*cell, 2)]
    assert ledger.fail(cell, "the node went", blame=False) is None
    ledger.take()
    assert ledger.fail(cell, "second") is None
    ledger.take()
    failure = ledger.fail(cell, "third")
    assert (failure.cell, failure.stages, failure.attempts, failure.reason) == (cell, (1, 2), 3, "third")
    assert ledger.take() is None
    assert (ledger.unfinished, ledger.finished, ledger.failures) == (0, 0, [failure])


def test_a_step_delivered_twice_is_refused() -> None:
    ledger = Ledger(cells(chunks=1))
    cell = ledger.take()
    ledger.deliver(cell, [Key(*cell, 0)], last=False)
    with pytest.raises(ValueError, match="steps delivered twice"):
        ledger.deliver(cell, [Key(*cell, 0), Key(*cell, 1)], last=False)


@pytest.mark.parametrize("trial", range(20))
def test_whatever_fails_every_step_is_delivered_once_or_accounted_for(trial: int) -> None:
    chance = random.Random(trial)
    want = cells(chunks=5, seeds=3, stages=4)
    ledger = Ledger(want)
    workers: dict[int, tuple[Cell, list[Key]] | None] = dict.fromkeys(range(4))
    held: dict[int, int] = {}
    delivered: list[Key] = []
    while ledger.unfinished:
        worker = chance.randrange(4)
        if workers[worker] is None:
            if (cell := ledger.take(held.get(worker))) is not None:
                workers[worker], held[worker] = (cell, ledger.lacking(cell)), cell.chunk
            continue
        cell, left = workers[worker]
        if chance.random() < 0.15:
            ledger.fail(cell, "bad luck", blame=chance.random() < 0.7)
            workers[worker] = None
            continue
        count = chance.randint(0, len(left))
        delivered += left[:count]
        ledger.deliver(cell, left[:count], last=count == len(left))
        workers[worker] = None if count == len(left) else (cell, left[count:])
    lost = [Key(*failure.cell, i) for failure in ledger.failures for i in failure.stages]
    assert sorted(delivered + lost) == sorted(key for keys in want.values() for key in keys)
    assert ledger.finished + len(ledger.failures) == ledger.total == len(want)
