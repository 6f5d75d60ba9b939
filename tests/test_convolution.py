"""Convolutions with their rectifier as one call, against PyTorch's own, apart, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import sanity
from sanity import attributions, models
from sanity.attributions import Inputs
from sanity.attributions.base import PLAIN
from sanity.attributions.rectifiers import count_rectifiers
from sanity.convolution import Clip, Geometry, Kernel, convolve, geometry, pad, suits
from sanity.engine import Engine, State
from sanity.folding import Folded
from sanity.microbatch import gradients
from sanity.randomization import guarded
from sanity.tracing import Joined, foldable
from tests.conftest import Awkward, seeded

RELU, RELU6 = Clip(0.0, float("inf")), Clip(0.0, 6.0)
EPS = torch.finfo(torch.float32).eps
SHAPES = {
    "plain": ((6, 8, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
    "one by one": ((6, 8, 1, 1), Geometry((1, 1), (0, 0), (1, 1), 1)),
    "strided": ((6, 8, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 1)),
    "pictures, strided": ((3, 8, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 1)),
    "pictures, by patches": ((3, 8, 4, 4), Geometry((4, 4), (0, 0), (1, 1), 1)),
    "pictures, steps beyond the kernel": ((3, 8, 2, 1), Geometry((3, 2), (0, 0), (1, 1), 1)),
    "pictures, unlike steps": ((1, 8, 7, 5), Geometry((2, 3), (3, 1), (1, 1), 1)),
    "pictures, padded by more than the kernel": ((3, 8, 2, 2), Geometry((2, 2), (3, 3), (1, 1), 1)),
    "strided, a column left over": ((6, 8, 2, 2), Geometry((2, 3), (0, 0), (1, 1), 1)),
    "one by one, strided": ((6, 8, 1, 1), Geometry((2, 2), (0, 0), (1, 1), 1)),
    "long": ((6, 8, 1, 7), Geometry((1, 1), (0, 3), (1, 1), 1)),
    "dilated": ((6, 8, 3, 3), Geometry((1, 1), (2, 2), (2, 2), 1)),
    "valid": ((6, 8, 5, 5), Geometry((1, 1), (0, 0), (1, 1), 1)),
    "padded by more than the kernel": ((6, 8, 1, 1), Geometry((1, 1), (1, 2), (1, 1), 1)),
    "grouped": ((6, 8, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 2)),
    "depthwise": ((8, 8, 5, 5), Geometry((1, 1), (2, 2), (1, 1), 8)),
    "depthwise, strided": ((8, 8, 3, 3), Geometry((2, 2), (0, 0), (1, 1), 8)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rectified(x: Tensor, clip: Clip | None) -> Tensor:
    return x if clip is None else x.clamp(clip.low, clip.high)


@pytest.mark.parametrize("clip", [None, RELU, RELU6], ids=["none", "relu", "relu6"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradient_are_those_of_conv2d_and_clamp(name: str, bias: bool, clip: Clip | None) -> None:
    (c, d, height, width), way = SHAPES[name]
    weight = random(d, c // way.groups, height, width)
    shift = random(d, seed=1) if bias else None
    x = random(3, c, 14, 13, seed=2).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    want = rectified(F.conv2d(exact, weight.double(), None if shift is None else shift.double(), *way), clip)
    assert suits(x, weight)
    got = convolve(x, Kernel(weight, shift), way, clip)
    # A sum of n products is off by n roundings of the sum of their absolute values at most.
    terms = c // way.groups * height * width + 1
    largest = F.conv2d(
        exact.detach().abs(), weight.double().abs(), None if shift is None else shift.double().abs(), *way
    )
    assert_close(got.double(), want, rtol=0, atol=EPS * terms * float(largest.max()))
    back = random(*want.shape, seed=3)
    (slow,) = torch.autograd.grad(want, exact, back.double())
    (fast,) = torch.autograd.grad(got, x, back)
    whole = F.conv2d(exact, weight.double().abs(), None, *way)
    (largest,) = torch.autograd.grad(whole, exact, back.double().abs())
    assert_close(fast.double(), slow, rtol=0, atol=EPS * (d // way.groups) * height * width * float(largest.max()))


def test_a_kernel_serves_inputs_of_every_size_and_both_memory_formats() -> None:
    weight, way = random(8, 6, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)
    kernel = Kernel(weight, None)
    for n, side in ((1, 7), (4, 31), (2, 8)):
        for form in (torch.channels_last, torch.contiguous_format):
            x = random(n, 6, side, side).contiguous(memory_format=form)
            assert_close(convolve(x, kernel, way), F.conv2d(x, weight, None, 1, 1), rtol=0, atol=4 * EPS * 54)


def test_bfloat16_rounds_as_pytorchs_own() -> None:
    weight, way = random(8, 6, 3, 3).bfloat16(), Geometry((1, 1), (1, 1), (1, 1), 1)
    x = random(2, 6, 9, 9).bfloat16()
    if not suits(x, weight):
        pytest.skip("this processor has no bfloat16 kernels")
    want = F.conv2d(x.double(), weight.double(), None, 1, 1)
    got = convolve(x, Kernel(weight, None), way)
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), want, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(1, 2, 4, 4, dtype=torch.float64), torch.zeros(2, 2, 1, 1, dtype=torch.float64)),
        (torch.zeros(2, 4, 4), torch.zeros(2, 2, 1, 1)),
        (torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 1, 1, dtype=torch.bfloat16)),
        (torch.zeros(1, 2, 4, 4, device="meta"), torch.zeros(2, 2, 1, 1, device="meta")),
    ],
    ids=["float64", "three dimensions", "mixed", "another device"],
)
def test_what_has_no_kernel_is_told(x: Tensor, weight: Tensor) -> None:
    assert not suits(x, weight)


def test_geometry_reads_what_conv2d_takes() -> None:
    assert geometry([], {}) == Geometry((1, 1), (0, 0), (1, 1), 1)
    assert geometry([2], {"padding": 1, "groups": 3}) == Geometry((2, 2), (1, 1), (1, 1), 3)
    assert geometry([(2, 1), [1, 0], (1,), 2], {}) == Geometry((2, 1), (1, 0), (1, 1), 2)
    assert geometry([1, "same"], {}) is None


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x = random(1, 2, 4, 4).requires_grad_()
    out = convolve(x, Kernel(random(3, 2, 1, 1), None), Geometry((1, 1), (0, 0), (1, 1), 1), RELU)
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def test_padding_goes_there_and_back_in_the_same_memory_format() -> None:
    x = random(2, 3, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    sides = (0, 1, 2, 3)
    got, want = pad(x, sides), F.pad(x, sides)
    assert torch.equal(got, want)
    back = random(*want.shape, seed=1).contiguous(memory_format=torch.channels_last)
    (fast,), (slow,) = (torch.autograd.grad(out, x, back) for out in (got, want))
    assert torch.equal(fast, slow)
    assert fast.stride(1) == 1


# --- whole networks


class Padded(nn.Module):
    """Zeros on one side, a reflection, a rectifier read twice, one in place, one after a sum; a named padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, stride=2), nn.Conv2d(6, 6, 1, bias=False)
        self.third, self.norm = nn.Conv2d(6, 6, 3, padding="same"), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(F.pad(x, (0, 1, 0, 1))))
        raw = self.second(x)
        x = F.relu(raw) + 0.1 * raw
        x = F.relu_(self.norm(self.third(F.pad(x, (1, 1, 1, 1), mode="reflect"))))
        x = x + F.hardtanh(self.second(x), 0.0, 2.0)
        return self.head(x.mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "padded": (Padded, 17),
    "awkward": (Awkward, 15),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 64),
    "inception_v3": (lambda: models.MODELS[1].build(7), 96),
    "efficientnet_lite0": (lambda: models.MODELS[0].build(7), 64),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 8), 64),
    "vision_transformer": (lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16), 16),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_its_rectifiers_joined_gives_the_same_gradients(name: str) -> None:
    """In float32 the fast network is as near to float64 as the network itself is."""
    make, side = NETWORKS[name]
    network = seeded(make).eval()
    if name == "vision_transformer":
        nn.init.normal_(network.heads.head.weight, generator=torch.Generator().manual_seed(5))
    x = random(2, 3, side, side, seed=4).contiguous(memory_format=torch.channels_last)
    targets = torch.tensor([0, 2])
    with guarded(network, dtype=torch.float64):
        exact = gradients(network, x.double(), x.double(), targets, PLAIN)
    with guarded(network, dtype=torch.float32):
        fast = Folded(network, foldable(network, x[:1])).clipping()
        found = {kind: gradients(one, x, x, targets, PLAIN) for kind, one in (("slow", network), ("fast", fast))}
    for n in range(2):
        size = exact[n].norm()
        slow, quick = (float((found[kind][n].double() - exact[n]).norm() / size) for kind in ("slow", "fast"))
        # A rectifier's input so near 0 that rounding decides moves a gradient by far more than rounding.
        assert quick <= max(4 * slow, 2e-3 if n == 0 else 1e-5), (quick, slow)


