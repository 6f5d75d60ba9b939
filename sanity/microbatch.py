"""One micro-batch: gradients at its points in one state of the network after another, each kept for the next."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sanity.attributions.base import PLAIN, Inputs, Point, Rule, logits_of
from sanity.memory import is_out_of_memory, tried
from sanity.reuse import CannotReuseError, Pass

USUAL, ROUGHLY = 0.05, {torch.bfloat16: 1.0}
"""Of a norm, how much rounding may move a gradient: a rectifier's input near 0 changes sides, in eight bits many do."""


class Evaluation(NamedTuple):
    """A gradient to be taken in every state: under a rule, of image n, at a point."""

    rule: Rule
    n: int
    point: Point


def gradients(
    network: nn.Module,
    points: Tensor,
    images: Tensor,
    targets: Tensor,
    rule: Rule,
    forward: Pass | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of each target's logit at each image's point, and the logits.

    points (N, C, H, W), images likewise, targets (N,) -> (N, C, H, W), (N, classes). forward: what the network is run
    in, at points that require gradients and are, if there was a pass before it, the very tensor run then; keep: its
    graph may be used again.
    """
    with torch.enable_grad():
        x = points if forward is not None else points.detach().requires_grad_()
        with rule.context(network, points, images), nullcontext() if forward is None else forward:
            logits = logits_of(network, x)
        chosen = logits.gather(1, targets.to(logits.device)[:, None])
        found = torch.autograd.grad(chosen.sum(), x, retain_graph=keep)[0]
    # A copy: the next pass may write to what is kept of this one, and is then found out.
    return found, logits.detach().clone()


def probed(network: nn.Module, example: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gradient of the first class's logit, and logits, of one picture (1, C, H, W); None where a network has none."""
    try:
        return gradients(network, example, example, torch.zeros(1, dtype=torch.int64, device=example.device), PLAIN)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None


def alike(fast: nn.Module, example: Tensor, wanted: tuple[Tensor, Tensor] | None) -> bool:
    """Whether a network gives one picture the gradient and logits that are wanted, but for rounding.

    False, too, where there is none, or what is not a number.
    """
    if wanted is None or (found := probed(fast, example)) is None:
        return False
    near = max(ROUGHLY.get(parameter.dtype, USUAL) for parameter in (example, *fast.parameters()))
    return all(bool((a - b).norm() <= near * b.norm()) for a, b in zip(found, wanted, strict=True))


@dataclass
class Batch:
    """A micro-batch: evaluations one by one, the points (N, C, H, W), and what is kept of the last state's pass.

    share: of the last state's calls, how many it could reuse; spoilt: memory does not suffice for a kept pass.
    """

    work: list[Evaluation]
    points: Tensor
    kept: Pass | None = None
    share: float = 0.0
    spoilt: bool = False

    def mates(self, inputs: Inputs) -> Inputs:
        """The images that the points belong to, one a point."""
        owners = [one.n for one in self.work]
        return Inputs(inputs.pixels[owners], inputs.targets[owners], tuple(inputs.ids[n] for n in owners))

    def gradients(
        self, network: nn.Module, mates: Inputs, rule: Rule, reuse: bool, keep: bool
    ) -> tuple[Tensor, Tensor] | None:
        """`gradients` in a kept pass, or None, from then on, if memory does not suffice."""
        before, self.kept, self.share = self.kept if reuse else None, None, 0.0
        points = self.points.requires_grad_()

        def run(before: Pass | None) -> tuple[Pass, tuple[Tensor, Tensor]]:
            forward = Pass(before)
            return forward, gradients(network, points, mates.pixels, mates.targets, rule, forward, keep)

        try:
            found = tried(partial(run, before))
        except CannotReuseError:
            before = None  # given free
            found = tried(partial(run, None))
        if found is None:
            self.spoilt = True
            return None
        self.kept, self.share = found[0] if keep else None, found[0].share
        return found[1]
