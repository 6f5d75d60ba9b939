"""How alike two maps are: SIMILARITIES, and the measures behind them as functions of paired maps.

A similarity is described once per map and compared once per pair: whatever depends on one map only (ranks,
local moments, histograms) lives in its Description, so the trained maps are described once for all stages.
Arithmetic is batched, on the maps' device, in float64; no result depends on batch-mates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sanity import maps
from sanity.registry import suggest

Tensors = tuple[Tensor, ...]
SEVERITY = (maps.OK, maps.CONSTANT, maps.NON_FINITE)


@dataclass(frozen=True)
class Description:
    """What a similarity keeps of N maps; the first tensor is what is compared. `status`: one an image."""

    tensors: Tensors
    status: tuple[str, ...]


@dataclass(frozen=True)
class Similarity:
    """One reading of one measure: how attributions become maps, what is kept of a map, how two compare.

    `steps`: a reduction, then scalings, from `maps`; `features`: maps -> tensors, (maps, mask) -> tensors
    if `foreground`; `compare`: tensors, tensors -> (N,) float64, unaware of status (see `compare` below).
    """

    name: str
    source: str
    steps: tuple[Callable[[Tensor], Tensor], ...]
    features: Callable[..., Tensors]
    compare: Callable[[Tensors, Tensors], Tensor]
    foreground: bool = False

    def describe(self, attributions: Tensor, mask: Tensor | None = None) -> Description:
        """Attributions (N, C, H, W) -> what is kept of each map, and whether it can be compared at all.

        `mask` (N, H, W) bool, true on the foreground, is read by foreground similarities only, which
        raise ValueError without it; so do maps too small for the measure.
        """
        if self.foreground and mask is None:
            raise ValueError(f"{self.name} compares the foreground only: it needs a mask, got none")
        features = partial(self.features, mask=mask) if self.foreground else self.features
        return _describe(attributions, self.steps, features)


def compare(similarity: Similarity, a: Description, b: Description) -> tuple[Tensor, tuple[str, ...]]:
    """Values (N,) float64 of paired descriptions, NaN unless "ok", and per pair the worse map's status.

    Raises ValueError if the shapes differ.
    """
    shapes = tuple(a.tensors[0].shape), tuple(b.tensors[0].shape)
    if shapes[0] != shapes[1]:
        raise ValueError(f"shapes differ: {shapes[0]} and {shapes[1]}")
    status = tuple(max(pair, key=SEVERITY.index) for pair in zip(a.status, b.status, strict=True))
    values = similarity.compare(a.tensors, b.tensors)
    ok = torch.tensor([s == maps.OK for s in status], dtype=torch.bool, device=values.device)
    return values.masked_fill(~ok, math.nan), status


def rolled(description: Description) -> Description:
    """The same maps, each in its neighbour's place: pairs with the original are pairs of different images."""
    tensors = tuple(tensor.roll(1, 0) for tensor in description.tensors)
    return Description(tensors, description.status[-1:] + description.status[:-1])


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Linear correlation of paired maps: (N, ...), (N, ...) -> (N,) float64 in [-1, 1].

    A constant or non-finite map gives NaN. Raises ValueError if the shapes differ. [Pearson 1895]
    """
    return _pair(a, b, correlation("pearson", "Pearson 1895", features=_linear))


def spearman(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rank correlation of paired maps: (N, ...), (N, ...) -> (N,) float64 in [-1, 1]; ties share a rank.

    With `mask`, bool of the maps' shape, only its true pixels are ranked. A constant map has no ranking, a
    non-finite one none worth having: NaN. Raises ValueError if the shapes differ. [Spearman 1904]
    """
    return _pair(a, b, correlation("spearman", "Spearman 1904", features=partial(_ranks, mask=mask)))


