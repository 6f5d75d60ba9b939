"""The small classifiers, trained on true or on permuted labels: recipes, data, the loop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanity import images
from sanity.models import vision
from sanity.networks import NETWORKS, SIDE
from sanity.registry import suggest
from sanity.streams import stream

DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
"""Data sets, and what torchvision calls them."""
DIGESTS = {
    "mnist": "1e35582d42a90940c55b956deb61875c020b567ed20e3c5b174f52bf7809ed9b",
    "fashion-mnist": "ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619",
}
"""SHA-256 that the published sets have when read by `load_data`: files in the wrong folder look alike."""
LABELS = {"true": "test", "permuted": "train"}
"""Kinds of labels, and the images whose accuracy the goal is about."""
CLASSES = 10
DECAYED = ("hidden1.weight", "hidden2.weight", "fc1.weight")
VALIDATION = 5000
"""The first training images are held out [code released with Adebayo et al. 2018]."""
SPLITS = ("train", "validation", "test")
NEAR = 0.05
"""Training accuracy is measured once the passes' own, which lags behind, is this near to the goal."""


# --- recipes


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a network's numbers on one machine; the defaults are the released code's.

    goal: test accuracy for true labels, training accuracy for permuted ones; training ends with the epoch that
    reaches it, and after `epochs` anyway. learning_rate is Adam's; schedule: constant, or linear or cosine
    down to 0 over all epochs. precision: float32, or bfloat16 for the products of the training passes
    (weights, and all accuracies, are float32). weight_decay: factor of half the sum of squares of the weights
    of the CNN's hidden1, hidden2 and fc1. Raises ValueError for what makes no sense.
    """

    data: str = "mnist"
    model: str = "cnn"
    labels: str = "true"
    seed: int = 0
    goal: float = 0.99
    epochs: int = 50
    batch_size: int = 50
    learning_rate: float = 1e-4
    schedule: str = "constant"
    precision: str = "float32"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, names in _names().items():
            if getattr(self, name) not in names:
                raise ValueError(f"--{name}: {suggest(name, getattr(self, name), names)}")
        limits = {"seed": (0, 2**63 - 1), "goal": (0, 1), "epochs": (1, 10**6), "batch_size": (1, 10**6)}
        for name, (low, high) in {**limits, "learning_rate": (1e-12, 1e6), "weight_decay": (0, 1e6)}.items():
            if not low <= getattr(self, name) <= high:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be from {low} to {high}, not {getattr(self, name)}")
        if self.weight_decay and self.model != "cnn":
            raise ValueError(f"--weight-decay is for the CNN, not for {self.model}")

    @property
    def judged(self) -> str:
        """Images whose accuracy the goal is about: "test" or "train"."""
        return LABELS[self.labels]


def _names() -> dict[str, Iterable[str]]:
    return {"data": DATASETS, "model": NETWORKS, "labels": LABELS, "schedule": SCHEDULES, "precision": PRECISIONS}


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""Share of the steps done, in [0, 1) -> factor of the learning rate."""
PRECISIONS = ("float32", "bfloat16")
MEMORISED = 0.95
GOALS = {
    ("mnist", "cnn"): 0.99,
    ("mnist", "mlp"): 0.985,
    ("fashion-mnist", "cnn"): 0.91,
    ("fashion-mnist", "mlp"): 0.89,
}
"""Test accuracy with true labels; with permuted ones the goal is MEMORISED, of the training images."""
# Without it the first weights stay: fc1's deviation is .09 of .1 at the goal, with it .02, and the maps lose much of
# their noise. Permuted labels are learnt without: it hinders memorising.
DECAY: Mapping[tuple[str, str], Mapping[str, Any]] = {("cnn", "true"): {"weight_decay": 1e-3}}
"""The released code's, by model and labels, in the fast recipe and as published."""
FAST: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("cnn", "true"): {"epochs": 10, "batch_size": 64, "learning_rate": 1e-3, "schedule": "cosine"},
    ("mlp", "true"): {"epochs": 20, "batch_size": 128, "learning_rate": 5e-4, "schedule": "cosine"},
    ("cnn", "permuted"): {"epochs": 40, "batch_size": 100, "learning_rate": 4e-4, "schedule": "linear"},
    ("mlp", "permuted"): {"epochs": 30, "batch_size": 128, "learning_rate": 3e-4, "schedule": "linear"},
}
"""What went up fastest of what was tried on a processor, in the number format that it multiplies fastest."""