def test_what_is_joined_is_what_nothing_else_reads() -> None:
    network = seeded(Padded).float().eval()
    plan = foldable(network, random(1, 3, 17, 17)).joined
    assert plan == {
        0: Joined(None, RELU6, deferred=True, padded=0),
        2: Joined(network.norm, RELU),
        3: Joined(None, Clip(0.0, 2.0)),
    }


def test_only_what_sees_the_logits_alone_gets_rectifiers_joined() -> None:
    """A rule that acts on rectifiers meets all of them, and none twice."""
    network = seeded(Padded).float().eval()
    x = random(1, 3, 17, 17)
    folded = Folded(network, foldable(network, x))
    assert count_rectifiers(network, x) == count_rectifiers(folded, x) == 4
    # What is read twice, and what follows a convolution whose padding is a word, stay.
    assert count_rectifiers(folded.clipping(), x) == 2


class Written(nn.Module):
    """Adds to a rectifier's result in place, which the one that clips at 6 allows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.conv(x))
        x += 0.5
        return self.head(x.mean((2, 3)))


class Turned(nn.Module):
    """One weight, once as it is and once turned, and slices of it: the same memory under other shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x[:, :1]], 1)
        x = F.conv2d(x, self.weight, None).relu()
        x = F.conv2d(x, self.weight.transpose(0, 1), None).relu()
        x = torch.cat([F.conv2d(x, self.weight[:2], None), F.conv2d(x, self.weight[:3], None)], 1)
        return F.conv2d(x[:, :4], self.weight * self.scale[:, None, None, None], None).relu().mean((2, 3))


