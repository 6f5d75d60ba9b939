"""Tables and curves of the deletion evaluations, from their rows, without torch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isnan, sqrt
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sanity.report.looks import looks, named, plural
from sanity.summary import generator, interval

KEY = ["method", "evaluation", "null", "level"]
COLUMNS = [*KEY, "mean", "low", "high", "n", "n_unscored", "unscored"]
CURVED, OVER_LEVELS = "representativeness", "_over_levels"
SHARES = ("pointing", "recovery")
ALPHA = ("alpha: the larger, the more goes", "normalised score")
EACH = "mean [95 % interval], images scored of all where not all are"
Z = 1.959963984540054


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of measures -> mean over images with its 95 % interval, for each method, evaluation, null and level.

    The interval is `summary.interval`'s bootstrap over images; for shares (0 or 1 an image) Wilson's, as no bootstrap
    sees doubt in ten hits of ten. n scored images; n_unscored, and `unscored` says why. Nothing scored: NaN.
    Representativeness is told over all levels, too: an image's mean over those that have a score.
    """
    cells = []
    rows = pd.concat([rows, _over_levels(rows[rows["evaluation"].str.startswith(CURVED)])])
    for key, group in rows.groupby(KEY, sort=False, dropna=False):
        group = group.sort_values("image")
        ok = group["status"] == "ok"
        value = group.loc[ok, "value"].to_numpy(np.float64)
        why = group.loc[~ok, "status"].value_counts()
        words = "; ".join(f"{number} {reason}" for reason, number in sorted(why.items()))
        mean = float(value.mean()) if len(value) else float("nan")
        if str(key[1]).startswith(SHARES):
            low, high = wilson(value.sum(), len(value))
        else:
            low, high = interval(value[None], generator(*key))
        cells.append((*key, mean, low, high, len(value), int((~ok).sum()), words))
    return pd.DataFrame(cells, columns=COLUMNS)


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share, hits of n; (NaN, NaN) for none, after Wilson 1927."""
    if not n:
        return float("nan"), float("nan")
    share, wide = hits / n, Z**2 / n
    middle, half = share + wide / 2, Z * sqrt(share * (1 - share) / n + wide / (4 * n))
    return max(0.0, (middle - half) / (1 + wide)), min(1.0, (middle + half) / (1 + wide))


def tables(summary: pd.DataFrame) -> list[tuple[str, list[list[str]]]]:
    """Title and lines, the first of them names, of each table: rows methods; of curves the areas alone."""
    parts = [
        ("Smallest box that suppresses the class, pixels", "minimality", lambda r: f"{r.level:.0%}", "{:.0f}"),
        ("Area under the curve: deletion, small is good; insertion, large", "_area", _area, "{:.3f}"),
        ("Representativeness: normalised score, mean over alphas", OVER_LEVELS, _null, "{:.2f}"),
        ("Label as on the clean picture, most salient share blurred", "recovery", _share, "{:.2f}"),
        ("Pointing game: share of hits", "pointing", lambda r: "hits", "{:.2f}"),
    ]
    found = []
    for title, kind, column, form in parts:
        own = summary[summary["evaluation"].str.contains(kind, regex=False)]
        if len(own):
            found.append((title, _grid(own, column, form)))
    return found


def _area(row: Any) -> str:
    return f"{row.evaluation.removesuffix('_area')} ({row.null})"


def _null(row: Any) -> str:
    return str(row.null) + (" (whole)" if "whole" in row.evaluation else "")


def _share(row: Any) -> str:
    return f"{row.evaluation.removeprefix('recovery_')} {row.level:.0%}"


def _over_levels(rows: pd.DataFrame) -> pd.DataFrame:
    """A row an image, method, evaluation and null: the mean over levels; where none has a score, the first's reason."""
    ok = rows["status"] == "ok"
    keys = ["image", "method", "evaluation", "null"]
    found = (
        rows.assign(value=rows["value"].where(ok), status=rows["status"].where(~ok))
        .groupby(keys, sort=False, as_index=False)
        .agg(value=("value", "mean"), status=("status", "first"))
    )
    scored = found["value"].notna()
    return found.assign(
        status=found["status"].where(~scored, "ok"), level=np.nan, evaluation=found["evaluation"] + OVER_LEVELS
    )


def _grid(own: pd.DataFrame, column: Any, form: str) -> list[list[str]]:
    cells = {(row.method, column(row)): _cell(row, form) for row in own.itertuples()}
    names = list(dict.fromkeys(name for _, name in cells))
    methods = list(dict.fromkeys(method for method, _ in cells))
    return [["method", *names], *([m, *(cells.get((m, name), "-") for name in names)] for m in methods)]


