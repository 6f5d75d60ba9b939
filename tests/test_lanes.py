"""Micro-batches side by side: the same numbers, errors that come through, and the caller's threads left alone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import sanity
from sanity import attributions, images, models
from sanity.attributions import Inputs
from sanity.engine import Engine, State
from sanity.folding import Folded
from sanity.lanes import MOST, Lanes, StoppedError, suited
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.stages import derived
from sanity.substitution import Substituting, stand_ins, substituted
from sanity.tracing import foldable

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
        states = [
            State(lambda index=index: walk.enter(index), inputs, walk.values(index)) for index in range(len(walk))
        ]
        found = [answer.maps for answer in engine.sweep(network, states, lambda: walk.enter(0))]
    assert sum(told) == engine.cost * len(pictures) * len(states)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_lanes_change_no_number(awkward: nn.Module, pictures: Tensor, count: int) -> None:
    for found, wanted in zip(explain(awkward, pictures, count), explain(awkward, pictures, 1), strict=True):
        for name, want in wanted.items():
            assert_close(found[name], want, rtol=1e-11, atol=1e-13)


def test_whole_runs_are_the_same_bits_whatever_else_the_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = models.load("mobilenet_v2", "random")
    assert classifier.reentrant
    three = images.find("bundled", limit=2)
    from sanity import run as running
    from sanity.plan import Plan
    from sanity.run import prepare, run

    # Tests run in one thread, for which there would be one lane.
    monkeypatch.setattr(running, "suited", lambda device, reentrant: 2)
    plan = Plan(methods=("gradient", "smoothgrad"), samples=2, stages=2, similarities=("spearman",))
    stages = prepare(plan, classifier, three)
    one, again = (
        [score for step in run(plan, classifier, three, stages, batch_size=2) for score in step.scores]
        for _ in range(2)
    )
    assert one == again


def test_threads_are_shared_out_and_the_callers_stay() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with closing(Lanes(2)) as lanes:
            barrier = threading.Barrier(2)

            def look(_: int) -> tuple[str, int]:
                barrier.wait(30)
                # A thread's first operation may ask anew how many there are.
                torch.rand(300, 300) @ torch.rand(300, 300)
                return threading.current_thread().name, torch.get_num_threads()

            found = lanes.map(look, [0, 1])
        assert len({name for name, _ in found}) == 2
        assert {threads for _, threads in found} == {2}
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


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


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests are a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("fails", [False, True])
def test_lanes_come_to_rest_when_one_fails_or_the_caller_is_interrupted(fails: bool) -> None:
    started = threading.Barrier(2)
    ended: list[type[BaseException]] = []

    with closing(Lanes(2)) as lanes:

        def work(n: int) -> None:
            started.wait(30)
            if n and fails:
                raise ValueError("in a lane")
            if n:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            try:
                while not time.sleep(0.001):
                    lanes.check()
            except StoppedError as error:
                ended.append(type(error))
                raise

        with pytest.raises(ValueError if fails else KeyboardInterrupt):
            lanes.map(work, [0, 1])
        assert ended == [StoppedError] * (1 if fails else 2)
        # Afterwards they go on as if nothing had been.
        assert lanes.map(lambda n: (lanes.check(), n)[1], [1, 2]) == [1, 2]


NAMED = ("inception_v3", "efficientnet_lite0", "resnet50", "densenet121", "googlenet", "shufflenet_v2_x1_0", "vit_b_16")


@pytest.mark.parametrize("name", NAMED)
def test_a_lane_sees_the_values_that_others_would_have_to_enter(name: str) -> None:
    classifier = models.load(name, "random")
    network, generator = classifier.network.eval(), torch.Generator().manual_seed(0)
    side = 224 if name == "vit_b_16" else 96
    x = torch.rand(1, 3, side, side, generator=generator)
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    # A transformer's head starts as zeros.
    values = {
        key: (value.detach() if value.any() else 0.01) * (1 + 0.1 * torch.rand(value.shape, generator=generator))
        for key, value in own.items()
        if value.is_floating_point()
    }
    plain = Substituting(network)
    ways = (plain, folded := Folded(plain, foldable(network, x)), folded.clipping())
    with torch.no_grad():
        before = [way(x) for way in ways]
        with substituted(stand_ins(network, values)):
            found = [way(x) for way in ways]
        assert [torch.equal(way(x), then) for way, then in zip(ways, before, strict=True)] == [True] * 3
        wanted = torch.func.functional_call(network, values, (x,))
    assert not torch.allclose(wanted, before[0], rtol=1e-2)
    for one in found:
        assert_close(one, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_values_in_lists_tuples_and_keywords_are_substituted() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
            self.register_buffer("c", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.a[None]]) + torch.stack((self.b, self.c)).add(other=self.c) * self.b.shape[0]

    network = Odd()
    values = {"a": torch.full((2,), 3.0), "b": torch.full((2,), 5.0), "c": torch.full((2,), 7.0)}
    with substituted(stand_ins(network, values)):
        found = Substituting(network)(torch.zeros(1, 2))
    assert found.tolist() == [[24.0, 24.0], [31.0, 31.0]]
    assert Substituting(network)(torch.zeros(1, 2)).tolist() == [[4.0, 4.0], [5.0, 5.0]]


def test_lanes_come_to_rest_when_the_caller_is_interrupted_while_it_hands_out_work() -> None:
    begun, ended = threading.Event(), []

    class Interrupted(list[int]):
        def __iter__(self) -> Iterator[int]:
            yield 0
            assert begun.wait(30)
            raise KeyboardInterrupt

    def work(lanes: Lanes, n: int) -> None:
        begun.set()
        try:
            while not time.sleep(0.001):
                lanes.check()
        except StoppedError:
            ended.append(n)
            raise

    with closing(Lanes(2)) as lanes:
        with pytest.raises(KeyboardInterrupt):
            lanes.map(partial(work, lanes), Interrupted([0, 1]))
        assert lanes.map(lambda n: n, [1, 2]) == [1, 2]
    assert ended == [0]
