from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sanity
from sanity import images, models, observation
from sanity.observation import Descriptions, Seen
from sanity.plan import Plan
from sanity.randomization import Draws, randomized, reinitialiser
from sanity.run import resolve_stages, run
from sanity.stages import derived
from tests.conftest import Awkward, seeded

COLUMNS = [
    "model",
    "order",
    "seed",
    "stage_index",
    "stage",
    "method",
    "similarity",
    "image",
    "target",
    "value",
    "status",
]


def check(network: nn.Module, pictures: Tensor, **choices: object) -> pd.DataFrame:
    return sanity.check(network, pictures, similarities=["spearman", "spearman_abs"], precision="float64", **choices)


def test_rows_are_long_form_one_a_picture(awkward: nn.Module, pictures: Tensor) -> None:
    rows = check(awkward, pictures, methods=["gradient", "edges"], orders=["cascading", "independent"], seeds=[0, 4])
    assert list(rows.columns) == COLUMNS
    assert len(rows) == 3 * 2 * 2 * 2 * 2 * 5
    assert rows["stage"].unique().tolist() == ["trained", "head", "right", "left", "stem.0"]
    assert rows["value"].dtype == np.float64
    assert rows.attrs["untouched_parameters"] == ["unused.weight", "unused.bias"]
    assert list(rows.attrs["stages"]) == list(rows["stage"].unique()[1:])
    assert {name for names in rows.attrs["stages"].values() for name in names} >= {"stem.0.weight", "head.bias"}
    assert set(rows["image"]) == {"image-000", "image-001", "image-002"}


def test_a_value_is_the_rank_correlation_of_the_two_gradients(awkward: nn.Module, pictures: Tensor) -> None:
    """The whole path by hand: other weights put in, autograd, scipy."""
    rows = check(awkward, pictures, methods=["gradient"], seeds=[4])
    targets = awkward(pictures).argmax(1)

    def maps() -> Tensor:
        x = pictures.clone().requires_grad_()
        awkward(x)[torch.arange(3), targets].sum().backward()
        return x.grad.sum(1)

    before = maps()
    draws = Draws(reinitialiser("variance_scaling"))
    with randomized(awkward, derived(awkward, pictures[:1]), "cascading", 4, draws) as visits:
        next(visit for visit in visits if visit.index == 2)
        after = maps()
    found = rows[(rows.similarity == "spearman") & (rows.stage_index == 2)]
    want = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(before.numpy(), after.numpy(), strict=True)]
    np.testing.assert_allclose(found["value"], want, rtol=0, atol=1e-12)
    assert found["target"].tolist() == targets.tolist()


def test_stage_zero_is_the_trained_network_itself(awkward: nn.Module, pictures: Tensor) -> None:
    rows = check(awkward, pictures, samples=3, mask_steps=2)
    control = rows[(rows.stage_index == 0) & (rows.status == "ok")]
    same, random = control[control.method != "random"], control[control.method == "random"]
    np.testing.assert_allclose(same["value"], 1, rtol=0, atol=1e-12)
    # A map that is chance alone is not even like itself.
    assert random["value"].abs().max() < 0.3
    assert set(control["stage"]) == {"trained"}


