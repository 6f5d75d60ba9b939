"""One self-contained page of stored runs: nothing is loaded from elsewhere, its policy forbids it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sanity.report.looks import REACH, SHORT, SYMBOLS, looks, named
from sanity.report.manifest import RULE, citations
from sanity.report.runs import StoredRun, differences, leaderboard
from sanity.report.tables import BEST, LEAD, TITLE, between
from sanity.report.views import boards, view
from sanity.summary import UNORDERED

MOST_VALUES = 300_000


def html(runs: Sequence[StoredRun]) -> str:
    """Runs -> an HTML page. Scores of single pictures are kept for as many pictures as stay below 300 000 numbers."""
    environment = Environment(
        loader=PackageLoader("sanity.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"named": _named, "short": lambda s: SHORT.get(s, s), "number": _number, "between": between}
    board = leaderboard(runs)
    style, script = (_source(name) for name in ("report.css", "report.js"))
    text: str = environment.get_template("report.html.j2").render(
        title=TITLE,
        lead=LEAD,
        rule=RULE,
        best=BEST,
        symbols=SYMBOLS,
        style=style,
        script=script,
        policy=_policy(style, script),
        runs=[view(number, run, board[board["run"] == run.label], len(_kept(run))) for number, run in enumerate(runs)],
        boards=boards(runs, board),
        unlike=differences(runs),
        choices=_choices(runs),
        looks=_looks(runs),
        data=_json({"runs": [_numbers(run) for run in runs], "looks": _looks(runs)}),
        cite=citations(runs[-1].header),
    )
    return text


def _source(name: str) -> Markup:
    return Markup(files("sanity.report").joinpath("templates", name).read_text(encoding="utf-8"))


def _policy(style: str, script: str) -> str:
    """Content security policy: only this very style and script, pictures only from within the page."""

    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest(style)}'; script-src 'sha256-{digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: object) -> Markup:
    """JSON that may stand inside <script>."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _named(method: str) -> Markup:
    """Name that may break after its underscores."""
    return Markup(escape(named(method)).replace("_", Markup("_<wbr>")))


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:z.2f}"


def _looks(runs: Sequence[StoredRun]) -> dict[str, dict[str, Any]]:
    return {
        method: {"colour": look.colour, "marker": look.marker, "dashes": list(look.dashes), "control": look.control}
        for method, look in looks(_union(runs, "method")).items()
    }


def _union(runs: Sequence[StoredRun], column: str) -> list[str]:
    return list(dict.fromkeys(str(value) for run in runs for value in run.scores[column].unique()))


def _choices(runs: Sequence[StoredRun]) -> dict[str, list[str]]:
    """What one can filter by."""
    kept = dict.fromkeys(image for run in runs for image in _kept(run))
    names = ("order", "similarity", "method")
    return {name: _union(runs, name) for name in names} | {"image": list(kept)}


def _kept(run: StoredRun) -> list[str]:
    """Pictures whose own scores the page holds."""
    images = list(run.scores["image"].unique())
    each = len(run.summary)
    return [str(image) for image in images[: max(1, MOST_VALUES // each)]]


def _numbers(run: StoredRun) -> dict[str, Any]:
    """What the curves are drawn from: [mean, low, high, n, n_nan] and each picture's mean over seeds, by stage."""
    kept = _kept(run)
    ok = run.scores[(run.scores["status"] == "ok") & run.scores["image"].isin(kept)]
    by = ["order", "similarity", "method", "image", "stage_index"]
    single = ok.groupby(by, sort=False)["value"].mean().to_dict()
    found: dict[str, Any] = {"label": run.label, "images": kept, "orders": {}}
    for order, part in run.summary.groupby("order", sort=False):
        stages = dict(sorted(set(zip(part["stage_index"], part["stage"], strict=True))))
        found["orders"][order] = {
            "reach": REACH.get(str(order), f"stage ({order})"),
            "joined": order not in UNORDERED,
            "stages": list(stages.values()),
            "mean": _nested(part, list(stages)),
            "image": {
                similarity: {
                    method: {
                        image: [_short(single.get((order, similarity, method, image, i))) for i in stages]
                        for image in kept
                    }
                    for method in own["method"].unique()
                }
                for similarity, own in part.groupby("similarity", sort=False)
            },
        }
    return found


def _nested(part: pd.DataFrame, stages: list[int]) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {}
    for (similarity, method), own in part.groupby(["similarity", "method"], sort=False):
        cells = {row.stage_index: row for row in own.itertuples()}
        found.setdefault(str(similarity), {})[str(method)] = [_point(cells.get(i)) for i in stages]
    return found


def _point(row: Any) -> list[float | int | None] | None:
    return None if row is None else [*map(_short, (row.mean, row.low, row.high)), int(row.n), int(row.n_nan)]


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 3)
