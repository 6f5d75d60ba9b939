"""What a map's most salient pixels are worth: delete them, insert them, and ask the network again.

The definitions are those of Fong and Vedaldi 2017 and of their released code; the curves are RISE's (Petsiuk et al.
2018). Every function takes a batch and treats each image on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sanity import maps
from sanity.attributions.base import Inputs, logits_of
from sanity.attributions.nulls import gaussian_blur, null_images
from sanity.streams import stream

ALPHAS = tuple(i / 20 for i in range(20))
LEVELS = (0.80, 0.90, 0.95, 0.99)
FLOOR = 0.01
"""A normalised score is undefined where its denominator, a difference of two probabilities, is below this."""

OK, UNREACHED, NO_CONTRAST, NON_FINITE = "ok", "unreached", "no contrast", "non-finite score"
REDUCTIONS = ("auto", "absolute", "signed")


class Values(NamedTuple):
    """One number an image: values (N,) float64, NaN unless its status is "ok". level is NaN where there is none."""

    evaluation: str
    level: float
    null: str
    values: Tensor
    status: tuple[str, ...]


def unless(values: Tensor, *reasons: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Values (N,) with NaN and the first reason that is not "ok"; a value that is not finite is a reason too."""
    finite = [OK if good else NON_FINITE for good in values.isfinite().tolist()]
    status = tuple(next((r for r in of if r != OK), OK) for of in zip(*reasons, finite, strict=True))
    ok = torch.tensor([s == OK for s in status], device=values.device)
    return torch.where(ok, values.double(), float("nan")), status


@dataclass(frozen=True)
class Scene:
    """A batch, its network, and what stands in for deleted pixels (nulls are made when asked for)."""

    network: nn.Module
    inputs: Inputs
    logits: Tensor
    radius: float = 10.0
    batch_size: int = 8
    on_progress: Callable[[int], object] = lambda evaluations: None

    @cached_property
    def original(self) -> Tensor:
        """Probability of each target for the untouched picture, (N,) float64."""
        return self.probability(self.logits[:, None])[:, 0]

    @cached_property
    def _nulls(self) -> dict[str, Tensor]:
        return {}

    def null(self, kind: str) -> Tensor:
        """Pictures with everything deleted, (N, C, H, W)."""
        if kind not in self._nulls:
            inputs = self.inputs
            self._nulls[kind] = null_images(inputs.pixels, kind, self.radius, inputs.ids, inputs.seed)
        return self._nulls[kind]

    def probability(self, logits: Tensor) -> Tensor:
        """Probability of each image's target: logits (N, L, classes) -> (N, L) float64."""
        chosen = self.inputs.targets[:, None, None].expand(-1, logits.shape[1], 1)
        return logits.double().softmax(2).gather(2, chosen.to(logits.device))[:, :, 0]

    def answers(self, kept: Tensor, kind: str) -> Tensor:
        """Logits (N, L, classes) of L versions of each picture; kept (N, L, H, W), bool or in [0, 1], 1 keeps."""
        n, many = kept.shape[:2]
        images, null, found = self.inputs.pixels, self.null(kind), []
        owners = torch.arange(n, device=images.device).repeat_interleave(many)
        for at in torch.split(torch.arange(n * many, device=images.device), self.batch_size):
            keep = kept.flatten(0, 1)[at, None].to(images)
            with torch.no_grad():
                found.append(logits_of(self.network, keep * images[owners[at]] + (1 - keep) * null[owners[at]]))
            self.on_progress(len(at))
        return torch.cat(found).view(n, many, -1)

    def scores(self, kept: Tensor, kind: str) -> Tensor:
        """Probability of the target for L versions of each picture: (N, L, H, W) -> (N, L) float64."""
        return self.probability(self.answers(kept, kind))

    def of(self, inputs: Inputs, logits: Tensor) -> Scene:
        """Other pictures before the same network."""
        return replace(self, inputs=inputs, logits=logits)


@dataclass(frozen=True)
class Saliency:
    """Maps of a batch, (N, H, W) float64, large where salient, and what each is: "ok", constant or non-finite."""

    maps: Tensor
    status: tuple[str, ...]
    ranks: Tensor

    @cached_property
    def unit(self) -> Tensor:
        """Maps from 0 to 1, (N, H, W); zeros where a map is not ok."""
        return maps.min_max(self.maps).nan_to_num(0, 0, 0)

    def smooth(self, radius: float) -> Tensor:
        """Maps blurred, then from 0 to 1, (N, H, W)."""
        return maps.min_max(gaussian_blur(self.unit[:, None], radius)[:, 0]).nan_to_num(0, 0, 0)

    def blurred(self, radius: float, inputs: Inputs) -> Saliency:
        """The same maps blurred, ranked anew."""
        return replace(self, maps=self.smooth(radius), ranks=ranks(self.smooth(radius), inputs))


def saliency(attributions: Tensor, inputs: Inputs, reduction: str = "auto") -> Saliency:
    """Attributions (N, C or 1, H, W) -> maps. auto: sum of |a| where there is one a colour, else as they are."""
    by_colour = attributions.shape[1] == inputs.pixels.shape[1]
    absolute = reduction == "absolute" or (reduction == "auto" and by_colour)
    found = (maps.absolute if absolute else maps.signed)(attributions.double())
    return Saliency(found, maps.status(found), ranks(found.nan_to_num(0, 0, 0), inputs))


