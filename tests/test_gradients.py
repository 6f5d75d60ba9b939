from __future__ import annotations

import captum.attr
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sanity import attributions
from sanity.attributions import Inputs
from sanity.engine import Engine
from sanity.randomization import guarded
from sanity.streams import stream

TARGETS = torch.tensor([2, 0, 3])


def inputs_of(pixels: Tensor, seed: int = 5) -> Inputs:
    return Inputs(pixels, TARGETS[: len(pixels)], ("a", "b", "c")[: len(pixels)], seed=seed)


def explain(network: nn.Module, inputs: Inputs, spec: str, batch_size: int = 4) -> Tensor:
    method = attributions.find(spec)
    with guarded(network):
        return Engine([method], batch_size).explain(network, inputs)[method.name]


def slope(network: nn.Module, pixels: Tensor) -> Tensor:
    """Gradient of each image's explained logit, by autograd, image by image."""
    found = []
    for x, target in zip(pixels, TARGETS.tolist(), strict=False):
        leaf = x[None].clone().requires_grad_()
        found.append(torch.autograd.grad(network(leaf)[0, target], leaf)[0])
    return torch.cat(found)


def noise(pixels: Tensor, index: int, seed: int = 5) -> Tensor:
    """The index-th noise of images a, b, c, drawn here from its name."""
    draws = [
        torch.randn(x.shape, generator=stream(seed, i, "noise", index)) for x, i in zip(pixels, "abc", strict=True)
    ]
    spread = pixels.flatten(1).amax(1) - pixels.flatten(1).amin(1)
    return torch.stack(draws).double() * 0.15 * spread[:, None, None, None]


class Quadratic(nn.Module):
    """Logits that are second-degree polynomials of the pixels: their gradient is linear along any path."""

    def __init__(self, size: int = 3 * 17 * 15) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.inner = nn.Parameter(torch.randn(5, size, generator=draw, dtype=torch.float64) / size**0.5)
        self.outer = nn.Parameter(torch.randn(4, 5, generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        inner = x.flatten(1) @ self.inner.T
        return (inner + inner.square()) @ self.outer.T


def test_the_gradient_is_the_logits_central_difference(awkward: nn.Module, pictures: Tensor) -> None:
    found = explain(awkward, inputs_of(pictures), "gradient")
    step = 1e-6
    for channel, row, column in ((0, 3, 4), (1, 16, 14), (2, 0, 9), (0, 8, 7)):
        shift = torch.zeros_like(pictures)
        shift[:, channel, row, column] = step
        rise = (awkward(pictures + shift) - awkward(pictures - shift)) / (2 * step)
        # Central differences: rounding of the logits, about 1e-16, is divided by the step.
        assert_close(found[:, channel, row, column], rise[torch.arange(3), TARGETS], rtol=1e-7, atol=1e-9)


def test_gradient_x_input_equals_captums(awkward: nn.Module, pictures: Tensor) -> None:
    want = captum.attr.InputXGradient(awkward).attribute(pictures.clone().requires_grad_(), target=TARGETS)
    assert_close(explain(awkward, inputs_of(pictures), "gradient_x_input"), want, rtol=1e-12, atol=1e-14)


def test_smoothgrad_is_the_mean_gradient_at_the_named_noises(awkward: nn.Module, pictures: Tensor) -> None:
    want = sum(slope(awkward, pictures + noise(pictures, i)) for i in range(7)) / 7
    assert_close(explain(awkward, inputs_of(pictures), "smoothgrad:samples=7"), want, rtol=1e-11, atol=1e-13)


def test_no_noise_makes_smoothgrad_the_gradient(awkward: nn.Module, pictures: Tensor) -> None:
    found = explain(awkward, inputs_of(pictures), "smoothgrad:samples=3,sigma=0")
    assert_close(found, slope(awkward, pictures), rtol=1e-12, atol=1e-14)


def test_integrated_gradients_take_the_published_fifty_steps(awkward: nn.Module, pictures: Tensor) -> None:
    steps = torch.linspace(0, 1, 50, dtype=torch.float64)
    want = pictures * sum(slope(awkward, pictures * step) for step in steps) / 50
    found = explain(awkward, inputs_of(pictures), "integrated_gradients", batch_size=64)
    assert_close(found, want, rtol=1e-11, atol=1e-13)


def test_integrated_gradients_are_complete(pictures: Tensor) -> None:
    """Where the gradient is linear along the path its mean is the integral: the sum is f(x) - f(0)."""
    network = Quadratic()
    found = explain(network, inputs_of(pictures), "integrated_gradients:samples=5").sum((1, 2, 3))
    rise = network(pictures) - network(torch.zeros_like(pictures))
    assert_close(found, rise[torch.arange(3), TARGETS], rtol=1e-12, atol=1e-12)


def test_integrated_gradients_approach_completeness(awkward: nn.Module, pictures: Tensor) -> None:
    """Half the end points' gradients apart, the mean is the trapezoid rule, which captum knows too."""
    n = 40
    ends = (slope(awkward, torch.zeros_like(pictures)) + slope(awkward, pictures)) / 2
    found = explain(awkward, inputs_of(pictures), f"integrated_gradients:samples={n}", batch_size=64)
    # captum weighs its n points by 1/n and the ends by half of that, and keeps the weights in float32.
    path = captum.attr.IntegratedGradients(awkward)
    want = path.attribute(pictures, target=TARGETS, n_steps=n, method="riemann_trapezoid")
    eps = torch.finfo(torch.float32).eps
    assert_close(found - ends * pictures / n, want, rtol=eps, atol=eps * float(want.abs().max()))


def test_one_step_is_taken_at_the_image(awkward: nn.Module, pictures: Tensor) -> None:
    found = explain(awkward, inputs_of(pictures), "integrated_gradients:samples=1")
    assert_close(found, slope(awkward, pictures) * pictures, rtol=1e-12, atol=1e-14)
