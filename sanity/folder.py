"""A run's folder: how what is finished is kept, how it survives being killed, how it becomes the final files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sanity.blocks import SCORES, Block, block_of, loaded, packed, saved
from sanity.joining import join
from sanity.records import Array, Key, Prediction, Score, Step, atomically, read_header, write_json


class RunFolder:
    """A run's output folder. Each step is written whole, under its key, before the next one starts.

    `run.json` is written first, with status "running", and last, with status "complete"; in between
    `steps/` holds what is finished. Killed at any moment, the folder can be opened again with resume=True.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = path / "steps"

    def open(self, header: Mapping[str, Any], resume: bool) -> dict[str, Any]:
        """Start or resume; returns the header in force, a resumed run's own.

        Raises ValueError if the folder holds anything but the same plan, or the same plan without resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output {self.path} is a file, not a folder")
        found = (self.path / "run.json").exists()
        if not found and self.path.exists() and any(self.path.iterdir()) and not self._only_leftovers():
            raise ValueError(f"output {self.path} is not empty and holds no run; give another --output")
        if found:
            return self._reopen(header, resume)
        self.steps.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "run.json", header)
        return dict(header)

    def _only_leftovers(self) -> bool:
        """A run killed before its run.json was there leaves at most an empty steps folder and a part file."""
        return all(p.name in ("steps", ".run.json.part") for p in self.path.iterdir())

    def _reopen(self, header: Mapping[str, Any], resume: bool) -> dict[str, Any]:
        old = read_header(self.path)
        same = ("plan", "protocol_version", "weights_sha256", "images_sha256")
        differing = [k for k in same if k != "plan" and old.get(k) != header[k]]
        plans = old.get("plan", {}), header["plan"]
        # What an older version did not know of is off.
        differing += [k for k in {*plans[0], *plans[1]} if (plans[0].get(k) or None) != (plans[1].get(k) or None)]
        if differing:
            raise ValueError(
                f"output {self.path} holds another plan's results (differs in {', '.join(sorted(differing))}); "
                "give another --output"
            )
        if not resume:
            raise ValueError(f"output {self.path} already holds this plan's run; add --resume, or another --output")
        self.steps.mkdir(exist_ok=True)
        return old

    def keep_pictures(self, arrays: Mapping[str, Array]) -> None:
        """Write what strips show beside the maps: `pictures/<image>` and `stages/<order>`."""
        self.write({"pictures.npz": saved(arrays)})

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write finished steps as `blocks.packed` made them, each file whole or not at all, scores last."""
        for name, contents in files.items():
            atomically(self.steps / name, lambda path, contents=contents: path.write_bytes(contents))  # type: ignore[misc]

    def flush(self, step: Step) -> None:
        """Write one step; it counts as done when its scores, written last, are there."""
        self.write(packed([step]))

    def blocks(self) -> list[Block]:
        """What is already written, sorted."""
        return sorted(block_of(path) for path in self.steps.glob(f"*{SCORES}"))

    def done(self) -> frozenset[Key]:
        """Keys of the steps already written."""
        return frozenset(key for block in self.blocks() for key in block.keys)

    def finish(self, header: Mapping[str, Any], rank: Mapping[str, Sequence[object]]) -> dict[str, Any]:
        """Join the steps into the final files, in the plan's order whatever order they came in.

        rank: column -> its values in the plan's order. Images that a step lacks, as it failed, are left out:
        their rows, their raw maps and their strips.
        """
        blocks = self.blocks()
        counts = join(self._files(blocks, "scores"), Score, rank, self.path / "scores.parquet")
        join(self._files(blocks, "predictions"), Prediction, rank, self.path / "predictions.parquet")
        # Orders and seeds start from the same trained maps: one stage 0 a chunk tells all.
        first = {block.chunk: block for block in reversed(blocks) if block.first == 0}
        join(self._files(list(first.values()), "unrelated"), Score, rank, self.path / "unrelated.parquet")
        self._join_arrays([key for block in blocks for key in block.keys])
        complete = {**header, "status": "complete", "counts": counts, **self._unchanged(blocks)}
        write_json(self.path / "run.json", complete)
        return complete

    def tidy(self) -> None:
        """Remove the steps, once everything that is made of them is written."""
        shutil.rmtree(self.steps, ignore_errors=True)

    def _files(self, blocks: Sequence[Block], kind: str) -> list[Path]:
        return [self.steps / f"{block.stem}.{kind}.parquet" for block in blocks]

    def _join_arrays(self, keys: Sequence[Key]) -> None:
        """Panels of all steps -> strips.npz; raw maps of all steps -> maps.safetensors."""
        panels: dict[str, dict[int, Array]] = {}
        maps: dict[str, dict[int, Array]] = {}
        for key in keys:
            stem = Block(*key, key.stage_index).stem
            for label, value in loaded(self.steps / f"{stem}.panels.npz").items():
                method, image = label.split("/", 1)
                panels.setdefault(f"maps/{key.order}/{image}/{method}", {})[key.stage_index] = value
            for label, value in loaded(self.steps / f"{stem}.maps.npz").items():
                maps.setdefault(label, {})[key.chunk] = value
        if panels:
            extra = loaded(self.steps / "pictures.npz")
            columns = {name.removeprefix("stages/"): len(names) for name, names in extra.items() if "stages/" in name}
            whole = {k: v for k, v in panels.items() if len(v) == columns.get(k.split("/")[1], len(v))}
            stacked = {k: np.stack([v[i] for i in sorted(v)]) for k, v in whole.items()}
            strips = saved({**stacked, **extra})
            atomically(self.path / "strips.npz", lambda path: path.write_bytes(strips))
        if maps:
            from safetensors.numpy import save_file

            joined = {k: np.concatenate([v[i] for i in sorted(v)]) for k, v in maps.items()}
            atomically(self.path / "maps.safetensors", lambda path: save_file(joined, path))

    def _unchanged(self, blocks: Sequence[Block]) -> dict[str, Any]:
        """Parameters that re-initialisation left as they were, by order and stage."""
        found: dict[str, list[str]] = {}
        for block, path in zip(blocks, self._files(blocks, "scores"), strict=True):
            for index, names in json.loads(pq.read_schema(path).metadata[b"unchanged"]).items():
                found[f"{block.seed}/{block.order}/{index}"] = names
        return {"unchanged_parameters": found}
