"""Methods that only look at answers: parts of the picture are covered and the class's score is read off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanity.attributions.base import FunctionMethod, Inputs, Option, Sees, explained, logits_of
from sanity.streams import stream


def windows(length: int, positions: int, fraction: float) -> list[slice]:
    """Evenly spread windows along a side, the first and the last at its ends.

    Each is `fraction` of the side, rounded, and never less than what leaves no pixel between windows.
    """
    side = min(length, max(1, round(fraction * length), -(-length // positions)))
    steps = max(positions - 1, 1)
    return [slice(start, start + side) for start in (round(i * (length - side) / steps) for i in range(positions))]


@torch.no_grad()
def occlusion(network: nn.Module, inputs: Inputs, positions: int, window: float) -> Tensor:
    """How far the logit falls when a grey square covers a pixel, averaged over squares: (N, 1, H, W).

    positions: squares along each side; window: a square's side as a fraction of the picture's. Grey is 0,
    the baseline of the other methods. [Zeiler and Fergus 2014]
    """
    pixels = inputs.pixels
    height, width = pixels.shape[2:]
    whole = explained(network, pixels, inputs.targets).double()
    fall = torch.zeros(len(pixels), height, width, dtype=torch.float64, device=pixels.device)
    covers = torch.zeros_like(fall)
    for rows in windows(height, positions, window):
        for columns in windows(width, positions, window):
            covered = pixels.clone()
            covered[:, :, rows, columns] = 0
            left = explained(network, covered, inputs.targets).double()
            fall[:, rows, columns] += (whole - left)[:, None, None]
            covers[:, rows, columns] += 1
    return (fall / covers)[:, None].to(pixels)


class RandomMasks:
    """An image's stream of masks, each (H, W) float32 in [0, 1].

    A coarse grid of cells x cells, each 1 with the given probability, is enlarged bilinearly to one cell
    more than the picture, and a window of the picture's size is cut out of it at random. [Petsiuk et al. 2018, 3.2]
    """

    def __init__(self, size: Sequence[int], cells: int, probability: float, generator: torch.Generator) -> None:
        self.size, self.cells, self.probability, self.generator = size, cells, probability, generator

    def draw(self) -> Tensor:
        """Return the next mask."""
        cell = [-(-side // self.cells) for side in self.size]
        grid = (torch.rand(1, 1, self.cells, self.cells, generator=self.generator) < self.probability).float()
        large = F.interpolate(grid, [(self.cells + 1) * c for c in cell], mode="bilinear", align_corners=False)
        down, right = (int(torch.randint(c, (), generator=self.generator)) for c in cell)
        return large[0, 0, down : down + self.size[0], right : right + self.size[1]].clamp(max=1)


@torch.no_grad()
def rise(network: nn.Module, inputs: Inputs, masks: int, cells: int, probability: float) -> Tensor:
    """Mean of random masks, each weighed by the class's probability under it: (N, 1, H, W), >= 0.

    Divided by the masks' expected value. [Petsiuk et al. 2018, eq. 6]
    """
    size = inputs.pixels.shape[2:]
    streams = [RandomMasks(size, cells, probability, stream(inputs.seed, i, "rise")) for i in inputs.ids]
    total = torch.zeros(len(inputs.ids), *size, dtype=torch.float64, device=inputs.pixels.device)
    targets = inputs.targets.to(inputs.pixels.device)[:, None]
    for _ in range(masks):
        mask = torch.stack([one.draw() for one in streams]).to(inputs.pixels)
        score = logits_of(network, inputs.pixels * mask[:, None]).softmax(1).gather(1, targets)
        total += score[:, :, None].double() * mask.double()
    return (total / (masks * probability))[:, None].to(inputs.pixels)


def _at_least(least: Mapping[str, float], options: Mapping[str, Option]) -> None:
    for name, bound in least.items():
        if not bound <= float(options[name]) < float("inf"):
            raise ValueError(f"{name} must be finite and at least {bound}, not {options[name]}")


def _squares(options: Mapping[str, Option]) -> int:
    _at_least({"positions": 1, "window": 0}, options)
    return int(options["positions"]) ** 2 + 1


def _masks(options: Mapping[str, Option]) -> int:
    _at_least({"masks": 1, "cells": 1}, options)
    if not 0 < float(options["probability"]) <= 1:
        raise ValueError(f"probability must lie in (0, 1], not {options['probability']}")
    return int(options["masks"])


OCCLUSION = FunctionMethod(
    "occlusion",
    "Zeiler and Fergus 2014",
    options={"positions": 14, "window": 0.15},
    call=occlusion,
    evaluations=_squares,
    sees=Sees.LOGITS,
)
RISE = FunctionMethod(
    "rise",
    "Petsiuk et al. 2018",
    deterministic=False,
    options={"masks": 4000, "cells": 7, "probability": 0.5},
    call=rise,
    evaluations=_masks,
    sees=Sees.LOGITS,
)
