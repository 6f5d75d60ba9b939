"""What an attribution method is: where to take gradients and how to combine them, or a plain function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from torch import Tensor, nn

Option = bool | int | float | str


@dataclass(frozen=True)
class Inputs:
    """A batch to be explained.

    pixels (N, C, H, W) as the network takes them; targets (N,) int64, the explained classes; ids, one a
    picture, naming its random streams; seed of those streams; occasion, what is being evaluated (order,
    seed, stage), for the control that must draw anew each time.
    """

    pixels: Tensor
    targets: Tensor
    ids: tuple[str, ...]
    seed: int = 0
    occasion: str = ""

    def __post_init__(self) -> None:
        sizes = (len(self.pixels), len(self.targets), len(self.ids))
        if len(set(sizes)) != 1:
            raise ValueError(f"pixels, targets and ids differ in number: {sizes}")


class Point(Protocol):
    """A place to take the gradient at; equal points (hashable values) are evaluated once for all methods."""

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """One image (C, H, W) -> the point (C, H, W)."""


@dataclass(frozen=True)
class Method:
    """An entry of the registry.

    name; source, the paper; deterministic: draws nothing at random; options: its numbers by name, to be
    overridden with `with_options`; unsuited(network, example (1, C, H, W), options): why the method would
    not be itself on this network, or ""; fresh: draws anew at every occasion, so that what a stage shows of it
    must be measured against a second draw with the trained network.
    """

    name: str
    source: str
    deterministic: bool = True
    options: Mapping[str, Option] = field(default_factory=dict, hash=False)
    unsuited: Callable[[nn.Module, Tensor, Mapping[str, Option]], str] = lambda network, example, options: ""
    fresh: bool = False

    @property
    def cost(self) -> int:
        """Network evaluations, forward and backward, an image."""
        raise TypeError(f"{type(self).__name__} must say what it costs")

    def with_options(self, **changes: Option) -> Method:
        """Return the same method with other numbers. Raises ValueError for an option it does not have."""
        unknown = sorted(set(changes) - set(self.options))
        if unknown:
            raise ValueError(f"method {self.name!r} has no option {unknown[0]!r}; it has {sorted(self.options)}")
        return replace(self, options={**self.options, **changes})


Context = Callable[[nn.Module, Tensor, Tensor], AbstractContextManager[object]]


class Sees(Enum):
    """How much of a network a rule looks at; what it does not see may be run in any other way."""

    LOGITS = "logits"
    RECTIFIERS = "rectifiers"
    LAYERS = "layers"


@dataclass(frozen=True)
class Rule:
    """How the backward pass is taken.

    context(network, points, images), both (N, C, H, W), gives the context in which the network is then run
    forward once, at `points`; images are the pictures that the points belong to. name tells rules apart:
    methods whose rules have one name share evaluations. finite: the rule looks at differences of a
    rectifier's outputs, not at its derivative. sees: what must be called as the network calls it: a BatchNorm
    may be folded into a convolution only where layers are not seen. replayable: it acts on each call by itself, so
    that calls it saw before need not be made again.
    """

    name: str
    context: Context = lambda network, points, images: nullcontext()
    finite: bool = False
    sees: Sees = Sees.RECTIFIERS
    replayable: bool = False


PLAIN = Rule("plain", sees=Sees.LOGITS, replayable=True)


@dataclass(frozen=True)
class Moments:
    """What came back from a method's points: (N, C, H, W) float64 mean, and mean of squares where asked for."""

    mean: Tensor
    mean_square: Tensor | None


@dataclass(frozen=True)
class GradientMethod(Method):
    """A method that combines gradients of the explained logit: points, a rule, a combination.

    points(options) are evaluated under the rule of `under(options)`; each gradient is multiplied by
    `weigh(point, pixels, id, seed)` where given; combine(inputs, moments) makes the attribution
    (N, C, H, W) of the results; spread: it needs the mean of squares, too.
    """

    points: Callable[[Mapping[str, Option]], tuple[Point, ...]] = field(kw_only=True)
    combine: Callable[[Inputs, Moments], Tensor] = field(kw_only=True)
    weigh: Callable[[Point, Tensor, str, int], Tensor] | None = None
    under: Callable[[Mapping[str, Option]], Rule] = lambda options: PLAIN
    spread: bool = False

    def __post_init__(self) -> None:
        # Numbers that make no sense are refused where they are given, not in the middle of a run.
        self.points(self.options)
        self.under(self.options)

    @property
    def rule(self) -> Rule:
        """How the backward pass is taken, with these options."""
        return self.under(self.options)

    @property
    def cost(self) -> int:
        """Network evaluations, forward and backward, an image."""
        return len(self.points(self.options))


@dataclass(frozen=True)
class FunctionMethod(Method):
    """A method that is not a combination of gradients: `call(network, inputs, **options) -> (N, C or 1, H, W)`.

    sees: what it looks at; a network that need only give the same logits may be run in any other way.
    """

    call: Callable[..., Tensor] = field(kw_only=True)
    evaluations: Callable[[Mapping[str, Option]], int] = field(kw_only=True)
    sees: Sees = Sees.LAYERS

    def __post_init__(self) -> None:
        self.evaluations(self.options)

    def __call__(self, network: nn.Module, inputs: Inputs) -> Tensor:
        """Attributions of one batch, (N, C or 1, H, W)."""
        return self.call(network, inputs, **self.options)

    @property
    def cost(self) -> int:
        """Network evaluations, forward and backward, an image."""
        return self.evaluations(self.options)


def logits_of(network: nn.Module, pixels: Tensor) -> Tensor:
    """Run a classifier: (N, C, H, W) -> (N, classes). Raises ValueError if it answers anything else."""
    out = network(pixels)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(pixels):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(out).__name__
        raise ValueError(f"the network must give (N, classes) logits for {len(pixels)} images, not {shape}")
    return logits if logits.dtype == pixels.dtype else logits.to(pixels.dtype)


def explained(network: nn.Module, pixels: Tensor, targets: Tensor) -> Tensor:
    """Logit of each image's explained class: (N, C, H, W), (N,) -> (N,)."""
    return logits_of(network, pixels).gather(1, targets.to(pixels.device)[:, None])[:, 0]
