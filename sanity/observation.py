"""What is seen of a batch at one stage: predictions, maps, and their likeness to the trained network's."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanity import maps, similarity
from sanity.attributions import Inputs
from sanity.engine import Engine, State, predict
from sanity.images import Images
from sanity.lanes import ALONE, Lanes
from sanity.models import Classifier
from sanity.plan import Plan
from sanity.randomization import Visit, Walk, guarded
from sanity.records import Array, Key, Prediction, Score, Step
from sanity.similarity import Description
from sanity.streams import stream

PANEL = 112
CHUNK = 8
"""Images explained together through all stages: memory does not grow with the number of images."""

BLOCK, LEAST_BLOCK = 4000, 4
"""Evaluations after which steps are handed on, so that an interrupted run loses minutes at most; and the fewest steps
explained together all the same, since the first of a block has nothing to reuse."""

Descriptions = Mapping[tuple[str, str], Description]
"""(method, similarity) -> what is kept of a batch's maps."""


@dataclass(frozen=True)
class Seen:
    """A batch at one visit: what was explained, the network's logits (N, classes), the maps by method."""

    inputs: Inputs
    logits: Tensor
    maps: Mapping[str, Tensor]


def dtype_of(plan: Plan) -> torch.dtype:
    """Floating-point type of the network's weights and activations in a plan's precision."""
    kinds = {"float64": torch.float64, "bfloat16": torch.bfloat16}
    return kinds.get(plan.precision, torch.float32)


@contextmanager
def arithmetic(plan: Plan) -> Iterator[None]:
    """Products in float32 are exact, and rounded to 10 bits only where the plan says tf32; as it was, outside.

    PyTorch's own setting lets a GPU's convolutions round. Everything is deterministic, so that a resumed run gives
    the same bits.
    """
    rounded = plan.precision == "tf32"
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = rounded
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=rounded):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def working(network: nn.Module, plan: Plan, device: torch.device | str) -> Iterator[None]:
    """`guarded`, on a device, in a plan's precision."""
    if plan.precision == "tf32" and torch.device(device).type != "cuda":
        raise ValueError("--precision tf32 is what a GPU's products may round to; on a processor take bfloat16")
    with arithmetic(plan), guarded(network, device, dtype_of(plan)):
        yield


def load(classifier: Classifier, chunk: Images, plan: Plan, device: str) -> Tensor:
    """Pictures as the network takes them: (N, C, H, W), channels-last, which convolutions run faster on.

    float32, or float64 in that precision: what is explained is not rounded to the network's eight bits.
    """
    pixels = chunk.load(classifier.preprocess)
    dtype = torch.float64 if plan.precision == "float64" else torch.float32
    return pixels.to(device, dtype, memory_format=torch.channels_last)


def glance(engine: Engine, plan: Plan, classifier: Classifier, chunk: Images, device: str) -> Seen:
    """Predict with the trained network, and choose what is explained; no maps yet."""
    pixels = load(classifier, chunk, plan, device)
    logits = predict(classifier.network, pixels, engine.batch_size)
    return Seen(Inputs(pixels, explained(plan.target, logits, chunk), chunk.ids, plan.seeds[0], "trained"), logits, {})


def first_look(engine: Engine, plan: Plan, classifier: Classifier, chunk: Images, device: str) -> Seen:
    """Predict and explain with the trained network."""
    seen = glance(engine, plan, classifier, chunk, device)
    return replace(seen, maps=engine.explain(classifier.network, seen.inputs))


def second_look(engine: Engine, plan: Plan, network: nn.Module, trained: Seen) -> Seen:
    """Let the methods that draw anew at every stage draw a second time; all others would repeat themselves."""
    once_more = engine.again(plan.fresh_noise)
    if not once_more.methods:
        return trained
    inputs = _on_occasion(plan, trained.inputs, "trained again")
    return replace(trained, inputs=inputs, maps={**trained.maps, **once_more.explain(network, inputs)})


