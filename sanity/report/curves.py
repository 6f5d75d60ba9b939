"""Curves: mean similarity against stage, a line a method, with the band of its interval."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sanity.parts import images_in
from sanity.report.looks import REACH, WORDS, Look, looks, named, plural
from sanity.summary import UNORDERED


def curve(summary: pd.DataFrame, order: str, similarity: str, *, title: str = "") -> Figure:
    """Draw mean similarity against stage, a line a method, with the band of its 95 % interval.

    summary: as `summarize` gives it, of one model. Controls are grey. An independent order's stages do not
    follow from each other: points with error bars, not joined. NaN means leave a gap, and the legend counts
    the scores that are NaN. The axis always shows 0 and 1. Raises ValueError if nothing is there to draw.
    """
    figure = Figure(figsize=(11, 5.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    plot(axes, summary, order, similarity)
    axes.set_xlabel(reach(order))
    axes.set_ylabel(f"{WORDS.get(similarity, similarity)}\nwith the trained network's map")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9.5, frameon=False, handlelength=4)
    figure.suptitle("\n".join(textwrap.wrap(title, 105)), x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def plot(
    axes: Axes,
    summary: pd.DataFrame,
    order: str,
    similarity: str,
    size: float = 9.5,
    methods: Iterable[str] | None = None,
) -> None:
    """Draw one order and similarity of a summary on axes, without axis titles and legend; size: of names, in points.

    methods: those of all axes that share one legend, so that each looks the same on all of them.

    Raises ValueError if nothing is there to draw.
    """
    part = summary[(summary["order"] == order) & (summary["similarity"] == similarity)]
    if part.empty:
        raise ValueError(f"no scores for order {order!r} and similarity {similarity!r}")
    stages = part.drop_duplicates("stage_index").sort_values("stage_index")
    places = {int(index): place for place, index in enumerate(stages["stage_index"])}
    known = set(part["method"])
    every = looks(part["method"].unique() if methods is None else methods)
    found = {method: look for method, look in every.items() if method in known}
    for turn, (method, look) in enumerate(found.items()):
        own = part[part["method"] == method].sort_values("stage_index")
        x = np.array([places[int(index)] for index in own["stage_index"]], np.float64)
        if order in UNORDERED:
            _points(axes, x + 0.72 * ((turn + 0.5) / len(found) - 0.5), own, look, size / 9.5)
        else:
            _line(axes, x, own, look, size / 9.5)
    _furnish(axes, list(stages["stage"]), order, size)


def reach(order: str) -> str:
    """What a stage means in an order."""
    return REACH.get(order, f"stage ({order})")


def plain(text: str) -> str:
    """Text that matplotlib shall not read as a formula."""
    return text.replace("$", r"\$")


def _style(look: Look) -> dict[str, Any]:
    face = "white" if look.control else look.colour
    return {"color": look.colour, "marker": look.marker, "mfc": face, "zorder": 1.5 if look.control else 2}


def legend_name(own: pd.DataFrame) -> str:
    """Name of a method, and how many of its scores are NaN: least to most, where similarities differ."""
    counts = own.groupby("similarity")["n_nan"].sum()
    low, high = int(counts.min()), int(counts.max())
    lacks = f" ({high if low == high else f'{low} to {high}'} NaN)" if high else ""
    return "\n".join(textwrap.wrap(plain(named(str(own["method"].iloc[0])) + lacks), 34))


def _line(axes: Axes, x: NDArray[np.float64], own: pd.DataFrame, look: Look, size: float) -> None:
    axes.fill_between(x, own["low"], own["high"], color=look.colour, alpha=0.15, linewidth=0)
    style = _style(look) | ({"marker": ""} if look.control else {"mec": "white", "mew": 0.8 * size})
    style["linestyle"] = (0, look.dashes) if look.dashes else "-"
    axes.plot(x, own["mean"], label=legend_name(own), linewidth=1.6 * size, markersize=5.5 * size, **style)


def _points(axes: Axes, x: NDArray[np.float64], own: pd.DataFrame, look: Look, size: float) -> None:
    ends = np.abs(own[["low", "high"]].to_numpy().T - own["mean"].to_numpy())
    style = _style(look) | {"linestyle": "none", "elinewidth": 1.1 * size, "mew": size}
    axes.errorbar(x, own["mean"], np.nan_to_num(ends), label=legend_name(own), markersize=4.4 * size, **style)


def _furnish(axes: Axes, stages: list[str], order: str, size: float) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, 1.05))
    axes.set_xlim(-0.5, len(stages) - 0.5)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
    if order in UNORDERED:
        for place in range(0, len(stages), 2):
            axes.axvspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=0)
    how: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": size}
    axes.set_xticks(range(len(stages)), [plain(name) for name in stages], **how)
    axes.spines[["top", "right"]].set_visible(False)


def caption(scores: pd.DataFrame, name: str, order: str) -> str:
    """What a curve is a mean of, in words."""
    images, seeds = plural(images_in(scores), "image"), plural(scores["seed"].nunique(), "seed")
    kind = "bars" if order in UNORDERED else "bands"
    return f"{name}, {order} randomization: mean of {images}, {seeds} ({kind}: its 95 % interval)"
