"""What a network calls in one forward pass, and which of it can be done by the convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sanity.attributions.rectifiers import clip_of
from sanity.convolution import Clip, Geometry, Sides, geometry
from sanity.reuse import METADATA

CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
BatchNorm = nn.modules.batchnorm._NormBase


class Joined(NamedTuple):
    """What reads a convolution's result, and nothing else does, so that it can be part of the convolution.

    norm: an evaluating BatchNorm; clip: a rectifier, after the norm if there is one, whose result is not written to.
    made: the network makes the convolution's weight or bias anew in every pass, so that nothing is worth keeping of it.
    deferred: the rectifier's result goes into one other convolution only, which can do its backward pass.
    padded: the number of the call that puts zeros around what nothing but the convolution reads.
    """

    norm: BatchNorm | None = None
    clip: Clip | None = None
    made: bool = False
    deferred: bool = False
    padded: int | None = None


class Course(NamedTuple):
    """The functions that make a network's tensors, in order; by convolutions' places, what may be joined to each."""

    calls: Sequence[Callable[..., Any]] = ()
    joined: Mapping[int, Joined] = {}


def foldable(network: nn.Module, example: Tensor) -> Course:
    """Look at a forward pass: what is called, and what of it convolutions may do."""
    trace = _Trace(network)
    # As gradients are taken: some networks take another way without.
    x = example.detach().requires_grad_()
    with torch.enable_grad(), trace:
        out = network(x)
    joined = trace.joined(out)
    return Course(tuple(trace.calls), joined) if joined else Course()


def zeros_around(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Sides | None:
    """Sides of a call of `F.pad` that puts zeros around pictures, and cuts nothing off; None of any other."""
    plain = mode == "constant" and not value and x.ndim == 4 and len(pad) == 4
    return Sides(*pad) if plain and min(pad) >= 0 else None


class NormCall(NamedTuple):
    """What an evaluating BatchNorm is called with."""

    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def same(self, other: NormCall) -> bool:
        """Whether it is the very same tensors, and number."""
        return self.eps == other.eps and all(a is b for a, b in zip(self[:4], other[:4], strict=True))


def call_of(norm: BatchNorm, read: Callable[[Any], Any] = lambda tensor: tensor) -> NormCall:
    """What an evaluating BatchNorm calls `F.batch_norm` with; read: what stands for each of its tensors."""
    mean, var, weight, bias = map(read, (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return NormCall(mean, var, weight, bias, norm.eps)


def norm_call(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> NormCall | None:
    """Read `F.batch_norm`'s arguments; None where it normalizes by the batch itself."""
    return None if training else NormCall(mean, var, weight, bias, eps)


class _Trace(TorchFunctionMode):
    """Notes, of one forward pass, what goes from a convolution into a BatchNorm or a rectifier and nowhere else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        norms = [m for m in network.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
        self.owner = {id(norm.running_mean): norm for norm in norms}
        self.own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self.calls: list[Callable[..., Any]] = []
        self.kept: list[Tensor] = []
        self.uses: dict[_Value, int] = {}
        self.count = 0
        self.places: dict[_Value, int] = {}
        self.links: dict[int, list[tuple[_Value, str, Any]]] = {}
        self.made: set[int] = set()
        self.clipped: dict[int, tuple[Tensor, int]] = {}
        self.convolved: dict[_Value, tuple[int, Geometry]] = {}
        self.padded: dict[_Value, tuple[int, _Value]] = {}
        self.paddings = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [_value(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        result = func(*args, **kwargs)
        if func.__name__ in METADATA and not isinstance(result, Tensor):
            # Whoever looks at its size must find it padded.
            self.padded = {value: found for value, found in self.padded.items() if value not in read}
            return result
        self.calls.append(func)
        # Kept alive, so that an id names one tensor only.
        self.kept += [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # What gives no tensor may read all the same: an assignment to a slice does.
        for value in read:
            self.uses[value] = self.uses.get(value, 0) + 1
        if func in CONVOLUTIONS:
            self._convolution(func, args, kwargs, result)
        elif func is F.pad and zeros_around(*args, **kwargs) is not None:
            self.padded[_value(result)] = self.paddings, read[0]
            self.paddings += 1
        elif read and (place := self.places.get(read[0])) is not None:
            self._follow(place, func, args, kwargs, read[0], result)
        return result

    def _convolution(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        parameters = [one for one in (*args[1:3], kwargs.get("weight"), kwargs.get("bias")) if one is not None]
        if any(id(one) not in self.own for one in parameters):
            self.made.add(self.count)
        elif len(args) > 2:
            self.places[_value(result)] = self.count
            self.links[self.count] = []
            if func is torch.conv2d and (way := geometry(args[3:], kwargs)) is not None:
                self.convolved[_value(args[0])] = self.count, way
        self.count += 1

    def _follow(self, place: int, func: Any, args: tuple[Any, ...], kwargs: Any, source: _Value, result: Any) -> None:
        """A call reads what came from a convolution."""
        kinds = [kind for _, kind, _ in self.links[place]]
        if func is F.batch_norm:
            call = norm_call(*args, **kwargs)
            norm = self.owner.get(id(call.mean)) if call else None
            # A module may call it with other numbers than its own.
            if not kinds and call and norm is not None and call.same(call_of(norm)):
                self.links[place].append((source, "norm", norm))
                self.places[_value(result)] = place
        elif "clip" not in kinds and (clip := clip_of(func, args, kwargs)) is not None:
            self.links[place].append((source, "clip", clip))
            self.clipped[place] = result, result._version

    def joined(self, out: Any) -> dict[int, Joined]:
        """By convolutions' places, what may be joined to each; out: what the network gave."""
        returned = {_value(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}

        def once(value: _Value) -> bool:
            return self.uses[value] == 1 and value not in returned

        found = {place: Joined(made=True) for place in self.made}
        padded: dict[int, int] = {}
        for value, (number, source) in self.padded.items():
            place, way = self.convolved.get(value, (0, None))
            if way is not None and way.dilation == (1, 1) and once(value) and once(source):
                padded[place] = number
                self.convolved[source] = place, way
        for place, links in self.links.items():
            alone = takewhile(lambda link: once(link[0]), links)
            joined = Joined(padded=padded.get(place), **{kind: what for _, kind, what in alone})
            if joined.clip is not None:
                result, version = self.clipped[place]
                value = id(result), version
                # The gradient of a joined rectifier is read off its result, which must then be what it was.
                if result._version != version:
                    joined = joined._replace(clip=None)
                elif value in self.convolved and once(value):
                    joined = joined._replace(deferred=True)
            found[place] = joined
        return {place: one for place, one in found.items() if one != Joined()}


_Value = tuple[int, int]
"""A tensor at a time: its id, and how often it was written to by then."""


def _value(tensor: Tensor) -> _Value:
    return id(tensor), tensor._version
