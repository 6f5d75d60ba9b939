"""Finished runs as reports see them: found, read, named, ranked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sanity import parts
from sanity.parts import Parts
from sanity.records import read_header, read_unrelated
from sanity.report.looks import CONTROLS
from sanity.report.manifest import trained
from sanity.summary import VERDICT_COLUMNS, summarize, verdicts


@dataclass(frozen=True)
class StoredRun:
    """A finished run. label: its model's name, with the folder's where several runs are of one model.

    scores: all rows or, of a large run, those of its first images (`parts.looked_at`); unscored: of all rows.
    """

    folder: Path
    label: str
    header: Mapping[str, Any]
    scores: pd.DataFrame
    summary: pd.DataFrame
    verdicts: pd.DataFrame
    unscored: pd.DataFrame

    @property
    def plan(self) -> Mapping[str, Any]:
        """The plan as run.json holds it; empty for a header without."""
        return self.header.get("plan") or {}

    @property
    def methods(self) -> list[str]:
        """Names of the methods that have scores."""
        return [str(name) for name in self.scores["method"].unique()]


def find(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders of runs, and paths passed over: a path is a run's folder, or holds some, however deep.

    Passed over, so that `results/*` may hold other things: files, folders without a run, and what other
    commands leave (their run.json stands beside no scores). Raises ValueError for a path that does not exist
    and if no run is left.
    """
    found: list[Path] = []
    over: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        folders = [path] if (path / "run.json").is_file() else sorted(p.parent for p in path.glob("**/run.json"))
        runs = [folder for folder in folders if any((folder / name).exists() for name in ("scores.parquet", "steps"))]
        found += [run for run in runs if run not in found]
        over += [] if runs else [path]
    if not found:
        raise ValueError(f"no run in {', '.join(map(str, paths))}: a run's folder holds run.json and scores.parquet")
    return found, over


def read_all(folders: Sequence[Path]) -> list[StoredRun]:
    """Read runs and name them. Raises ValueError for one that is unfinished, broken, or of a newer schema."""
    read = [(folder, *_read(folder)) for folder in folders]
    labels = _labels([(folder, header, scores) for folder, header, _, scores in read])
    return [
        StoredRun(
            folder, label, header, scores, summarize(rows), verdicts(rows, read_unrelated(folder)), unscored(rows)
        )
        for (folder, header, rows, scores), label in zip(read, labels, strict=True)
    ]


def _read(folder: Path) -> tuple[dict[str, Any], pd.DataFrame | Parts, pd.DataFrame]:
    header = read_header(folder)
    if header.get("status", "complete") != "complete":
        raise ValueError(f"{folder} holds an unfinished run; finish it: python -m sanity.run ... --resume")
    rows = parts.scores(folder)
    scores = parts.looked_at(rows)
    if (count := scores["model"].nunique()) != 1:
        raise ValueError(f"{folder / 'scores.parquet'}: scores of one model expected, found {count or 'none'}")
    return header, rows, scores


def _labels(runs: Sequence[tuple[Path, Mapping[str, Any], pd.DataFrame]]) -> list[str]:
    names = [str(scores["model"].iloc[0]) + ("" if trained(header) else " (untrained)") for _, header, scores in runs]
    for more in (lambda path: path.resolve().name, str):
        often = Counter(names)
        names = [
            f"{name} ({more(part[0])})" if often[name] > 1 else name for name, part in zip(names, runs, strict=True)
        ]
    return names


def unscored(rows: pd.DataFrame | Parts) -> pd.DataFrame:
    """Maps without a score, where there are any: order, method, status, stage_index, stage, count, maps.

    A map is one image under one seed; count of `maps` at that stage were of that status, whatever the similarity.
    """
    if isinstance(rows, Parts):
        found = [unscored(part) for part in rows]
        return pd.concat([part for part in found if len(part)] or found[:1], ignore_index=True)
    by = ["order", "method", "stage_index", "stage"]
    each = rows.drop_duplicates([*by, "seed", "image", "status"])
    all_maps = rows.drop_duplicates([*by, "seed", "image"]).groupby(by, sort=False).size().rename("maps")
    bad = each[each["status"] != "ok"].groupby([*by, "status"], sort=False).size().rename("count").reset_index()
    return bad.merge(all_maps, on=by)[["order", "method", "status", "stage_index", "stage", "count", "maps"]]


def differences(runs: Sequence[StoredRun]) -> list[str]:
    """What the runs differ in beside the network: numbers of such runs are compared at the reader's risk."""
    views = [
        {**run.plan, "pictures": run.header.get("images_sha256"), "protocol": run.header.get("protocol_version")}
        for run in runs
    ]
    own = {"model", "weights", "stages", "granularity", "strips", "hide_pictures", "save_maps", "images"}
    keys = dict.fromkeys(key for view in views for key in view if key not in own)
    return [key for key in keys if len({json.dumps(view.get(key), sort_keys=True) for view in views}) > 1]


def leaderboard(runs: Sequence[StoredRun]) -> pd.DataFrame:
    """Final similarity and verdict of every run's methods: the verdicts' columns after `run`, then `best`.

    best: among the methods of a run, order and similarity that pass and are no control, the one whose score
    is nearest to zero, and those whose interval overlaps its own.
    """
    parts = [run.verdicts.assign(run=run.label) for run in runs if len(run.verdicts)]
    if not parts:
        return pd.DataFrame(columns=["run", *VERDICT_COLUMNS, "best"])
    board = pd.concat(parts, ignore_index=True)[["run", *VERDICT_COLUMNS]].assign(best=False)
    for _, part in board.groupby(["run", "order", "similarity"], sort=False):
        passing = part[(part["verdict"] == "pass") & ~part["method"].isin(CONTROLS)]
        board.loc[nearest_zero(passing, "score").index, "best"] = True
    return board


def gist(board: pd.DataFrame) -> str:
    """A run's verdicts in a sentence or two, controls left out."""
    own = board[~board["method"].isin(CONTROLS)]
    if own.empty:
        return "No verdicts: no order here ends in full randomization."
    several = own["order"].nunique() > 1
    where = own["order"] + " " + own["similarity"] if several else own["similarity"]
    failing = [
        f"{method} ({', '.join(where[part.index])})"
        for method, part in own[own["verdict"] == "fail"].groupby("method", sort=False)
    ]
    passing = [str(m) for m, part in own.groupby("method", sort=False) if (part["verdict"] == "pass").all()]
    return f"Fail: {', '.join(failing) or 'none'}. Pass throughout: {', '.join(passing) or 'none'}."


def nearest_zero(part: pd.DataFrame, mean: str) -> pd.DataFrame:
    """Rows whose mean is nearest to zero, and those whose [low, high] overlaps the nearest one's."""
    size = part[mean].astype(float).abs()
    if not np.isfinite(size).any():
        return part.iloc[:0]
    first = part.iloc[int(np.nanargmin(size))]
    overlap = (part["low"] <= first["high"]) & (part["high"] >= first["low"])
    found: pd.DataFrame = part[overlap | (size == size.min())]
    return found


def ranked(board: pd.DataFrame) -> list[str]:
    """Methods of a leaderboard: fewest failures first, then most passes, then nearest to zero; controls last."""

    def place(method: str) -> tuple[bool, int, int, float]:
        own = board[board["method"] == method]
        distance = float(own["score"].astype(float).abs().mean())
        verdict = own["verdict"]
        fails, passes = int((verdict == "fail").sum()), int((verdict == "pass").sum())
        return method in CONTROLS, fails, -passes, distance if np.isfinite(distance) else np.inf

    return sorted(map(str, board["method"].unique()), key=place)
