"""What bounds a run? Seconds by what they are spent on, and the operations of one micro-batch.

    python benchmarks/breakdown.py                                   EfficientNet-Lite0
    python benchmarks/breakdown.py --model inception_v3 --weights FILE.pth

Cascading randomization with the methods of vs_peers.py. What lanes do counts for all of them together; waiting is what
all of it leaves of the wall time. Writes results/benchmarks/breakdown_MODEL/.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import measuring
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from sanity import engine, microbatch, observation, randomization
from sanity import run as running
from sanity.attributions.base import PLAIN
from sanity.command import Clock
from sanity.folding import Folded
from sanity.lanes import suited
from sanity.microbatch import gradients
from sanity.observation import load
from sanity.plan import Plan
from sanity.randomization import guarded
from sanity.run import run
from sanity.sums import Sums
from sanity.tracing import foldable

METHODS = ("gradient", "smoothgrad", "integrated_gradients", "guided_backprop")
WATCHED: tuple[tuple[Any, str, str], ...] = (
    (engine, "gradients", "gradients, all lanes"),
    (microbatch, "gradients", "gradients, all lanes"),
    (Sums, "add", "sums, all lanes"),
    (engine.Engine, "take", "points, all lanes"),
    (engine, "foldable", "looking for what can be joined"),
    (engine.Engine, "_tame", "looking for what is not a number, all lanes"),
    (observation, "predict", "predictions"),
    # The trained maps' description is a thousandth of it.
    (running, "compare", "similarities"),
    (randomization.Draws, "of", "drawing weights"),
)


def operations(network: torch.nn.Module, points: torch.Tensor, rounds: int = 3) -> pd.DataFrame:
    """Share of the processor's time of each operation of a micro-batch, in this thread."""
    targets = torch.zeros(len(points), dtype=torch.int64)
    gradients(network, points, points, targets, PLAIN)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(rounds):
            gradients(network, points, points, targets, PLAIN)
    rows = [(event.key, event.count // rounds, event.self_cpu_time_total) for event in found.key_averages()]
    table = pd.DataFrame(rows, columns=["operation", "calls", "share"])
    table["share"] /= table["share"].sum()
    return table.sort_values("share", ascending=False).head(12)


def main() -> None:
    numbers = {"images": 1, "samples": 20, "batch_size": 8}
    parser = measuring.parser(__doc__, "efficientnet_lite0", "pretrained", **numbers)
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    plan = Plan(methods=METHODS, samples=options.samples)
    example = load(classifier, pictures, plan, "cpu")[:1]
    stages = measuring.stages_of(classifier, example, None)
    seconds: dict[str, float] = defaultdict(float)
    threads = suited("cpu", classifier.reentrant)
    with measuring.watched(WATCHED, seconds):
        start = time.perf_counter()
        for _ in run(plan, classifier, pictures, stages, batch_size=options.batch_size):
            pass
        wall = time.perf_counter() - start
    lanes = sum(value for name, value in seconds.items() if "lanes" in name)
    outside = sum(value for name, value in seconds.items() if "lanes" not in name)
    seconds["waiting for another lane, and the rest"] = wall - lanes / threads - outside
    table = pd.DataFrame({"what": list(seconds), "seconds": list(seconds.values())})
    lane = table["what"].str.contains("all lanes")
    table["share of wall"] = table["seconds"] / wall / lane.map({True: threads, False: 1})
    torch.set_num_threads(1)
    points = example.expand(options.batch_size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    with guarded(classifier.network):
        folded = Folded(classifier.network, foldable(classifier.network, example)).clipping()
        kernels = operations(folded, points)
    words = [
        f"{classifier.name}, {len(pictures)} photographs, {len(stages)} stages cascading, {', '.join(METHODS)}, "
        f"{options.samples} samples, {options.batch_size} evaluations at a time, {threads} lanes; {wall:.1f} s."
    ]
    tables = {"seconds": table.sort_values("share of wall", ascending=False), "operations": kernels}
    measuring.publish(f"breakdown_{classifier.name}", tables, words, clock, options=measuring.chosen(options))


if __name__ == "__main__":
    main()
