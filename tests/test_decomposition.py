"""LRP and DeepLIFT against captum, zennit and rules written out; where captum is wrong, against the axioms."""

from __future__ import annotations

import types
from collections.abc import Callable

import captum.attr
import pytest
import torch
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models import resnet18
from zennit import rules as zennit_rules
from zennit import types as zennit_types
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite
from zennit.layer import Sum

from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.engine import Engine
from sanity.randomization import guarded
from sanity.run import refuse_unsuited

TARGETS = torch.tensor([2, 0, 3])
captum_warns = pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")


def explain(network: nn.Module, pixels: Tensor, spec: str, batch_size: int = 8) -> Tensor:
    method = attributions.find(spec)
    inputs = Inputs(pixels, TARGETS[: len(pixels)], ("a", "b", "c")[: len(pixels)])
    with guarded(network):
        refuse_unsuited([method], network, pixels[:1])
        return Engine([method], batch_size).explain(network, inputs)[method.name]


def seeded(network: nn.Module, seed: int = 1) -> nn.Module:
    """Weights that keep the scale, biases and BatchNorms that are not trivial, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.3)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.double().eval()


def rise(network: nn.Module, pixels: Tensor) -> Tensor:
    """How much higher each explained logit is at the image than at the baseline."""
    with torch.no_grad():
        found = network(pixels) - network(torch.zeros_like(pixels))
    return found[torch.arange(len(pixels)), TARGETS[: len(pixels)]]


def photo(size: int) -> Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 2 - 1


class Twice(nn.Module):
    """Weights, activation, weights, activation, sum over places: the activation in any form."""

    def __init__(self, activate: Callable[[Tensor], Tensor], bias: float = 0.4) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(11)
        shapes = ((6, 3 * 9), (6,), (4, 6), (4,))
        self.w1, self.b1, self.w2, self.b2 = (
            nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64)) for shape in shapes
        )
        self.activate, self.bias = activate, bias

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What goes into and comes out of each activation, (N, channels, places), none of it in place."""
        z1 = F.linear(F.unfold(x, 3).mT, self.w1, self.bias * self.b1)
        a1 = self.activate(z1.clone())
        z2 = F.linear(a1, self.w2, self.bias * self.b2)
        return z1.mT, a1.mT, z2.mT, self.activate(z2.clone()).mT

    def forward(self, x: Tensor) -> Tensor:
        low = self.activate(F.linear(F.unfold(x, 3).mT, self.w1, self.bias * self.b1))
        return self.activate(F.linear(low, self.w2, self.bias * self.b2)).sum(1)


RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "module, reused": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "ReLU6": nn.ReLU6(),
    "in-place ReLU6": nn.ReLU6(inplace=True),
    "clamp": lambda x: x.clamp(0, 4),
    "leaky, in place": nn.LeakyReLU(0.2, inplace=True),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu in place": nn.SiLU(inplace=True),
}
ACTIVATIONS = {
    **RECTIFIERS,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "hardtanh": nn.Hardtanh(),
    "square": torch.square,
}


def stable(z: Tensor, epsilon: float) -> Tensor:
    return z + torch.where(z < 0, -epsilon, epsilon)


# --- LRP


@pytest.mark.parametrize("name", RECTIFIERS)
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_lrp_is_the_epsilon_rule_written_out(pictures: Tensor, name: str, epsilon: float) -> None:
    network = Twice(RECTIFIERS[name])
    patches = F.unfold(pictures, 3)
    z1, a1, z2, a2 = network.layers(pictures)
    logits = a2.sum(2, keepdim=True)
    relevance = F.one_hot(TARGETS, 4).double()[:, :, None] * logits
    relevance = a2 * relevance / stable(logits, epsilon)
    relevance = a1 * (network.w2.T @ (relevance / stable(z2, epsilon)))
    relevance = patches * (network.w1.T @ (relevance / stable(z1, epsilon)))
    want = F.fold(relevance, pictures.shape[2:], 3).detach()
    assert_close(explain(network, pictures, f"lrp_epsilon:epsilon={epsilon}"), want, rtol=1e-9, atol=1e-11)


def test_lrp_conserves_relevance_where_there_are_no_biases(pictures: Tensor) -> None:
    network = Twice(nn.ReLU6(), bias=0)
    found = explain(network, pictures, "lrp_epsilon:epsilon=1e-12").sum((1, 2, 3))
    assert_close(found, network(pictures)[torch.arange(3), TARGETS].detach(), rtol=1e-8, atol=1e-9)


def test_without_epsilon_lrp_is_gradient_x_input_on_rectifiers_alone(pictures: Tensor) -> None:
    """The identity of Ancona et al. 2018, which clipped rectifiers break."""
    for activate, same in ((F.relu, True), (nn.ReLU6(), False)):
        found = explain(Twice(activate), pictures, "lrp_epsilon:epsilon=1e-13")
        product = explain(Twice(activate), pictures, "gradient_x_input")
        assert torch.allclose(found, product, rtol=1e-6, atol=1e-8) == same