def recipe(data: str, model: str, labels: str = "true", published: bool = False, **changes: Any) -> Recipe:
    """Recipe with its goal, fast or as published; `changes` win. ValueError for unknown names."""
    Recipe(data, model, labels)
    goal = GOALS[data, model] if labels == "true" else MEMORISED
    ways = {} if published else {"precision": fast_precision(), **FAST[model, labels]}
    return Recipe(data, model, labels, **{"goal": goal, **DECAY.get((model, labels), {}), **ways, **changes})


def fast_precision() -> str:
    """The number format in which this processor multiplies fastest; many emulate bfloat16, at a third of the speed."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return "bfloat16" if any(getattr(torch.cpu, name, bool)() for name in asked) else "float32"


# --- data


class Split(NamedTuple):
    """Images and classes: pixels (N, 1, 28, 28) uint8, labels (N,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DataSet:
    """What is trained on, the validation and the test images; sha256 of all the bytes as they were read."""

    train: Split
    validation: Split
    test: Split
    sha256: str


def find_folder(name: str, folder: Path | None = None) -> Path:
    """Folder of a data set's IDX files: `folder` or where torchvision puts them below it.

    Without a folder the set is fetched by torchvision, once, into torch's cache. FileNotFoundError if the
    folder has no such files, ValueError if they cannot be fetched.
    """
    if folder is None:
        folder = Path(torch.hub.get_dir()).parent / "datasets"
        if not _held(folder / DATASETS[name] / "raw"):
            _fetch(name, folder)
    places = [folder, folder / "raw", folder / DATASETS[name] / "raw", folder / name]
    if (found := next((place for place in places if _held(place)), None)) is None:
        raise FileNotFoundError(f"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {str(folder)!r}")
    return found


def _held(place: Path) -> bool:
    return any((place / f"train-images-idx3-ubyte{end}").is_file() for end in ("", ".gz"))


def _fetch(name: str, root: Path) -> None:
    try:
        getattr(vision().datasets, DATASETS[name])(str(root), download=True)
    except (RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ValueError(
            f"{name} is not in {root} and cannot be fetched ({reason}); give a folder of its IDX files with --data-dir"
        ) from None


def load_data(folder: Path, name: str = "") -> DataSet:
    """Read IDX files; the first 5000 training images become validation.

    Raises ValueError for other than 28x28, and where a data set's name is given and the files are those of another.
    """
    every, test = (_read(folder, split) for split in ("train", "test"))
    if len(every.labels) <= VALIDATION:
        raise ValueError(f"{str(folder)!r} holds {len(every.labels)} training images: needs more than {VALIDATION}")
    digest = hashlib.sha256()
    for part in (*every, *test):
        digest.update(part.numpy().tobytes())
    for other, known in DIGESTS.items():
        if name not in ("", other) and digest.hexdigest() == known:
            raise ValueError(f"{str(folder)!r} holds {other}, not {name}")
    kept, held = (Split(*(x[part] for x in every)) for part in (slice(VALIDATION, None), slice(VALIDATION)))
    return DataSet(kept, held, test, digest.hexdigest())


def _read(folder: Path, split: str) -> Split:
    pictures = images.idx(folder, split)
    pixels = torch.from_numpy(np.stack([np.asarray(picture.open()) for picture in pictures.pictures]))
    labels = torch.tensor([label for label in pictures.labels if label is not None])
    if pixels.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{split} pictures in {str(folder)!r} are {tuple(pixels.shape[1:])}, not {SIDE}x{SIDE}")
    if labels.max() >= CLASSES:
        raise ValueError(f"{split} labels in {str(folder)!r} go up to {int(labels.max())}: more than {CLASSES} classes")
    return Split(pixels[:, None], labels)


def with_labels(data: DataSet, plan: Recipe) -> DataSet:
    """Give the data the recipe's labels: only those trained on are ever permuted."""
    if plan.labels == "true":
        return data
    return replace(data, train=Split(data.train.pixels, permuted(data.train.labels, plan.seed)))


def permuted(labels: Tensor, seed: int) -> Tensor:
    """Permute labels (N,) among the images, once and for all: every class keeps its number of images."""
    return labels[torch.randperm(len(labels), generator=stream(seed, "labels"))]


# --- the loop


class Epoch(NamedTuple):
    """What one pass came to: mean loss, and accuracies as shares.

    running is met with during the pass, while the weights move; train is measured after it, on the labels that
    were trained on. What tells nothing of the goal is not measured, and None: train, where `running` was still far
    from it; validation and test, too, where the goal is of the training images. seconds are those of all of it.
    """

    number: int
    loss: float
    running: float
    train: float | None
    validation: float | None
    test: float | None
    seconds: float


@dataclass
class State:
    """A network in training: all that a checkpoint holds."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    history: list[Epoch] = field(default_factory=list)


def begin(plan: Recipe) -> State:
    """Build the network with its own initialiser, from the seed, and its optimiser."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(plan.seed, "weights").initial_seed())
        network = NETWORKS[plan.model](CLASSES).to(memory_format=torch.channels_last)
    # torch adds factor * weight to the gradient, which is what the released code's l2_loss comes to.
    factors = {p: plan.weight_decay for n, p in network.named_parameters() if n in DECAYED}
    groups = [{"params": [p], "weight_decay": factors.get(p, 0.0)} for p in network.parameters()]
    return State(network, torch.optim.Adam(groups, plan.learning_rate, fused=True))


OnStep = Callable[[int, float, float], object]
"""Told after every step: images in it, mean loss and accuracy of the epoch so far."""


def train(plan: Recipe, data: DataSet, state: State, on_step: OnStep = lambda *told: None) -> Iterator[Epoch]:
    """Go on until the goal is met or the epochs are over; yields after each, state.history grown by it.

    data: `with_labels`. Each epoch's shuffle has a stream of its own, so that a state restored between epochs
    goes on as if nothing had been. Raises ValueError when the loss is no longer finite.
    """
    while len(state.history) < plan.epochs and not met(plan, state.history):
        start, number = time.perf_counter(), len(state.history) + 1
        loss, running = _pass(plan, data.train, state, number, on_step)
        found = dict.fromkeys(SPLITS, None) | measured(plan, data, state.network, running)
        state.history.append(Epoch(number, loss, running, **found, seconds=time.perf_counter() - start))
        yield state.history[-1]


def measured(plan: Recipe, data: DataSet, network: nn.Module, running: float) -> dict[str, float]:
    """Accuracies of those SPLITS that are worth their time after a pass that met `running`."""
    near = running >= plan.goal - NEAR
    wanted = [name for name in SPLITS if (near if plan.judged == "train" else name != "train")]
    return {name: accuracy(network, getattr(data, name)) for name in wanted}


def met(plan: Recipe, history: Sequence[Epoch]) -> bool:
    """Whether the last epoch reached the goal."""
    reached = getattr(history[-1], plan.judged) if history else None
    return reached is not None and reached >= plan.goal


def _pass(plan: Recipe, split: Split, state: State, number: int, on_step: OnStep) -> tuple[float, float]:
    """One epoch's steps: mean loss and accuracy on the way."""
    # Weight decay takes weights below the smallest normal number, which a processor multiplies at a third of its speed.
    torch.set_flush_denormal(True)
    try:
        return _steps(plan, split, state, number, on_step)
    finally:
        torch.set_flush_denormal(False)


def _steps(plan: Recipe, split: Split, state: State, number: int, on_step: OnStep) -> tuple[float, float]:
    order = torch.randperm(len(split.labels), generator=stream(plan.seed, "shuffle", number))
    total, right = 0.0, 0
    state.network.train()
    for start in range(0, len(order), plan.batch_size):
        batch = order[start : start + plan.batch_size]
        done = (number - 1 + start / len(order)) / plan.epochs
        for group in state.optimiser.param_groups:
            group["lr"] = plan.learning_rate * SCHEDULES[plan.schedule](done)
        labels = split.labels[batch]
        loss, logits = _step(plan, state, _inputs(split.pixels[batch]), labels)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {number}, at image {start}: try a smaller --learning-rate")
        total, right = total + loss * len(batch), right + int((logits.argmax(1) == labels).sum())
        seen = start + len(batch)
        on_step(len(batch), total / seen, right / seen)
    return total / len(order), right / len(order)


def _step(plan: Recipe, state: State, pixels: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16"):
        logits = state.network(pixels)
    loss = F.cross_entropy(logits.float(), labels)
    state.optimiser.zero_grad()
    torch.autograd.backward([loss])
    state.optimiser.step()
    return loss.item(), logits.detach()


def _inputs(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(network: nn.Module, split: Split, batch_size: int = 500) -> float:
    """Share of images whose class is predicted, in float32."""
    network.eval()
    parts = [slice(start, start + batch_size) for start in range(0, len(split.labels), batch_size)]
    said = torch.cat([network(_inputs(split.pixels[part])).argmax(1) for part in parts])
    return float((said == split.labels).double().mean())
