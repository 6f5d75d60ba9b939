from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.engine import Engine
from sanity.folding import Folded, folded
from sanity.randomization import guarded
from sanity.tracing import Course, foldable
from tests.conftest import Awkward, seeded


def statistics(network: nn.Module) -> nn.Module:
    """BatchNorms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return network.double().eval()


def grid(size: int) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1


NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 64, 20),
    "inception_v3": (lambda: models.MODELS[1].build(7), 96, 94),
    "efficientnet_lite0": (lambda: models.MODELS[0].build(7), 64, 49),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8), 64, 5),
    "vision_transformer": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16), 16, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_changes_neither_logits_nor_maps(name: str) -> None:
    make, size, count = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = statistics(make())
    x = grid(size)
    plan = foldable(network, x[:1])
    assert sum(one.norm is not None for one in plan.joined.values()) == count
    with torch.no_grad():
        want = network(x)
        assert_close(Folded(network, plan)(x), want, rtol=1e-9, atol=1e-9 * float(want.abs().max() + 1e-3))
    inputs = Inputs(x, want.argmax(1), ("a", "b"))
    names = ["gradient"] + ["guided_backprop"] * (name != "vision_transformer")
    methods = [attributions.find(one) for one in names]
    with guarded(network):
        slow, fast = (Engine(methods, 2, fold=fold).explain(network, inputs) for fold in (False, True))
    for one in names:
        assert_close(fast[one], slow[one], rtol=1e-6, atol=1e-9 * float(slow[one].abs().max() + 1e-12))


def test_a_convolution_that_others_read_too_is_left_alone() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (self.norm(y) + y).mean((2, 3))

    assert foldable(Shares().eval(), torch.zeros(1, 3, 5, 5)) == Course()
    awkward = seeded(Awkward)
    assert [one.norm for one in foldable(awkward, grid(9)[:1]).joined.values()] == [awkward.stem[1], None, None]


def test_a_norm_in_training_mode_is_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert foldable(network.train(), torch.rand(2, 3, 5, 5)) == Course()
    assert list(foldable(network.eval(), torch.rand(2, 3, 5, 5)).joined) == [0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folded_weights_equal_convolution_then_norm(bias: bool, affine: bool) -> None:
    conv, norm = nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6, affine=affine, eps=0.1)
    network = statistics(nn.Sequential(conv, norm))
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    weight, shift = folded(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    assert_close(F.conv2d(x, weight, shift, groups=2), network(x), rtol=1e-12, atol=1e-13)


def test_another_way_through_the_network_is_taken_unfolded() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.skip = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.mean((2, 3)) if self.skip else self.norm(y).mean((2, 3))

    network = statistics(Fickle())
    fast = Folded(network, foldable(network, grid(5)[:1]))
    network.skip = True
    assert torch.equal(fast(grid(5)), network(grid(5)))
    network.skip = False
    assert torch.equal(fast(grid(5)), network(grid(5)))
