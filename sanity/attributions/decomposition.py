"""LRP and DeepLIFT as backward rules, at every linear layer and activation that a network really calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sanity.attributions.base import GradientMethod, Option, Rule, Sees
from sanity.attributions.gradients import PIXELS, times_input
from sanity.attributions.rectifiers import is_rectifier, of_numbers, replaced, ruled
from sanity.attributions.survey import Function, survey, varying

SMALL = 1e-10
"""Inputs of an activation that differ by less have its derivative as their slope, as in captum."""

# Functions by the name they are called by, without underscores: `x += y` is iadd or add.
_WEIGHTED = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
    "batch_norm", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "mean", "sum", "matmul", "mm", "bmm", "addmm", "einsum",
}  # fmt: skip
_SUMS = {"add", "radd", "iadd", "sub", "rsub", "isub"}
_SCALINGS = {"mul", "rmul", "imul", "multiply", "div", "truediv", "itruediv", "divide", "true_divide", "neg"}
_MOVES = {
    "cat", "concat", "concatenate", "stack", "flatten", "unflatten", "ravel", "view", "view_as", "reshape",
    "reshape_as", "permute", "transpose", "swapaxes", "movedim", "index_select", "contiguous", "clone", "squeeze",
    "unsqueeze", "getitem", "get", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "pad", "dropout",
    "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "expand", "expand_as",
    "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "roll", "flip", "to", "float", "double",
    "interpolate", "unfold", "fold",
}  # fmt: skip
_MANY = _SUMS | {"cat", "concat", "concatenate", "stack"}
_POOLS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
}  # fmt: skip
_THROUGH_ZERO = {
    "leaky_relu", "prelu", "elu", "selu", "celu", "tanh", "gelu", "silu", "hardswish", "mish", "softsign",
}  # fmt: skip
"""Activations with f(0) = 0 whose f(z) / z is bounded."""
_ELEMENTWISE = {
    "sigmoid", "softplus", "hardsigmoid", "logsigmoid", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max",
    "threshold", "exp", "square", "abs", "sin", "cos",
}  # fmt: skip


def name_of(func: Function) -> str:
    """Return a function's name as the tables here have it."""
    return func.__name__.strip("_")


# --- the check before a run


def _wrong(activations: set[str], func: Function, args: tuple[Any, ...], kwargs: Any) -> str:
    """Why a call would be explained wrongly, or ""; `activations` are those that the rule at hand knows."""
    name = name_of(func)
    if name in activations or name in _POOLS or is_rectifier(func, args, kwargs):
        return ""
    if name not in _WEIGHTED | _SUMS | _SCALINGS | _MOVES:
        return f"runs {name}, for which there is no rule"
    if name not in _MANY and len(varying((args, kwargs))) > 1:
        return f"multiplies activations with each other ({name}), for which there is no rule"
    if "div" in name and not varying(args[0]):
        return f"divides by an activation ({name}), for which there is no rule"
    if name == "batch_norm" and (args[1] is None or (args[5] if len(args) > 5 else kwargs.get("training"))):
        return "normalises by the batch's own statistics, for which there is no rule"
    return ""


def _needs(activations: set[str]) -> Callable[[nn.Module, Tensor, Mapping[str, Option]], str]:
    return lambda network, example, options: survey(network, example, partial(_wrong, activations))


# --- LRP


