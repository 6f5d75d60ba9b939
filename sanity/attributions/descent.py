"""Descents over masks in [0, 1]: one network evaluation an update, the rows of a batch independent.

`adam` is the papers' own. `lbfgs` is projected on the box, with a line search of its own for each row.
`sequential` is the default: only the network is dear, so each step keeps the regulariser whole, replaces the
network by a plane through its log-odds, and solves that problem in a shrinking neighbourhood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from sanity.attributions.masks import MaskSettings, Regulariser


class Descent(Protocol):
    """`point` is where to evaluate next; `update` takes what was found there; `result` is the answer so far.

    What is minimised is sigmoid(log-odds of the network) + the regulariser. redraws: the network's shift and
    noise may change from one evaluation to the next.
    """

    point: Tensor
    redraws: bool

    def update(self, odds: Tensor, gradient: Tensor) -> None:
        """Move on, given the log-odds (N,) at `point` and their gradient (N, 1, h, w)."""

    @property
    def result(self) -> Tensor:
        """The masks, (N, 1, h, w) in [0, 1]."""


def spread(values: Tensor) -> Tensor:
    """One number a mask, (N,) -> (N, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product mask by mask, (N, 1, h, w) twice -> (N,)."""
    return (a * b).flatten(1).sum(1)


def probability_gradient(odds: Tensor, gradient: Tensor) -> Tensor:
    """From the gradient of the log-odds to that of the probability."""
    return spread(odds.sigmoid() * (-odds).sigmoid()) * gradient


class Moments:
    """Adam's running means of the gradient and its square (Kingma and Ba 2015)."""

    def __init__(self, like: Tensor, decay: float = 0.9, square_decay: float = 0.999) -> None:
        self.decay, self.square_decay, self.count = decay, square_decay, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor) -> Tensor:
        """The step to take, of about unit size, after this gradient."""
        self.count += 1
        self.mean = self.decay * self.mean + (1 - self.decay) * gradient
        self.square = self.square_decay * self.square + (1 - self.square_decay) * gradient**2
        size = (self.square / (1 - self.square_decay**self.count)).sqrt()
        return self.mean / (1 - self.decay**self.count) / (size + 1e-8)


class Adam:
    """Adam, clamped to the box after each step."""

    redraws = True

    def __init__(self, start: Tensor, settings: MaskSettings) -> None:
        self.point, self.rate = start, settings.learning_rate
        self.regulariser, self.moments = Regulariser.of(settings), Moments(start)

    def update(self, odds: Tensor, gradient: Tensor) -> None:
        """One step."""
        gradient = probability_gradient(odds, gradient) + self.regulariser.gradient(self.point)
        self.point = (self.point - self.rate * self.moments.direction(gradient)).clamp(0, 1)

    @property
    def result(self) -> Tensor:
        """The last iterate."""
        return self.point