class Chained(nn.Module):
    """Rectifiers read by one convolution, by two, by a pooling, by one whose weight is made, by its attribute, too.

    straight: the first one's result is pooled before it is convolved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(7))
        self.straight = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.convs[0](x).relu()
        x = F.relu6(self.convs[1](x if self.straight else F.avg_pool2d(x, 2)))
        x = self.convs[2](x).relu() + self.convs[3](x).relu()
        x = F.max_pool2d(self.convs[4](x).relu(), 2)
        x = F.conv2d(F.relu(self.convs[5](x)), 2 * self.convs[6].weight, self.convs[6].bias)
        x = self.convs[5](x).relu()
        x = self.convs[6](x) + self.convs[0](x.mT)
        return x.mean((2, 3))


def test_a_rectifiers_backward_pass_is_left_to_the_only_convolution_that_reads_it() -> None:
    network = seeded(Chained).float().eval()
    plan = foldable(network, random(1, 3, 17, 17)).joined
    assert [place for place, one in plan.items() if one.deferred] == [0]
    assert [place for place, one in plan.items() if one.clip] == [0, 1, 2, 3, 4, 5, 7]


def test_a_network_that_leaves_the_way_it_was_seen_on_is_run_as_it_is() -> None:
    network = seeded(Chained).float().eval()
    x, targets = random(2, 3, 17, 17), torch.tensor([0, 2])
    fast = Folded(network, foldable(network, x)).clipping()
    network.straight = False
    for one, wanted in zip(
        gradients(fast, x, x, targets, PLAIN), gradients(network, x, x, targets, PLAIN), strict=True
    ):
        assert_close(one, wanted, rtol=1e-5, atol=1e-6)
    assert not fast.courses[True].joined


@pytest.mark.parametrize("make", [Written, Turned, Chained])
def test_networks_that_write_to_results_or_share_weights_are_the_same(make: Callable[[], nn.Module]) -> None:
    network = seeded(make).float()
    x = random(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    targets = torch.tensor([0, 2])
    with guarded(network):
        fast = Folded(network, foldable(network, x)).clipping()
        for _ in range(3):
            found = gradients(fast, x, x, targets, PLAIN)
        for one, wanted in zip(found, gradients(network, x, x, targets, PLAIN), strict=True):
            assert_close(one, wanted, rtol=1e-5, atol=1e-6)
    # Weights that are made in every pass are not kept.
    assert len(fast.weights._kept) == (7 if make is Chained else 1)


class Sly(nn.Module):
    """Reads a rectifier's input or result, and a norm's numbers, in ways that are hard to see; kind says which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.day, self.night = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.high = nn.Parameter(torch.tensor(0.3))
        self.block = nn.Sequential(self.b, nn.ReLU())
        # torch.jit.script warns that it is to go; it can be met with all the same.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.gate = torch.jit.script(_gate)

    def forward(self, x: Tensor) -> Tensor:
        raw = self.a(x)
        if self.kind == "norm called with numbers of its own":
            day = self.day
            raw = F.batch_norm(raw, day.running_mean, day.running_var, day.weight.abs(), day.bias, False, 0.0, day.eps)
        if self.kind == "another norm for some pictures":
            raw = (self.day if len(x) == 1 else self.night)(raw)
        if self.kind == "clipped at a parameter":
            return F.hardtanh(raw, 0.0, float(self.high)).mean((2, 3))
        h = F.relu(raw)
        if self.kind == "recomputed":
            return checkpoint(self.block, h, use_reentrant=False).mean((2, 3))
        if self.kind == "bias of the picture":
            return F.conv2d(h, self.b.weight, self.b.bias * x.mean(), 1, 1).mean((2, 3))
        y = self.b(h)
        if self.kind == "assigned to a slice":
            whole = torch.zeros_like(y)
            whole[:, :8] = h
            y = y + whole
        if self.kind == "read in another language":
            y = self.gate(y, h)
        if self.kind == "read once more for some pictures" and len(x) > 1:
            y = y + h
        if self.kind == "its size is read":
            padded = F.pad(y, (0, 1, 0, 1))
            y = self.b(padded) * padded.shape[2]
        return y.mean((2, 3))


