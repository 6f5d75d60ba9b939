"""How gradients are evaluated: which points, how many at a time, what is shared between methods."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sanity.attributions.base import (
    PLAIN,
    FunctionMethod,
    GradientMethod,
    Inputs,
    Method,
    Moments,
    Point,
    Rule,
    Sees,
    logits_of,
)
from sanity.attributions.gradients import PIXELS
from sanity.folding import Folded, foldable
from sanity.lanes import ALONE, Lanes
from sanity.memory import CANDIDATES, available, bytes_of, fastest, in_parts, tried
from sanity.reuse import CannotReuseError, Recording, Replaying

CACHE_BYTES = 2**30
"""Noise and path points of one chunk of images are kept between stages up to this much memory."""
SWEEP_BYTES = 3 * 2**29
"""States of the network are explained together while their sums and maps take up to this much memory."""
WORTH = 0.05
"""A state is run as a whole where less than this share of the network's calls could be reused."""

T = TypeVar("T")


class State(NamedTuple):
    """One way the network's weights may stand: enter() puts them so, inputs are what is explained then."""

    enter: Callable[[], object]
    inputs: Inputs


class Answer(NamedTuple):
    """Attributions by method, (N, C or 1, H, W) each, and the logits (N, classes) if they were met with."""

    maps: dict[str, Tensor]
    logits: Tensor | None


