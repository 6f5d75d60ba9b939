"""Strips: one image's maps, a row a method, a column a stage; drawn for the screen, and read from a run's folder."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from sanity.registry import first_line

Maps = NDArray[np.int8]
Pixels = NDArray[np.uint8]

MISSING = -128
SCALE_RULE = (
    "Each map: channels summed, divided by the 99th percentile of its absolute value, clipped to [-1, 1]; "
    "colours averaged down to the cell. Red and blue: signed; grey: nowhere negative; "
    "hatched: no map to show (constant, or not finite)."
)

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
        grey = unsigned(stack)
        if picture is not None:
            page.show(row, 0, picture)
        for stage, scaled in enumerate(stack):
            column = stage + (picture is not None)
            if (why := lack(scaled)) is None:
                page.show(row, column, coloured(scaled, grey))
            else:
                page.hatch(row, column, why)
    return page.finish()


def lack(scaled: Maps) -> str | None:
    """Why a map cannot be shown: `n/a` (it was not finite) or `constant`; None if it can."""
    if scaled.max() == MISSING:
        return "n/a"
    return "constant" if scaled.min() == scaled.max() else None


def unsigned(stack: Maps) -> bool:
    """Whether no map of a method (S, H, W) is anywhere negative; missing ones do not count."""
    return bool((stack[stack.max((1, 2)) != MISSING] >= 0).all())


def coloured(scaled: Maps, grey: bool) -> Pixels:
    """Map (H, W) int8 -> (H, W, 3) uint8: greys for a method that is nowhere negative, else red and blue."""
    values = np.clip(scaled.astype(np.float64) / 127, -1, 1)
    cmap = colormaps[UNSIGNED if grey else SIGNED]
    return np.asarray(cmap(values if grey else (values + 1) / 2, bytes=True)[..., :3])


def shrunk(pixels: Pixels, size: tuple[int, int], levels: int = 32) -> Pixels:
    """Average a picture down (or enlarge it, pixels kept square) to size (width, height).

    32 levels a channel, which the eye does not miss, halve the file of noisy maps.
    """
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    top = levels - 1
    return np.round(np.round(small / 255 * top) / top * 255).astype(np.uint8)


def scale(grey: bool) -> ScalarMappable:
    """What a colour bar of such maps shows."""
    return ScalarMappable(Normalize(0 if grey else -1, 1), UNSIGNED if grey else SIGNED)


class _Page:
    """A sheet whose coordinates are pixels from its top left corner, so that every cell is drawn 1 : 1."""

    def __init__(self, maps: Mapping[str, Maps], stages: list[str], pictured: bool, title: str) -> None:
        height, width = next(iter(maps.values())).shape[1:]
        ratio = CELL / min(height, width)
        self.cell: tuple[int, int] = (round(width * ratio), round(height * ratio))
        self.rows, self.columns = list(maps), ["original image"] * pictured + stages
        self.parted = pictured + 1  # a wider gap after the trained map
        bars = sorted({unsigned(stack) for stack in maps.values()})
        heads = [extent(name, 10, 45) for name in self.columns]
        self.left = PAD + max(extent(name, 11)[0] for name in self.rows) + 8
        overhang = max(x + self._x(i) - self._x(len(heads)) for i, (x, _) in enumerate(heads)) + self.cell[0] // 2
        self.inner = self._x(len(self.columns)) - GAP - self.left
        right = max(len(bars) * 66 + 10, overhang) + PAD
        self.width = max(self.left + self.inner + right, 420)
        self.titles = _fold(title, 12, self.width - 2 * PAD)
        self.caption = _fold(SCALE_RULE, 9.5, self.width - 2 * PAD)
        self.top = PAD + extent(self.titles, 12)[1] + 12 + max(y for _, y in heads) + 6
        self.inner_height = len(self.rows) * (self.cell[1] + GAP) - GAP
        self.height = self.top + self.inner_height + 12 + extent(self.caption, 9.5)[1] + PAD
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
        for place, grey in enumerate(bars):
            self._bar(self.left + self.inner + 14 + 66 * place, grey)

    def _text(self, x: float, y: float, text: str, size: float, **how: Any) -> None:
        # names may hold a dollar sign, which would start a formula
        self.axes.text(x, y, text, fontsize=size, parse_math=False, **how)

    def _bar(self, x: int, grey: bool) -> None:
        tall = min(self.inner_height, 3 * CELL)
        box = (x / self.width, 1 - (self.top + tall) / self.height, 14 / self.width, tall / self.height)
        bar = self.figure.colorbar(scale(grey), cax=self.figure.add_axes(box), ticks=[0, 1] if grey else [-1, 0, 1])
        bar.ax.tick_params(labelsize=9, length=2, pad=2)

    def show(self, row: int, column: int, pixels: Pixels) -> None:
        """Paste a picture, brought to the cell's size."""
        y, x = self._y(row) - self.top, self._x(column) - self.left
        self.canvas[y : y + self.cell[1], x : x + self.cell[0]] = shrunk(pixels, self.cell)
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


def extent(text: str, size: float, rotation: float = 0, dpi: int = DPI) -> tuple[int, int]:
    """Width and height of a text in pixels, rounded up."""
    figure = Figure(figsize=(0.1, 0.1), dpi=dpi)
    FigureCanvasAgg(figure)
    box = figure.text(0, 0, text or " ", fontsize=size, rotation=rotation, parse_math=False).get_window_extent()
    return int(np.ceil(box.width)), int(np.ceil(box.height))


def _fold(text: str, size: float, width: int) -> str:
    """Break lines that are wider than `width` pixels."""
    if "\n" in text:
        return "\n".join(_fold(line, size, width) for line in text.split("\n"))
    wide = extent(text, size)[0]
    return "\n".join(textwrap.wrap(text, int(0.95 * len(text) * width / wide))) if wide > width else text


class Stored(NamedTuple):
    """One strip of a run: method -> maps (S, H, W) int8, S stage names, the picture (H, W, 3) uint8 if kept."""

    maps: dict[str, Maps]
    stages: list[str]
    picture: Pixels | None


def stored(path: Path) -> list[tuple[str, str]]:
    """Orders and images of a strips file: keys `maps/<order>/<image>/<method>`; an image may hold slashes.

    Raises ValueError if the file is broken.
    """
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            keys = [key.split("/", 2) for key in file.files if key.startswith("maps/")]
    except (BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} holds no strips: {first_line(error)}") from error
    return list(dict.fromkeys((order, rest.rpartition("/")[0]) for _, order, rest in keys))


def read(path: Path, order: str, image: str) -> Stored:
    """Read one strip of a strips file."""
    start = f"maps/{order}/{image}/"
    with path.open("rb") as raw, np.load(raw) as file:
        keys = [key for key in file.files if key.startswith(start) and "/" not in key[len(start) :]]
        picture = file[f"pictures/{image}"] if f"pictures/{image}" in file.files else None
        maps = {key[len(start) :]: file[key] for key in keys}
        return Stored(maps, [str(stage) for stage in file[f"stages/{order}"]], picture)
