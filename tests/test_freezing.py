"""Activation freezing: what stays of a network when its weaker activations become constants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.attributions.rectifiers import Freezing, Rectifying, threshold
from sanity.engine import Engine
from sanity.randomization import guarded
from sanity.run import refuse_unsuited
from sanity.streams import normal_like

METHODS = (
    "gradient", "smoothgrad", "integrated_gradients", "guided_backprop", "deconvnet", "gradient_x_input", "vargrad",
    "integrated_gradients_smoothgrad", "gradient_shap", "lrp_epsilon", "deeplift",
)  # fmt: skip
SMALL = {"samples": 3, "noisy_inputs": 2}


def explain(network: nn.Module, pixels: Tensor, spec: str, batch_size: int = 4) -> Tensor:
    method = attributions.find(spec)
    method = method.with_options(**{k: v for k, v in SMALL.items() if k in method.options})
    ids, targets = ("a", "b", "c")[: len(pixels)], torch.tensor([2, 0, 3])[: len(pixels)]
    with guarded(network):
        return Engine([method], batch_size).explain(network, Inputs(pixels, targets, ids, seed=5))[method.name]


class Chain(nn.Module):
    """Two layers with a rectifier each, which a test can write out."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        shapes = ((20, 3 * 17 * 15), (20,), (12, 20), (12,), (4, 12))
        self.w1, self.b1, self.w2, self.b2, self.w3 = (
            nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64)) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        low = F.relu(F.linear(x.flatten(1), self.w1, self.b1))
        return F.relu(F.linear(low, self.w2, self.b2)) @ self.w3.T


