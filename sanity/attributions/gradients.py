"""Methods that combine plain gradients: each declares its points and its combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sanity.attributions.base import GradientMethod, Inputs, Moments, Option, Point
from sanity.streams import normal_like


@dataclass(frozen=True)
class Noisy:
    """The image plus the index-th Gaussian noise of standard deviation sigma * (max - min) of the image."""

    sigma: float
    index: int

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """(C, H, W) -> (C, H, W). The noise is the same at every stage: it is named by image and index alone."""
        noise = normal_like(pixels, seed, image_id, "noise", self.index)
        return pixels + self.sigma * (pixels.max() - pixels.min()) * noise


@dataclass(frozen=True)
class OnPath:
    """Fraction of the straight way from the baseline (0, mid grey in [-1, 1]) to the image; 1 is the image."""

    fraction: float

    def at(self, pixels: Tensor, image_id: str, seed: int) -> Tensor:
        """(C, H, W) -> (C, H, W)."""
        return pixels * self.fraction


PIXELS: tuple[Point, ...] = (OnPath(1.0),)


def _noisy(options: Mapping[str, Option]) -> tuple[Point, ...]:
    return tuple(Noisy(float(options["sigma"]), i) for i in range(int(options["samples"])))


def _path(options: Mapping[str, Option]) -> tuple[Point, ...]:
    last = int(options["samples"]) - 1
    return tuple(OnPath(i / last if last else 1.0) for i in range(last + 1))


def mean_gradient(inputs: Inputs, moments: Moments) -> Tensor:
    """Attribution (N, C, H, W): the gradient, averaged over the points."""
    return moments.mean


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
INTEGRATED_GRADIENTS = GradientMethod(
    "integrated_gradients",
    "Sundararajan et al. 2017",
    options={"samples": 50},
    points=_path,
    combine=times_input,
)
