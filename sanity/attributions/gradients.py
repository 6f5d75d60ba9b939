"""Methods that combine plain gradients: each declares its points and its combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sanity.attributions.base import GradientMethod, Inputs, Moments, Option, Point
from sanity.streams import normal_like, stream


@dataclass(frozen=True)
class Noisy:
    """The image plus the index-th Gaussian noise of standard deviation sigma * (max - min) of the image."""

    sigma: float
    index: int

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """(C, H, W) -> (C, H, W). The noise is named by seed, image and index: every stage of one seed has the same."""
        noise = normal_like(pixels, seed, image_id, "noise", self.index)
        return pixels + self.sigma * (pixels.max() - pixels.min()) * noise


@dataclass(frozen=True)
class OnPath:
    """Fraction of the straight way from the baseline (0, mid grey in [-1, 1]) to the image; 1 is the image."""

    fraction: float

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """(C, H, W) -> (C, H, W)."""
        return pixels * self.fraction


@dataclass(frozen=True)
class OnNoisyPath:
    """Fraction of the straight way from the baseline 0 to a noisy image."""

    noisy: Noisy
    fraction: float

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """(C, H, W) -> (C, H, W)."""
        return self.noisy.at(pixels, image_id, seed) * self.fraction


@dataclass(frozen=True)
class Between:
    """Point at random on the way from a random baseline to a noisy image.

    The index-th baseline is Gaussian noise around 0; deviations are fractions of the image's max - min.
    """

    sigma: float
    baseline_sigma: float
    index: int

    def ends(self, pixels: Tensor, image_id: str, seed: int) -> tuple[Tensor, Tensor]:
        """Return the baseline and the noisy image, (C, H, W) each."""
        spread = self.baseline_sigma * (pixels.max() - pixels.min())
        baseline = spread * normal_like(pixels, seed, image_id, "baseline", self.index)
        return baseline, Noisy(self.sigma, self.index).at(pixels, image_id, seed)

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """(C, H, W) -> (C, H, W)."""
        baseline, noisy = self.ends(pixels, image_id, seed)
        fraction = torch.rand((), generator=stream(seed, image_id, "fraction", self.index)).to(pixels)
        return baseline + fraction * (noisy - baseline)


PIXELS: tuple[Point, ...] = (OnPath(1.0),)


def _count(options: Mapping[str, Option], name: str) -> range:
    if int(options[name]) < 1:
        raise ValueError(f"{name} must be at least 1, not {options[name]}")
    return range(int(options[name]))


def _deviation(options: Mapping[str, Option], name: str = "sigma") -> float:
    if not 0 <= float(options[name]) < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0, not {options[name]}")
    return float(options[name])


def _fractions(options: Mapping[str, Option]) -> list[float]:
    last = len(_count(options, "samples")) - 1
    return [i / last if last else 1.0 for i in range(last + 1)]


def _noisy(options: Mapping[str, Option]) -> tuple[Point, ...]:
    return tuple(Noisy(_deviation(options), i) for i in _count(options, "samples"))


def _path(options: Mapping[str, Option]) -> tuple[Point, ...]:
    return tuple(OnPath(fraction) for fraction in _fractions(options))


def _noisy_paths(options: Mapping[str, Option]) -> tuple[Point, ...]:
    noisy = [Noisy(_deviation(options), i) for i in _count(options, "noisy_inputs")]
    return tuple(OnNoisyPath(one, fraction) for one in noisy for fraction in _fractions(options))


def _between(options: Mapping[str, Option]) -> tuple[Point, ...]:
    deviations = _deviation(options), _deviation(options, "baseline_sigma")
    return tuple(Between(*deviations, i) for i in _count(options, "samples"))


def _way(point: Point, pixels: Tensor, image_id: str, seed: int) -> Tensor:
    """From the baseline to the noisy image that a point belongs to."""
    if isinstance(point, OnNoisyPath):
        return point.noisy.at(pixels, image_id, seed)
    if isinstance(point, Between):
        baseline, noisy = point.ends(pixels, image_id, seed)
        return noisy - baseline
    raise TypeError(f"{point} is on no noisy way")


def mean_gradient(inputs: Inputs, moments: Moments) -> Tensor:
    """Attribution (N, C, H, W): the gradient, averaged over the points."""
    return moments.mean


def mean_square(inputs: Inputs, moments: Moments) -> Tensor:
    """Attribution (N, C, H, W), >= 0: the squared gradient, averaged over the points."""
    assert moments.mean_square is not None
    return moments.mean_square


def variance(inputs: Inputs, moments: Moments) -> Tensor:
    """Attribution (N, C, H, W), >= 0: the gradient's variance over the points, divided by their number."""
    assert moments.mean_square is not None
    return (moments.mean_square - moments.mean.square()).clamp(min=0)


def times_input(inputs: Inputs, moments: Moments) -> Tensor:
    """Attribution (N, C, H, W): the mean gradient times (image - baseline), baseline 0."""
    return moments.mean * inputs.pixels


GRADIENT = GradientMethod("gradient", "Simonyan et al. 2014", points=lambda options: PIXELS, combine=mean_gradient)
GRADIENT_X_INPUT = GradientMethod(
    "gradient_x_input", "Shrikumar et al. 2016", points=lambda options: PIXELS, combine=times_input
)
SMOOTHGRAD = GradientMethod(
    "smoothgrad",
    "Smilkov et al. 2017",
    deterministic=False,
    options={"samples": 50, "sigma": 0.15},
    points=_noisy,
    combine=mean_gradient,
)
SMOOTHGRAD_SQUARED = replace(
    SMOOTHGRAD, name="smoothgrad_squared", source="Hooker et al. 2019", combine=mean_square, spread=True
)
VARGRAD = replace(
    SMOOTHGRAD,
    name="vargrad",
    source="Adebayo et al. 2018, ICLR workshop",
    options={"samples": 25, "sigma": 0.15},
    combine=variance,
    spread=True,
)
INTEGRATED_GRADIENTS = GradientMethod(
    "integrated_gradients",
    "Sundararajan et al. 2017",
    options={"samples": 50},
    points=_path,
    combine=times_input,
)
INTEGRATED_GRADIENTS_NO_MULTIPLIER = replace(
    INTEGRATED_GRADIENTS,
    name="integrated_gradients_no_multiplier",
    source="Kokhlikyan et al. 2021",
    combine=mean_gradient,
)
INTEGRATED_GRADIENTS_SMOOTHGRAD = GradientMethod(
    "integrated_gradients_smoothgrad",
    "Smilkov et al. 2017; Adebayo et al. 2018",
    deterministic=False,
    options={"samples": 50, "noisy_inputs": 25, "sigma": 0.15},
    points=_noisy_paths,
    combine=mean_gradient,
    weigh=_way,
)
GRADIENT_SHAP = GradientMethod(
    "gradient_shap",
    "Lundberg and Lee 2017; Erion et al. 2021",
    deterministic=False,
    options={"samples": 50, "sigma": 0.0, "baseline_sigma": 0.15},
    points=_between,
    combine=mean_gradient,
    weigh=_way,
)
