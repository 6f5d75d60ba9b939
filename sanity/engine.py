"""How gradients are evaluated: which points, how many at a time, what is shared between methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from sanity.attributions.base import (
    FunctionMethod,
    GradientMethod,
    Inputs,
    Method,
    Moments,
    Point,
    Rule,
    explained,
    logits_of,
)
from sanity.folding import Folded, foldable

CACHE_BYTES = 2**30
"""Noise and path points of one chunk of images are kept between stages up to this much memory."""


def gradients(network: nn.Module, points: Tensor, images: Tensor, targets: Tensor, rule: Rule) -> Tensor:
    """Gradient of each target's logit at each image's point: (N, C, H, W) twice, (N,) -> (N, C, H, W)."""
    with torch.enable_grad():
        x = points.detach().requires_grad_()
        with rule.context(network, points, images):
            logits = explained(network, x, targets)
        return torch.autograd.grad(logits.sum(), x)[0]


class Engine:
    """Explains batches with a set of methods, evaluating every distinct point once.

    batch_size is the number of network evaluations taken at a time; results do not depend on it beyond
    rounding, because each image's points are combined in a fixed order in float64. With fold, gradients are
    taken through BatchNorms folded into the convolutions before them.
    on_progress(evaluations) is told after each step how many evaluations an image were done.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        batch_size: int,
        on_progress: Callable[[int], object] = lambda evaluations: None,
        fold: bool = True,
    ) -> None:
        self.methods = methods
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.fold = fold
        self._norms: dict[nn.Module, dict[int, nn.Module]] = {}
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
        return Engine(methods, self.batch_size, self.on_progress, self.fold)

    @property
    def _combining(self) -> list[GradientMethod]:
        return [method for method in self.methods if isinstance(method, GradientMethod)]

    def explain(self, network: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """Attributions by method: name -> (N, C or 1, H, W), in the dtype and on the device of the pixels.

        Raises ValueError if a method's map has another shape.
        """
        if inputs.ids != self._chunk:
            self._chunk, self._points = inputs.ids, {}
        found: dict[str, Tensor] = {}
        folded = self._folded(network, inputs)
        for rule in {method.rule.name: method.rule for method in self._combining}.values():
            found |= self._combine(network if rule.layered else folded, inputs, rule)
        for method in self.methods:
            if isinstance(method, FunctionMethod):
                found[method.name] = self._call(method, folded if method.folds else network, inputs)
        return {method.name: found[method.name] for method in self.methods}

    def _folded(self, network: nn.Module, inputs: Inputs) -> nn.Module:
        """Return the network as it is now, its BatchNorms folded where that changes nothing but the speed."""
        if not self.fold:
            return network
        if network not in self._norms:
            self._norms = {network: foldable(network, inputs.pixels[:1])}
        return Folded(network, self._norms[network])

    def _call(self, method: FunctionMethod, network: nn.Module, inputs: Inputs) -> Tensor:
        parts = []
        for start in range(0, len(inputs.ids), self.batch_size):
            part = part_of(inputs, start, start + self.batch_size)
            with torch.enable_grad():
                maps = method(network, part).detach()
            n, _, height, width = part.pixels.shape
            if maps.ndim != 4 or (len(maps), *maps.shape[2:]) != (n, height, width):
                raise ValueError(f"method {method.name!r} gave {tuple(maps.shape)} for {tuple(part.pixels.shape)}")
            parts.append(maps.to(part.pixels))
            self.on_progress(method.cost * n)
        return torch.cat(parts)

    def _combine(self, network: nn.Module, inputs: Inputs, rule: Rule) -> dict[str, Tensor]:
        methods = [method for method in self._combining if method.rule.name == rule.name]
        users: dict[Point, list[GradientMethod]] = {}
        for method in methods:
            for point in method.points(method.options):
                users.setdefault(point, []).append(method)
        sums = {m.name: torch.zeros((2, *inputs.pixels.shape), dtype=torch.float64) for m in methods}
        sums = {name: total.to(inputs.pixels.device) for name, total in sums.items()}
        work = ((n, point) for n in range(len(inputs.ids)) for point in users)
        while batch := list(islice(work, self.batch_size)):
            points = torch.stack([self._at(point, inputs, n) for n, point in batch])
            owners = [n for n, _ in batch]
            found = gradients(network, points, inputs.pixels[owners], inputs.targets[owners], rule)
            for (n, point), gradient in zip(batch, found, strict=True):
                for method in users[point]:
                    _add(sums[method.name][:, n], method, point, gradient, inputs, n)
            self.on_progress(len(batch))
        return {m.name: m.combine(inputs, _moments(sums[m.name], m)).to(inputs.pixels) for m in methods}

    def _at(self, point: Point, inputs: Inputs, n: int) -> Tensor:
        key = (point, inputs.ids[n], inputs.seed)
        if key in self._points:
            return self._points[key]
        place = point.at(inputs.pixels[n], inputs.ids[n], inputs.seed)
        if (len(self._points) + 1) * place.numel() * place.element_size() <= CACHE_BYTES:
            self._points[key] = place
        return place


def _add(sums: Tensor, method: GradientMethod, point: Point, gradient: Tensor, inputs: Inputs, n: int) -> None:
    """Add one gradient, and its square, to a method's float64 sums for image n."""
    value = gradient.double()
    if method.weigh is not None:
        value = value * method.weigh(point, inputs.pixels[n], inputs.ids[n], inputs.seed)
    sums[0] += value
    sums[1] += value.square()


def _moments(sums: Tensor, method: GradientMethod) -> Moments:
    return Moments(*(sums / method.cost))


def part_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Images start to stop of a batch."""
    cut = slice(start, stop)
    return replace(inputs, pixels=inputs.pixels[cut], targets=inputs.targets[cut], ids=inputs.ids[cut])


def predict(network: nn.Module, pixels: Tensor, batch_size: int) -> Tensor:
    """Logits (N, classes) of pixels (N, C, H, W), without gradients."""
    with torch.no_grad():
        return torch.cat([logits_of(network, part) for part in torch.split(pixels, batch_size)])
