from __future__ import annotations

import captum.attr
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models import resnet18, squeezenet1_1

from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.attributions.cam import last_map
from sanity.engine import Engine
from sanity.randomization import guarded
from sanity.run import refuse_unsuited
from tests.conftest import Awkward

TARGETS = torch.tensor([2, 0, 3])


def explain(network: nn.Module, pixels: Tensor, spec: str, targets: Tensor = TARGETS) -> Tensor:
    method = attributions.find(spec)
    inputs = Inputs(pixels, targets[: len(pixels)], ("a", "b", "c")[: len(pixels)])
    with guarded(network):
        return Engine([method], 8).explain(network, inputs)[method.name]


def cam_by_hand(activation: Tensor, gradient: Tensor, size: tuple[int, int]) -> Tensor:
    weights = gradient.mean((2, 3))
    cam = torch.einsum("nk,nkhw->nhw", weights, activation).clamp(min=0)
    cam = torch.stack([one / one.max() if one.max() > 0 else one for one in cam])
    return F.interpolate(cam[:, None], size, mode="bilinear", align_corners=False)


def photos(size: int, count: int = 1) -> Tensor:
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 2 - 1


def scaled(network: nn.Module) -> nn.Module:
    """Weights that keep the activations' scale, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.1)
    return network.double().eval()


def test_the_map_is_worked_out_at_the_last_feature_map(awkward: Awkward, pictures: Tensor) -> None:
    """Written out: the network's forward pass up to what it pools, and the linear head's weights."""
    with torch.no_grad():
        x = F.max_pool2d(F.relu(awkward.stem(pictures)), 3, stride=2, ceil_mode=True)
        y = awkward.clip(awkward.left(x)) + torch.relu(awkward.right(x))
        activation = (awkward.clip(awkward.norm(y)) + x).clamp(min=0)
        cells = activation.shape[2] * activation.shape[3]
        gradient = (awkward.head.weight[TARGETS] / cells)[:, :, None, None].expand_as(activation)
        want = cam_by_hand(activation, gradient, (17, 15))
    found = explain(awkward, pictures, "gradcam")
    assert_close(found, want, rtol=1e-11, atol=1e-13)
    assert found.min() >= 0
    assert found.max() <= 1
    guided = explain(awkward, pictures, "guided_backprop")
    assert_close(explain(awkward, pictures, "guided_gradcam"), guided * want, rtol=1e-11, atol=1e-13)


# The module that gives what is found by order of execution: Mixed_7c, as published, and the like of others.
PUBLISHED = {
    "inception_v3": (lambda: models.load("inception_v3", "random").network, 139, "Mixed_7c"),
    "resnet18": (lambda: resnet18(num_classes=4), 64, "layer4"),
    "squeezenet1_1": (lambda: squeezenet1_1(num_classes=4), 64, "classifier.2"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_last_map_is_the_published_layers(name: str) -> None:
    make, size, layer = PUBLISHED[name]
    network, pixels = scaled(make()), photos(size)
    # The likeliest class has something that speaks for it.
    target = network(pixels).argmax(1)
    found, named = (explain(network, pixels, spec, target) for spec in ("gradcam", f"gradcam:layer={layer}"))
    assert torch.equal(found, named)
    assert float(found.max()) > 0
    theirs = LayerGradCam(network, network.get_submodule(layer)).attribute(
        pixels, target=target, relu_attributions=True
    )
    theirs = LayerAttribution.interpolate(theirs / theirs.amax(), (size, size), "bilinear")
    assert_close(found, theirs.detach(), rtol=1e-9, atol=1e-12)


def test_guided_gradcam_equals_captums(pictures: Tensor) -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    network = scaled(nn.Sequential(*layers, nn.Linear(8 * 6 * 5, 4)))
    with pytest.warns(UserWarning, match="Setting backward hooks"):
        want = captum.attr.GuidedGradCam(network, network[3]).attribute(
            pictures.clone().requires_grad_(), target=TARGETS, interpolate_mode="bilinear"
        )
    found = explain(network, pictures, "guided_gradcam")
    # captum leaves the map at its own scale
    for one, other in zip(found, want.detach(), strict=True):
        assert_close(one / one.abs().max(), other / other.abs().max(), rtol=1e-9, atol=1e-12)


def test_the_published_cnns_map_is_its_second_rectifier_before_pooling() -> None:
    class CNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 6, 5, padding=2)
            self.fc = nn.Linear(6 * 7 * 7, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x), inplace=True), 2)
            return self.fc(x.flatten(1))

    network, pixels = scaled(CNN()), photos(28)[:, :1]
    activation, gradient = last_map(network, pixels, TARGETS[:1])
    assert activation.shape == gradient.shape == (1, 6, 14, 14)
    want = F.relu(network.conv2(F.max_pool2d(F.relu(network.conv1(pixels)), 2)))
    assert_close(activation, want.detach())
    assert_close(explain(network, pixels, "gradcam"), cam_by_hand(activation, gradient, (28, 28)))


def test_a_named_layers_own_output_is_taken_though_it_is_changed_in_place(pictures: Tensor) -> None:
    network = scaled(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    activation, gradient = last_map(network, pictures, TARGETS, layer="0")
    assert_close(activation, network[0](pictures).detach())
    assert (activation < 0).any()
    assert ((gradient == 0) == (activation <= 0))[torch.arange(3), TARGETS].all()


def test_where_nothing_speaks_for_the_class_the_map_is_zero(pictures: Tensor) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4, bias=False)]
    network = scaled(nn.Sequential(*layers))
    nn.init.constant_(network[4].weight, -1)
    found = explain(network, pictures, "gradcam")
    assert found.shape == (3, 1, 17, 15)
    assert not found.any()


class Scattered(nn.Module):
    """Its last convolution's map goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.list = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x).mean((2, 3))
        self.last(x)
        self.list([x])
        return found


MLP = nn.Sequential(nn.Flatten(), nn.Linear(3 * 17 * 15, 4), nn.ReLU()).double()
REFUSED = [
    (MLP, "gradcam", "it runs no convolution whose output has more than one pixel"),
    (MLP, "guided_gradcam", "it runs no convolution"),
    (MLP, "gradcam:layer=1", r"layer '1' gives \(1, 4\), not a feature map \(N, K, h, w\)"),
    (Scattered(), "gradcam", "its logits do not depend on its last convolution"),
    (Scattered(), "gradcam:layer=last", "its logits do not depend on layer 'last'"),
    (Scattered(), "gradcam:layer=list", "layer 'list' gives list, not a feature map"),
    (Scattered(), "gradcam:layer=lost", "unknown layer 'lost'; did you mean list or last"),
    (Scattered(), "guided_gradcam", "it runs no rectifier"),
]


@pytest.mark.parametrize(("network", "spec", "words"), REFUSED)
def test_networks_without_such_a_map_are_refused(pictures: Tensor, network: nn.Module, spec: str, words: str) -> None:
    method = attributions.find(spec)
    with pytest.raises(ValueError, match=f"method '{method.name}' does not suit this network: {words}"):
        refuse_unsuited([method], network.double(), pictures[:1])
    assert not any(module._forward_hooks for module in network.modules())
