"""Reuse of what comes before the first change: the same numbers as without, wherever it is on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.attributions.base import PLAIN, Sees
from sanity.engine import Answer, Engine, State, predict
from sanity.lanes import Lanes
from sanity.microbatch import Batch, gradients
from sanity.randomization import Draws, Walk, guarded, randomized, reinitialiser
from sanity.reuse import CannotReuseError, Pass
from sanity.stages import derived, grouped
from tests.conftest import Awkward, seeded

METHODS = ("gradient", "smoothgrad:samples=2", "vargrad:samples=2", "integrated_gradients:samples=3", "edges")
RULES = ("guided_backprop", "deconvnet", "frozen:gradient", "deeplift", "lrp_epsilon")


def grid(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "awkward": (Awkward, 17),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None, num_classes=7), 48),
    "inception_v3": (lambda: models.MODELS[1].build(7), 80),
    "efficientnet_lite0": (lambda: models.MODELS[0].build(7), 48),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(weights=None, num_classes=7), 48),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8, num_classes=7), 48),
    "googlenet": (lambda: torchvision.models.GoogLeNet(7, aux_logits=False, init_weights=False), 64),
    "vision_transformer": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=7), 16),
}


def swept(
    network: nn.Module, x: Tensor, names: tuple[str, ...], order: str, reuse: bool, batch_size: int = 3
) -> tuple[list[Answer], Engine]:
    """What an engine says in all steps of an order."""
    inputs = Inputs(x, torch.tensor([2, 1]), ("a", "b"), seed=5)
    engine = Engine([attributions.find(name) for name in names], batch_size, reuse=reuse)
    stages = derived(network, x[:1])
    stages = grouped(stages, min(4, len(stages)))
    with guarded(network), randomized(network, stages, order, 3, Draws(reinitialiser("variance_scaling"))) as walk:
        states = [State(lambda index=index: walk.enter(index), inputs) for index in range(len(walk))]
        answers = engine.sweep(network, states, lambda: walk.enter(0))
        for answer, state in zip(answers, states, strict=True):
            state.enter()
            assert answer.logits is not None
            assert_close(answer.logits, predict(network, x, 2), rtol=1e-9, atol=1e-11)
    return answers, engine


def made(name: str) -> nn.Module:
    build, _ = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build().double().eval()
    # torchvision's transformer starts with a head of zeros, whose maps are all zero.
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter.data, 0, 0.1, generator=torch.Generator().manual_seed(1))
    return network


ORDERS = [(name, "cascading") for name in NETWORKS]
ORDERS += [(name, "bottom_up") for name in ("awkward", "resnet18", "inception_v3", "vision_transformer")]
ORDERS += [("awkward", "independent"), ("efficientnet_lite0", "independent")]


@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_maps_are_the_same_as_without_reuse(name: str, order: str) -> None:
    network, x = made(name), grid(NETWORKS[name][1])
    names = METHODS if name == "awkward" else ("gradient", "smoothgrad:samples=1")
    names += ("guided_backprop",) * (name != "vision_transformer")
    with_reuse, _ = swept(network, x, names, order, True)
    without, _ = swept(network, x, names, order, False)
    for found, wanted in zip(with_reuse, without, strict=True):
        for method, want in wanted.maps.items():
            assert_close(found.maps[method], want, rtol=1e-9, atol=1e-11 * float(want.abs().max()))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_the_same_with_and_without(rule: str) -> None:
    network, x = seeded(Awkward), grid(17)
    with_reuse, _ = swept(network, x, ("gradient", rule), "cascading", True)
    without, _ = swept(network, x, ("gradient", rule), "cascading", False)
    for found, wanted in zip(with_reuse, without, strict=True):
        for method, want in wanted.maps.items():
            assert_close(found.maps[method], want, rtol=1e-10, atol=1e-13)


class Three(nn.Module):
    """Three convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))


def passes(network: nn.Module, walk: Walk, x: Tensor, run: nn.Module | None = None) -> list[Pass]:
    """One after the other, of every step of a walk."""
    points, found = x.clone().requires_grad_(), list[Pass]()
    for index in range(len(walk)):
        walk.enter(index)
        found.append(Pass(found[-1] if found else None))
        gradients(run or network, points, x, torch.tensor([2, 1]), PLAIN, found[-1], True)
    return found


