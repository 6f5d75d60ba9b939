"""How near is a run to what the machine can do?

    python benchmarks/limit.py --weights FILE.pth                  Inception v3, 17 stages, cascading and independent
    python benchmarks/limit.py --model efficientnet_lite0

Within one process, interleaved: the wall time of a whole run with reuse and without; the best time that one gradient
takes alone (folded, channels-last, the best micro-batch); the time spent outside network evaluations; and the
multiply-adds that were really executed a second over what a loop of register-resident FMAs reaches on all threads.
Goals: wall / (evaluations without reuse x best time) at most 0.85; at most 5 % outside evaluations; 80 % of the FMAs.
Writes results/benchmarks/limit_MODEL/.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import measuring
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sanity import engine, observation
from sanity.attributions.base import PLAIN, logits_of
from sanity.command import Clock
from sanity.engine import Engine, gradients
from sanity.folding import Folded, foldable
from sanity.observation import load
from sanity.plan import Plan
from sanity.randomization import guarded
from sanity.run import run


class Counter(TorchDispatchMode):
    """Floating-point operations of products and convolutions, forward and backward, run in this thread."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


METHODS = ("gradient", "smoothgrad", "gradient_x_input", "guided_backprop", "integrated_gradients")
FMA = r"""
#include <immintrin.h>
#include <stdio.h>
#include <time.h>
int main(void) {
  __m512 a[16], x = _mm512_set1_ps(0.999f), y = _mm512_set1_ps(0.001f);
  for (int i = 0; i < 16; i++) a[i] = _mm512_set1_ps((float)i);
  struct timespec s, e; long n = 60000000;
  clock_gettime(CLOCK_MONOTONIC, &s);
  for (long k = 0; k < n; k++) for (int i = 0; i < 16; i++) a[i] = _mm512_fmadd_ps(a[i], x, y);
  clock_gettime(CLOCK_MONOTONIC, &e);
  float t = 0; for (int i = 0; i < 16; i++) t += ((float*)&a[i])[0];
  double d = (e.tv_sec - s.tv_sec) + 1e-9 * (e.tv_nsec - s.tv_nsec);
  printf("%g %g\n", 2.0 * 16 * 16 * n / d, t);
  return 0;
}
"""


