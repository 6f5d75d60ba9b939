"""Run a network as if its parameters and buffers had other values, in one thread, while others run it as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

StandIns = Mapping[int, Tensor]
"""id of a parameter or buffer -> the tensor that is read instead."""

_NOW: ContextVar[StandIns] = ContextVar("stand_ins")
T = TypeVar("T")


def stand_ins(network: nn.Module, values: Mapping[str, Tensor]) -> StandIns:
    """What `substituted` takes, for parameters and buffers by name; good for as long as the network keeps them."""
    own = dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    return {id(own[name]): value for name, value in values.items()}


@contextmanager
def substituted(found: StandIns) -> Iterator[None]:
    """Let every `Substituting` network that this thread runs inside read the stand-ins."""
    token = _NOW.set(found)
    try:
        yield
    finally:
        _NOW.reset(token)


def instead(tensor: T) -> T | Tensor:
    """What this thread now reads instead of a tensor: mostly itself."""
    return _NOW.get({}).get(id(tensor), tensor)


class Substituting(nn.Module):
    """A network that reads, within `substituted`, the stand-ins of its parameters and buffers.

    Wherever they are arguments of a torch function, that is: not where a scripted module or an extension reads them.
    before() is called whenever the network is about to be run, and may raise.
    """

    def __init__(self, network: nn.Module, before: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.network, self.before = network, before

    def forward(self, x: Tensor) -> Any:
        """Whatever the network gives."""
        self.before()
        if not (found := _NOW.get({})):
            return self.network(x)
        with _Instead(found):
            return self.network(x)


class _Instead(TorchFunctionMode):
    """Hands every torch function called inside the stand-ins in place of the tensors they stand for."""

    def __init__(self, found: StandIns) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            return func(*map(self._read, args), **{name: self._read(value) for name, value in kwargs.items()})
        return func(*map(self._read, args))

    def _read(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.found.get(id(value), value)
        if isinstance(value, list):
            return [self._read(one) for one in value]
        # Named tuples are no arguments of torch functions.
        if type(value) is tuple:
            return tuple(self._read(one) for one in value)
        return value