def frozen_slope(network: Chain, x: Tensor, point: Tensor, target: int, p: float, mask: str) -> Tensor:
    """Gradient at a point of the network frozen for x, by the chain rule, with numpy's percentile."""
    lows = [F.relu(network.w1 @ x.flatten() + network.b1)]
    highs = [F.relu(network.w2 @ lows[0] + network.b2)]

    def level(outputs: Tensor) -> float:
        return float(np.percentile(outputs[outputs > 0].detach().numpy(), p)) if p else -np.inf

    def froze(value: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        live = (value if mask == "point" else own) >= level(own)
        return torch.where(live, value, own), live & (value > 0)

    low, live_low = froze(F.relu(network.w1 @ point.flatten() + network.b1), lows[0])
    _, live_high = froze(F.relu(network.w2 @ low + network.b2), highs[0])
    gradient = network.w1.T @ (live_low * (network.w2.T @ (live_high * network.w3[target])))
    return gradient.detach().view_as(x)


@pytest.mark.parametrize("p", [0.0, 37.0, 60.0, 100.0])
@pytest.mark.parametrize("mask", ["point", "image"])
def test_the_gradient_is_that_of_the_rule_written_out(pictures: Tensor, p: float, mask: str) -> None:
    network = Chain()
    want = [frozen_slope(network, x, x, t, p, mask) for x, t in zip(pictures, (2, 0, 3), strict=True)]
    assert_close(explain(network, pictures, f"frozen:gradient:p={p},mask={mask}"), torch.stack(want))


@pytest.mark.parametrize("mask", ["point", "image"])
def test_elsewhere_thresholds_and_constants_are_the_images(pictures: Tensor, mask: str) -> None:
    network = Chain()
    want = []
    for x, name, target in zip(pictures, "abc", (2, 0, 3), strict=True):
        spread = 0.15 * (x.max() - x.min())
        points = [x + spread * normal_like(x, 5, name, "noise", i) for i in range(3)]
        want.append(sum(frozen_slope(network, x, point, target, 50, mask) for point in points) / 3)
    assert_close(explain(network, pictures, f"frozen:smoothgrad:p=50,mask={mask}"), torch.stack(want))


def test_the_two_masks_differ_away_from_the_image(pictures: Tensor) -> None:
    found = [explain(Chain(), pictures, f"frozen:smoothgrad:p=50,mask={mask}") for mask in ("point", "image")]
    assert not torch.allclose(*found)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("mask", ["point", "image"])
def test_nothing_frozen_is_the_plain_method(awkward: nn.Module, pictures: Tensor, name: str, mask: str) -> None:
    plain = explain(awkward, pictures, name)
    assert_close(explain(awkward, pictures, f"frozen:{name}:p=0,mask={mask}"), plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_is_frozen_in_its_own_way(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    plain, frozen = explain(awkward, pictures, name), explain(awkward, pictures, f"frozen:{name}")
    assert frozen.isfinite().all()
    assert float(frozen.abs().sum()) > 0
    assert (frozen - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("name", METHODS)
def test_batch_mates_do_not_freeze_one_another(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    whole = explain(awkward, pictures, f"frozen:{name}:p=60", batch_size=7)
    assert_close(explain(awkward, pictures, f"frozen:{name}:p=60", batch_size=2), whole, rtol=1e-9, atol=1e-12)
    assert_close(explain(awkward, pictures[:1], f"frozen:{name}:p=60"), whole[:1], rtol=1e-9, atol=1e-12)


def vgg() -> tuple[nn.Module, Tensor]:
    """VGG16's layers at an eighth of their width, untrained but scaled."""
    widths = [8, 8, "M", 16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M", 64, 64, 64, "M"]
    layers: list[nn.Module] = []
    channels = 3
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    head = [nn.Linear(64 * 4, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Linear(64, 10)]
    return scaled(nn.Sequential(*layers, nn.Flatten(), *head)), photos(64)


def inception() -> tuple[nn.Module, Tensor]:
    return scaled(models.load("inception_v3", "random").network), photos(75)


def scaled(network: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, 0, 0.1)
    return network.double().eval()


def photos(size: int) -> Tensor:
    coarse = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 2 - 1


@pytest.mark.parametrize(("make", "p"), [(vgg, 30.0), (vgg, 80.0), (inception, 80.0)])
def test_of_real_networks_the_output_stays_and_so_many_units_live(make: object, p: float) -> None:
    network, pixels = make()
    with torch.no_grad():
        plain = network(pixels)
        freezing = Freezing(network, pixels, p, "point")
        with freezing:
            assert_close(network(pixels), plain, rtol=1e-10, atol=1e-12)
    for level, outputs in freezing.layers:
        positive = (outputs > 0).flatten(1).sum(1)
        live = ((outputs >= level) & (outputs > 0)).flatten(1).sum(1)
        # One unit more or less: the percentile falls between two of them.
        assert ((live / positive - (1 - p / 100)).abs() <= 1 / positive).all()
    alone = [explain(network, pixels[:1], spec) for spec in (f"frozen:gradient:p={p}", "gradient")]
    assert (alone[0] - alone[1]).norm() > 0.5 * alone[1].norm() > 0
    assert freezing.count == len(freezing.layers) == {vgg: 15, inception: 94}[make]


def test_outputs_are_unchanged_at_the_image_for_every_network(awkward: nn.Module, pictures: Tensor) -> None:
    with torch.no_grad(), Freezing(awkward, pictures, 80, "point"):
        frozen = awkward(pictures)
    assert_close(frozen, awkward(pictures), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", [0.0, 1.0, 50.0, 80.0, 99.9, 100.0])
def test_the_threshold_parts_what_numpys_percentile_parts(p: float) -> None:
    draw = torch.Generator().manual_seed(int(p))
    outputs = torch.randn(4, 3, 5, 7, generator=draw, dtype=torch.float64).relu()
    outputs[3] = 0
    levels = threshold(outputs, p)
    assert levels.shape == (4, 1, 1, 1)
    for one, level in zip(outputs[:3], levels[:3], strict=True):
        positive = one[one > 0].numpy()
        assert (positive >= float(level)).tolist() == (positive >= np.percentile(positive, p)).tolist()
    assert float(levels[3]) == -np.inf


def test_equal_outputs_live_or_freeze_together() -> None:
    level = threshold(torch.tensor([[1.0, 6.0, 6.0, 6.0, 6.0, 0.0]]), 80)
    assert float(level) == 6


def test_a_rectifier_after_another_sees_the_frozen_one() -> None:
    """relu(relu(z)): the second's threshold is of its own outputs, and both freeze."""
    seen: list[Tensor] = []
    network = nn.Sequential(nn.ReLU(), nn.ReLU())
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    with Freezing(network, x, 80, "point") as freezing, Rectifying(lambda z, f: seen.append(f(z)) or seen[-1]):
        out = network(x - 1.5)
    assert [float(level) for level, _ in freezing.layers] == pytest.approx([4.2, 4.2])
    assert out.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    with freezing:
        assert network(x + 3).tolist() == [[1.0, 5.0, 6.0, 7.0, 8.0]]


def test_options_are_parsed_and_nonsense_is_refused() -> None:
    method = attributions.find("frozen:smoothgrad:p=60,samples=4")
    assert (method.name, method.options["p"], method.options["samples"]) == ("frozen:smoothgrad", 60.0, 4)
    assert method.cost == 4
    assert not method.deterministic
    assert attributions.find("frozen:deeplift").options["mask"] == "image"
    for spec, words in {
        "frozen:gradient:p=101": r"a percentile lies in \[0, 100\]: got p=101.0",
        "frozen:gradient:p=nan": "got p=nan",
        "frozen:gradient:mask=mine": "mask must be point or image, not 'mine'",
        "frozen:rise": "frozen:rise: only methods that combine gradients can be frozen",
        "frozen:gradien": "unknown method 'gradien'; did you mean gradient",
        "frozen:gradient:q=1": "has no option 'q'",
        "frozen:": "unknown method 'frozen:'",
    }.items():
        with pytest.raises(ValueError, match=words):
            attributions.find(spec)
    with pytest.raises(ValueError, match="'frozen:gradient' is frozen already"):
        attributions.rectifiers.frozen(attributions.find("frozen:gradient"))


def test_what_cannot_be_frozen_is_refused(pictures: Tensor) -> None:
    class Turning(nn.Module):
        """Takes another way for darker pictures."""

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(x) if float(x.detach().mean()) > 0.2 else F.relu(x)[:, :, ::2].relu()
            return y.mean((2, 3))

    smooth = nn.Sequential(nn.Flatten(), nn.Linear(3 * 17 * 15, 4), nn.GELU()).double()
    with pytest.raises(ValueError, match="'frozen:gradient' does not suit this network: it runs no rectifier"):
        refuse_unsuited([attributions.find("frozen:gradient")], smooth, pictures[:1])
    with pytest.raises(ValueError, match="runs no rectifier that could be frozen"):
        explain(smooth, pictures, "frozen:gradient")
    bright = (pictures + 1) / 2
    with pytest.raises(ValueError, match="whose path depends on its input cannot be frozen"):
        explain(Turning(), bright, "frozen:integrated_gradients", batch_size=1)