def fma_rate(threads: int) -> float | None:
    """Floating-point operations a second of FMAs on registers, all threads together; None without compiler, AVX-512."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "fma.c"), Path(folder, "fma")
        source.write_text(FMA)
        try:
            subprocess.run(["cc", "-O3", "-march=native", "-o", program, source], check=True, capture_output=True)
            loops = [subprocess.Popen([program], stdout=subprocess.PIPE, text=True) for _ in range(threads)]
            return sum(float(loop.communicate()[0].split()[0]) for loop in loops)
        except (OSError, subprocess.CalledProcessError, IndexError):
            return None


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside network evaluations of any kind."""

    def timed(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent["network"] = spent.get("network", 0.0) + time.perf_counter() - start

        return call

    with (
        mock.patch.multiple(engine, gradients=timed(engine.gradients), record=timed(engine.record)),
        mock.patch.object(observation, "predict", timed(observation.predict)),
    ):
        yield


def best_alone(network: torch.nn.Module, example: Tensor, sizes: tuple[int, ...], rounds: int) -> tuple[float, int]:
    """Least seconds an evaluation, and the micro-batch that has it."""
    folded = Folded(network, foldable(network, example[:1]))
    found = {}
    for size in sizes:
        points = example[:1].expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        targets = torch.zeros(size, dtype=torch.int64)
        times = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            gradients(folded, points, points, targets, PLAIN)
            times.append((time.perf_counter() - start) / size)
        found[size] = min(times[1:])
    size = min(found, key=lambda one: found[one])
    return found[size], size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="inception_v3")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--orders", nargs="+", default=["cascading", "independent"])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    plan = Plan(methods=METHODS, samples=options.samples, orders=tuple(options.orders), precision=options.precision)
    example = load(classifier, pictures, plan, "cpu")
    stages = measuring.stages_of(classifier, example[:1], None)
    network = classifier.network
    with guarded(network, dtype=observation.dtype_of(plan)):
        counter = Counter()
        with counter:
            gradients(network, example[:1], example[:1], torch.zeros(1, dtype=torch.int64), PLAIN)
        each = counter.total
        counter = Counter()
        with torch.no_grad(), counter:
            logits_of(network, example[:1])
        forward = counter.total
    cost = Engine(plan.explainers(), options.batch_size).cost
    evaluations = cost * len(pictures) * (1 + len(options.orders) * len(stages))
    rows, spent = [], dict[str, float]()
    fma = fma_rate(torch.get_num_threads())

    def whole(reuse: bool) -> None:
        spent.clear()
        made = mock.patch.object(Engine, "__init__", mock_init(reuse))
        with made, watched(spent):
            for _ in run(plan, classifier, pictures, stages, batch_size=options.batch_size):
                pass

    original = Engine.__init__

    def mock_init(reuse: bool):  # type: ignore[no-untyped-def]
        def init(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            original(self, *args, **kwargs)
            self.reuse = reuse

        return init

    for repeat in range(options.repeats):
        with guarded(network, dtype=observation.dtype_of(plan)):
            alone, size = best_alone(network, example, (4, 8, 16), 3)
        for reuse in (True, False):
            start, cpu = time.perf_counter(), time.process_time()
            whole(reuse)
            wall = time.perf_counter() - start
            rows.append(
                {
                    "repeat": repeat, "reuse": reuse, "wall": wall, "cpu": time.process_time() - cpu,
                    "evaluations": evaluations, "best alone": alone, "its batch": size,
                    "wall / (evaluations x best)": wall / (evaluations * alone),
                    "outside evaluations": 1 - spent["network"] / wall,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    executed = executed_flops(plan, classifier, pictures, stages, options.batch_size)
    with_reuse = table[table.reuse]
    rate = executed / float(with_reuse["wall"].median())
    machine = pd.DataFrame(
        [
            ("multiply-adds of one gradient, GFLOP", each / 1e9),
            ("of these in the forward pass, GFLOP", forward / 1e9),
            ("without reuse, GFLOP a run", each * evaluations / 1e9),
            ("really executed, GFLOP a run", executed / 1e9),
            ("really executed, GFLOP/s of the run's wall", rate / 1e9),
            ("register-resident FMAs, GFLOP/s", None if fma is None else fma / 1e9),
            ("share of it", None if fma is None else rate / fma),
        ],
        columns=["what", "value"],
    )
    medians = table.groupby("reuse")[["wall", "cpu", "wall / (evaluations x best)", "outside evaluations"]].median()
    words = [
        f"{classifier.name}, {len(pictures)} photographs, {len(stages)} stages, {' and '.join(options.orders)}, "
        f"{', '.join(METHODS)}, {options.samples} samples, {options.precision}, {torch.get_num_threads()} threads.",
        "Goals: 0.85 of evaluations x best; 5 % outside evaluations; 80 % of the FMAs' rate.",
    ]
    tables = {"medians": medians.reset_index(), "machine": machine, "runs": table}
    name = f"limit_{classifier.name}" + ("" if options.precision == "float32" else f"_{options.precision}")
    measuring.publish(name, tables, words, clock, options=vars(options) | {"weights": "..."})


def executed_flops(plan: Plan, classifier, pictures, stages, batch_size: int) -> float:  # type: ignore[no-untyped-def]
    """Floating-point operations that a run with reuse really executes."""
    counter = Counter()
    # In one thread: a mode sees what runs in its own.
    classifier = replace(classifier, reentrant=False)
    with counter:
        for _ in run(plan, classifier, pictures, stages, batch_size=batch_size):
            pass
    return float(counter.total)


if __name__ == "__main__":
    main()
