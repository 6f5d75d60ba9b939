"""Adversarial pictures, and whether deleting what a map points at brings the label back (Fong and Vedaldi 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sanity.attributions.base import logits_of
from sanity.models import Preprocessing
from sanity.suppression import OK, Saliency, Scene, Values, unless

ATTACKS = ("fgsm", "least_likely")
EPSILON = 8 / 255
"""Size of an attack in parts of the input's range."""
SHARES = (0.05, 0.10, 0.20)
NOT_FOOLED = "not fooled"


def value_range(pixels: Tensor, preprocess: object) -> tuple[Tensor, Tensor]:
    """Least and greatest value a pixel can take, by channel, (N, C, 1, 1) each.

    Known of `Preprocessing`, where it is black and white; else each picture's own extremes stand in.
    """
    if isinstance(preprocess, Preprocessing):
        mean, std = (pixels.new_tensor(v)[None, :, None, None] for v in (preprocess.mean, preprocess.std))
        if mean.shape[1] == pixels.shape[1]:
            return ((0 - mean) / std).expand(len(pixels), -1, 1, 1), ((1 - mean) / std).expand(len(pixels), -1, 1, 1)
    low, high = (edge[:, None, None, None] for edge in pixels.flatten(1).aminmax(dim=1))
    return low, high


def attack(
    network: nn.Module, pixels: Tensor, logits: Tensor, kind: str, value_range: tuple[Tensor, Tensor], batch_size: int
) -> Tensor:
    """Pictures pushed one step of EPSILON times the range along the sign of the gradient: (N, C, H, W), same shape.

    `fgsm`: away from the predicted class [Goodfellow et al. 2015]; `least_likely`: towards the least likely class, one
    step of the iterative attack [Kurakin et al. 2017]. The result stays within the range.
    """
    low, high = value_range
    label, sign = (logits.argmin(1), -1) if kind == "least_likely" else (logits.argmax(1), 1)
    step = torch.cat(
        [
            _gradient(network, x, y).sign()
            for x, y in zip(torch.split(pixels, batch_size), torch.split(label, batch_size), strict=True)
        ]
    )
    return torch.minimum(torch.maximum(pixels + sign * EPSILON * (high - low) * step, low), high)


def _gradient(network: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each picture's cross-entropy."""
    with torch.enable_grad():
        x = pixels.detach().requires_grad_()
        loss = F.cross_entropy(logits_of(network, x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def attacked(scene: Scene, kind: str, preprocess: object) -> Scene:
    """The same pictures after an attack, each to be explained for the class it is now taken for."""
    inputs = scene.inputs
    edges = value_range(inputs.pixels, preprocess)
    pixels = attack(scene.network, inputs.pixels, scene.logits, kind, edges, scene.batch_size)
    with torch.no_grad():
        logits = torch.cat([logits_of(scene.network, x) for x in torch.split(pixels, scene.batch_size)])
    # An id of its own: what is kept of the clean picture must not be taken for it.
    ids = tuple(f"{name}/{kind}" for name in inputs.ids)
    return scene.of(replace(inputs, pixels=pixels, targets=logits.argmax(1), ids=ids, occasion=kind), logits)


def recovery(
    scene: Scene, found: Saliency, attacks: dict[str, Scene], explain: Callable[[Scene], Saliency]
) -> Iterator[Values]:
    """1 where blurring the most salient share of pixels brings the clean picture's label back, else 0.

    Of each attacked picture's own map, blurred; "not fooled" where the attack left the label as it was.
    `recovery_none` is the same of the clean picture: how often its label stays. A map tells attacked pictures from
    clean ones if the label changes for the former and stays for the latter.
    """
    label = scene.logits.argmax(1)
    for kind, other in {"none": scene, **attacks}.items():
        region = (found if kind == "none" else explain(other)).blurred(scene.radius, other.inputs)
        fooled = (other.logits.argmax(1) != label).tolist()
        reasons = [OK if kind == "none" or changed else NOT_FOOLED for changed in fooled]
        counts = [max(1, round(share * region.ranks[0].numel())) for share in SHARES]
        kept = region.ranks[:, None] >= region.ranks.new_tensor(counts)[None, :, None, None]
        answers = other.answers(kept, "blur")
        for share, answer in zip(SHARES, answers.unbind(1), strict=True):
            restored = torch.where(answer.isfinite().all(1), (answer.argmax(1) == label).double(), float("nan"))
            yield Values(f"recovery_{kind}", share, "blur", *unless(restored, region.status, reasons))
