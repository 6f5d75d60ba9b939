"""What many workers give, what the driver takes, and what its files sustain.

    python benchmarks/distributed.py            about ten minutes on two cores that are otherwise idle

speed    four explainers on EfficientNet-Lite0, embedded with two threads against one and two workers of one thread
         each, in turns; seconds from the first cell's start to the last's end, without the start of Ray
memory   the driver's own memory while it takes in a small network's run of 10 to 2,000 images
rows     a part of a plan of 50,000 images x 35 stages x 8 explainers that compute nothing x 4 similarities: rows a
         second into the steps and into the final table, and bytes a row, scaled up to the whole
Writes results/benchmarks/distributed/{speed,memory,rows}.csv, table.md and run.json.
"""

from __future__ import annotations

import sanity  # noqa: F401  (sets how OpenMP waits, before torch is loaded)

# isort: split
import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

from sanity import images as image_sets
from sanity import models
from sanity.blocks import packed
from sanity.cells import Ledger
from sanity.cluster import Cluster, reached
from sanity.command import Clock
from sanity.distributed import Crew, lacking
from sanity.folder import RunFolder
from sanity.observation import CHUNK
from sanity.plan import Plan
from sanity.records import Key, Prediction, Score, Step, write_json
from sanity.run import draws_of, prepare, run
from sanity.session import CPU_BATCH
from sanity.similarity import DEFAULTS
from sanity.worker import Task

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "distributed"
IMAGES, STAGES, METHODS = 50_000, 35, 8
SEED = 0


# --- speed


def photographs(cells: int) -> tuple[Plan, models.Classifier, image_sets.Images]:
    """EfficientNet-Lite0 on shifted copies of the bundled photographs, a chunk of 8 a cell."""
    classifier = models.load("efficientnet_lite0")
    shown = [picture.load(classifier.preprocess) for picture in image_sets.bundled().pictures]
    pixels = [shown[i % len(shown)].roll((i, i), (1, 2)) for i in range(cells * CHUNK)]
    methods = ("gradient", "smoothgrad", "integrated_gradients", "guided_backprop")
    plan = Plan(methods=methods, samples=4, stages=2, strips=0, images="tensors")
    return plan, classifier, image_sets.tensors(torch.stack(pixels))


def embedded(cells: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    plan, classifier, pictures = photographs(cells)
    stages = prepare(plan, classifier, pictures)
    start = time.perf_counter()
    rows = sum(len(step.scores) for step in run(plan, classifier, pictures, stages, batch_size=CPU_BATCH))
    return {"seconds": time.perf_counter() - start, "rows": rows}


def spread(cells: int, workers: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    plan, classifier, pictures = photographs(cells)
    stages = prepare(plan, classifier, pictures)
    # Ray's workers give way to whatever else runs; here they compete as a process of one's own does.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (the name is Ray's)
    with reached(Cluster(workers=workers, device="cpu")) as connection:
        task = Task(plan, classifier, stages, draws_of(plan), CPU_BATCH, "cpu", 1)
        begun: list[float] = []

        def noted(crew: Crew) -> None:
            # Starting processes is paid once a run, whatever its length; what the last to come is late by counts.
            if not begun and crew.present:
                begun.append(time.perf_counter())

        crew = Crew(connection, task, pictures, Ledger(lacking(plan, stages, pictures, frozenset())), noted)
        rows = count_rows(crew)
        return {"seconds": time.perf_counter() - begun[0], "rows": rows}


def count_rows(crew: Crew) -> int:
    import io

    import pyarrow.parquet as pq

    names = (data for packet in crew.run() for name, data in packet.files.items() if name.endswith(".scores.parquet"))
    return sum(pq.read_metadata(io.BytesIO(data)).num_rows for data in names)


WAYS = {
    "embedded, 2 threads": ["embedded", "2"],
    "1 worker, 1 thread": ["spread", "1"],
    "2 workers, 1 thread each": ["spread", "2"],
}


def speeds(cells: int, rounds: int) -> pd.DataFrame:
    """Every way in turns, each in a fresh process, so that a busy minute strikes all alike."""
    found = []
    turns = [(turn, name) for turn in range(rounds) for name in WAYS]
    for turn, name in tqdm(turns, desc="speed"):
        found.append({"turn": turn, "way": name, "cells": cells, **alone(*WAYS[name], str(cells))})
    return pd.DataFrame(found)


def alone(*words: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- memory


def small(images: int) -> tuple[Plan, models.Classifier, image_sets.Images]:
    torch.manual_seed(SEED)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    pixels = torch.rand(images, 3, 32, 32) * 2 - 1
    plan = Plan(methods=("gradient", "guided_backprop"), images="tensors", similarities=("spearman", "ssim"))
    return plan, models.of_network(network.eval(), "small"), image_sets.tensors(pixels)


def memory(images: int) -> dict[str, Any]:
    """Peak memory of the driver above what it had before the first cell, steps written as in a run."""
    torch.set_num_threads(1)
    plan, classifier, pictures = small(images)
    stages = prepare(plan, classifier, pictures)
    with tempfile.TemporaryDirectory() as place, reached(Cluster(workers=1, device="cpu")) as connection:
        folder = RunFolder(Path(place) / "run")
        folder.steps.mkdir(parents=True)
        task = Task(plan, classifier, stages, draws_of(plan), 64, "cpu", 1)
        crew = Crew(connection, task, pictures, Ledger(lacking(plan, stages, pictures, frozenset())))
        before, start = resident(), time.perf_counter()
        peak = before
        for packet in crew.run():
            folder.write(packet.files)
            peak = max(peak, resident())
        return {"seconds": time.perf_counter() - start, "before_mb": before, "peak_mb": peak}


def resident() -> float:
    """Megabytes that this process alone has in memory; what it shares with the object store does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(line for line in lines if line.startswith("RssAnon")).split()[1]
    return int(kilobytes) / 1000


# --- rows


def silent_steps(images: int) -> Iterator[list[Step]]:
    """Steps of explainers that compute nothing: cell by cell, as workers send them, with values made up."""
    generator = torch.Generator().manual_seed(SEED)
    methods = [f"method_{i}" for i in range(METHODS)]
    for chunk in range(images // CHUNK):
        ids = [f"ILSVRC2012_val_{chunk * CHUNK + i:08d}" for i in range(CHUNK)]
        cell = []
        for index in range(STAGES + 1):
            place = ("network", "cascading", SEED, index, f"stage {index}" if index else "trained")
            names = [(m, s, image) for m in methods for s in DEFAULTS for image in ids]
            # No two values alike, as none are that explainers made.
            draws = torch.rand(len(names), generator=generator, dtype=torch.float64).tolist()
            scores = [Score(*place, *name, 7, value, "ok") for name, value in zip(names, draws, strict=True)]
            said = [Prediction(*place, image, 7, "hen", 0.5, 7, 0.5, True) for image in ids]
            cell.append(Step(Key(chunk, SEED, "cascading", index), place[4], scores, said))
        yield cell


def rows(images: int) -> dict[str, Any]:
    """Rows a second and bytes a row of the driver's part: writing what comes packed, and joining it."""
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place) / "run")
        folder.steps.mkdir(parents=True)
        packing = writing = 0.0
        count = 0
        for cell in tqdm(silent_steps(images), total=images // CHUNK, desc="rows", leave=False):
            start = time.perf_counter()
            files = packed(cell)
            packing += time.perf_counter() - start
            start = time.perf_counter()
            folder.write(files)
            writing += time.perf_counter() - start
            count += sum(len(step.scores) for step in cell)
        steps = size(folder.steps)
        rank = {
            "seed": [SEED],
            "order": ["cascading"],
            "method": [f"method_{i}" for i in range(METHODS)],
            "similarity": DEFAULTS,
            "image": [f"ILSVRC2012_val_{i:08d}" for i in range(images)],
        }
        start = time.perf_counter()
        folder.finish({}, rank)
        joining = time.perf_counter() - start
        table = folder.path / "scores.parquet"
        return {
            "images": images,
            "rows": count,
            "partitioned": table.is_dir(),
            "worker_packs_rows_per_s": count / packing,
            "driver_writes_rows_per_s": count / writing,
            "join_rows_per_s": count / joining,
            "steps_bytes_per_row": steps / count,
            "final_bytes_per_row": size(table) / count,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        }


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


# --- all


def pipes(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(shown, line)) + " |" for line in lines)


def shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2f}"


