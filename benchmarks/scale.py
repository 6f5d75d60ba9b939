"""Do time and memory grow as they should? Against images, stages and samples, each in a process of its own.

    python benchmarks/scale.py

A small network (the benchmark must end) in one lane; and EfficientNet-Lite0 in as many lanes as there are cores, as the
command runs it, on pictures read from files. The run's time should be a straight line in each, its peak memory flat in
images and stages. Goal: 200 images within 1.1 times the memory of 10. Writes results/benchmarks/scale/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import measuring
import pandas as pd
import torch
from PIL import Image
from torch import nn

import sanity
from sanity import images, models
from sanity.command import Clock
from sanity.memory import hold
from sanity.plan import Plan
from sanity.run import prepare, run
from sanity.stages import Stage

BASE = {"images": 10, "stages": 4, "samples": 4}
GROWING = {"images": (10, 50, 200), "stages": (2, 4, 8), "samples": (2, 4, 8, 16), "pictures": (10, 50, 200)}


def small(stages: int) -> nn.Module:
    """A convolutional network of as many layers, on pictures of 96 x 96."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU()]
    for _ in range(stages - 2):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()


def one(sizes: dict[str, int]) -> dict[str, float]:
    """Seconds and peak memory of one run."""
    torch.manual_seed(0)
    if "pictures" in sizes:
        return of_files(sizes["pictures"])
    network = small(sizes["stages"])
    pixels = torch.rand(sizes["images"], 3, 96, 96)
    plan = Plan(methods=("gradient", "smoothgrad", "integrated_gradients"), samples=sizes["samples"], images="tensors")
    classifier, pictures = models.of_network(network), images.tensors(pixels)
    stages = prepare(plan, classifier, pictures)
    assert len(stages) == sizes["stages"], f"{len(stages)} stages"
    return timed(plan, classifier, pictures, stages)


def of_files(count: int) -> dict[str, float]:
    """Likewise of EfficientNet-Lite0 in two stages, on so many pictures of noise."""
    hold()
    classifier = models.load("efficientnet_lite0", "pretrained")
    with tempfile.TemporaryDirectory() as folder:
        for n in range(count):
            noise = torch.randint(0, 256, (256, 256, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(Path(folder, f"{n:03}.png"))
        plan = Plan(methods=("gradient",), stages=2, images=folder)
        pictures = images.find(folder)
        return timed(plan, classifier, pictures, prepare(plan, classifier, pictures))


def timed(
    plan: Plan, classifier: models.Classifier, pictures: images.Images, stages: Sequence[Stage]
) -> dict[str, float]:
    """Run it and look at the clock and the process's memory."""
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
            chosen = {what: size} if what == "pictures" else {**BASE, what: size}
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