class _Epsilon(TorchFunctionMode):
    """Relevance divided by activation, taken backwards as a gradient.

    With c = R / a, a linear layer z = W a + b under the epsilon rule gives c_a = W^T (c_z z / (z + eps sign z)):
    the gradient, times a factor at its output. An activation hands its relevance on, c_z = c_a a / z.
    """

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def __torch_function__(self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if name in _THROUGH_ZERO or is_rectifier(func, args, kwargs):
            return replaced(func, args, kwargs, self._hand_on)
        output = func(*args, **kwargs)
        if name in _WEIGHTED | _SUMS and isinstance(output, Tensor) and output.requires_grad:
            size = output.detach().abs()
            factor = size / (size + self.epsilon)
            output.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
        return output

    @staticmethod
    def _hand_on(z: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            value = activate(z)
            factor = torch.where(z == 0, 0, value / z)
        return ruled(z, lambda: value, lambda gradient: gradient * factor)


def _epsilon(options: Mapping[str, Option]) -> Rule:
    epsilon = float(options["epsilon"])
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be finite and above 0, not {epsilon}")
    return Rule(f"LRP epsilon={epsilon}", lambda network, points, images: _Epsilon(epsilon), sees=Sees.LAYERS)


# --- DeepLIFT


class _Rescaling(TorchFunctionMode):
    """Slopes of activations and max-pools between the baseline and the picture, in place of derivatives."""

    def __init__(self, network: nn.Module, baseline: Tensor) -> None:
        super().__init__()
        self.reference: list[tuple[Tensor, Tensor]] = []
        self.place = -1
        with torch.no_grad(), self:
            network(baseline)
        self.place = 0

    def __torch_function__(self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if name in _POOLS:
            return replaced(func, args, kwargs, self._pool)
        if (name in _THROUGH_ZERO | _ELEMENTWISE and of_numbers(args, kwargs)) or is_rectifier(func, args, kwargs):
            return replaced(func, args, kwargs, self._rescale)
        return func(*args, **kwargs)

    def _met(self, z: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What this call was given and gave at the baseline; there, it is noted."""
        if self.place < 0:
            self.reference.append((z.clone(), value.clone()))
            return self.reference[-1]
        self.place += 1
        if self.place > len(self.reference) or self.reference[self.place - 1][0].shape != z.shape:
            raise ValueError(f"activation {self.place} is another at the baseline: the path depends on the input")
        return self.reference[self.place - 1]

    def _rescale(self, z: Tensor, activate: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            output = activate(leaf)
            (derivative,) = torch.autograd.grad(output.sum(), leaf)
        value = output.detach()
        z0, value0 = self._met(z, value)
        step = z.detach() - z0
        slope = torch.where(step.abs() < SMALL, derivative, (value - value0) / step)
        return ruled(z, lambda: value, lambda gradient: gradient * slope)

    def _pool(self, z: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
        """What the larger of the two maxima adds goes to where it was found, the rest to where the other was."""
        at = z.detach()
        value = pool(at)
        z0, value0 = self._met(at, value)
        step, larger = at - z0, torch.maximum(value, value0)

        def rule(gradient: Tensor) -> Tensor:
            shares = _routed(pool, at, gradient * (larger - value0)) + _routed(pool, z0, gradient * (value - larger))
            return torch.where(step.abs() < SMALL, _routed(pool, at, gradient), shares / step)

        return ruled(z, lambda: value, rule)


def _routed(pool: Callable[[Tensor], Tensor], z: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of a max-pool at z: windows that overlap add up."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(pool(leaf), leaf, gradient)[0]


@contextmanager
def _rescaled(network: nn.Module, points: Tensor, images: Tensor) -> Iterator[None]:
    rescaling = _Rescaling(network, torch.zeros_like(points))
    with rescaling:
        yield
    if rescaling.place != len(rescaling.reference):
        raise ValueError(
            f"{len(rescaling.reference)} activations at the baseline, {rescaling.place} at the image: "
            "the path depends on the input"
        )


RESCALE = Rule("DeepLIFT rescale", _rescaled, finite=True)

LRP_EPSILON = GradientMethod(
    "lrp_epsilon",
    "Bach et al. 2015; tends to gradient_x_input where every rectifier is a plain ReLU [Ancona et al. 2018]",
    options={"epsilon": 1e-6},
    points=lambda options: PIXELS,
    combine=times_input,
    under=_epsilon,
    unsuited=_needs(_THROUGH_ZERO),
)
DEEPLIFT = GradientMethod(
    "deeplift",
    "Shrikumar et al. 2017, rescale rule",
    points=lambda options: PIXELS,
    combine=times_input,
    under=lambda options: RESCALE,
    unsuited=_needs(_THROUGH_ZERO | _ELEMENTWISE),
)
