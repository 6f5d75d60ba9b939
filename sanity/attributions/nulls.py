"""What stands in for a deleted pixel: a blurred picture, a constant colour, noise (Fong and Vedaldi 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sanity.streams import normal_like

NULLS = ("blur", "median", "constant", "zero", "noise")


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian of standard deviation `sigma` pixels: (N, C, H, W) -> (N, C, H, W); sigma 0 changes nothing.

    The kernel ends at 4 sigma and the picture's edge is repeated beyond itself, as in
    `scipy.ndimage.gaussian_filter(mode="nearest")`.
    """
    if sigma <= 0:
        return images
    reach = int(4 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    planes = images.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.pad(planes, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))
    planes = F.conv2d(F.pad(planes, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return planes.view_as(images)


def median_blur(images: Tensor, radius: int) -> Tensor:
    """Median over windows of 2 radius + 1 pixels a side, the edge repeated: (N, C, H, W) -> (N, C, H, W)."""
    return torch.stack([_median_plane(plane, radius) for plane in images.flatten(0, 1)]).view_as(images)


def _median_plane(plane: Tensor, radius: int) -> Tensor:
    padded = F.pad(plane[None, None], (radius,) * 4, mode="replicate")
    return F.unfold(padded, 2 * radius + 1)[0].median(0).values.view_as(plane)


def null_images(
    pixels: Tensor, kind: str, radius: float, ids: tuple[str, ...], seed: int = 0, draw: int | str = 0
) -> Tensor:
    """What the deleted pixels of each picture become: (N, C, H, W) -> (N, C, H, W), in the network's space.

    `blur`: Gaussian of `radius` pixels; `median`: windows of 2 radius + 1; `constant`: the picture's own mean
    colour; `zero`: 0, the data set's mean where inputs are centred on it; `noise`: independent normal pixels
    of the picture's own mean and standard deviation by channel, drawn for (seed, id, draw).
    Raises ValueError for another kind.
    """
    mean = pixels.mean((2, 3), keepdim=True)
    match kind:
        case "blur":
            return gaussian_blur(pixels, radius)
        case "median":
            return median_blur(pixels, int(radius))
        case "constant":
            return mean.expand_as(pixels)
        case "zero":
            return torch.zeros_like(pixels)
        case "noise":
            spread = pixels.std((2, 3), correction=0, keepdim=True)
            named = zip(pixels, ids, strict=True)
            return mean + spread * torch.stack([normal_like(x, seed, name, "null", draw) for x, name in named])
    raise ValueError(f"unknown null {kind!r}; known: {', '.join(NULLS)}")
