from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import captum.attr
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.attributions.rectifiers import count_rectifiers
from sanity.engine import Engine
from sanity.randomization import guarded
from sanity.run import refuse_unsuited
from tests.conftest import Awkward, seeded

TARGETS = torch.tensor([2, 0, 3])


def explain(network: nn.Module, pixels: Tensor, *specs: str) -> list[Tensor]:
    methods = [attributions.find(spec) for spec in specs]
    inputs = Inputs(pixels, TARGETS[: len(pixels)], ("a", "b", "c")[: len(pixels)])
    with guarded(network):
        return list(Engine(methods, 8).explain(network, inputs).values())


class Twice(nn.Module):
    """Convolution, rectifier, convolution, rectifier, sum: the rectifier in any form, or its negation's."""

    def __init__(self, rectify: Callable[[Tensor], Tensor], again: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(11)
        self.first, self.second = (
            nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64)) for shape in ((6, 3 * 9), (4, 6))
        )
        self.rectify, self.again = rectify, again or rectify

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3)
        hidden = self.rectify(self.first @ patches)
        return self.again(self.second @ hidden).sum(2)


def ignoring(rectify: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """In place, its answer thrown away: what was rectified is the argument."""

    def call(x: Tensor) -> Tensor:
        rectify(x)
        return x

    return call


def through_a_view(x: Tensor) -> Tensor:
    """Rectified in place through a view, then used itself."""
    x = x.clone()
    x[:, :].relu_()
    return x


class Scripted(nn.Module):
    """A rectifier that is no function torch calls by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (x > 0)


PLAIN_RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "in-place module": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu in place, positional": lambda x: F.relu(x, True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu by keyword": lambda x: torch.relu(input=x),
    "torch.relu_": torch.relu_,
    "x.relu": Tensor.relu,
    "x.relu_, answer ignored": ignoring(Tensor.relu_),
    "through a view": through_a_view,
    "clamp": lambda x: x.clamp(min=0),
    "clamp_": lambda x: x.clamp_(0),
    "torch.clamp": lambda x: torch.clamp(x, min=0.0),
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: x.clip(0),
    "threshold": nn.Threshold(0, 0),
    "hardtanh": nn.Hardtanh(0, 1e9),
}
CLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU6": nn.ReLU6(),
    "in-place ReLU6": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "clamp": lambda x: x.clamp(0, 6),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky": nn.LeakyReLU(),
    "gelu": F.gelu,
    "hardtanh from -1": nn.Hardtanh(),
    "clamp from -1": lambda x: x.clamp(min=-1),
    "clamp from above": lambda x: x.clamp(max=0),
    "threshold at 1": nn.Threshold(1, 0),
    "sigmoid": torch.sigmoid,
}


def by_hand(network: Twice, pixels: Tensor, top: float, back: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Backward pass written out: `back(gradient, gate)` at each rectifier that cuts at 0 and at `top`."""
    low = network.first @ F.unfold(pixels, 3)
    high = network.second @ low.clamp(0, top)
    gate = [((z > 0) & (z < top)).double() for z in (low, high)]
    chosen = F.one_hot(TARGETS, 4).double()[:, :, None].expand_as(high)
    at_low = network.second.T @ back(chosen, gate[1])
    return F.fold(network.first.T @ back(at_low, gate[0]), pixels.shape[2:], 3)


def guided(gradient: Tensor, gate: Tensor) -> Tensor:
    return gradient.clamp(min=0) * gate


@pytest.mark.parametrize("name", PLAIN_RELUS)
def test_guided_backprop_is_its_rule_at_every_form_of_rectifier(pictures: Tensor, name: str) -> None:
    network = Twice(PLAIN_RELUS[name])
    found, gradient = explain(network, pictures, "guided_backprop", "gradient")
    assert_close(found, by_hand(network, pictures, 1e9, guided), rtol=1e-11, atol=1e-12)
    assert_close(gradient, by_hand(network, pictures, 1e9, torch.mul), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(found, gradient)


def deconvolved(gradient: Tensor, gate: Tensor) -> Tensor:
    return gradient.clamp(min=0)


@pytest.mark.parametrize("name", PLAIN_RELUS)
def test_deconvnet_is_its_rule_at_every_form_of_rectifier(pictures: Tensor, name: str) -> None:
    network = Twice(PLAIN_RELUS[name])
    found, gradient = explain(network, pictures, "deconvnet", "gradient")
    assert_close(found, by_hand(network, pictures, 1e9, deconvolved), rtol=1e-11, atol=1e-12)
    assert not torch.allclose(found, gradient)


@pytest.mark.parametrize("name", CLIPS)
def test_both_are_their_rules_at_clipped_rectifiers(pictures: Tensor, name: str) -> None:
    network = Twice(CLIPS[name])
    for method, rule in (("guided_backprop", guided), ("deconvnet", deconvolved)):
        (found,) = explain(network, pictures, method)
        assert_close(found, by_hand(network, pictures, 6, rule), rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_both_equal_captums_where_captum_sees_the_rectifiers(pictures: Tensor) -> None:
    network = Twice(nn.ReLU(), nn.ReLU())
    for name, theirs in (("guided_backprop", captum.attr.GuidedBackprop), ("deconvnet", captum.attr.Deconvolution)):
        want = theirs(network).attribute(pictures.clone().requires_grad_(), target=TARGETS)
        assert_close(explain(network, pictures, name)[0], want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_cut_off_at_zero_is_no_rectifier(pictures: Tensor, name: str) -> None:
    assert count_rectifiers(Twice(OTHERS[name]), pictures) == 0


def test_every_use_of_a_rectifier_counts(awkward: nn.Module, pictures: Tensor) -> None:
    assert count_rectifiers(awkward, pictures) == 5
    assert count_rectifiers(Twice(nn.ReLU()), pictures) == 2
    assert count_rectifiers(Twice(Scripted()), pictures) == 0


class Own(torch.autograd.Function):
    """A rectifier of one's own, with its own backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z > 0)
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet", "frozen:gradient"])
def test_a_rectifier_beyond_sight_is_refused_even_beside_others(pictures: Tensor, method: str) -> None:
    words = f"method '{method}' does not suit this network: it uses what was computed out of sight"
    with pytest.raises(ValueError, match=words):
        refuse_unsuited([attributions.find(method)], Twice(Own.apply, F.relu), pictures[:1])
    refuse_unsuited([attributions.find(method)], Twice(F.relu), pictures[:1])


def lite0() -> nn.Module:
    return models.load("efficientnet_lite0").network


def inception() -> nn.Module:
    """Inception v3 whose weights are random but keep the activations' scale."""
    network = models.load("inception_v3", "random").network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    return network


REAL = {"efficientnet_lite0": (lite0, 33, 64), "inception_v3": (inception, 94, 75)}


def photo(size: int) -> Tensor:
    """A smooth picture: (1, 3, size, size) float64 in [-1, 1]."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet"])
@pytest.mark.parametrize("name", REAL)
def test_neither_is_the_gradient_on_networks_that_hooks_miss(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, rectifiers, size = REAL[name]
    network, pixels = make().double().eval(), photo(size)
    found, gradient = explain(network, pixels, method, "gradient")
    assert count_rectifiers(network, pixels) == rectifiers
    assert (found - gradient).norm() > 0.5 * gradient.norm() > 0
    patched_relus(monkeypatch, gated=method == "guided_backprop")
    (want,) = explain(network, pixels, "gradient")
    assert_close(found, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))


def patched_relus(monkeypatch: pytest.MonkeyPatch, gated: bool) -> None:
    """The independent answer: functional rectifiers replaced by ones with a backward pass of their own."""

    class Ruled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor, top: float) -> Tensor:
            ctx.save_for_backward((z > 0) & (z < top))
            return z.clamp(0, top)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient.clamp(min=0) * (ctx.saved_tensors[0] if gated else 1), None

    monkeypatch.setattr(F, "relu", lambda x, inplace=False: Ruled.apply(x, torch.inf))
    monkeypatch.setattr(F, "hardtanh", lambda x, low, high, inplace=False: Ruled.apply(x, high))


def test_both_differ_from_the_gradient_of_the_trained_inception(shared: Path) -> None:
    weights = shared / "inception_v3_chess" / "inception_v3_chess.pth"
    network = models.load("inception_v3", str(weights)).network.double().eval()
    *found, gradient = explain(network, photo(75), "guided_backprop", "deconvnet", "gradient")
    for one in found:
        assert (one - gradient).norm() > 0.5 * gradient.norm() > 0


def test_the_rule_ends_with_the_backward_pass(pictures: Tensor) -> None:
    network = seeded(Awkward)
    before, _, after = explain(network, pictures, "gradient", "guided_backprop", "gradient_x_input")
    assert torch.equal(before * pictures, after)
    assert_close(explain(network, pictures, "gradient")[0], before, rtol=0, atol=0)
