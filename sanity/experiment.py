"""`--data mnist --model cnn` of `python -m sanity.run`: the published small experiments, spelt out as flags."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sanity import plan, train
from sanity.networks import NETWORKS
from sanity.registry import suggest
from sanity.training import DATASETS, LABELS, find_folder, load_data

TESTS = ("parameters", "data")
PRESETS = ("as-released-mnist", "as-published-mnist")
PRESET = PRESETS[0]
FLAGS = {
    "test": ("NAME", "what is randomized: parameters (default), or data, which is --orders data"),
    "data": (
        "NAME",
        f"the published experiment on {' or '.join(DATASETS)} with --model {' or '.join(NETWORKS)}: preset {PRESET}, "
        "the first 10 test images, networks trained here unless they are there already",
    ),
    "data-dir": ("DIR", "with --data: folder of the IDX files (default: fetched once, kept)"),
    "networks": ("DIR", "with --data: where trained networks are kept (default: beside torch's cache)"),
}
"""Flags that stand for others: placeholder, help."""


def spelt_out(arguments: Sequence[str]) -> tuple[list[str], tuple[Training, ...]]:
    """Replace FLAGS among a run's arguments by what they stand for; the trainings whose weights these name.

    Flags that stand there already win over those that `--data` puts. Without FLAGS: the arguments as they are.
    Raises ValueError for unknown names and for flags that make no sense together.
    """
    found, rest = _taken(arguments, FLAGS)
    test, data = found.get("test", "parameters"), found.get("data")
    if test not in TESTS:
        raise ValueError(suggest("test", test, TESTS))
    if test == "data" and _given(rest, "orders"):
        raise ValueError("--test data is --orders data; give one of the two")
    orders = ["--orders", "data"] if test == "data" else []
    if data is None:
        _refuse_orphans(found, test, rest)
        return [*rest, *orders], ()
    model, rest = _model(data, rest)
    folder, images = Path(found.get("networks", cache())), find_folder(data, _path(found.get("data-dir")))
    words = ["--model", f"mnist_{model}", "--images", str(images), *_methods(model, rest), *orders]
    trainings = []
    for flag, labels in (("weights", "true"), ("against", "permuted")):
        if (labels == "true" or test == "data") and not _given(rest, flag):
            trainings.append(Training(folder, images, data, model, labels))
            words += [f"--{flag}", str(trainings[-1].weights)]
    preset = [] if _given(rest, "preset") or _given(rest, "config") else ["--preset", PRESET]
    return [*preset, *words, *rest], tuple(trainings)


def cache() -> Path:
    """Where trained networks are kept unless told otherwise."""
    return Path(torch.hub.get_dir()).parent / "saliency_sanity"


@dataclass(frozen=True)
class Training:
    """One training of a small network, kept in a folder of its own below `root`; images: the IDX files' folder."""

    root: Path
    images: Path
    data: str
    model: str
    labels: str
    seed: int = 0

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.root / f"{self.data}_{self.model}_{self.labels}_{self.seed}"

    @property
    def weights(self) -> Path:
        """File that it ends with."""
        return self.folder / "model.safetensors"

    def ensure(self) -> None:
        """Train by the fast recipe, or go on with what was interrupted, unless it is finished.

        A finished training of this data set, network, kind of labels and seed is taken as it is, whatever its
        recipe was. Raises ValueError if the folder holds something that cannot be gone on with, or was made of other
        images.
        """
        named = {"data": self.data, "model": self.model, "labels": self.labels, "seed": self.seed}
        if not self._finished(named):
            words = [word for name, value in named.items() for word in (f"--{name}", str(value))]
            print(f"training {self.data} {self.model} on {self.labels} labels, kept in {self.folder}", file=sys.stderr)
            train.command([*words, "--data-dir", str(self.images), "--output", str(self.folder), "--resume"])
        elif self._header()["data_sha256"] != _sha256(self.images, self.data):
            raise ValueError(f"{self.folder} holds a network trained on other images than those in {self.images}")
        if missed := self.missed():
            print(f"note: {self.folder}: {missed}", file=sys.stderr)

    def missed(self) -> str:
        """In words, by how much a finished training missed its goal; empty if it did not."""
        header = self._header()
        judged = LABELS[self.labels]
        reached, goal = header["accuracy"][judged], header["recipe"]["goal"]
        if header["goal_met"] or goal == 1 or reached is None:
            return ""
        return f"{judged} accuracy {reached:.2%} on {self.labels} labels, below its goal of {goal:.2%}"

    def _header(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "train.json").read_text())
        return found

    def _finished(self, named: Mapping[str, Any]) -> bool:
        try:
            header = self._header()
            same = all(header["recipe"][name] == value for name, value in named.items())
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return same and header.get("status") == "complete" and self.weights.is_file()


@lru_cache
def _sha256(folder: Path, data: str) -> str:
    """Digest of a data set's files. Raises ValueError if they are those of another."""
    return load_data(folder, data).sha256


def _taken(arguments: Sequence[str], names: Sequence[str] | Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Values of the named flags, and all other words. Raises ValueError for a flag without a value."""
    found, rest, words = dict[str, str](), list[str](), iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in names:
            rest.append(word)
            continue
        found[name] = value if equals else next(words, "")
        if not found[name] or found[name].startswith("--"):
            raise ValueError(f"--{name} needs a value")
    return found, rest


def _given(words: Sequence[str], name: str) -> bool:
    return any(word.split("=")[0] == f"--{name}" for word in words)


def _refuse_orphans(found: Mapping[str, str], test: str, rest: Sequence[str]) -> None:
    """Raise ValueError for what makes no sense without `--data`."""
    if orphans := [f"--{name}" for name in ("data-dir", "networks") if name in found]:
        raise ValueError(f"{orphans[0]} goes with --data NAME")
    if test == "data" and not _given(rest, "against") and not _given(rest, "config"):
        raise ValueError(
            "--test data needs a network trained on permuted labels: --data NAME --model NAME trains what it needs, "
            "or give --weights TRUE --against PERMUTED"
        )


def _model(data: str, rest: list[str]) -> tuple[str, list[str]]:
    """Name in NETWORKS of the arguments' `--model`, and the other words. ValueError for any other."""
    if data not in DATASETS:
        raise ValueError(suggest("data", data, DATASETS))
    given, rest = _taken(rest, ["model"])
    model = given.get("model", "cnn").removeprefix("mnist_")
    if model not in NETWORKS:
        raise ValueError(f"--data {data} goes with --model {' or '.join(NETWORKS)}, not {model}")
    return model, rest


def _methods(model: str, rest: Sequence[str]) -> list[str]:
    """Flags for the preset's methods that suit the network: GradCAM needs a convolution."""
    named = _taken(rest, ["preset"])[0].get("preset", PRESET)
    if model == "cnn" or named not in PRESETS or any(_given(rest, flag) for flag in ("methods", "config")):
        return []
    return ["--methods", *(name for name in plan.preset(named)["methods"] if "gradcam" not in name)]


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)
