"""How often is a verdict wrong? Explainers whose answer is known, judged on many small networks.

    python benchmarks/verdict_errors.py

Each of 200 seeds trains a small convolutional network on scikit-learn's digits, randomizes it in a cascade, and judges
planted explainers from 10 test digits: the gradient and SmoothGrad, which read the weights and must pass; edges, and
edges with a tenth of the gradient mixed in, which must fail; the gradient of the features below the logits, which reads
all weights but those of the first stage, and must fail, too; noise, which must be called uninformative. A verdict that
says the opposite is an error; an inconclusive one where there is an answer is a miss. Writes
results/benchmarks/verdict_errors/: verdicts.csv (a row for each seed, explainer and similarity), errors.csv, errors.md
(shares, with 95 % Wilson intervals) and manifest.json. An hour on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import sanity
from sanity.attributions.base import Inputs
from sanity.attributions.controls import sobel_magnitude
from sanity.command import Clock
from sanity.records import write_json
from sanity.streams import stream

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "verdict_errors"
HELD_OUT = 297
"""Digits that are not trained on: the last ones, written by other people."""
TRACE = 0.1
"""Share of the gradient in the explainer that is nearly an edge detector."""
RIGHT = {
    "gradient": "pass",
    "smoothgrad": "pass",
    "edges": "fail",
    "nearly_edges": "fail",
    "headless": "fail",
    "random": "uninformative",
}
"""What the rule must say of each explainer; of noise, that it is inconclusive because it is uninformative."""


class Small(nn.Sequential):
    """Two convolutions and a linear layer: (N, 1, 16, 16) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 8x8 digits, twice enlarged, in [0, 1]: (1797, 1, 16, 16), (1797,)."""
    found = load_digits()
    pixels = np.kron(found.images, np.ones((2, 2))) / 16
    return torch.from_numpy(pixels[:, None]).float(), torch.from_numpy(found.target).long()


def trained(pixels: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """Train a network from a seed's own weights and shuffles."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "weights").initial_seed())
        network = Small()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels), generator=stream(seed, "shuffle", epoch)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(network(pixels[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return network.eval()


def nearly_edges(network: nn.Module, pixels: Tensor, targets: Tensor) -> Tensor:
    """Edges with TRACE of the gradient mixed in, each of unit mean length: (N, 1, H, W)."""
    x = pixels.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).gather(1, targets[:, None]).sum(), x)
    edges = sobel_magnitude(network, Inputs(pixels, targets, tuple(map(str, range(len(pixels))))))
    parts = [a / a.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12) for a in (edges, gradient)]
    return (1 - TRACE) * parts[0] + TRACE * parts[1]


def headless(network: nn.Module, pixels: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the sum of the features that the logits are made of: (N, 1, H, W); blind to the last layer."""
    assert isinstance(network, nn.Sequential)
    x = pixels.detach().requires_grad_()
    features = nn.Sequential(*list(network)[:-1])(x)
    return torch.autograd.grad(features.sum(), x)[0]


PLANTED = {"nearly_edges": nearly_edges, "headless": headless}


def judged(seed: int, count: int, epochs: int, explainers: Sequence[str] = tuple(RIGHT)) -> pd.DataFrame:
    """Verdicts of one seed: its network, its weights' redraw, its `count` test digits."""
    pixels, labels = digits()
    network = trained(pixels[:-HELD_OUT], labels[:-HELD_OUT], seed, epochs)
    chosen = torch.randperm(HELD_OUT, generator=stream(seed, "digits"))[:count] - HELD_OUT
    right = float((network(pixels[-HELD_OUT:]).argmax(1) == labels[-HELD_OUT:]).double().mean())
    methods = [PLANTED.get(name, name) for name in explainers]
    rows = sanity.check(network, pixels[chosen], methods=methods, seeds=[seed], samples=10, batch_size=32)
    return said(sanity.verdicts(rows)).assign(seed=seed, accuracy=right)


def said(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Verdicts with those told apart that are inconclusive because the map is uninformative."""
    uninformative = verdicts["reason"].str.startswith("uninformative")
    return verdicts.assign(verdict=verdicts["verdict"].mask(uninformative, "uninformative"))


def errors(found: pd.DataFrame) -> pd.DataFrame:
    """Shares of right, wrong and missed verdicts: a row for each explainer and similarity, and one for all.

    wrong: pass for fail, fail for pass, either for noise; missed: inconclusive, or uninformative for what is not noise.
    """
    rows = []
    groups = [((str(m), str(s)), part) for (m, s), part in found.groupby(["method", "similarity"], sort=False)]
    for name in found["method"].unique():
        groups.append(((name, "all"), found[found["method"] == name]))
    for (method, similarity), part in [*groups, (("all", "all"), found)]:
        must = part["method"].map(RIGHT)
        right = part["verdict"] == must
        missed = part["verdict"].isin(["inconclusive", "uninformative"]) & ~right
        wrong = int((~right & ~missed).sum())
        ends = binomtest(wrong, len(part)).proportion_ci(method="wilson")
        shares = (right.mean(), wrong / len(part), ends.low, ends.high, missed.mean())
        rows.append((method, RIGHT.get(method, ""), similarity, len(part), *shares))
    columns = ["method", "must", "similarity", "n", "right", "wrong", "wrong_low", "wrong_high", "missed"]
    return pd.DataFrame(rows, columns=columns)


def markdown(table: pd.DataFrame, accuracy: pd.Series[float]) -> str:
    """The table a person reads."""
    lines = ["| explainer | must | similarity | verdicts | right | wrong, 95 % interval | missed |", "|" + "---|" * 7]
    for row in table.itertuples():
        wrong = f"{row.wrong:.1%} [{row.wrong_low:.1%}, {row.wrong_high:.1%}]"
        cells = (row.method, row.must, row.similarity, row.n, f"{row.right:.1%}", wrong, f"{row.missed:.1%}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    head = f"Networks' test accuracy: {accuracy.min():.1%} to {accuracy.max():.1%}.\n\n"
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="networks, one a seed")
    parser.add_argument("--images", type=int, default=10, help="test digits a network is judged by")
    parser.add_argument("--epochs", type=int, default=4, help="passes over 1500 training digits")
    parser.add_argument("--explainers", nargs="+", default=list(RIGHT), choices=RIGHT, help="judge these only")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    clock = Clock()
    seeds = tqdm(range(options.seeds), unit=" networks")
    parts = [judged(seed, options.images, options.epochs, options.explainers) for seed in seeds]
    found = pd.concat(parts, ignore_index=True)
    found["method"] = found["method"].str.removeprefix(f"{__name__}:")
    table = errors(found)
    options.output.mkdir(parents=True, exist_ok=True)
    kept = ["seed", "accuracy", "method", "similarity", "verdict", "score", "low", "high", "null_high"]
    found[kept].to_csv(options.output / "verdicts.csv", index=False, float_format="%.4f")
    table.to_csv(options.output / "errors.csv", index=False, float_format="%.4f")
    words = markdown(table, found["accuracy"])
    (options.output / "errors.md").write_text(words)
    manifest = {"command": " ".join(["python", *sys.argv]), "right": RIGHT, **clock.manifest()}
    write_json(options.output / "manifest.json", manifest)
    print(words)


if __name__ == "__main__":
    main()
