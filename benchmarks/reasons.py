"""Why published cells are not met: what was measured of them, in words.

Both measurements draw noise once for all stages, unlike the reproduction, which draws it anew at each, as released.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd
from measuring import RESULTS
from published import PERMUTED

from sanity.attributions import find

LENGTH, MEMORISING = (RESULTS / name / "table.csv" for name in ("training_length", "memorising"))


def reasons(found: pd.DataFrame, every: Mapping[str, pd.DataFrame]) -> str:
    """What was measured of the cells outside two standard deviations.

    Of cascades, how they change as training goes on, with decay and without; of permuted labels, what it matters from
    which weights the two networks started.
    """
    outside = found[found["deviations"] > 2]
    known = pd.read_csv(LENGTH) if LENGTH.is_file() else pd.DataFrame(columns=["decay", "method", "stage", "mean"])
    lines = []
    for cell in outside.itertuples():
        own = known[(known["method"] == cell.method) & (known["stage"] == cell.stage) & (cell.order == "cascading")]
        words = f"- {cell.order}, {cell.stage}, {cell.similarity}, {cell.method}: "
        for decay, rows in own.groupby("decay", sort=False):
            path = ", ".join(f"{value:.2f}" for value in rows["mean"])
            words += f"{'with' if decay else 'without'} weight decay {path} after 0, 1, ... epochs, "
            words += f"{passing(rows['mean'], cell.published)}; "
        told = "see benchmarks/training_length." if len(own) else "nothing was measured of it."
        if cell.order == "data":
            rows = every[f"{cell.data} {cell.model}"]
            checked = [started(rows, cell.method, cell.similarity), learnt(cell.method, cell.similarity)]
            told = "; ".join(filter(None, checked)) or told
        once = " (noise drawn once for all stages)" if not find(cell.method).deterministic else ""
        lines.append(words + told + once)
    return "\n".join(["## Cells outside two standard deviations", "", *lines, ""]) if lines else ""


def started(rows: pd.DataFrame, method: str, similarity: str) -> str:
    """Mean of the data test by the weights that training on true labels started from; empty with one training."""
    data = rows.query("order == 'data' and stage_index > 0 and method == @method and similarity == @similarity")
    means = data.groupby(data["seed"] >= 1000)["value"].mean()
    if len(means) < 2:
        return ""
    return f"{means[False]:.2f} where both networks started from the same weights, {means[True]:.2f} where they did not"


def learnt(method: str, similarity: str) -> str:
    """How the data test's mean changes while permuted labels are learnt; empty if that was not measured."""
    if not MEMORISING.is_file():
        return ""
    known = pd.read_csv(MEMORISING).query("method == @method and similarity == @similarity").set_index("epoch")["mean"]
    path, epochs = (", ".join(words) for words in ([f"{v:.2f}" for v in known[1:]], map(str, known.index[1:])))
    words = passing(known, PERMUTED[method][similarity == "spearman"])
    return (
        f"{known.iloc[0]:.2f} between two networks that were never trained, and {path} between a trained one and one "
        f"that had learnt permuted labels for {epochs} epochs, {words}: see benchmarks/memorising"
    )


PASSES = "which passes the published value on its way: how long training goes on decides"


def passing(path: Iterable[float], published: float) -> str:
    """Whether a path of means, from the first epoch to the last, comes by a published value."""
    values = list(path)
    if min(values) <= published <= max(values):
        return PASSES
    nearest = min(values, key=lambda value: abs(value - published))
    return f"which comes no nearer to the published {published:.2f} than {nearest:.2f}: it is something else, not found"
