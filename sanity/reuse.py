"""Run a network again with some of its weights changed, without repeating what comes before them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Function = Callable[..., Any]

_DETERMINISTIC = {torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye, torch.tensor}
"""Functions that make a tensor of none, always the same one."""


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
METADATA = {
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


class Pass(TorchFunctionMode):
    """One forward pass, which keeps the result, with its graph, of every torch function called inside for the next one.

    Every call whose arguments are what they were in the pass before is answered from there; all others are run.
    Arguments are the same where they are the very same tensors in the same memory, so a call is answered only if
    nothing before it has changed: no parameter, and no result. A network may take another way than in the pass
    before; from there on its calls are run. reused counts the calls answered. CannotReuseError is raised where a call
    that must be run reads, or writes to, a kept tensor that the pass before wrote to in place; where anything else has
    written to a kept tensor, at the end; and where a network asks for a kept tensor's `data`, which can be written to
    unnoticed.
    """

    def __init__(self, before: Pass | None = None) -> None:
        super().__init__()
        self.before = before
        self.calls: list[_Call] = []
        self.made: dict[int, Tensor] = {}
        self.place = 0
        self.reused = 0
        self._versions: list[tuple[Tensor, int]] = []

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = partial(func, *args, **(kwargs or {}))
        if func.__name__ in METADATA and not isinstance(known := run(), Tensor):
            return known
        return self._call(func, _flat(args, kwargs), run)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        before, self.before = self.before, None
        with torch._C.DisableTorchFunction():
            if raised[0] is None and before and any(kept._version != version for kept, version in before._versions):
                raise CannotReuseError
            # What only the pass before had computed can be given free.
            self._versions = [(tensor, tensor._version) for tensor in self.made.values()]

    @property
    def share(self) -> float:
        """Of the calls kept, how many the pass before answered."""
        return self.reused / max(1, len(self.calls))

    def _call(self, func: Function, leaves: Sequence[Any], run: Callable[[], Any]) -> Any:
        """The result that the pass before had, or that of running it now."""
        with torch._C.DisableTorchFunction():
            if self.before is not None and func == _DATA and id(leaves[0]) in self.before.made:
                raise CannotReuseError
            call = self._then(func)
            if call is not None and _same(call, leaves):
                self._keep(call)
                self.reused += 1
                return call.result
            kept = self._kept(call, leaves)
            states = [_state(leaf) for leaf in leaves]
        result = run()
        with torch._C.DisableTorchFunction():
            if any(leaf._version != version for leaf, version in kept):
                raise CannotReuseError
        if any(states) or func in _DETERMINISTIC:
            self._keep(_Call(func, leaves, states, result))
        return result

    def _then(self, func: Function) -> _Call | None:
        """What the pass before called at this place, if it is the same function; the place is then passed."""
        calls = self.before.calls if self.before is not None else []
        # Getters of attributes are made anew whenever they are asked for: equal, but not the same.
        if self.place < len(calls) and calls[self.place].func == func:
            self.place += 1
            return calls[self.place - 1]
        return None

    def _keep(self, call: _Call) -> None:
        """Keep a call for the pass after this one, if it made tensors."""
        if made := {id(leaf): leaf for leaf in _flat((call.result,)) if isinstance(leaf, Tensor)}:
            self.calls.append(call)
            # Kept alive, so an id names one tensor only.
            self.made |= made

    def _kept(self, call: _Call | None, leaves: Sequence[Any]) -> list[tuple[Tensor, int]]:
        """Tensors of the pass before that a call is about to read, with their versions."""
        found: list[tuple[Tensor, int]] = []
        made = {} if self.before is None else self.before.made
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) in made:
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
