from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torchvision
from torch import Tensor, nn

from sanity import models
from sanity.stages import derived, execution_order, grouped, select, untouched, written_out


class Backwards(nn.Module):
    """Registered in the reverse of the order of execution."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)))


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=5
    ).eval()


def test_stages_follow_execution_not_registration() -> None:
    stages = derived(Backwards(), torch.zeros(1, 3, 1, 1))
    assert [stage.name for stage in stages] == ["last", "first"]


def test_asking_for_a_parameters_device_is_not_a_use_of_it() -> None:
    class Asks(Backwards):
        def forward(self, x: Tensor) -> Tensor:
            assert next(self.parameters()).device.type == "cpu"
            return super().forward(x)

    assert execution_order(Asks(), torch.zeros(1, 3, 1, 1))[0] == "first.weight"


def test_a_parameter_the_network_does_not_use_is_listed(awkward: nn.Module, pictures: Tensor) -> None:
    stages = derived(awkward, pictures[:1])
    assert untouched(awkward, stages) == ("unused.weight", "unused.bias")


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_every_parameter_of_a_vision_transformer_is_reached_once(granularity: str) -> None:
    network = small_vit()
    stages = derived(network, torch.zeros(1, 3, 16, 16), granularity)
    reached = [name for stage in stages for name in stage.parameters]
    assert sorted(reached) == sorted(name for name, _ in network.named_parameters())
    assert untouched(network, stages) == ()
    assert stages[0].parameters == ("heads.head.weight", "heads.head.bias")


def test_blocks_of_a_vision_transformer_are_its_encoder_layers() -> None:
    names = [stage.name for stage in derived(small_vit(), torch.zeros(1, 3, 16, 16))]
    layers = [name for name in names if "encoder_layer" in name]
    assert layers == [f"encoder.layers.encoder_layer_{i}" for i in (2, 1, 0)]


def test_blocks_of_a_residual_network_are_its_residual_blocks() -> None:
    network = torchvision.models.resnet18(weights=None).eval()
    names = [stage.name for stage in derived(network, torch.zeros(1, 3, 64, 64))]
    blocks = [f"layer{i}.{j}" for i in (4, 3, 2, 1) for j in (1, 0)]
    assert names == ["fc", *blocks, "conv1"]


def test_a_normalisation_joins_the_layer_beside_it(awkward: nn.Module, pictures: Tensor) -> None:
    stages = {stage.name: stage for stage in derived(awkward, pictures[:1], "layer")}
    assert stages["stem.0"].parameters == ("stem.0.weight", "stem.1.weight", "stem.1.bias")
    assert stages["stem.0"].norms == ("stem.1",)
    assert list(stages) == ["head", "right", "left", "stem.0"]


@pytest.mark.parametrize("name", ["inception_v3", "efficientnet_lite0", "vgg16", "resnet50", "mobilenet_v2"])
def test_stages_written_out_reach_everything_in_order_of_execution(name: str) -> None:
    entry = next(m for m in models.MODELS if m.name == name)
    network = entry.build(3).eval()
    stages = written_out(network, entry.stages)
    assert untouched(network, stages) == ()
    size = 299 if name == "inception_v3" else 64
    order = [
        n for n in execution_order(network, torch.zeros(1, 3, size, size)) if n in dict(network.named_parameters())
    ]
    first_use = [min(order.index(p) for p in stage.parameters) for stage in stages]
    assert all(later > earlier for later, earlier in pairwise(first_use))


def test_inception_has_the_seventeen_published_stages() -> None:
    entry = next(m for m in models.MODELS if m.name == "inception_v3")
    assert list(entry.stages) == ["Logits", *models.INCEPTION_BLOCKS]
    assert len(entry.stages) == 17
    assert entry.stages["Logits"] == ["fc"]


def test_members_may_be_modules_or_parameters(awkward: nn.Module) -> None:
    (stage,) = written_out(awkward, {"mine": ["stem", "left.weight"]})
    assert stage.parameters == ("stem.0.weight", "stem.1.weight", "stem.1.bias", "left.weight")
    assert stage.norms == ("stem.1",)


def test_a_member_that_names_nothing_is_refused_with_its_neighbour(awkward: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"stage 'mine': unknown module or parameter 'lefft'; did you mean left"):
        written_out(awkward, {"mine": ["lefft"]})


def test_a_parameter_in_two_stages_is_refused(awkward: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"left\.weight belongs to two stages, 'a' and 'b'"):
        written_out(awkward, {"a": ["left"], "b": ["left.weight"]})


def test_grouping_keeps_every_parameter_and_the_order(awkward: nn.Module, pictures: Tensor) -> None:
    stages = derived(awkward, pictures[:1], "layer")
    merged = grouped(stages, 2)
    assert [stage.name for stage in merged] == ["head..right", "left..stem.0"]
    assert sum((s.parameters for s in merged), ()) == sum((s.parameters for s in stages), ())
    with pytest.raises(ValueError, match="--stages 5: the network has 4 stages"):
        grouped(stages, 5)


def test_selection_keeps_the_networks_order(awkward: nn.Module, pictures: Tensor) -> None:
    stages = derived(awkward, pictures[:1], "layer")
    assert [stage.name for stage in select(stages, ["left", "head"])] == ["head", "left"]
    with pytest.raises(ValueError, match="unknown stage 'haed'; did you mean head"):
        select(stages, ["haed"])


def test_the_article_preset_randomizes_the_first_convolution_of_each_block() -> None:
    from sanity.plan import preset

    network = next(m for m in models.MODELS if m.name == "inception_v3").build(2).eval()
    stages = written_out(network, preset("article")["stages"])
    order = execution_order(network, torch.zeros(1, 3, 299, 299))
    assert [stage.name for stage in stages] == ["Logits", *models.INCEPTION_BLOCKS]
    for stage in stages[1:]:
        convolutions = [name for name in order if name.startswith(f"{stage.name}.") and name.endswith("conv.weight")]
        assert stage.parameters == (convolutions[0],)