def ranks(found: Tensor, inputs: Inputs) -> Tensor:
    """Place of each pixel, 0 the most salient: (N, H, W) -> (N, H, W) int64; ties are broken by a named draw."""
    placed = []
    for values, name in zip(found.flatten(1), inputs.ids, strict=True):
        shuffled = torch.randperm(len(values), generator=stream(inputs.seed, name, "ties")).to(values.device)
        order = shuffled[values[shuffled].argsort(descending=True, stable=True)]
        placed.append(torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device)))
    return torch.stack(placed).view(found.shape)


def normalised(scores: Tensor, low: Tensor, original: Tensor) -> tuple[Tensor, list[str]]:
    """(s - low) / (original - low): (N, L), (N,), (N,) -> (N, L), and "no contrast" where it has no meaning."""
    contrast = original - low
    reasons = [OK if c >= FLOOR or c != c else NO_CONTRAST for c in contrast.tolist()]
    return (scores - low[:, None]) / contrast[:, None], reasons


def representativeness(scene: Scene, found: Saliency, nulls: Sequence[str]) -> Iterator[Values]:
    """Normalised score at each alpha and null: does the region, found with one null, work under others.

    The map is blurred, scaled to [0, 1] and turned into a mask that keeps, 1 - map; what is below alpha goes. So
    nothing goes at alpha 0, and the more the larger alpha is. Score: (s - s_mask) / (s_orig - s_mask), s_mask the
    score under the map itself, as a soft mask over the blurred picture: this is as released, and has a meaning for
    masks only, as the soft mask of a gradient hardly takes anything away. `representativeness_whole` has the score of
    the whole picture blurred in the place of s_mask. "no contrast" where the denominator is below FLOOR.
    """
    alphas = found.maps.new_tensor(ALPHAS)[None, :, None, None]
    kept = (1 - found.smooth(scene.radius))[:, None] >= alphas
    references = scene.scores(torch.stack([1 - found.unit, torch.zeros_like(found.unit)], 1), "blur").T
    for null in nulls:
        plain = scene.scores(kept, null)
        for name, low in zip(("representativeness", "representativeness_whole"), references, strict=True):
            scores, reasons = normalised(plain, low, scene.original)
            for alpha, column in zip(ALPHAS, scores.T, strict=True):
                yield Values(name, alpha, null, *unless(column, found.status, reasons))


def tight_boxes(above: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest box around the true pixels: (..., H, W) bool -> box filled (..., H, W) bool, its area (...) float64."""
    rows, columns = above.any(-1), above.any(-2)
    filled = _span(rows)[..., :, None] & _span(columns)[..., None, :]
    return filled, filled.flatten(-2).sum(-1).double()


def _span(line: Tensor) -> Tensor:
    """From the first to the last true value of each line (..., L)."""
    ahead = line.int().cummax(-1).values
    behind = line.int().flip(-1).cummax(-1).values.flip(-1)
    return (ahead & behind).bool()


def minimality(scene: Scene, found: Saliency) -> Iterator[Values]:
    """Area in pixels of the smallest box that, blurred inside, suppresses the class by 80, 90, 95 and 99 %.

    Boxes are tight around the map, scaled to [0, 1], above each alpha. Suppression: 1 - (s - s_null) / (s_orig -
    s_null), s_null the score of the whole picture blurred. "unreached" where no box does it; "no contrast" where
    s_orig - s_null is below FLOOR.
    """
    inside, areas = tight_boxes(found.unit[:, None] > found.maps.new_tensor(ALPHAS)[None, :, None, None])
    whole = scene.scores(torch.zeros_like(found.unit[:, None]), "blur")[:, 0]
    scores, reasons = normalised(scene.scores(~inside, "blur"), whole, scene.original)
    for level in LEVELS:
        suppressing = torch.where(scores <= 1 - level, areas, float("inf"))
        least = suppressing.amin(1)
        reached = [UNREACHED if infinite else OK for infinite in least.isinf().tolist()]
        finite = [OK if good else NON_FINITE for good in scores.isfinite().all(1).tolist()]
        yield Values("minimality", level, "blur", *unless(least, found.status, reasons, finite, reached))


def curves(scene: Scene, found: Saliency, nulls: Mapping[str, str], steps: int) -> Iterator[Values]:
    """Probability of the class when the most salient share of pixels is deleted, or alone is shown; and the area.

    nulls: what "deletion" and "insertion" put in the place of pixels. Shares 0, 1 / steps, ..., 1; areas by trapezoids,
    in [0, 1]: small for deletion and large for insertion is good. [Petsiuk et al. 2018]
    """
    shares = [i / steps for i in range(steps + 1)]
    counts = found.ranks.new_tensor([round(share * found.ranks[0].numel()) for share in shares])
    chosen = found.ranks[:, None] < counts[None, :, None, None]
    for name, null in nulls.items():
        scores = scene.scores(chosen if name == "insertion" else ~chosen, null)
        for share, column in zip(shares, scores.T, strict=True):
            yield Values(name, share, null, *unless(column, found.status))
        area = torch.trapezoid(scores, dx=1 / steps)
        yield Values(f"{name}_area", float("nan"), null, *unless(area, found.status))
