from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import captum.attr
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sanity import attributions
from sanity.attributions import FunctionMethod, Inputs
from sanity.engine import Engine, logits_of, part_of, predict
from sanity.randomization import guarded

GRADIENTS = ("gradient", "smoothgrad", "gradient_x_input", "guided_backprop", "integrated_gradients")
TARGETS = torch.tensor([2, 0, 3])
IDS = ("a", "b", "c")


def inputs_of(pixels: Tensor) -> Inputs:
    return Inputs(pixels, TARGETS, IDS, seed=5)


def explain(
    network: nn.Module, inputs: Inputs, *names: str, batch_size: int = 4, samples: int = 6
) -> dict[str, Tensor]:
    methods = [attributions.find(name) for name in names]
    sized = [m.with_options(samples=samples) if "samples" in m.options else m for m in methods]
    with guarded(network):
        return Engine(sized, batch_size).explain(network, inputs)


class Counting(nn.Module):
    """Counts the images it is run on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.network(x)


def test_every_distinct_point_is_evaluated_once(awkward: nn.Module, pictures: Tensor) -> None:
    network = Counting(awkward)
    explain(network, inputs_of(pictures), "gradient", "gradient_x_input", "integrated_gradients", "smoothgrad")
    # 6 noisy points, 6 on the path, of which the last is the image itself and serves both gradients.
    # One more image is run to see which BatchNorms fold, and three to see whether folding is right.
    assert network.images == 3 * (6 + 6) + 4
    methods = [attributions.find(n).with_options(samples=6) for n in ("integrated_gradients", "smoothgrad")]
    assert Engine([*methods, attributions.find("gradient")], 4).cost == 12


def test_progress_counts_what_the_cost_promises(awkward: nn.Module, pictures: Tensor) -> None:
    told: list[int] = []
    names = (*GRADIENTS, "edges", "meaningful_perturbation:steps=3")
    engine = Engine([attributions.find(name) for name in names], 4, told.append)
    with guarded(awkward):
        engine.explain(awkward, inputs_of(pictures))
    assert sum(told) == engine.cost * 3


@pytest.mark.parametrize("name", GRADIENTS)
def test_maps_do_not_depend_on_batch_size_or_batch_mates(awkward: nn.Module, pictures: Tensor, name: str) -> None:
    inputs = inputs_of(pictures)
    whole = explain(awkward, inputs, name, batch_size=7)[name]
    for size in (1, 2, 100):
        assert_close(explain(awkward, inputs, name, batch_size=size)[name], whole, rtol=1e-11, atol=1e-13)
    alone = explain(awkward, part_of(inputs, 1, 2), name)[name]
    assert_close(alone, whole[1:2], rtol=1e-11, atol=1e-13)
    turned = Inputs(pictures.flip(0), TARGETS.flip(0), IDS[::-1], seed=5)
    assert_close(explain(awkward, turned, name)[name].flip(0), whole, rtol=1e-11, atol=1e-13)


def test_gradient_and_its_product_with_the_input_equal_captums(awkward: nn.Module, pictures: Tensor) -> None:
    found = explain(awkward, inputs_of(pictures), "gradient", "gradient_x_input")
    x = pictures.clone().requires_grad_()
    want = captum.attr.Saliency(awkward).attribute(x, target=TARGETS, abs=False)
    assert_close(found["gradient"], want, rtol=1e-12, atol=1e-14)
    assert_close(found["gradient_x_input"], want * pictures, rtol=1e-12, atol=1e-14)


def test_noise_is_the_images_own_and_the_same_in_every_chunk(awkward: nn.Module, pictures: Tensor) -> None:
    engine = Engine([attributions.find("smoothgrad:samples=3")], 4)
    inputs = inputs_of(pictures)
    with guarded(awkward):
        first = engine.explain(awkward, inputs)["smoothgrad"]
        engine.explain(awkward, part_of(inputs, 0, 1))
        again = engine.explain(awkward, inputs)["smoothgrad"]
        other = engine.explain(awkward, replace(inputs, seed=6))["smoothgrad"]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_map_of_another_shape_is_refused(awkward: nn.Module, pictures: Tensor) -> None:
    wrong = FunctionMethod("mine", "", call=lambda network, inputs: inputs.pixels[:, :, ::2], evaluations=lambda o: 1)
    with pytest.raises(ValueError, match=r"method 'mine' gave \(3, 3, 9, 15\) for \(3, 3, 17, 15\)"):
        Engine([wrong], 4).explain(awkward, inputs_of(pictures))


def test_a_method_from_outside_that_draws_is_seeded_by_image(awkward: nn.Module, pictures: Tensor) -> None:
    def noisy(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return images + torch.randn_like(images)

    method = attributions.outside("noisy", noisy)
    inputs, state = inputs_of(pictures), torch.get_rng_state()
    whole = Engine([method], 3).explain(awkward, inputs)["noisy"]
    assert torch.equal(Engine([method], 1).explain(awkward, inputs)["noisy"], whole)
    assert torch.equal(Engine([method], 3).explain(awkward, part_of(inputs, 2, 3))["noisy"], whole[2:])
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_may_come_wrapped_but_must_be_logits(pictures: Tensor) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=x.mean((2, 3)))

    assert_close(predict(Wrapped(), pictures, 2), pictures.mean((2, 3)))
    with pytest.raises(ValueError, match=r"must give \(N, classes\) logits for 3 images, not \(3, 3, 17, 15\)"):
        logits_of(nn.Identity(), pictures)


def test_inputs_must_agree_in_number(pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"differ in number: \(3, 3, 2\)"):
        Inputs(pictures, TARGETS, ("a", "b"))
