"""Do time and memory grow as they should? Against images, stages and samples, each in a process of its own.

    python benchmarks/scale.py

A small network (the benchmark must end) and photographs' sizes: the run's time should be a straight line in each, its
peak memory flat in images and stages. Goal: 200 images within 1.1 times the memory of 10. Writes
results/benchmarks/scale/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import measuring
import pandas as pd
import torch
from torch import nn

import sanity
from sanity import images, models
from sanity.command import Clock
from sanity.plan import Plan
from sanity.run import prepare, run

BASE = {"images": 10, "stages": 4, "samples": 4}
GROWING = {"images": (10, 50, 200), "stages": (2, 4, 8), "samples": (2, 4, 8, 16)}


def small(stages: int) -> nn.Module:
    """A convolutional network of as many layers, on pictures of 96 x 96."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()]
    for _ in range(stages - 2):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def one(sizes: dict[str, int]) -> dict[str, float]:
    """Seconds and peak memory of one run."""
    torch.manual_seed(0)
    network = small(sizes["stages"])
    pixels = torch.rand(sizes["images"], 3, 96, 96)
    plan = Plan(methods=("gradient", "smoothgrad", "integrated_gradients"), samples=sizes["samples"], images="tensors")
    classifier, pictures = models.of_network(network), images.tensors(pixels)
    stages = prepare(plan, classifier, pictures)
    assert len(stages) == sizes["stages"], f"{len(stages)} stages"
    start = time.perf_counter()
    rows = 0
    for step in run(plan, classifier, pictures, stages, batch_size=4):
        rows += len(step.scores)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak MiB": measuring.peak_memory(), "rows": rows, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    clock, rows = Clock(), []
    for what, sizes in GROWING.items():
        for size in sizes:
            chosen = {**BASE, what: size}
            done = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps(chosen)], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({"growing": what, **chosen, **found})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    ratios = []
    for what, group in table.groupby("growing", sort=False):
        first, last = group.iloc[0], group.iloc[-1]
        # The straight line through the first two sizes, carried on to the last.
        second = group.iloc[1]
        slope = (second.seconds - first.seconds) / (second[what] - first[what])
        line = first.seconds + slope * (last[what] - first[what])
        ratios.append(
            {
                "growing": what, "from": first[what], "to": last[what],
                "peak memory ratio": last["peak MiB"] / first["peak MiB"],
                "time ratio": last.seconds / first.seconds, "time / straight line": last.seconds / line,
            }
        )  # fmt: skip
    words = [f"saliency-sanity {sanity.__version__}. Peak memory is the whole process's, torch included."]
    measuring.publish("scale", {"ratios": pd.DataFrame(ratios), "runs": table}, words, clock)


if __name__ == "__main__":
    main()
