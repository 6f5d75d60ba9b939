"""Floating-point operations that a piece of work really executes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula


class Counter(TorchDispatchMode):
    """Floating-point operations of products and convolutions, forward and backward, run in this thread."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
def pointwise_flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: Any, out_shape: Any, **more: Any) -> int:
    """Of a convolution with what is joined to it; the backward pass takes it, too."""
    return int(conv_flop_count(list(x), list(weight), list(out_shape)))


def flops(work: Callable[[], object]) -> float:
    """Floating-point operations of products and convolutions that `work` makes in this thread."""
    with Counter() as counter:
        work()
    return float(counter.total)
