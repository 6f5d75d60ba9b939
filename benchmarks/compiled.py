"""Does torch.compile pay? Seconds a gradient: the network as it is, as the engine runs it, and compiled.

    python benchmarks/compiled.py                                    EfficientNet-Lite0
    python benchmarks/compiled.py --model inception_v3 --weights FILE.pth

Interleaved in one process; needs a C++ compiler. Compiling takes its own time, told apart; a compiled network would be
compiled again for every rule that looks into it, and could not be run again in part. Writes
results/benchmarks/compiled_MODEL/.
"""

from __future__ import annotations

import time
from functools import partial

import measuring
import pandas as pd
import torch

from sanity.attributions.base import PLAIN
from sanity.command import Clock
from sanity.folding import Folded
from sanity.microbatch import gradients
from sanity.observation import load
from sanity.plan import Plan
from sanity.randomization import guarded
from sanity.tracing import foldable


def main() -> None:
    numbers = {"batch_size": 8, "evaluations": 32, "repeats": 4}
    parser = measuring.parser(__doc__, "efficientnet_lite0", "pretrained", **numbers)
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, 1)
    network = classifier.network
    example = load(classifier, pictures, Plan(), "cpu")
    points = example.expand(options.batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(options.batch_size, dtype=torch.int64)
    with guarded(network):
        ways = {
            "the network": network,
            "the engine's": Folded(network, foldable(network, example)).clipping(),
            "compiled": torch.compile(network),
        }
        first = {name: once(partial(gradients, way, points, points, targets, PLAIN)) for name, way in ways.items()}

        def several(way: torch.nn.Module) -> None:
            for _ in range(max(1, options.evaluations // options.batch_size)):
                gradients(way, points, points, targets, PLAIN)

        times = measuring.interleaved({name: partial(several, way) for name, way in ways.items()}, options.repeats)
        exact = gradients(network, points, points, targets, PLAIN)[0]
        apart = {
            name: float((gradients(way, points, points, targets, PLAIN)[0] - exact).norm() / exact.norm())
            for name, way in ways.items()
        }
    medians = times.groupby("contender", sort=False)[["wall", "cpu"]].median()
    count = max(1, options.evaluations // options.batch_size) * options.batch_size
    table = pd.DataFrame(
        {
            "way": list(ways),
            "seconds a gradient": (medians["wall"] / count).tolist(),
            "processor seconds": (medians["cpu"] / count).tolist(),
            "first call, seconds": list(first.values()),
            "relative difference": list(apart.values()),
        }
    )
    words = [
        f"{classifier.name}, {options.batch_size} evaluations at a time, {torch.get_num_threads()} threads, one lane, "
        f"{options.repeats} repetitions, interleaved; medians."
    ]
    tables = {"ways": table, "runs": times}
    measuring.publish(f"compiled_{classifier.name}", tables, words, clock, options=measuring.chosen(options))


def once(work: partial[object]) -> float:
    """Seconds of a first call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
