"""What every method of the registry promises, whatever it computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sanity
from sanity import attributions
from sanity.attributions import METHODS, GradientMethod, Inputs, Method
from sanity.engine import Engine, part_of
from sanity.run import refuse_unsuited
from tests.conftest import seeded

SMALL = {"samples": 4, "steps": 3, "noisy_inputs": 2, "masks": 5, "positions": 3}
FROZEN = [f"frozen:{method.name}" for method in METHODS if isinstance(method, GradientMethod)]
NAMES = [method.name for method in METHODS] + FROZEN


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
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 17 * 15, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4))

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
    method = small(name)
    assert not method.unsuited(awkward, pictures[:1], method.options)


UNSUITED = {
    **dict.fromkeys(["guided_backprop", "deconvnet", "guided_gradcam", *FROZEN], "it runs no rectifier"),
    "gradcam": "it runs no convolution",
    "lrp_epsilon": "layer 'body.2' runs layer_norm, for which there is no rule",
    "deeplift": "layer 'body.2' runs layer_norm, for which there is no rule",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_that_would_not_be_itself_is_refused_before_the_run(pictures: Tensor, name: str) -> None:
    """A network without rectifiers, convolutions or rules: every method says no, or explains it."""
    network = seeded(Smooth)
    if name in UNSUITED:
        with pytest.raises(ValueError, match=f"method '{name}' does not suit this network: {UNSUITED[name]}"):
            refuse_unsuited([small("gradient"), small(name)], network, pictures[:1])
    else:
        refuse_unsuited([small(name)], network, pictures[:1])
        assert explain(network, inputs_of(pictures), name).isfinite().all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_run_of_all_leaves_the_network_as_it_was(awkward: nn.Module, pictures: Tensor) -> None:
    """From the door: every method, through a randomized stage, on a network in training mode."""
    awkward.train()
    before = snapshot(awkward)
    rows = sanity.check(
        awkward, pictures, methods=[small(name) for name in NAMES], stages=["head"],
        similarities=["spearman"], precision="float64",
    )  # fmt: skip
    after = snapshot(awkward)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert set(rows["method"]) == set(NAMES)
    changed = rows[(rows["stage_index"] == 1) & (rows["status"] == "ok")].groupby("method")["value"].min()
    same = changed[changed > 1 - 1e-9].index
    assert set(same) <= {"edges"}


@pytest.mark.parametrize("name", NAMES)
def test_the_network_is_evaluated_as_often_as_the_cost_says(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    """Forward and backward; forward alone a network also runs at baselines and at what freezes.

    One more picture is run to see what folds, and three to see whether it may.
    """
    method, seen = small(name), {True: 0, False: 0}

    def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[arguments[0].requires_grad] += len(arguments[0])

    handle = awkward.register_forward_pre_hook(count)
    explain(awkward, inputs_of(pictures), name)
    handle.remove()
    if isinstance(method, GradientMethod):
        assert seen[True] == 3 * method.cost + 4
        assert seen[False] <= 3 * method.cost * (name.startswith("frozen:") + ("deeplift" in name))
    else:
        assert sum(seen.values()) == 3 * method.cost + 4
