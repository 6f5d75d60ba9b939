"""Run a network with every BatchNorm folded into the convolution before it: fewer passes over activations."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
BatchNorm = nn.modules.batchnorm._NormBase

CACHE_BYTES = 2**30
"""Folded weights are kept, of trained and of random parameters, up to this much memory."""


class _Trace(TorchFunctionMode):
    """Notes, of one forward pass, which convolution's result goes into a BatchNorm and nowhere else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        norms = [m for m in network.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
        self.owner = {id(norm.running_mean): norm for norm in norms}
        self.kept: list[Tensor] = []
        self.uses: dict[int, int] = {}
        self.count = 0
        self.convolutions: dict[int, int] = {}
        self.followed: dict[int, tuple[int, nn.Module]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.__name__ == "__get__" or not made:
            return result
        # Kept alive, so that an id names one tensor only.
        self.kept += made
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.uses[id(leaf)] = self.uses.get(id(leaf), 0) + 1
        if func in _CONVOLUTIONS:
            self.convolutions[id(result)] = self.count if len(args) > 2 else -1
            self.count += 1
        if func is F.batch_norm and len(args) > 1 and not _training(args, kwargs or {}):
            norm, source = self.owner.get(id(args[1])), id(args[0])
            if norm is not None and self.convolutions.get(source, -1) >= 0:
                self.followed[source] = (self.convolutions[source], norm)
        return result


def _training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[5] if len(args) > 5 else kwargs.get("training", False))


def foldable(network: nn.Module, example: Tensor) -> dict[int, nn.Module]:
    """Convolution calls, by their place in the forward pass, whose results only a BatchNorm reads -> that norm."""
    trace = _Trace(network)
    with torch.no_grad(), trace:
        out = network(example)
    returned = {id(leaf) for leaf in tree_leaves(out)}
    alone = (source for source in trace.followed if trace.uses[source] == 1 and source not in returned)
    return dict(trace.followed[source] for source in alone)


class _Fold(TorchFunctionMode):
    """One forward pass: convolutions take their norm's scale and shift, and those norms do nothing."""

    def __init__(self, norms: dict[int, nn.Module], weights: _Weights) -> None:
        super().__init__()
        self.norms, self.weights = norms, weights
        self.count = 0
        self.pending: set[int] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and id(args[0]) in self.pending:
            self.pending.remove(id(args[0]))
            return args[0]
        if func not in _CONVOLUTIONS:
            return func(*args, **kwargs)
        place, self.count = self.count, self.count + 1
        if place not in self.norms:
            return func(*args, **kwargs)
        x, weight, bias, *rest = args
        out = func(x, *self.weights.of(weight, bias, self.norms[place]), *rest, **kwargs)
        self.pending.add(id(out))
        return out


class _Weights:
    """Folded weights and biases, kept as long as what they were made of is still the same memory, unwritten."""

    def __init__(self) -> None:
        self._kept: dict[tuple[tuple[int, int] | None, ...], tuple[list[Tensor | None], tuple[Tensor, Tensor]]] = {}
        self._bytes = 0
        self._lock = Lock()

    def of(self, weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """Weight and bias of the folded convolution, the very same tensors whenever the sources are."""
        # One thread folds: another would make tensors of its own, and what was kept of them could not be reused.
        with self._lock, torch._C.DisableTorchFunction():
            names = ("running_mean", "running_var", "weight", "bias")
            sources = [weight, bias, *(getattr(norm, name) for name in names)]
            key = tuple(None if one is None else (one.data_ptr(), one._version) for one in sources)
            if key not in self._kept:
                with torch.no_grad():
                    made = folded(weight, bias, norm)
                self._bytes += made[0].numel() * made[0].element_size()
                if self._bytes > CACHE_BYTES:
                    self._kept, self._bytes = {}, 0
                # Aliases of the sources keep their memory from being given to other tensors.
                self._kept[key] = ([None if one is None else one.detach() for one in sources], made)
            return self._kept[key][1]


def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals a convolution and the evaluating BatchNorm after it."""
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = (var + float(norm.eps)).rsqrt()  # type: ignore[arg-type]
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if norm.affine:
        gamma, beta = norm.get_parameter("weight"), norm.get_parameter("bias")
        scale, shift = scale * gamma, shift * gamma + beta
    wide = weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.ndim - 1))
    return wide.to(weight.dtype), shift.to(weight.dtype)


class Folded(nn.Module):
    """A network that computes the same with its BatchNorms folded, whatever its parameters are at the time.

    norms as `foldable` finds them; folded weights are made on first use and kept for as long as the parameters
    they were made of have not changed. Rectifiers, and whatever else the network calls, are untouched. A
    forward pass that takes another way than when `foldable` looked is run again unfolded, from then on.
    """

    def __init__(self, network: nn.Module, norms: dict[int, nn.Module]) -> None:
        super().__init__()
        self.network, self.norms = network, norms
        self.weights = _Weights()

    def forward(self, x: Tensor) -> Any:
        """Whatever the network gives."""
        fold = _Fold(self.norms, self.weights)
        with fold:
            out = self.network(x)
        if fold.pending:
            self.norms = {}
            return self.network(x)
        return out
