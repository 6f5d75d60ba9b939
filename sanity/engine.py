"""How gradients are evaluated: which points, how many at a time, what is shared between methods."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from threading import Lock
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sanity.attributions.base import (
    PLAIN,
    FunctionMethod,
    GradientMethod,
    Inputs,
    Method,
    Point,
    Rule,
    Sees,
    logits_of,
)
from sanity.attributions.gradients import PIXELS
from sanity.folding import Folded
from sanity.lanes import ALONE, Lanes
from sanity.memory import CANDIDATES, available, bytes_of, fastest, in_parts
from sanity.microbatch import Batch, Evaluation, alike, gradients, probed
from sanity.substitution import Substituting, stand_ins, substituted
from sanity.sums import Sums, attribution
from sanity.tracing import foldable

CACHE_BYTES = 2**30
"""Noise and path points of one chunk of images are kept between stages up to this much memory."""
SWEEP_BYTES = 3 * 2**29
"""States of the network are explained together while their sums and maps take up to this much memory."""
WORTH = 0.05
"""A state is run as a whole where less than this share of the network's calls could be reused."""

T = TypeVar("T")


class State(NamedTuple):
    """One way the network's weights may stand: enter() puts them so, inputs are what is explained then.

    values: by name, the parameters and buffers that differ from the trained network's; where they are not told, states
    are gone through in one thread.
    """

    enter: Callable[[], object]
    inputs: Inputs
    values: Mapping[str, Tensor] | None = None


class Answer(NamedTuple):
    """Attributions by method, (N, C or 1, H, W) each, and the logits (N, classes) if they were met with."""

    maps: dict[str, Tensor]
    logits: Tensor | None


