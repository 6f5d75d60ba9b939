"""Class activation maps: the last feature map, each channel weighed by the logit's gradient (Selvaraju et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sanity.attributions.base import FunctionMethod, Inputs, Option, explained
from sanity.attributions.rectifiers import GUIDED, needs_rectifiers
from sanity.registry import suggest

_CONVOLUTIONS = {"conv2d", "conv_transpose2d", "convolution"}


class _LastMap(TorchFunctionMode):
    """Keeps, as `found`, what the network has made of its last convolution before it pools it.

    By order of execution: the output of the last convolution with more than one pixel, then of whatever
    follows at that size (normalisation, rectifier, addition, concatenation). That is Mixed_7c of Inception
    v3, layer4 of a ResNet, the last rectifier before the last pooling of a VGG.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.ndim == 4 and output.requires_grad:
            last = None if self.found is None else self.found.shape[2:]
            size, name = output.shape[2:], func.__name__
            if (name in _CONVOLUTIONS and size.numel() > 1) or (size == last and "pool" not in name):
                self.found = output
        return output


class _OutputOf:
    """Keeps, as `found`, what one module gives; the network goes on with a copy, should it work in place."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        modules = dict(network.named_modules())
        if layer not in modules:
            raise ValueError(suggest("layer", layer, [name for name in modules if name]))
        self.module, self.found = modules[layer], None

    def __enter__(self) -> _OutputOf:
        self.handle = self.module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *raised: object) -> None:
        self.handle.remove()

    def _keep(self, module: nn.Module, arguments: Any, output: Any) -> Any:
        self.found = output
        return output.clone() if isinstance(output, Tensor) else output


def last_map(network: nn.Module, pixels: Tensor, targets: Tensor, layer: str = "") -> tuple[Tensor, Tensor]:
    """Feature map and the explained logit's gradient at it: (N, C, H, W), (N,) -> twice (N, K, h, w).

    layer: a module by name; by default, the last convolution and what follows at its size. Raises
    ValueError, in words that follow "this network", where there is none or the logits do not depend on it.
    """
    with torch.enable_grad():
        x = pixels.detach().requires_grad_()
        with _OutputOf(network, layer) if layer else _LastMap() as watch:
            logit = explained(network, x, targets)
        found, where = watch.found, f"layer {layer!r}" if layer else "its last convolution"
        if found is None and not layer:
            raise ValueError("it runs no convolution whose output has more than one pixel")
        if not isinstance(found, Tensor) or found.ndim != 4 or len(found) != len(pixels):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{where} gives {shape}, not a feature map (N, K, h, w)")
        (gradient,) = torch.autograd.grad(logit.sum(), found, allow_unused=True)
    if gradient is None:
        raise ValueError(f"its logits do not depend on {where}")
    return found.detach(), gradient


def gradcam(network: nn.Module, inputs: Inputs, layer: str = "") -> Tensor:
    """Where the last feature map speaks for the class: (N, 1, H, W) in [0, 1].

    ReLU of the channels' sum, each weighed by its mean gradient; divided by its largest value, then
    bilinear to the pictures' size. Where no cell is positive the map is 0 all over.
    """
    activation, gradient = last_map(network, inputs.pixels, inputs.targets, layer)
    cam = (activation * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    largest = cam.amax((1, 2, 3), keepdim=True)
    cam = cam / torch.where(largest == 0, 1.0, largest)
    return F.interpolate(cam, inputs.pixels.shape[2:], mode="bilinear", align_corners=False)


def guided_gradcam(network: nn.Module, inputs: Inputs, layer: str = "") -> Tensor:
    """Guided backpropagation times GradCAM, pixel by pixel: (N, C, H, W)."""
    pixels = inputs.pixels.detach().requires_grad_()
    with torch.enable_grad(), GUIDED.context(network, inputs.pixels, inputs.pixels):
        logits = explained(network, pixels, inputs.targets)
    (guided,) = torch.autograd.grad(logits.sum(), pixels)
    return guided * gradcam(network, inputs, layer)


def needs_map(network: nn.Module, example: Tensor, options: Mapping[str, Option]) -> str:
    """Why a class activation map cannot be made, or ""."""
    try:
        last_map(network, example, torch.zeros(len(example), dtype=torch.int64), str(options["layer"]))
    except ValueError as error:
        return str(error)
    return ""


def _needs_both(network: nn.Module, example: Tensor, options: Mapping[str, Option]) -> str:
    return needs_rectifiers(network, example, options) or needs_map(network, example, options)


GRADCAM = FunctionMethod(
    "gradcam",
    "Selvaraju et al. 2017",
    options={"layer": ""},
    call=gradcam,
    evaluations=lambda options: 1,
    unsuited=needs_map,
)
GUIDED_GRADCAM = FunctionMethod(
    "guided_gradcam",
    "Selvaraju et al. 2017",
    options={"layer": ""},
    call=guided_gradcam,
    evaluations=lambda options: 2,
    unsuited=_needs_both,
)
