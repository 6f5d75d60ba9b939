"""The registry of attribution methods: a literal one can read; outside methods join by name or entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from sanity.attributions.base import FunctionMethod, GradientMethod, Inputs, Method, Option
from sanity.attributions.cam import GRADCAM, GUIDED_GRADCAM
from sanity.attributions.controls import CONTROLS, EDGES, RANDOM
from sanity.attributions.decomposition import DEEPLIFT, LRP_EPSILON
from sanity.attributions.gradients import (
    GRADIENT,
    GRADIENT_SHAP,
    GRADIENT_X_INPUT,
    INTEGRATED_GRADIENTS,
    INTEGRATED_GRADIENTS_NO_MULTIPLIER,
    INTEGRATED_GRADIENTS_SMOOTHGRAD,
    SMOOTHGRAD,
    SMOOTHGRAD_SQUARED,
    VARGRAD,
)
from sanity.attributions.occlusion import OCCLUSION, RISE
from sanity.attributions.perturbation import MEANINGFUL_PERTURBATION
from sanity.attributions.rectifiers import DECONVNET, GUIDED_BACKPROP, frozen
from sanity.registry import load_object, suggest
from sanity.streams import stream

__all__ = ["CONTROLS", "METHODS", "FunctionMethod", "GradientMethod", "Inputs", "Method", "find", "outside"]

ENTRY_POINTS = "sanity.methods"
Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""A method from outside: (model, images (N, C, H, W), targets (N,)) -> (N, C or 1, H, W)."""

METHODS: tuple[Method, ...] = (
    GRADIENT,
    SMOOTHGRAD,
    SMOOTHGRAD_SQUARED,
    VARGRAD,
    GRADIENT_X_INPUT,
    GUIDED_BACKPROP,
    DECONVNET,
    GRADCAM,
    GUIDED_GRADCAM,
    INTEGRATED_GRADIENTS,
    INTEGRATED_GRADIENTS_NO_MULTIPLIER,
    INTEGRATED_GRADIENTS_SMOOTHGRAD,
    GRADIENT_SHAP,
    LRP_EPSILON,
    DEEPLIFT,
    OCCLUSION,
    RISE,
    MEANINGFUL_PERTURBATION,
    EDGES,
    RANDOM,
)


def outside(name: str, explainer: Explainer) -> FunctionMethod:
    """Make a callable `(model, images, targets) -> (N, C or 1, H, W)` a method.

    If it draws from torch's global generator, it is called image by image under a seed of the image's own,
    so that its maps do not depend on batch-mates, and anew at every stage, so that a map that is chance alone
    does not pass for one that survives; the caller's generator is left as it was.
    """

    def call(network: nn.Module, inputs: Inputs) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            before = torch.get_rng_state()
            maps = explainer(network, inputs.pixels, inputs.targets)
            if torch.equal(before, torch.get_rng_state()):
                return maps
            return torch.cat([alone(network, inputs, n) for n in range(len(inputs.ids))])

    def alone(network: nn.Module, inputs: Inputs, n: int) -> Tensor:
        torch.manual_seed(stream(inputs.seed, inputs.ids[n], name, inputs.occasion).initial_seed())
        return explainer(network, inputs.pixels[n : n + 1], inputs.targets[n : n + 1])

    source = inspect.getmodule(explainer)
    origin = f"from {source.__name__ if source else 'outside'}"
    return FunctionMethod(name, origin, fresh=True, call=call, evaluations=lambda options: 1)


def registered() -> dict[str, Method]:
    """METHODS and those that installed packages add; a name given twice is refused with ValueError."""
    methods = {method.name: method for method in METHODS}
    for entry in _installed():
        if entry.name in methods:
            raise ValueError(f"method {entry.name!r} of {entry.value} is already registered")
        methods[entry.name] = _as_method(entry.name, load_object(entry.value))
    return methods


@cache
def _installed() -> tuple[EntryPoint, ...]:
    # Reads every installed package's metadata: a tenth of a second, and a plan's methods are looked up often.
    return tuple(entry_points(group=ENTRY_POINTS))


def _as_method(name: str, found: object) -> Method:
    if isinstance(found, Method):
        return found
    if not callable(found):
        raise ValueError(f"{name!r} is a {type(found).__name__}, not a callable (model, images, targets)")
    return outside(name, found)


def find(spec: str | Method | Explainer) -> Method:
    """`name`, `name:option=value,...`, `package.module:callable`, a Method or a callable -> the method.

    `frozen:name` and `frozen:name:option=value,...` are the method with activations frozen. Raises
    ValueError with the nearest names for an unknown one, and for an option the method lacks.
    """
    if not isinstance(spec, str):
        return _as_method(str(getattr(spec, "name", getattr(spec, "__qualname__", type(spec).__name__))), spec)
    name, _, rest = spec.partition(":")
    if name == "frozen" and rest:
        name, _, rest = rest.partition(":")
        return _with(frozen(find(name)), rest)
    methods = registered()
    if name in methods:
        return _with(methods[name], rest)
    if rest and "=" not in rest and ("." in name or find_spec(name)):
        return _as_method(spec, load_object(spec))
    raise ValueError(suggest("method", spec, methods))


def _with(method: Method, text: str) -> Method:
    return method.with_options(**_options(method, text)) if text else method


def _options(method: Method, text: str) -> dict[str, Option]:
    """Parse `option=value,...` into values of the options' own types."""
    changes: dict[str, Option] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        kind = type(method.options.get(key, ""))
        try:
            changes[key] = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(f"method {method.name!r}: {part!r} is not {key}=<{kind.__name__}>") from None
        if not equals:
            raise ValueError(f"method {method.name!r}: {part!r} must read option=value")
    return changes
