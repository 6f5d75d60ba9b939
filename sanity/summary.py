"""From rows to numbers: for every stage the mean, its interval and the count of NaN; tables; verdicts."""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]
Key = tuple[str, str, int, str, str, str]

KEY = ["model", "order", "stage_index", "stage", "method", "similarity"]
NEEDED = [*KEY, "seed", "image", "value", "status"]
Rows = pd.DataFrame | Iterable[pd.DataFrame]
"""Scores as one frame or, where they are too many, in parts (`stored.parts`), each with all rows of its groups."""
RESAMPLES = 2000
DRAWN = 2**22
"""Resampled indices held at once: memory does not grow with the number of images."""
LEVEL = 0.95

RULE_VERSION = 2
MARGIN = 0.05
BLIND = 0.9
FEWEST_IMAGES = 3
UNORDERED = frozenset({"independent"})
VERDICT_COLUMNS = [
    "model",
    "order",
    "method",
    "similarity",
    "verdict",
    "reason",
    "score",
    "low",
    "high",
    "null_high",
]


@dataclass(frozen=True)
class Estimate:
    """Mean of scores over images and seeds, the interval [low, high] of that mean, and what it rests on.

    std: over images, of each image's mean over seeds (ddof 0, as the paper's bands; NaN for one image);
    n scored values, n_nan unscored ones, images with a scored value (not kept in a summary).
    """

    mean: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    std: float = float("nan")
    n: int = 0
    n_nan: int = 0
    images: int = 0

    def __str__(self) -> str:
        return f"{self.mean:z.2f} [{self.low:z.2f}, {self.high:z.2f}]"


STATISTICS = ["mean", "low", "high", "std", "n", "n_nan"]


def summarize(rows: Rows) -> pd.DataFrame:
    """Scores, one row an image -> one row for each (model, order, stage_index, stage, method, similarity).

    Columns: that key, then mean, low, high (95 % interval of the mean, see `interval`), std (over images of
    the mean over seeds, ddof 0), n (scored values) and n_nan (rows without a score). Sorted by stage_index
    within an order; models, orders, methods and similarities come as they first appear. Nothing scored:
    mean NaN; one scored value: low and high NaN; one scored image: std NaN. A group's numbers depend neither
    on other groups nor on the rows' order. Raises ValueError for missing columns and rows given twice.
    """
    cells = [(*key, *_numbers(estimate(scores, unscored, key))) for key, scores, unscored in _of_parts(rows)]
    by = ["model", "order", "stage_index", "method", "similarity"]
    names = [(name, KEY.index(name)) for name in by if name != "stage_index"]
    places = {name: {v: i for i, v in enumerate(dict.fromkeys(cell[at] for cell in cells))} for name, at in names}

    def place(column: pd.Series[Any]) -> pd.Series[Any]:
        return column.map(places[str(column.name)]) if column.name in places else column

    return pd.DataFrame(cells, columns=[*KEY, *STATISTICS]).sort_values(by, key=place, ignore_index=True)


def _numbers(found: Estimate) -> list[float]:
    return [getattr(found, name) for name in STATISTICS]


def _of_parts(rows: Rows) -> Iterator[tuple[Key, Floats, int]]:
    for part in [rows] if isinstance(rows, pd.DataFrame) else rows:
        yield from _groups(part)


def _groups(rows: pd.DataFrame) -> Iterator[tuple[Key, Floats, int]]:
    """Yield key, scores (seeds, images; NaN where there is none) and the number of unscored rows."""
    if missing := [name for name in NEEDED if name not in rows.columns]:
        raise ValueError(f"scores lack the columns {missing}; they have {list(rows.columns)}")
    if (twice := rows.duplicated([*KEY, "seed", "image"])).any():
        raise ValueError(f"scores hold a row twice: {rows.loc[twice, [*KEY, 'seed', 'image']].iloc[0].to_dict()}")
    for key, group in rows.groupby(KEY, sort=False, observed=True):
        value = group["value"].to_numpy(np.float64)
        scored = (group["status"] == "ok").to_numpy() & np.isfinite(value)
        # sorted, so that the rows' order cannot change which scores a resample picks
        seed, seeds = pd.factorize(group["seed"], sort=True)
        image, images = pd.factorize(group["image"], sort=True)
        scores = np.full((len(seeds), len(images)), np.nan)
        scores[seed, image] = np.where(scored, value, np.nan)
        yield cast(Key, key), scores, int((~scored).sum())


def estimate(scores: Floats, unscored: int, key: Sequence[object]) -> Estimate:
    """Estimate from scores (seeds, images), NaN where there is none; `key` names the interval's draws."""
    finite = np.isfinite(scores)
    if not finite.any():
        return Estimate(n_nan=unscored)
    means = _image_means(scores)
    low, high = interval(scores, generator(*key))
    std = float(means.std()) if len(means) > 1 else float("nan")
    return Estimate(float(scores[finite].mean()), low, high, std, int(finite.sum()), unscored, len(means))


