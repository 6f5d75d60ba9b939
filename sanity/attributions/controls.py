"""Controls: maps that owe nothing to the network, and so mark what a similarity means."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanity.attributions.base import FunctionMethod, Inputs
from sanity.streams import normal_like


def sobel_magnitude(network: nn.Module, inputs: Inputs) -> Tensor:
    """Edge map of the picture: (N, 1, H, W), the Sobel gradient's length, averaged over channels.

    Equals `skimage.filters.sobel` up to its constant factor and its treatment of the one-pixel border,
    which is mirrored here.
    """
    step = torch.tensor([[-1.0, 0.0, 1.0]], dtype=inputs.pixels.dtype, device=inputs.pixels.device)
    smooth = torch.tensor([[1.0], [2.0], [1.0]], dtype=step.dtype, device=step.device) / 4
    kernel = torch.stack([smooth * step, (smooth * step).T])[:, None]
    planes = F.pad(inputs.pixels.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    magnitude = F.conv2d(planes, kernel).square().sum(1).sqrt()
    return magnitude.view_as(inputs.pixels).mean(1, keepdim=True)


def random_map(network: nn.Module, inputs: Inputs) -> Tensor:
    """Gaussian noise (N, 1, H, W), drawn anew at every occasion: a map that explains nothing."""
    maps = [
        normal_like(image[:1], inputs.seed, image_id, "random map", inputs.occasion)
        for image, image_id in zip(inputs.pixels, inputs.ids, strict=True)
    ]
    return torch.stack(maps)


EDGES = FunctionMethod(
    "edges", "Sobel; control of Adebayo et al. 2018", call=sobel_magnitude, evaluations=lambda options: 0
)
RANDOM = FunctionMethod(
    "random", "control of Binder et al. 2023", deterministic=False, fresh=True, call=random_map,
    evaluations=lambda options: 0,
)  # fmt: skip
CONTROLS = (EDGES.name, RANDOM.name)
