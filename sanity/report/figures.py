"""Every figure of a finished run, as PNG for the screen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from sanity import parts
from sanity.records import Prediction, read_rows
from sanity.report import strips
from sanity.report.curves import caption, curve, reach
from sanity.report.looks import safe
from sanity.report.strips import strip
from sanity.summary import summarize

Job = tuple[str, Callable[[], Figure]]


def draw(
    run_folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
    summary: pd.DataFrame | None = None,
) -> list[Path]:
    """Draw everything a finished run holds into its `figures/`: the files, strips first.

    Reads scores.parquet and run.json, and strips.npz and predictions.parquet where they are there (no
    strips.npz, no strips). summary: of its scores, if it is known already. on_progress(done, total) is called
    after each figure. Raises OSError if a figure cannot be written, ValueError if the run cannot be read or its
    scores are empty or of several models.
    """
    rows = parts.scores(run_folder)
    scores = parts.looked_at(rows)
    if len(models := list(scores["model"].unique())) != 1:
        raise ValueError(f"{run_folder / 'scores.parquet'}: scores of one model expected, found {models}")
    name = models[0] + (" (untrained)" if _untrained(run_folder / "run.json") else "")
    folder = run_folder / "figures"
    folder.mkdir(exist_ok=True)
    jobs = [*_strips(run_folder, scores, name), *_curves(scores, name, summarize(rows) if summary is None else summary)]
    files = []
    with any_script():
        for done, (stem, make) in enumerate(jobs, 1):
            files.append(folder / f"{stem}.png")
            figure = make()
            figure.savefig(files[-1], dpi=figure.dpi, metadata={"Software": None})
            if on_progress:
                on_progress(done, len(jobs))
    return files


@contextmanager
def any_script() -> Iterator[None]:
    """An image may be named in a script that the font lacks: boxes in a title are no reason to stop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _untrained(header: Path) -> bool:
    plan = json.loads(header.read_text(encoding="utf-8")).get("plan") or {}
    return bool(plan.get("weights") == "random")


def _curves(scores: pd.DataFrame, name: str, summary: pd.DataFrame) -> Iterator[Job]:
    for order, similarity in summary[["order", "similarity"]].drop_duplicates().itertuples(index=False):
        title = caption(scores, name, order)
        yield f"curve_{safe(order)}_{safe(similarity)}", partial(curve, summary, order, similarity, title=title)


def _strips(folder: Path, scores: pd.DataFrame, name: str) -> Iterator[Job]:
    if not (path := folder / "strips.npz").exists():
        return
    classes, seed = explained(folder, scores), scores["seed"].iloc[0]
    for (order, image), stem in stems(strips.stored(path)).items():
        title = f"{name}, {order} randomization, seed {seed}; image {image}{classes.get((order, image), '')}\n"
        yield stem, partial(_strip, path, order, image, f"{title}each column: {reach(order)}")


def stems(keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """File names of strips, by order and image; two ids may become one name, and then one of them grows."""
    taken: dict[tuple[str, str], str] = {}
    for order, image in keys:
        stem = f"strip_{safe(order)}_{safe(image)}"
        while stem.lower() in map(str.lower, taken.values()):
            stem += "_"
        taken[order, image] = stem
    return taken


def _strip(path: Path, order: str, image: str, title: str) -> Figure:
    found = strips.read(path, order, image)
    return strip(found.maps, found.stages, found.picture, title=title)


def explained(folder: Path, scores: pd.DataFrame) -> dict[tuple[str, str], str]:
    """The explained class of each order's images, in words, as far as the run's predictions name it."""
    names: dict[int, str] = {}
    if (path := folder / "predictions.parquet").exists():
        seen = read_rows(path, Prediction)
        names = dict(zip(seen["top1"], seen["top1_name"], strict=True))
    targets = scores.groupby(["order", "image"])["target"].unique()
    one = {key: found[0] for key, found in targets.items() if len(found) == 1}
    words = {
        key: names.get(one[key], one[key]) if key in one else "predicted anew at each stage" for key in targets.index
    }
    return {key: f", explained class: {word}" for key, word in words.items()}
