"""Backward rules that act on every rectifier a network really calls: module, functional, in place, clipped, reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sanity.attributions.base import GradientMethod, Rule
from sanity.attributions.gradients import PIXELS, mean_gradient

_RELUS = {
    torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_, F.relu6,
}  # fmt: skip
_CLIPS = {F.hardtanh, F.hardtanh_}
_CLAMPS = {
    torch.clamp, torch.clamp_, torch.clip, torch.clip_, torch.clamp_min, torch.clamp_min_,
    Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_, Tensor.clamp_min, Tensor.clamp_min_,
}  # fmt: skip
_THRESHOLDS = {F.threshold, torch.threshold, torch.threshold_}


def is_rectifier(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call cuts its input off below 0: ReLU, ReLU6, hardtanh, clamp or threshold from 0."""

    def argument(place: int, *names: str, default: object = None) -> object:
        given = (kwargs[name] for name in names if name in kwargs)
        return args[place] if len(args) > place else next(given, default)

    if func in _RELUS:
        return True
    if func in _CLIPS:
        return argument(1, "min_val", default=-1.0) == 0
    if func in _CLAMPS:
        lower = argument(1, "min")
        return isinstance(lower, int | float) and lower == 0
    if func in _THRESHOLDS:
        return argument(1, "threshold") == 0 and argument(2, "value") == 0
    return False


class Rectifying(TorchFunctionMode):
    """Calls `act(output)` for every rectifier the network runs, and counts them.

    A TorchFunctionMode sees the call itself, so it also reaches networks whose rectifiers are functions
    (torchvision's Inception v3) or one module used many times (EfficientNet-Lite), where hooks on
    `nn.ReLU` see nothing or the last use only.
    """

    def __init__(self, act: Callable[[Tensor], None] = lambda output: None) -> None:
        super().__init__()
        self.act = act
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if is_rectifier(func, args, kwargs):
            self.count += 1
            self.act(output)
        return output


def _guide(output: Tensor) -> None:
    # The rectifier's own backward gates by its output; what remains is to drop negative gradients first.
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]


GUIDED = Rule("guided", lambda: Rectifying(_guide))


def count_rectifiers(network: nn.Module, example: Tensor) -> int:
    """Rectifiers that `network(example)` runs."""
    seen = Rectifying()
    with torch.no_grad(), seen:
        network(example)
    return seen.count


GUIDED_BACKPROP = GradientMethod(
    "guided_backprop",
    "Springenberg et al. 2015",
    points=lambda options: PIXELS,
    combine=mean_gradient,
    rule=GUIDED,
    needs="rectifiers",
)
