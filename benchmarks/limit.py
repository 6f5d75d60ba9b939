"""How near is a run to what the machine can do?

    python benchmarks/limit.py --weights FILE.pth                  Inception v3, 17 stages, cascading and independent
    python benchmarks/limit.py --model efficientnet_lite0

Within one process, interleaved: the wall time of a whole run with reuse and without; the best time that one gradient
takes alone (folded, channels-last, the best micro-batch, in one lane or several); the time spent outside network
evaluations; and the multiply-adds that were really executed a second over what a loop of register-resident FMAs
reaches on all threads.
Goals: wall / (evaluations without reuse x best time) at most 0.85; at most 5 % outside evaluations; 80 % of the FMAs.
Writes results/benchmarks/limit_MODEL/.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any
from unittest import mock

import measuring
import pandas as pd
import torch
from counting import flops
from torch import Tensor

from sanity import engine, microbatch, observation
from sanity.attributions.base import PLAIN, logits_of
from sanity.command import Clock
from sanity.engine import Engine
from sanity.folding import Folded
from sanity.images import Images
from sanity.lanes import Lanes
from sanity.microbatch import gradients
from sanity.models import Classifier
from sanity.observation import load
from sanity.plan import Plan
from sanity.randomization import guarded
from sanity.run import run
from sanity.stages import Stage
from sanity.tracing import foldable

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


class Busy:
    """Seconds in which at least one thread was inside one of the functions that it was given to watch."""

    def __init__(self) -> None:
        self.seconds, self.inside, self.since, self.lock = 0.0, 0, 0.0, Lock()

    def watching(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, watched."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.lock:
                if not self.inside:
                    self.since = time.perf_counter()
                self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                with self.lock:
                    self.inside -= 1
                    if not self.inside:
                        self.seconds += time.perf_counter() - self.since

        return call


@contextmanager
def watched() -> Iterator[Busy]:
    """Measure how long the network is evaluated, in any way, by any lane."""
    busy = Busy()
    with (
        mock.patch.object(engine, "gradients", busy.watching(gradients)),
        mock.patch.object(microbatch, "gradients", busy.watching(gradients)),
        mock.patch.object(engine, "logits_of", busy.watching(logits_of)),
        mock.patch.object(observation, "predict", busy.watching(observation.predict)),
    ):
        yield busy


def best_alone(network: torch.nn.Module, example: Tensor, sizes: tuple[int, ...], rounds: int) -> tuple[float, str]:
    """Least seconds an evaluation, in one lane of all threads or in lanes of one, and what has it."""
    folded = Folded(network, foldable(network, example[:1])).clipping()
    found: dict[tuple[int, int], list[float]] = {}
    for size, count in product(sizes, sorted({1, torch.get_num_threads()})):
        points = example[:1].expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        targets = torch.zeros(size, dtype=torch.int64)
        work = [partial(gradients, folded, points, points, targets, PLAIN)] * count
        with closing(Lanes(count)) as lanes:
            for _ in range(rounds + 1):
                start = time.perf_counter()
                lanes.map(lambda one: one(), work)
                seconds = (time.perf_counter() - start) / size / count
                found.setdefault((size, count), []).append(seconds)
    least = {key: min(times[1:]) for key, times in found.items()}
    size, count = best = min(least, key=lambda one: least[one])
    return least[best], f"{size} in {count} lanes"


@dataclass(frozen=True)
class Grid:
    """What is run: a plan on a network's stages and photographs."""

    plan: Plan
    classifier: Classifier
    pictures: Images
    stages: Sequence[Stage]
    batch_size: int

    @property
    def evaluations(self) -> int:
        """Gradients that the grid needs when nothing is reused."""
        cost = Engine(self.plan.explainers(), self.batch_size).cost
        return cost * len(self.pictures) * (1 + len(self.plan.orders) * len(self.stages))

    def take(self, reuse: bool = True) -> None:
        """Run all of it, and throw the numbers away."""
        plain = Engine.__init__

        def made(self: Engine, *args: Any, **kwargs: Any) -> None:
            plain(self, *args, **kwargs)
            self.reuse = reuse

        with mock.patch.object(Engine, "__init__", made):
            for _ in run(self.plan, self.classifier, self.pictures, self.stages, batch_size=self.batch_size):
                pass


