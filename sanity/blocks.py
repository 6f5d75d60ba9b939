"""Finished steps as the files they become, so that who computes them and who writes them may be two processes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sanity.records import SCHEMA_VERSION, Array, Cell, Key, Prediction, Score, Step, to_table

SCORES = ".scores.parquet"


class Block(NamedTuple):
    """Neighbouring steps of one cell, first to last, whose rows share files."""

    chunk: int
    seed: int
    order: str
    first: int
    last: int

    @property
    def stem(self) -> str:
        """Name of its files, without what follows the first full stop; names sort as blocks of one order do."""
        reach = f"{self.first:04d}" + (f"_{self.last:04d}" if self.last > self.first else "")
        return f"{self.chunk:06d}-{self.seed}-{self.order}-{reach}"

    @property
    def keys(self) -> list[Key]:
        """The steps it holds."""
        return [Key(*self[:3], index) for index in range(self.first, self.last + 1)]


def block_of(path: Path) -> Block:
    """Block whose file this is."""
    chunk, seed, order, reach = path.name.split(".")[0].rsplit("-", 3)
    first, _, last = reach.partition("_")
    return Block(int(chunk), int(seed), order, int(first), int(last or first))


def packed(steps: Iterable[Step]) -> dict[str, bytes]:
    """Steps -> file name -> contents. A block counts as done when its scores, which come last, are there."""
    files: dict[str, bytes] = {}
    scores: dict[str, bytes] = {}
    for block, taken in _blocks(steps):
        for step in taken:
            name = Block(*step.key, step.key.stage_index).stem
            panels = {f"{method}/{image}": panel for (image, method), panel in step.panels.items()}
            for kind, arrays in (("panels", panels), ("maps", dict(step.maps))):
                if arrays:
                    files[f"{name}.{kind}.npz"] = saved(arrays)
        if block.first == 0:
            files[f"{block.stem}.unrelated.parquet"] = _parquet(to_table(taken[0].unrelated, Score))
        said = to_table([row for step in taken for row in step.predictions], Prediction)
        files[f"{block.stem}.predictions.parquet"] = _parquet(said)
        rows = to_table([row for step in taken for row in step.scores], Score)
        unchanged = json.dumps({step.key.stage_index: step.unchanged for step in taken if step.unchanged})
        known = {"sanity_schema": str(SCHEMA_VERSION), "unchanged": unchanged}
        scores[block.stem + SCORES] = _parquet(rows.replace_schema_metadata(known))
    return files | scores


def _blocks(steps: Iterable[Step]) -> Iterator[tuple[Block, Sequence[Step]]]:
    """Group steps of the same cell whose indices follow one another."""
    ordered = sorted(steps, key=lambda step: step.key)
    places = enumerate(ordered)
    for _, group in groupby(places, lambda one: (one[1].key[:3], one[1].key.stage_index - one[0])):
        taken = [step for _, step in group]
        yield Block(*Cell(*taken[0].key[:3]), taken[0].key.stage_index, taken[-1].key.stage_index), taken


def _parquet(table: pa.Table) -> bytes:
    sink = BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def saved(arrays: Mapping[str, Array]) -> bytes:
    """Arrays by any name, as a compressed .npz."""
    sink = BytesIO()
    np.savez_compressed(sink, **dict(arrays))  # type: ignore[arg-type]  # an array may have any name
    return sink.getvalue()


def loaded(path: Path) -> dict[str, Any]:
    """Arrays of a .npz, none if there is no such file."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def predictions(files: Mapping[str, bytes]) -> Iterator[Prediction]:
    """Predictions among packed files."""
    for name, contents in files.items():
        if name.endswith(".predictions.parquet"):
            rows = pq.read_table(BytesIO(contents)).to_pylist()
            yield from (Prediction(**row) for row in rows)
