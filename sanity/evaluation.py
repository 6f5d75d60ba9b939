"""Deletion evaluations as a plan and a loop: settings that refuse nonsense, then rows, method by method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from sanity.adversarial import ATTACKS, SHARES, attacked, recovery
from sanity.attributions import Inputs, Method
from sanity.attributions.nulls import NULLS
from sanity.engine import Engine, predict
from sanity.images import Images
from sanity.models import Classifier, Preprocessing
from sanity.observation import CHUNK, explained, load, working
from sanity.plan import Plan
from sanity.pointing import Box, boxes_of, hit, through
from sanity.registry import suggest
from sanity.run import refuse_unsuited
from sanity.suppression import (
    ALPHAS,
    REDUCTIONS,
    Saliency,
    Scene,
    Values,
    curves,
    minimality,
    representativeness,
    saliency,
    unless,
)

EVALUATIONS = {
    "representativeness": "does the region suppress the class under other nulls",
    "minimality": "smallest box that suppresses the class, in pixels",
    "curves": "insertion and deletion curves with their areas",
    "recovery": "does deleting the region undo an adversarial attack",
    "pointing": "does the peak lie on the object; needs --boxes",
}
NO_BOX = "no box"


def _option(default: Any, words: str, metavar: str = "NAME") -> Any:
    return field(default=default, metadata={"help": words, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """What is measured. Raises ValueError for values that make no sense."""

    evaluations: tuple[str, ...] = _option(tuple(EVALUATIONS), "what to measure")
    nulls: tuple[str, ...] = _option(("blur", "constant", "noise"), "what regions are replaced by, one after another")
    radius: int = _option(10, "Gaussian blur of maps and of null pictures, in pixels", "N")
    reduction: str = _option(
        "auto", "map of an attribution by colour: absolute, signed; auto: absolute if it has all colours"
    )
    curve_steps: int = _option(20, "points of insertion and deletion curves after the first", "N")
    deletion_null: str = _option("zero", "what deleted pixels become in deletion curves")
    insertion_null: str = _option("blur", "what pixels are before they are inserted")
    boxes: str | None = _option(None, "JSON {image: [[x0, y0, x1, y1], ...]}, or VOC XML: a file or folder", "WHERE")
    tolerance: int = _option(15, "pixels by which the peak may miss a box, as the network sees the picture", "N")
    seed: int = _option(0, "of every random draw", "N")

    def __post_init__(self) -> None:
        known = {
            "evaluations": EVALUATIONS, "nulls": NULLS, "reduction": REDUCTIONS,
            "deletion_null": NULLS, "insertion_null": NULLS,
        }  # fmt: skip
        for name, choices in known.items():
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one not in choices:
                    raise ValueError(suggest(name.replace("_", "-").removesuffix("s"), one, choices))
            if isinstance(value, tuple) and (not value or len(set(value)) < len(value)):
                raise ValueError(f"--{name} is empty or names something twice: {' '.join(value)}")
        for name, low, high in (("radius", 0, 1000), ("curve_steps", 1, 10000), ("tolerance", 0, 10**6)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"--{name.replace('_', '-')} must be from {low} to {high}, not {getattr(self, name)}")
        if not self.active:
            raise ValueError("--evaluations pointing needs --boxes")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be a non-negative integer below 2^63, not {self.seed}")

    @property
    def active(self) -> tuple[str, ...]:
        """Evaluations that can be made: pointing only where boxes are given."""
        return tuple(name for name in self.evaluations if name != "pointing" or self.boxes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `run.json`."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


class Measure(NamedTuple):
    """A row: one image's number. level is an alpha, a share or a suppression, NaN where there is none."""

    image: str
    method: str
    evaluation: str
    level: float
    null: str
    value: float
    status: str


class Part(NamedTuple):
    """What is done, kept and resumed in one go: a chunk of images under one method."""

    chunk: int
    method: int


@dataclass(frozen=True)
class Task:
    """Everything a run of the evaluations needs. boxes: by image, as they lie in the picture itself."""

    plan: Plan
    settings: Settings
    classifier: Classifier
    images: Images
    boxes: Mapping[str, tuple[Box, ...]] = field(default_factory=dict)
    device: str = "cpu"
    batch_size: int = 8

    def parts(self) -> list[Part]:
        """All parts in order."""
        chunks = math.ceil(len(self.images) / CHUNK)
        return [Part(chunk, method) for chunk in range(chunks) for method in range(len(self.plan.methods))]

    def cost(self, part: Part) -> int:
        """Network evaluations of a part."""
        settings, method = self.settings, self.plan.explainers()[part.method]
        each = {
            "representativeness": len(ALPHAS) * len(settings.nulls) + 2,
            "minimality": len(ALPHAS) + 1,
            "curves": 2 * (settings.curve_steps + 1),
            "recovery": len(ATTACKS) * method.cost + len(SHARES) * (len(ATTACKS) + 1),
            "pointing": 0,
        }
        size = min(CHUNK, len(self.images) - part.chunk * CHUNK)
        return size * (method.cost + sum(each[name] for name in settings.active))

    def check(self) -> None:
        """Raise ValueError for what does not fit the network or the pictures, before anything is written."""
        network, preprocess = self.classifier.network, self.classifier.preprocess
        if "pointing" in self.settings.active:
            if not isinstance(preprocess, Preprocessing):
                raise ValueError(f"--boxes: the preprocessing of {self.classifier.name} is its own")
            if not any(boxes_of(self.boxes, image) for image in self.images.ids):
                raise ValueError(f"--boxes names none of the {len(self.images)} images, such as {self.images.ids[0]!r}")
        with working(network, self.plan, self.device):
            example = load(self.classifier, self.images.limit(1), self.plan, self.device)
            logits = predict(network, example, 1)
            explained(self.plan.target, logits.expand(len(self.images), -1), self.images)
            refuse_unsuited(self.plan.explainers(), network, example)


