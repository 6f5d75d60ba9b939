"""What every method of the registry promises, whatever it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sanity import attributions
from sanity.attributions import METHODS, Inputs, Method
from sanity.engine import Engine, part_of
from sanity.run import refuse_unsuited
from tests.conftest import seeded

SMALL = {"samples": 4, "steps": 3, "noisy_inputs": 2, "masks": 5, "positions": 3}
NAMES = [method.name for method in METHODS]


def small(name: str) -> Method:
    method = attributions.find(name)
    return method.with_options(**{key: value for key, value in SMALL.items() if key in method.options})


def inputs_of(pixels: Tensor, seed: int = 5) -> Inputs:
    return Inputs(pixels, torch.tensor([2, 0, 3]), ("a", "b", "c"), seed, "trained")


def explain(network: nn.Module, inputs: Inputs, name: str, batch_size: int = 3) -> Tensor:
    return Engine([small(name)], batch_size).explain(network, inputs)[name]


class Smooth(nn.Module):
    """A network without a rectifier and without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 17 * 15, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_finite_and_of_the_pictures_size(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    maps = explain(awkward, inputs_of(pictures), name)
    assert maps.shape in {(3, 1, 17, 15), (3, 3, 17, 15)}
    assert maps.dtype == pictures.dtype
    assert not maps.requires_grad
    assert maps.isfinite().all()
    assert (maps.flatten(1).std(1) > 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_maps(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    inputs, state = inputs_of(pictures), torch.get_rng_state()
    first, again = (explain(awkward, inputs, name) for _ in range(2))
    assert torch.equal(first, again)
    other = explain(awkward, replace(inputs, seed=6), name)
    assert torch.equal(first, other) == attributions.find(name).deterministic
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_neither_batch_mates_nor_batch_size_matter(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    inputs = inputs_of(pictures)
    whole = explain(awkward, inputs, name)
    assert_close(explain(awkward, inputs, name, batch_size=2), whole, rtol=1e-9, atol=1e-12)
    assert_close(explain(awkward, part_of(inputs, 1, 2), name, batch_size=7), whole[1:2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_explained_class_matters_to_what_looks_at_the_network(
    awkward: nn.Module, pictures: Tensor, name: str
) -> None:
    inputs = inputs_of(pictures)
    other = explain(awkward, replace(inputs, targets=torch.tensor([1, 3, 2])), name)
    assert torch.equal(explain(awkward, inputs, name), other) == (name in attributions.CONTROLS)


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_left_as_it_was(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    pixels = pictures.clone()
    before = snapshot(awkward)
    explain(awkward, inputs_of(pixels), name)
    after = snapshot(awkward)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(pixels, pictures)
    assert not pixels.requires_grad


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    """Tensors, where they lie, flags, gradients and hooks of a network."""
    found = {key: value.clone() for key, value in network.state_dict().items()}
    found |= {f"{key} at": torch.tensor(value.data_ptr()) for key, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        found[f"{name} flags"] = torch.tensor([parameter.requires_grad, parameter.grad is None, id(parameter)])
    for name, module in network.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[f"{name} state"] = torch.tensor([module.training, len(vars(module)), *map(len, hooks)])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_run_on_the_network_is_not_refused(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    refuse_unsuited([small(name)], awkward, pictures[:1])


@pytest.mark.parametrize("name", ["guided_backprop"])
def test_a_method_that_would_not_be_itself_is_refused(pictures: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=f"method '{name}' does not suit this network: it runs no rectifier"):
        refuse_unsuited([small("gradient"), small(name)], seeded(Smooth), pictures[:1])


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_evaluated_as_often_as_the_cost_says(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    seen: list[int] = []
    handle = awkward.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    explain(awkward, inputs_of(pictures), name)
    handle.remove()
    looked = 1  # image, run once to see which BatchNorms fold
    assert sum(seen) == 3 * small(name).cost + looked
