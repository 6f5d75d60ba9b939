"""From attributions to maps: sign, channel reduction, scaling. Batched; each image is treated on its own.

Reductions take attributions (N, C, H, W); scalings take maps (N, ...) and keep shape and dtype. A scaling
whose scale is 0/0 (a constant map, say) gives NaN, never 0 or 1: ask `status` what happened.
"""

import math

import torch
from torch import Tensor

OK, CONSTANT, NON_FINITE = "ok", "constant map", "non-finite map"


def signed(a: Tensor) -> Tensor:
    """Sum over channels: (N, C, H, W) -> (N, H, W). Raises ValueError for another number of dimensions."""
    return colour(a).sum(dim=1)


def absolute(a: Tensor) -> Tensor:
    """Sum over channels of |a|: (N, C, H, W) -> (N, H, W), >= 0. Raises ValueError as `signed` does."""
    return colour(a).abs().sum(dim=1)


def colour(a: Tensor) -> Tensor:
    """Keep the channels, as the released code does for SSIM and HOG: (N, C, H, W) unchanged."""
    if a.ndim != 4:
        raise ValueError(f"attributions must be (N, C, H, W): got shape {tuple(a.shape)}")
    return a


def quantile(x: Tensor, q: float) -> Tensor:
    """Quantile of each image, linearly interpolated as by numpy.percentile: (N, ...) -> (N,) float64.

    `q` in [0, 1], best near 1: the cost grows with the number of values above it. No limit on the size,
    unlike torch.quantile. Raises ValueError for another `q`. Meaningless for non-finite maps.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in [0, 1]: got {q}")
    flat = x.flatten(1)
    position = q * (flat.shape[1] - 1)
    below = math.floor(position)
    top = flat.topk(flat.shape[1] - below, dim=1).values[:, -2:].double()
    return top[:, -1].lerp(top[:, 0], position - below)


def clip_signed(x: Tensor, quantile: float = 0.99) -> Tensor:
    """Clip x / s to [-1, 1], s the quantile of |x|, per image: (N, ...) -> (N, ...).

    Where s is 0 (for .99: fewer than 1 % of the pixels are non-zero), s is max|x|. An all-zero map: NaN.
    """
    s, largest = _quantile_like(x.abs(), quantile), x.abs().flatten(1).amax(dim=1)
    return (x / torch.where(s == 0, _align(largest, x), s)).clamp(-1, 1)


def clip_absolute(x: Tensor) -> Tensor:
    """Clip (x - min) / (p99 - min) to [0, 1], per image: (N, ...) -> (N, ...). The top 1 % ties.

    The minima give NaN where p99 = min: a constant map, or one with fewer than 1 % of its pixels above
    the minimum. [released code, absolute RGB maps]
    """
    low = _align(x.flatten(1).amin(dim=1), x)
    return ((x - low) / (_quantile_like(x, 0.99) - low)).clamp(0, 1)


def signed_released(x: Tensor) -> Tensor:
    """Clip (x + s) / 2s to [-1, 1], s = |p99| of x, per image: (N, ...) -> (N, ...).

    Where s is 0, zeros give NaN. [released code, signed RGB maps]
    """
    s = _quantile_like(x, 0.99).abs()
    return ((x + s) / (2 * s)).clamp(-1, 1)


def by_maximum(x: Tensor) -> Tensor:
    """Divide by max|x|, so to [-1, 1], per image: (N, ...) -> (N, ...). All-zero: NaN. Keeps every rank.

    [released code, MNIST]
    """
    return x / _align(x.abs().flatten(1).amax(dim=1), x)


def min_max(x: Tensor) -> Tensor:
    """Scale to (x - min) / (max - min) in [0, 1] over each image's whole array. Constant: NaN.

    Channels share the scale. [released code, SSIM and HOG]
    """
    low, high = (_align(edge, x) for edge in x.flatten(1).aminmax(dim=1))
    return (x - low) / (high - low)


def status(x: Tensor) -> tuple[str, ...]:
    """What each image's map is, (N, ...) -> N of "ok", "constant map", "non-finite map".

    Any NaN or infinity makes a map non-finite, whatever else it is.
    """
    low, high = x.flatten(1).aminmax(dim=1)  # NaN where the map holds one
    finite, constant = (low.isfinite() & high.isfinite()).tolist(), (low == high).tolist()
    return tuple(NON_FINITE if not f else CONSTANT if c else OK for f, c in zip(finite, constant, strict=True))


def _align(values: Tensor, x: Tensor) -> Tensor:
    """One value an image, (N,), shaped and typed to broadcast over `x` (N, ...)."""
    return values.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _quantile_like(x: Tensor, q: float) -> Tensor:
    return _align(quantile(x, q), x)