def timed(grid: Grid, repeats: int) -> pd.DataFrame:
    """Best time alone, run with reuse, run without; again and again."""
    rows = []
    example = load(grid.classifier, grid.pictures, grid.plan, "cpu")
    for repeat in range(repeats):
        with guarded(grid.classifier.network, dtype=observation.dtype_of(grid.plan)):
            alone, how = best_alone(grid.classifier.network, example, (1, 4, 8, 16), 5)
        for reuse in (True, False):
            start, cpu = time.perf_counter(), time.process_time()
            with watched() as busy:
                grid.take(reuse)
            wall = time.perf_counter() - start
            rows.append(
                {
                    "repeat": repeat, "reuse": reuse, "wall": wall, "cpu": time.process_time() - cpu,
                    "evaluations": grid.evaluations, "best alone": alone, "its batch": how,
                    "wall / (evaluations x best)": wall / (grid.evaluations * alone),
                    "outside evaluations": 1 - busy.seconds / wall,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def of_machine(grid: Grid, wall: float) -> pd.DataFrame:
    """What one gradient takes, what a run of `wall` seconds executes, and what this machine could."""
    network, example = grid.classifier.network, load(grid.classifier, grid.pictures, grid.plan, "cpu")[:1]
    target = torch.zeros(1, dtype=torch.int64)
    with guarded(network, dtype=observation.dtype_of(grid.plan)):
        each = flops(lambda: gradients(network, example, example, target, PLAIN))
        with torch.no_grad():
            forward = flops(lambda: logits_of(network, example))
    # In one thread: a mode sees what runs in its own.
    executed = flops(replace(grid, classifier=replace(grid.classifier, reentrant=False)).take)
    fma = fma_rate(torch.get_num_threads())
    rows = [
        ("multiply-adds of one gradient, GFLOP", each / 1e9),
        ("of these in the forward pass, GFLOP", forward / 1e9),
        ("without reuse, GFLOP a run", each * grid.evaluations / 1e9),
        ("really executed, GFLOP a run", executed / 1e9),
        ("really executed, GFLOP/s of the run's wall", executed / wall / 1e9),
        ("register-resident FMAs, GFLOP/s", None if fma is None else fma / 1e9),
        ("share of it", None if fma is None else executed / wall / fma),
    ]
    return pd.DataFrame(rows, columns=["what", "value"])


def main() -> None:
    numbers = {"images": 1, "samples": 8, "batch_size": 4, "repeats": 2}
    parser = measuring.parser(__doc__, "inception_v3", "random", **numbers)
    parser.add_argument("--orders", nargs="+", default=["cascading", "independent"])
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    plan = Plan(methods=METHODS, samples=options.samples, orders=tuple(options.orders), precision=options.precision)
    stages = measuring.stages_of(classifier, load(classifier, pictures, plan, "cpu")[:1], None)
    grid = Grid(plan, classifier, pictures, stages, options.batch_size)
    table = timed(grid, options.repeats)
    medians = table.groupby("reuse")[["wall", "cpu", "wall / (evaluations x best)", "outside evaluations"]].median()
    words = [
        f"{classifier.name}, {len(pictures)} photographs, {len(stages)} stages, {' and '.join(options.orders)}, "
        f"{', '.join(METHODS)}, {options.samples} samples, {options.precision}, {torch.get_num_threads()} threads.",
        "Goals: 0.85 of evaluations x best; 5 % outside evaluations; 80 % of the FMAs' rate.",
    ]
    machine = of_machine(grid, float(medians["wall"][True]))
    tables = {"medians": medians.reset_index(), "machine": machine, "runs": table}
    name = f"limit_{classifier.name}" + ("" if options.precision == "float32" else f"_{options.precision}")
    measuring.publish(name, tables, words, clock, options=measuring.chosen(options))


if __name__ == "__main__":
    main()