def ssim(a: Tensor, b: Tensor, window: int = 11, data_range: float = 2.0) -> Tensor:
    """Structural similarity of paired maps, (N, H, W) or (N, C, H, W) -> (N,) float64 in [-1, 1].

    Gaussian weights (sigma 1.5) over an odd `window`, averaged over whole windows only, then over
    channels. `data_range` is never read off the maps: 2 suits maps in [-1, 1]. A constant or non-finite
    map gives NaN. Raises ValueError if the shapes differ or the window does not fit. [Wang et al. 2004]
    """
    return _pair(a, b, structure("ssim", "Wang et al. 2004", window=window, data_range=data_range))


def hog(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of paired maps' `hog_descriptor`: (N, H, W) or (N, C, H, W) -> (N,) float64.

    In [-1, 1]; blind to the maps' sign. A map that is constant or non-finite, or whose descriptor is, gives
    NaN. Raises ValueError if the shapes differ or the maps are too small. [Dalal and Triggs 2005]
    """
    return _pair(a, b, oriented_gradients("hog", "Dalal and Triggs 2005"))


def hog_descriptor(x: Tensor) -> Tensor:
    """Histogram of oriented gradients: (N, H, W) or (N, C, H, W) -> (N, D) float64 in [0, 1].

    9 unsigned orientations, square cells of `hog_cell`, 3x3 blocks, L2-Hys, as skimage.feature.hog. With
    channels, each pixel votes by the channel of the largest gradient. Its small constant (1e-5) supposes
    maps of order 1. Raises ValueError for maps under 6 pixels a side. [Dalal and Triggs 2005]
    """
    cell = hog_cell(x.shape[-2], x.shape[-1])
    down, right = _gradients(x.double())
    histogram = _cell_histograms(torch.atan2(down, right), torch.hypot(down, right), cell)
    blocks = histogram.unfold(1, 3, 1).unfold(2, 3, 1).movedim(3, -1).flatten(3)
    return _unit(_unit(blocks).clamp(max=0.2)).flatten(1)


def hog_cell(height: int, width: int) -> int:
    """Side of a cell in pixels: 16 from 48 pixels a side on; below, a seventh of the shorter side, >= 2.

    So MNIST's 28x28 has 7x7 cells of 4. Raises ValueError where 3 cells do not fit.
    """
    side = min(height, width)
    if side < 6:
        raise ValueError(f"HOG needs maps of at least 6x6 pixels: got {height}x{width}")
    return 16 if side >= 48 else max(2, side // 7)


def _describe(
    x: Tensor, steps: tuple[Callable[[Tensor], Tensor], ...], features: Callable[[Tensor], Tensors]
) -> Description:
    """Run the steps, then the features; the first ill turn of a map names it (scaling a constant is 0/0)."""
    status = (maps.OK,) * len(x)
    for step in steps:
        x = step(x)
        status = _first_fault(status, maps.status(x))
    tensors = features(x)
    return Description(tensors, _first_fault(status, maps.status(tensors[0])))


def _first_fault(earlier: tuple[str, ...], later: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(e if e != maps.OK else n for e, n in zip(earlier, later, strict=True))


def _pair(a: Tensor, b: Tensor, similarity: Similarity) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    # The identity is a step too, so the maps' own status counts: ranks alone would hide a NaN.
    described = (_describe(x, (torch.positive,), similarity.features) for x in (a, b))
    return compare(similarity, *described)[0]


def _correlate(a: Tensors, b: Tensors) -> Tensor:
    """Cosine of centred vectors, each (values (N, P), sum of squares (N,))."""
    product: Tensor = torch.linalg.vecdot(a[0], b[0])
    return (product / (a[1] * b[1]).sqrt()).clamp(-1, 1)


def _with_square(centred: Tensor) -> Tensors:
    return centred, torch.linalg.vecdot(centred, centred)


def _linear(x: Tensor) -> Tensors:
    """Centred values, divided by the largest: squares of very small or large maps stay representable."""
    flat = x.flatten(1).double()
    centred = flat - flat.mean(dim=1, keepdim=True)
    largest = centred.abs().amax(dim=1, keepdim=True)
    return _with_square(centred / largest.where(largest > 0, 1.0))


def _ranks(x: Tensor, mask: Tensor | None = None) -> Tensors:
    """Centred average ranks (N, P) and their sum of squares; 0 outside the mask.

    Ranks are halves of whole numbers, so sums up to 300 000 pixels are exact in any order.
    """
    if mask is None:
        ranks = _average_ranks(x.flatten(1))
        return _with_square(ranks - (ranks.shape[1] - 1) / 2)
    if mask.shape != x.shape:
        raise ValueError(f"shapes differ: maps {tuple(x.shape)} and mask {tuple(mask.shape)}")
    inside = mask.flatten(1)
    # What lies outside goes last, so the foreground's ranks are those it has alone.
    ranks = _average_ranks(x.flatten(1).masked_fill(~inside, math.inf))
    return _with_square((ranks - (inside.sum(dim=1, keepdim=True) - 1).double() / 2).where(inside, 0.0))


def _average_ranks(flat: Tensor) -> Tensor:
    """Ranks from 0, ties sharing their mean: (N, P) -> (N, P) float64."""
    count, pixels = flat.shape
    order = _argsort(flat)
    values = flat.gather(1, order)
    fresh = torch.ones_like(values, dtype=torch.bool)
    fresh[:, 1:] = values[:, 1:] != values[:, :-1]
    first = fresh.flatten().nonzero().squeeze(1)  # where each group of equal values starts
    size = first.diff(append=first.new_tensor([count * pixels]))
    mean = (first % pixels).double() + (size - 1).double() / 2
    ranks = mean.repeat_interleave(size, output_size=count * pixels).view(count, pixels)
    return torch.empty_like(ranks).scatter_(1, order, ranks)


def _argsort(flat: Tensor) -> Tensor:
    """Order of each row, ties in any order (their ranks are averaged)."""
    # On a CPU numpy's vectorised sort takes a quarter of torch's time, on the very same memory.
    return torch.from_numpy(np.argsort(flat.numpy(), axis=1)) if flat.device.type == "cpu" else flat.argsort(dim=1)


def _moments(x: Tensor, window: int) -> Tensors:
    x = x.double()
    mean = _blur(x, window)
    return x, mean, _blur(x * x, window) - mean * mean


def _structural(a: Tensors, b: Tensors, window: int, data_range: float) -> Tensor:
    (x, mean_x, var_x), (y, mean_y, var_y) = a, b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    product = mean_x * mean_y
    covariance = _blur(x * y, window) - product
    above = (2 * product + c1) * (2 * covariance + c2)
    below = (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    return (above / below).flatten(1).mean(dim=1)


def _blur(x: Tensor, window: int, sigma: float = 1.5) -> Tensor:
    """Gaussian mean of every whole window: (..., H, W) -> (..., H - window + 1, W - window + 1)."""
    if window < 1 or window % 2 == 0 or window > min(x.shape[-2:]):
        raise ValueError(f"SSIM's window must be odd and fit the maps: got {window} for {x.shape[-2]}x{x.shape[-1]}")
    weights = [math.exp(-((i - window // 2) ** 2) / (2 * sigma**2)) for i in range(window)]
    weights = [w / sum(weights) for w in weights]
    return _slide(_slide(x, weights, -2), weights, -1)


def _slide(x: Tensor, weights: list[float], dim: int) -> Tensor:
    """Correlate along one axis; on a CPU, shifted sums are 20 times as fast as a float64 convolution."""
    size = x.shape[dim] - len(weights) + 1
    total = x.narrow(dim, 0, size) * weights[0]
    for i, weight in enumerate(weights[1:], start=1):
        total.add_(x.narrow(dim, i, size), alpha=weight)
    return total


def _gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences down and right, 0 on the border: (N, H, W) each, of the strongest channel."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
    right[..., :, 1:-1] = x[..., :, 2:] - x[..., :, :-2]
    if x.ndim == 3:
        return down, right
    strongest = torch.hypot(down, right).argmax(dim=1, keepdim=True)
    return down.gather(1, strongest).squeeze(1), right.gather(1, strongest).squeeze(1)


def _cell_histograms(angle: Tensor, magnitude: Tensor, cell: int, orientations: int = 9) -> Tensor:
    """Mean magnitude per cell and orientation of [0, 180) degrees: (N, rows, columns, orientations).

    One sum per orientation rather than scatter_add, whose order, and so rounding, varies on a GPU.
    """
    span = 180 / orientations
    # A tiny negative angle rounds to 180 itself: it belongs to the last orientation.
    bins = (torch.rad2deg(angle).remainder(180) // span).clamp(max=orientations - 1)
    bins, magnitude = _cells(bins, cell), _cells(magnitude, cell)
    return torch.stack([magnitude.where(bins == k, 0.0).mean(dim=-1) for k in range(orientations)], dim=-1)


def _cells(x: Tensor, cell: int) -> Tensor:
    """Whole cells only: (N, H, W) -> (N, H // cell, W // cell, cell * cell)."""
    return x.unfold(1, cell, cell).unfold(2, cell, cell).flatten(3)


def _gradient_features(x: Tensor, features: Callable[[Tensor], Tensors]) -> Tensors:
    return features(hog_descriptor(x))


def _unit(blocks: Tensor) -> Tensor:
    return blocks / (blocks.square().sum(dim=-1, keepdim=True) + 1e-10).sqrt()


def correlation(
    name: str,
    source: str,
    *steps: Callable[[Tensor], Tensor],
    features: Callable[..., Tensors] = _ranks,
    foreground: bool = False,
) -> Similarity:
    """Correlation of the features, by default of the ranks, of maps made by `steps`."""
    return Similarity(name, source, steps, features, _correlate, foreground)


def structure(
    name: str, source: str, *steps: Callable[[Tensor], Tensor], window: int = 11, data_range: float = 2.0
) -> Similarity:
    """SSIM of maps made by `steps`, with Gaussian weights (sigma 1.5) over an odd `window`."""
    compare_moments = partial(_structural, window=window, data_range=data_range)
    return Similarity(name, source, steps, partial(_moments, window=window), compare_moments)


def oriented_gradients(
    name: str,
    source: str,
    *steps: Callable[[Tensor], Tensor],
    features: Callable[[Tensor], Tensors] = _linear,
) -> Similarity:
    """Correlation of the HOG descriptors of maps made by `steps`: linear by default, or of their ranks."""
    return Similarity(name, source, steps, partial(_gradient_features, features=features), _correlate)


SIMILARITIES: tuple[Similarity, ...] = (
    structure("ssim", "Wang et al. 2004; signed map / p99", maps.signed, maps.clip_signed),
    correlation("spearman", "Spearman 1904; signed map", maps.signed),
    correlation("spearman_abs", "Spearman 1904; absolute map", maps.absolute),
    oriented_gradients("hog", "arXiv 1810.03292, Pearson; signed map / p99", maps.signed, maps.clip_signed),
    structure(
        "ssim_published",
        "arXiv 1810.03292, window 5; signed map / p99",
        maps.signed,
        maps.clip_signed,
        window=5,
    ),
    structure("ssim_released", "released code; colour map in [0, 1]", maps.colour, maps.min_max),
    oriented_gradients(
        "hog_released",
        "released code, Spearman; colour map in [0, 1]",
        maps.colour,
        maps.min_max,
        features=_ranks,
    ),
    correlation("spearman_released", "released code; signed map cut at p99", maps.signed, maps.signed_released),
    correlation("spearman_abs_released", "released code; absolute map cut at p99", maps.absolute, maps.clip_absolute),
    correlation("spearman_foreground", "Sundararajan and Taly 2018; signed map", maps.signed, foreground=True),
    correlation("spearman_abs_foreground", "Sundararajan and Taly 2018; absolute map", maps.absolute, foreground=True),
)
DEFAULTS = ("ssim", "spearman", "spearman_abs", "hog")


def get(name: str) -> Similarity:
    """The registered similarity of that name. Raises ValueError, naming its neighbours, if there is none."""
    known = {similarity.name: similarity for similarity in SIMILARITIES}
    if name not in known:
        raise ValueError(suggest("similarity", name, known))
    return known[name]
