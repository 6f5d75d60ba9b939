"""Figures for papers: curves and strips as PDF and SVG at one and two column widths, their fonts embedded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sanity.records import atomically, write_text
from sanity.report import strips
from sanity.report.curves import caption, legend_name, plot, reach
from sanity.report.figures import any_script, explained, stems
from sanity.report.looks import SHORT, safe
from sanity.report.runs import StoredRun
from sanity.report.strips import SCALE_RULE, Maps, Stored, coloured, lack, shrunk, unsigned

WIDTHS = {"1col": 3.3, "2col": 6.9}
"""Inches."""
MOST_STAGES = {"1col": 6, "2col": 24}
DENSITY, SIZE, SMALL, GAP = 300, 7.0, 6.0, 0.015
STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,  # TrueType: publishers refuse Type 3
    "svg.fonttype": "path",
    "svg.hashsalt": "sanity",
    "font.family": "DejaVu Sans",
    "font.size": SIZE,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "hatch.linewidth": 0.4,
}
Job = tuple[str, Callable[[], Figure], str]


def publish(
    runs: Sequence[StoredRun], folder: Path, on_progress: Callable[[int, int], None] | None = None
) -> list[Path]:
    """Write every run's figures and `captions.txt` into a folder: the files.

    `<run>_curve_<order>_<similarity>`, `<run>_curves_<order>` (all similarities side by side) and
    `<run>_strip_<order>_<image>`, each `_1col` (3.3 in) and `_2col` (6.9 in; side by side only so), as .pdf
    and .svg. Text is 6 to 7 points at that size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for run in runs for job in _jobs(run)]
    files, captions = [], []
    with any_script(), mpl.rc_context(STYLE):
        for done, (stem, make, words) in enumerate(jobs, 1):
            figure = make()
            for kind in ("pdf", "svg"):
                files.append(folder / f"{stem}.{kind}")
                dates = {"CreationDate": None} if kind == "pdf" else {"Date": None}
                how: dict[str, Any] = {"format": kind, "metadata": {"Creator": None, **dates}, "dpi": DENSITY}
                atomically(files[-1], partial(figure.savefig, **how))
            captions.append(f"{stem}: {words}\n")
            if on_progress:
                on_progress(done, len(jobs))
    files.append(folder / "captions.txt")
    write_text(files[-1], "\n".join(captions))
    return files


def _jobs(run: StoredRun) -> Iterator[Job]:
    yield from _curves(run)
    yield from _strips(run)


def _curves(run: StoredRun) -> Iterator[Job]:
    for order, part in run.summary.groupby("order", sort=False):
        similarities = list(part["similarity"].unique())
        words = f"{caption(run.scores, run.label, str(order))}; stages: {reach(str(order))}. Dotted and dashed grey: "
        words += "controls."
        for similarity in similarities:
            for name in WIDTHS:
                stem = f"{safe(run.label)}_curve_{safe(str(order))}_{safe(similarity)}_{name}"
                yield stem, partial(curve, run.summary, str(order), similarity, name), f"{similarity}. {words}"
        if len(similarities) > 1:
            stem = f"{safe(run.label)}_curves_{safe(str(order))}_2col"
            yield stem, partial(panels, run.summary, str(order), similarities), words


