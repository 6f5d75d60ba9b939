"""Rows and the run's folder: what a run leaves behind, how it survives being killed, how it is read again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
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


def read_rows(path: Path) -> pd.DataFrame:
    """Read scores or predictions. Raises ValueError for a file that is none, or of a newer schema."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from None
    version = int((table.schema.metadata or {}).get(b"sanity_schema", b"0"))
    if version > SCHEMA_VERSION:
        raise ValueError(f"{path} has schema {version}, newer than {SCHEMA_VERSION}: update saliency-sanity")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def read_unrelated(folder: Path) -> pd.DataFrame | None:
    """Similarities of different images' trained maps, the level `summary.verdicts` judges by, if a run has them."""
    path = folder / "unrelated.parquet"
    return read_rows(path) if path.exists() else None


def read_header(folder: Path) -> dict[str, Any]:
    """The run's `run.json`. Raises ValueError if the folder holds no run."""
    try:
        header: dict[str, Any] = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no run: {error}") from None
    return header


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    _atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=1) + "\n"))


def _atomically(path: Path, write: Any) -> None:
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


class RunFolder:
    """A run's output folder. Each step is written whole, under its key, before the next one starts.

    `run.json` is written first, with status "running", and last, with status "complete"; in between
    `steps/` holds what is finished. Killed at any moment, the folder can be opened again with resume=True.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = path / "steps"

    def open(self, header: Mapping[str, Any], resume: bool) -> dict[str, Any]:
        """Start or resume; returns the header in force, a resumed run's own.

        Raises ValueError if the folder holds anything but the same plan, or the same plan without resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output {self.path} is a file, not a folder")
        found = (self.path / "run.json").exists()
        if not found and self.path.exists() and any(self.path.iterdir()) and not self._only_leftovers():
            raise ValueError(f"output {self.path} is not empty and holds no run; give another --output")
        if found:
            return self._reopen(header, resume)
        self.steps.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", header)
        return dict(header)

    def _only_leftovers(self) -> bool:
        """A run killed before its run.json was there leaves at most an empty steps folder and a part file."""
        return all(p.name in ("steps", ".run.json.part") for p in self.path.iterdir())

    def _reopen(self, header: Mapping[str, Any], resume: bool) -> dict[str, Any]:
        old = read_header(self.path)
        same = ("plan", "protocol_version", "weights_sha256", "images_sha256")
        differing = [k for k in same if k != "plan" and old.get(k) != header[k]]
        plans = old.get("plan", {}), header["plan"]
        differing += [k for k in {*plans[0], *plans[1]} if plans[0].get(k) != plans[1].get(k)]
        if differing:
            raise ValueError(
                f"output {self.path} holds another plan's results (differs in {', '.join(sorted(differing))}); "
                "give another --output"
            )
        if not resume:
            raise ValueError(f"output {self.path} already holds this plan's run; add --resume, or another --output")
        self.steps.mkdir(exist_ok=True)
        return old

    def _stem(self, key: Key) -> Path:
        return self.steps / f"{key.chunk:06d}-{key.seed}-{key.order}-{key.stage_index:04d}"

    def keep_pictures(self, arrays: Mapping[str, Array]) -> None:
        """Write what strips show beside the maps: `pictures/<image>` and `stages/<order>`."""
        _atomically(self.steps / "pictures.npz", lambda p: _save_arrays(p, arrays))

    def flush(self, step: Step) -> None:
        """Write one step; it counts as done when its scores, written last, are there."""
        stem = self._stem(step.key)
        panels = {f"{method}/{image}": panel for (image, method), panel in step.panels.items()}
        extra = {"panels": panels, "maps": dict(step.maps)}
        for name, arrays in extra.items():
            if arrays:
                _atomically(stem.with_suffix(f".{name}.npz"), lambda p, a=arrays: _save_arrays(p, a))
        for name, rows, kind in (("unrelated", step.unrelated, Score), ("predictions", step.predictions, Prediction)):
            table = to_table(rows, kind)
            _atomically(stem.with_suffix(f".{name}.parquet"), lambda p, t=table: pq.write_table(t, p))
        scores = to_table(step.scores, Score).replace_schema_metadata(
            {"sanity_schema": str(SCHEMA_VERSION), "unchanged": json.dumps(step.unchanged)}
        )
        _atomically(stem.with_suffix(".scores.parquet"), lambda p: pq.write_table(scores, p))

    def done(self) -> frozenset[Key]:
        """Keys of the steps already written."""
        return frozenset(_key(path) for path in self.steps.glob("*.scores.parquet"))

    def finish(self, header: Mapping[str, Any], rank: Mapping[str, Sequence[object]]) -> dict[str, Any]:
        """Join the steps into the final files, in the plan's order whatever order they came in.

        rank: column -> its values in the plan's order.
        """
        keys = sorted(self.done())
        scores = self._join("scores", Score, keys, rank)
        self._join("predictions", Prediction, keys, rank)
        # Orders and seeds start from the same trained maps: one stage 0 a chunk tells all.
        first = {key.chunk: key for key in reversed(keys) if key.stage_index == 0}
        self._join("unrelated", Score, list(first.values()), rank)
        self._join_arrays(keys)
        complete = {**header, "status": "complete", "counts": counts(scores), **self._unchanged(keys)}
        write_json(self.path / "run.json", complete)
        return complete

    def tidy(self) -> None:
        """Remove the steps, once everything that is made of them is written."""
        shutil.rmtree(self.steps, ignore_errors=True)

    def _join(
        self, name: str, row: type[NamedTuple], keys: Sequence[Key], rank: Mapping[str, Sequence[object]]
    ) -> pd.DataFrame:
        tables = [pq.read_table(self._stem(key).with_suffix(f".{name}.parquet")) for key in keys]
        plain = schema(row)
        joined = pa.concat_tables([t.replace_schema_metadata(plain.metadata) for t in tables])
        frame: pd.DataFrame = joined.to_pandas()
        places = {c: {value: i for i, value in enumerate(values)} for c, values in rank.items()}
        columns = ["seed", "order", "stage_index", "method", "similarity", "image"]
        sort = [c for c in columns if c in frame]
        frame = frame.sort_values(sort, key=lambda c: c.map(places[c.name]) if c.name in places else c, kind="stable")
        table = pa.Table.from_pandas(frame, schema=plain, preserve_index=False)
        table = table.replace_schema_metadata(plain.metadata)
        _atomically(self.path / f"{name}.parquet", lambda p: pq.write_table(table, p))
        return frame

    def _join_arrays(self, keys: Sequence[Key]) -> None:
        """Panels of all steps -> strips.npz; raw maps of all steps -> maps.safetensors."""
        panels: dict[str, dict[int, Array]] = {}
        maps: dict[str, dict[int, Array]] = {}
        for key in keys:
            for label, value in _load_arrays(self._stem(key).with_suffix(".panels.npz")).items():
                method, image = label.split("/", 1)
                panels.setdefault(f"maps/{key.order}/{image}/{method}", {})[key.stage_index] = value
            for label, value in _load_arrays(self._stem(key).with_suffix(".maps.npz")).items():
                maps.setdefault(label, {})[key.chunk] = value
        if panels:
            stacked = {k: np.stack([v[i] for i in sorted(v)]) for k, v in panels.items()}
            extra = _load_arrays(self.steps / "pictures.npz")
            _atomically(self.path / "strips.npz", lambda p: _save_arrays(p, {**stacked, **extra}))
        if maps:
            from safetensors.numpy import save_file

            joined = {k: np.concatenate([v[i] for i in sorted(v)]) for k, v in maps.items()}
            _atomically(self.path / "maps.safetensors", lambda p: save_file(joined, p))

    def _unchanged(self, keys: Sequence[Key]) -> dict[str, Any]:
        """Parameters that re-initialisation left as they were, by order and stage."""
        found: dict[str, list[str]] = {}
        for key in keys:
            metadata = pq.read_schema(self._stem(key).with_suffix(".scores.parquet")).metadata
            names = json.loads(metadata[b"unchanged"])
            if names:
                found[f"{key.seed}/{key.order}/{key.stage_index}"] = names
        return {"unchanged_parameters": found}


def _key(path: Path) -> Key:
    chunk, seed, order, stage = path.name.split(".")[0].rsplit("-", 3)
    return Key(int(chunk), int(seed), order, int(stage))


def _save_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]  # an array may have any name


def _load_arrays(path: Path) -> dict[str, Array]:
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def counts(scores: pd.DataFrame) -> dict[str, int]:
    """Rows by status, so that what could not be scored is in plain sight."""
    return {str(status): int(n) for status, n in scores["status"].value_counts().items()}
