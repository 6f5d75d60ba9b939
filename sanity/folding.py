"""Run a network with BatchNorms and rectifiers as part of the convolutions before them: fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sanity.attributions.rectifiers import clip_of
from sanity.convolution import Clip, Kernel, convolve, geometry, pad, suits
from sanity.substitution import instead

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
BatchNorm = nn.modules.batchnorm._NormBase

CACHE_BYTES = 2**30
"""Folded weights are kept, of trained and of random parameters, up to this much memory."""


class Joined(NamedTuple):
    """What reads a convolution's result, and nothing else does, so that it can be part of the convolution.

    norm: an evaluating BatchNorm; clip: a rectifier, after the norm if there is one, whose result is not written to.
    made: the network makes the convolution's weight anew in every pass, so that nothing is worth keeping of it.
    deferred: the rectifier's result goes into one other convolution only, which can do its backward pass.
    """

    norm: BatchNorm | None = None
    clip: Clip | None = None
    made: bool = False
    deferred: bool = False


class _Trace(TorchFunctionMode):
    """Notes, of one forward pass, what goes from a convolution into a BatchNorm or a rectifier and nowhere else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        norms = [m for m in network.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
        self.owner = {id(norm.running_mean): norm for norm in norms}
        self.own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self.kept: list[Tensor] = []
        self.uses: dict[_Value, int] = {}
        self.count = 0
        self.places: dict[_Value, int] = {}
        self.links: dict[int, list[tuple[_Value, str, Any]]] = {}
        self.made: set[int] = set()
        self.clipped: dict[int, tuple[Tensor, int]] = {}
        self.convolved: set[_Value] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [_value(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not made:
            return result
        # Kept alive, so that an id names one tensor only.
        self.kept += made
        for value in read:
            self.uses[value] = self.uses.get(value, 0) + 1
        if func in _CONVOLUTIONS:
            if id(args[1] if len(args) > 1 else kwargs["weight"]) not in self.own:
                self.made.add(self.count)
            elif len(args) > 2:
                self.places[_value(result)] = self.count
                self.links[self.count] = []
                if func is torch.conv2d and geometry(args[3:], kwargs) is not None:
                    self.convolved.add(read[0])
            self.count += 1
        elif read and (place := self.places.get(read[0])) is not None:
            self._follow(place, func, args, kwargs, read[0], result)
        return result

    def _follow(self, place: int, func: Any, args: tuple[Any, ...], kwargs: Any, source: _Value, result: Any) -> None:
        """A call reads what came from a convolution."""
        kinds = [kind for _, kind, _ in self.links[place]]
        if func is F.batch_norm and not kinds and len(args) > 1 and not _training(args, kwargs):
            if (norm := self.owner.get(id(args[1]))) is not None:
                self.links[place].append((source, "norm", norm))
                self.places[_value(result)] = place
        elif "clip" not in kinds and (clip := clip_of(func, args, kwargs)) is not None:
            self.links[place].append((source, "clip", clip))
            self.clipped[place] = result, result._version

    def joined(self, out: Any) -> dict[int, Joined]:
        """By convolutions' places, what may be joined to each; out: what the network gave."""
        returned = {_value(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        found = {place: Joined(made=True) for place in self.made}
        for place, links in self.links.items():
            alone = takewhile(lambda link: self.uses[link[0]] == 1 and link[0] not in returned, links)
            joined = Joined(**{kind: what for _, kind, what in alone})
            if joined.clip is not None:
                result, version = self.clipped[place]
                value = id(result), version
                # The gradient of a joined rectifier is read off its result, which must then be what it was.
                if result._version != version:
                    joined = joined._replace(clip=None)
                elif value in self.convolved and self.uses[value] == 1 and value not in returned:
                    joined = joined._replace(deferred=True)
            found[place] = joined
        return {place: one for place, one in found.items() if one != Joined()}


_Value = tuple[int, int]
"""A tensor at a time: its id, and how often it was written to by then."""


def _value(tensor: Tensor) -> _Value:
    return id(tensor), tensor._version


def _training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[5] if len(args) > 5 else kwargs.get("training", False))


def _zeros_around(
    x: Tensor, sides: Sequence[int], mode: str = "constant", value: float | None = None
) -> Sequence[int] | None:
    """Sides of a call of `F.pad` that puts zeros around pictures, and cuts nothing off; None of any other."""
    plain = mode == "constant" and not value and x.ndim == 4 and len(sides) == 4
    return sides if plain and min(sides) >= 0 else None


def foldable(network: nn.Module, example: Tensor) -> dict[int, Joined]:
    """Convolution calls, by their place in the forward pass -> what may be part of them."""
    trace = _Trace(network)
    with torch.no_grad(), trace:
        out = network(example)
    return trace.joined(out)


class _Fold(TorchFunctionMode):
    """One forward pass: convolutions do what is joined to them, and the calls that would do it do nothing.

    pending: by a tensor's id, what the network is yet to call on it: a norm, a clip, or the convolution to which a
    rectifier's backward pass is left.
    """

    def __init__(self, plan: Mapping[int, Joined], weights: _Weights, clips: bool) -> None:
        super().__init__()
        self.plan, self.weights, self.clips = plan, weights, clips
        self.count = 0
        self.pending: dict[int, list[str | Clip]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        if func is F.pad and (sides := _zeros_around(*args, **kwargs)) is not None:
            return pad(args[0], sides)
        expected = self.pending.get(id(args[0])) if args and self.pending else None
        if expected and self._is(expected[0], func, args, kwargs):
            self._pass(args[0])
            return args[0]
        return func(*args, **kwargs)

    def _is(self, expected: str | Clip, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> bool:
        """Whether a call is one that has been done already."""
        if expected == "norm":
            return func is F.batch_norm
        return expected == "clip" and clip_of(func, args, kwargs) is not None

    def _pass(self, x: Tensor) -> None:
        """What was expected of a tensor first has come."""
        self.pending[id(x)].pop(0)
        if not self.pending[id(x)]:
            del self.pending[id(x)]

    def _before(self, x: Tensor) -> Clip | None:
        """The rectifier that x comes from, if its backward pass is left to the convolution of x."""
        clip = self.pending.get(id(x), [None])[0]
        if not isinstance(clip, Clip):
            return None
        self._pass(x)
        return clip

    def _convolution(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        one, self.count = self.plan.get(self.count, Joined()), self.count + 1
        if len(args) < 3 or one.made:
            return func(*args, **kwargs)
        x, weight, bias, *rest = args
        way = geometry(rest, kwargs) if func is torch.conv2d and suits(x, weight) else None
        if one.norm is None and way is None:
            return func(*args, **kwargs)
        kernel = self.weights.of(weight, bias, one.norm)
        clip = one.clip if self.clips and way else None
        expected: list[str | Clip] = [*["norm"] * (one.norm is not None), *["clip"] * (clip is not None)]
        if clip is not None and one.deferred:
            expected.append(clip)
        if way is None:
            out = func(x, kernel.weight, kernel.bias, *rest, **kwargs)
        else:
            out = convolve(x, kernel, way, clip, self._before(x), deferred=clip in expected)
        if expected:
            self.pending[id(out)] = expected
        return out


_OF_NORM = ("running_mean", "running_var", "weight", "bias")


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
            norms = () if norm is None else tuple(instead(getattr(norm, name)) for name in _OF_NORM)
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

    plan as `foldable` finds it; folded weights are made on first use and kept for as long as the parameters
    they were made of have not changed. clips: rectifiers, too, where the convolution can take them; otherwise
    they, and whatever else the network calls, are untouched. A forward pass that takes another way than when
    `foldable` looked is run again unfolded, from then on.
    """

    def __init__(self, network: nn.Module, plan: Mapping[int, Joined], clips: bool = False) -> None:
        super().__init__()
        self.network, self.plan, self.clips = network, plan, clips
        self.weights = _Weights()

    def clipping(self) -> Folded:
        """The same, with rectifiers as part of convolutions; both keep the same folded weights."""
        made = Folded(self.network, self.plan, clips=True)
        made.weights = self.weights
        return made

    def forward(self, x: Tensor) -> Any:
        """Whatever the network gives."""
        fold = _Fold(self.plan, self.weights, self.clips)
        with fold:
            out = self.network(x)
        if fold.pending:
            self.plan = {}
            return self(x)
        return out