def _gate(y: Tensor, h: Tensor) -> Tensor:
    return y * h


SLY = (
    "norm called with numbers of its own", "another norm for some pictures", "clipped at a parameter", "recomputed",
    "bias of the picture", "assigned to a slice", "read in another language", "read once more for some pictures",
    "its size is read",
)  # fmt: skip


@pytest.mark.parametrize("kind", SLY)
def test_networks_that_hide_what_they_do_have_the_right_gradients(kind: str) -> None:
    network = seeded(lambda: Sly(kind)).float().eval()
    network.day.weight.data[::2] *= -1
    x = random(3, 3, 9, 9, seed=1)
    inputs = Inputs(x, torch.tensor([0, 5, 2]), ("a", "b", "c"))

    def higher() -> None:
        network.high.data.fill_(0.9)

    def lower() -> None:
        network.high.data.fill_(0.3)

    states = [State(lower, inputs), State(higher, inputs)]
    methods = [attributions.find("gradient"), attributions.find("guided_backprop")]
    with guarded(network):
        fast, slow = (Engine(methods, 3, fold=fold).sweep(network, states, lower) for fold in (True, False))
    for found, wanted in zip(fast, slow, strict=True):
        for name, want in wanted.maps.items():
            assert_close(found.maps[name], want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))
        assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-6)


class Lopsided(nn.Module):
    """Zeros on one side of what one convolution reads, of the picture itself and of a rectifier's result."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 5, 2, groups=8)
        self.third, self.last = nn.Conv2d(8, 6, 3, dilation=2), nn.Conv2d(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(F.pad(x, (0, 1, 0, 1))))
        x = F.relu6(self.second(F.pad(x, (1, 2, 2, 1))))
        x = F.relu(self.third(F.pad(x, (1, 2, 1, 2))))
        x = F.relu(self.last(F.pad(x, (2, 2, 0, 1))))
        return F.pad(x, (1, 1, 1, 1)).mean((2, 3))


def test_zeros_around_a_picture_are_left_to_the_convolution() -> None:
    network = seeded(Lopsided).float().eval()
    x, targets = random(3, 3, 33, 34), torch.tensor([0, 2, 5])
    course = foldable(network, x[:1])
    # The third is dilated, and nothing convolves after the last padding.
    assert [one.padded for one in course.joined.values()] == [0, 1, None, 3]
    assert [one.deferred for one in course.joined.values()] == [True, False, True, False]
    fast = Folded(network, course).clipping()
    with guarded(network):
        for one, wanted in zip(
            gradients(fast, x, x, targets, PLAIN), gradients(network, x, x, targets, PLAIN), strict=True
        ):
            assert_close(one, wanted, rtol=1e-5, atol=1e-7)
    assert fast.courses[True].joined


def test_what_is_not_a_number_stays_so() -> None:
    """oneDNN's rectifier makes 0 of it, and a map that cannot be had would pass for a constant one."""
    layers = [layer for n in (3, 8, 8, 8) for layer in (nn.Conv2d(n, 8, 3), nn.ReLU())]
    network = nn.Sequential(*layers, nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    found = sanity.check(
        network, random(3, 3, 17, 17), methods=["gradient", "occlusion:positions=3"], reinit="uniform:-1e20:1e20"
    )
    last = found[found["stage_index"] == found["stage_index"].max()]
    assert set(last["status"]) == {"non-finite map"}
    assert set(found.loc[found["stage_index"] == 0, "status"]) == {"ok"}
