"""Named streams of randomness: every draw says what it is for, so none depends on another."""

import hashlib

import torch
from torch import Tensor


def stream(*parts: object) -> torch.Generator:
    """CPU generator seeded by the names of what is drawn, e.g. `stream(seed, image_id, "noise", i)`.

    The same parts give the same generator on every machine, whatever was drawn before.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def normal_like(x: Tensor, *parts: object) -> Tensor:
    """Standard normal draw of the shape of one image `x`, made on the CPU in float32, then moved."""
    return torch.randn(x.shape, generator=stream(*parts)).to(x)
