"""Meaningful perturbation: the smallest smooth mask that takes the class away (Fong and Vedaldi 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanity.attributions.base import FunctionMethod, Inputs, Option, Sees
from sanity.attributions.descent import DESCENTS, Descent
from sanity.attributions.masks import (
    DEFAULT,
    LOCALIZATION,
    PAPER,
    PORT,
    MaskSettings,
    Regulariser,
    upsample,
)
from sanity.attributions.nulls import null_images
from sanity.streams import normal_like, stream

__all__ = [
    "DEFAULT",
    "LOCALIZATION",
    "MEANINGFUL_PERTURBATION",
    "PAPER",
    "PORT",
    "MaskProblem",
    "MaskResult",
    "MaskSettings",
    "meaningful_perturbation",
    "optimise_mask",
]


@dataclass(frozen=True)
class MaskResult:
    """Masks and what they did.

    mask (N, 1, H, W) in [0, 1], 1 keeps the pixel; coarse, the variables behind it (N, 1, h, w); perturbed
    (N, C, H, W), the pictures under their masks; objective (steps, N), met at each network evaluation under
    that step's shift and noise; before, after (N,), the target's probability for the picture and under the
    mask, without shift or noise.
    """

    mask: Tensor
    coarse: Tensor
    perturbed: Tensor
    objective: Tensor
    before: Tensor
    after: Tensor


class MaskProblem:
    """What is minimised, picture by picture: the regulariser plus the probability of the targets.

    To preserve, 1 minus the probability, which is the paper's objective but for the constant.
    """

    def __init__(self, network: nn.Module, inputs: Inputs, settings: MaskSettings) -> None:
        self.network, self.inputs, self.settings = network, inputs, settings
        self.size = (inputs.pixels.shape[-2], inputs.pixels.shape[-1])
        self.still_null = None if settings.null == "noise" else self._null("still")

    def start(self) -> Tensor:
        """Masks that delete nothing, (N, 1, h, w)."""
        height, width = (min(self.settings.mask_size, side) for side in self.size)
        return self.inputs.pixels.new_ones(len(self.inputs.pixels), 1, height, width)

    def objective(self, coarse: Tensor, draw: int) -> Tensor:
        """Objective of each picture under one draw of shift and noise, (N, 1, h, w) -> (N,)."""
        return Regulariser.of(self.settings).value(coarse) + self.odds(self.disturbed(coarse, draw)).sigmoid()

    def odds(self, pictures: Tensor) -> Tensor:
        """Log-odds of the targets (to preserve, of the other classes), (N, C, H, W) -> (N,).

        Their sigmoid is the softmax probability; unlike it they keep a slope where it is saturated.
        Raises ValueError for a network of fewer than two classes.
        """
        logits: Tensor = self.network(pictures)
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(f"masks need logits (N, classes) of two classes or more, not {tuple(logits.shape)}")
        targets = self.inputs.targets.to(logits.device).unsqueeze(1)
        others = logits.scatter(1, targets, float("-inf")).logsumexp(1)
        odds = logits.gather(1, targets).squeeze(1) - others
        return odds if self.settings.task == "deletion" else -odds

    def probability(self, pictures: Tensor) -> Tensor:
        """The network's softmax probability of the targets, (N, C, H, W) -> (N,)."""
        odds = self.odds(pictures)
        return (odds if self.settings.task == "deletion" else -odds).sigmoid()

    def perturbed(self, coarse: Tensor) -> Tensor:
        """Pictures under their masks, neither shifted nor with noise added, (N, C, H, W)."""
        null = self._null("after") if self.still_null is None else self.still_null
        return torch.lerp(null, self.inputs.pixels, upsample(coarse, self.size, self.settings))

    def disturbed(self, coarse: Tensor, draw: int) -> Tensor:
        """Pictures under their masks with one draw of shift and noise: the picture moves, its mask does not."""
        pixels, null = self.inputs.pixels, self._null(draw) if self.still_null is None else self.still_null
        if self.settings.jitter:
            shifts = self.shifts(draw)
            pixels, null = shifted(pixels, shifts), shifted(null, shifts)
        perturbed = torch.lerp(null, pixels, upsample(coarse, self.size, self.settings))
        if self.settings.noise_on_image:
            perturbed = perturbed + self.settings.noise_on_image * self._noise(draw)
        return perturbed

    def shifts(self, draw: int) -> list[tuple[int, int]]:
        """By how many pixels each picture moves down and right, 0 to jitter."""
        seed, most = self.inputs.seed, self.settings.jitter
        drawn = [
            torch.randint(most + 1, (2,), generator=stream(seed, name, "jitter", draw)) for name in self.inputs.ids
        ]
        return [(int(down), int(right)) for down, right in drawn]

    def _noise(self, draw: int) -> Tensor:
        named = zip(self.inputs.pixels, self.inputs.ids, strict=True)
        return torch.stack([normal_like(x, self.inputs.seed, name, "noise", draw) for x, name in named])

    def _null(self, draw: int | str) -> Tensor:
        null, radius = self.settings.null, self.settings.null_radius
        return null_images(self.inputs.pixels, null, radius, self.inputs.ids, self.inputs.seed, draw)