# A mask's map has plateaus, where rounding alone decides ranks: it is compared by what moves as rounding does.
@pytest.mark.parametrize(
    ("names", "similarity"),
    [
        (["gradient", "smoothgrad", "guided_backprop", "integrated_gradients", "random"], "spearman_abs"),
        (["gradient", "meaningful_perturbation", "edges"], "ssim"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 64])
def test_scores_do_not_depend_on_batch_size(
    awkward: nn.Module, pictures: Tensor, size: int, names: list[str], similarity: str
) -> None:
    choices = {"methods": names, "similarities": [similarity], "samples": 3, "mask_steps": 3, "precision": "float64"}
    whole = sanity.check(awkward, pictures, **choices)
    again = sanity.check(awkward, pictures, **choices, batch_size=size)
    np.testing.assert_allclose(again["value"], whole["value"], rtol=0, atol=1e-9)


def test_scores_do_not_depend_on_which_other_pictures_ran(awkward: nn.Module, pictures: Tensor) -> None:
    whole = check(awkward, pictures, methods=["smoothgrad", "random"], samples=3)
    alone = check(awkward, pictures[:1], methods=["smoothgrad", "random"], samples=3)
    first = whole[whole.image == "image-000"]
    np.testing.assert_allclose(alone["value"], first["value"], rtol=0, atol=1e-12)


def test_more_pictures_than_a_chunk_are_all_scored(awkward: nn.Module, pictures: Tensor) -> None:
    rows = check(awkward, pictures.repeat(4, 1, 1, 1)[:11], methods=["gradient"])
    assert rows["image"].nunique() == 11
    values = rows.pivot_table(index=["stage_index", "similarity"], columns="image", values="value")
    np.testing.assert_allclose(values["image-009"], values["image-000"], rtol=0, atol=1e-9)


def test_the_explained_class_is_fixed_given_or_predicted_anew(awkward: nn.Module, pictures: Tensor) -> None:
    predicted = awkward(pictures).argmax(1).tolist()
    fixed = check(awkward, pictures, methods=["gradient"])
    assert fixed.groupby("image")["target"].unique().map(list).tolist() == [[t] for t in predicted]
    given = check(awkward, pictures, methods=["gradient"], labels=[3, 2, 1])
    assert given.groupby("image")["target"].unique().map(list).tolist() == [[3], [2], [1]]
    one = check(awkward, pictures, methods=["gradient"], target="2")
    assert set(one["target"]) == {2}
    anew = check(awkward, pictures, methods=["gradient"], target="repredicted", reinit="normal:1", seeds=[1])
    with randomized(awkward, derived(awkward, pictures[:1]), "cascading", 1, Draws(reinitialiser("normal:1"))) as steps:
        want = [awkward(pictures).argmax(1).tolist() for _ in steps]
    got = anew[anew.similarity == "spearman"].groupby("stage_index")["target"].apply(list).tolist()
    assert got == want
    assert len({tuple(t) for t in want}) > 1


def test_labels_out_of_range_are_refused(awkward: nn.Module, pictures: Tensor) -> None:
    with pytest.raises(ValueError, match="class 4 of image 'image-001': the network has 4 classes"):
        check(awkward, pictures, methods=["gradient"], labels=[0, 4, 0])


def test_a_callable_is_a_method_and_sees_what_the_others_see(awkward: nn.Module, pictures: Tensor) -> None:
    def mine(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        x = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(x)[torch.arange(len(x)), targets].sum(), x)
        return found

    rows = check(awkward, pictures, methods=["gradient", mine])
    names = rows["method"].unique().tolist()
    assert names[1].endswith("mine")
    mean = rows.pivot_table(index=["stage_index", "similarity", "image"], columns="method", values="value")
    np.testing.assert_allclose(mean["gradient"], mean[names[1]], rtol=0, atol=1e-12)


def test_a_method_must_suit_the_network(pictures: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="'guided_backprop' does not suit this network: it runs no rectifier"):
        check(network.double(), pictures, methods=["guided_backprop"])


def test_constant_and_broken_maps_are_counted_not_scored(awkward: nn.Module, pictures: Tensor) -> None:
    def flat(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.ones_like(images)

    def broken(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return images / 0

    rows = check(awkward, pictures, methods=[flat, broken])
    status = {str(name).split(".")[-1]: set(part["status"]) for name, part in rows.groupby("method")}
    assert status == {"flat": {"constant map"}, "broken": {"non-finite map"}}
    assert rows["value"].isna().all()


def test_the_model_may_be_on_its_own_terms(pictures: Tensor) -> None:
    network = seeded(Awkward).train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    check(network, pictures, methods=["gradient"])
    assert network.training
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())


def test_steps_already_done_are_not_taken_again(awkward: nn.Module, pictures: Tensor) -> None:
    from sanity import images, models
    from sanity.plan import Plan

    plan = Plan(methods=("gradient",), similarities=("spearman",), precision="float64")
    classifier, shown = models.of_network(awkward), images.tensors(pictures)
    stages = derived(awkward, pictures[:1])
    steps = list(run(plan, classifier, shown, stages))
    done = frozenset(step.key for step in steps[:3])
    rest = list(run(plan, classifier, shown, stages, done=done))
    assert [step.key for step in rest] == [step.key for step in steps[3:]]
    assert [step.scores for step in rest] == [step.scores for step in steps[3:]]
    assert not list(run(plan, classifier, shown, stages, done=frozenset(step.key for step in steps)))


def test_predictions_tell_what_the_network_says(awkward: nn.Module, pictures: Tensor) -> None:
    from sanity import images, models
    from sanity.plan import Plan

    plan = Plan(methods=("edges",), similarities=("spearman",), precision="float64")
    first = next(run(plan, models.of_network(awkward), images.tensors(pictures), derived(awkward, pictures[:1])))
    probabilities = F.softmax(awkward(pictures), 1).detach()
    for said, row in zip(first.predictions, probabilities, strict=True):
        assert said.top1 == said.target == int(row.argmax())
        assert said.top1_probability == pytest.approx(float(row.max()), abs=1e-15)
        assert said.finite


def rolled_by_hand(network: nn.Module, pictures: Tensor) -> list[float]:
    x = pictures.clone().requires_grad_()
    network(x).max(1).values.sum().backward()
    maps = x.grad.sum(1).numpy()
    return [spearmanr(maps[n].ravel(), maps[n - 1].ravel()).statistic for n in range(len(maps))]


def test_what_maps_of_different_pictures_show_travels_with_the_rows(awkward: nn.Module, pictures: Tensor) -> None:
    rows = check(awkward, pictures, methods=["gradient"], orders=["cascading", "independent"])
    unrelated = pd.DataFrame(rows.attrs["unrelated"])
    found = unrelated[(unrelated.similarity == "spearman") & (unrelated.order == "cascading")]
    np.testing.assert_allclose(found["value"], rolled_by_hand(awkward, pictures), rtol=0, atol=1e-12)
    judged = sanity.verdicts(rows)
    assert judged["null_high"].notna().all()


def test_planted_explainers_get_the_verdicts_they_deserve() -> None:
    """A picture's edges fail, chance is uninformative, the gradient of a small net passes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 - 1
    network = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 28 * 28, 5)
        )
    )

    def chance(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.randn_like(images)

    methods = ["gradient", "edges", chance]
    rows = sanity.check(network, images, methods=methods, similarities=["spearman"], seeds=[0, 1], precision="float64")
    judged = sanity.verdicts(rows).set_index("method")
    name = next(method for method in judged.index if method.endswith("chance"))
    assert judged.loc["gradient", "verdict"] == "pass"
    assert judged.loc["edges", "verdict"] == "fail"
    assert judged.loc[name, "verdict"] == "inconclusive"
    assert "uninformative" in judged.loc[name, "reason"]


def test_data_randomization_puts_the_other_network_in_its_place(pictures: Tensor, tmp_path: object) -> None:
    network, other = seeded(Awkward, 0), seeded(Awkward, 1)
    path = f"{tmp_path}/permuted.pth"
    torch.save(other.state_dict(), path)
    rows = check(network, pictures, methods=["gradient"], orders=["data"], against=path)
    assert rows["stage"].unique().tolist() == ["trained", "permuted labels"]
    targets = network(pictures).argmax(1)

    def maps(model: nn.Module) -> Tensor:
        x = pictures.clone().requires_grad_()
        model(x)[torch.arange(3), targets].sum().backward()
        return x.grad.sum(1)

    want = [
        spearmanr(a.ravel(), b.ravel()).statistic
        for a, b in zip(maps(network).numpy(), maps(other).numpy(), strict=True)
    ]
    found = rows[(rows.stage_index == 1) & (rows.similarity == "spearman")]
    np.testing.assert_allclose(found["value"], want, rtol=0, atol=1e-12)


def test_another_networks_weights_are_refused_for_data_randomization(pictures: Tensor, tmp_path: object) -> None:
    path = f"{tmp_path}/other.pth"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"file other.pth is not for this network: for .* it has none"):
        check(seeded(Awkward), pictures, methods=["gradient"], orders=["data"], against=path)
    with pytest.raises(ValueError, match="the order data and --against FILE"):
        check(seeded(Awkward), pictures, methods=["gradient"], orders=["data"])


def test_the_foreground_alone_can_be_compared(awkward: nn.Module, pictures: Tensor) -> None:
    dark = pictures.clone()
    dark[:, :, :9] = 0
    names = ["spearman_abs", "spearman_abs_foreground"]
    rows = sanity.check(awkward, dark, methods=["gradient_x_input"], similarities=names, precision="float64")
    last = rows[rows.stage_index == 4].groupby("similarity")["value"].mean()
    # The pixels at the baseline are ties at the bottom in both maps, and lift the whole picture's correlation.
    assert last["spearman_abs"] > 0.5
    assert last["spearman_abs_foreground"] < last["spearman_abs"] - 0.2


def test_display_maps_are_small_and_scaled() -> None:
    from sanity.attributions import Inputs
    from sanity.observation import Seen, panels_of

    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 250, 180, generator=generator)
    maps[1] = 0
    inputs = Inputs(maps, torch.zeros(2, dtype=torch.long), ("a", "b"))
    shown = panels_of(Seen(inputs, torch.zeros(2, 2), {"mine": maps}), 2)
    assert shown["a", "mine"].shape == (84, 60)
    summed = maps[0].sum(0)
    scaled = (summed / np.percentile(summed.abs().numpy(), 99)).clamp(-1, 1) * 127
    assert shown["a", "mine"][0, 0] == pytest.approx(float(scaled[:3, :3].mean()), abs=0.51)
    assert (shown["b", "mine"] == -128).all()
    assert set(panels_of(Seen(inputs, torch.zeros(2, 2), {"mine": maps}), 1)) == {("a", "mine")}
    assert not panels_of(Seen(inputs, torch.zeros(2, 2), {"mine": maps}), -8)


def test_a_network_that_writes_to_its_input_is_refused(awkward: nn.Module, pictures: Tensor) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = awkward

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.sub_(0.5))

    before = pictures.clone()
    for method in ("edges", "gradient"):
        with pytest.raises(ValueError, match="the network changes its input in place"):
            sanity.check(InPlace(), pictures, methods=[method], precision="float64")
    assert torch.equal(pictures, before)


@pytest.mark.parametrize(
    ("model", "images", "choices", "words"),
    [
        ("foo", torch.zeros(1, 3, 5, 5), {}, "model must be a torch.nn.Module, not a str"),
        (nn.Flatten(), [1, 2], {}, "images must be a tensor"),
        (nn.Flatten(), torch.zeros(1, 3, 5, 5), {"batch_size": 0}, "batch_size must be at least 1"),
        (
            nn.Flatten(),
            torch.zeros(1, 3, 5, 5),
            {"method": "gradient"},
            "unknown choice 'method'; did you mean methods",
        ),
        (nn.Linear(2, 2), torch.zeros(1, 3, 5, 5), {"precision": "tf32"}, "tf32 is what a GPU's products"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_words(
    model: object, images: object, choices: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        sanity.check(model, images, **choices)


def test_one_method_may_be_named_alone(awkward: nn.Module, pictures: Tensor) -> None:
    assert set(check(awkward, pictures, methods="gradient")["method"]) == {"gradient"}


def test_fresh_noise_is_another_at_every_stage(pictures: Tensor) -> None:
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3, bias=False), nn.Linear(3, 2, bias=False)
    network = nn.Sequential(*layers).double()
    network(pictures[:1].double())
    for layer in network[3:]:
        nn.init.constant_(layer.weight, 1.0)
    # Shuffling a constant changes nothing: what differs after it is the noise alone.
    ways = {
        "methods": ["gradient", "smoothgrad:samples=3"],
        "stages": {"last": ["4"], "first": ["3"]},
        "reinit": "permute",
    }
    shared, fresh, again = (check(network, pictures, fresh_noise=on, **ways) for on in (False, True, True))
    assert (shared["value"] > 1 - 1e-12).all()
    pd.testing.assert_frame_equal(fresh, again)
    smooth = fresh["method"] == "smoothgrad"  # at stage 0, too: a second look at the trained network
    assert (fresh["value"][~smooth] > 1 - 1e-12).all()
    assert (fresh["value"][smooth] < 0.999).all()
    first, second = (fresh["value"][smooth & (fresh["stage"] == name)].to_numpy() for name in ("last", "first"))
    assert (first != second).all()


class Products(TorchDispatchMode):
    """Counts the rows that are multiplied by a matrix, in this thread."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.rows += len(out) if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) else 0
        return out


def test_the_trained_pass_is_run_once_for_its_own_maps_and_the_first_step() -> None:
    layers, samples, width = 4, 30, 48
    network = nn.Sequential(nn.Flatten(), *(nn.Linear(width, width, bias=False) for _ in range(layers))).double()
    classifier = replace(models.of_network(network), reentrant=False)
    plan = Plan(methods=(f"smoothgrad:samples={samples}",), similarities=("spearman",), precision="float64")
    shown = images.tensors(torch.rand(1, 3, 4, 4, dtype=torch.float64))
    stages = resolve_stages(plan, classifier, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    with Products() as counted:
        assert len(list(run(plan, classifier, shown, stages, batch_size=samples))) == 1 + layers
    # Forward, a step whose top k layers are random runs k; backward all run all. Single looks at the image come to it.
    forward, backward = layers + sum(range(1, layers + 1)), (layers + 1) * layers
    assert 0 <= counted.rows - samples * (forward + backward) < layers * samples / 2


def test_the_trained_maps_are_described_once(
    awkward: nn.Module, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[tuple[str, ...]] = []
    describe = observation.describe

    def watched(plan: Plan, seen: Seen, *rest: Any) -> Descriptions:
        described.append(tuple(seen.maps))
        return describe(plan, seen, *rest)

    monkeypatch.setattr(observation, "describe", watched)
    methods = ("gradient", "random", "edges")
    found = check(awkward, pictures, methods=methods, orders=("cascading", "independent"), seeds=(0, 1), stages=2)
    untouched = found[found["stage_index"] == 0].groupby("method")["value"]
    assert untouched.min()["gradient"] > 1 - 1e-12
    assert untouched.max()["random"] < 0.9
    # What draws anew is looked at twice. Then come two steps in two orders under two seeds.
    assert described == [methods, ("random",), *[methods] * 8]
