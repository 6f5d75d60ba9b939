"""Run a network again with some of its weights changed, without repeating what comes before them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]

_DETERMINISTIC = {torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye, torch.tensor}
"""Functions that make a tensor of none, always the same one."""


_METADATA = {
    "__get__", "dim", "ndimension", "size", "numel", "nelement", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "element_size", "get_device", "__len__",
}  # fmt: skip
"""Functions that read what a tensor looks like and not what is in it; __get__ stands for all attributes."""
_PLAIN = (int, float, str, torch.dtype, torch.device, torch.memory_format)


class CannotReuseError(Exception):
    """What was kept of the forward pass may no longer stand for it: run the network as a whole."""


class _Call(NamedTuple):
    """One call of a torch function: arguments, flat; address and version that each tensor then had; the result."""

    func: Function
    leaves: Sequence[Any]
    states: Sequence[tuple[int, int] | None]
    result: Any


class _Watching(TorchFunctionMode, ABC):
    """Hands every torch function called inside to `call`, with its arguments flat, but for questions of looks."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        if func.__name__ in _METADATA and not isinstance(known := run(), Tensor):
            return known
        return self.call(func, _flat(args, kwargs), run)

    @abstractmethod
    def call(self, func: Function, leaves: Sequence[Any], run: Callable[[], Any]) -> Any:
        """What the network gets for a call of func, which `run` makes."""


class Recording(_Watching):
    """Keeps the result, with its graph, of every torch function called inside.

    shares: of the calls kept, how many each later pass could reuse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self.made: set[int] = set()
        self.shares: list[float] = []

    def call(self, func: Function, leaves: Sequence[Any], run: Callable[[], Any]) -> Any:
        """Run it, and keep the result if it is made of tensors."""
        with torch._C.DisableTorchFunction():
            states = [_state(leaf) for leaf in leaves]
        result = run()
        made = [leaf for leaf in _flat((result,)) if isinstance(leaf, Tensor)]
        if made and (any(states) or func in _DETERMINISTIC):
            self.calls.append(_Call(func, leaves, states, result))
            # The calls keep these alive, so an id names one tensor only.
            self.made.update(id(leaf) for leaf in made)
        return result


class Replaying(_Watching):
    """Answers from a recording every call whose arguments are what they were then; runs all others.

    Arguments are the same where they are the very same tensors in the same memory, so a call is answered only if
    nothing before it has changed: no parameter, and no result. A network may take another way than when it was
    recorded; from there on its calls are run. reused counts the calls answered. CannotReuseError is raised, and the
    recording is of no more use, where a call that must be run reads, or writes to, a kept tensor that the
    recorded pass wrote to in place.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.place = 0
        self.reused = 0

    def call(self, func: Function, leaves: Sequence[Any], run: Callable[[], Any]) -> Any:
        """The recorded result, or that of running it now."""
        calls, place = self.recording.calls, self.place
        call = calls[place] if place < len(calls) and calls[place].func is func else None
        with torch._C.DisableTorchFunction():
            if call is not None and _same(call, leaves):
                self.place, self.reused = place + 1, self.reused + 1
                return call.result
            kept = self._kept(call, leaves)
        result = run()
        if call is not None:
            self.place += 1
        with torch._C.DisableTorchFunction():
            if any(leaf._version != version for leaf, version in kept):
                raise CannotReuseError
        return result

    def _kept(self, call: _Call | None, leaves: Sequence[Any]) -> list[tuple[Tensor, int]]:
        """Tensors of the recording that a call is about to read, with their versions."""
        found = []
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) in self.recording.made:
                known = call is not None and index < len(call.leaves) and call.leaves[index] is leaf
                state = call.states[index] if known and call is not None else None
                if leaf._version != (state[1] if state else 0):
                    raise CannotReuseError
                found.append((leaf, leaf._version))
        return found


def _flat(args: Iterable[Any], kwargs: dict[str, Any] | None = None) -> list[Any]:
    """Arguments without their lists, tuples and slices; keywords beside their values."""
    found: list[Any] = []
    for value in args:
        if isinstance(value, tuple | list):
            found += _flat(value)
        elif isinstance(value, dict):
            found += _flat((), value)
        elif isinstance(value, slice):
            found += _flat((value.start, value.stop, value.step))
        else:
            found.append(value)
    for name in kwargs or ():
        found.append(name)
        found += _flat(((kwargs or {})[name],))
    return found


def _state(leaf: Any) -> tuple[int, int] | None:
    """Where a tensor's memory lies and how often it was written to; None for what is no tensor."""
    return (leaf.data_ptr(), leaf._version) if isinstance(leaf, Tensor) else None


def _same(call: _Call, leaves: Sequence[Any]) -> bool:
    if len(leaves) != len(call.leaves):
        return False
    for leaf, then, state in zip(leaves, call.leaves, call.states, strict=True):
        if state is None:
            if leaf is not then and (type(leaf) is not type(then) or not isinstance(leaf, _PLAIN) or leaf != then):
                return False
        elif leaf is not then or leaf.data_ptr() != state[0]:
            return False
    return True
