"""Replace trained parameters by random ones, stage by stage, in place, and put them back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sanity.registry import suggest
from sanity.stages import NORMS, Stage
from sanity.streams import stream

ORDERS = {
    "cascading": "from the logits down, every stage reached stays random",
    "independent": "each stage alone, all others trained",
    "bottom_up": "from the input up, every stage reached stays random [Binder et al. 2023]",
    "data": "one step: the same network trained on permuted labels (--against FILE)",
}

Draw = Callable[[nn.Module, str, Tensor, torch.Generator], Tensor]
"""(owning module, parameter's own name, trained value on the CPU, generator) -> new value, same shape.

Drawn in float32, so that a network has the same random weights in every precision, to rounding."""


@dataclass(frozen=True)
class Visit:
    """The network as it stands now: index, the stage just reached, every stage that is random.

    Index 0 is the trained network, the control, its stage named "trained". unchanged names the parameters
    of random stages whose new values equal the trained ones bit for bit (a bias that was already 0): what
    was not really randomized is counted.
    """

    index: int
    stage: Stage
    random: tuple[Stage, ...]
    unchanged: tuple[str, ...]


BATCHNORMS = nn.modules.batchnorm._NormBase
TRAINED = Stage("trained", ())
PERMUTED = "permuted labels"
REDRAWN_BYTES = 2**28
"""What each step draws for itself is kept, for other orders and chunks of images, up to this much memory."""
STATISTICS = ("running_mean", "running_var")


def steps(stages: Sequence[Stage], order: str) -> list[tuple[Stage, tuple[Stage, ...]]]:
    """For each step of an order: the stage reached and all the stages that are random then; first, none."""
    if order not in ORDERS:
        raise ValueError(suggest("order", order, ORDERS))
    if order == "data":
        statistics = (f"{norm}.{own}" for stage in stages for norm in stage.norms for own in STATISTICS)
        whole = Stage(PERMUTED, (*(name for stage in stages for name in stage.parameters), *statistics))
        return [(TRAINED, ()), (whole, (whole,))]
    way = list(reversed(stages)) if order == "bottom_up" else list(stages)
    alone = order == "independent"
    return [
        (TRAINED, ()),
        *((stage, (stage,) if alone else tuple(way[: i + 1])) for i, stage in enumerate(way)),
    ]


# --- where new values come from


def _fan_in(owner: nn.Module, value: Tensor) -> int:
    """Elements of a weight that one output sums over."""
    if isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return value.numel() // (value.shape[1] * owner.groups)
    return max(1, value.numel() // value.shape[0])


def _variance_scaling(owner: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    if value.ndim < 2:
        return torch.full_like(value, float(name == "weight" and isinstance(owner, NORMS)))
    s = (2.6 / _fan_in(owner, value)) ** 0.5
    return nn.init.trunc_normal_(torch.empty(value.shape), 0.0, s, -2 * s, 2 * s, generator=generator)


def _permute(owner: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    return value.flatten()[torch.randperm(value.numel(), generator=generator)].view_as(value)


def _module(owner: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    reset = getattr(owner, "reset_parameters", None) or getattr(owner, "_reset_parameters", None)
    if reset is None:
        raise ValueError(f"{type(owner).__name__} has no reset_parameters; use another re-initialiser")
    with _Swap(owner) as swap, torch.random.fork_rng(devices=[]), torch.no_grad():
        for own, tensor in swap.trained.items():
            swap.put(own, tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True))
        torch.manual_seed(generator.initial_seed())
        reset()
        return owner.get_parameter(name).data


def _normal(sigma: float) -> Draw:
    return lambda owner, name, value, g: torch.empty(value.shape).normal_(0.0, sigma, generator=g)


def _uniform(low: float, high: float) -> Draw:
    return lambda owner, name, value, g: torch.empty(value.shape).uniform_(low, high, generator=g)


REINITIALISERS = {
    "variance_scaling": "truncated normal, s = sqrt(2.6 / fan_in) cut at 2 s; norm scales 1, biases 0 "
    "[code released with Adebayo et al. 2018]",
    "normal:SIGMA": "N(0, SIGMA^2) for every parameter [normal:0.01 in Adebayo et al. 2018]",
    "uniform:A:B": "U[A, B] for every parameter",
    "permute": "each tensor's own values, shuffled",
    "module": "each module's own reset_parameters",
}


def reinitialiser(text: str) -> Draw:
    """Parse an entry of REINITIALISERS, such as `normal:0.01`. Raises ValueError in one line."""
    kind, *words = text.split(":")
    spec = next((key for key in REINITIALISERS if key.split(":")[0] == kind), None)
    if spec is None:
        raise ValueError(suggest("re-initialiser", text, REINITIALISERS))
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    finite = all(abs(number) < float("inf") for number in numbers)
    if len(numbers) != spec.count(":") or not finite:
        raise ValueError(f"re-initialiser {text!r} must read {spec}, with finite numbers")
    if (kind == "normal" and numbers[0] <= 0) or (kind == "uniform" and numbers[0] >= numbers[1]):
        raise ValueError(f"re-initialiser {text!r}: needs SIGMA > 0 and A < B")
    if kind == "normal":
        return _normal(*numbers)
    if kind == "uniform":
        return _uniform(*numbers)
    return {"variance_scaling": _variance_scaling, "permute": _permute, "module": _module}[kind]


class Draws:
    """Random values of parameters, kept for the current seed so that orders and image chunks share them.

    Nested (default): a parameter has one random value a seed, in every stage and order. With redraw, each
    step of a cascade draws all of its parameters anew, as the code released with Adebayo et al. 2018 does;
    of these, the first that fit into REDRAWN_BYTES are kept.
    """

    def __init__(self, draw: Draw, redraw: bool = False) -> None:
        self.draw, self.redraw = draw, redraw
        self._seed: int | None = None
        self._kept: dict[tuple[str, ...], Tensor] = {}

    def of(self, network: nn.Module, name: str, trained: Tensor, seed: int, step: str) -> Tensor:
        """Return the new value of one parameter, on its device and of its dtype."""
        if seed != self._seed:
            self._seed, self._kept = seed, {}
        key = (step, name) if self.redraw else (name,)
        found = self._kept.get(key)
        if found is None:
            found = self._drawn(network, name, trained, seed, *key[:-1])
            if not self.redraw or sum(one.nbytes for one in (found, *self._kept.values())) <= REDRAWN_BYTES:
                self._kept[key] = found
        return found

    def _drawn(self, network: nn.Module, name: str, trained: Tensor, *key: object) -> Tensor:
        path, _, own = name.rpartition(".")
        try:
            drawn = self.draw(network.get_submodule(path), own, trained.cpu(), stream(*key, name))
        except ValueError as error:
            raise ValueError(f"cannot re-initialise {name}: {error}") from None
        return torch.empty_like(trained).copy_(drawn)


class Other:
    """Values of another training of the same network, in the place of random ones: the data randomization test.

    Raises ValueError, naming the parameter, where the other network has none of that name and shape.
    """

    def __init__(self, state: Mapping[str, Tensor], origin: str) -> None:
        self.state, self.origin = state, origin

    def of(self, network: nn.Module, name: str, trained: Tensor, seed: int, step: str) -> Tensor:
        """Return the other network's value of one parameter, on this one's device and of its dtype."""
        value = self.state.get(name)
        if value is None or value.shape != trained.shape:
            found = "none" if value is None else f"one of shape {tuple(value.shape)}"
            raise ValueError(f"{self.origin} is not for this network: for {name} {tuple(trained.shape)} it has {found}")
        return value.to(trained)


# --- the network, changed in place


class _Swap:
    """Points a network's tensors at other storage; on exit every tensor has its own storage again.

    Trained storage is never written, so the network is restored bit for bit whatever happened inside.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.trained = {name: p.data for name, p in network.named_parameters()}
        self.trained |= dict(network.named_buffers())
        self._strange: set[str] = set()

    def __enter__(self) -> _Swap:
        return self

    def __exit__(self, *raised: object) -> None:
        for name, tensor in self.trained.items():
            self.put(name, tensor)

    def restore(self) -> None:
        """Take back all that was put."""
        for name in self._strange:
            self._point(name, self.trained[name])
        self._strange = set()

    def put(self, name: str, tensor: Tensor) -> None:
        """Let one parameter or buffer have this tensor as its data."""
        self._strange.add(name)
        self._point(name, tensor)

    def _point(self, name: str, tensor: Tensor) -> None:
        path, _, own = name.rpartition(".")
        owner = self.network.get_submodule(path)
        parameter = owner._parameters.get(own)
        if parameter is None:
            owner._buffers[own] = tensor
        else:
            parameter.data = tensor


def _fresh_statistics(trained: Mapping[str, Tensor], norms: Sequence[str]) -> dict[str, Tensor]:
    """Running statistics as a BatchNorm starts with, by name."""
    fresh = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    names = {f"{norm}.{own}" if norm else own: value for norm in norms for own, value in fresh.items()}
    return {name: torch.full_like(trained[name], value) for name, value in names.items() if name in trained}


def _narrowing(dtype: torch.dtype) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def cast(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    return cast


def _widening(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) else output


@contextmanager
def guarded(
    network: nn.Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, on `device` in `dtype`; outside everything is as it was.

    In bfloat16 the network still takes and gives float32, and BatchNorms keep their float32 values: what eight
    bits cost is then the products' and sums' alone. Buffers are worked on as copies, so an explainer that runs
    BatchNorm in training mode leaves no trace.
    """
    training = {module: module.training for module in network.modules()}
    wanted = {parameter: (parameter.requires_grad, parameter.grad) for parameter in network.parameters()}
    half = dtype in (torch.bfloat16, torch.float16)
    hooks = []
    with _Swap(network) as swap:
        try:
            network.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            buffers = dict(network.named_buffers())
            for name, tensor in swap.trained.items():
                exact = half and isinstance(network.get_submodule(name.rpartition(".")[0]), BATCHNORMS)
                kind = dtype if tensor.is_floating_point() and not exact else None
                swap.put(name, tensor.to(device=device, dtype=kind, copy=name in buffers))
            if half and dtype is not None:
                hooks += [
                    network.register_forward_pre_hook(_narrowing(dtype)),
                    network.register_forward_hook(_widening),
                ]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, flag in training.items():
                module.training = flag
            for parameter, (required, gradient) in wanted.items():
                parameter.requires_grad_(required)
                parameter.grad = gradient


class Walk:
    """A network on its way through the steps of an order: iterate, or enter any step at any time.

    During a visit the network itself holds the random values of `visit.random` and the trained values
    everywhere else; BatchNorm's running statistics stay trained unless reset_statistics.
    """

    def __init__(
        self,
        swap: _Swap,
        planned: Sequence[tuple[Stage, tuple[Stage, ...]]],
        draw: Callable[[str, Tensor, str], Tensor],
        reset_statistics: bool,
    ) -> None:
        self._swap, self._planned, self._draw, self._reset = swap, planned, draw, reset_statistics
        self._kept: dict[int, tuple[Visit, dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return len(self._planned)

    def __iter__(self) -> Iterator[Visit]:
        for index in range(len(self)):
            yield self.enter(index)
            self.forget()

    def enter(self, index: int) -> Visit:
        """Put the network as it stands at a step; the step's values are kept until `forget`."""
        self.values(index)
        visit = self._kept[index][0]
        self._swap.restore()
        for name, value in self.values(index).items():
            self._swap.put(name, value)
        return visit

    def values(self, index: int) -> Mapping[str, Tensor]:
        """By name, the parameters and buffers that differ at a step from the trained network's; kept until `forget`."""
        if index not in self._kept:
            self._kept[index] = self._prepared(index)
        return self._kept[index][1]

    def forget(self) -> None:
        """Give the values of all steps free, as far as nobody else keeps them."""
        self._kept = {}

    def _prepared(self, index: int) -> tuple[Visit, dict[str, Tensor]]:
        stage, random = self._planned[index]
        trained, names = self._swap.trained, [name for one in random for name in one.parameters]
        # Re-initialisers may look at the network: they see it trained.
        self._swap.restore()
        values = {name: self._draw(name, trained[name], stage.name) for name in names}
        unchanged = tuple(name for name in names if torch.equal(values[name], trained[name]))
        if self._reset:
            values |= _fresh_statistics(trained, [norm for one in random for norm in one.norms])
        return Visit(index, stage, random, unchanged), values


@contextmanager
def randomized(
    network: nn.Module,
    stages: Sequence[Stage],
    order: str,
    seed: int,
    draws: Draws | Other,
    reset_statistics: bool = False,
) -> Iterator[Walk]:
    """Take a network through an order; the context gives its `Walk`.

    On leaving, by whatever way, parameters and buffers have their own storage back; no trained value is ever
    written to.
    """
    with _Swap(network) as swap:

        def draw(name: str, trained: Tensor, step: str) -> Tensor:
            return draws.of(network, name, trained, seed, step)

        yield Walk(swap, steps(stages, order), draw, reset_statistics)
