"""Two runs, cell by cell: what is missing, what moved, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from sanity.parts import Parts, Place
from sanity.summary import LEVEL, summarize

Floats = NDArray[np.float64]

GROUP = ["model", "order", "stage", "method", "similarity"]
CELL = [*GROUP, "seed", "image"]
MAX_SHIFT = 0.05
ROUNDING = 0.02
"""Taken for rounding: between batch sizes and numbers of threads, 99 % of EfficientNet-Lite0's scores move by
less than .017 (the largest by .036, deep in a random network)."""
ALPHA = 1 - LEVEL
FEWEST_IMAGES = 3
SAME, CHANGED, INCONCLUSIVE = "same", "changed", "inconclusive"
MAPS = "trained map"
"""Stands for the order of randomization in groups that compare the trained network's maps."""


@dataclass(frozen=True)
class Finding:
    """Cells that cannot be compared: kind ("missing" | "extra" | "status" | "class"), words, and how many."""

    kind: str
    text: str
    cells: int


def compare(
    baseline: pd.DataFrame | Parts,
    current: pd.DataFrame | Parts,
    max_shift: float = MAX_SHIFT,
    apart: Collection[str] = (),
    exact: Collection[str] = (),
    alpha: float = ALPHA,
) -> tuple[pd.DataFrame, list[Finding]]:
    """Compare two tables of scores: a row for each group of paired cells, and what could not be paired.

    Pairs have the same model, order, stage, method, similarity, image and seed; a group is all images and
    seeds of the other five. A group's shift is the mean of current - baseline. Its interval [low, high]
    is the wider of the crossed bootstrap's (`summary.interval`, images by seeds) and of Student's t over
    images. q is the p-value of "|shift| is at most max_shift" (t, one-sided) after Benjamini and Hochberg's
    correction over all groups. The verdict is

    - changed: |shift| > max_shift, the interval lies wholly beyond it, and q <= alpha;
    - same: the interval lies wholly within +-max_shift, or no pair differs by more than .02 (rounding);
    - inconclusive: anything else, and any shift of fewer than 3 images.

    Over a whole table: if nothing changed, something is called changed with a chance of alpha at most;
    "same" asks that of every group, and so needs no correction. Where the two runs share no seed, images
    are still paired but seeds are two samples, whose spread widens the interval (Welch's t); a single
    seed a side then says nothing, and everything that moved is inconclusive.

    `exact` names methods that chance cannot move: p is then 0 for any shift above max_shift, and the interval
    alone decides. `apart` names columns whose values may be in one run only (a method more, say); elsewhere
    each missing, extra or newly unscored cell is a finding. Raises ValueError for missing columns, cells
    given twice, and tables without a common cell. Of tables in parts, one order and stage is read at a time.
    """
    if isinstance(baseline, Parts) or isinstance(current, Parts):
        shifts, findings, paired = _in_parts(baseline, current, apart)
    else:
        shifts, findings, paired = _together(baseline, current, apart)
    return _judged(shifts, max_shift, exact if paired else (), alpha), findings


def _together(
    baseline: pd.DataFrame, current: pd.DataFrame, apart: Collection[str]
) -> tuple[pd.DataFrame, list[Finding], bool]:
    """Shifts, findings, and whether the tables have a seed in common."""
    baseline, current = _checked(baseline, "baseline"), _checked(current, "current")
    seeds = set(baseline["seed"]) & set(current["seed"])
    spread = pd.DataFrame() if seeds else _spread(baseline) + _spread(current)
    if not seeds:
        baseline, current = _over_seeds(baseline), _over_seeds(current)
    both, findings = pair(baseline, current, apart)
    return _shifts(both, spread), findings, bool(seeds)


def _in_parts(
    baseline: pd.DataFrame | Parts, current: pd.DataFrame | Parts, apart: Collection[str]
) -> tuple[pd.DataFrame, list[Finding], bool]:
    """The same, a part at a time; groups do not reach beyond their part."""
    old, new = (_by_place(rows) for rows in (baseline, current))
    common = [place for place in old if place in new]
    if not common:
        raise ValueError(f"the runs have no cell in common: {next(iter(old))} against {next(iter(new))}")
    shifts, findings, paired = [], list[Finding](), False
    for place in common:
        shift, found, paired = _together(old[place](), new[place](), apart)
        shifts.append(shift)
        findings += found
    for kind, here, there in (("missing", old, new), ("extra", new, old)):
        for place in here:
            # As in a table: what may be in one run only is no finding where the other has it nowhere.
            free = {"order": place.order not in {p.order for p in there}, "stage": True}
            if place not in there and not any(name in apart and free[name] for name in free):
                number = len(here[place]())
                words = f"{kind} order {place.order} at stage {place.stage_index}: {_cells(number)}"
                findings.append(Finding(kind, words, number))
    return pd.concat(shifts, ignore_index=True), findings, paired