def _cell(row: Any, form: str) -> str:
    total = row.n + row.n_unscored
    text = "n/a" if isnan(row.mean) else form.format(row.mean)
    if not isnan(row.low):
        text += f" [{form.format(row.low)}, {form.format(row.high)}]"
    return text + (f" {row.n}/{total}" if row.n_unscored else "")


def terminal_tables(summary: pd.DataFrame, width: int = 100) -> str:
    """Tables for a terminal, broken into blocks of columns where they would be wider than `width`."""
    blocks = [f"{EACH}\n"]
    for title, lines in tables(summary):
        blocks.append(title)
        sizes = [max(len(line[i]) for line in lines) + 2 for i in range(len(lines[0]))]
        for group in _groups(sizes, width):
            blocks += ["".join(line[i].ljust(sizes[i]) for i in (0, *group)).rstrip() for line in lines]
        blocks.append("")
    reasons = summary.loc[summary["n_unscored"] > 0, "unscored"]
    if len(reasons):
        blocks.append(
            f"{len(reasons)} of {len(summary)} means lack images; summary.csv says why, e.g. {reasons.iloc[0]}"
        )
    return "\n".join(blocks)


def _groups(sizes: Sequence[int], width: int) -> list[list[int]]:
    groups: list[list[int]] = [[]]
    for i in range(1, len(sizes)):
        if groups[-1] and sizes[0] + sum(sizes[j] for j in groups[-1]) + sizes[i] > width:
            groups.append([])
        groups[-1].append(i)
    return groups


def to_markdown(summary: pd.DataFrame) -> str:
    """The same tables as Markdown."""
    blocks = []
    for title, lines in tables(summary):
        body = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body)
        blocks.append(f"## {title}\n\n{EACH}\n\n{text}\n")
    return "\n".join(blocks)


def figures(summary: pd.DataFrame, title: str) -> dict[str, Figure]:
    """Figures by name: insertion and deletion curves; representativeness, a panel for each null."""
    found = {}
    for name, kinds, labels in (
        ("curves", ("deletion", "insertion"), ("most salient share", "probability of the class")),
        ("representativeness", ("representativeness",), ALPHA),
        ("representativeness_whole", ("representativeness_whole",), ALPHA),
    ):
        own = summary[summary["evaluation"].isin(kinds)]
        if own["n"].any():
            found[name] = _figure(own, labels, title)
    return found


def _figure(own: pd.DataFrame, labels: tuple[str, str], title: str) -> Figure:
    panels = [(str(e), str(n)) for e, n in own[["evaluation", "null"]].drop_duplicates().to_numpy()]
    figure = Figure(figsize=(3.6 * len(panels) + 2.6, 4.2), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for place, (evaluation, null) in zip(axes, panels, strict=True):
        part = own[(own["evaluation"] == evaluation) & (own["null"] == null)]
        _lines(place, part, list(own["method"].unique()))
        place.set_title(f"{evaluation}, {null}", fontsize=10, loc="left")
        place.set_xlabel(f"{labels[0]}{_deed(evaluation)}")
    axes[0].set_ylabel(labels[1])
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8.5, frameon=False, handlelength=3.5)
    words = "\n".join(textwrap.wrap(title, 32 * len(panels) + 20))
    figure.suptitle(words, x=0.01, ha="left", fontsize=10.5, parse_math=False)
    return figure


def _deed(evaluation: str) -> str:
    return {"deletion": " deleted", "insertion": " shown"}.get(evaluation, "")


def _lines(axes: Axes, part: pd.DataFrame, methods: Sequence[str]) -> None:
    for method, look in looks(methods).items():
        own = part[part["method"] == method].sort_values("level")
        lacks = int(own["n_unscored"].max()) if len(own) else 0
        label = named(method).replace("$", r"\$") + (f" ({lacks} unscored)" if lacks else "")
        axes.fill_between(own["level"], own["low"], own["high"], color=look.colour, alpha=0.15, linewidth=0)
        dashes = (0, look.dashes) if look.dashes else "-"
        axes.plot(
            own["level"], own["mean"], color=look.colour, linestyle=dashes, marker=look.marker, markevery=4,
            markersize=4.5, mfc="white" if look.control else look.colour, linewidth=1.6, label=label,
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.02), max(high, 1.02))
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
    axes.spines[["top", "right"]].set_visible(False)


def caption(rows: pd.DataFrame, name: str) -> str:
    """What a figure is a mean of, in words."""
    return f"{name}: mean of {plural(rows['image'].nunique(), 'image')} (bands: its 95 % interval)"
