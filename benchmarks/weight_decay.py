"""Why do maps of a CNN trained without weight decay forget sooner than published? The same network, decayed.

    python -m sanity.train --data mnist --model cnn --weight-decay 0 --learning-rate 5e-4 --output DIR
    python benchmarks/weight_decay.py DIR/model.safetensors

Goes on training a network for some hundred steps, with and without the released code's decay, and randomizes each in a
cascade: what further steps alone change, and what the decay changes beside them. Writes
results/benchmarks/weight_decay/: table.csv, table.md, manifest.json. Three minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from published import CASCADE, STAGES
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import sanity
from sanity import models
from sanity.command import Clock, environment
from sanity.records import write_json
from sanity.streams import stream
from sanity.training import DataSet, Split, accuracy, begin, find_folder, load_data, recipe

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "weight_decay"
METHODS = ("gradient", "smoothgrad", "guided_backprop")
DECAY = 1e-3
IMAGES = 10


def gone_on(weights: Path, data: DataSet, decay: float, steps: int) -> nn.Module:
    """Train the network of a file for some steps more, the learning rate from .001 down to 0."""
    plan = recipe("mnist", "cnn", weight_decay=decay, learning_rate=1e-3, batch_size=64)
    state = begin(plan)
    state.network.load_state_dict(models.read_state_dict(weights))
    order = torch.randperm(len(data.train.labels), generator=stream("weight decay", "shuffle"))
    state.network.train()
    for step, batch in enumerate(tqdm(order.split(plan.batch_size)[:steps], unit=" steps", desc=f"decay {decay}")):
        for group in state.optimiser.param_groups:
            group["lr"] = plan.learning_rate * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = state.network(data.train.pixels[batch].float() / 255)
        state.optimiser.zero_grad()
        torch.autograd.backward([F.cross_entropy(logits.float(), data.train.labels[batch])])
        state.optimiser.step()
    return state.network.eval()


def cascade(network: nn.Module, test: Split) -> pd.DataFrame:
    """Mean absolute rank correlation of each method at each stage: rows methods, columns STAGES."""
    rows = sanity.check(
        network, test.pixels[:IMAGES].float() / 255, methods=METHODS, stages={name: [name] for name in STAGES},
        samples=50, reinit="module", redraw=True, target="repredicted", similarities=["spearman_abs"], batch_size=50,
    )  # fmt: skip
    means = sanity.summarize(rows).pivot_table(index="method", columns="stage", values="mean", sort=False)
    return means[list(STAGES)]


def measured(weights: Path, data: DataSet, steps: int) -> pd.DataFrame:
    """Table of every network, the published one's last: network, test accuracy, deviation of fc1, method, stages."""
    parts = []
    for words, decay, number in (("as trained", 0.0, 0), ("without decay", 0.0, steps), ("with decay", DECAY, steps)):
        network = gone_on(weights, data, decay, number)
        deviation = float(network.get_parameter("fc1.weight").detach().std())
        about = {
            "network": f"{words}, {number} steps more",
            "test": accuracy(network, data.test),
            "deviation": deviation,
        }
        parts.append(cascade(network, data.test).reset_index().assign(**about))
    known = pd.DataFrame([(m, *CASCADE[m]) for m in METHODS], columns=["method", *STAGES])
    table = pd.concat([*parts, known.assign(network="published", test=float("nan"), deviation=float("nan"))])
    return table[["network", "test", "deviation", "method", *STAGES]]


def markdown(table: pd.DataFrame) -> str:
    """The table a person reads."""
    head = ["network", "test accuracy", "deviation of fc1's weights", "method", *STAGES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for network, test, deviation, method, *values in table.itertuples(index=False):
        about = ["", ""] if test != test else [f"{test:.2%}", f"{deviation:.3f}"]
        lines.append("| " + " | ".join([network, *about, method, *(f"{v:.3f}" for v in values)]) + " |")
    return f"Absolute rank correlation, mean of {IMAGES} images.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="CNN trained on MNIST without weight decay")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files (default: fetched once)")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    clock, data = Clock(), load_data(find_folder("mnist", options.data_dir))
    table = measured(options.weights, data, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output / "table.csv", index=False, float_format="%.4f")
    (options.output / "table.md").write_text(markdown(table))
    command = " ".join(["python", *sys.argv])
    write_json(options.output / "manifest.json", {"command": command, **environment(), **clock.stamp()})
    print(markdown(table))


if __name__ == "__main__":
    main()
