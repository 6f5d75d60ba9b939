"""What a run keeps of the trained network's maps, so that a later run's maps can be told from them.

Similarities compare a map with another of the same run, so much can change behind them unseen: a map that
explains another class, is flipped, or is scaled otherwise is as similar to its own kind as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn import functional as F

from sanity import maps
from sanity.attributions import METHODS, Method
from sanity.engine import Engine
from sanity.images import Images
from sanity.models import Classifier
from sanity.observation import CHUNK, Seen, first_look, working
from sanity.plan import Plan
from sanity.records import SCHEMA_VERSION, atomically, read_rows

FILE = "fingerprints.parquet"
GRID = 8
OTHER = 2**62
"""The bit of the noise seed that the look under other noise flips."""


class Fingerprint(NamedTuple):
    """One image's trained map, in short.

    look: "first"; "again", the same once more; "other", under other noise. seed: of the methods' noise.
    signed, absolute: the sums over channels of a and of |a|, averaged over an 8 x 8 grid, row by row.
    rms: of the signed map; balance: its sum over the sum of its absolute values, in [-1, 1]. Both are NaN
    where status is not "ok", and balance where the map is 0 everywhere.
    """

    model: str
    method: str
    image: str
    look: str
    target: int
    seed: int
    signed: list[float]
    absolute: list[float]
    rms: float
    balance: float
    status: str


_GRID_TYPE = pa.list_(pa.float32())
SCHEMA = pa.schema(
    {
        **dict.fromkeys(("model", "method", "image", "look"), pa.string()),
        **dict.fromkeys(("target", "seed"), pa.int64()),
        **dict.fromkeys(("signed", "absolute"), _GRID_TYPE),
        **dict.fromkeys(("rms", "balance"), pa.float64()),
        "status": pa.string(),
    },
    metadata={"sanity_schema": str(SCHEMA_VERSION)},
)


def fingerprints(
    plan: Plan,
    classifier: Classifier,
    images: Images,
    *,
    batch_size: int = 8,
    device: str = "cpu",
    on_progress: Callable[[int], object] = lambda evaluations: None,
    run_saw: Sequence[Fingerprint] = (),
) -> list[Fingerprint]:
    """Explain the first 8 images with the trained network again: first, again, and under other noise.

    The package's own methods repeat themselves by construction, and those that draw nothing do so under any
    noise: for them a look stands for the others, and run_saw, what the run itself saw (`seen_by`), for the first.
    A method from outside takes all three. Best taken after the run itself: what its explainers left behind in
    the network then shows. on_progress(evaluations) is called as they are made, `cost` of them.
    """
    own = _own(plan)
    chunk, taken = images.limit(CHUNK), [one for one in run_saw if one.method in own]
    with working(classifier.network, plan, device):
        for name, methods, how in _looks(plan, run_saw):
            # an engine of its own, so that no look can be the memory of another
            engine = Engine(methods, batch_size, on_progress)
            taken += _rows(classifier, plan, name, first_look(engine, how, classifier, chunk, device))
    known = {(one.look, one.method) for one in taken}
    first = [one for one in taken if one.look == "first"]
    copies = [
        one._replace(look=name) for name in ("again", "other") for one in first if (name, one.method) not in known
    ]
    return [*taken, *copies]


def cost(plan: Plan, images: Images, run_saw: Sequence[Fingerprint] = ()) -> int:
    """Network evaluations, forward and backward, of `fingerprints`."""
    return min(len(images), CHUNK) * sum(Engine(methods, 1).cost for _, methods, _ in _looks(plan, run_saw))


def seen_by(plan: Plan, classifier: Classifier, seen: Seen) -> list[Fingerprint]:
    """Fingerprints of what a run's trained network shows of a chunk of images."""
    return list(_rows(classifier, plan, "first", seen))


def _looks(plan: Plan, run_saw: Sequence[Fingerprint]) -> Iterator[tuple[str, Sequence[Method], Plan]]:
    """Name of each look, the methods that must take it, and the plan they take it by."""
    methods, own = plan.explainers(), _own(plan)
    known = own & {one.method for one in run_saw}
    first = [method for method in methods if method.name not in known]
    strangers = [method for method in methods if method.name not in own]
    noisy = [method for method in methods if method.name not in own or not method.deterministic]
    other = replace(plan, seeds=(plan.seeds[0] ^ OTHER,))
    looks = (("first", first, plan), ("again", strangers, plan), ("other", noisy, other))
    return (look for look in looks if look[1])


def _own(plan: Plan) -> set[str]:
    return {method.name for method in plan.explainers() if _ours(method)}


def _ours(method: Method) -> bool:
    """Whether it is the package's own, whatever its numbers; a stranger may go by the same name."""
    own = next((one for one in METHODS if one.name == method.name and type(one) is type(method)), None)
    if own is None or own.options.keys() != method.options.keys():
        return False
    return replace(own, options=method.options) == method


def _rows(classifier: Classifier, plan: Plan, look: str, seen: Seen) -> Iterator[Fingerprint]:
    targets = seen.inputs.targets.tolist()
    for method, attributions in seen.maps.items():
        for image, target, values in zip(seen.inputs.ids, targets, described(attributions), strict=True):
            yield Fingerprint(classifier.name, method, image, look, target, plan.seeds[0], *values)


def described(attributions: Tensor) -> Iterator[tuple[list[float], list[float], float, float, str]]:
    """Attributions (N, C, H, W) -> signed, absolute, rms, balance and status of each image's map."""
    exact = attributions.double()
    signed = maps.signed(exact)
    for one, magnitude, status in zip(signed, maps.absolute(exact), maps.status(signed), strict=True):
        finite = status != maps.NON_FINITE
        rms, balance = (one.square().mean().sqrt(), one.sum() / one.abs().sum()) if finite else [torch.nan] * 2
        yield _grid(one), _grid(magnitude), float(rms), float(balance), status


def _grid(x: Tensor) -> list[float]:
    values: list[float] = F.adaptive_avg_pool2d(x[None], GRID)[0].flatten().tolist()
    return values


def write(path: Path, found: Iterable[tuple[Any, ...]]) -> None:
    """Write fingerprints, in the order given, whole or not at all."""
    columns: Sequence[Sequence[object]] = list(zip(*found, strict=True))
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)
    atomically(path, lambda temporary: pq.write_table(table, temporary))


def read(path: Path) -> list[Fingerprint]:
    """Fingerprints that `write` wrote; none if there is no such file."""
    rows = read_rows(path)[SCHEMA.names] if path.exists() else pd.DataFrame()
    return [Fingerprint(*row) for row in rows.itertuples(index=False)]
