"""What do similarities say of maps that have nothing in common? The calibration table of Adebayo et al. 2018, again.

    python benchmarks/controls.py

Compares 50 pairs of unrelated maps by every measure, as the article's text reads it and as its released code does:
noise with noise, the gradient with noise, the gradient with another picture's, the edges with the gradient. Noise is
of Inception's size, 299x299, one channel; pictures are squares cut from the bundled photographs, the network is the
bundled one. Writes results/benchmarks/controls/: controls.csv, controls.md (mean, 95 % interval over pairs, published
value) and manifest.json. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from sanity import images, models
from sanity.attributions import find
from sanity.attributions.base import Inputs
from sanity.command import Clock
from sanity.engine import Engine, predict
from sanity.maps import clip_signed, signed
from sanity.records import write_json
from sanity.similarity import compare, get, hog_descriptor, pearson
from sanity.streams import stream
from sanity.summary import generator, interval

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "controls"
SIDE = 299
READINGS = {
    "text": ("spearman", "spearman_abs", "hog", "ssim_published"),
    "code": ("spearman_released", "spearman_abs_released", "hog_released", "ssim_released"),
}
MEASURES = ("rank, signed", "rank, absolute", "HOG", "SSIM")
PUBLISHED = {
    "gradient, Gaussian": (-0.0005, 0.0003, -0.0016, 0.0003),
    "uniform, uniform": (0.0002, -0.0015, 0.078, 0.0008),
    "Gaussian, Gaussian": (0.0002, 0.0004, -0.0013, 0.0002),
}
"""Mean over 50 pairs, in the order of MEASURES [arXiv 1810.03292]."""


def noise(kind: str, shape: tuple[int, ...], name: str) -> Tensor:
    """Draw independent values in every place: standard normal ("Gaussian"), or uniform on [-1, 1]."""
    draws = stream("controls", kind, name)
    if kind == "Gaussian":
        return torch.randn(shape, generator=draws)
    return torch.rand(shape, generator=draws) * 2 - 1


def squares(count: int) -> list[Image.Image]:
    """Cut squares of three fifths of the shorter side, at places drawn at random, from each photograph in turn."""
    photographs = [picture.open().convert("RGB") for picture in images.find("bundled").pictures]
    found = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        side = min(photograph.size) * 3 // 5
        draws = stream("controls", "square", number)
        left, top = (int(torch.randint(edge - side + 1, (), generator=draws)) for edge in photograph.size)
        found.append(photograph.crop((left, top, left + side, top + side)))
    return found


def explained(count: int) -> dict[str, Tensor]:
    """Gradient and edges of `count` squares: name -> (count, channels, H, W)."""
    classifier = models.load("efficientnet_lite0")
    if classifier.preprocess is None:
        raise ValueError(f"{classifier.name} takes tensors only")
    pixels = torch.stack([classifier.preprocess(square) for square in squares(count)])
    network, engine = classifier.network.eval(), Engine([find("gradient"), find("edges")], 4)
    inputs = Inputs(pixels, predict(network, pixels, 4).argmax(1), tuple(map(str, range(count))))
    return dict(engine.explain(network, inputs))


def pairs(count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of unrelated maps: words -> two stacks of `count` maps."""
    found = explained(count)
    gradient, edges = found["gradient"], found["edges"]
    drawn: Callable[[str, str], Tensor] = partial(_stack, count, (1, SIDE, SIDE))
    return {
        "gradient, Gaussian": (gradient, _stack(count, tuple(gradient.shape[1:]), "Gaussian", "beside a gradient")),
        "uniform, uniform": (drawn("uniform", "a"), drawn("uniform", "b")),
        "Gaussian, Gaussian": (drawn("Gaussian", "a"), drawn("Gaussian", "b")),
        "gradient, another picture's": (gradient, gradient.roll(1, 0)),
        "edges, gradient": (edges.expand_as(gradient), gradient),
        "edges, another picture's": (edges, edges.roll(1, 0)),
    }


def _stack(count: int, shape: tuple[int, ...], kind: str, name: str) -> Tensor:
    return torch.stack([noise(kind, shape, f"{name} {number}") for number in range(count)])


def calibrated(count: int) -> pd.DataFrame:
    """Measure every pair: pair, reading, measure, mean, low, high, n, published (NaN where there is none)."""
    rows = []
    for words, (a, b) in pairs(count).items():
        for reading, names in READINGS.items():
            for place, name in enumerate(names):
                one = get(name)
                values, status = compare(one, one.describe(a), one.describe(b))
                scored = values[[word == "ok" for word in status]].numpy()
                low, high = interval(scored[None], generator("controls", words, name))
                published = PUBLISHED.get(words, (float("nan"),) * len(MEASURES))[place]
                rows.append((words, reading, MEASURES[place], scored.mean(), low, high, len(scored), published))
    columns = ["pair", "reading", "measure", "mean", "low", "high", "n", "published"]
    return pd.DataFrame(rows, columns=columns)


def inner_hog(a: Tensor, b: Tensor) -> Tensor:
    """HOG as the text reads it, (N, 1, H, W) twice -> (N,), of the blocks that do not touch the border.

    Part of why Gaussian noise is not at 0: as skimage has it, the gradient across the border is 0 in every map.
    """
    described = []
    for maps in (a, b):
        blocks = hog_descriptor(clip_signed(signed(maps)))
        side = round((blocks.shape[1] // (9 * 9)) ** 0.5)
        described.append(blocks.view(len(blocks), side, side, -1)[:, 1:-1, 1:-1].flatten(1))
    return pearson(*described)


def check_border(count: int) -> str:
    """The same noise with and without the blocks at the border, in words."""
    shape, words = (1, SIDE, SIDE), []
    for kind in ("uniform", "Gaussian"):
        a, b = (_stack(count, shape, kind, name) for name in ("a", "b"))
        values = inner_hog(a, b).numpy()
        low, high = interval(values[None], generator("controls", kind, "inner"))
        words.append(f"{kind} {values.mean():z.4f} [{low:z.4f}, {high:z.4f}]")
    return "HOG (text) without the blocks at the border, noise against noise: " + "; ".join(words) + ".\n"


def markdown(found: pd.DataFrame) -> str:
    """A table a person reads: a row a pair and reading, a column a measure."""
    lines = ["| pair | reading | " + " | ".join(MEASURES) + " |", "|---|---|" + "---|" * len(MEASURES)]
    for (words, reading), part in found.groupby(["pair", "reading"], sort=False):
        cells = [
            f"{row.mean:z.4f} [{row.low:z.4f}, {row.high:z.4f}]"
            + (f", published {row.published:.4f}" if row.published == row.published else "")
            for row in part.itertuples()
        ]
        lines.append(f"| {words} | {reading} | " + " | ".join(cells) + " |")
    return f"Mean over {found['n'].max()} pairs, [95 % interval].\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=50, help="at least 2 (published: 50)")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error(f"--pairs must be at least 2, not {options.pairs}")
    clock, found = Clock(), calibrated(options.pairs)
    options.output.mkdir(parents=True, exist_ok=True)
    found.to_csv(options.output / "controls.csv", index=False, float_format="%.5f")
    words = markdown(found) + "\n" + check_border(options.pairs)
    (options.output / "controls.md").write_text(words)
    command = " ".join(["python", *sys.argv])
    write_json(options.output / "manifest.json", {"command": command, **clock.manifest()})
    print(words)


if __name__ == "__main__":
    main()