class Baseline:
    """What a chunk's steps are compared with: the trained network's look, a second look, and what both look like.

    It begins as a `glance`: the maps are made with those of the first steps that are taken, which then need not repeat
    what they have in common with the trained network's. tell is given the trained look once it is complete.
    """

    def __init__(self, trained: Seen, tell: Callable[[Seen], object] = lambda seen: None) -> None:
        self.trained = self.control = trained
        self.originals: Descriptions = {}
        self.again: Descriptions = {}
        self.complete = False
        self._tell = tell

    def take(self, engine: Engine, plan: Plan, network: nn.Module, maps: Mapping[str, Tensor]) -> None:
        """Take the trained network's maps; the network stands as trained."""
        self.trained = replace(self.trained, maps=maps)
        self.originals = describe(plan, self.trained, engine.lanes)
        self.control = second_look(engine, plan, network, self.trained)
        drawn = {name: found for name, found in self.control.maps.items() if found is not self.trained.maps[name]}
        self.again = {**self.originals, **describe(plan, replace(self.control, maps=drawn), engine.lanes)}
        self.complete = True
        self._tell(self.trained)


def look_through(
    engine: Engine, plan: Plan, network: nn.Module, base: Baseline, walk: Walk, pending: Sequence[Key]
) -> Iterator[tuple[Key, Visit, Seen]]:
    """Predict and explain the same batch with the network as it stands at each of the pending steps of a walk.

    As many steps as memory allows are explained together, so that what they have in common is evaluated once; with the
    first of them the trained network, unless that has been looked at.
    """
    start = base.trained
    evaluations = engine.cost * len(start.inputs.ids)
    # Steps share random weights unless they are drawn anew.
    own = sum(p.numel() * p.element_size() for p in network.parameters()) if plan.redraw else 0
    whole = min(engine.capacity(start.inputs, own), max(LEAST_BLOCK, BLOCK // max(1, evaluations)))
    if plan.fresh_noise:
        whole = 1  # all points of a sweep share one seed
    waiting = deque(key for key in pending if key.stage_index)
    untouched = [key for key in pending if not key.stage_index]
    while waiting or untouched:
        first = [] if base.complete else [State(partial(walk.enter, 0), start.inputs, {})]
        block = [waiting.popleft() for _ in range(min(len(waiting), whole - len(first)))]
        states = [_state(plan, network, walk, start, key) for key in block]
        answers = engine.sweep(network, [*first, *states], partial(walk.enter, 0)) if first or states else []
        if not base.complete:
            walk.enter(0)
            base.take(engine, plan, network, answers.pop(0).maps)
        if untouched:
            key = untouched.pop()
            yield key, walk.enter(0), base.control
        for key, state, answer in zip(block, states, answers, strict=True):
            visit = walk.enter(key.stage_index)
            logits = answer.logits
            if logits is None:
                logits = predict(network, start.inputs.pixels, engine.batch_size)
            yield key, visit, Seen(state.inputs, logits, answer.maps)
        walk.forget()


def _state(plan: Plan, network: nn.Module, walk: Walk, trained: Seen, key: Key) -> State:
    """A step and what is explained there: the trained network's classes, or those that the network then predicts."""
    targets = trained.inputs.targets
    if plan.target == "repredicted":
        walk.enter(key.stage_index)
        targets = predict(network, trained.inputs.pixels, len(trained.inputs.ids)).argmax(1)
    inputs = _on_occasion(plan, trained.inputs, f"{key.order}/{key.seed}/{key.stage_index}")
    inputs = replace(inputs, targets=targets)
    return State(partial(walk.enter, key.stage_index), inputs, walk.values(key.stage_index))


def _on_occasion(plan: Plan, inputs: Inputs, occasion: str) -> Inputs:
    """The same pictures for another look, under noise of its own where the plan wants that."""
    seed = stream(inputs.seed, occasion).initial_seed() if plan.fresh_noise else inputs.seed
    return replace(inputs, occasion=occasion, seed=seed)


def explained(target: str, logits: Tensor, chunk: Images) -> Tensor:
    """Classes to be explained, (N,) int64. Raises ValueError for a label that is missing or out of range."""
    if target in ("predicted", "repredicted"):
        return logits.argmax(1)
    labels = chunk.labels if target == "label" else [int(target)] * len(chunk)
    for image, label in zip(chunk.ids, labels, strict=True):
        if label is None:
            raise ValueError(f"--target label: image {image!r} has no label")
        if not 0 <= label < logits.shape[1]:
            raise ValueError(f"class {label} of image {image!r}: the network has {logits.shape[1]} classes")
    return torch.tensor(labels, device=logits.device)


def describe(plan: Plan, seen: Seen, lanes: Lanes = ALONE) -> Descriptions:
    """Describe every method's maps for every similarity of the plan; foreground: pixels that are not baseline, 0."""
    foreground = seen.inputs.pixels.ne(0).any(1)
    pairs = [(method, name) for method in seen.maps for name in plan.similarities]
    found = lanes.map(lambda pair: similarity.get(pair[1]).describe(seen.maps[pair[0]], foreground), pairs)
    return dict(zip(pairs, found, strict=True))


def compare(
    plan: Plan,
    classifier: Classifier,
    key: Key,
    visit: Visit,
    base: Baseline,
    seen: Seen,
    lanes: Lanes = ALONE,
) -> Step:
    """Score a visit's maps against the trained network's, and note what the network says now."""
    originals = base.originals
    described = base.again if seen is base.control else describe(plan, seen, lanes)
    place = (classifier.name, key.order, key.seed, key.stage_index, visit.stage.name)
    targets = seen.inputs.targets.tolist()

    def scored(others: Descriptions) -> list[Score]:
        found = []
        compared = lanes.map(
            lambda pair: similarity.compare(similarity.get(pair[1]), originals[pair], others[pair]), list(others)
        )
        for (method, name), (values, status) in zip(others, compared, strict=True):
            for image, target, value, why in zip(seen.inputs.ids, targets, values.tolist(), status, strict=True):
                found.append(Score(*place, method, name, image, target, value, why))
        return found

    alone = visit.index or len(seen.inputs.ids) < 2
    unrelated = [] if alone else scored({pair: similarity.rolled(one) for pair, one in originals.items()})
    panels = panels_of(seen, plan.strips - key.chunk * CHUNK) if key.seed == plan.seeds[0] else {}
    raw = {f"{key.order}/{key.seed}/{visit.stage.name}/{m}": _array(a) for m, a in seen.maps.items() if plan.save_maps}
    said = list(predictions(classifier, place, seen))
    return Step(key, visit.stage.name, scored(described), said, panels, raw, visit.unchanged, unrelated)


def predictions(classifier: Classifier, place: tuple[str, str, int, int, str], seen: Seen) -> Iterator[Prediction]:
    """One row an image: top-1 class and probability, the explained class's probability."""
    probabilities = seen.logits.double().softmax(1)
    for n, image in enumerate(seen.inputs.ids):
        finite = bool(seen.logits[n].isfinite().all())
        top1, target = int(seen.logits[n].argmax()), int(seen.inputs.targets[n])
        sure, said = (float(probabilities[n, k]) if finite else math.nan for k in (top1, target))
        yield Prediction(*place, image, top1, classifier.class_name(top1), sure, target, said, finite)


def panels_of(seen: Seen, count: int) -> dict[tuple[str, str], Array]:
    """Maps of the first `count` images as strips show them: int8 (h, w), by (image, method).

    127 is the 99th percentile of the map's absolute value; a map that cannot be scaled is -128 all over.
    Large maps are averaged down by a whole factor, to at most PANEL pixels a side.
    """
    panels: dict[tuple[str, str], Array] = {}
    for method, found in seen.maps.items() if count > 0 else ():
        scaled = maps.clip_signed(maps.signed(found[:count])) * 127
        factor = math.ceil(max(scaled.shape[1:]) / PANEL)
        small = _array(F.avg_pool2d(scaled, factor, ceil_mode=True, count_include_pad=False))
        for image, panel in zip(seen.inputs.ids, small, strict=False):
            known = np.isfinite(panel).all()
            panels[image, method] = (panel.round() if known else np.full_like(panel, -128)).astype(np.int8)
    return panels


def _array(x: Tensor) -> Array:
    return x.detach().float().cpu().numpy()
