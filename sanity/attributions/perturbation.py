"""Meaningful perturbation: the smallest smooth mask whose deletion takes the class away (Fong and Vedaldi 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanity.attributions.base import FunctionMethod, Inputs, Option
from sanity.attributions.descent import Adam, Descent
from sanity.attributions.nulls import NULLS, gaussian_blur, null_images
from sanity.streams import normal_like, stream

CHOICES = {
    "optimiser": ("adam",),
    "tv_kind": ("isotropic", "anisotropic"),
    "reduction": ("sum", "mean"),
    "upsampling": ("bilinear", "nearest"),
    "null": NULLS,
    "task": ("deletion", "preservation"),
}


@dataclass(frozen=True)
class MaskSettings:
    """Everything that decides a mask but the network and the picture.

    steps, network evaluations; optimiser, one of `CHOICES`; learning_rate, of Adam; l1, tv, the weights of
    the two regularisers and tv_beta >= 1, the exponent; tv_kind, (dx^2 + dy^2)^(beta/2) or |dx|^beta +
    |dy|^beta; reduction, over the cells of the coarse mask; mask_size, its cells a side (never more than
    pixels); upsampling and then mask_blur, the standard deviation in pixels of a Gaussian; jitter, the most
    pixels the picture is shifted by under the mask, anew each step; null, what stands in for the deleted
    (see `null_images`) and null_radius, its radius in pixels; noise_on_image, the standard deviation, in the
    network's units, of noise added to the perturbed picture; task, delete the class or preserve it.
    Raises ValueError for anything else.
    """

    steps: int = 50
    optimiser: str = "adam"
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
        for field in fields(self):
            value, bound = getattr(self, field.name), least.get(field.name, 0)
            # "not >=" also refuses NaN
            if field.name not in CHOICES and not bound <= value < float("inf"):
                raise ValueError(f"{field.name} must be finite and at least {bound}, not {value}")
        if self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0, not 0")
        if self.null == "median" and self.null_radius != int(self.null_radius):
            raise ValueError(f"null 'median' takes whole pixels for null_radius, not {self.null_radius}")


PAPER = MaskSettings(steps=300)
"""The authors' code, deletion game: Adam 0.1, 300 iterations, sums, isotropic, jitter {0..3}, Gaussian blur 10."""

LOCALIZATION = MaskSettings(steps=300, l1=1e-3, tv_beta=2.0)
"""The authors' localization numbers, without their target of the five best classes."""

