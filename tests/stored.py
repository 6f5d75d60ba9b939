"""A small finished run on disk, with scores that are known, for tests of what reads stored runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sanity.records import Prediction, Score, schema

METHODS = ("gradient", "guided_backprop", "mask", "edges", "random")
STAGES = ("trained", "fc", "layer2", "layer1")
IMAGES = ("cat", "dog", "a<b>&'c.jpg", "100%_$#.jpg")
FINAL = {"gradient": 0.02, "guided_backprop": 0.8, "mask": 0.0, "edges": 1.0, "random": 0.0}


def scores(
    model: str = "net", orders: Sequence[str] = ("cascading",), similarities: Sequence[str] = ("ssim", "hog")
) -> pd.DataFrame:
    """Rows that fall straight from 1 to FINAL, an image's offset (mean zero) beside; most masks are constant."""
    rows = [
        _score(model, order, index, stage, method, similarity, place)
        for order in orders
        for index, stage in enumerate(STAGES)
        for method in METHODS
        for similarity in similarities
        for place in range(len(IMAGES))
    ]
    return pd.DataFrame(rows, columns=Score._fields)


def _score(model: str, order: str, index: int, stage: str, method: str, similarity: str, place: int) -> Score:
    lacking = method == "mask" and index > 0 and place > 0
    offset = 0.01 * (place - 1.5) * (index > 0 and method != "edges")
    value = float("nan") if lacking else 1 + (FINAL[method] - 1) * index / (len(STAGES) - 1) + offset
    status = "constant map" if lacking else "ok"
    return Score(model, order, 0, index, stage, method, similarity, IMAGES[place], place, value, status)


def header(model: str = "net", orders: Sequence[str] = ("cascading",), **changes: Any) -> dict[str, Any]:
    """A run.json."""
    plan = {"model": model, "weights": "pretrained", "images": "bundled", "orders": list(orders), "samples": 6}
    known = {
        "status": "complete",
        "protocol_version": "1",
        "plan": plan,
        "model": model,
        "trained": True,
        "weights": "ImageNet",
        "weights_sha256": "ab" * 32,
        "stages": {name: [f"{name}.weight", f"{name}.bias"] for name in STAGES[1:]},
        "untouched_parameters": ["norm.weight"],
        "unchanged_parameters": {},
        "skipped_images": {},
        "device": "cpu",
        "batch_size": 8,
        "saliency_sanity": "0.1.0",
        "started": "2026-11-20T18:19:42+00:00",
        "seconds": 1.5,
    }
    return known | changes


def maps(orders: Sequence[str], images: Sequence[str], side: int = 24) -> Mapping[str, Any]:
    """Arrays of a strips.npz; the mask's last map is constant, its second missing."""
    draws = np.random.default_rng(0)
    arrays: dict[str, Any] = {f"pictures/{image}": np.full((side, side, 3), 120, np.uint8) for image in images}
    for order in orders:
        arrays[f"stages/{order}"] = np.array(STAGES)
        for image in images:
            for method in METHODS:
                stack = draws.integers(-127, 128, (len(STAGES), side, side), dtype=np.int8)
                if method == "mask":
                    stack = np.abs(stack)
                    stack[1], stack[3] = -128, 5
                arrays[f"maps/{order}/{image}/{method}"] = stack
    return arrays


def store(
    folder: Path,
    model: str = "net",
    orders: Sequence[str] = ("cascading",),
    rows: pd.DataFrame | None = None,
    version: int | None = 1,
    shown: Sequence[str] = (IMAGES[0], IMAGES[2]),
    **changes: Any,
) -> Path:
    """Write a run's folder; version: of the schema, None for files from before there was one; shown: in strips."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = scores(model, orders) if rows is None else rows
    (folder / "run.json").write_text(json.dumps(header(model, orders, **changes)))
    table = pa.Table.from_pandas(frame, schema=schema(Score), preserve_index=False)
    metadata = None if version is None else {"sanity_schema": str(version)}
    pq.write_table(table.replace_schema_metadata(metadata), folder / "scores.parquet")
    seen = [
        Prediction(model, order, 0, index, stage, image, place, f"class {place}", 0.5, place, 0.5, True)
        for order in orders
        for index, stage in enumerate(STAGES)
        for place, image in enumerate(IMAGES)
    ]
    pd.DataFrame(seen, columns=Prediction._fields).to_parquet(folder / "predictions.parquet")
    np.savez(folder / "strips.npz", **maps(orders, shown))
    return folder
