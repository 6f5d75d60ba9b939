"""Pictures from a finished run: strips of maps, stage after stage, and curves of their similarity."""

from __future__ import annotations

import json
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from sanity.summary import UNORDERED, summarize

Maps = NDArray[np.int8]
Pixels = NDArray[np.uint8]

MISSING = -128
SCALE_RULE = (
    "Each map: channels summed, divided by the 99th percentile of its absolute value, clipped to [-1, 1]; "
    "colours averaged down to the cell. Red and blue: signed; grey: nowhere negative; "
    "hatched: no map to show (constant, or not finite)."
)
REACH = {
    "cascading": "randomized from the output down to this stage",
    "independent": "stage randomized alone",
    "bottom_up": "randomized from the input up to this stage",
}
WORDS = {
    "ssim": "SSIM",
    "spearman": "rank correlation, signed,",
    "spearman_abs": "rank correlation of absolute values",
    "hog": "correlation of HOG descriptors",
}
CONTROLS = {"edges": (":", "s"), "random": ("--", "o")}
# Okabe and Ito 2008, told apart by colour-blind readers; without its yellow, too faint on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1.5, 1)))

CELL, GAP, PAD, DPI = 96, 4, 12, 100
SIGNED, UNSIGNED = "RdBu_r", "Greys"


def strip(maps: Mapping[str, Maps], stages: Sequence[str], picture: Pixels | None = None, *, title: str = "") -> Figure:
    """Draw one image's maps, a row a method: its picture, the trained map, then every stage.

    maps: method -> (S, H, W) int8, -127..127 standing for -1..1, all -128 where there is no map, the trained
    one first; stages: S names; picture (H', W', 3) uint8, its column left out without one. Signed maps are
    drawn in red and blue, white at zero; a method that is nowhere negative in greys. Constant and missing
    maps are hatched. A map's shorter side takes 96 pixels. Raises ValueError for shapes that do not fit.
    """
    if not maps:
        raise ValueError("no maps to draw")
    for method, stack in maps.items():
        if stack.ndim != 3 or len(stack) != len(stages):
            raise ValueError(f"maps of {method!r}: shape {stack.shape} for {len(stages)} stages")
    page = _Page(maps, list(stages), picture is not None, title)
    for row, stack in enumerate(maps.values()):
        cmap = colormaps[UNSIGNED if _unsigned(stack) else SIGNED]
        if picture is not None:
            page.show(row, 0, picture)
        for stage, scaled in enumerate(stack):
            column = stage + (picture is not None)
            if (lack := _lack(scaled)) is None:
                page.show(row, column, _coloured(scaled, cmap, _unsigned(stack)))
            else:
                page.hatch(row, column, lack)
    return page.finish()


def _lack(scaled: Maps) -> str | None:
    if scaled.max() == MISSING:
        return "n/a"
    return "constant" if scaled.min() == scaled.max() else None


def _unsigned(stack: Maps) -> bool:
    """Whether no map of a method is anywhere negative; missing ones do not count."""
    return bool((stack[stack.max((1, 2)) != MISSING] >= 0).all())


def _coloured(scaled: Maps, cmap: Any, unsigned: bool) -> Pixels:
    values = np.clip(scaled.astype(np.float64) / 127, -1, 1)
    return np.asarray(cmap(values if unsigned else (values + 1) / 2, bytes=True)[..., :3])