def gradients(
    network: nn.Module,
    points: Tensor,
    images: Tensor,
    targets: Tensor,
    rule: Rule,
    recording: Recording | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of each target's logit at each image's point, and the logits.

    points (N, C, H, W), images likewise, targets (N,) -> (N, C, H, W), (N, classes). With a recording of the
    same points, which must be the very tensor that was run then, only what has changed is run.
    """
    with torch.enable_grad():
        x = points if recording else points.detach().requires_grad_()
        with rule.context(network, points, images), Replaying(recording) if recording else nullcontext() as replay:
            logits = logits_of(network, x)
        chosen = logits.gather(1, targets.to(logits.device)[:, None])
        found = torch.autograd.grad(chosen.sum(), x, retain_graph=recording is not None)[0]
    if recording is not None and replay is not None:
        recording.shares.append(replay.reused / max(1, len(recording.calls)))
    return found, logits.detach()


class Engine:
    """Explains batches with a set of methods, evaluating every distinct point once.

    batch_size is the number of network evaluations taken at a time; results do not depend on it beyond
    rounding, because each image's points are combined in a fixed order in float64. With fold, gradients are
    taken through BatchNorms folded into the convolutions before them; with reuse, a sweep through several
    states of the network repeats nothing that comes before the first changed parameter. lanes: micro-batches taken
    side by side, for networks whose forward pass keeps nothing in the network.
    on_progress(evaluations) is told after each step how many evaluations an image were done.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        batch_size: int,
        on_progress: Callable[[int], object] = lambda evaluations: None,
        fold: bool = True,
        reuse: bool = True,
        lanes: Lanes = ALONE,
    ) -> None:
        self.methods = methods
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.fold, self.reuse, self.lanes = fold, reuse, lanes
        self._folds: dict[nn.Module, Mapping[Sees, nn.Module]] = {}
        self._points: dict[tuple[Point, str, int], Tensor] = {}
        self._chunk: tuple[str, ...] = ()

    @property
    def cost(self) -> int:
        """Network evaluations an image that `explain` takes."""
        shared = {(m.rule.name, p) for m in self._combining for p in m.points(m.options)}
        return len(shared) + sum(m.cost for m in self.methods if not isinstance(m, GradientMethod))

    def fresh(self) -> Engine:
        """An engine for those methods only that draw anew at every occasion."""
        methods = [method for method in self.methods if method.fresh]
        return Engine(methods, self.batch_size, self.on_progress, self.fold, self.reuse, self.lanes)

    def capacity(self, inputs: Inputs) -> int:
        """Number of states to be swept through together, so that their sums and maps fit into SWEEP_BYTES."""
        pixels = inputs.pixels.numel()
        sums = sum(8 * (1 + method.spread) for method in self._combining)
        maps = inputs.pixels.element_size() * len(self.methods)
        return max(1, SWEEP_BYTES // max(1, pixels * (sums + maps)))

    @property
    def _combining(self) -> list[GradientMethod]:
        return [method for method in self.methods if isinstance(method, GradientMethod)]

    def explain(self, network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Attributions by method: name -> (N, C or 1, H, W), in the dtype and on the device of the pixels.

        Raises ValueError if a method's map has another shape.
        """
        return self.sweep(network, [State(lambda: None, inputs)])[0].maps

    def sweep(
        self, network: nn.Module, states: Sequence[State], trained: Callable[[], object] = lambda: None
    ) -> list[Answer]:
        """Explain the same pictures in several states of the network; trained() puts it as it was trained.

        All inputs have the same pixels, ids and seed. Raises ValueError if a method's map has another shape.
        """
        inputs = states[0].inputs
        if inputs.ids != self._chunk:
            self._chunk, self._points = inputs.ids, {}
        found: list[dict[str, Tensor]] = [{} for _ in states]
        logits: list[Tensor | None] = [None for _ in states]
        fast = self._fast(network, inputs)
        for rule in {method.rule.name: method.rule for method in self._combining}.values():
            answers = self._combine(fast[rule.sees], states, rule, trained)
            for n, (maps, said) in enumerate(answers):
                found[n] |= maps
                logits[n] = said if logits[n] is None else logits[n]
        functions = [method for method in self.methods if isinstance(method, FunctionMethod)]
        for n, state in enumerate(states if functions else ()):
            state.enter()
            for method in functions:
                found[n][method.name] = self._call(method, fast[method.sees], state.inputs)
        order = [method.name for method in self.methods]
        return [Answer({name: maps[name] for name in order}, said) for maps, said in zip(found, logits, strict=True)]

    def _fast(self, network: nn.Module, inputs: Inputs) -> Mapping[Sees, nn.Module]:
        """The network as it may be run under rules that see more and more of it."""
        if not self.fold:
            return dict.fromkeys(Sees, network)
        if network not in self._folds:
            folded = Folded(network, foldable(network, inputs.pixels[:1]))
            self._folds = {network: {Sees.LOGITS: folded.clipping(), Sees.RECTIFIERS: folded, Sees.LAYERS: network}}
        return self._folds[network]

    def _call(self, method: FunctionMethod, network: nn.Module, inputs: Inputs) -> Tensor:
        def explain(cut: slice) -> Tensor:
            part = part_of(inputs, cut.start, cut.stop)
            with torch.enable_grad():
                maps = method(network, part).detach()
            n, _, height, width = part.pixels.shape
            if maps.ndim != 4 or (len(maps), *maps.shape[2:]) != (n, height, width):
                raise ValueError(f"method {method.name!r} gave {tuple(maps.shape)} for {tuple(part.pixels.shape)}")
            return maps.to(part.pixels)

        def lane(cut: slice) -> list[Tensor]:
            whole = cut.stop - cut.start
            return self._fitting(lambda p: explain(slice(cut.start + p.start, cut.start + p.stop)), whole)

        # Only what looks at the logits alone leaves the network's modules as they are for the other lanes.
        count, lanes = len(inputs.ids), self.lanes if method.sees is Sees.LOGITS else ALONE
        found: list[Tensor] = []
        start = 0
        while start < count:
            size = min(self.batch_size, math.ceil((count - start) / lanes.count))
            edges = [min(start + size * k, count) for k in range(lanes.count + 1)]
            for parts in lanes.map(lane, [slice(a, b) for a, b in pairwise(edges) if a < b]):
                found += parts
            self.on_progress(method.cost * (edges[-1] - start))
            start = edges[-1]
        return torch.cat(found)

    def _fitting(self, evaluate: Callable[[slice], T], count: int) -> list[T]:
        """`evaluate` for all of `count` at once; if memory does not suffice in parts, and so from then on."""
        parts, size = in_parts(evaluate, count, count)
        if size < count:
            self.batch_size = size
        return parts

    def _gradients(self, network: nn.Module, points: Tensor, inputs: Inputs, rule: Rule) -> tuple[Tensor, Tensor]:
        """`gradients` of a micro-batch as a whole, or in parts if memory does not suffice."""

        def part(cut: slice) -> tuple[Tensor, Tensor]:
            return gradients(network, points[cut], inputs.pixels[cut], inputs.targets[cut], rule)

        found, logits = zip(*self._fitting(part, len(points)), strict=True)
        return torch.cat(found), torch.cat(logits)

    def _combine(
        self, network: nn.Module, states: Sequence[State], rule: Rule, trained: Callable[[], object]
    ) -> list[Answer]:
        """Evaluate a rule's points, in every state, and combine them."""
        methods = [method for method in self._combining if method.rule.name == rule.name]
        users: dict[Point, list[GradientMethod]] = {}
        for method in methods:
            for point in method.points(method.options):
                users.setdefault(point, []).append(method)
        inputs = states[0].inputs
        sums = [{m.name: _Sums(m, inputs.pixels) for m in methods} for _ in states]
        said: list[dict[int, Tensor]] = [{} for _ in states]
        # States in which too little could be reused are run as a whole.
        sharing = [self.reuse and rule.replayable and len(states) > 1 for _ in states]
        work = deque((n, point) for n in range(len(inputs.ids)) for point in users)
        while work:
            group = self._group(work, inputs)
            if any(sharing):
                trained()
                self.lanes.map(lambda batch: batch.record(network, inputs, rule), group)
            for s, state in enumerate(states):
                state.enter()
                evaluate = partial(self._evaluate, network, state.inputs, rule, sharing[s])
                for batch, (found, logits) in zip(group, self.lanes.map(evaluate, group), strict=True):
                    for (n, point), gradient, row in zip(batch.work, found, logits, strict=True):
                        if rule is PLAIN and point in PIXELS:
                            said[s][n] = row
                        for method in users[point]:
                            sums[s][method.name].add(n, point, gradient, inputs)
                    self.on_progress(len(batch.work))
                sharing[s] = sharing[s] and all(batch.share >= WORTH for batch in group)
        return [
            Answer(
                {name: one.map(state.inputs) for name, one in sums[s].items()},
                torch.stack([said[s][n] for n in range(len(inputs.ids))]) if said[s] else None,
            )
            for s, state in enumerate(states)
        ]

    def _group(self, work: deque[tuple[int, Point]], inputs: Inputs) -> list[_Batch]:
        """The next micro-batches, one a lane; the last of the work is shared evenly."""
        size = min(self.batch_size, math.ceil(len(work) / self.lanes.count))
        group = []
        for _ in range(self.lanes.count):
            if batch := [work.popleft() for _ in range(min(size, len(work)))]:
                group.append(_Batch(batch, torch.stack([self._at(point, inputs, n) for n, point in batch])))
        return group

    def _evaluate(
        self, network: nn.Module, inputs: Inputs, rule: Rule, reuse: bool, batch: _Batch
    ) -> tuple[Tensor, Tensor]:
        """`gradients` of one micro-batch, with what is kept of the trained pass where that can be."""
        mates = batch.mates(inputs)
        if reuse and batch.recording is not None:
            answer = batch.again(network, mates, rule)
            if answer is not None:
                return answer
        return self._gradients(network, batch.points.detach(), mates, rule)

    def _at(self, point: Point, inputs: Inputs, n: int) -> Tensor:
        key = (point, inputs.ids[n], inputs.seed)
        if key in self._points:
            return self._points[key]
        place = point.at(inputs.pixels[n], inputs.ids[n], inputs.seed)
        if (len(self._points) + 1) * place.numel() * place.element_size() <= CACHE_BYTES:
            self._points[key] = place
        return place


def record(network: nn.Module, points: Tensor, images: Tensor, rule: Rule) -> Recording:
    """Run a network at points (N, C, H, W) that require gradients, and keep all that it computes."""
    recording = Recording()
    with torch.enable_grad(), rule.context(network, points, images), recording:
        logits_of(network, points)
    return recording


@dataclass
class _Batch:
    """A micro-batch: (image, point) one by one, the points (N, C, H, W), and what is kept of the trained pass.

    share: of the calls kept, how many the last state could reuse.
    """

    work: list[tuple[int, Point]]
    points: Tensor
    recording: Recording | None = None
    share: float = 0.0

    def mates(self, inputs: Inputs) -> Inputs:
        """The images that the points belong to, one a point."""
        owners = [n for n, _ in self.work]
        return Inputs(inputs.pixels[owners], inputs.targets[owners], tuple(inputs.ids[n] for n in owners))

    def record(self, network: nn.Module, inputs: Inputs, rule: Rule) -> None:
        """Keep the forward pass, if memory suffices."""
        self.points.requires_grad_()
        self.recording = tried(partial(record, network, self.points, self.mates(inputs).pixels, rule))

    def again(self, network: nn.Module, mates: Inputs, rule: Rule) -> tuple[Tensor, Tensor] | None:
        """`gradients` by the kept pass, or None, from then on, if that cannot be or memory does not suffice."""
        assert self.recording is not None
        self.share = 0.0
        try:
            found = tried(partial(gradients, network, self.points, mates.pixels, mates.targets, rule, self.recording))
        except CannotReuseError:
            found = None
        if found is None:
            self.recording = None
        else:
            self.share = self.recording.shares[-1]
        return found


class _Sums:
    """A method's gradients at its points, and their squares where it asks for them, summed up in float64."""

    def __init__(self, method: GradientMethod, pixels: Tensor) -> None:
        self.method = method
        self.total = torch.zeros((1 + method.spread, *pixels.shape), dtype=torch.float64, device=pixels.device)

    def add(self, n: int, point: Point, gradient: Tensor, inputs: Inputs) -> None:
        """Add image n's gradient (C, H, W) at a point."""
        value = gradient
        if self.method.weigh is not None:
            value = value.double() * self.method.weigh(point, inputs.pixels[n], inputs.ids[n], inputs.seed)
        # float32 is added to float64 as it is read: no copy is made.
        self.total[0, n] += value
        if self.method.spread:
            self.total[1, n] += value.double().square()

    def map(self, inputs: Inputs) -> Tensor:
        """The method's attribution of all images (N, C, H, W)."""
        mean = self.total / self.method.cost
        moments = Moments(mean[0], mean[1] if self.method.spread else None)
        return self.method.combine(inputs, moments).to(inputs.pixels)


def part_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Images start to stop of a batch."""
    cut = slice(start, stop)
    return replace(inputs, pixels=inputs.pixels[cut], targets=inputs.targets[cut], ids=inputs.ids[cut])


def predict(network: nn.Module, pixels: Tensor, batch_size: int) -> Tensor:
    """Logits (N, classes) of pixels (N, C, H, W), without gradients.

    Raises ValueError for a network that writes to its input.
    """
    before = pixels._version
    with torch.no_grad():
        parts, _ = in_parts(lambda cut: logits_of(network, pixels[cut]), len(pixels), batch_size)
    if pixels._version != before:
        raise ValueError("the network changes its input in place, so no two looks would see the same: let it copy")
    return torch.cat(parts)


def best_batch(network: nn.Module, example: Tensor) -> int:
    """Number of evaluations at a time that runs fastest here, measured; example (1, C, H, W)."""
    target = torch.zeros(1, dtype=torch.int64, device=example.device)

    def step(n: int) -> None:
        points, targets = example.expand(n, -1, -1, -1).contiguous(memory_format=torch.channels_last), target.expand(n)
        gradients(network, points, points, targets, PLAIN)
        if example.is_cuda:
            torch.cuda.synchronize()

    each = bytes_of(lambda x: logits_of(network, x), example)
    return fastest(step, CANDIDATES[example.device.type], each, available(example.device))
