"""Backward rules that act on every rectifier a network really calls: module, functional, in place, clipped, reused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sanity.attributions.base import GradientMethod, Method, Option, Rule, Sees
from sanity.attributions.gradients import PIXELS, mean_gradient
from sanity.attributions.survey import Function, survey
from sanity.convolution import Clip

_RELUS = {
    torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_, F.relu6,
}  # fmt: skip
_CLIPS = {F.hardtanh, F.hardtanh_}
_CLAMPS = {
    torch.clamp, torch.clamp_, torch.clip, torch.clip_, torch.clamp_min, torch.clamp_min_,
    Tensor.clamp, Tensor.clamp_, Tensor.clip, Tensor.clip_, Tensor.clamp_min, Tensor.clamp_min_,
}  # fmt: skip
_THRESHOLDS = {F.threshold, torch.threshold, torch.threshold_}

Act = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""(z, rectify) -> what the network goes on with in place of rectify(z)."""


def of_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call's first argument is a tensor of floating-point numbers, and not of indices, say."""
    z = args[0] if args else kwargs.get("input")
    return isinstance(z, Tensor) and z.is_floating_point()


def is_rectifier(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call cuts its input off below 0: ReLU, ReLU6, hardtanh, clamp or threshold from 0."""

    def argument(place: int, *names: str, default: object = None) -> object:
        given = (kwargs[name] for name in names if name in kwargs)
        return args[place] if len(args) > place else next(given, default)

    if not of_numbers(args, kwargs):
        return False
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


def clip_of(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Clip | None:
    """What a ReLU, ReLU6 or hardtanh from 0 clips to; None for every other call."""
    if func not in _RELUS | _CLIPS or not is_rectifier(func, args, kwargs):
        return None
    if func is F.relu6:
        return Clip(0.0, 6.0)
    high = kwargs.get("max_val", args[2] if len(args) > 2 else 1.0) if func in _CLIPS else math.inf
    return Clip(0.0, float(high))


def replaced(func: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], act: Act, spare: bool = True) -> Tensor:
    """Call `act(z, rectify)` in place of an elementwise function; what that does in place is done in place.

    With spare, rectify(z) leaves z as it is; without, a function that acts in place does.
    """
    z, *rest = (kwargs["input"],) if "input" in kwargs else args
    others = {key: value for key, value in kwargs.items() if key != "input"}
    in_place = bool(kwargs.get("inplace")) or func.__name__.endswith("_")
    # Hooks on a view that was written to see only what goes on through that view.
    aside = in_place and (spare or z._is_view())
    output = act(z, lambda t: func(t.clone() if aside else t, *rest, **others))
    # A network may go on with its argument, or with what that is a view of, and ignore the answer.
    return z.copy_(output) if aside else output


class Rectifying(TorchFunctionMode):
    """Puts `act` in the place of every rectifier the network runs, and counts them.

    A TorchFunctionMode sees the call itself, so it also reaches networks whose rectifiers are functions
    (torchvision's Inception v3) or one module used many times (EfficientNet-Lite), where hooks on
    `nn.ReLU` see nothing or the last use only.
    """

    def __init__(self, act: Act = lambda z, rectify: rectify(z), spare: bool = False) -> None:
        super().__init__()
        self.act, self.spare, self.count = act, spare, 0

    def __torch_function__(self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_rectifier(func, args, kwargs):
            return func(*args, **kwargs)
        self.count += 1
        return replaced(func, args, kwargs, self.act, self.spare)


def count_rectifiers(network: nn.Module, example: Tensor) -> int:
    """Rectifiers that `network(example)` runs."""
    seen = Rectifying()
    with torch.no_grad(), seen:
        network(example)
    return seen.count


def needs_rectifiers(network: nn.Module, example: Tensor, options: Mapping[str, Option]) -> str:
    """Why a method that changes the rectifiers' backward pass does not suit a network, or ""."""
    if not count_rectifiers(network, example):
        return "it runs no rectifier (ReLU, ReLU6, hardtanh, clamp), so it would be the plain gradient"
    # A rectifier that cannot be seen would keep its own backward pass.
    return survey(network, example, lambda func, args, kwargs: "")


class _Ruled(torch.autograd.Function):
    """A value whose gradient goes back to z by a rule of one's own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Callable[[], Tensor], rule: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.rule = rule
        return value()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rule(gradients[0]), None, None


def ruled(z: Tensor, value: Callable[[], Tensor], rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`value()`, through which a gradient goes back to z as rule(gradient)."""
    output: Tensor = _Ruled.apply(z, value, rule)
    return output


# --- guided backprop and deconvolution


def _guide(z: Tensor, rectify: Callable[[Tensor], Tensor]) -> Tensor:
    # The rectifier's own backward gates by its output; what remains is to drop negative gradients first.
    output = rectify(z)
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.clamp(min=0))  # type: ignore[no-untyped-call]
    return output


def _deconvolve(z: Tensor, rectify: Callable[[Tensor], Tensor]) -> Tensor:
    return ruled(z, lambda: rectify(z), lambda gradient: gradient.clamp(min=0))


GUIDED = Rule("guided", lambda network, points, images: Rectifying(_guide), replayable=True)
DECONVOLUTION = Rule(
    "deconvolution", lambda network, points, images: Rectifying(_deconvolve, spare=True), replayable=True
)

GUIDED_BACKPROP = GradientMethod(
    "guided_backprop",
    "Springenberg et al. 2015",
    points=lambda options: PIXELS,
    combine=mean_gradient,
    under=lambda options: GUIDED,
    unsuited=needs_rectifiers,
)
DECONVNET = GradientMethod(
    "deconvnet",
    "Zeiler and Fergus 2014",
    points=lambda options: PIXELS,
    combine=mean_gradient,
    under=lambda options: DECONVOLUTION,
    unsuited=needs_rectifiers,
)


# --- activation freezing


def threshold(outputs: Tensor, p: float) -> Tensor:
    """Percentile p of each image's positive outputs: (N, ...) -> (N, 1, ...).

    As numpy.percentile has it, but never quite at an output, where rounding would decide which side that is
    on. -inf where no output lies below it: for p = 0, and for fewer than two positive outputs.
    """
    return torch.stack([_threshold(one, p) for one in outputs]).view(-1, *[1] * (outputs.ndim - 1))


def _threshold(outputs: Tensor, p: float) -> Tensor:
    positive = outputs[outputs > 0]
    place = max(len(positive) - 1, 0) * p / 100
    below = math.ceil(place)
    if not below:
        return outputs.new_tensor(-math.inf)
    largest = positive.topk(len(positive) - below + 1, sorted=False).values
    lower, upper = largest.topk(2, largest=False).values.sort().values
    return torch.lerp(lower, upper, min(place - below + 1, 0.999))


class Freezing(Rectifying):
    """Makes each rectifier a constant below its threshold.

    A layer's threshold is the p-th percentile of its own positive outputs at the image, and each unit's
    constant is its own output at the image. With mask "point" a unit is constant wherever its output lies
    below the threshold; with "image", wherever its output at the image does.
    """

    def __init__(self, network: nn.Module, images: Tensor, p: float, mask: str) -> None:
        super().__init__(self.freeze, spare=True)
        self.by_image = mask == "image"
        self.layers: list[tuple[Tensor, Tensor]] = []
        # Points of one image stand together, and one run serves them all.
        _, self.owners = torch.unique_consecutive(images.flatten(1), dim=0, return_inverse=True)
        first = torch.searchsorted(self.owners, torch.arange(int(self.owners[-1]) + 1, device=images.device))

        def keep(z: Tensor, rectify: Callable[[Tensor], Tensor]) -> Tensor:
            output = rectify(z)
            self.layers.append((threshold(output, p), output.clone()))
            return output

        with torch.no_grad(), Rectifying(keep):
            network(images[first])
        if not self.layers:
            raise ValueError("the network runs no rectifier that could be frozen")

    def freeze(self, z: Tensor, rectify: Callable[[Tensor], Tensor]) -> Tensor:
        """What a rectifier gives: its output where that is live, the constant elsewhere."""
        layer, value = (found[self.owners] for found in self.layers[(self.count - 1) % len(self.layers)])
        output = rectify(z)
        if output.shape != value.shape:
            raise ValueError(
                f"rectifier {self.count} gave {tuple(value.shape)} at the image and {tuple(output.shape)} "
                "elsewhere: a network whose path depends on its input cannot be frozen"
            )
        return torch.where((value if self.by_image else output) >= layer, output, value)


def _frozen(rule: Rule, p: float, mask: str) -> Rule:
    if not 0 <= p <= 100:
        raise ValueError(f"a percentile lies in [0, 100]: got p={p}")
    if mask not in ("point", "image"):
        raise ValueError(f"mask must be point or image, not {mask!r}")

    @contextmanager
    def context(network: nn.Module, points: Tensor, images: Tensor) -> Iterator[None]:
        freezing = Freezing(network, images, p, mask)
        with ExitStack() as stack:
            # The mode entered last is asked first: gates go around the rule, differences are of what is frozen.
            if rule.finite:
                stack.enter_context(freezing)
            stack.enter_context(rule.context(network, points, images))
            if not rule.finite:
                stack.enter_context(freezing)
            yield
        if freezing.count % len(freezing.layers):
            raise ValueError(
                f"{len(freezing.layers)} rectifiers at the image, {freezing.count} elsewhere: a network whose "
                "path depends on its input cannot be frozen"
            )

    sees = Sees.LAYERS if rule.sees is Sees.LAYERS else Sees.RECTIFIERS
    return Rule(f"{rule.name}, frozen p={p} mask={mask}", context, rule.finite, sees)


def frozen(method: Method) -> GradientMethod:
    """Return a method that combines gradients, on the network as it is frozen for each image.

    Its options are the method's and p, the percentile (80); mask, "point" or "image": see `Freezing`. At
    the image itself both are the same, the network's output is unchanged, and p = 0 freezes nothing.
    Where slopes are taken between image and baseline (DeepLIFT) the mask is the image's unless said
    otherwise: by the point's, a baseline below all thresholds has the image's own outputs, and nothing is
    left to explain. Raises ValueError for a method of another kind. [Hara, JSAI]
    """
    if not isinstance(method, GradientMethod):
        raise ValueError(f"frozen:{method.name}: only methods that combine gradients can be frozen")
    if "mask" in method.options:
        raise ValueError(f"{method.name!r} is frozen already")

    def unsuited(network: nn.Module, example: Tensor, options: Mapping[str, Option]) -> str:
        return needs_rectifiers(network, example, options) or method.unsuited(network, example, options)

    return replace(
        method,
        name=f"frozen:{method.name}",
        source=f"activation freezing, Hara; {method.source}",
        options={**method.options, "p": 80.0, "mask": "image" if method.rule.finite else "point"},
        under=lambda options: _frozen(method.under(options), float(options["p"]), str(options["mask"])),
        unsuited=unsuited,
    )
