"""How soon do masks converge? The objective of meaningful perturbation against network evaluations, by scheme.

    python benchmarks/perturbation_convergence.py                         the bundled photographs
    python benchmarks/perturbation_convergence.py --images bundled FOLDER  and those of a folder

All schemes minimise the paper's objective for EfficientNet-Lite0 and the class it predicts. What is plotted is that
objective itself, its expectation over all 16 shifts of the picture, and not the one noisy shift that a step sees;
measuring it costs evaluations that are not counted. The goal: what Adam reaches in 300 evaluations, reached in 50.
Writes results/benchmarks/perturbation_convergence/: convergence.png, convergence.csv (a row for each scheme, photograph
and number of evaluations), convergence.md and manifest.json. A quarter of an hour on one core; what was killed goes
on, when the same command is given again, with the scheme it stopped in.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sanity import images, models
from sanity.attributions.base import Inputs
from sanity.attributions.perturbation import DEFAULT, PAPER, MaskProblem, MaskSettings, descent_steps
from sanity.command import Clock
from sanity.records import write_json
from sanity.report.looks import COLOURS

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "perturbation_convergence"
REFERENCE, GOAL = "Adam 0.1, the paper's", "sequential, 50"
SCHEMES: dict[str, MaskSettings] = {
    REFERENCE: PAPER,
    "Adam 0.3": replace(PAPER, learning_rate=0.3, steps=100),
    "L-BFGS, projected": replace(PAPER, optimiser="lbfgs", steps=100),
    GOAL: DEFAULT,
    "sequential, 100": replace(DEFAULT, steps=100),
}
GOAL_AT = DEFAULT.steps
MARKS = (1, 3, 5, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300)


class Measured(MaskProblem):
    """The same problem, where draw i is shift i of all that there are."""

    def shifts(self, draw: int) -> list[tuple[int, int]]:
        return [divmod(draw, self.settings.jitter + 1)] * len(self.inputs.ids)

    @torch.no_grad()
    def expectation(self, coarse: Tensor) -> Tensor:
        """The objective's expectation over the shifts, (N, 1, h, w) -> (N,)."""
        draws = range((self.settings.jitter + 1) ** 2)
        return torch.stack([self.objective(coarse, draw) for draw in draws]).mean(0)


def measured(
    network: nn.Module, inputs: Inputs, settings: MaskSettings, bar: tqdm[None]
) -> Iterator[dict[str, object]]:
    """Rows of one scheme: evaluations, image, objective."""
    yardstick = Measured(network, inputs, replace(settings, noise_on_image=0.0))
    for step, (_, descent) in enumerate(descent_steps(MaskProblem(network, inputs, settings)), start=1):
        bar.update()
        if step in MARKS:
            for name, value in zip(inputs.ids, yardstick.expectation(descent.result).tolist(), strict=True):
                yield {"evaluations": step, "image": name, "objective": value}


def converge(sets: list[images.Images], schemes: dict[str, MaskSettings], seed: int, partial: Path) -> pd.DataFrame:
    """Rows of all schemes on all photographs: scheme, evaluations, image, objective; kept in `partial` meanwhile."""
    classifier = models.load("efficientnet_lite0")
    network = classifier.network.eval()
    rows = pd.read_csv(partial) if partial.is_file() else pd.DataFrame(columns=["scheme", "image"])
    done = set(zip(rows.scheme, rows.image, strict=True))
    with tqdm(total=len(sets) * sum(s.steps for s in schemes.values()), unit="evaluation", smoothing=0.05) as bar:
        for chosen, (name, settings) in product(sets, schemes.items()):
            bar.set_description(name)
            if (name, chosen.ids[0]) in done:
                bar.update(settings.steps)
                continue
            pixels = chosen.load(classifier.preprocess)
            with torch.no_grad():
                targets = network(pixels).argmax(1)
            inputs = Inputs(pixels, targets, chosen.ids, seed=seed)
            found = [{"scheme": name, **row} for row in measured(network, inputs, settings, bar)]
            rows = pd.concat([rows, pd.DataFrame(found)]) if len(rows) else pd.DataFrame(found)
            rows.to_csv(partial, index=False)
    return rows


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """By photograph: what the reference and the goal's scheme reach, their ratio, and when the one passes the other."""
    table = rows.pivot_table(index="image", columns=["scheme", "evaluations"], values="objective", sort=False)
    last = max(table[REFERENCE].columns)
    reached = table[REFERENCE][last]
    goal = table[GOAL]
    passed = goal.le(reached, axis=0)
    return pd.DataFrame(
        {
            f"Adam 0.1 at {GOAL_AT}": table[REFERENCE][GOAL_AT],
            f"Adam 0.1 at {last}": reached,
            f"sequential at {GOAL_AT}": goal[GOAL_AT],
            "ratio": goal[GOAL_AT] / reached,
            "reached at": passed.idxmax(axis=1).where(passed.any(axis=1)).astype("Int64"),
        }
    )


