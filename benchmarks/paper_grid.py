"""How long does a paper's whole grid take an image on this device, and what bounds it?

    python benchmarks/paper_grid.py --weights FILE.pth --device cuda                    Inception v3, preset paper
    python benchmarks/paper_grid.py --weights FILE.pth --device cuda --precision bfloat16

Runs the preset `paper` (six methods and two controls, 50 samples, 300 mask steps, all stages, cascading and
independent) and reports seconds an image, the operations really executed a second over what a large matrix product
reaches in the same precision, the seconds of each part (measured in a second run, which waits for the device after
every part), and the device's time by operation. Goal: 2 s an image on an H200.

Writes results/benchmarks/paper_grid_MODEL_DEVICE_PRECISION/.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import measuring
import pandas as pd
import torch
from counting import flops
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sanity import observation, plan, randomization
from sanity import run as running
from sanity.attributions.base import PLAIN
from sanity.command import Clock
from sanity.engine import Engine
from sanity.folding import Folded
from sanity.images import Images
from sanity.microbatch import gradients
from sanity.models import Classifier
from sanity.observation import load, working
from sanity.plan import DEFAULT_METHODS, Plan
from sanity.run import run, suited_batch
from sanity.stages import Stage
from sanity.tracing import foldable

PARTS: tuple[tuple[Any, str, str], ...] = (
    (Engine, "evaluate", "gradients"),
    (Engine, "_call", "masks and other functions"),
    (observation, "predict", "predictions"),
    (running, "compare", "similarities"),
    (randomization.Draws, "of", "drawing weights"),
)
SIDE = {"cpu": 2048, "cuda": 8192}
"""Of the matrices whose product is the measure."""


def waited(device: str) -> float:
    """Now, once the device has done all that it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(how: Plan, device: str, rounds: int = 10) -> float:
    """Floating-point operations a second of a large matrix product in a plan's precision, best of some rounds."""
    side = SIDE[torch.device(device).type]
    a = torch.randn(side, side, dtype=observation.dtype_of(how), device=device)
    times = []
    with observation.arithmetic(how):
        for _ in range(rounds):
            start = waited(device)
            a @ a
            times.append(waited(device) - start)
    return float(2 * side**3 / min(times))


def taken(how: Plan, classifier: Classifier, pictures: Images, stages: tuple[Stage, ...], size: int, at: str) -> float:
    """Seconds of a whole run, whose numbers are thrown away."""
    start = waited(at)
    for _ in run(how, classifier, pictures, stages, batch_size=size, device=at):
        pass
    return waited(at) - start


def operations(how: Plan, classifier: Classifier, pictures: Images, size: int, device: str) -> pd.DataFrame:
    """Share of the device's time of each operation of one micro-batch, the largest first."""
    on_gpu = device.startswith("cuda")
    with working(classifier.network, how, device):
        example = load(classifier, pictures.limit(1), how, device)
        folded = Folded(classifier.network, foldable(classifier.network, example)).clipping()
        points = example.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
        targets = torch.zeros(size, dtype=torch.int64, device=device)
        gradients(folded, points, points, targets, PLAIN)
        start = waited(device)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
            gradients(folded, points, points, targets, PLAIN)
            wall = waited(device) - start
    # On a GPU, its own rows only: those of the operations that launched them count the same time once more.
    own = [e for e in found.key_averages() if (e.device_type == DeviceType.CUDA) == on_gpu]
    spent = [(e.key, e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in own]
    table = pd.DataFrame(spent, columns=["operation", "calls", "share of wall"])
    table["share of wall"] /= wall * 1e6
    return table.sort_values("share of wall", ascending=False).head(12)


def main() -> None:
    parser = measuring.parser(__doc__, "inception_v3", "random", images=4, samples=50, mask_steps=300)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--stages", type=int, help="groups of neighbouring stages (default: every stage)")
    parser.add_argument("--batch-size", type=int, help="evaluations at a time (default: measured)")
    options = parser.parse_args()
    clock, device = Clock(), options.device
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    values = plan.preset("paper") | {"samples": options.samples, "mask_steps": options.mask_steps}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    how = Plan(**{"methods": DEFAULT_METHODS, "precision": options.precision, **fields})
    stages = measuring.stages_of(classifier, load(classifier, pictures.limit(1), how, "cpu"), options.stages)
    size = options.batch_size or suited_batch(how, classifier, pictures, device)
    grid = how, classifier, pictures, stages, size, device
    wall = taken(*grid)
    rate = product_rate(how, device)
    seconds: dict[str, float] = defaultdict(float)
    # One lane: what is waited for would otherwise be counted for both, and a counter sees what runs in its own thread.
    alone = how, replace(classifier, reentrant=False), pictures, stages, size, device
    with measuring.watched(PARTS, seconds, lambda: waited(device)):
        apart = taken(*alone)
    executed = flops(lambda: taken(*alone)) / len(pictures)
    seconds["the rest"] = apart - sum(seconds.values())
    parts = pd.DataFrame({"part": list(seconds), "seconds": list(seconds.values())})
    parts["share"] = parts["seconds"] / apart
    count = len(pictures)
    rows = [
        ("seconds an image", wall / count),
        ("operations really executed, TFLOP an image", executed / 1e12),
        ("of these a second, TFLOP/s", executed * count / wall / 1e12),
        ("matrix product in this precision, TFLOP/s", rate / 1e12),
        ("share of it", executed * count / wall / rate),
    ]
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    words = [
        f"{classifier.name} on {machine}, {options.precision}, {count} photographs, {len(stages)} stages "
        f"{' and '.join(how.orders)}, {', '.join(how.methods)}, {how.samples} samples, {how.mask_steps} mask steps, "
        f"{size} evaluations at a time. Goal: 2 s an image on an H200.",
        f"Parts: of a run in one thread that waits for the device after each, {apart:.1f} s. "
        "Operations: of one micro-batch of gradients.",
    ]
    tables = {
        "result": pd.DataFrame(rows, columns=["what", "value"]),
        "parts": parts.sort_values("seconds", ascending=False),
        "operations": operations(how, classifier, pictures, size, device),
    }
    name = f"paper_grid_{classifier.name}_{torch.device(device).type}_{options.precision}"
    measuring.publish(name, tables, words, clock, options=measuring.chosen(options))


if __name__ == "__main__":
    main()
