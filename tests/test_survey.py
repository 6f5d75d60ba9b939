"""LRP and DeepLIFT before a run: what no rule covers is refused, and the layer is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sanity import attributions
from sanity.run import refuse_unsuited


class Odd(nn.Module):
    """A network whose `odd` layer does what a test gives it."""

    def __init__(self, odd: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.odd, self.head = nn.Linear(3 * 17 * 15, 6), Calling(odd), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self.first(x.flatten(1))))


class Calling(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


BATCHED = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.BatchNorm1d(2, track_running_stats=False), nn.Flatten())
REFUSED = {
    "softmax": (lambda x: x.softmax(1), "odd' runs softmax, for which there is no rule"),
    "layer norm": (lambda x: F.layer_norm(x, (6,)), "odd' runs layer_norm, for which there is no rule"),
    "gate": (lambda x: x * x.tanh(), r"odd' multiplies activations with each other \(mul\)"),
    "attention": (lambda x: x @ x.T @ x, r"odd' multiplies activations with each other \(matmul\)"),
    "quotient": (lambda x: torch.ones(()) / x, r"odd' (runs rdiv|divides by an activation)"),
    "batch statistics": (BATCHED, "odd.call.1' normalises by the batch's own statistics"),
    "out of sight": (Doubling.apply, "head' uses what was computed out of sight"),
}


@pytest.mark.parametrize("method", ["lrp_epsilon", "deeplift"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_rule_covers_is_refused_naming_the_layer(pictures: Tensor, method: str, name: str) -> None:
    odd, words = REFUSED[name]
    network = Odd(odd).double().eval()
    with pytest.raises(ValueError, match=f"method '{method}' does not suit this network: layer '{words}"):
        refuse_unsuited([attributions.find(method)], network, pictures[:1])
    with pytest.raises(ValueError, match=f"layer '1.{words}"):
        refuse_unsuited([attributions.find(f"frozen:{method}")], nn.Sequential(nn.ReLU(), network), pictures[:1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_lrp_alone_refuses_activations_that_are_not_nothing_at_zero(pictures: Tensor) -> None:
    network = Odd(torch.sigmoid).double()
    refuse_unsuited([attributions.find("deeplift")], network, pictures[:1])
    with pytest.raises(ValueError, match="layer 'odd' runs sigmoid, for which there is no rule"):
        refuse_unsuited([attributions.find("lrp_epsilon")], network, pictures[:1])


def test_a_network_that_nobody_can_look_into_is_refused(pictures: Tensor) -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubling.apply(x.mean((2, 3)))

    with pytest.raises(ValueError, match="its logits were computed out of sight"):
        refuse_unsuited([attributions.find("deeplift")], Whole(), pictures[:1])
