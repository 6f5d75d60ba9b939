"""What tests share: small networks of every awkward kind, and the data that may not be there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# One thread suffices for networks this small: more of them mostly wait for one another. Also for what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sanity  # noqa: F401  (before torch: it sets how OpenMP waits)

# isort: split
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED}")
    return SHARED


class Awkward(nn.Module):
    """Residual, branches, a reused clipped rectifier, functional and in-place ones, ceil-mode pooling."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, classes)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.left, self.right = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.clip = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        y = self.clip(self.left(x)) + torch.relu(self.right(x))
        y = self.clip(self.norm(y)) + x
        y = y.clamp(min=0)
        return self.head(y.mean((2, 3)))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network with known weights, in float64, its BatchNorm statistics not the trivial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make().double().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2.0)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return network


@pytest.fixture
def awkward() -> nn.Module:
    return seeded(Awkward)


@pytest.fixture
def pictures() -> Tensor:
    """Three images (3, 3, 17, 15) float64 in [-1, 1]; sides that pooling does not divide."""
    return torch.rand(3, 3, 17, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