def plain_chain() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()]
    return seeded(nn.Sequential(*layers, nn.Linear(8 * 3 * 3, 5), nn.ReLU(), nn.Linear(5, 4)))


@pytest.mark.parametrize("epsilon", [1e-6, 0.3])
def test_lrp_equals_zennits(pictures: Tensor, epsilon: float) -> None:
    network, x = plain_chain(), pictures.clone().requires_grad_()
    with Gradient(network, zennit_composite(epsilon)) as attributor:
        logits, want = attributor(x, lambda out: F.one_hot(TARGETS, 4) * out)
    assert logits.shape == (3, 4)
    assert_close(explain(network, pictures, f"lrp_epsilon:epsilon={epsilon}"), want, rtol=1e-10, atol=1e-12)


def zennit_composite(epsilon: float) -> LayerMapComposite:
    return LayerMapComposite(
        [
            (zennit_types.Activation, zennit_rules.Pass()),
            (Sum, zennit_rules.Norm(stabilizer=epsilon)),
            (zennit_types.AvgPool, zennit_rules.Norm(stabilizer=epsilon)),
            (zennit_types.BatchNorm, zennit_rules.Epsilon(epsilon)),
            (zennit_types.Convolution, zennit_rules.Epsilon(epsilon)),
            (zennit_types.Linear, zennit_rules.Epsilon(epsilon)),
        ]
    )


def test_lrp_equals_captums(pictures: Tensor) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()]
            self.body, self.head = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1)), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).flatten(1))

    network = seeded(Normed())
    found = explain(network, pictures, "lrp_epsilon:epsilon=0.3")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.AdaptiveAvgPool2d | nn.Linear):
            module.rule = EpsilonRule(0.3)
    want = captum.attr.LRP(network).attribute(pictures.clone().requires_grad_(), target=TARGETS)
    assert_close(found, want.detach(), rtol=1e-10, atol=1e-12)


