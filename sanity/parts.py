"""Scores that are too many for memory: a folder of tables in the place of one, read a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sanity.records import Score, read_rows, read_scores
from sanity.registry import first_line

SHOWN = 64
"""Images whose own rows reports look at, where a run has too many."""


class Place(NamedTuple):
    """What the rows of a part have in common, whatever their seed."""

    order: str
    stage_index: int


class Parts:
    """The scores of a large run: iterating gives a frame for each order and stage, all seeds and images in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[Place, list[Path]] = {}
        for file in sorted(path.glob("*.parquet")):
            self.files.setdefault(_place(file), []).append(file)
        if not self.files:
            raise ValueError(f"cannot read {path}: a folder without a table")

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return map(self.read, self.files)

    def read(self, place: Place) -> pd.DataFrame:
        """Rows of one order and stage. Raises ValueError as `records.read_rows` does."""
        return pd.concat([read_rows(file, Score) for file in self.files[place]], ignore_index=True)

    def excerpt(self, images: int = SHOWN) -> pd.DataFrame:
        """All rows of the first few images; `attrs["images"]` is how many images there are."""
        known = next(iter(self))["image"].unique()
        kept = [self._of(file, list(known[:images])) for files in self.files.values() for file in files]
        found = pd.concat(kept, ignore_index=True)
        found.attrs["images"] = len(known)
        return found

    def _of(self, file: Path, images: Sequence[str]) -> pd.DataFrame:
        rows = read_rows(file, Score)
        return rows[rows["image"].isin(images)]


def _place(file: Path) -> Place:
    try:
        head = next(pq.ParquetFile(file).iter_batches(1, columns=Place._fields)).to_pylist()[0]
    except (OSError, pa.ArrowException, StopIteration) as error:
        raise ValueError(f"cannot read {file}: {first_line(error)}") from None
    return Place(**head)


def scores(folder: Path) -> pd.DataFrame | Parts:
    """A run's scores: a frame, or parts of it where they are many. Raises ValueError as `records.read_rows` does."""
    path = folder / "scores.parquet"
    return Parts(path) if path.is_dir() else read_scores(folder)


def looked_at(rows: pd.DataFrame | Parts) -> pd.DataFrame:
    """The rows themselves or, of a large run, those of a few images."""
    return rows.excerpt() if isinstance(rows, Parts) else rows


def seeds_in(rows: pd.DataFrame | Parts) -> set[int]:
    """Seeds that the scores have."""
    return set((next(iter(rows)) if isinstance(rows, Parts) else rows)["seed"])


def images_in(rows: pd.DataFrame) -> int:
    """How many images the scores are of that these rows were taken from."""
    return int(rows.attrs.get("images", rows["image"].nunique()))