def test_only_what_lies_above_the_lowest_change_is_run() -> None:
    network, x = seeded(Three), grid(9)

    def reused(order: str) -> list[int]:
        with guarded(network), randomized(network, stages, order, 0, Draws(reinitialiser("normal:1"))) as walk:
            found = passes(network, walk, x)
        assert all(len(one.calls) == 6 for one in found)
        return [one.reused for one in found]

    stages = derived(network, x[:1], "layer")
    assert [stage.name for stage in stages] == ["c", "b", "a"]
    # Calls: convolution, rectifier, convolution, rectifier, convolution, mean.
    assert reused("cascading") == [0, 4, 2, 0]
    assert reused("independent") == [0, 4, 2, 0]
    # What is random below is the same in the next step.
    assert reused("bottom_up") == [0, 0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["inception_v3", "efficientnet_lite0", "resnet18", "densenet", "vision_transformer"])
def test_real_networks_are_really_reused(name: str, dtype: torch.dtype) -> None:
    network, x = made(name), grid(NETWORKS[name][1]).to(dtype)
    with guarded(network, dtype=dtype):
        stages = derived(network, x[:1])
    draws = Draws(reinitialiser("normal:1"))
    with guarded(network, dtype=dtype), randomized(network, stages, "cascading", 0, draws) as walk:
        engine = Engine([], 2)
        folded = engine._fast(network, Inputs(x, torch.tensor([0, 0]), ("a", "b")))[Sees.LOGITS]
        cascade = [one.share for one in passes(network, walk, x, folded)]
    with guarded(network, dtype=dtype), randomized(network, stages, "bottom_up", 0, draws) as walk:
        upwards = [one.share for one in passes(network, walk, x, folded)]
    assert cascade[0] == upwards[0] == 0
    assert min(cascade[1], upwards[-1]) > 0.6
    assert max(cascade[-1], upwards[1]) < 0.4


class AddsInPlace(nn.Module):
    """Adds what is random to a kept tensor, in place; another branch reads it before it is rectified in place."""

    def __init__(self, harm: str) -> None:
        super().__init__()
        self.low, self.high, self.side = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.harm = harm

    def forward(self, x: Tensor) -> Tensor:
        y = self.low(x) * 1.0
        if self.harm == "write":
            y += self.high(y * 2.0)
            return self.side(y).mean((2, 3))
        # Neither product nor sum keeps what it reads for its gradient, so that it may be written to afterwards.
        shift = self.high(x).mean()
        other = y * 1.0 + shift if self.harm == "none" else y + shift
        y += 1.0
        return (self.side(y) * other).mean((2, 3))


@pytest.mark.parametrize("harm", ["write", "read", "none"])
def test_a_network_that_writes_to_what_was_kept_is_run_as_a_whole(harm: str) -> None:
    network, x = seeded(lambda: AddsInPlace(harm)), grid(9)
    for order in ("cascading", "independent"):
        with_reuse, _ = swept(network, x, ("gradient",), order, True)
        without, _ = swept(network, x, ("gradient",), order, False)
        for found, wanted in zip(with_reuse, without, strict=True):
            assert_close(found.maps["gradient"], wanted.maps["gradient"], rtol=1e-12, atol=1e-14)


