"""How things are named and told apart in every format: words for orders and similarities, colours for methods."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle

REACH = {
    "cascading": "randomized from the output down to this stage",
    "independent": "stage randomized alone",
    "bottom_up": "randomized from the input up to this stage",
    "data": "trained on permuted labels",
}
WORDS = {
    "ssim": "SSIM",
    "spearman": "rank correlation, signed,",
    "spearman_abs": "rank correlation of absolute values",
    "hog": "correlation of HOG descriptors",
    "ssim_published": "SSIM, as published,",
    "ssim_released": "SSIM, as released,",
    "hog_released": "rank correlation of HOG descriptors, as released,",
    "spearman_released": "rank correlation, signed, as released,",
    "spearman_abs_released": "rank correlation of absolute values, as released,",
    "spearman_foreground": "rank correlation, signed, in the foreground",
    "spearman_abs_foreground": "rank correlation of absolute values in the foreground",
}
SHORT = {
    "ssim": "SSIM",
    "spearman": "rank corr.",
    "spearman_abs": "rank corr. (abs.)",
    "hog": "HOG corr.",
    "ssim_published": "SSIM (published)",
    "ssim_released": "SSIM (released)",
    "hog_released": "HOG (released)",
    "spearman_released": "rank corr. (released)",
    "spearman_abs_released": "rank corr. (abs., released)",
    "spearman_foreground": "rank corr. (foregr.)",
    "spearman_abs_foreground": "rank corr. (abs., foregr.)",
}
# Found by search: each at least 3:1 against white (WCAG 1.4.11), and any two at least 16 apart in CIEDE2000
# as normal, protan, deutan and tritan readers see them (Machado 2009); a test holds both
COLOURS = ("#08459F", "#FF4096", "#06805B", "#9F9328", "#0D92FF", "#60053B", "#403A03")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 1.5), (3, 1, 1, 1), (1.5, 1))
SYMBOLS = {"pass": "✓", "fail": "✗", "inconclusive": "?"}


@dataclass(frozen=True)
class Look:
    """A method's line. dashes: lengths on and off in line widths, empty for a solid line."""

    colour: str
    marker: str
    dashes: tuple[float, ...]
    control: bool = False


CONTROLS = {
    "edges": Look("#6B6B6B", "s", (1, 1.6), control=True),
    "random": Look("#6B6B6B", "o", (4, 1.6), control=True),
}


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """One look a method, in turn; no two of 252 are alike. Controls are grey."""
    turns = zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), strict=False)
    return {method: CONTROLS[method] if method in CONTROLS else Look(*next(turns)) for method in methods}


def named(method: str) -> str:
    """Name of a method, with a word for controls."""
    return f"{method} (control)" if method in CONTROLS else method


def ending(order: str) -> str:
    """When an order's verdict is reached."""
    return "after training on permuted labels" if order == "data" else f"at full {order} randomization"


def safe(name: str) -> str:
    """Turn a name into part of a file's: letters, digits, `_`, `-`, dots; short enough for file systems."""
    return re.sub(r"[^\w.-]+", "_", name)[:80]


def plural(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
