"""Number formats: what eight bits move, what they must not, and which products a GPU may round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sanity
from sanity.observation import arithmetic
from sanity.plan import Plan
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.stages import derived
from tests.conftest import Awkward, seeded


@pytest.mark.parametrize("method", ["gradient", "guided_backprop", "gradcam", "occlusion", "meaningful_perturbation"])
def test_bfloat16_moves_scores_little_and_leaves_the_network_alone(method: str) -> None:
    network = seeded(Awkward).float()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = (torch.rand(6, 3, 33, 33, generator=torch.Generator().manual_seed(4)) * 2 - 1).contiguous()
    choices = {"methods": [method], "similarities": ("spearman_abs", "ssim"), "mask_steps": 3}
    exact, rounded = (sanity.check(network, x, precision=precision, **choices) for precision in ("float32", "bfloat16"))
    index = ["stage", "method", "similarity"]
    means = [frame.groupby(index)["value"].mean() for frame in (exact, rounded)]
    assert (means[0] - means[1]).abs().max() < 0.1
    assert not exact["value"].equals(rounded["value"])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network(x).dtype == torch.float32


def test_random_weights_are_the_same_in_every_precision(awkward: nn.Module, pictures: Tensor) -> None:
    stages = derived(awkward, pictures[:1])
    drawn = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        draws = Draws(reinitialiser("normal:1"))
        with guarded(awkward, dtype=dtype), randomized(awkward, stages, "cascading", 4, draws) as walk:
            walk.enter(len(walk) - 1)
            drawn.append(awkward.left.weight.detach().double().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert_close(drawn[2], drawn[0], rtol=2**-8, atol=0)


def test_tf32_and_float32_say_what_products_are() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision, rounded in (("float32", False), ("tf32", True)):
        with arithmetic(Plan(precision=precision)):
            assert torch.backends.cuda.matmul.allow_tf32 is rounded
            assert torch.backends.cudnn.allow_tf32 is rounded
            assert torch.backends.cudnn.deterministic
    assert before == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