class Engine:
    """Explains batches with a set of methods, evaluating every distinct point once.

    batch_size is the number of network evaluations taken at a time; results do not depend on it beyond
    rounding, because each image's points are combined in a fixed order in float64. With fold, gradients are
    taken through BatchNorms folded into the convolutions before them; with reuse, a sweep through several
    states of the network repeats nothing that comes before the first changed parameter. lanes: shares of the work done
    side by side, each through all states at its own pace, for networks whose forward pass keeps nothing in the network.
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
        self._telling = Lock()
        self._points: dict[tuple[Point, str, int], Tensor] = {}
        self._chunk: tuple[tuple[str, ...], int] = (), 0

    @property
    def cost(self) -> int:
        """Network evaluations an image that `explain` takes."""
        shared = {(m.rule.name, p) for m in self._combining for p in m.points(m.options)}
        return len(shared) + sum(m.cost for m in self.methods if not isinstance(m, GradientMethod))

    def again(self, fresh_noise: bool) -> Engine:
        """An engine for those methods only that do not repeat themselves at a second look.

        They are those that draw anew at every occasion; with fresh_noise all that draw anything.
        """
        methods = [one for one in self.methods if one.fresh or (fresh_noise and not one.deterministic)]
        made = Engine(methods, self.batch_size, self.on_progress, self.fold, self.reuse, self.lanes)
        # What was found out about the network holds for it, too.
        made._folds = self._folds
        return made

    def capacity(self, inputs: Inputs, own: int = 0) -> int:
        """Number of states to be swept through together, so that their sums and maps fit into SWEEP_BYTES.

        own: bytes of weights that each of them has for itself.
        """
        pixels, images = inputs.pixels.numel(), len(inputs.ids)
        # Lanes that share an image have sums of it each.
        shared = (images + self.lanes.count - 1) / images
        sums = math.ceil(shared * sum(8 * (1 + method.spread) for method in self._combining))
        maps = inputs.pixels.element_size() * len(self.methods)
        return max(1, SWEEP_BYTES // max(1, pixels * (sums + maps) + own))

    @property
    def _combining(self) -> list[GradientMethod]:
        return [method for method in self.methods if isinstance(method, GradientMethod)]

    @property
    def _functions(self) -> list[FunctionMethod]:
        return [method for method in self.methods if isinstance(method, FunctionMethod)]

    def explain(self, network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Attributions by method: name -> (N, C or 1, H, W), in the dtype and on the device of the pixels.

        Raises ValueError if a method's map has another shape.
        """
        return self.sweep(network, [State(lambda: None, inputs, {})])[0].maps

    def sweep(
        self, network: nn.Module, states: Sequence[State], trained: Callable[[], object] = lambda: None
    ) -> list[Answer]:
        """Explain the same pictures in several states of the network; trained() puts it as it was trained.

        All inputs have the same pixels, ids and seed. Raises ValueError if a method's map has another shape.
        """
        inputs = states[0].inputs
        if (inputs.ids, inputs.seed) != self._chunk:
            self._chunk, self._points = (inputs.ids, inputs.seed), {}
        lanes = self.lanes if all(state.values is not None for state in states) else ALONE
        trained()
        standings = _standings(network, states, lanes)
        fast = self._fast(network, inputs)
        tame = lanes.map(partial(self._tame, fast, inputs), standings)
        ways = [fast if one else {**fast, Sees.LOGITS: fast[Sees.RECTIFIERS]} for one in tame]
        sweep = _Sweep(self, ways, states, standings, lanes)
        found = sweep.answers(self._combining)
        for n, state in enumerate(states if self._functions else ()):
            state.enter()
            for method in self._functions:
                seen = network if method.sees is Sees.LAYERS else ways[n][method.sees]
                found[n].maps[method.name] = self._call(method, seen, state.inputs)
        order = [method.name for method in self.methods]
        return [Answer({name: one.maps[name] for name in order}, one.logits) for one in found]

    def _fast(self, network: nn.Module, inputs: Inputs) -> Mapping[Sees, nn.Module]:
        """The network as it may be run under rules that see more and more of it."""
        if network not in self._folds:
            plain = Substituting(network, self.lanes.check)
            found: dict[Sees, nn.Module] = dict.fromkeys(Sees, plain)
            if self.fold:
                example = inputs.pixels[:1]
                folded = Folded(plain, foldable(network, example))
                # Not all that a network does is seen: what runs in the backward pass, or in another language, is not.
                wanted = probed(plain, example)
                if alike(folded, example, wanted):
                    found[Sees.RECTIFIERS] = found[Sees.LOGITS] = folded
                    if alike(clipping := folded.clipping(), example, wanted):
                        found[Sees.LOGITS] = clipping
            self._folds = {network: found}
        return self._folds[network]

    def _tame(self, fast: Mapping[Sees, nn.Module], inputs: Inputs, standing: Standing) -> bool:
        """Whether rectifiers may be part of convolutions in a state: there, what is not a number would become 0."""
        pixels = inputs.pixels
        sees = {method.rule.sees for method in self._combining} | {method.sees for method in self._functions}
        joined = self.fold and Sees.LOGITS in sees
        if not joined or pixels.device.type != "cpu" or pixels.dtype == torch.float64:
            return True
        # What overflows for one picture does for those of larger numbers.
        largest = int(pixels.flatten(1).norm(dim=1).argmax())
        with torch.no_grad(), standing():
            return bool(logits_of(fast[Sees.RECTIFIERS], pixels[largest : largest + 1]).isfinite().all())

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
            self.tell(method.cost * (edges[-1] - start))
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

    def take(self, work: deque[Evaluation], inputs: Inputs) -> Batch:
        """The next micro-batch of a lane's work under one rule, which is shared evenly among them."""
        size = math.ceil(len(work) / math.ceil(len(work) / self.batch_size))
        batch = [work.popleft() for _ in range(size)]
        points = torch.stack([self._at(one.point, inputs, one.n) for one in batch])
        # Stacked, they have lost the memory format that convolutions run faster on.
        return Batch(batch, points.contiguous(memory_format=torch.channels_last))

    def tell(self, evaluations: int) -> None:
        """Tell, from any thread, that so many evaluations were made."""
        with self._telling:
            self.on_progress(evaluations)

    def evaluate(
        self, network: nn.Module, inputs: Inputs, rule: Rule, batch: Batch, reuse: bool, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """`gradients` of one micro-batch; reuse: what was kept of the state before; keep: for the state after."""
        mates = batch.mates(inputs)
        if (reuse or keep) and not batch.spoilt:
            answer = batch.gradients(network, mates, rule, reuse, keep)
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


Standing = Callable[[], AbstractContextManager[object]]
"""Makes a context in which the network stands as in one state."""


def _standings(network: nn.Module, states: Sequence[State], lanes: Lanes) -> list[Standing]:
    """How the network, which now stands as trained, is put as in each state; for this thread or for all."""
    if lanes.count > 1:
        values = [stand_ins(network, state.values or {}) for state in states]
        return [partial(substituted, found) for found in values]

    def entering(state: State) -> AbstractContextManager[object]:
        state.enter()
        return nullcontext()

    return [partial(entering, state) for state in states]


def _shared_out(work: list[Evaluation], count: int) -> list[list[Evaluation]]:
    """Work in its order, cut into as many parts."""
    edges = [len(work) * k // count for k in range(count + 1)]
    return [work[a:b] for a, b in pairwise(edges) if a < b]


Users = Mapping[str, Mapping[Point, Sequence[GradientMethod]]]
"""Rule's name -> point -> the methods that ask for the gradient there."""


@dataclass(frozen=True)
class _Sweep:
    """Through all states with one micro-batch after another; every lane goes its own way.

    ways: the network as rules may run it in each state; standings: how it is put so.
    """

    engine: Engine
    ways: Sequence[Mapping[Sees, nn.Module]]
    states: Sequence[State]
    standings: Sequence[Standing]
    lanes: Lanes

    def answers(self, methods: Sequence[GradientMethod]) -> list[Answer]:
        """Evaluate all points under their rules, in every state, and combine them."""
        inputs = self.states[0].inputs
        rules = {method.rule.name: method.rule for method in methods}
        users: dict[str, dict[Point, list[GradientMethod]]] = {}
        for method in methods:
            for point in method.points(method.options):
                users.setdefault(method.rule.name, {}).setdefault(point, []).append(method)
        work = [
            Evaluation(rules[name], n, point)
            for name, points in users.items()
            for n in range(len(inputs.ids))
            for point in points
        ]
        found = self.lanes.map(partial(self._through, users), _shared_out(work, self.lanes.count))
        answers = []
        for s, state in enumerate(self.states):
            sums = [lane[s] for lane in found]
            maps = {method.name: attribution(method, sums, state.inputs) for method in methods}
            logits = {n: row for lane in sums for n, row in lane.logits.items()}
            rows = [logits[n] for n in range(len(inputs.ids))] if logits else []
            answers.append(Answer(maps, torch.stack(rows) if rows else None))
        return answers

    def _through(self, users: Users, work: Sequence[Evaluation]) -> list[Sums]:
        """Sums of a lane's part of the work, state by state."""
        found = [Sums() for _ in self.states]
        for rule, own in groupby(work, key=lambda one: one.rule):
            self._under(rule, users[rule.name], list(own), found)
        return found

    def _under(
        self,
        rule: Rule,
        users: Mapping[Point, Sequence[GradientMethod]],
        work: Sequence[Evaluation],
        found: Sequence[Sums],
    ) -> None:
        inputs, states = self.states[0].inputs, len(self.states)
        images = range(work[0].n, work[-1].n + 1)
        for method in {m.name: m for one in work for m in users[one.point]}.values():
            for sums in found:
                sums.begin(method, images, inputs.pixels)
        # By state, whether it reuses what is kept of the one before it: not where that is too little.
        reusing = [self.engine.reuse and rule.replayable and s > 0 for s in range(states)] + [False]
        waiting = deque(work)
        while waiting:
            batch = self.engine.take(waiting, inputs)
            for s, standing in enumerate(self.standings):
                self.lanes.check()
                with standing():
                    way, reuse = self.ways[s][rule.sees], reusing[s] and batch.kept is not None
                    answer = self.engine.evaluate(way, self.states[s].inputs, rule, batch, reuse, reusing[s + 1])
                for one, gradient, row in zip(batch.work, *answer, strict=True):
                    if rule is PLAIN and one.point in PIXELS:
                        found[s].logits[one.n] = row
                    for method in users[one.point]:
                        found[s].add(method, one.n, one.point, gradient, inputs)
                reusing[s] = reusing[s] and (not reuse or batch.share >= WORTH)
                # What memory does not suffice for once is not tried with every batch.
                reusing[s + 1] = reusing[s + 1] and not batch.spoilt
                self.engine.tell(len(batch.work))


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


def best_batch(network: nn.Module, example: Tensor, lanes: Lanes = ALONE) -> int:
    """Number of evaluations at a time that runs fastest here, measured as a run makes them; example (1, C, H, W).

    Of those that fit into memory in every lane, with the kept pass of the state before beside the one at work.
    """
    target = torch.zeros(1, dtype=torch.int64, device=example.device)
    fast = Engine([], 1, lanes=lanes)._fast(network, Inputs(example, target, ("",)))[Sees.LOGITS]

    def evaluated(points: Tensor) -> None:
        gradients(fast, points, points, target.expand(len(points)), PLAIN)

    def step(n: int) -> None:
        points = example.expand(n, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        lanes.map(evaluated, [points] * lanes.count)
        if example.is_cuda:
            torch.cuda.synchronize()

    each = 2 * lanes.count * bytes_of(lambda x: logits_of(network, x), example)
    return fastest(step, CANDIDATES[example.device.type], each, available(example.device))