def table(speed: pd.DataFrame, taken: pd.DataFrame, sustained: pd.DataFrame) -> str:
    """The three tables, with what follows from them."""
    by = speed.groupby("way", sort=False)["seconds"].agg(["median", "min", "max"])
    one, two = by.loc["1 worker, 1 thread", "median"], by.loc["2 workers, 1 thread each", "median"]
    threads = by.loc["embedded, 2 threads", "median"]
    last = sustained.iloc[-1]
    whole = IMAGES * (STAGES + 1) * METHODS * len(DEFAULTS)
    writing, joining = (whole / last[f"{what}_rows_per_s"] / 60 for what in ("driver_writes", "join"))
    size = whole * last["final_bytes_per_row"] / 1e9
    return f"""# Many workers

## Speed

Seconds from the first cell to the last; {speed["turn"].nunique()} turns of every way, {speed["cells"].iloc[0]} cells.

{pipes(by.reset_index())}

Efficiency of two workers, against one: {one / two / 2:.2f}. Against one process of two threads: {threads / two:.2f}
times as fast.

## The driver's memory

Megabytes of its own, before the first cell and at most after.

{pipes(taken)}

## Rows

{pipes(sustained.T.reset_index(names="").rename(columns=str))}

{IMAGES:,} images x {STAGES} stages and the trained network x {METHODS} explainers x {len(DEFAULTS)} similarities are
{whole:,} rows. Scaled up from the {last["images"]:,.0f} images above: the driver spends {writing:.1f} minutes in all
on writing steps and {joining:.1f} on the final tables, whose scores take {size:.2f} GB.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=4, help="of the speed run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every way (default: %(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 200, 2000], help="of the memory runs")
    parser.add_argument("--rows-images", type=int, nargs="+", default=[1000, 6000], help="of the rows runs")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, *numbers = options.one
        numbers = [int(number) for number in numbers]
        measured = {
            "embedded": lambda threads, cells: embedded(cells, threads),
            "spread": lambda workers, cells: spread(cells, workers),
            "memory": memory,
            "rows": rows,
        }[name](*numbers)
        print(json.dumps(measured))
        return 0
    clock = Clock()
    speed = speeds(options.cells, options.rounds)
    taken = pd.DataFrame([{"images": n, **alone("memory", str(n))} for n in tqdm(options.images, desc="memory")])
    taken["grown_mb"] = taken["peak_mb"] - taken["before_mb"]
    sustained = pd.DataFrame([alone("rows", str(n)) for n in tqdm(options.rows_images, desc="rows")])
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    for name, frame in (("speed", speed), ("memory", taken), ("rows", sustained)):
        frame.to_csv(OUTPUT / f"{name}.csv", index=False, float_format="%.3f")
    (OUTPUT / "table.md").write_text(table(speed, taken, sustained))
    import ray

    command = ["python", "benchmarks/distributed.py", *(arguments if arguments is not None else sys.argv[1:])]
    write_json(OUTPUT / "run.json", {"command": " ".join(command), "ray": ray.__version__, **clock.manifest()})
    print((OUTPUT / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
