"""Gradients of many points become one attribution: sums in float64, of one lane after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sanity.attributions.base import GradientMethod, Inputs, Moments, Point


class Sums:
    """What one lane has seen of one state of the network.

    By method, its gradients at its points, and their squares where it asks for them, summed up in float64: (1 or 2,
    images, C, H, W), of as many images as the lane has, from `first` on. logits: by image, where they were met with.
    """

    def __init__(self) -> None:
        self.totals: dict[str, tuple[int, Tensor]] = {}
        self.logits: dict[int, Tensor] = {}

    def begin(self, method: GradientMethod, images: range, pixels: Tensor) -> None:
        """Make room for a method's sums of some of the images of pixels (N, C, H, W)."""
        shape = (1 + method.spread, len(images), *pixels.shape[1:])
        self.totals[method.name] = images.start, torch.zeros(shape, dtype=torch.float64, device=pixels.device)

    def add(self, method: GradientMethod, n: int, point: Point, gradient: Tensor, inputs: Inputs) -> None:
        """Add image n's gradient (C, H, W) at a point."""
        first, total = self.totals[method.name]
        value = gradient
        if method.weigh is not None:
            value = value.double() * method.weigh(point, inputs.pixels[n], inputs.ids[n], inputs.seed)
        # float32 is added to float64 as it is read: no copy is made.
        total[0, n - first] += value
        if method.spread:
            total[1, n - first] += value.double().square()


def attribution(method: GradientMethod, lanes: Sequence[Sums], inputs: Inputs) -> Tensor:
    """The method's attribution of all images (N, C, H, W) from all lanes' sums, which are given up."""
    total = torch.zeros((1 + method.spread, *inputs.pixels.shape), dtype=torch.float64, device=inputs.pixels.device)
    for lane in lanes:
        if method.name in lane.totals:
            first, part = lane.totals.pop(method.name)
            total[:, first : first + part.shape[1]] += part
    mean = total / method.cost
    moments = Moments(mean[0], mean[1] if method.spread else None)
    return method.combine(inputs, moments).to(inputs.pixels)