def shifted(images: Tensor, shifts: list[tuple[int, int]]) -> Tensor:
    """Each picture moved down and right by whole pixels, the edge repeated: (N, C, H, W) -> (N, C, H, W)."""
    height, width = images.shape[-2:]
    moved = [
        F.pad(image, (right, 0, down, 0), mode="replicate")[:, :height, :width]
        for image, (down, right) in zip(images, shifts, strict=True)
    ]
    return torch.stack(moved)


def descent_steps(problem: MaskProblem) -> Iterator[tuple[Tensor, Descent]]:
    """After each network evaluation: the objective (N,) met there, and the descent, whose `result` is the masks."""
    settings = problem.settings
    descent, regulariser = DESCENTS[settings.optimiser](problem.start(), settings), Regulariser.of(settings)
    for step in range(settings.steps):
        with torch.enable_grad():
            point = descent.point.detach().requires_grad_()
            odds = problem.odds(problem.disturbed(point, step if descent.redraws else 0))
            # the mask alone is differentiated, so that the network's parameters gather no gradient
            (gradient,) = torch.autograd.grad(odds.sum(), point)
        with torch.no_grad():
            descent.update(odds.detach(), gradient)
            objective = odds.detach().sigmoid() + regulariser.value(point)
        yield objective, descent


def descend(problem: MaskProblem, on_step: Callable[[int, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
    """Minimise: the coarse masks (N, 1, h, w) and the objective met at each evaluation (steps, N)."""
    met = []
    for step, (objective, descent) in enumerate(descent_steps(problem)):
        coarse = descent.result
        met.append(objective)
        if on_step is not None:
            on_step(step, objective)
    return coarse, torch.stack(met)


def optimise_mask(
    network: nn.Module,
    inputs: Inputs,
    settings: MaskSettings = DEFAULT,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> MaskResult:
    """Masks of a batch, each picture's independent of its batch-mates. Source: Fong and Vedaldi 2017, equations 3 to 6.

    network: (N, C, H, W) -> logits (N, classes), in eval mode; it is called and left as it was.
    inputs.pixels: float32 or float64, in the network's space. on_step(step, objective (N,)) follows each
    evaluation. Raises ValueError for a network of fewer than two classes.
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

    options: the fields of `MaskSettings`, the rest as in `DEFAULT`. Raises TypeError for others.
    """
    settings = MaskSettings(**options)  # type: ignore[arg-type]
    problem = MaskProblem(network, inputs, settings)
    with torch.no_grad():
        mask = upsample(descend(problem)[0], problem.size, settings)
    return 1 - mask if settings.task == "deletion" else mask


MEANINGFUL_PERTURBATION = FunctionMethod(
    name="meaningful_perturbation",
    source="Fong and Vedaldi 2017",
    deterministic=False,
    options=asdict(DEFAULT),
    call=meaningful_perturbation,
    evaluations=lambda options: int(options["steps"]),
    sees=Sees.LOGITS,
)
