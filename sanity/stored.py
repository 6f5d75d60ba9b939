"""A stored run, and whether another may be compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sanity import parts
from sanity.parts import Parts
from sanity.records import read_header, read_rows, read_unrelated
from sanity.registry import suggest

IRRELEVANT = {"weights", "images", "limit", "skip_bad_images", "save_maps", "strips", "hide_pictures"}
"""Parts of a plan that move no number, or that a hash speaks for."""
UNORDERED = {"methods", "orders", "similarities"}


@dataclass(frozen=True)
class Run:
    """A stored run. fingerprints: of the trained maps; unrelated: what verdicts judge by; None if not kept."""

    path: Path
    header: Mapping[str, Any]
    scores: pd.DataFrame | Parts
    fingerprints: pd.DataFrame | None = None
    unrelated: pd.DataFrame | None = None


def read(path: Path) -> Run:
    """Read a run's folder. Raises ValueError if there is none, or the run was not finished."""
    header = read_header(path)
    if header.get("status", "complete") != "complete":
        raise ValueError(f"{path} holds an unfinished run (status {header['status']!r}); resume it first")
    stored = path / "fingerprints.parquet"
    looks = read_rows(stored) if stored.exists() else None
    return Run(path, header, parts.scores(path), looks, read_unrelated(path))


def differences(baseline: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, str]:
    """What two runs' headers differ in, of all that decides numbers: name -> the two values."""
    hashes = {"weights": "weights_sha256", "images": "images_sha256", "protocol": "protocol_version"}
    pairs = {name: (baseline.get(key), current.get(key)) for name, key in hashes.items()}
    old, new = (header.get("plan") or {} for header in (baseline, current))
    for name in dict.fromkeys([*old, *new]):
        if name not in IRRELEVANT:
            pairs[name] = (_value(name, old), _value(name, new))
    return {name: _told(*pair) for name, pair in pairs.items() if pair[0] != pair[1]}


def _value(name: str, plan: Mapping[str, Any]) -> Any:
    """A plan's value, None where it is off or was not yet known.

    The order of methods and their like moves no number; that of seeds does, as the first names the noise.
    """
    value = plan.get(name) or None
    return sorted(map(str, value)) if isinstance(value, list) and name in UNORDERED else value


def _told(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        parts = [[str(value) for value in one if value not in other] for one, other in ((old, new), (new, old))]
        if any(parts):
            return ", ".join(
                f"{who} alone {' '.join(p)}" for who, p in zip(("baseline", "current"), parts, strict=True) if p
            )
    return " against ".join(_short(value) for value in (old, new))


def _short(value: Any) -> str:
    words = str(value)
    return words if len(words) <= 40 else f"{words[:12]}…" if " " not in words else f"{words[:39]}…"


def admit(baseline: Run, current: Run, allowed: Sequence[str]) -> dict[str, str]:
    """Differences, all of them allowed. Raises ValueError that names those that are not."""
    found = differences(baseline.header, current.header)
    numbers = {name for name in baseline.header.get("plan") or {} if name not in IRRELEVANT}
    known = sorted({"weights", "images", "protocol", "stages", *numbers, *found})
    for name in allowed:
        if name not in known:
            raise ValueError(f"--allow: {suggest('difference', name, known)}")
    refused = [name for name in found if name not in allowed]
    if refused:
        told = "; ".join(f"{name}: {found[name]}" for name in refused)
        more = ",".join([*allowed, *refused])
        raise ValueError(f"not the same experiment: {told} (to compare all the same: --allow {more})")
    return found