def _image_means(scores: Floats) -> Floats:
    return cast(Floats, np.nanmean(scores[:, np.isfinite(scores).any(0)], axis=0))


def generator(*key: object) -> np.random.Generator:
    """Generator seeded by names alone: the same on every machine, whatever else is drawn."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def interval(scores: Floats, draws: np.random.Generator, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of scores (seeds, images), NaN where there is none.

    Seeds are resampled, then images; the design is crossed, so a resampled image brings its scores under
    every resampled seed. A single seed (or image) cannot be resampled: the interval then covers images
    (seeds) only. Images and seeds without any score take no part. Fewer than two scores: (NaN, NaN). Too
    narrow for a handful of images, by about sqrt((n - 1) / n) and the t quantile. [Efron and Tibshirani
    1993; Owen 2007, the pigeonhole bootstrap]
    """
    finite = np.isfinite(scores)
    if finite.sum() < 2:
        return float("nan"), float("nan")
    scores = scores[finite.any(1)][:, finite.any(0)]
    seeds = _counts(scores.shape[0], draws, resamples)
    some = max(1, DRAWN // scores.shape[1])
    # Drawn one after the other, blocks hold the numbers that one block would.
    parts = (seeds[start : start + some] for start in range(0, resamples, some))
    means = np.concatenate([_resampled(scores, part, _counts(scores.shape[1], draws, len(part))) for part in parts])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _resampled(scores: Floats, seeds: Floats, images: Floats) -> Floats:
    """Means of scores (S, N) taken seeds (R, S) and images (R, N) times; those without any score are left out."""
    finite = np.isfinite(scores)
    total = (seeds @ np.where(finite, scores, 0.0) * images).sum(1)
    number = (seeds @ finite.astype(np.float64) * images).sum(1)
    return cast(Floats, total[number > 0] / number[number > 0])


def _counts(size: int, draws: np.random.Generator, resamples: int) -> Floats:
    """How often each of `size` things is drawn, with replacement: (resamples, size), rows sum to size."""
    picked = draws.integers(size, size=(resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(picked.ravel(), minlength=resamples * size).reshape(resamples, size).astype(np.float64)


def verdicts(
    rows: Rows, unrelated: pd.DataFrame | None = None, margin: float = MARGIN, control: str = "random"
) -> pd.DataFrame:
    """Say whether each method's maps depend on the weights: pass, fail or inconclusive, and the reason.

    Rule, version 2, for every order that accumulates (cascading, bottom_up, data; an independent order has
    no verdict). Two questions, each answered with the interval [low, high] of the method's mean similarity
    to the trained map:

    1. With everything random (the last stage the rows hold): is the map still like the trained one? The bar
       is what unrelated maps show, plus `margin`: null_high, the upper end of the interval of the similarity
       between trained maps of different images (`unrelated`, rows as a run's unrelated.parquet), as the same
       method drew them. Without those rows it is the `control`'s similarity at that stage.
       Yes: low > bar. No: high <= bar.
    2. With only the first stage random (the logits, in a cascade): is the map blind to it? Yes: low > 0.9.
       No: high <= 0.9. This is what fails Guided Backprop in Adebayo et al. 2018: invariance to the higher
       layers, however little of the map is left at the end.

    fail: yes to either; pass: no to both; else inconclusive. Inconclusive too if fewer than 3 images are
    scored, if more maps are unscored than scored, if there is no level to judge by, or if the method is
    uninformative: with untouched weights (stage 0) its map does not rise above the bar either.

    Intervals are the wider of the bootstrap's and of Student's t over images, as the bootstrap's alone is
    too narrow for few images; they can so be wider than a summary's. The margin is the shift that the gate
    calls none. Columns: model, order, method, similarity, verdict, reason, score (the mean at the end), low,
    high, null_high.
    """
    cells: dict[Key, tuple[Floats, int]] = {}
    for part in [rows] if isinstance(rows, pd.DataFrame) else rows:
        cells |= {key: (scores, unscored) for key, scores, unscored in _groups(part)}
        _thin(cells)
    attached = rows.attrs.get("unrelated", []) if isinstance(rows, pd.DataFrame) else []
    other = pd.DataFrame(attached) if unrelated is None else unrelated
    levels = {key[4:]: (scores, unscored) for key, scores, unscored in _groups(other)} if len(other) else {}
    found = []
    for model, order, stages, method, similarity in _courses(cells):
        course = [(model, order, index, stage, method, similarity) for index, stage in stages]
        last = (model, order, *stages[-1], control, similarity)
        trained, final = (_cautious(cells, key) for key in (course[0], course[-1]))
        own = {last: levels[method, similarity]} if (method, similarity) in levels else cells
        known = trained if stages[0][0] == 0 else None
        first = next(key for key in course if key[2] > 0)
        verdict, reason = _judge(known, final, _cautious(own, last), margin)
        verdict, reason = _blind(verdict, f"{reason}; judged at {stages[-1][1]}", _cautious(cells, first), first[3])
        numbers = (final.mean, final.low, final.high, _cautious(own, last).high)
        found.append((model, order, method, similarity, verdict, reason + _held(course, cells), *numbers))
    return pd.DataFrame(found, columns=VERDICT_COLUMNS)


def _blind(verdict: str, reason: str, first: Estimate, stage: str) -> tuple[str, str]:
    """Add the second question's answer: whether randomizing the first stage changes the map at all."""
    if verdict == "fail" or reason.startswith("uninformative") or first.images < FEWEST_IMAGES:
        return verdict, reason
    if first.low > BLIND:
        return "fail", f"blind to {stage}: {first} with it random, above {BLIND:.2f}; {reason}"
    if first.high > BLIND:
        return "inconclusive", f"perhaps blind to {stage}: {first} with it random straddles {BLIND:.2f}; {reason}"
    return verdict, reason


def _thin(cells: dict[Key, tuple[Floats, int]]) -> None:
    """Keep scores where a verdict asks for them, at the trained, first and last stage so far; elsewhere their mean."""
    reach: dict[tuple[str, str], list[int]] = {}
    for key in cells:
        reach.setdefault(key[:2], []).append(key[2])
    kept = {course: {0, min((i for i in found if i), default=0), max(found)} for course, found in reach.items()}
    for key, (scores, unscored) in cells.items():
        if key[2] not in kept[key[:2]] and scores.size > 1:
            mean = np.nanmean(scores) if np.isfinite(scores).any() else np.nan
            cells[key] = np.full((1, 1), mean), unscored


def _courses(cells: Iterable[Key]) -> Iterator[tuple[str, str, list[tuple[int, str]], str, str]]:
    """Yield model, order, stages, method, similarity of every course that ends in full randomization."""
    courses: dict[tuple[str, str], list[Key]] = {}
    for key in cells:
        courses.setdefault(key[:2], []).append(key)
    for (model, order), keys in courses.items():
        stages = sorted({(index, stage) for _, _, index, stage, _, _ in keys})
        if order not in UNORDERED and stages[-1][0] > 0:
            present = {key[4:] for key in keys}
            methods, similarities = (list(dict.fromkeys(key[at] for key in keys)) for at in (4, 5))
            for pair in ((m, s) for m in methods for s in similarities if (m, s) in present):
                yield model, order, stages, str(pair[0]), str(pair[1])


def _cautious(cells: dict[Key, tuple[Floats, int]], key: Key) -> Estimate:
    """Estimate with the wider of the bootstrap's and Student's interval; an empty one if no rows."""
    if key not in cells:
        return Estimate()
    scores, unscored = cells[key]
    found = estimate(scores, unscored, key)
    if found.images < 2:
        return found
    means = _image_means(scores)
    half = stdtrit(len(means) - 1, (1 + LEVEL) / 2) * means.std(ddof=1) / np.sqrt(len(means))
    return replace(found, low=float(min(found.low, found.mean - half)), high=float(max(found.high, found.mean + half)))


def _judge(trained: Estimate | None, final: Estimate, null: Estimate, margin: float) -> tuple[str, str]:
    """Verdict and reason; `trained` is stage 0's estimate, None where the rows hold no stage 0."""
    bar = null.high + margin
    level = f"{bar:.2f} = null {null.high:z.2f} + margin {margin:.2f}"
    if final.images < FEWEST_IMAGES or final.n_nan > final.n:
        return (
            "inconclusive",
            f"too few maps scored: {final.n} of {final.n + final.n_nan}, {final.images} images",
        )
    if null.images < FEWEST_IMAGES or null.n_nan > null.n:
        return "inconclusive", f"no null level: unrelated maps gave {null.n} scores, {null.images} images"
    if trained is not None and not trained.low > bar:
        return "inconclusive", f"uninformative: {trained} even with untouched weights, not above {level}"
    if final.high <= bar:
        return "pass", f"{final}, at or below {level}"
    if final.low > bar:
        return "fail", f"{final}, above {level}"
    return "inconclusive", f"{final} straddles {level}"


def _held(course: Sequence[Key], cells: dict[Key, tuple[Floats, int]]) -> str:
    """Say through which randomized stage the mean stayed above one half without a break, if any."""
    held = ""
    for key in course:
        scores = cells[key][0] if key in cells else np.array([np.nan])
        if key[2] and not (np.isfinite(scores).any() and np.nanmean(scores) > 0.5):
            break
        held = f"; mean above 0.5 through {key[3]}" if key[2] else ""
    return held


def to_csv(summary: pd.DataFrame) -> str:
    """Summary as CSV, six decimals, NaN spelt out."""
    return summary.to_csv(index=False, float_format="%.6f", na_rep="NaN", lineterminator="\n")


def to_markdown(summary: pd.DataFrame) -> str:
    """Summary as Markdown: a table for each model, order and similarity; rows methods, columns stages.

    A cell reads `mean [low, high]`; scores that are NaN are counted in it; a hyphen: no rows.
    """
    blocks = ["Mean similarity to the trained network's map, [95 % interval of the mean over images and seeds].\n"]
    for (model, order, similarity), part in summary.groupby(["model", "order", "similarity"], sort=False):
        blocks.append(f"## {model}, {order}, {similarity}\n\n{_how_many(part)} scores a cell.\n\n{_table(part)}")
    return "\n".join(blocks)


def _table(part: pd.DataFrame) -> str:
    stages = list(part.sort_values("stage_index")["stage"].unique())
    cells = {(row.method, row.stage): _cell(row) for row in part.itertuples()}
    lines = [["method", *stages], ["---"] * (len(stages) + 1)]
    lines += [[m, *(cells.get((m, stage), "-") for stage in stages)] for m in part["method"].unique()]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cell(row: Any) -> str:
    if not row.n:
        return f"n/a ({row.n_nan} NaN)"
    text = f"{row.mean:z.2f} " + ("[n/a]" if np.isnan(row.low) else f"[{row.low:z.2f}, {row.high:z.2f}]")
    return text + (f" ({row.n_nan} NaN)" if row.n_nan else "")


def _how_many(part: pd.DataFrame) -> str:
    number = part["n"] + part["n_nan"]
    return str(number.max()) if number.min() == number.max() else f"{number.min()} to {number.max()}"


def terminal_table(summary: pd.DataFrame, width: int = 100) -> str:
    """Summary for a terminal, at most `width` columns: a table for each model and order; rows methods.

    Under each similarity the means at the first, the middle and the last randomized stage. A star marks a
    mean without some scores, which are NaN; their number stands below. n/a: none but NaN; a hyphen: no rows.
    """
    blocks = []
    for (model, order), part in summary.groupby(["model", "order"], sort=False):
        shown = _few(part)
        named = ", ".join(f"{short} = {shown[index]}" for index, short in zip(shown, _short_names(shown), strict=True))
        head = f"{model}, {order}: means of {_how_many(part)} scores; {named}"
        blocks += [textwrap.fill(head, width, subsequent_indent="  "), *_panels(part, shown, width)]
        if unscored := int(part["n_nan"].sum()):
            total = int(part["n"].sum()) + unscored
            blocks.append(f"* without NaN: {unscored} of all {total} scores (constant or non-finite maps)")
        blocks.append("")
    return "\n".join(blocks)


def _few(part: pd.DataFrame) -> dict[int, str]:
    """First, middle and last randomized stage (all there is, if less), by index."""
    stages = dict(sorted(set(zip(part["stage_index"], part["stage"], strict=True))))
    randomized = [index for index in stages if index > 0] or list(stages)
    middle = randomized[(len(randomized) - 1) // 2]
    return {index: stages[index] for index in sorted({randomized[0], middle, randomized[-1]})}


def _short_names(shown: dict[int, str]) -> list[str]:
    return {1: ["only"], 2: ["first", "last"]}.get(len(shown), ["first", "mid", "last"])


def _panels(part: pd.DataFrame, shown: dict[int, str], width: int) -> list[str]:
    """Lines of the table; as many similarities side by side as the width holds."""
    methods, similarities = part["method"].unique(), list(part["similarity"].unique())
    label = min(max(map(len, [*methods, "method"])), 30)
    column = max(6 * len(shown), 12) + 1
    room = max((width - label) // column, 1)
    cells = {(row.method, row.similarity, row.stage_index): _number(row) for row in part.itertuples()}
    heads = "".join(f"{name:>5} " for name in _short_names(shown))
    lines = []
    for start in range(0, len(similarities), room):
        group = similarities[start : start + room]
        lines.append(" " * label + "".join(f"{_cut(s, column - 2)} ".rjust(column) for s in group))
        lines.append("method".ljust(label) + heads.rjust(column) * len(group))
        for m in methods:
            values = ["".join(cells.get((m, s, i), "    - ") for i in shown).rjust(column) for s in group]
            lines.append(_cut(m, label).ljust(label) + "".join(values))
    return [line.rstrip() for line in lines]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _number(row: Any) -> str:
    # the star has a column of its own, so that decimal points stay aligned
    return ("  n/a" if not row.n else f"{row.mean:z5.2f}") + ("*" if row.n_nan else " ")
