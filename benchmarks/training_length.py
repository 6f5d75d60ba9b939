"""Does a network that is trained for longer forget later? The published cells against the epochs of training.

    python benchmarks/training_length.py --data-dir FOLDER

Trains the CNN on MNIST by the fast recipe for all its epochs, past the accuracy at which it would end, with the
released code's weight decay and without, and randomizes it after each. Writes results/benchmarks/training_length/:
table.csv, table.md, curves.png, manifest.json. A process for each; ten minutes a core.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from measuring import keep, spread
from published import CASCADE, STAGES
from torch import nn

import sanity
from sanity.command import Clock
from sanity.report.looks import looks
from sanity.training import Split, begin, find_folder, load_data, recipe, train

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "training_length"
METHODS = ("gradient", "guided_backprop", "smoothgrad", "integrated_gradients_smoothgrad")
SHOWN = STAGES[:2]
IMAGES = 10


def cascade(network: nn.Module, test: Split) -> pd.DataFrame:
    """Mean absolute rank correlation of each method at each stage, as released: method, stage, mean."""
    rows = sanity.check(
        network, test.pixels[:IMAGES].float() / 255, methods=METHODS, stages={name: [name] for name in STAGES},
        samples=50, reinit="module", redraw=True, target="repredicted", similarities=["spearman_abs"], batch_size=50,
    )  # fmt: skip
    return sanity.summarize(rows)[["method", "stage", "mean"]]


def followed(folder: Path, epochs: int, seed: int, decay: float) -> pd.DataFrame:
    """Train under one decay; rows of `cascade` before the first epoch and after every one."""
    plan = recipe("mnist", "cnn", goal=1.0, epochs=epochs, weight_decay=decay, seed=seed)
    data, state = load_data(folder, plan.data), begin(plan)
    parts = []

    def look(epoch: int, test: float) -> None:
        deviation = float(state.network.get_parameter("fc1.weight").detach().std())
        found = cascade(state.network.eval(), data.test)
        parts.append(found.assign(decay=decay, epoch=epoch, test=test, deviation=deviation))
        means = found[found["stage"].isin(SHOWN)].set_index(["method", "stage"])["mean"].round(3)
        print(f"decay {decay}, epoch {epoch}, test accuracy {test}: {means.to_dict()}", file=sys.stderr)

    look(0, float("nan"))
    for one in train(plan, data, state):
        look(one.number, float("nan") if one.test is None else one.test)
    return pd.concat(parts)


def markdown(table: pd.DataFrame) -> str:
    """The table a person reads: a row for each epoch and decay, methods at the first two stages."""
    cells = [(method, stage) for method in METHODS for stage in SHOWN]
    head = ["weight decay", "epochs", "test accuracy", "deviation of fc1's weights", *(f"{m}, {s}" for m, s in cells)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (decay, epoch), rows in table.groupby(["decay", "epoch"], sort=False):
        means = rows.set_index(["method", "stage"])["mean"]
        test, deviation = rows["test"].iloc[0], rows["deviation"].iloc[0]
        about = [f"{decay:g}", str(epoch), "" if test != test else f"{test:.2%}", f"{deviation:.3f}"]
        lines.append("| " + " | ".join([*about, *(f"{means[cell]:.3f}" for cell in cells)]) + " |")
    known = [f"{CASCADE[method][STAGES.index(stage)]:.3f}" for method, stage in cells]
    lines.append("| " + " | ".join(["published", "", "", "", *known]) + " |")
    return f"Absolute rank correlation with the trained network's map, mean of {IMAGES} images.\n\n" + "\n".join(lines)


def drawn(table: pd.DataFrame, path: Path) -> None:
    """Correlations at the first two stages against epochs; dotted: published."""
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(9, 3.8), sharey=True, layout="constrained")
    colours = looks(METHODS)
    for axis, stage in zip(axes, SHOWN, strict=True):
        for (decay, method), rows in table[table["stage"] == stage].groupby(["decay", "method"], sort=False):
            style = "-" if decay else "--"
            words = f"{method}, {'with' if decay else 'without'} decay"
            axis.plot(rows["epoch"], rows["mean"], style, color=colours[method].colour, label=words)
        for method in METHODS:
            axis.axhline(CASCADE[method][STAGES.index(stage)], color=colours[method].colour, linestyle=":", linewidth=1)
        axis.set_title(f"{stage} randomized" if stage == SHOWN[0] else f"down to {stage} randomized", fontsize=10)
        axis.set_xlabel("epochs of training")
        axis.set_ylim(-0.1, 1)
    axes[0].set_ylabel("absolute rank correlation")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files (default: fetched once)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--decays", type=float, nargs="+", default=[1e-3, 0.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    clock, folder = Clock(), find_folder("mnist", options.data_dir)
    parts = spread(partial(followed, folder, options.epochs, options.seed), options.decays, options.workers)
    table = pd.concat(parts, ignore_index=True)
    keep(options.output, table, markdown(table), clock)
    drawn(table, options.output / "curves.png")


if __name__ == "__main__":
    main()
