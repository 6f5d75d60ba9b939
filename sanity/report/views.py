"""What the page's template shows: tables of verdicts, numbers by stage, strips as tables of pictures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from sanity.parts import images_in
from sanity.records import Prediction, read_rows
from sanity.report import strips
from sanity.report.figures import explained
from sanity.report.looks import REACH, WORDS
from sanity.report.manifest import facts, notes, provenance, rerun
from sanity.report.runs import StoredRun, gist, ranked
from sanity.report.strips import Maps, Stored, coloured, lack, shrunk, unsigned

SIDE = 96


def boards(runs: Sequence[StoredRun], board: pd.DataFrame) -> list[dict[str, Any]]:
    """Tables of verdicts: rows methods; columns similarities for one run, else runs, a table a similarity."""
    tables = []
    by = ["order"] if len(runs) == 1 else ["order", "similarity"]
    for _, part in board.groupby(by, sort=False):
        column = "similarity" if len(runs) == 1 else "run"
        names = list(part[column].unique())
        cells = {(row.method, getattr(row, column)): row for row in part.itertuples()}
        tables.append(
            {
                "order": part["order"].iloc[0],
                "similarity": "" if len(runs) == 1 else part["similarity"].iloc[0],
                "column": column,
                "columns": [(name, _key(runs, column, name)) for name in names],
                "rows": [(m, [(_key(runs, column, n), cells.get((m, n))) for n in names]) for m in ranked(part)],
            }
        )
    return tables


def _key(runs: Sequence[StoredRun], column: str, name: str) -> str:
    """Value of the filter's attribute: runs go by their number."""
    return str([run.label for run in runs].index(name)) if column == "run" else name


def view(number: int, run: StoredRun, board: pd.DataFrame, kept: int) -> dict[str, Any]:
    """One run, as the template shows it; kept: pictures whose own scores the page holds."""
    return {
        "number": number,
        "label": run.label,
        "gist": gist(board),
        "facts": facts(run.header, run.scores),
        "provenance": provenance(run.header),
        "notes": notes(run.header, run.scores),
        "verdicts": list(board.itertuples()),
        "charts": list(_charts(run)),
        "strips": list(_strips(run)),
        "unscored": list(run.unscored.rename(columns={"count": "lacking"}).itertuples()),
        "untouched": run.header.get("untouched_parameters"),
        "unchanged": run.header.get("unchanged_parameters"),
        "stages": run.header.get("stages") or {},
        "manifest": json.dumps(run.header, indent=1, ensure_ascii=False),
        "rerun": rerun(run.header),
        "kept": kept,
        "images": images_in(run.scores),
    }


def _charts(run: StoredRun) -> Iterator[dict[str, Any]]:
    for (order, similarity), part in run.summary.groupby(["order", "similarity"], sort=False):
        stages = dict(sorted(set(zip(part["stage_index"], part["stage"], strict=True))))
        cells = {(row.method, row.stage_index): row for row in part.itertuples()}
        yield {
            "order": order,
            "similarity": similarity,
            "words": WORDS.get(str(similarity), str(similarity)).rstrip(","),
            "reach": REACH.get(str(order), f"stage ({order})"),
            "stages": list(stages.values()),
            "rows": [(m, [cells.get((m, i)) for i in stages]) for m in part["method"].unique()],
        }


def _strips(run: StoredRun) -> Iterator[dict[str, Any]]:
    path = run.folder / "strips.npz"
    if not path.exists():
        return
    classes, seed = explained(run.folder, run.scores), run.scores["seed"].iloc[0]
    first = run.scores[run.scores["seed"] == seed]
    values = first.set_index(["order", "image", "method", "stage_index", "similarity"])["value"].to_dict()
    similarities = list(run.scores["similarity"].unique())
    answers = _answers(run, seed)
    for order, image in strips.stored(path):
        found = strips.read(path, order, image)
        places = range(len(found.stages))
        yield {
            "order": order,
            "image": image,
            "seed": seed,
            "explained": classes.get((order, image), ""),
            "picture": _uri(found.picture) if found.picture is not None else "",
            "stages": found.stages,
            "answers": [answers.get((order, image, i)) for i in places],
            "rows": [
                (
                    method,
                    list(
                        zip(
                            _cells(found, method),
                            [[(s, values.get((order, image, method, i, s))) for s in similarities] for i in places],
                            strict=True,
                        )
                    ),
                )
                for method in found.maps
            ],
        }


def _answers(run: StoredRun, seed: int) -> Mapping[tuple[str, str, int], Any]:
    """What the network says of each picture at each stage, where the run kept it."""
    path = run.folder / "predictions.parquet"
    if not path.exists():
        return {}
    seen = read_rows(path, Prediction)
    seen = seen[seen["seed"] == seed]
    columns = ["order", "image", "stage_index"]
    keys = seen[columns].itertuples(index=False, name=None)
    return dict(zip(keys, seen.itertuples(), strict=True))


def _cells(found: Stored, method: str) -> Iterator[tuple[str, str]]:
    """Data URI of each stage's map, or why there is none."""
    stack = found.maps[method]
    grey = unsigned(stack)
    for scaled in stack:
        why = lack(scaled)
        yield ("", why) if why else (_uri(coloured(scaled, grey), _size(scaled)), "")


def _size(scaled: Maps) -> tuple[int, int]:
    height, width = scaled.shape
    ratio = min(1.0, SIDE / min(height, width))
    return round(width * ratio), round(height * ratio)


def _uri(pixels: Any, size: tuple[int, int] | None = None) -> str:
    """PNG as a data URI, 64 colours chosen for it."""
    size = size or _size(pixels[..., 0])
    small = Image.fromarray(shrunk(np.asarray(pixels), size, levels=256))
    stream = io.BytesIO()
    small.quantize(64, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