class _Page:
    """A sheet whose coordinates are pixels from its top left corner, so that every cell is drawn 1 : 1."""

    def __init__(self, maps: Mapping[str, Maps], stages: list[str], pictured: bool, title: str) -> None:
        height, width = next(iter(maps.values())).shape[1:]
        scale = CELL / min(height, width)
        self.cell: tuple[int, int] = (round(width * scale), round(height * scale))
        self.rows, self.columns = list(maps), ["original image"] * pictured + stages
        self.parted = pictured + 1  # a wider gap after the trained map
        bars = sorted({_unsigned(stack) for stack in maps.values()})
        heads = [_extent(name, 10, 45) for name in self.columns]
        self.left = PAD + max(_extent(name, 11)[0] for name in self.rows) + 8
        overhang = max(x + self._x(i) - self._x(len(heads)) for i, (x, _) in enumerate(heads)) + self.cell[0] // 2
        self.inner = self._x(len(self.columns)) - GAP - self.left
        right = max(len(bars) * 66 + 10, overhang) + PAD
        self.width = max(self.left + self.inner + right, 420)
        self.titles = _fold(title, 12, self.width - 2 * PAD)
        self.caption = _fold(SCALE_RULE, 9.5, self.width - 2 * PAD)
        self.top = PAD + _extent(self.titles, 12)[1] + 12 + max(y for _, y in heads) + 6
        self.inner_height = len(self.rows) * (self.cell[1] + GAP) - GAP
        self.height = self.top + self.inner_height + 12 + _extent(self.caption, 9.5)[1] + PAD
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        self.axes.set_axis_off()
        self.canvas = np.full((self.inner_height, self.inner, 3), 255, np.uint8)
        self._write(bars)

    def _x(self, column: int) -> int:
        return self.left + column * (self.cell[0] + GAP) + 2 * GAP * (column >= self.parted)

    def _y(self, row: int) -> int:
        return self.top + row * (self.cell[1] + GAP)

    def _write(self, bars: list[bool]) -> None:
        self._text(PAD, PAD, self.titles, 12, va="top")
        self._text(PAD, self.height - PAD, self.caption, 9.5, va="bottom", color="#333333")
        for row, name in enumerate(self.rows):
            self._text(self.left - 8, self._y(row) + self.cell[1] / 2, name, 11, ha="right", va="center")
        for column, name in enumerate(self.columns):
            at = (self._x(column) + self.cell[0] // 2, self.top - 6)
            self._text(*at, name, 10, rotation=45, rotation_mode="anchor", ha="left", va="baseline")
        for place, unsigned in enumerate(bars):
            self._bar(self.left + self.inner + 14 + 66 * place, unsigned)

    def _text(self, x: float, y: float, text: str, size: float, **how: Any) -> None:
        # names may hold a dollar sign, which would start a formula
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **how)

    def _bar(self, x: int, unsigned: bool) -> None:
        tall = min(self.inner_height, 3 * CELL)
        box = (x / self.width, 1 - (self.top + tall) / self.height, 14 / self.width, tall / self.height)
        scale = ScalarMappable(Normalize(0 if unsigned else -1, 1), UNSIGNED if unsigned else SIGNED)
        bar = self.figure.colorbar(scale, cax=self.figure.add_axes(box), ticks=[0, 1] if unsigned else [-1, 0, 1])
        bar.ax.tick_params(labelsize=9, length=2, pad=2)

    def show(self, row: int, column: int, pixels: Pixels) -> None:
        """Paste a picture, averaged down (or enlarged, pixels kept square) to the cell's size."""
        small = np.asarray(Image.fromarray(pixels).resize(self.cell, Image.Resampling.BOX))
        # 32 levels a channel, which the eye does not miss, halve the file of noisy maps
        y, x = self._y(row) - self.top, self._x(column) - self.left
        self.canvas[y : y + self.cell[1], x : x + self.cell[0]] = np.round(np.round(small / 255 * 31) / 31 * 255)
        self._frame(row, column)

    def hatch(self, row: int, column: int, why: str) -> None:
        """Fill a cell that has no map, and say why."""
        self._frame(row, column, facecolor="#eeeeee", hatch="////")
        middle = (self._x(column) + self.cell[0] / 2, self._y(row) + self.cell[1] / 2)
        self._text(*middle, why, 9, ha="center", va="center", zorder=4, bbox={"fc": "white", "ec": "none", "pad": 2})

    def _frame(self, row: int, column: int, **how: Any) -> None:
        style: dict[str, Any] = {
            "facecolor": "none",
            "edgecolor": "#999999",
            "linewidth": 0.6,
            "zorder": 3,
        } | how
        self.axes.add_patch(Rectangle((self._x(column), self._y(row)), *self.cell, **style))

    def finish(self) -> Figure:
        """Lay the collected cells on the sheet."""
        box = (self.left, self.left + self.inner, self.top + self.inner_height, self.top)
        self.axes.imshow(self.canvas, extent=box, interpolation="nearest", aspect="auto", zorder=1)
        return self.figure


def _extent(text: str, size: float, rotation: float = 0) -> tuple[int, int]:
    """Width and height of a text in pixels, rounded up."""
    figure = Figure(dpi=DPI)
    FigureCanvasAgg(figure)
    box = figure.text(0, 0, text or " ", fontsize=size, rotation=rotation, parse_math=False).get_window_extent()
    return int(np.ceil(box.width)), int(np.ceil(box.height))