def curve(summary: pd.DataFrame, order: str, similarity: str, name: str) -> Figure:
    """One similarity's curves; the legend stands below in one column, on the right in two."""
    methods = summary["method"].nunique()
    below = 0.3 + 0.13 * -(-methods // 2) if name == "1col" else 0.1
    height = (1.8 if name == "1col" else 2.0) + 0.75 * _longest(summary, order) + below
    figure = Figure(figsize=(WIDTHS[name], height), layout="constrained")
    axes = figure.add_subplot()
    plot(axes, summary, order, similarity, SMALL)
    _titles(axes, order, similarity)
    place = {"loc": "outside lower center", "ncols": 2} if name == "1col" else {"loc": "outside right upper"}
    _legend(figure, axes, **place)
    return figure


def _longest(summary: pd.DataFrame, order: str) -> float:
    """Length of an order's longest stage name in inches."""
    return max(_extent(str(name), SMALL)[0] for name in summary["stage"][summary["order"] == order].unique())


def panels(summary: pd.DataFrame, order: str, similarities: Sequence[str]) -> Figure:
    """All similarities side by side under one legend, at most 4 in a row, 2 if stages are many; two columns wide."""
    part = summary[(summary["order"] == order) & summary["similarity"].isin(similarities)]
    most = (4 if len(similarities) % 3 else 3) if part["stage_index"].nunique() <= 12 else 2
    across = min(len(similarities), most)
    rows = -(-len(similarities) // across)
    height = rows * (1.45 + _longest(summary, order)) + 0.35 + 0.13 * -(-part["method"].nunique() // 4)
    figure = Figure(figsize=(WIDTHS["2col"], height), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False)
    used = list(grid.flat)[: len(similarities)]
    for axes, similarity in zip(used, similarities, strict=True):
        plot(axes, summary, order, similarity, SMALL)
        axes.set_title(SHORT.get(similarity, similarity), fontsize=SIZE, parse_math=False)
        axes.set_xticks(axes.get_xticks(), axes.get_xticklabels(), rotation=90, ha="center", rotation_mode="default")
    limits = np.array([axes.get_ylim() for axes in used])
    for place, axes in enumerate(grid.flat):
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
        axes.tick_params(labelleft=place % across == 0)
        axes.set_visible(axes in used)
    figure.supylabel("similarity", fontsize=SIZE)
    figure.supxlabel(reach(order), fontsize=SIZE)
    names = [legend_name(own) for _, own in part.groupby("method", sort=False)]
    _legend(figure, grid.flat[0], names, loc="outside upper center", ncols=4)
    return figure


def _titles(axes: Axes, order: str, similarity: str) -> None:
    axes.set_xlabel(reach(order), fontsize=SIZE)
    axes.set_ylabel(SHORT.get(similarity, similarity), fontsize=SIZE, parse_math=False)


def _legend(figure: Figure, axes: Axes, names: Sequence[str] | None = None, **how: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, names or labels, fontsize=SMALL, frameon=False, handlelength=3.2, columnspacing=1.2, **how)


def _strips(run: StoredRun) -> Iterator[Job]:
    if not (path := run.folder / "strips.npz").exists():
        return
    classes = explained(run.folder, run.scores)
    for (order, image), stem in stems(strips.stored(path)).items():
        words = f"{run.label}, {order} randomization (each column: {reach(order)}); image {image}"
        words += f"{classes.get((order, image), '')}. {SCALE_RULE}"
        for name in WIDTHS:
            yield f"{safe(run.label)}_{stem}_{name}", partial(_stored, path, order, image, name), words


def _stored(path: Path, order: str, image: str, name: str) -> Figure:
    return strip(strips.read(path, order, image), name)


def strip(found: Stored, name: str) -> Figure:
    """One image's maps, a row a method; in one column at most 6 stages, evenly spread, the last one among them."""
    kept = spread(len(found.stages), MOST_STAGES[name])
    maps = {method: stack[kept] for method, stack in found.maps.items()}
    heads = ["image"] * (found.picture is not None) + [found.stages[i] for i in kept]
    sheet = _Sheet(WIDTHS[name], list(maps), heads, next(iter(maps.values())).shape[1:])
    for row, stack in enumerate(maps.values()):
        pictures = [found.picture] if found.picture is not None else []
        cells = [*pictures, *(_cell(scaled, unsigned(stack)) for scaled in stack)]
        for column, cell in enumerate(cells):
            sheet.fill(row, column, cell)
    return sheet.finish(sorted({unsigned(stack) for stack in maps.values()}))


def _cell(scaled: Maps, grey: bool) -> Any:
    return coloured(scaled, grey) if lack(scaled) is None else lack(scaled)


def spread(stages: int, most: int) -> list[int]:
    """Places of at most `most` stages: all, or the trained one and an even choice that ends with the last."""
    if stages <= most:
        return list(range(stages))
    return [0, *(int(i) for i in np.linspace(1, stages - 1, most - 1).round())]


class _Sheet:
    """A page in inches from its top left corner; all pictures are one image of 300 dots an inch."""

    def __init__(self, width: float, rows: list[str], columns: list[str], shape: Sequence[int]) -> None:
        self.rows = [_broken(name) for name in rows]
        self.columns, self.width = columns, width
        self.left = max(_extent(name, SMALL)[0] for name in self.rows) + 0.07
        heads = [_extent(name, SMALL, 45) for name in columns]
        slack = max(0.02, max(x - 0.2 for x, _ in heads[-2:]))
        side = (width - self.left - slack) / len(columns) - GAP
        self.cell = (side, side * shape[0] / shape[1])
        self.top = max(y for _, y in heads) + 0.06
        self.bottom = self.top + len(rows) * (self.cell[1] + GAP)
        self.height = self.bottom + 0.3
        self.figure = Figure(figsize=(width, self.height))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(self.height, 0))
        self.axes.set_axis_off()
        self.dots = (round(self.cell[0] * DENSITY), round(self.cell[1] * DENSITY))
        tall, wide = (round(x * DENSITY) for x in (self.bottom - self.top, len(columns) * (side + GAP)))
        self.canvas = np.full((tall + 2, wide + 2, 3), 255, np.uint8)
        self._names()

    def _names(self) -> None:
        for row, name in enumerate(self.rows):
            y = self.top + row * (self.cell[1] + GAP) + self.cell[1] / 2
            self._text(self.left - 0.05, y, name, ha="right", va="center", linespacing=1.15)
        for column, name in enumerate(self.columns):
            x = self.left + column * (self.cell[0] + GAP) + self.cell[0] / 2 - 0.04
            self._text(x, self.top - 0.03, name, rotation=45, rotation_mode="anchor", ha="left", va="baseline")

    def _text(self, x: float, y: float, text: str, size: float = SMALL, **how: Any) -> None:
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **how)

    def fill(self, row: int, column: int, cell: Any) -> None:
        """Show pixels (H, W, 3), or hatch the cell and say why there are none."""
        x, y = column * (self.cell[0] + GAP), row * (self.cell[1] + GAP)
        how: dict[str, Any] = {"facecolor": "none", "edgecolor": "#999999", "linewidth": 0.3, "zorder": 3}
        if isinstance(cell, str):
            middle = (self.left + x + self.cell[0] / 2, self.top + y + self.cell[1] / 2)
            box = {"fc": "white", "ec": "none", "pad": 0.6}
            self._text(*middle, {"constant": "const."}.get(cell, cell), 5, ha="center", va="center", zorder=4, bbox=box)
            how |= {"facecolor": "#eeeeee", "hatch": "/////", "edgecolor": "#aaaaaa"}
        else:
            i, j = round(y * DENSITY), round(x * DENSITY)
            self.canvas[i : i + self.dots[1], j : j + self.dots[0]] = shrunk(cell, self.dots)
        self.axes.add_patch(Rectangle((self.left + x, self.top + y), *self.cell, **how))

    def finish(self, bars: Sequence[bool]) -> Figure:
        """Lay the pictures on the page and the colour bars below them."""
        tall, wide = self.canvas.shape[0] / DENSITY, self.canvas.shape[1] / DENSITY
        box = (self.left, self.left + wide, self.top + tall, self.top)
        self.axes.imshow(self.canvas, extent=box, interpolation="none", aspect="auto", zorder=1)
        for place, grey in enumerate(bars):
            x = self.left + 0.1 + place * 1.1
            at = (x / self.width, 1 - (self.bottom + 0.11) / self.height, 0.8 / self.width, 0.07 / self.height)
            ticks = [0, 1] if grey else [-1, 0, 1]
            axes = self.figure.add_axes(at)
            bar = self.figure.colorbar(strips.scale(grey), cax=axes, ticks=ticks, orientation="horizontal")
            bar.ax.tick_params(labelsize=SMALL, length=1.5, pad=1)
            bar.outline.set_linewidth(0.4)
        return self.figure


def _broken(name: str) -> str:
    """Name in two lines if it is long, broken at the underscore nearest its middle."""
    places = [i + 1 for i, c in enumerate(name) if c in "_:." and 2 < i < len(name) - 2]
    if len(name) < 13 or not places:
        return name
    cut = min(places, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:cut]}\n{name[cut:]}"


def _extent(text: str, size: float, rotation: float = 0) -> tuple[float, float]:
    """Width and height of a text in inches, as it is without the hinting of coarse screens."""
    x, y = strips.extent(text, size, rotation, dpi=600)
    return x / 600, y / 600
