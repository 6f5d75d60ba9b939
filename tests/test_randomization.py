from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from sanity import randomization
from sanity.randomization import Draws, guarded, randomized, reinitialiser, steps
from sanity.stages import Stage, derived, untouched
from tests.conftest import Awkward, seeded

EXAMPLE = torch.zeros(1, 3, 9, 9, dtype=torch.float64)


def draws(name: str = "variance_scaling", redraw: bool = False) -> Draws:
    return Draws(reinitialiser(name), redraw)


def layers(network: nn.Module) -> tuple[Stage, ...]:
    return derived(network, EXAMPLE, "layer")


def values(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def identity(network: nn.Module) -> list[tuple[object, ...]]:
    """Everything that must be the same object, storage or flag afterwards."""
    tensors = [*network.named_parameters(), *network.named_buffers()]
    flags = [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in tensors]
    return [*flags, *[(name, module.training) for name, module in network.named_modules()]]


@given(
    order=st.sampled_from(["cascading", "independent", "bottom_up"]),
    name=st.sampled_from(["variance_scaling", "normal:0.01", "uniform:-1:1", "permute", "module"]),
    reset=st.booleans(),
    redraw=st.booleans(),
    stop=st.integers(0, 5),
    error=st.sampled_from([RuntimeError, KeyboardInterrupt, None]),
    mischief=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_network_leaves_as_it_came(
    order: str, name: str, reset: bool, redraw: bool, stop: int, error: type[BaseException] | None, mischief: bool
) -> None:
    network = seeded(Awkward)
    network.stem.train()
    network.left.weight.requires_grad_(False)
    before, same = values(network), identity(network)

    def walk() -> None:
        with guarded(network), randomized(network, layers(network), order, 3, draws(name, redraw), reset) as visits:
            for visit in visits:
                if mischief:
                    network.train()
                    network(torch.randn(2, 3, 9, 9, dtype=torch.float64))
                if error and visit.index == stop:
                    raise error("stopped")

    if error and stop < 5:
        with pytest.raises(error, match="stopped"):
            walk()
    else:
        walk()
    assert identity(network) == same
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_steps_of_each_order() -> None:
    a, b, c = (Stage(name, (name,)) for name in "abc")

    def names(order: str) -> list[tuple[str, str]]:
        return [(stage.name, "".join(s.name for s in random)) for stage, random in steps([a, b, c], order)]

    assert names("cascading") == [("trained", ""), ("a", "a"), ("b", "ab"), ("c", "abc")]
    assert names("independent") == [("trained", ""), ("a", "a"), ("b", "b"), ("c", "c")]
    assert names("bottom_up") == [("trained", ""), ("c", "c"), ("b", "cb"), ("a", "cba")]
    with pytest.raises(ValueError, match="unknown order 'cascade'; did you mean cascading"):
        steps([a], "cascade")


@pytest.mark.parametrize("order", ["cascading", "independent", "bottom_up"])
def test_exactly_the_random_stages_differ(awkward: nn.Module, order: str) -> None:
    trained, stages = values(awkward), layers(awkward)
    with randomized(awkward, stages, order, 0, draws("normal:0.5")) as visits:
        for visit in visits:
            random = {name for stage in visit.random for name in stage.parameters}
            changed = {n for n, p in awkward.named_parameters() if not torch.equal(p, trained[n])}
            assert changed == random
            assert visit.unchanged == ()
            assert {n for n, b in awkward.named_buffers() if not torch.equal(b, trained[n])} == set()


def test_what_was_not_really_randomized_is_counted(awkward: nn.Module) -> None:
    with torch.no_grad():
        awkward.head.bias.zero_()
    with randomized(awkward, layers(awkward), "cascading", 0, draws()) as visits:
        assert [visit.unchanged for visit in visits][:2] == [(), ("head.bias",)]


def snapshot(network: nn.Module, order: str, seed: int, made: Draws) -> list[dict[str, Tensor]]:
    with randomized(network, layers(network), order, seed, made) as visits:
        return [values(network) for _ in visits]


def test_nested_draws_are_one_value_a_parameter_in_every_stage_and_order(awkward: nn.Module) -> None:
    cascade = snapshot(awkward, "cascading", 1, draws())
    assert torch.equal(cascade[1]["head.weight"], cascade[-1]["head.weight"])
    alone = snapshot(awkward, "independent", 1, draws())
    assert torch.equal(alone[2]["right.weight"], cascade[-1]["right.weight"])
    assert not torch.equal(snapshot(awkward, "cascading", 2, draws())[-1]["head.weight"], cascade[-1]["head.weight"])


def test_redrawn_stages_share_nothing_but_the_seed(awkward: nn.Module) -> None:
    first, second = (snapshot(awkward, "cascading", 1, draws(redraw=True)) for _ in range(2))
    assert not torch.equal(first[1]["head.weight"], first[2]["head.weight"])
    assert torch.equal(first[2]["head.weight"], second[2]["head.weight"])


def test_a_step_of_its_own_draws_is_drawn_once_while_memory_is_granted(
    awkward: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> tuple[int, list[dict[str, Tensor]]]:
        names, source = [], draws(redraw=True)
        plain = source.draw

        def counted(owner: nn.Module, name: str, value: Tensor, generator: torch.Generator) -> Tensor:
            names.append(name)
            return plain(owner, name, value, generator)

        source.draw = counted
        twice = [snapshot(awkward, "cascading", seed, source) for seed in (1, 1, 2, 1)]
        return len(names), [states[-1] for states in twice]

    few, kept = drawn()
    monkeypatch.setattr(randomization, "REDRAWN_BYTES", 0)
    many, anew = drawn()
    assert many * 3 == few * 4
    for one, other in zip(kept, anew, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_of_equal_shape_get_different_weights() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(243, 243), nn.Linear(243, 243)).double()
    last = snapshot(network, "cascading", 0, draws())[-1]
    assert not torch.equal(last["1.weight"], last["2.weight"])


def drawn(name: str, module: nn.Module, parameter: str = "weight") -> Tensor:
    trained = module.get_parameter(parameter).detach()
    return reinitialiser(name)(module, parameter, trained, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("module", "fan_in"),
    [
        (nn.Conv2d(8, 40, 5), 200),
        (nn.Conv2d(64, 64, 9, groups=64), 81),
        (nn.Linear(300, 60), 300),
        (nn.ConvTranspose2d(30, 12, 5), 750 // 25 * 25),
        (nn.MultiheadAttention(64, 2), 64),
    ],
)
def test_variance_scaling_is_the_released_truncated_normal(module: nn.Module, fan_in: int) -> None:
    name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    s = (2.6 / fan_in) ** 0.5
    values = drawn("variance_scaling", module, name).flatten().numpy()
    assert stats.kstest(values, stats.truncnorm(-2, 2, scale=s).cdf).pvalue > 0.01
    assert abs(values).max() <= 2 * s


def test_variance_scaling_sets_scales_to_one_and_biases_to_zero() -> None:
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    assert drawn("variance_scaling", norm).tolist() == [1.0] * 5
    assert drawn("variance_scaling", norm, "bias").tolist() == [0.0] * 5
    assert drawn("variance_scaling", nn.Linear(3, 4), "bias").tolist() == [0.0] * 4


@pytest.mark.parametrize(("name", "law"), [("normal:0.3", stats.norm(0, 0.3)), ("uniform:-1:2", stats.uniform(-1, 3))])
def test_normal_and_uniform_draw_from_their_laws(name: str, law: object) -> None:
    assert stats.kstest(drawn(name, nn.Linear(100, 100)).flatten().numpy(), law.cdf).pvalue > 0.01


def test_permutation_keeps_the_values() -> None:
    module = nn.Linear(50, 40)
    values = drawn("permute", module)
    assert not torch.equal(values, module.weight)
    assert torch.equal(values.flatten().sort().values, module.weight.flatten().sort().values)


@pytest.mark.parametrize(
    ("module", "parameter"),
    [(nn.Linear(60, 50), "weight"), (nn.Conv2d(7, 9, 3), "bias"), (nn.MultiheadAttention(16, 2), "in_proj_weight")],
)
def test_module_draws_as_the_module_itself_would(module: nn.Module, parameter: str) -> None:
    before = values(module)
    value = drawn("module", module, parameter)
    assert all(torch.equal(before[key], now) for key, now in module.state_dict().items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.Generator().manual_seed(0).initial_seed())
        (getattr(module, "reset_parameters", None) or module._reset_parameters)()
    assert torch.equal(module.get_parameter(parameter), value)


def test_a_module_that_cannot_reset_itself_is_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] @ self.factor

    network = Scale()
    stages: Sequence[Stage] = [Stage("all", ("factor",))]
    with randomized(network, stages, "cascading", 0, draws("module")) as visits:
        visits.enter(0)
        with pytest.raises(ValueError, match="cannot re-initialise factor: Scale has no reset_parameters"):
            visits.enter(1)


def test_running_statistics_stay_or_are_reset(awkward: nn.Module) -> None:
    trained = values(awkward)
    with randomized(awkward, layers(awkward), "cascading", 0, draws(), reset_statistics=True) as visits:
        *_, _ = visits
        assert awkward.stem[1].running_mean.tolist() == [0.0] * 6
        assert awkward.norm.running_var.tolist() == [1.0] * 6
    assert torch.equal(awkward.norm.running_var, trained["norm.running_var"])


def test_only_stages_with_the_norm_reset_it(awkward: nn.Module) -> None:
    stages = [stage for stage in layers(awkward) if stage.name == "head"]
    assert "norm.weight" in untouched(awkward, stages)
    with randomized(awkward, stages, "cascading", 0, draws(), reset_statistics=True) as visits:
        *_, _ = visits
        assert awkward.norm.running_var.tolist() != [1.0] * 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("varience_scaling", "unknown re-initialiser 'varience_scaling'; did you mean variance_scaling"),
        ("normal", "'normal' must read normal:SIGMA"),
        ("normal:0", "needs SIGMA > 0"),
        ("normal:nan", "with finite numbers"),
        ("uniform:2:1", "A < B"),
        ("uniform:a:b", "must read uniform:A:B"),
        ("permute:1", "must read permute"),
    ],
)
def test_nonsense_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reinitialiser(text)


def test_guarding_puts_a_network_into_evaluation_in_another_precision_and_back(awkward: nn.Module) -> None:
    awkward.train()
    before, same = values(awkward), identity(awkward)
    with guarded(awkward, "cpu", torch.float32):
        assert {p.dtype for p in awkward.parameters()} == {torch.float32}
        assert not any(module.training for module in awkward.modules())
        assert not any(p.requires_grad for p in awkward.parameters())
    assert identity(awkward) == same
    assert all(torch.equal(before[key], value) for key, value in awkward.state_dict().items())
