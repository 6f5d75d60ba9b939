from __future__ import annotations

import captum.attr
import pytest
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


def noisy_slopes(network: nn.Module, pixels: Tensor, count: int) -> Tensor:
    return torch.stack([slope(network, pixels + noise(pixels, i)) for i in range(count)])


def test_smoothgrad_squared_is_the_mean_of_squares(awkward: nn.Module, pictures: Tensor) -> None:
    want = noisy_slopes(awkward, pictures, 6).square().mean(0)
    assert_close(explain(awkward, inputs_of(pictures), "smoothgrad_squared:samples=6"), want, rtol=1e-11, atol=1e-13)


def test_vargrad_is_the_variance_over_twenty_five_noises(awkward: nn.Module, pictures: Tensor) -> None:
    want = noisy_slopes(awkward, pictures, 25).var(0, correction=0)
    found = explain(awkward, inputs_of(pictures), "vargrad", batch_size=32)
    assert_close(found, want, rtol=1e-9, atol=1e-13)
    assert (found >= 0).all()
    assert not explain(awkward, inputs_of(pictures), "vargrad:samples=1").any()


def test_integrated_gradients_without_multiplier_times_input_are_integrated_gradients(
    awkward: nn.Module, pictures: Tensor
) -> None:
    found = explain(awkward, inputs_of(pictures), "integrated_gradients_no_multiplier:samples=5")
    whole = explain(awkward, inputs_of(pictures), "integrated_gradients:samples=5")
    assert_close(found * pictures, whole, rtol=1e-12, atol=1e-14)


def test_integrated_gradients_smoothgrad_average_over_noisy_inputs(awkward: nn.Module, pictures: Tensor) -> None:
    """Integrated gradients of each noisy input, whose own length multiplies them, then the mean."""
    want = torch.zeros_like(pictures)
    for i in range(3):
        noisy = pictures + noise(pictures, i)
        steps = torch.linspace(0, 1, 4, dtype=torch.float64)
        want += noisy * sum(slope(awkward, noisy * step) for step in steps) / 4 / 3
    spec = "integrated_gradients_smoothgrad:samples=4,noisy_inputs=3"
    assert_close(explain(awkward, inputs_of(pictures), spec), want, rtol=1e-11, atol=1e-13)
    assert attributions.find("integrated_gradients_smoothgrad").cost == 25 * 50


def test_gradient_shap_weighs_each_point_by_its_own_way(awkward: nn.Module, pictures: Tensor) -> None:
    found = explain(awkward, inputs_of(pictures), "gradient_shap:samples=3,sigma=0.15,baseline_sigma=0.3")
    want = torch.zeros_like(pictures)
    spread = (pictures.flatten(1).amax(1) - pictures.flatten(1).amin(1))[:, None, None, None]
    for i in range(3):
        drawn = [torch.randn(3, 17, 15, generator=stream(5, name, "baseline", i)) for name in "abc"]
        baseline = 0.3 * spread * torch.stack(drawn).double()
        fraction = torch.stack([torch.rand((), generator=stream(5, name, "fraction", i)) for name in "abc"]).double()
        way = pictures + noise(pictures, i) - baseline
        want += slope(awkward, baseline + fraction[:, None, None, None] * way) * way / 3
    assert_close(found, want, rtol=1e-11, atol=1e-13)


def test_gradient_shap_is_complete_in_expectation(pictures: Tensor) -> None:
    """Its sum estimates f(x) minus the mean of f over baselines: within four standard errors of 400 samples."""
    network, inputs = Quadratic(), inputs_of(pictures)
    found = explain(network, inputs, "gradient_shap:samples=400,baseline_sigma=0.1", batch_size=400).sum((1, 2, 3))
    single = [
        explain(network, inputs_of(pictures, seed), "gradient_shap:samples=1,baseline_sigma=0.1").sum((1, 2, 3))
        for seed in range(60)
    ]
    error = torch.stack(single).std(0) / 400**0.5
    spread = 0.1 * (pictures.flatten(1).amax(1) - pictures.flatten(1).amin(1))
    # Of a second-degree polynomial and Gaussian baselines the mean is known: f(0) + trace of its curvature.
    at_baseline = (spread**2)[:, None] * (network.inner.square().sum(1) @ network.outer.T)
    want = (network(pictures) - at_baseline)[torch.arange(3), TARGETS].detach()
    assert ((found - want).abs() < 4 * error).all()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("smoothgrad:samples=0", "samples must be at least 1, not 0"),
        ("integrated_gradients:samples=-3", "samples must be at least 1, not -3"),
        ("smoothgrad:sigma=-1", "sigma must be finite and at least 0, not -1.0"),
        ("vargrad:sigma=nan", "sigma must be finite and at least 0, not nan"),
        ("integrated_gradients_smoothgrad:noisy_inputs=0", "noisy_inputs must be at least 1, not 0"),
        ("gradient_shap:baseline_sigma=inf", "baseline_sigma must be finite and at least 0, not inf"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_when_given(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attributions.find(spec)