class Rewritten(nn.Module):
    """EfficientNet-Lite0 as libraries of hooks need it: an activation of its own at each use, additions as modules."""

    def __init__(self, network: nn.Module, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.network = network
        for block in network._blocks:
            block.first, block.second, block.sum = activation(), activation(), Sum()
            block.forward = types.MethodType(_block, block)
        self.stem, self.head, self.flat = activation(), activation(), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        net = self.network
        x = self.stem(net._bn0(net._conv_stem(x)))
        for block in net._blocks:
            x = block(x)
        x = self.head(net._bn1(net._conv_head(x)))
        return net._fc(self.flat(net._avg_pooling(x)))


def _block(block: nn.Module, x: Tensor) -> Tensor:
    y = block.first(block._bn0(block._expand_conv(x))) if block._block_args.expand_ratio != 1 else x
    y = block._bn2(block._project_conv(block.second(block._bn1(block._depthwise_conv(y)))))
    return block.sum(torch.stack([y, x], -1)) if y.shape == x.shape and block._block_args.stride == 1 else y


class Six(nn.Module):
    """ReLU6 of two rectifiers that captum knows, no two at one tensor: relu(x) - relu(x - 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.lower(x.clone()) - self.upper(x - 6)


def lite0() -> nn.Module:
    return models.load("efficientnet_lite0").network.double().eval()


def test_lrp_of_efficientnet_lite_equals_zennits_of_it_rewritten() -> None:
    x, network = photo(64), Rewritten(lite0(), nn.ReLU6)
    assert_close(network(x), lite0()(x), rtol=1e-10, atol=1e-10)
    with Gradient(network, zennit_composite(1e-3)) as attributor:
        _, want = attributor(x.clone().requires_grad_(), F.one_hot(TARGETS[:1], 1000).double() * network(x).detach())
    found = explain(lite0(), x, "lrp_epsilon:epsilon=0.001")
    assert_close(found, want, rtol=1e-6, atol=1e-8 * float(want.abs().max()))
    assert (found - explain(lite0(), x, "gradient_x_input")).norm() > 0.1 * found.norm()


# --- DeepLIFT


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_deeplift_is_the_rescale_rule_written_out(pictures: Tensor, name: str) -> None:
    network = Twice(ACTIVATIONS[name])
    z1, a1, z2, a2 = network.layers(pictures)
    r1, s1, r2, s2 = network.layers(torch.zeros_like(pictures))
    slope1, slope2 = (a1 - s1) / (z1 - r1), (a2 - s2) / (z2 - r2)
    chosen = F.one_hot(TARGETS, 4).double()[:, :, None]
    patches = network.w1.T @ (slope1 * (network.w2.T @ (slope2 * chosen)))
    want = F.fold(patches, pictures.shape[2:], 3).detach() * pictures
    found = explain(network, pictures, "deeplift")
    assert_close(found, want, rtol=1e-8, atol=1e-10)
    assert_close(found.sum((1, 2, 3)), rise(network, pictures), rtol=1e-10, atol=1e-10)


# captum has to be given networks without what it gets wrong: an activation beside a max-pool (one of them then
# sees the plain gradient), windows that overlap (what they share is overwritten), ReLU6, an activation whose input
# something else uses too. Hence the sums to the rise below.
@captum_warns
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU])
def test_deeplift_equals_captums(pictures: Tensor, activation: type[nn.Module]) -> None:
    network = seeded(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), activation(), nn.Conv2d(6, 8, 3), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3), activation(), nn.Flatten(), nn.Linear(8 * 4 * 3, 4),
        )
    )  # fmt: skip
    found = explain(network, pictures, "deeplift")
    want = captum.attr.DeepLift(network).attribute(
        pictures.clone().requires_grad_(), torch.zeros_like(pictures), target=TARGETS
    )
    assert_close(found, want.detach(), rtol=1e-9, atol=1e-11)


POOLS = {
    "overlapping": nn.MaxPool2d(3, 2),
    "padded": nn.MaxPool2d(3, 1, 1),
    "ceil": lambda x: F.max_pool2d(x, 3, stride=2, ceil_mode=True),
    "dilated": nn.MaxPool2d(2, dilation=2),
    "adaptive": nn.AdaptiveMaxPool2d((3, 2)),
}


@pytest.mark.parametrize("name", POOLS)
def test_deeplift_sums_to_the_rise_through_any_max_pool(pictures: Tensor, name: str) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.LazyLinear(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(POOLS[name](F.relu(self.conv(x)) - 0.2 * self.conv(x))).flatten(1))

    network = Pooled()
    network(pictures.float())
    found = explain(seeded(network), pictures, "deeplift").sum((1, 2, 3))
    assert_close(found, rise(network, pictures), rtol=1e-10, atol=1e-10)


def test_a_max_pool_shares_as_the_definition_says() -> None:
    """One window: the larger maximum's surplus over the reference's goes where it was found, and back."""
    x = torch.tensor([[[[1.0, 5.0], [2.0, 0.5]]], [[[-1.0, -2.0], [-3.0, -4.0]]], [[[0.0, 2.0], [7.0, 1.0]]]]).double()
    network = seeded(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 4)))
    weight = network[2].weight.detach()[TARGETS, 0]
    want = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    want[0, 0, 0, 1], want[1, 0, 0, 0], want[2, 0, 1, 0] = 5 * weight[0], -1 * weight[1], 7 * weight[2]
    assert_close(explain(network, x, "deeplift"), want)


@captum_warns
def test_deeplift_of_efficientnet_lite_equals_captums_of_it_rewritten() -> None:
    x, network = photo(64), Rewritten(lite0(), Six)
    found = explain(lite0(), x, "deeplift")
    want = captum.attr.DeepLift(network).attribute(x.clone().requires_grad_(), torch.zeros_like(x), target=2)
    assert_close(found, want.detach(), rtol=1e-6, atol=1e-9 * float(found.abs().max()))
    assert_close(found.sum((1, 2, 3)), rise(lite0(), x), rtol=1e-9, atol=1e-9)
    assert (found - explain(lite0(), x, "gradient_x_input")).norm() > 0.1 * found.norm()


@pytest.mark.parametrize("name", ["inception_v3", "resnet18"])
def test_deeplift_sums_to_the_rise_on_real_networks(name: str) -> None:
    made = {
        "inception_v3": lambda: models.load("inception_v3", "random").network,
        "resnet18": lambda: resnet18(num_classes=4),
    }[name]()
    network, x = seeded(made), photo(75)
    found = explain(network, x, "deeplift")
    assert_close(found.sum((1, 2, 3)), rise(network, x), rtol=1e-8, atol=1e-8)
    assert (found - explain(network, x, "gradient_x_input")).norm() > 0.1 * found.norm()


def test_a_path_that_depends_on_the_input_is_refused_when_it_shows(pictures: Tensor) -> None:
    class Turning(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(x).relu() if float(x.detach().amax()) == 0 else F.relu(x)
            return y.mean((2, 3)).repeat(1, 2)

    with pytest.raises(ValueError, match="2 activations at the baseline, 1 at the image"):
        explain(Turning(), pictures, "deeplift")


def test_an_epsilon_must_be_a_positive_number() -> None:
    with pytest.raises(ValueError, match=r"epsilon must be finite and above 0, not 0\.0"):
        attributions.find("lrp_epsilon:epsilon=0")