def medians(rows: pd.DataFrame) -> pd.DataFrame:
    """Median over photographs of each scheme (rows) at each number of evaluations (columns)."""
    return rows.pivot_table(
        index="scheme", columns="evaluations", values="objective", aggfunc="median", sort=False
    ).sort_index(axis=1)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Median and range over photographs: the objective, and its ratio to what the reference ends at."""
    last = rows[rows.scheme == REFERENCE].evaluations.max()
    ends = rows[(rows.scheme == REFERENCE) & (rows.evaluations == last)].set_index("image").objective
    rows = rows.assign(ratio=rows.objective / rows.image.map(ends))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.1), layout="constrained", sharex=True)
        for axis, column in zip(axes, ("objective", "ratio"), strict=True):
            lines(axis, rows, column)
        axes[1].axhline(1, color="black", linewidth=0.8)
        axes[0].set_ylabel("objective")
        axes[1].set_ylabel(f"objective / Adam 0.1's after {last}")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=200)
        plt.close(figure)


def lines(axis: plt.Axes, rows: pd.DataFrame, column: str) -> None:
    """One panel."""
    styles = zip(SCHEMES, COLOURS, ("-", "--", ":", "-", "--"), strict=False)
    for name, colour, dash in styles:
        found = rows[rows.scheme == name].groupby("evaluations")[column].agg(["median", "min", "max"])
        axis.plot(found.index, found["median"], dash, color=colour, label=name, linewidth=1.6)
        axis.fill_between(found.index, found["min"], found["max"], color=colour, alpha=0.1, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel="network evaluations (forward and backward)")
    axis.axvline(GOAL_AT, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_xticks([1, 3, 10, 30, GOAL_AT, 100, 300], labels=["1", "3", "10", "30", str(GOAL_AT), "100", "300"])
    axis.minorticks_off()


def written(rows: pd.DataFrame) -> str:
    """Both tables in Markdown, and the verdict."""
    table = compared(rows)
    met = int((table["ratio"] <= 1).sum())
    low, high = table["ratio"].min(), table["ratio"].max()
    verdict = (
        f"Sequential, at {GOAL_AT} evaluations, over what Adam 0.1 ends at: median {table['ratio'].median():.3f}, "
        f"range {low:.3f} to {high:.3f}; at or below it on {met} of {len(table)} photographs."
    )
    parts = [
        "# Convergence of meaningful perturbation",
        verdict,
        "Objective by photograph:",
        markdown(table),
        "Median objective over photographs, by network evaluations:",
        markdown(medians(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; missing cells empty."""

    def cell(value: object) -> str:
        if pd.isna(value):
            return ""
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    head = ["", *map(str, table.columns)]
    body = [[str(index), *map(cell, row)] for index, *row in table.itertuples(name=None)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", default=["bundled"], metavar="SOURCE", help="bundled, folders, files")
    parser.add_argument("--limit", type=int, help="photographs of each source")
    parser.add_argument("--steps", type=int, default=300, help="evaluations of the other schemes, at least 50")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the shifts")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.steps not in MARKS or options.steps < GOAL_AT:
        parser.error(f"--steps must be one of {', '.join(str(m) for m in MARKS if m >= GOAL_AT)}, not {options.steps}")
    torch.set_num_threads(options.threads)
    clock, output = Clock(), options.output
    sets = [s for source in options.images for s in images.find(source, limit=options.limit).chunks(options.batch_size)]
    schemes = {
        name: s if s.optimiser == "sequential" else replace(s, steps=min(s.steps, options.steps))
        for name, s in SCHEMES.items()
    }
    identity = repr((schemes, options.seed, [chosen.digest for chosen in sets], torch.__version__))
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f".partial-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.csv"
    rows = converge(sets, schemes, options.seed, partial)
    rows.to_csv(output / "convergence.csv", index=False, float_format="%.6g")
    (output / "convergence.md").write_text(written(rows))
    draw(rows, output / "convergence.png")
    manifest = {
        "command": " ".join(["python", *sys.argv]),
        "seed": options.seed,
        "schemes": {name: asdict(settings) for name, settings in schemes.items()},
        **clock.manifest(),
    }
    write_json(output / "manifest.json", manifest)
    partial.unlink()
    print(written(rows))


if __name__ == "__main__":
    main()
