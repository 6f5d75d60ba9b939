"""Convolutions with the rectifier after them as one call, as a processor's library runs them fastest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

_DTYPES = (torch.float32, torch.bfloat16)


class Clip(NamedTuple):
    """A rectifier: what is below low, 0, or above high becomes that."""

    low: float
    high: float


class Geometry(NamedTuple):
    """How a 2-dimensional convolution walks: down and right each; groups."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


def geometry(rest: Sequence[Any], more: dict[str, Any]) -> Geometry | None:
    """Read `torch.conv2d`'s arguments after the bias; None where padding is a word."""
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    values = [*rest, *(more.get(name, default) for name, default in list(usual.items())[len(rest) :])]
    if isinstance(values[1], str):
        return None
    stride, padding, dilation = (_pair(value) for value in values[:3])
    return Geometry(stride, padding, dilation, int(values[3]))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    down, right = value if len(value) == 2 else (value[0], value[0])
    return int(down), int(right)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` has a kernel for this input and weight: 4 dimensions, on a processor, in float32 or bfloat16.

    Where it has none, `torch.conv2d` and the rectifier are to be called.
    """
    return (
        x.device.type == "cpu"
        and x.ndim == weight.ndim == 4
        and x.dtype in _DTYPES
        and weight.dtype == x.dtype
        and _has_library(x.dtype)
    )


@cache
def _has_library(dtype: torch.dtype) -> bool:
    """Whether PyTorch was built with oneDNN, and this processor has what its kernels for a type need."""
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and (dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Kernel:
    """Weight (D, C / groups, h, w) and bias of a convolution, and what running it again and again needs of them.

    The weight must not be written to any more.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._packed: dict[tuple[bool, Geometry], Tensor] = {}

    def forward(self, x: Tensor, way: Geometry) -> Tensor:
        """The weight as the library keeps it for inputs like x."""
        return self._pack(x, way, turned=False)

    def backward(self, gradient: Tensor, way: Geometry) -> Tensor:
        """Likewise, of the convolution that takes the gradient back where the stride is 1; way is that one's."""
        return self._pack(gradient, way, turned=True)

    def _pack(self, x: Tensor, way: Geometry, turned: bool) -> Tensor:
        # Threads may both make it: it is the same.
        if (turned, way) not in self._packed:
            weight = self._turned(way.groups) if turned else self.weight
            stride, padding, dilation, groups = way
            self._packed[turned, way] = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(memory_format=torch.channels_last), padding, stride, dilation, groups, x.shape
            )
        return self._packed[turned, way]

    def _turned(self, groups: int) -> Tensor:
        """(C, D / groups, h, w)."""
        d, c, height, width = self.weight.shape
        grouped = self.weight.flip(2, 3).view(groups, d // groups, c, height, width).transpose(1, 2)
        return grouped.reshape(c * groups, d // groups, height, width)


def convolve(x: Tensor, kernel: Kernel, way: Geometry, clip: Clip | None = None) -> Tensor:
    """Convolve x (N, C, H, W), then clip; differentiable once, by x only.

    In one thread PyTorch takes its own, slower kernels for convolutions of 1x1 with fewer than 16 images; its backward
    kernels are slower than a convolution forward; and a rectifier of its own walks through the memory once more.
    Raises RuntimeError where not `suits`.
    """
    if has_torch_function((x,)):
        return handle_torch_function(convolve, (x,), x, kernel, way, clip)
    result: Tensor = _Convolution.apply(x, kernel, way, clip)
    return result


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, way: Geometry, clip: Clip | None) -> Tensor:
    kind, numbers = _attribute(clip)
    stride, padding, dilation, groups = way
    found: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, kind, numbers, ""
    )
    return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Kernel, way: Geometry, clip: Clip | None) -> Tensor:
        out = _pointwise(x, kernel.forward(x, way), kernel.bias, way, clip)
        ctx.kernel, ctx.way, ctx.clip = kernel, way, clip
        ctx.back = _back(kernel.weight, way)
        # All that PyTorch's own backward pass reads of the input.
        ctx.shape = x.shape
        ctx.save_for_backward(out if clip else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (out,), kernel, way, clip = ctx.saved_tensors, ctx.kernel, ctx.way, ctx.clip
        if clip is not None:
            gradient = _gated(gradient, out, clip)
        if (back := ctx.back) is not None:
            return _pointwise(gradient, kernel.backward(gradient, back), None, back, None), None, None, None
        stride, padding, dilation, groups = way
        x = torch.empty(ctx.shape, dtype=gradient.dtype, memory_format=torch.channels_last)
        asked = [True, False, False]
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, x, kernel.weight, None, stride, padding, dilation, False, [0, 0], groups, asked
        )[0]
        return found, None, None, None


def pad(x: Tensor, sides: Sequence[int]) -> Tensor:
    """`F.pad` of pictures (N, C, H, W) with zeros: left, right, top, bottom; the gradient keeps its memory format.

    PyTorch's own backward pass copies it, channels first, and all that comes below then walks through memory crosswise.
    """
    if has_torch_function((x,)):
        return handle_torch_function(pad, (x,), x, sides)
    result: Tensor = _Pad.apply(x, tuple(sides))
    return result


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sides: tuple[int, ...]) -> Tensor:
        ctx.sides, ctx.size = sides, x.shape[2:]
        return F.pad(x, sides)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (left, _, top, _), (height, width) = ctx.sides, ctx.size
        return gradients[0][..., top : top + height, left : left + width], None


def _back(weight: Tensor, way: Geometry) -> Geometry | None:
    """How a convolution takes the gradient back; None where none does: with strides, and padding beyond the kernel."""
    down, right = (d * (k - 1) - p for k, d, p in zip(weight.shape[2:], way.dilation, way.padding, strict=True))
    plain = way.stride == (1, 1) and min(down, right) >= 0
    return Geometry((1, 1), (down, right), way.dilation, way.groups) if plain else None


def _attribute(clip: Clip | None) -> tuple[str, list[float]]:
    if clip is None:
        return "none", []
    return ("relu", []) if clip.high == float("inf") else ("hardtanh", [clip.low, clip.high])


def _gated(gradient: Tensor, out: Tensor, clip: Clip) -> Tensor:
    """The rectifier's backward pass, by its output."""
    if clip.high == float("inf"):
        found: Tensor = torch.ops.aten.threshold_backward(gradient, out, 0)
    else:
        found = torch.ops.aten.hardtanh_backward(gradient, out, clip.low, clip.high)
    return found
