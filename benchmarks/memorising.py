"""Does it matter to the data randomization test for how long the permuted labels were learnt?

    python benchmarks/memorising.py --true FILE.safetensors --data-dir FOLDER     FOLDER: IDX files of MNIST

Trains the published CNN on permuted labels by its recipe, from first weights of its own, and before the first epoch
and after every few compares its maps with those of the network in --true, as released; and, as a floor, those of pairs
of networks that were never trained. Writes results/benchmarks/memorising/: table.csv, table.md, curves.png,
manifest.json. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from measuring import keep
from published import PERMUTED
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sanity
from sanity.command import Clock
from sanity.report.looks import looks
from sanity.training import begin, find_folder, load_data, recipe, train, with_labels

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "memorising"
METHODS = tuple(PERMUTED)
IMAGES = 10
UNTRAINED = 3
"""Networks, of which all pairs are taken."""
SIMILARITIES = ("spearman_abs", "spearman")


def alike(one: nn.Module, other: nn.Module, pixels: Tensor) -> pd.DataFrame:
    """Mean rank correlation between two networks' maps: method, similarity, mean; each explains what it predicts."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "other.safetensors")
        save_file({name: value.contiguous() for name, value in other.state_dict().items()}, weights)
        rows = sanity.check(
            one, pixels, methods=METHODS, samples=50, orders=["data"], against=str(weights), target="repredicted",
            similarities=SIMILARITIES, batch_size=50,
        )  # fmt: skip
    found = sanity.summarize(rows[rows["stage_index"] > 0])
    return found[["method", "similarity", "mean"]]


def untrained(pixels: Tensor) -> pd.DataFrame:
    """`alike` of pairs of networks as they start, averaged."""
    networks = [begin(recipe("mnist", "cnn", seed=seed)).network.eval() for seed in range(UNTRAINED)]
    parts = [alike(a, b, pixels) for a, b in combinations(networks, 2)]
    return pd.concat(parts).groupby(["method", "similarity"], sort=False, as_index=False)["mean"].mean()


def followed(true: nn.Module, folder: Path, seed: int, epochs: int, every: int) -> Iterator[pd.DataFrame]:
    """`alike` of a network on true labels and one that learns permuted ones, as it learns them."""
    plan = recipe("mnist", "cnn", "permuted", goal=1.0, seed=seed)
    data, state = load_data(folder, plan.data), begin(plan)
    pixels = data.test.pixels[:IMAGES].float() / 255
    yield alike(true, state.network.eval(), pixels).assign(epoch=0, running=float("nan"))
    for one in train(plan, with_labels(data, plan), state):
        print(f"epoch {one.number}: {one.running:.2%} of the training images, {one.seconds:.0f} s", file=sys.stderr)
        if one.number % every == 0:
            yield alike(true, state.network.eval(), pixels).assign(epoch=one.number, running=one.running)
        if one.number == epochs:
            return


def markdown(table: pd.DataFrame) -> str:
    """The table a person reads: a row for each look, absolute and signed correlation of each method."""
    lines = [
        "| epochs | training images right, in passing | " + " | ".join(METHODS) + " |",
        "|" + "---|" * (2 + len(METHODS)),
    ]
    for (epoch, running), rows in table.groupby(["epoch", "running"], sort=False, dropna=False):
        means = rows.set_index(["method", "similarity"])["mean"]
        first = "two untrained networks" if epoch < 0 else str(epoch)
        cells = [", ".join(f"{means[method, kind]:.2f}" for kind in SIMILARITIES) for method in METHODS]
        lines.append("| " + " | ".join([first, "" if running != running else f"{running:.1%}", *cells]) + " |")
    known = [", ".join(f"{value:.2f}" for value in PERMUTED[method]) for method in METHODS]
    lines.append("| " + " | ".join(["published", "over 95 %", *known]) + " |")
    words = "Rank correlation of maps, absolute and signed, between a network trained on true labels and one that "
    return f"{words}learns permuted ones; mean of {IMAGES} images.\n\n" + "\n".join(lines)


def drawn(table: pd.DataFrame, path: Path) -> None:
    """Correlations against epochs; dotted: published."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    colours = looks(METHODS)
    for axis, (kind, similarity) in zip(axes, enumerate(SIMILARITIES), strict=True):
        for method, rows in table[(table["similarity"] == similarity) & (table["epoch"] >= 0)].groupby("method"):
            look = colours[method]
            axis.plot(rows["epoch"], rows["mean"], color=look.colour, marker=look.marker, markersize=5, label=method)
            axis.axhline(PERMUTED[method][kind], color=colours[method].colour, linestyle=":", linewidth=1)
        axis.set_title("signed" if kind else "absolute", fontsize=10)
        axis.set_xlabel("epochs of learning permuted labels")
        axis.set_ylim(-0.2, 1.02)
    axes[0].set_ylabel("rank correlation (dotted: published)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--true", type=Path, help="the published CNN trained on true labels")
    parser.add_argument("--redraw", action="store_true", help="only draw curves.png again, from the stored table")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files (default: fetched once)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40, help="stop after so many of the recipe's 40")
    parser.add_argument("--every", type=int, default=4, help="epochs between looks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.redraw:
        drawn(pd.read_csv(options.output / "table.csv"), options.output / "curves.png")
        return
    if options.true is None:
        parser.error("--true FILE is needed")
    torch.set_num_threads(options.threads)
    clock, folder = Clock(), find_folder("mnist", options.data_dir)
    true = begin(recipe("mnist", "cnn")).network.eval()
    true.load_state_dict(load_file(options.true))
    floor = untrained(load_data(folder, "mnist").test.pixels[:IMAGES].float() / 255)
    parts = [floor.assign(epoch=-1, running=float("nan"))]
    print(markdown(parts[0]), file=sys.stderr)
    parts += followed(true, folder, options.seed, options.epochs, options.every)
    table = pd.concat(parts, ignore_index=True)
    keep(options.output, table, markdown(table), clock)
    drawn(table, options.output / "curves.png")


if __name__ == "__main__":
    main()