class Writes(nn.Module):
    """From the second state on, or always where that is through `data`, something writes to what was kept."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 1)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        y = self.low(x) * 1.0
        changed = self.high.bias is not None and not bool(self.high.bias.any())
        if self.way == "result":
            out = y.mean((2, 3)).square()
            return out.add_(5.0) if changed else out
        if self.way == "data":
            high = self.high(y).mean((2, 3)).square()
            y.data.mul_(3.0)
            return high + y.mean((2, 3))
        if changed:
            with torch._C.DisableTorchFunction():
                y.narrow(1, 0, 2).mul_(3.0)
        return y.sum((2, 3)).square()


@pytest.mark.parametrize("way", ["result", "data", "unseen"])
def test_what_is_written_to_what_was_kept_reaches_no_other_state(way: str) -> None:
    network, x = seeded(lambda: Writes(way)), grid(9)
    inputs = Inputs(x, torch.tensor([2, 1]), ("a", "b"))
    engines = [Engine([attributions.find("gradient")], 2, reuse=reuse) for reuse in (True, False)]
    bias = network.high.bias
    values = [bias.detach().clone(), bias.detach() * 0]
    with guarded(network):
        states = [State(partial(setattr, bias, "data", value), inputs) for value in values]
        fast, slow = (engine.sweep(network, states, states[0].enter) for engine in engines)
    for found, wanted in zip(fast, slow, strict=True):
        assert_close(found.maps["gradient"], wanted.maps["gradient"], rtol=1e-12, atol=1e-14)
        assert found.logits is not None
        assert_close(found.logits, wanted.logits, rtol=1e-12, atol=1e-14)


def test_what_cannot_be_reused_begins_a_new_chain() -> None:
    # A residual network adds to kept tensors in place: one state in three is run as a whole, the others are not.
    network, x = made("resnet18"), grid(48)
    inputs = Inputs(x, torch.tensor([2, 1]), ("a", "b"))
    draws = Draws(reinitialiser("variance_scaling"))
    stages = derived(network, x[:1], "layer")
    shares: list[float] = []

    def told(evaluations: int) -> None:
        shares.append(sweeping[-1].share)

    sweeping: list[Batch] = []
    engine = Engine([attributions.find("gradient")], 2, told)

    def take(*args: Any) -> Batch:
        sweeping.append(Engine.take(engine, *args))
        return sweeping[-1]

    with guarded(network), randomized(network, stages, "cascading", 3, draws) as walk:
        states = [State(partial(walk.enter, index), inputs) for index in range(len(walk))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "take", take)
            engine.sweep(network, states, partial(walk.enter, 0))
    assert len(shares) == len(states)
    assert len([share for share in shares if share > 0]) > 0.7 * len(shares)


def test_getters_do_not_end_reuse() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((x.flatten(1)[:, :9] @ self.a.weight.T).relu())

    network, x = seeded(Turned), grid(9)
    with guarded(network):
        points, first, targets = x.clone().requires_grad_(), Pass(), torch.tensor([2, 1])
        gradients(network, points, x, targets, PLAIN, first, True)
        again = Pass(first)
        gradients(network, points, x, targets, PLAIN, again)
    assert again.share == 1


@pytest.mark.parametrize("harm", ["write", "read"])
def test_such_a_network_is_noticed(harm: str) -> None:
    network, x = seeded(lambda: AddsInPlace(harm)), grid(9)
    with guarded(network):
        points, first, targets = x.clone().requires_grad_(), Pass(), torch.tensor([2, 1])
        gradients(network, points, x, targets, PLAIN, first, True)
        network.high.weight.data = network.high.weight.data * 2
        with pytest.raises(CannotReuseError):
            gradients(network, points, x, targets, PLAIN, Pass(first))


def test_a_network_whose_way_depends_on_what_it_sees_is_right() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            if y.mean() > 0:
                y = F.relu(y) * 3
            return self.c(y + self.a(x)).mean((2, 3))

    network, x = seeded(Fickle), grid(9)
    for order in ("cascading", "independent", "bottom_up"):
        with_reuse, _ = swept(network, x, ("gradient",), order, True, 2)
        without, _ = swept(network, x, ("gradient",), order, False, 2)
        for found, wanted in zip(with_reuse, without, strict=True):
            assert_close(found.maps["gradient"], wanted.maps["gradient"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "order"), [*ORDERS[:5], ("awkward", "bottom_up"), ("efficientnet_lite0", "bottom_up")]
)
def test_all_fast_paths_together_cost_no_accuracy_in_float32(name: str, order: str) -> None:
    # Folding, reuse, joined rectifiers and lanes at once, against float64 without any: as far from it as float32
    # without any is, or nearer. Both are rounding, so neither is exactly the other's; three times is far from a fault.
    network, x = made(name), grid(NETWORKS[name][1])
    methods = [attributions.find(one) for one in ("gradient", "integrated_gradients:samples=3")]
    stages = grouped(derived(network, x[:1]), 4)

    def maps(dtype: torch.dtype, fast: bool) -> Tensor:
        inputs = Inputs(x.to(dtype), torch.tensor([2, 1]), ("a", "b"), seed=5)
        draws = Draws(reinitialiser("variance_scaling"))
        with (
            closing(Lanes(2 if fast else 1)) as lanes,
            guarded(network, dtype=dtype),
            randomized(network, stages, order, 3, draws) as walk,
        ):
            engine = Engine(methods, 3, fold=fast, reuse=fast, lanes=lanes)
            states = [State(partial(walk.enter, n), inputs, walk.values(n)) for n in range(len(walk))]
            found = engine.sweep(network, states, partial(walk.enter, 0))
        return torch.stack([answer.maps[method.name].double() for answer in found for method in methods])

    exact, slow, fast = maps(torch.float64, False), maps(torch.float32, False), maps(torch.float32, True)
    errors = [(one - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1) for one in (slow, fast)]
    plain, ours = (float(error.square().mean().sqrt()) for error in errors)
    assert not slow.equal(fast)
    assert 0 < ours < 3 * plain, (ours, plain)