class Sequential:
    """Sequential convex programming on a plane through the log-odds.

    The plane's slope is averaged over the last few evaluations, which irons out the shifts and the rough
    gradients of rectifier networks; the probability's own curve, a sigmoid, is kept. The neighbourhood is a
    box that shrinks tenfold over the run. At first the L1 weight is low, so that the search finds what may go
    before it gives back what need not; without this, it ends in the nearest of many minima. A network more
    certain than sigmoid(4) is modelled as that certain: where the sigmoid is flat, no step would seem to pay.
    """

    redraws = True
    memory = 0.7, 0.85
    """Share of the averaged slope that is kept, at the first step and at the last."""
    radius = 0.3, 0.03
    """Half a side of the box, at the first step and at the last."""
    ease, eased = 0.05, 0.6
    """What the L1 weight is multiplied by at first, and the share of the run after which it is whole."""
    certain = 4.0
    inner, rate = 100, 0.05
    """Adam's steps on the model and the largest of them; they cost no network evaluation."""

    def __init__(self, start: Tensor, settings: MaskSettings) -> None:
        self.point, self.steps, self.taken = start, settings.steps, 0
        self.regulariser = Regulariser.of(settings)
        self.slope, self.weight = torch.zeros_like(start), 0.0
        self.last: list[Tensor] = []

    def update(self, odds: Tensor, gradient: Tensor) -> None:
        """Move the plane, then go to the minimum of the model around the current point."""
        done = self.taken / self.steps
        kept = self.memory[0] + (self.memory[1] - self.memory[0]) * done
        self.slope = kept * self.slope + (1 - kept) * gradient
        self.weight = kept * self.weight + 1 - kept
        self.point = self._solve(odds.clamp(max=self.certain), self.slope / self.weight, done)
        self.taken += 1
        self.last = [*self.last, self.point][-max(1, self.steps // 12) :]

    @property
    def result(self) -> Tensor:
        """The mean of the last twelfth of the iterates, which the box has drawn close together."""
        return torch.stack(self.last).mean(0) if self.last else self.point

    def _solve(self, odds: Tensor, slope: Tensor, done: float) -> Tensor:
        eased = self.ease ** max(0.0, 1 - done / self.eased)
        regulariser = replace(self.regulariser, l1=self.regulariser.l1 * eased)
        radius = self.radius[0] * (self.radius[1] / self.radius[0]) ** done
        low, high = (self.point - radius).clamp(min=0), (self.point + radius).clamp(max=1)
        masks, moments = self.point, Moments(self.point, square_decay=0.99)
        for step in range(1, self.inner + 1):
            model = odds + dot(slope, masks - self.point)
            gradient = probability_gradient(model, slope) + regulariser.gradient(masks)
            rate = min(self.rate, radius) * (1 - step / (self.inner + 1))
            masks = torch.clamp(masks - rate * moments.direction(gradient), low, high)
        return masks


class ProjectedLBFGS:
    """L-BFGS (Nocedal 1980) on the cells that are free to move, with backtracking mask by mask.

    A line search compares values, so all evaluations share one draw of shift and noise. A failed trial
    costs its evaluation, as it must when evaluations are counted.
    """

    redraws = False
    memory, first = 10, 0.1

    def __init__(self, start: Tensor, settings: MaskSettings) -> None:
        self.point = self.accepted = start
        self.regulariser = Regulariser.of(settings)
        self.value = start.new_full((len(start),), float("inf"))
        self.gradient, self.direction = torch.zeros_like(start), torch.zeros_like(start)
        self.length = torch.ones_like(self.value)
        self.moves = self.turns = start.new_zeros(self.memory, *start.shape)

    def update(self, odds: Tensor, gradient: Tensor) -> None:
        """Accept the trial point where it descends enough, else halve the step; then the next trial."""
        value = odds.sigmoid() + self.regulariser.value(self.point)
        gradient = probability_gradient(odds, gradient) + self.regulariser.gradient(self.point)
        enough = self.value + 1e-4 * dot(self.gradient, self.point - self.accepted).clamp(max=0)
        descends = value <= enough
        self._remember(gradient, descends & self.value.isfinite())
        self.accepted = torch.where(spread(descends), self.point, self.accepted)
        self.gradient = torch.where(spread(descends), gradient, self.gradient)
        self.value = torch.where(descends, value, self.value)
        self.direction = torch.where(spread(descends), self._downhill(), self.direction)
        self.length = torch.where(descends, 1.0, self.length / 2)
        self.point = (self.accepted + spread(self.length) * self.direction).clamp(0, 1)

    @property
    def result(self) -> Tensor:
        """The best point met."""
        return self.accepted

    def _remember(self, gradient: Tensor, descends: Tensor) -> None:
        move, turn = self.point - self.accepted, gradient - self.gradient
        curved = spread(descends & (dot(move, turn) > 1e-10 * dot(turn, turn)))
        self.moves = torch.where(curved, torch.cat([self.moves[1:], move[None]]), self.moves)
        self.turns = torch.where(curved, torch.cat([self.turns[1:], turn[None]]), self.turns)

    def _downhill(self) -> Tensor:
        """Minus the inverse Hessian's estimate times the gradient of the free cells, by the two-loop recursion."""
        outward = ((self.accepted <= 0) & (self.gradient > 0)) | ((self.accepted >= 1) & (self.gradient < 0))
        free = self.gradient.masked_fill(outward, 0)
        inverse = [spread(_inverse(dot(s, y))) for s, y in zip(self.moves, self.turns, strict=True)]
        q, shares = free, []
        for s, y, rho in reversed(list(zip(self.moves, self.turns, inverse, strict=True))):
            shares.append(rho * spread(dot(s, q)))
            q = q - shares[-1] * y
        scale = dot(self.moves[-1], self.turns[-1]) * _inverse(dot(self.turns[-1], self.turns[-1]))
        unscaled = self.first * _inverse(free.abs().flatten(1).amax(1))
        q = spread(torch.where(scale > 0, scale, unscaled)) * q
        for s, y, rho in zip(self.moves, self.turns, inverse, strict=True):
            q = q + s * (shares.pop() - rho * spread(dot(y, q)))
        q = q.masked_fill(outward, 0)
        uphill = dot(q, free) <= 0
        return -torch.where(spread(uphill), spread(unscaled) * free, q)


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 for 0: a slot of the memory not yet filled does nothing."""
    return torch.where(values == 0, 0, 1 / values.where(values != 0, 1))


DESCENTS: dict[str, Callable[[Tensor, MaskSettings], Descent]] = {
    "sequential": Sequential,
    "adam": Adam,
    "lbfgs": ProjectedLBFGS,
}