def evaluate(
    task: Task, done: frozenset[Part] = frozenset(), on_progress: Callable[[int], object] = lambda evaluations: None
) -> Iterator[tuple[Part, list[Measure]]]:
    """Rows of every part that is not done. The network is left as it came; no row depends on batch-mates."""
    classifier, methods = task.classifier, task.plan.explainers()
    with working(classifier.network, task.plan, task.device):
        for number, chunk in enumerate(task.images.chunks(CHUNK)):
            pending = [part for part in task.parts() if part.chunk == number and part not in done]
            if not pending:
                continue
            scene = scene_of(task, chunk, on_progress)
            wanted = ATTACKS if "recovery" in task.settings.active else ()
            attacks = {kind: attacked(scene, kind, classifier.preprocess) for kind in wanted}
            targets = mapped(task, chunk) if "pointing" in task.settings.active else ()
            for part in pending:
                found = measured(task, scene, attacks, targets, methods[part.method])
                yield part, list(rows(scene.inputs.ids, methods[part.method].name, found))


def scene_of(task: Task, chunk: Images, on_progress: Callable[[int], object]) -> Scene:
    """Open a chunk of pictures and ask the network what they show."""
    pixels = load(task.classifier, chunk, task.plan, task.device)
    logits = predict(task.classifier.network, pixels, task.batch_size)
    inputs = Inputs(pixels, explained(task.plan.target, logits, chunk), chunk.ids, task.settings.seed, "trained")
    radius = float(task.settings.radius)
    return Scene(task.classifier.network, inputs, logits, radius, task.batch_size, on_progress)


def measured(
    task: Task, scene: Scene, attacks: dict[str, Scene], boxes: Sequence[Sequence[Box]], method: Method
) -> Iterator[Values]:
    """Every evaluation of one method on a batch."""
    settings = task.settings
    engine = Engine([method], task.batch_size, scene.on_progress)

    def explain(other: Scene) -> Saliency:
        attributions = engine.explain(other.network, other.inputs)[method.name]
        return saliency(attributions, other.inputs, settings.reduction)

    found = explain(scene)
    nulls = {"deletion": settings.deletion_null, "insertion": settings.insertion_null}
    makers: dict[str, Callable[[], Iterator[Values]]] = {
        "representativeness": lambda: representativeness(scene, found, settings.nulls),
        "minimality": lambda: minimality(scene, found),
        "curves": lambda: curves(scene, found, nulls, settings.curve_steps),
        "recovery": lambda: recovery(scene, found, attacks, explain),
        "pointing": lambda: pointing(found, boxes, settings.tolerance),
    }
    for name in settings.active:
        yield from makers[name]()


def mapped(task: Task, chunk: Images) -> list[list[Box]]:
    """Boxes of each picture of a chunk as the network sees it; those cropped away are left out."""
    preprocess = task.classifier.preprocess
    if not isinstance(preprocess, Preprocessing):
        raise ValueError(f"--boxes: the preprocessing of {task.classifier.name} is its own")
    found = []
    for picture in chunk.pictures:
        own = boxes_of(task.boxes, picture.id)
        size = picture.open().size if own else (1, 1)
        found.append([box for one in own if (box := through(preprocess, size, one)) is not None])
    return found


def pointing(found: Saliency, boxes: Sequence[Sequence[Box]], tolerance: float) -> Iterator[Values]:
    """1 where the map's peak lies on a box, or near enough, else 0; "no box" where the picture has none."""
    width = found.maps.shape[2]
    peaks = [(int(p) % width, int(p) // width) for p in found.ranks.flatten(1).argmin(1)]
    hits = [float(hit(peak, own, tolerance)) for peak, own in zip(peaks, boxes, strict=True)]
    reasons = ["ok" if own else NO_BOX for own in boxes]
    values = torch.tensor(hits, dtype=torch.float64)
    yield Values("pointing", math.nan, "", *unless(values, found.status, reasons))


def rows(ids: Sequence[str], method: str, found: Iterator[Values]) -> Iterator[Measure]:
    """Values of a batch -> one row an image."""
    for one in found:
        for image, value, status in zip(ids, one.values.tolist(), one.status, strict=True):
            yield Measure(image, method, one.evaluation, one.level, one.null, value, status)


def with_controls(plan: Plan, settings: Settings, controls: Sequence[str]) -> Plan:
    """Add the controls that a pointing game is read against, where it is played without them."""
    if "pointing" not in settings.active:
        return plan
    named = {method.name for method in plan.explainers()}
    return replace(plan, methods=(*plan.methods, *(name for name in controls if name not in named)))
