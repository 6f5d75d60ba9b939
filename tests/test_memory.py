"""Memory: too large a micro-batch is halved, never an error; the measured one fits and is the fastest."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sanity import attributions, engine, memory
from sanity.attributions import Inputs
from sanity.engine import Engine, State, predict
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.stages import derived

METHODS = ("smoothgrad:samples=3", "guided_backprop", "meaningful_perturbation:steps=2", "gradient")


class Greedy(nn.Module):
    """A network for which torch says that memory is short whenever it is run on more than `limit` images."""

    def __init__(self, network: nn.Module, limit: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.network, self.limit, self.error = network, limit, error
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise self.error("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
        self.most = max(self.most, len(x))
        return self.network(x)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("limit", [1, 3])
def test_a_micro_batch_that_is_too_large_is_halved(
    awkward: nn.Module, pictures: Tensor, limit: int, error: type[Exception]
) -> None:
    inputs = Inputs(pictures, torch.tensor([2, 0, 3]), ("a", "b", "c"), seed=5)
    told: list[int] = []

    def explain(network: nn.Module, batch_size: int) -> list[dict[str, Tensor]]:
        worker = Engine([attributions.find(name) for name in METHODS], batch_size, told.append)
        stages = derived(awkward, pictures[:1])
        with guarded(network), randomized(awkward, stages, "cascading", 1, Draws(reinitialiser("normal:1"))) as walk:
            states = [State(lambda index=index: walk.enter(index), inputs) for index in range(len(walk))]
            found = worker.sweep(network, states, lambda: walk.enter(0))
        assert sum(told) == worker.cost * len(pictures) * len(states)
        told.clear()
        return [answer.maps for answer in found]

    greedy = Greedy(awkward, limit, error)
    for found, wanted in zip(explain(greedy, 8), explain(awkward, 2), strict=True):
        for name, want in wanted.items():
            assert_close(found[name], want, rtol=1e-10, atol=1e-13)
    assert greedy.most == limit if limit == 1 else greedy.most in (2, 3)


def test_one_evaluation_that_does_not_fit_is_said_so(awkward: nn.Module, pictures: Tensor) -> None:
    with pytest.raises(MemoryError, match="not enough memory for a single evaluation"):
        predict(Greedy(awkward, 0), pictures, 4)


def test_other_errors_are_not_mistaken_for_it() -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        memory.tried(fail)
    assert not memory.is_out_of_memory(ValueError("not enough memory"))
    assert memory.is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))


def test_the_fastest_that_fits_is_taken() -> None:
    def step(n: int) -> None:
        time.sleep(0.02 if n == 8 else 0.04 * n)

    assert memory.fastest(step, (4, 8, 16), 1, 100) == 8
    assert memory.fastest(step, (4, 8, 16), 10, 100) == 4
    assert memory.fastest(step, (4, 8, 16), 20, 100) == 2
    assert memory.fastest(step, (4, 8, 16), 10**6, 100) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "PATIENCE", 0.0)
        assert memory.fastest(step, (4, 8, 16), 1, 100) == 4

    def short(n: int) -> None:
        if n > 4:
            raise torch.OutOfMemoryError

    assert memory.fastest(short, (4, 8, 16), 1, 100) == 4


def test_bytes_are_those_that_the_graph_keeps() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x = torch.rand(1, 3, 10, 10)
    # The input, the first convolution's rectified result and both weights.
    with guarded(network):
        kept = memory.bytes_of(network, x)
    assert 4 * (8 * 100 + 8 * 27) <= kept <= 4 * (300 + 8 * 100 + 8 * 100 + 8 * 27 + 16)


def test_free_memory_is_known() -> None:
    assert memory.available(torch.device("cpu")) > 2**20


def test_a_real_network_is_measured(awkward: nn.Module, pictures: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with guarded(awkward):
        assert engine.best_batch(awkward, pictures[:1]) in memory.CANDIDATES["cpu"]
        monkeypatch.setattr(engine, "available", lambda device: 1)
        assert engine.best_batch(awkward, pictures[:1]) == 1


def test_memory_that_was_freed_is_kept_where_the_c_library_can_be_told() -> None:
    """In a process of its own: large blocks, freed and taken again, are not mapped anew."""
    program = """
import resource, sanity, torch
from sanity.memory import hold
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(48 * 2**20 // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), hold(), faults() * 0 + faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, told, after = done.stdout.split()
    if told == "False":
        pytest.skip("this C library cannot be told")
    assert int(after) < int(before) / 5
