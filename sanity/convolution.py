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
FEW = 4
"""Up to so many channels, as pictures have, the library's gradient of a convolution with strides is several times
slower than the convolution: it works on 16 at a time."""


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
    return served(x) and weight.ndim == 4 and weight.dtype == x.dtype


def served(x: Tensor) -> bool:
    """Whether `convolve` has kernels for inputs like x, with weights of their type."""
    return x.device.type == "cpu" and x.ndim == 4 and x.dtype in _DTYPES and _has_library(x.dtype)


@cache
def _has_library(dtype: torch.dtype) -> bool:
    """Whether PyTorch was built with oneDNN, and this processor has what its kernels for a type need."""
    available = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return available and (dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


class Sides(NamedTuple):
    """Rows and columns around a picture."""

    left: int
    right: int
    top: int
    bottom: int


class Kernel:
    """Weight (D, C / groups, h, w) and bias of a convolution, and what running it again and again needs of them.

    The weight must not be written to any more.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self._packed: dict[tuple[Geometry, Geometry | None], Tensor] = {}
        self._wider: dict[Sides, Kernel] = {}

    def padding(self, sides: Sides, way: Geometry) -> tuple[Kernel, Geometry]:
        """What does to pictures as this does to pictures with zeros around, where it is not dilated.

        The library pads both sides alike; where one has less, the kernel begins, or ends, with taps of zero instead.
        """
        left, right, top, bottom = sides
        across, down = max(left, right), max(top, bottom)
        zeros = Sides(across - left, across - right, down - top, down - bottom)
        if zeros not in self._wider:
            # What the network calls is watched: this is not its own.
            with torch._C.DisableTorchFunction():
                wider = Kernel(F.pad(self.weight, zeros), self.bias) if any(zeros) else self
            # Threads may both make it: the first one's stays, so that what was kept of it can be reused.
            self._wider.setdefault(zeros, wider)
        return self._wider[zeros], way._replace(padding=(way.padding[0] + down, way.padding[1] + across))

    def packed(self, x: Tensor, way: Geometry, back: Geometry | None = None) -> Tensor:
        """The weight as the library keeps it for inputs like x; of the convolution `back`, that takes gradients back.

        back is what `_back` tells of way.
        """
        # Threads may both make it: it is the same.
        if (way, back) not in self._packed:
            weight = self.weight if back is None else self._turned(way)
            stride, padding, dilation, groups = back or way
            self._packed[way, back] = torch.ops.mkldnn._reorder_convolution_weight(
                weight.contiguous(memory_format=torch.channels_last), padding, stride, dilation, groups, x.shape
            )
        return self._packed[way, back]

    def _turned(self, way: Geometry) -> Tensor:
        """(stride x stride x C, D / groups, taps down, taps right)."""
        (d, c, height, width), (down, right), groups = self.weight.shape, way.stride, way.groups
        rows, columns = _ceil(height, down), _ceil(width, right)
        whole = F.pad(self.weight, (0, right * columns - width, 0, down * rows - height))
        taps = whole.view(groups, d // groups, c, rows, down, columns, right).flip(3, 5)
        return taps.permute(4, 6, 0, 2, 1, 3, 5).reshape(down * right * groups * c, d // groups, rows, columns)


@cache
def _back(shape: torch.Size, way: Geometry) -> Geometry | None:
    """How the convolution runs that takes the gradient of one with a weight of this shape back.

    Where the stride is more than 1, its channels are those of stride x stride neighbours, one after another. None where
    there is no such convolution, or none that is worth it.
    """
    # Of a row or column of the kernel, a pixel meets with every stride-th tap.
    taps = [_ceil(k, s) for k, s in zip(shape[2:], way.stride, strict=True)]
    if way.stride == (1, 1):
        around = [d * (k - 1) - p for k, d, p in zip(taps, way.dilation, way.padding, strict=True)]
    elif way.dilation == (1, 1) and way.groups == 1 and shape[1] <= FEW:
        around = [k - 1 for k in taps]
    else:
        return None
    # Padding beyond the kernel would have to be cut off.
    return Geometry((1, 1), (around[0], around[1]), way.dilation, way.groups) if min(around) >= 0 else None


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def convolve(
    x: Tensor,
    kernel: Kernel,
    way: Geometry,
    clip: Clip | None = None,
    before: Clip | None = None,
    deferred: bool = False,
) -> Tensor:
    """Convolve x (N, C, H, W), then clip; differentiable once, by x only.

    deferred: clip's backward pass is left to the one call that reads the result, which is told so by before: the
    rectifier that x comes from. There, it changes a gradient that was just written, in place.
    In one thread PyTorch takes its own, slower kernels for convolutions of 1x1 with fewer than 16 images; its backward
    kernels are slower than a convolution forward; and a rectifier of its own walks through the memory once more.
    Raises RuntimeError where not `suits`.
    """
    if has_torch_function((x,)):
        return handle_torch_function(convolve, (x,), x, kernel, way, clip, before, deferred)
    result: Tensor = _Convolution.apply(x, kernel, way, clip, before, deferred)
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
    def forward(
        ctx: Any, x: Tensor, kernel: Kernel, way: Geometry, clip: Clip | None, before: Clip | None, deferred: bool
    ) -> Tensor:
        out = _pointwise(x, kernel.packed(x, way), kernel.bias, way, clip)
        ctx.kernel, ctx.way, ctx.clip, ctx.before = kernel, way, None if deferred else clip, before
        # All that PyTorch's own backward pass reads of the input.
        ctx.shape = x.shape
        ctx.save_for_backward(out if ctx.clip else None, x if before else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        out, x = ctx.saved_tensors
        if ctx.clip is not None:
            gradient = _gated(gradient, out, ctx.clip)
        found = _taken_back(gradient, ctx.kernel, ctx.way, ctx.shape)
        if ctx.before is not None:
            _gated(found, x, ctx.before, into=found)
        return found, None, None, None, None, None


def _taken_back(gradient: Tensor, kernel: Kernel, way: Geometry, shape: torch.Size) -> Tensor:
    """The gradient at the input, which has that shape."""
    if (back := _back(kernel.weight.shape, way)) is not None:
        found = _pointwise(gradient, kernel.packed(gradient, way, back), None, back, None)
        return found if way.stride == (1, 1) else _spread(found, way, shape)
    stride, padding, dilation, groups = way
    x = torch.empty(shape, dtype=gradient.dtype, memory_format=torch.channels_last)
    asked = [True, False, False]
    pulled: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, kernel.weight, None, stride, padding, dilation, False, [0, 0], groups, asked
    )[0]
    return pulled


def _spread(found: Tensor, way: Geometry, shape: torch.Size) -> Tensor:
    """Channels of stride x stride neighbours -> the pixels themselves, cut to shape (N, C, H, W)."""
    (down, right), (n, c, height, width) = way.stride, shape
    rows, columns = found.shape[2:]
    apart = found.permute(0, 2, 3, 1).reshape(n, rows, columns, down, right, c)
    whole = apart.transpose(2, 3).reshape(n, rows * down, columns * right, c).permute(0, 3, 1, 2)
    top, left = way.padding
    cut = whole[..., top : top + height, left : left + width]
    missing, lacking = height - cut.shape[2], width - cut.shape[3]
    # Pixels that no step of the convolution reaches have no gradient.
    return F.pad(cut, (0, lacking, 0, missing)) if missing or lacking else cut


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


def _attribute(clip: Clip | None) -> tuple[str, list[float]]:
    if clip is None:
        return "none", []
    return ("relu", []) if clip.high == float("inf") else ("hardtanh", [clip.low, clip.high])


def _gated(gradient: Tensor, out: Tensor, clip: Clip, into: Tensor | None = None) -> Tensor:
    """The rectifier's backward pass, by its output; written to a tensor, if one is given."""
    aten = torch.ops.aten
    relu = clip.high == float("inf")
    operation, numbers = (aten.threshold_backward, (0,)) if relu else (aten.hardtanh_backward, clip)
    if into is not None:
        operation.grad_input(gradient, out, *numbers, grad_input=into)
        return into
    found: Tensor = operation(gradient, out, *numbers)
    return found