def _fold(text: str, size: float, width: int) -> str:
    """Break lines that are wider than `width` pixels."""
    if "\n" in text:
        return "\n".join(_fold(line, size, width) for line in text.split("\n"))
    wide = _extent(text, size)[0]
    return "\n".join(textwrap.wrap(text, int(0.95 * len(text) * width / wide))) if wide > width else text


def curve(summary: pd.DataFrame, order: str, similarity: str, *, title: str = "") -> Figure:
    """Draw mean similarity against stage, a line a method, with the band of its 95 % interval.

    summary: as `summarize` gives it, of one model. Controls are grey. An independent order's stages do not
    follow from each other: points with error bars, not joined. NaN means leave a gap, and the legend counts
    the scores that are NaN. The axis always shows 0 and 1. Raises ValueError if nothing is there to draw.
    """
    part = summary[(summary["order"] == order) & (summary["similarity"] == similarity)]
    if part.empty:
        raise ValueError(f"no scores for order {order!r} and similarity {similarity!r}")
    figure = Figure(figsize=(11, 5.8), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    stages = part.drop_duplicates("stage_index").sort_values("stage_index")
    places = {int(index): place for place, index in enumerate(stages["stage_index"])}
    methods = list(part["method"].unique())
    for turn, (method, style) in enumerate(_styles(methods)):
        own = part[part["method"] == method].sort_values("stage_index")
        x = np.array([places[int(index)] for index in own["stage_index"]], np.float64)
        if order in UNORDERED:
            _points(axes, x + 0.72 * ((turn + 0.5) / len(methods) - 0.5), own, style)
        else:
            _line(axes, x, own, style)
    _furnish(axes, list(stages["stage"]), order, similarity)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9.5, frameon=False, handlelength=4)
    figure.suptitle("\n".join(textwrap.wrap(title, 105)), x=0.01, ha="left", fontsize=11, parse_math=False)
    return figure


