"""Rows: what a run leaves behind, and how it is read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sanity.registry import first_line

PROTOCOL_VERSION = "1"
"""Changes whenever a change of the code would move numbers of an unchanged plan."""
SCHEMA_VERSION = 1
TRAINED = "trained"

Array = NDArray[Any]


class Score(NamedTuple):
    """One image's similarity at one stage. stage_index 0 compares the trained maps with themselves."""

    model: str
    order: str
    seed: int
    stage_index: int
    stage: str
    method: str
    similarity: str
    image: str
    target: int
    value: float
    status: str


class Prediction(NamedTuple):
    """What the network says of one image at one stage; probabilities are NaN where logits are not finite."""

    model: str
    order: str
    seed: int
    stage_index: int
    stage: str
    image: str
    top1: int
    top1_name: str
    top1_probability: float
    target: int
    target_probability: float
    finite: bool


_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def schema(row: type[NamedTuple]) -> pa.Schema:
    """Arrow schema of Score or Prediction, with the schema's version in its metadata."""
    kinds = {name: _TYPES[kind] for name, kind in get_type_hints(row).items()}
    return pa.schema(kinds, metadata={"sanity_schema": str(SCHEMA_VERSION)})


def to_table(rows: Iterable[tuple[Any, ...]], row: type[NamedTuple]) -> pa.Table:
    """Rows -> Arrow table with the exact types of their schema."""
    columns: list[Any] = list(zip(*rows, strict=True)) or [[] for _ in row._fields]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema(row), strict=True)], schema(row))


def read_rows(path: Path, row: type[NamedTuple] | None = None) -> pd.DataFrame:
    """Read a table that a run left. Raises ValueError for a file that is none, of a newer schema, or not of `row`s."""
    if not path.exists():
        raise ValueError(f"cannot read {path}: there is no such file")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None
    version = (table.schema.metadata or {}).get(b"sanity_schema", b"0").decode(errors="replace")
    if not version.isdecimal():
        raise ValueError(f"{path} has schema {version!r}, which is no number")
    if int(version) > SCHEMA_VERSION:
        raise ValueError(f"{path} has schema {version}, newer than {SCHEMA_VERSION}: update saliency-sanity")
    frame: pd.DataFrame = (table if row is None else _typed(table, row, path)).to_pandas()
    return frame


def _typed(table: pa.Table, row: type[NamedTuple], path: Path) -> pa.Table:
    """The table with its rows' own types, as a folder of parts or another program may have written others."""
    if missing := [name for name in row._fields if name not in table.column_names]:
        raise ValueError(f"{path} lacks the columns {missing}")
    for field_ in schema(row):
        place = table.column_names.index(field_.name)
        try:
            table = table.set_column(place, field_, table[place].cast(field_.type))
        except pa.ArrowException as error:
            raise ValueError(f"{path}: column {field_.name}: {first_line(error)}") from None
    return table


def read_scores(folder: Path) -> pd.DataFrame:
    """A run's scores. Raises ValueError as `read_rows` does."""
    return read_rows(folder / "scores.parquet", Score)


def read_unrelated(folder: Path) -> pd.DataFrame | None:
    """Similarities of different images' trained maps, the level `summary.verdicts` judges by, if a run has them."""
    path = folder / "unrelated.parquet"
    return read_rows(path, Score) if path.exists() else None


def read_header(folder: Path) -> dict[str, Any]:
    """The run's `run.json`. Raises ValueError if the folder holds no run."""
    try:
        header: Any = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no run: there is no run.json in it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no run: its run.json cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{folder} holds no run: its run.json is no JSON object")
    for name in ("plan", "stages", "unchanged_parameters"):
        if not isinstance(header.get(name) or {}, dict):
            raise ValueError(f"{folder} holds no run: {name} in its run.json is no JSON object")
    return header


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all; a pipe or a terminal, which nothing can take the place of, as it comes."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, and put it there when it is whole."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Cell(NamedTuple):
    """A walk of a run: a chunk of images through all stages of one order under one seed."""

    chunk: int
    seed: int
    order: str


class Key(NamedTuple):
    """A step of a run: a chunk of images at one stage of one order and seed."""

    chunk: int
    seed: int
    order: str
    stage_index: int


@dataclass(frozen=True)
class Step:
    """What one step yields. panels: display maps, int8 (H, W), by (image, method).

    unrelated: at stage 0, how like each image's trained map another image's trained map is.
    """

    key: Key
    stage: str
    scores: Sequence[Score]
    predictions: Sequence[Prediction]
    panels: Mapping[tuple[str, str], Array] = field(default_factory=dict)
    maps: Mapping[str, Array] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    unrelated: Sequence[Score] = ()


def counts(scores: pd.DataFrame) -> dict[str, int]:
    """Rows by status, so that what could not be scored is in plain sight."""
    return {str(status): int(n) for status, n in scores["status"].value_counts().items()}
