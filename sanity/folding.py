"""Run a network with BatchNorms and rectifiers as part of the convolutions before them: fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sanity.attributions.rectifiers import clip_of
from sanity.convolution import Clip, Kernel, Sides, convolve, geometry, pad, served, suits
from sanity.reuse import METADATA
from sanity.substitution import instead
from sanity.tracing import CONVOLUTIONS, BatchNorm, Course, Joined, call_of, norm_call, zeros_around

CACHE_BYTES = 2**30
"""Folded weights are kept, of trained and of random parameters, up to this much memory."""


class _AstrayError(Exception):
    """The network goes another way than the one that was looked at."""


class _Deferred(NamedTuple):
    """A rectifier's backward pass, which is left to the convolution that reads its result."""

    clip: Clip


_Expected = BatchNorm | Clip | _Deferred | Sides
"""What the network is yet to call on a tensor: two that are done already, two that are left to a convolution."""


class _Fold(TorchFunctionMode):
    """One forward pass: convolutions do what is joined to them, and the calls that would do it do nothing.

    pending: by a tensor's id, the tensor and what is expected of it, in order. Raises _AstrayError where the network
    calls another function than it should, or the same with other numbers.
    """

    def __init__(self, course: Course, weights: _Weights, clips: bool) -> None:
        super().__init__()
        self.course, self.weights, self.clips = course, weights, clips
        self.place, self.count, self.paddings = 0, 0, 0
        self.padded = {one.padded for one in course.joined.values()}
        self.pending: dict[int, tuple[Tensor, list[_Expected]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in METADATA:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self._step(func)
            return result
        self._step(func)
        if func in CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        if func is F.pad and (sides := zeros_around(*args, **kwargs)) is not None:
            return self._padding(args[0], sides)
        if self.pending and args and id(args[0]) in self.pending:
            return self._done(func, args, kwargs)
        return func(*args, **kwargs)

    def end(self) -> None:
        """Nothing more is called."""
        if self.pending or (self.course.calls and self.place < len(self.course.calls)):
            raise _AstrayError

    def _step(self, func: Callable[..., Any]) -> None:
        calls = self.course.calls
        if calls and (self.place >= len(calls) or calls[self.place] != func):
            raise _AstrayError
        self.place += 1

    def _done(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """The answer of a call that a convolution has answered already."""
        x, (first, *_) = self.pending[id(args[0])]
        if isinstance(first, BatchNorm):
            call = norm_call(*args, **kwargs) if func is F.batch_norm else None
            same = call is not None and call.same(call_of(first, instead))
        else:
            same = isinstance(first, Clip) and clip_of(func, args, kwargs) == first
        if not same:
            raise _AstrayError
        self._pass(x)
        return x

    def _pass(self, x: Tensor) -> None:
        """What was expected of a tensor first has come."""
        expected = self.pending[id(x)][1]
        expected.pop(0)
        if not expected:
            del self.pending[id(x)]

    def _padding(self, x: Tensor, sides: Sides) -> Tensor:
        """Pad, or leave it to the convolution."""
        number, self.paddings = self.paddings, self.paddings + 1
        if number not in self.padded or not served(x):
            return pad(x, sides)
        self.pending.setdefault(id(x), (x, []))[1].append(sides)
        return x

    def _left(self, x: Tensor) -> tuple[Clip | None, Sides | None]:
        """What is left to the convolution of x: the backward pass of the rectifier it comes from, zeros around it."""
        clip = sides = None
        while id(x) in self.pending:
            first = self.pending[id(x)][1][0]
            if isinstance(first, _Deferred):
                clip = first.clip
            elif isinstance(first, Sides):
                sides = first
            else:
                raise _AstrayError
            self._pass(x)
        return clip, sides

    def _convolution(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        one, self.count = self.course.joined.get(self.count, Joined()), self.count + 1
        if len(args) < 3 or one.made:
            return func(*args, **kwargs)
        x, weight, bias, *rest = args
        way = geometry(rest, kwargs) if func is torch.conv2d and suits(x, weight) else None
        if one.norm is None and way is None:
            return func(*args, **kwargs)
        kernel = self.weights.of(weight, bias, one.norm)
        expected: list[_Expected] = [] if one.norm is None else [one.norm]
        if way is None:
            out = func(x, kernel.weight, kernel.bias, *rest, **kwargs)
        else:
            before, sides = self._left(x)
            kernel, way = (kernel, way) if sides is None else kernel.padding(sides, way)
            clip = one.clip if self.clips else None
            if clip is not None:
                expected += [clip, _Deferred(clip)] if one.deferred else [clip]
            out = convolve(x, kernel, way, clip, before, deferred=clip is not None and one.deferred)
        if expected:
            self.pending[id(out)] = out, expected
        return out


class _Weights:
    """Kernels, folded or not, kept as long as what they were made of is still the same memory, unwritten."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[list[Tensor | None], Kernel]] = {}
        self._bytes = 0
        self._lock = Lock()

    def of(self, weight: Tensor, bias: Tensor | None, norm: BatchNorm | None) -> Kernel:
        """Kernel of a convolution with the norm folded into it, the very same one whenever the sources are."""
        # One thread folds: another would make tensors of its own, and what was kept of them could not be reused.
        with self._lock, torch._C.DisableTorchFunction():
            norms = () if norm is None else call_of(norm, instead)[:4]
            sources = [weight, bias, *norms]
            eps = None if norm is None else norm.eps
            key = (*(None if one is None else _memory(one) for one in sources), eps)
            if key in self._kept:
                # What was used last is given up last.
                self._kept[key] = kept = self._kept.pop(key)
                return kept[1]
            pair = weight, bias
            if norm is not None:
                with torch.no_grad():
                    pair = folded(weight, bias, *norms, eps=norm.eps)
            made = Kernel(*pair)
            self._bytes += _bytes(made)
            while self._kept and self._bytes > CACHE_BYTES:
                self._bytes -= _bytes(self._kept.pop(next(iter(self._kept)))[1])
            # Aliases of the sources keep their memory from being given to other tensors.
            self._kept[key] = ([None if one is None else one.detach() for one in sources], made)
            return made


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What tells a tensor's numbers from all others': where they lie, how, and how often they were written to."""
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


def _bytes(kernel: Kernel) -> int:
    """Memory of a kernel as it is, and packed for each direction."""
    return 3 * kernel.weight.numel() * kernel.weight.element_size()


def folded(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution and the evaluating BatchNorm after it."""
    scale = (var + eps).rsqrt()
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if gamma is not None:
        scale, shift = scale * gamma, shift * gamma
    if beta is not None:
        shift = shift + beta
    wide = weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.ndim - 1))
    return wide.to(weight.dtype), shift.to(weight.dtype)


class Folded(nn.Module):
    """A network that computes the same with BatchNorms, and rectifiers, as part of the convolutions before them.

    course as `foldable` finds it; folded weights are made on first use and kept for as long as the parameters
    they were made of have not changed. clips: rectifiers, too, where the convolution can take them; otherwise
    they, and whatever else the network calls, are untouched. A forward pass that takes another way than when
    `foldable` looked is run again unfolded, and so are all others from then on, with gradients or without.
    """

    def __init__(self, network: nn.Module, course: Course, clips: bool = False) -> None:
        super().__init__()
        self.network, self.clips = network, clips
        # Some networks take a shorter way where no gradient is asked for.
        self.courses = {True: course, False: course}
        self.weights = _Weights()

    def clipping(self) -> Folded:
        """The same, with rectifiers as part of convolutions; both keep the same folded weights."""
        made = Folded(self.network, self.courses[True], clips=True)
        made.weights = self.weights
        return made

    def forward(self, x: Tensor) -> Any:
        """Whatever the network gives."""
        kind = torch.is_grad_enabled()
        fold = _Fold(self.courses[kind], self.weights, self.clips)
        try:
            with fold:
                out = self.network(x)
            fold.end()
        except _AstrayError:
            self.courses[kind] = Course()
            return self(x)
        return out
