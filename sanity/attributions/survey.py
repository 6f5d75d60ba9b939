"""One look at a network before a run: every call it makes is judged, and what nobody can see is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sanity.attributions.base import logits_of

Function = Callable[..., Any]
Judge = Callable[[Function, tuple[Any, ...], Any], str]
"""(function, its arguments, its keywords) -> why a method would get the call wrong, or ""."""

UNSEEN = "computed out of sight (scripted, or by an autograd function)"


def varying(values: Any) -> list[Tensor]:
    """Tensors among some values that depend on the picture: those with a gradient, parameters apart."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [t for t in tensors if not isinstance(t, nn.Parameter)]


class _Survey(TorchFunctionMode):
    """Notes, as `reason`, the first call that is judged wrong, or that uses what no call has given."""

    def __init__(self, network: nn.Module, judge: Judge) -> None:
        super().__init__()
        self.judge, self.reason = judge, ""
        self.seen: dict[int, Tensor] = {}
        self.within: list[str] = []
        self.handles = [handle for name, module in network.named_modules() for handle in self._follow(name, module)]

    def _follow(self, name: str, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def leave(*_: Any) -> None:
            self.within.pop()

        yield module.register_forward_pre_hook(lambda *_: self.within.append(name))
        yield module.register_forward_hook(leave)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        for handle in self.handles:
            handle.remove()

    def see(self, values: Any) -> None:
        """Know these tensors from now on, and keep them, so that no other takes their identity."""
        self.seen.update((id(tensor), tensor) for tensor in varying(values))

    def __torch_function__(self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = all(id(tensor) in self.seen for tensor in varying((args, kwargs)))
        wrong = self.judge(func, args, kwargs) if known else f"uses what was {UNSEEN}"
        output = func(*args, **kwargs)
        if varying(output) and wrong and not self.reason:
            where = f"layer {self.within[-1]!r}" if self.within and self.within[-1] else "it"
            self.reason = f"{where} {wrong}"
        self.see(output)
        return output


def survey(network: nn.Module, example: Tensor, judge: Judge) -> str:
    """Why `network(example)` would be explained wrongly, naming the layer, or "".

    Functions of torch are seen however they are called; scripted modules and autograd functions of one's
    own are not, and a network that uses what they give is found out.
    """
    x, look = example.detach().requires_grad_(), _Survey(network, judge)
    look.see(x)
    with torch.enable_grad(), look:
        logits = logits_of(network, x)
    if look.reason or id(logits) in look.seen:
        return look.reason
    return f"its logits were {UNSEEN}"
