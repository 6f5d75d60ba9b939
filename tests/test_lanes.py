"""Micro-batches side by side: the same numbers, errors that come through, and the caller's threads left alone."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sanity
from sanity import attributions, images, models
from sanity.attributions import Inputs
from sanity.engine import Engine, State
from sanity.lanes import MOST, Lanes, suited
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.stages import derived

METHODS = ("gradient", "smoothgrad:samples=3", "guided_backprop", "frozen:gradient", "lrp_epsilon", "gradcam")
METHODS += ("meaningful_perturbation:steps=2", "occlusion", "rise:masks=8", "edges")


def explain(network: nn.Module, pictures: Tensor, count: int, batch_size: int = 2) -> list[dict[str, Tensor]]:
    told: list[int] = []
    inputs = Inputs(pictures, torch.tensor([2, 0, 3]), ("a", "b", "c"), seed=5)
    stages = derived(network, pictures[:1])
    with (
        closing(Lanes(count)) as lanes,
        guarded(network),
        randomized(network, stages, "cascading", 1, Draws(reinitialiser("normal:1"))) as walk,
    ):
        engine = Engine([attributions.find(name) for name in METHODS], batch_size, told.append, lanes=lanes)
        states = [State(lambda index=index: walk.enter(index), inputs) for index in range(len(walk))]
        found = [answer.maps for answer in engine.sweep(network, states, lambda: walk.enter(0))]
    assert sum(told) == engine.cost * len(pictures) * len(states)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_lanes_change_no_number(awkward: nn.Module, pictures: Tensor, count: int) -> None:
    for found, wanted in zip(explain(awkward, pictures, count), explain(awkward, pictures, 1), strict=True):
        for name, want in wanted.items():
            assert_close(found[name], want, rtol=1e-11, atol=1e-13)


def test_whole_runs_are_the_same_bits_whatever_else_the_threads_do(pictures: Tensor) -> None:
    classifier = models.load("mobilenet_v2", "random")
    assert classifier.reentrant
    three = images.find("bundled", limit=2)
    from sanity.plan import Plan
    from sanity.run import prepare, run

    plan = Plan(methods=("gradient", "smoothgrad"), samples=2, stages=2, similarities=("spearman",))
    stages = prepare(plan, classifier, three)
    one, again = (
        [score for step in run(plan, classifier, three, stages, batch_size=2) for score in step.scores]
        for _ in range(2)
    )
    assert one == again


def test_threads_are_shared_out_and_the_callers_stay() -> None:
    before = torch.get_num_threads()
    with closing(Lanes(2)) as lanes:
        barrier = threading.Barrier(2)

        def look(_: int) -> tuple[str, int]:
            barrier.wait(30)
            return threading.current_thread().name, torch.get_num_threads()

        found = lanes.map(look, [0, 1])
    assert len({name for name, _ in found}) == 2
    assert {threads for _, threads in found} == {max(1, before // 2)}
    assert torch.get_num_threads() == before


def test_an_error_in_a_lane_is_raised() -> None:
    def fail(n: int) -> int:
        if n:
            raise ValueError("in a lane")
        return n

    with closing(Lanes(2)) as lanes, pytest.raises(ValueError, match="in a lane"):
        lanes.map(fail, [0, 1])


def test_networks_of_unknown_make_are_not_run_by_several_threads(awkward: nn.Module) -> None:
    assert not models.of_network(awkward).reentrant
    assert suited("cpu", False) == 1
    assert suited("cpu", True) == min(MOST, torch.get_num_threads())
    assert suited("cuda", True) == 1
    assert sanity.check(awkward, torch.rand(2, 3, 17, 15).double(), methods=["gradient"], precision="float64").size