def _styles(methods: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    looks = zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    for method in methods:
        if method in CONTROLS:
            line, symbol = CONTROLS[method]
            yield (
                method,
                {"color": "#777777", "marker": symbol, "linestyle": line, "mfc": "white", "zorder": 1.5},
            )
        else:
            colour, marker, dashes = next(looks)
            yield method, {"color": colour, "marker": marker, "linestyle": dashes, "mfc": colour, "zorder": 2}


def _label(own: pd.DataFrame) -> str:
    name, unscored = str(own["method"].iloc[0]), int(own["n_nan"].sum())
    name = name + (" (control)" if name in CONTROLS else "") + (f" ({unscored} NaN)" if unscored else "")
    return "\n".join(textwrap.wrap(name.replace("$", r"\$"), 34))


def _line(axes: Axes, x: NDArray[np.float64], own: pd.DataFrame, style: dict[str, Any]) -> None:
    axes.fill_between(x, own["low"], own["high"], color=style["color"], alpha=0.15, linewidth=0)
    style = style | ({"marker": ""} if own["method"].iloc[0] in CONTROLS else {"mec": "white"})
    axes.plot(x, own["mean"], label=_label(own), linewidth=1.6, markersize=5.5, **style)


def _points(axes: Axes, x: NDArray[np.float64], own: pd.DataFrame, style: dict[str, Any]) -> None:
    reach = np.abs(own[["low", "high"]].to_numpy().T - own["mean"].to_numpy())
    style = style | {"linestyle": "none"}
    axes.errorbar(x, own["mean"], np.nan_to_num(reach), label=_label(own), elinewidth=1.1, markersize=5, **style)


def _furnish(axes: Axes, stages: list[str], order: str, similarity: str) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.05), max(high, 1.05))
    axes.set_xlim(-0.5, len(stages) - 0.5)
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=1)
    if order in UNORDERED:
        for place in range(0, len(stages), 2):
            axes.axvspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=0)
    names = [name.replace("$", r"\$") for name in stages]
    axes.set_xticks(range(len(stages)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=9.5)
    axes.set_xlabel(REACH.get(order, f"stage ({order})"))
    axes.set_ylabel(f"{WORDS.get(similarity, similarity)}\nwith the trained network's map")
    axes.spines[["top", "right"]].set_visible(False)


def draw(run_folder: Path, on_progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Draw everything a finished run holds into its `figures/`: the files, strips first.

    Reads scores.parquet and run.json, and strips.npz and predictions.parquet where they are there (no
    strips.npz, no strips). on_progress(done, total) is called after each figure. Raises OSError if a file
    cannot be read or written, ValueError if the scores are empty or of several models.
    """
    scores = pd.read_parquet(run_folder / "scores.parquet")
    if len(models := list(scores["model"].unique())) != 1:
        raise ValueError(f"{run_folder / 'scores.parquet'}: scores of one model expected, found {models}")
    name = models[0] + (" (untrained)" if _untrained(run_folder / "run.json") else "")
    folder = run_folder / "figures"
    folder.mkdir(exist_ok=True)
    jobs = [*_strips(run_folder, scores, name), *_curves(scores, name)]
    files = []
    with warnings.catch_warnings():
        # an image may be named in a script that the font lacks: boxes in a title are no reason to stop
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for done, (stem, make) in enumerate(jobs, 1):
            files.append(folder / f"{stem}.png")
            figure = make()
            figure.savefig(files[-1], dpi=figure.dpi, metadata={"Software": None})
            if on_progress:
                on_progress(done, len(jobs))
    return files


def _untrained(header: Path) -> bool:
    plan = json.loads(header.read_text(encoding="utf-8")).get("plan") or {}
    return bool(plan.get("weights") == "random")


Job = tuple[str, Callable[[], Figure]]


def _curves(scores: pd.DataFrame, name: str) -> Iterator[Job]:
    summary = summarize(scores)
    images, seeds = scores["image"].nunique(), scores["seed"].nunique()
    for order, similarity in summary[["order", "similarity"]].drop_duplicates().itertuples(index=False):
        title = f"{name}, {order} randomization: mean of {images} images, {seeds} seed{'s' * (seeds > 1)}"
        title += f" ({'bars' if order in UNORDERED else 'bands'}: its 95 % interval)"
        yield (
            f"curve_{_safe(order)}_{_safe(similarity)}",
            partial(curve, summary, order, similarity, title=title),
        )


def _strips(folder: Path, scores: pd.DataFrame, name: str) -> Iterator[Job]:
    if not (path := folder / "strips.npz").exists():
        return
    explained, seed, taken = _explained(folder, scores), scores["seed"].iloc[0], set[str]()
    for order, image in _stored(path):
        title = f"{name}, {order} randomization, seed {seed}; image {image}{explained.get((order, image), '')}\n"
        title += f"each column: {REACH.get(order, order)}"
        stem = f"strip_{_safe(order)}_{_safe(image)}"
        while stem.lower() in taken:  # two ids may become one file name
            stem += "_"
        taken.add(stem.lower())
        yield stem, partial(_stored_strip, path, order, image, title)


def _stored(path: Path) -> list[tuple[str, str]]:
    """Orders and images of a strips file: keys `maps/<order>/<image>/<method>`; an image may hold slashes."""
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            keys = [key.split("/", 2) for key in file.files if key.startswith("maps/")]
    except BadZipFile as error:
        raise ValueError(f"{path}: {error}") from error
    return list(dict.fromkeys((order, rest.rpartition("/")[0]) for _, order, rest in keys))


def _stored_strip(path: Path, order: str, image: str, title: str) -> Figure:
    start = f"maps/{order}/{image}/"
    with path.open("rb") as raw, np.load(raw) as file:
        keys = [key for key in file.files if key.startswith(start) and "/" not in key[len(start) :]]
        picture = file[f"pictures/{image}"] if f"pictures/{image}" in file.files else None
        maps = {key[len(start) :]: file[key] for key in keys}
        return strip(maps, [str(stage) for stage in file[f"stages/{order}"]], picture, title=title)


def _explained(folder: Path, scores: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The explained class of each order's images, in words, as far as the run's predictions name it."""
    names: dict[int, str] = {}
    if (path := folder / "predictions.parquet").exists():
        seen = pd.read_parquet(path, columns=["top1", "top1_name"])
        names = dict(zip(seen["top1"], seen["top1_name"], strict=True))
    targets = scores.groupby(["order", "image"])["target"].unique()
    one = {key: found[0] for key, found in targets.items() if len(found) == 1}
    words = {
        key: names.get(one[key], one[key]) if key in one else "predicted anew at each stage" for key in targets.index
    }
    return {key: f", explained class: {word}" for key, word in words.items()}


def _safe(name: str) -> str:
    """Turn a name into part of a file's: letters, digits, `_`, `-`, dots; short enough for file systems."""
    return re.sub(r"[^\w.-]+", "_", name)[:80]