PORT = MaskSettings(
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
"""The PyTorch port: Adam 0.1, 500 iterations, means, anisotropic, noise on the picture, median blur of 11 pixels."""

DEFAULT = MaskSettings()
"""The paper's objective at the cost of 50 evaluations."""


@dataclass(frozen=True)
class MaskResult:
    """Masks and what they did.

    mask (N, 1, H, W) in [0, 1], 1 keeps the pixel; coarse, the variables behind it (N, 1, h, w); perturbed
    (N, C, H, W), the pictures under their masks; objective (steps, N), at each network evaluation and with
    that step's shift and noise; before, after (N,), the target's probability for the picture and under the
    mask, without shift or noise.
    """

    mask: Tensor
    coarse: Tensor
    perturbed: Tensor
    objective: Tensor
    before: Tensor
    after: Tensor


def upsample(coarse: Tensor, size: tuple[int, int], settings: MaskSettings) -> Tensor:
    """Coarse masks (N, 1, h, w) -> masks (N, 1, H, W), both in [0, 1]."""
    if settings.upsampling == "nearest":
        return gaussian_blur(F.interpolate(coarse, size, mode="nearest"), settings.mask_blur)
    return gaussian_blur(F.interpolate(coarse, size, mode="bilinear", align_corners=False), settings.mask_blur)


def total_variation(coarse: Tensor, settings: MaskSettings) -> Tensor:
    """Sum or mean of |grad m|^beta over the cells of each mask, forward differences: (N, 1, h, w) -> (N,).

    Differences across the edge count as 0. The mean of the anisotropic kind is that of the vertical
    differences plus that of the horizontal ones, as in the port.
    """
    down, right = coarse.diff(dim=2), coarse.diff(dim=3)
    if settings.tv_kind == "anisotropic":
        return sum((_reduce(d.abs() ** settings.tv_beta, settings.reduction) for d in (down, right)), down.sum() * 0)
    squares = F.pad(down, (0, 0, 0, 1)) ** 2 + F.pad(right, (0, 1)) ** 2
    # where the mask is flat the power has no slope to give: without the guard beta < 2 yields 0 * inf
    flat = squares == 0
    powers = squares.masked_fill(flat, 1) ** (settings.tv_beta / 2)
    return _reduce(powers.masked_fill(flat, 0), settings.reduction)


def _reduce(cells: Tensor, reduction: str) -> Tensor:
    total = cells.flatten(1).sum(1)
    return total / max(cells[0].numel(), 1) if reduction == "mean" else total


def regulariser(coarse: Tensor, settings: MaskSettings) -> Tensor:
    """What a mask costs: l1 times what is deleted (or, to preserve, kept) plus tv times the variation -> (N,)."""
    penalised = 1 - coarse if settings.task == "deletion" else coarse
    return settings.l1 * _reduce(penalised, settings.reduction) + settings.tv * total_variation(coarse, settings)


class MaskProblem:
    """The objective of a batch: the regulariser plus the target's probability (1 minus it, to preserve)."""

    def __init__(self, network: nn.Module, inputs: Inputs, settings: MaskSettings) -> None:
        self.network, self.inputs, self.settings = network, inputs, settings
        self.size = (inputs.pixels.shape[-2], inputs.pixels.shape[-1])
        self.null = None if settings.null == "noise" else self._null(0)

    def start(self) -> Tensor:
        """Masks that delete nothing, (N, 1, h, w)."""
        height, width = (min(self.settings.mask_size, side) for side in self.size)
        return self.inputs.pixels.new_ones(len(self.inputs.pixels), 1, height, width)

    def objective(self, coarse: Tensor, draw: int) -> Tensor:
        """Objective of each picture under the shift and noise of one draw, (N, 1, h, w) -> (N,)."""
        probability = self.probability(self._disturbed(coarse, draw))
        wanted = probability if self.settings.task == "deletion" else 1 - probability
        return regulariser(coarse, self.settings) + wanted

    def probability(self, pictures: Tensor) -> Tensor:
        """The network's softmax probability of the targets, (N, C, H, W) -> (N,)."""
        targets = self.inputs.targets.to(pictures.device).unsqueeze(1)
        return self.network(pictures).softmax(1).gather(1, targets).squeeze(1)

    def perturbed(self, coarse: Tensor) -> Tensor:
        """Pictures under their masks, neither shifted nor with noise on them, (N, C, H, W)."""
        null = self._null("after") if self.null is None else self.null
        return torch.lerp(null, self.inputs.pixels, upsample(coarse, self.size, self.settings))

    def _null(self, draw: int | str) -> Tensor:
        chosen = self.settings
        return null_images(self.inputs.pixels, chosen.null, chosen.null_radius, self.inputs.ids, self.inputs.seed, draw)

    def _disturbed(self, coarse: Tensor, draw: int) -> Tensor:
        pixels, null = self.inputs.pixels, self._null(draw) if self.null is None else self.null
        if self.settings.jitter:
            shifts = self._shifts(draw)
            pixels, null = shifted(pixels, shifts), shifted(null, shifts)
        perturbed = torch.lerp(null, pixels, upsample(coarse, self.size, self.settings))
        if self.settings.noise_on_image:
            named = zip(pixels, self.inputs.ids, strict=True)
            noise = [normal_like(x, self.inputs.seed, name, "noise", draw) for x, name in named]
            perturbed = perturbed + self.settings.noise_on_image * torch.stack(noise)
        return perturbed

    def _shifts(self, draw: int) -> list[tuple[int, int]]:
        drawn = [
            torch.randint(self.settings.jitter + 1, (2,), generator=stream(self.inputs.seed, name, "jitter", draw))
            for name in self.inputs.ids
        ]
        return [(int(down), int(right)) for down, right in drawn]


def shifted(images: Tensor, shifts: list[tuple[int, int]]) -> Tensor:
    """Each picture moved down and right by its whole pixels, the edge repeated: (N, C, H, W) -> (N, C, H, W)."""
    height, width = images.shape[-2:]

    def move(image: Tensor, down: int, right: int) -> Tensor:
        padded = F.pad(image, (right, 0, down, 0), mode="replicate")
        return padded[:, :height, :width]

    return torch.stack([move(image, *shift) for image, shift in zip(images, shifts, strict=True)])


def descend(problem: MaskProblem, on_step: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
    """Minimise: the coarse masks (N, 1, h, w) and the objective met at each evaluation (steps, N)."""
    descent: Descent = Adam(problem.start(), problem.settings.learning_rate)
    values = []
    for step in range(problem.settings.steps):
        point = descent.point.detach().requires_grad_()
        with torch.enable_grad():
            value = problem.objective(point, step)
            (gradient,) = torch.autograd.grad(value.sum(), point)
        descent.update(value.detach(), gradient)
        values.append(value.detach())
        if on_step is not None:
            on_step(step, values[-1])
    return descent.result, torch.stack(values)


def optimise_mask(
    network: nn.Module,
    inputs: Inputs,
    settings: MaskSettings = DEFAULT,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> MaskResult:
    """Masks of a batch, each picture's independent of its batch-mates. [Fong and Vedaldi 2017, eq. 3 and 6]

    network: (N, C, H, W) -> logits (N, classes), in eval mode; it is only called, and nothing gets a .grad.
    inputs.pixels in float32 or float64. on_step(step, objective (N,)) is called after each evaluation.
    """
    problem = MaskProblem(network, inputs, settings)
    coarse, objective = descend(problem, on_step)
    with torch.no_grad():
        perturbed = problem.perturbed(coarse)
        before, after = problem.probability(inputs.pixels), problem.probability(perturbed)
        mask = upsample(coarse, problem.size, settings)
    return MaskResult(mask, coarse, perturbed, objective, before, after)


def meaningful_perturbation(network: nn.Module, inputs: Inputs, **options: Option) -> Tensor:
    """How much of each pixel has to go (or, to preserve, has to stay): (N, 1, H, W) in [0, 1].

    options: the fields of `MaskSettings`; others raise TypeError.
    """
    settings = MaskSettings(**options)  # type: ignore[arg-type]
    problem = MaskProblem(network, inputs, settings)
    coarse, _ = descend(problem)
    mask = upsample(coarse, problem.size, settings)
    return 1 - mask if settings.task == "deletion" else mask


MEANINGFUL_PERTURBATION = FunctionMethod(
    name="meaningful_perturbation",
    source="Fong and Vedaldi 2017",
    deterministic=False,
    options=asdict(DEFAULT),
    call=meaningful_perturbation,
    evaluations=lambda options: int(options["steps"]),
)