def _by_place(rows: pd.DataFrame | Parts) -> dict[Place, Callable[[], pd.DataFrame]]:
    if isinstance(rows, Parts):
        return {place: partial(rows.read, place) for place in rows.files}
    places = rows[[*Place._fields]].drop_duplicates().itertuples(index=False, name=None)
    return {Place(*place): partial(_of_place, rows, Place(*place)) for place in places}


def _of_place(rows: pd.DataFrame, place: Place) -> pd.DataFrame:
    return rows[(rows["order"] == place.order) & (rows["stage_index"] == place.stage_index)]


def _checked(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    if missing := sorted({*CELL, "stage_index", "target", "value", "status"} - set(rows.columns)):
        raise ValueError(f"the {name} run's scores lack the columns {missing}")
    if (twice := rows.duplicated(CELL)).any():
        raise ValueError(f"the {name} run holds a cell twice: {_example(rows[twice])}")
    # no score must pass for one because its status says so
    rows = rows.assign(status=rows["status"].where((rows["status"] != "ok") | np.isfinite(rows["value"]), "no value"))
    rows.attrs = {}  # which pandas would copy at every step
    return rows


def pair(
    baseline: pd.DataFrame, current: pd.DataFrame, apart: Collection[str] = ()
) -> tuple[pd.DataFrame, list[Finding]]:
    """Cells that both tables hold (value_baseline, value_current, status_..., target_...), and findings."""
    for name in apart:
        common = set(baseline[name]) & set(current[name])
        baseline, current = (rows[rows[name].isin(common)] for rows in (baseline, current))
    merged = baseline.merge(current, "outer", CELL, suffixes=("_baseline", "_current"), indicator=True)
    both = merged[merged["_merge"] == "both"]
    if both.empty:
        raise ValueError(f"the runs have no cell in common: {_example(baseline)} against {_example(current)}")
    findings = [
        *_unpaired("missing", merged[merged["_merge"] == "left_only"], current),
        *_unpaired("extra", merged[merged["_merge"] == "right_only"], baseline),
        *_restated(both),
        *_reclassed(both),
    ]
    return both, findings


def _example(rows: pd.DataFrame) -> str:
    return "no rows" if rows.empty else "/".join(str(rows.iloc[0][name]) for name in CELL)


def _unpaired(kind: str, rows: pd.DataFrame, other: pd.DataFrame) -> Iterator[Finding]:
    """Cells of one run only: values the other has nowhere (a whole stage, say) first, then the rest."""
    if rows.empty:
        return
    for name in CELL:
        for value, part in rows[~rows[name].isin(set(other[name]))].groupby(name, sort=False):
            yield Finding(kind, f"{kind} {name} {value}: {_cells(len(part))}", len(part))
        rows = rows[rows[name].isin(set(other[name]))]
    for key, part in rows.groupby(GROUP, sort=False):
        yield Finding(kind, f"{kind} in {_named(key)}: {_cells(len(part))}", len(part))


def _restated(both: pd.DataFrame) -> Iterator[Finding]:
    """Paired cells whose status changed: newly NaN, or no longer."""
    differing = both[both["status_baseline"] != both["status_current"]]
    for key, part in differing.groupby([*GROUP, "status_baseline", "status_current"], sort=False):
        *place, old, new = cast(tuple[Any, ...], key)
        yield Finding("status", f"{_named(place)}: {old} became {new}, {_cells(len(part))}", len(part))


def _reclassed(both: pd.DataFrame) -> Iterator[Finding]:
    """Images that the trained network is explained for in another class.

    Beyond stage 0 the class may be predicted anew, and there rounding decides between random logits.
    """
    trained = both[both["stage_index_baseline"] == 0].drop_duplicates(["model", "image"])
    differing = trained[trained["target_baseline"] != trained["target_current"]]
    if len(differing):
        one = differing.iloc[0]
        change = f"{one['target_baseline']} became {one['target_current']}"
        yield Finding("class", f"explained class of {len(differing)} images, {one['image']}: {change}", len(differing))


def _cells(number: int) -> str:
    return f"{number} cell{'s' if number > 1 else ''}"


def _named(key: Any) -> str:
    _, order, stage, method, similarity = key
    return f"{method}, {similarity}, {order} at {stage}"


# --- seeds that cannot be paired


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """One row an image: the mean over seeds of what is scored; its status is "ok" if any seed's is."""
    scored = rows["value"].where(rows["status"] == "ok")
    rows = rows.assign(value=scored, bad=rows["status"] != "ok").sort_values("bad", kind="stable")
    cells = rows.groupby([name for name in CELL if name != "seed"], sort=False)
    other = {name: (name, "first") for name in ("stage_index", "status", "target")}
    return cells.agg(value=("value", "mean"), **other).reset_index().assign(seed=-1)


def _spread(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each group's mean: its variance over seeds, and that over its degrees of freedom, squared."""
    scored = rows[rows["status"] == "ok"]
    seeds = scored.groupby([*GROUP, "seed"])["value"].mean().groupby(GROUP)
    variance, freedom = seeds.var(ddof=1) / seeds.count(), seeds.count() - 1
    return pd.DataFrame({"variance": variance, "weight": variance**2 / freedom})


# --- shifts


def _shifts(both: pd.DataFrame, spread: pd.DataFrame) -> pd.DataFrame:
    """Shift, interval, standard error and degrees of freedom of every group; spread: see `_spread`."""
    ok = (both["status_baseline"] == "ok") & (both["status_current"] == "ok")
    change = both["value_current"] - both["value_baseline"]
    cells = both.assign(value=change, status=np.where(ok, "ok", "unscored"), stage_index=both["stage_index_baseline"])
    table = summarize(cells).rename(columns={"mean": "shift"}).drop(columns="std")
    images = cells[ok].groupby([*GROUP, "image"])["value"].mean().groupby(GROUP)
    variance = images.var(ddof=1) / images.count()
    found = pd.DataFrame({"variance": variance, "weight": variance**2 / (images.count() - 1)})
    found = found if spread.empty else found + spread.reindex(found.index)
    found["images"] = images.count()
    found["largest"] = cells[ok].groupby(GROUP)["value"].agg(lambda values: values.abs().max())
    means = cells[ok].groupby(GROUP)[["value_baseline", "value_current"]].mean()
    means.columns = pd.Index(["baseline", "current"])
    table = table.join(found, on=GROUP).join(means, on=GROUP)
    freedom = np.where(table["variance"] > 0, table["variance"] ** 2 / table["weight"], 1.0)
    return _with_interval(table, np.sqrt(table["variance"].to_numpy()), freedom)


def _with_interval(table: pd.DataFrame, error: Floats, freedom: Floats) -> pd.DataFrame:
    half = stdtrit(freedom, 1 - ALPHA / 2) * error
    low = np.fmin(table["low"], table["shift"] - half)
    high = np.fmax(table["high"], table["shift"] + half)
    return table.assign(low=low.where(~np.isnan(half)), high=high.where(~np.isnan(half)), error=error, freedom=freedom)


def _judged(table: pd.DataFrame, max_shift: float, exact: Collection[str], alpha: float) -> pd.DataFrame:
    """Add p, q and verdict to `_shifts`; drop what only they need."""
    shift = table["shift"].abs().to_numpy()
    beyond = shift - max_shift
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(table["error"] > 0, beyond / table["error"], np.copysign(np.inf, beyond))
    enough = (table["images"] >= FEWEST_IMAGES) & table["error"].notna()
    p = np.where(enough, stdtr(table["freedom"], -t), 1.0)
    p[table["method"].isin(exact) & enough & (beyond > 0)] = 0.0
    q = adjusted(p)
    least = np.maximum(table["low"], -table["high"])  # the interval's end nearer to 0, > 0 if it excludes 0
    within = np.maximum(table["high"], -table["low"]) <= max_shift
    changed = (shift > max_shift) & (least > max_shift) & (q <= alpha)
    same = (table["largest"].fillna(0.0) <= min(ROUNDING, max_shift)) | (within & enough)
    verdict = np.select([same, changed], [SAME, CHANGED], INCONCLUSIVE)
    kept = [*GROUP, "stage_index", "baseline", "current", "shift", "low", "high", "n", "n_nan", "images"]
    return table[kept].assign(p=p, q=q, verdict=verdict)


def adjusted(p: Floats) -> Floats:
    """Benjamini and Hochberg's adjusted p-values (q): the false discovery rate at which each is found."""
    order = np.argsort(p)[::-1]
    ranked = p[order] * len(p) / np.arange(len(p), 0, -1)
    q = np.empty_like(ranked)
    q[order] = np.minimum.accumulate(ranked).clip(max=1)
    return q


# --- the trained network's maps


def map_scores(baseline: pd.DataFrame, current: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fingerprints of two runs -> two tables of scores that `compare` takes, one row an image.

    map, map_abs: angular similarity (1 alike, 0 unrelated, -1 opposite) of the signed and the absolute 8 x 8
    grids: in the current table of the two runs' first looks, in the baseline table of its own first look
    with its second, which is what to expect of the same explainer, 1 if it repeats itself exactly. Where the
    noise seeds differ, the second look is that under other noise. map_repeat: each run's own first look with
    its second. map_scale: natural logarithm of the root mean square (.05 is 5 %). map_balance: sum over sum
    of absolute values. Raises ValueError for a table without one of the three looks.
    """
    old, new = _looks(baseline), _looks(current)
    second = old[_second(baseline, current)]
    tables = []
    for looks, partner in ((old, second), (new, new["first"])):
        maps = [_angular(old["first"], partner, c, name) for c, name in (("signed", "map"), ("absolute", "map_abs"))]
        repeat = _angular(looks["first"], looks["again"], "signed", "map_repeat")
        tables.append(pd.concat([*maps, repeat, *_moments(looks["first"])], ignore_index=True))
    return tables[0], tables[1]


def exact_methods(baseline: pd.DataFrame, current: pd.DataFrame) -> set[str]:
    """Methods that chance does not move: in both runs the second look, as `map_scores` picks it, is the first."""
    looks, second = [_looks(rows) for rows in (baseline, current)], _second(baseline, current)
    repeats = pd.concat([_angular(look["first"], look[second], "signed", "") for look in looks])
    differing = repeats[repeats["status"].eq("ok") & (repeats["value"] < 1 - ROUNDING)]
    return set(repeats["method"]) - set(differing["method"])


def _second(baseline: pd.DataFrame, current: pd.DataFrame) -> str:
    return "again" if set(baseline["seed"]) == set(current["seed"]) else "other"


def _looks(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    needed = {"model", "method", "image", "look", "target", "seed", "signed", "absolute", "rms", "balance", "status"}
    if missing := sorted(needed - set(rows.columns)):
        raise ValueError(f"fingerprints lack the columns {missing}")
    found = {str(look): part.set_index(["model", "method", "image"]) for look, part in rows.groupby("look")}
    if lacking := {"first", "again", "other"} - set(found):
        raise ValueError(f"fingerprints lack the look {min(lacking)!r}; they have {sorted(found)}")
    return found


def _angular(a: pd.DataFrame, b: pd.DataFrame, column: str, name: str) -> pd.DataFrame:
    """1 - 2 angle / pi of two looks' centred grids, for what both hold: 1 alike, 0 unrelated, -1 opposite.

    The angle is linear in a small relative error, which correlation (its cosine) squares away.
    """
    common = a.index.intersection(b.index, sort=False)
    if common.empty:
        raise ValueError("the runs' fingerprints have no image and method in common")
    x, y = (np.stack(look.loc[common, column].to_list()).astype(np.float64) for look in (a, b))
    if x.shape != y.shape:
        raise ValueError(f"the runs' fingerprints are grids of {x.shape[1]} and {y.shape[1]} cells")
    x, y = (grid - grid.mean(1, keepdims=True) for grid in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (grid / np.linalg.norm(grid, axis=1, keepdims=True) for grid in (x, y))
    # exact for equal and for opposite grids, where the arc cosine would lose half the digits
    angle = 2 * np.arctan2(np.linalg.norm(x - y, axis=1), np.linalg.norm(x + y, axis=1))
    return _as_scores(b.loc[common], 1 - 2 * angle / np.pi, name)


def _moments(look: pd.DataFrame) -> list[pd.DataFrame]:
    with np.errstate(divide="ignore"):
        scale = np.log(look["rms"].to_numpy())
    return [_as_scores(look, scale, "map_scale"), _as_scores(look, look["balance"].to_numpy(), "map_balance")]


def _as_scores(look: pd.DataFrame, value: Floats, name: str) -> pd.DataFrame:
    status = np.where(np.isfinite(value), "ok", "no value")
    status = np.where(look["status"] == "ok", status, look["status"])
    place: dict[str, Any] = {"order": MAPS, "stage": "trained", "stage_index": 0, "similarity": name, "seed": 0}
    return look.reset_index()[["model", "method", "image", "target"]].assign(**place, value=value, status=status)
