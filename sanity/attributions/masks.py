"""What a mask is and what it costs: its settings, its pixels and its regulariser (Fong and Vedaldi 2017)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor

from sanity.attributions.nulls import NULLS, gaussian_blur

CHOICES = {
    "optimiser": ("sequential", "adam", "lbfgs"),
    "tv_kind": ("isotropic", "anisotropic"),
    "reduction": ("sum", "mean"),
    "upsampling": ("bilinear", "nearest"),
    "null": NULLS,
    "task": ("deletion", "preservation"),
}


@dataclass(frozen=True)
class MaskSettings:
    """Everything that decides a mask but the network and the picture.

    steps, network evaluations; optimiser, see `sanity.attributions.descent`; learning_rate, Adam's;
    l1, tv, weights of the two regularisers, and tv_beta >= 1, the exponent; tv_kind, (dx^2 + dy^2)^(beta/2)
    or |dx|^beta + |dy|^beta; reduction, over the cells of the coarse mask; mask_size, its cells a side (never
    more than pixels); upsampling and then mask_blur, the standard deviation in pixels of a Gaussian; jitter,
    the most pixels the picture moves by under the mask, anew each step; null, what stands in for the deleted
    (`null_images`), and null_radius, in pixels; noise_on_image, standard deviation, in the network's units,
    of noise added to the perturbed picture anew each step; task, to delete the class or to preserve it.
    Raises ValueError for anything else.
    """

    steps: int = 50
    optimiser: str = "sequential"
    learning_rate: float = 0.1
    l1: float = 1e-4
    tv: float = 1e-2
    tv_beta: float = 3.0
    tv_kind: str = "isotropic"
    reduction: str = "sum"
    mask_size: int = 28
    upsampling: str = "nearest"
    mask_blur: float = 5.0
    jitter: int = 3
    null: str = "blur"
    null_radius: float = 10.0
    noise_on_image: float = 0.0
    task: str = "deletion"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        least = {"steps": 1, "mask_size": 1, "tv_beta": 1}
        whole = {"steps", "mask_size", "jitter"} | ({"null_radius"} if self.null == "median" else set())
        for name in (field.name for field in fields(self) if field.name not in CHOICES):
            value, bound = getattr(self, name), least.get(name, 0)
            if not bound <= value < float("inf"):  # also refuses NaN
                raise ValueError(f"{name} must be finite and at least {bound}, not {value}")
            if name in whole and value != int(value):
                raise ValueError(f"{name} must be a whole number, not {value}")
        if self.learning_rate == 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")


PAPER = MaskSettings(optimiser="adam", steps=300)
"""The authors' code: Adam 0.1, 300 iterations, sums, isotropic, jitter {0..3}, Gaussian blur of 10."""

LOCALIZATION = MaskSettings(optimiser="adam", steps=300, l1=1e-3, tv_beta=2.0)
"""The authors' numbers for localization, but for their target, the five highest classes."""

PORT = MaskSettings(
    optimiser="adam",
    steps=500,
    l1=0.01,
    tv=0.2,
    tv_kind="anisotropic",
    reduction="mean",
    mask_blur=0.0,
    jitter=0,
    null="median",
    null_radius=5,
    noise_on_image=0.2,
)
"""The PyTorch port: Adam 0.1, 500 iterations, means, anisotropic, noise on the picture, median of 11 pixels."""

DEFAULT = MaskSettings()
"""The paper's objective, brought as low in 50 evaluations as its 300 bring it."""


def upsample(coarse: Tensor, size: tuple[int, int], settings: MaskSettings) -> Tensor:
    """Coarse masks (N, 1, h, w) -> masks (N, 1, H, W), both in [0, 1]."""
    if settings.upsampling == "nearest":
        return gaussian_blur(F.interpolate(coarse, size, mode="nearest"), settings.mask_blur)
    return gaussian_blur(F.interpolate(coarse, size, mode="bilinear", align_corners=False), settings.mask_blur)


@dataclass(frozen=True)
class Regulariser:
    """What masks cost: l1 times what is penalised plus tv times the variation, each a sum or mean over cells.

    In [0, 1] the l1 norm is linear: what is deleted, 1 - m, or, to preserve, what is kept, m. Differences
    across the mask's edge count as 0. The mean of the anisotropic variation is that of the vertical
    differences plus that of the horizontal ones, as in the port.
    """

    l1: float
    tv: float
    beta: float = 3.0
    isotropic: bool = True
    mean: bool = False
    deletion: bool = True

    @classmethod
    def of(cls, settings: MaskSettings) -> Regulariser:
        """The regulariser that the settings ask for."""
        kinds = settings.tv_kind == "isotropic", settings.reduction == "mean", settings.task == "deletion"
        return cls(settings.l1, settings.tv, settings.tv_beta, *kinds)

    def value(self, coarse: Tensor) -> Tensor:
        """(N, 1, h, w) in [0, 1] -> (N,)."""
        penalised = 1 - coarse if self.deletion else coarse
        return self.l1 * self._weight(coarse) * penalised.flatten(1).sum(1) + self.tv * self.variation(coarse)

    def variation(self, coarse: Tensor) -> Tensor:
        """The sum or mean of |grad m|^beta, (N, 1, h, w) -> (N,)."""
        down, right = coarse.diff(dim=2), coarse.diff(dim=3)
        if self.isotropic:
            squares = _squares(down, right)
            # the guard is for autograd, which makes 0 * inf of a flat mask's slope at beta under 2
            powers = (squares.where(squares > 0, 1) ** (self.beta / 2)).where(squares > 0, 0)
            return self._weight(coarse) * powers.flatten(1).sum(1)
        return sum(
            (self._weight(d) * (d.abs() ** self.beta).flatten(1).sum(1) for d in (down, right)),
            start=0 * coarse[:, 0, 0, 0],
        )

    def gradient(self, coarse: Tensor) -> Tensor:
        """Of `value`, (N, 1, h, w) -> (N, 1, h, w); 0 where the variation has a corner, as a flat mask at beta 1."""
        down, right = coarse.diff(dim=2), coarse.diff(dim=3)
        if self.isotropic:
            squares = _squares(down, right)
            slopes = self.beta * self._weight(coarse) * squares.where(squares > 0, 1) ** (self.beta / 2 - 1)
            down, right = slopes[:, :, :-1] * down, slopes[:, :, :, :-1] * right
        else:
            down, right = (self.beta * self._weight(d) * d.sign() * d.abs() ** (self.beta - 1) for d in (down, right))
        flow = F.pad(down, (0, 0, 1, 0)) - F.pad(down, (0, 0, 0, 1)) + F.pad(right, (1, 0)) - F.pad(right, (0, 1))
        slope = self.l1 * self._weight(coarse)
        return self.tv * flow + (-slope if self.deletion else slope)

    def _weight(self, cells: Tensor) -> float:
        return 1 / max(cells[0].numel(), 1) if self.mean else 1.0


def _squares(down: Tensor, right: Tensor) -> Tensor:
    return F.pad(down, (0, 0, 0, 1)) ** 2 + F.pad(right, (0, 1)) ** 2
