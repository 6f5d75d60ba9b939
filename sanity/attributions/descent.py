"""Descents in a box [0, 1] for a batch of independent problems, one network evaluation an update."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Descent(Protocol):
    """`point` is where to evaluate next; `update` takes what was found there; `result` is the answer so far.

    All tensors are (N, ...) with one problem a row, and no row looks at another.
    """

    point: Tensor

    def update(self, value: Tensor, gradient: Tensor) -> None:
        """Move on, given the values (N,) and gradients (N, ...) at `point`."""

    @property
    def result(self) -> Tensor:
        """The minimiser as far as it is known, in [0, 1]."""


class Adam:
    """Adam (Kingma and Ba 2015), clamped to the box after each step."""

    def __init__(self, start: Tensor, learning_rate: float) -> None:
        self.point, self.rate, self.steps = start, learning_rate, 0
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)

    def update(self, value: Tensor, gradient: Tensor) -> None:
        """One step."""
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.steps), self.square / (1 - 0.999**self.steps)
        self.point = (self.point - self.rate * mean / (square.sqrt() + 1e-8)).clamp(0, 1)

    @property
    def result(self) -> Tensor:
        """The last iterate."""
        return self.point
