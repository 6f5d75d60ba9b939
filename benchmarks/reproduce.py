"""The published experiments again: train, randomize, compare with the published numbers, cell by cell.

    python benchmarks/reproduce.py                         MNIST and Fashion-MNIST, fetched by torchvision
    python benchmarks/reproduce.py --data-dir FOLDER       IDX files that are here already

Trains the CNN and the MLP on true labels, and both on permuted ones of MNIST, each to its goal; runs the parameter and
the data randomization tests on the first test images, and prints published against reproduced, cell by cell; then the
published points of Inception's curve beside those of the network in results/inception_v3_chess. Fashion-MNIST's
permuted labels are learnt only with --permuted fashion-mnist_cnn fashion-mnist_mlp: no numbers of it were published,
and it takes as long as all the rest. Finished parts are not done again: what was killed goes on where it stopped, when
the same command is given again. Works in --work; writes results/reproduction/: comparison.csv, comparison.md,
inception.csv, curves.png, strips of maps, summary_*.csv, verdicts_*.csv, manifest.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from measuring import processes
from PIL import Image
from published import STAGES, VERDICTS, cells, inception
from reasons import reasons

from sanity import plan
from sanity import run as sanity_run
from sanity.command import Clock
from sanity.experiment import PRESET, Training
from sanity.records import read_rows, write_json
from sanity.report.curves import plot
from sanity.report.looks import looks
from sanity.summary import summarize
from sanity.training import DATASETS, find_folder

RESULTS = Path(__file__).parents[1] / "results"
CHESS = [RESULTS / name / "scores.parquet" for name in ("inception_v3_chess", "inception_v3_chess_released")]
"""The same network and photographs, by our similarities and by the released code's."""
KEY = ["order", "stage", "similarity", "method"]
FEW = 10
"""Images of the published curves. With more, IG-SmoothGrad stays out: it takes thousands of gradients a map."""
COSTLY = "integrated_gradients_smoothgrad"
BATCH = 200
"""Evaluations at a time: pictures of 28x28 take more than photographs do."""
GOAL = 40
"""Minutes on two cores."""


@dataclass(frozen=True)
class Experiment:
    """One network's tests on its first `images` test images."""

    true: Training
    permuted: Training | None
    images: int
    seeds: int
    work: Path

    @property
    def networks(self) -> tuple[Training, ...]:
        """Trainings whose networks it needs."""
        return (self.true,) if self.permuted is None else (self.permuted, self.true)

    @property
    def name(self) -> str:
        """Data set, network, training's seed, images; and whether it is the parameter test only."""
        tests = "" if self.permuted else "_parameters"
        return f"{self.true.data}_{self.true.model}_{self.true.seed}_{self.images}{tests}"

    @property
    def output(self) -> Path:
        """Folder of its run."""
        return self.work / f"run_{self.name}"

    def words(self) -> list[str]:
        """Arguments of `python -m sanity.run`."""
        methods = [name for name in plan.preset(PRESET)["methods"] if self._suits(name)]
        other = ["--orders", "cascading", "independent"]
        if self.permuted:
            other += ["data", "--against", str(self.permuted.weights)]
        return [
            *("--preset", PRESET, "--model", f"mnist_{self.true.model}", "--weights", str(self.true.weights)),
            *("--images", str(self.true.images), "--limit", str(self.images), "--methods", *methods, *other),
            *("--seeds", *map(str, range(self.seeds)), "--strips", "1", "--batch-size", str(BATCH)),
            *("--output", str(self.output), "--resume"),
        ]

    def _suits(self, method: str) -> bool:
        convolutional = self.true.model == "cnn" or "gradcam" not in method
        return convolutional and (self.images <= FEW or method != COSTLY)


def ran(experiment: Experiment) -> int:
    """Run one experiment; what it prints goes to a file beside its folder."""
    experiment.work.mkdir(parents=True, exist_ok=True)
    with experiment.output.with_suffix(".txt").open("w") as told, redirect_stdout(told):
        return sanity_run.main(experiment.words())


def experiments(args: argparse.Namespace) -> list[Experiment]:
    """Every network's, with data randomization where that is wanted."""
    found = []
    for data, model in product(args.data, args.models):
        folder = find_folder(data, args.data_dir)
        for seed, images in product(range(args.trainings), args.images):
            true = Training(args.work, folder, data, model, "true", seed)
            # One network learns permuted labels. Its first weights are those of the first training on true labels.
            wanted = f"{data}_{model}" in args.permuted
            permuted = Training(args.work, folder, data, model, "permuted") if wanted else None
            found.append(Experiment(true, permuted, images, args.seeds, args.work))
    return found


def trainings(chosen: Sequence[Experiment]) -> list[Training]:
    """What the experiments need, each once, the longest first."""
    every = dict.fromkeys(one for e in chosen for one in e.networks)
    return sorted(every, key=lambda one: (one.labels == "true", one.model == "mlp"))


def carried_out(chosen: Sequence[Experiment], workers: int) -> bool:
    """Train all networks, run every experiment as soon as its own are there; whether all went well."""
    with processes(workers) as pool:
        trained = {one: pool.submit(Training.ensure, one) for one in trainings(chosen)}
        waiting, runs = list(chosen), []
        try:
            for one in as_completed(trained.values()):
                one.result()
                ready = [e for e in waiting if all(trained[network].done() for network in e.networks)]
                waiting = [e for e in waiting if e not in ready]
                runs += [pool.submit(ran, e) for e in ready]
            codes = [run.result() for run in runs]
            return not any(codes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class Log:
    """Every command that did a part of the work, this one last: command, started, seconds; None: it was stopped."""

    def __init__(self, work: Path, clock: Clock) -> None:
        self.path, self.clock = work / "commands.json", clock
        before = json.loads(self.path.read_text()) if self.path.is_file() else []
        own = {"command": " ".join(["python", *sys.argv]), "started": clock.began, "seconds": None}
        self.commands: list[dict[str, Any]] = [*before, own]
        work.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.commands)

    def close(self) -> None:
        """Note how long this command took."""
        self.commands[-1] |= self.clock.stamp()
        write_json(self.path, self.commands)


def scores_of(chosen: Sequence[Experiment], images: int) -> pd.DataFrame:
    """Rows of one network's runs; a seed is then a training and a draw of random weights."""
    parts = []
    for e in chosen:
        if e.images == images:
            rows = read_rows(e.output / "scores.parquet")
            parts.append(rows.assign(seed=rows["seed"] + 1000 * e.true.seed, data=e.true.data, net=e.true.model))
    return pd.concat(parts, ignore_index=True)


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Published cells of one network against its rows: difference, 95 % interval, distance in standard deviations.

    The standard deviation is over images, which is what the published bands mean.
    """
    summary = summarize(rows)[[*KEY, "mean", "low", "high", "std", "n", "n_nan"]]
    summary = summary.assign(data=rows["data"].iloc[0], model=rows["net"].iloc[0])
    found = cells().merge(summary, on=["data", "model", *KEY]).rename(columns={"mean": "reproduced"})
    found["difference"] = found["reproduced"] - found["published"]
    found["deviations"] = found["difference"].abs() / found["std"]
    return found


def inception_compared() -> pd.DataFrame:
    """Published points of Inception's curve beside the chess network's mean and interval there."""
    found = pd.concat([summarize(read_rows(path).query("order == 'cascading'")) for path in CHESS])
    place = ["similarity", "method", "stage"]
    # Both runs may have scores by absolute rank: the first one's count.
    found = found.drop_duplicates(place)
    return inception().merge(found[[*place, "mean", "low", "high", "n"]], on=place)


def markdown(found: pd.DataFrame) -> str:
    """Published against reproduced as a table a person reads."""
    head = ["order", "stage", "similarity", "method", "published", "reproduced", "95 % interval", "difference", "std"]
    lines = ["| " + " | ".join([*head, ""]) + " |", "|" + "---|" * (len(head) + 1)]
    for row in found.itertuples():
        cells_ = [row.order, row.stage, row.similarity, row.method, f"{row.published:.3f}", f"{row.reproduced:.3f}"]
        cells_ += [f"[{row.low:.3f}, {row.high:.3f}]", f"{row.difference:+.3f}", f"{row.std:.3f}"]
        lines.append("| " + " | ".join([*cells_, "" if row.deviations <= 2 else "outside two"]) + " |")
    return "\n".join(lines) + f"\n\n{agreement(found)}\n"


def agreement(found: pd.DataFrame) -> str:
    """How many published cells were met, in words."""
    within = int((found["deviations"] <= 2).sum())
    return f"{within} of {len(found)} cells within two standard deviations over images."


def cascades(every: dict[str, pd.DataFrame]) -> str:
    """Every network in both orders: absolute and signed rank correlation, of all pixels and of the foreground."""
    kinds = ("spearman_abs", "spearman", "spearman_abs_foreground", "spearman_foreground")
    lines = ["## Both orders", "", "Absolute, signed rank correlation of all pixels; of those that are not 0.", ""]
    for (name, rows), order in product(every.items(), ("cascading", "independent")):
        chosen = rows[rows["similarity"].isin(kinds) & (rows["order"] == order) & (rows["stage_index"] > 0)]
        found = summarize(chosen)
        stages = list(found.sort_values("stage_index")["stage"].unique())
        head = ["method", *stages]
        lines += [f"## {name}, {order}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for method, own in found.groupby("method", sort=False):
            means = own.set_index(["stage", "similarity"])["mean"]
            values = [[f"{means.get((stage, kind), float('nan')):.2f}" for kind in kinds] for stage in stages]
            cells_ = [", ".join(four[:2]) + "; " + ", ".join(four[2:]) for four in values]
            lines.append("| " + " | ".join([str(method), *cells_]) + " |")
        lines.append("")
    return "\n".join(lines)


def verdicts(e: Experiment) -> str:
    """Published verdicts beside those of a run's cascade, by absolute rank, of all pixels and of the foreground."""
    found = pd.read_csv(e.output / "verdicts.csv").query("order == 'cascading'").set_index(["method", "similarity"])
    lines = ["## Verdicts", "", "| method | published | all pixels | foreground |", "|---|---|---|---|"]
    for method, published in VERDICTS.items():
        own = []
        for similarity in ("spearman_abs", "spearman_abs_foreground"):
            cell = found.loc[(method, similarity)]
            own.append(cell["verdict"] + "".join(re.findall("; mean above .*", cell["reason"])))
        lines.append("| " + " | ".join([method, published, *own]) + " |")
    words = (
        "Published verdicts are about the higher layers as they turn random. Here a method fails if it stays above .9 "
        "with the logits random, or with everything random above what maps of different images show."
    )
    return "\n".join([*lines, "", words, ""])


def times(needed: Sequence[Training], chosen: Sequence[Experiment], commands: Sequence[Mapping[str, Any]]) -> str:
    """Minutes of each part, each of which takes one core, and of the commands that did them."""
    parts = {one.folder.name: header(one)["seconds"] / 60 for one in needed}
    for e in chosen:
        parts[e.output.name] = json.loads((e.output / "run.json").read_text())["seconds"] / 60
    lines = ["## Time", "", "| part | minutes of one core |", "|---|---|"]
    lines += [f"| {name} | {minutes:.1f} |" for name, minutes in parts.items()]
    lines += [f"| all of them | {sum(parts.values()):.1f} |", ""]
    lines += ["| command | minutes of wall |", "|---|---|"]
    for one in commands:
        minutes = "stopped" if one["seconds"] is None else f"{one['seconds'] / 60:.1f}"
        lines.append(f"| `{one['command']}`, {one['started'][:16]} | {minutes} |")
    words = f"Goal: {GOAL} minutes of wall for all. What an earlier command had finished, a later one does not repeat."
    return "\n".join([*lines, "", words, ""])


def inception_markdown(found: pd.DataFrame) -> str:
    """Published points beside the chess network's."""
    title = "## Inception v3: published points, of other weights and photographs, beside a network that plays chess"
    lines = [
        title,
        "",
        "| similarity | method | published, of | stage | published | chess network, 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for row in found.itertuples():
        here = f"{row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]"
        words = [row.similarity, row.method, row.pictures, row.stage, f"{row.published:.2f}", here]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


def drawn(every: dict[str, pd.DataFrame], path: Path) -> None:
    """Curves of every network: cascading, all pixels and foreground; independent. Crosses are published means."""
    panels = [("cascading", "spearman_abs"), ("cascading", "spearman_abs_foreground"), ("independent", "spearman_abs")]
    # One legend: a method looks the same in all panels, though MLPs have no GradCAM.
    methods = list(dict.fromkeys(method for rows in every.values() for method in rows["method"].unique()))
    size = (4.2 * len(every), 3.1 * len(panels))
    figure, grid = plt.subplots(len(panels), len(every), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for column, (name, rows) in enumerate(every.items()):
        summary = summarize(rows)
        for row, (order, similarity) in enumerate(panels):
            plot(grid[row, column], summary, order, similarity, 7.5, methods)
            if not row:
                crossed(grid[row, column], rows, methods)
            where = "foreground only" if similarity.endswith("foreground") else "all pixels"
            grid[row, column].set_title(f"{name}, {order}, {where}", fontsize=9)
            grid[row, 0].set_ylabel("absolute rank correlation")
    handles, labels = max((axis.get_legend_handles_labels() for axis in grid.flat), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, 2 * len(every)), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    shrunk(path)


def crossed(axis: plt.Axes, rows: pd.DataFrame, methods: Sequence[str]) -> None:
    """Mark the published means of a cascade, each in its method's colour."""
    found = compared(rows).query("order == 'cascading'")
    colours = looks(methods)
    for cell in found.itertuples():
        axis.plot(1 + STAGES.index(cell.stage), cell.published, "x", color=colours[cell.method].colour, markersize=7)


def shrunk(path: Path) -> None:
    """Write a picture again with 256 colours: a third of the bytes, no difference to the eye."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def kept(e: Experiment, output: Path) -> None:
    """Keep a run's first strips and its summary; its rows stay in the working folder."""
    for figure in sorted((e.output / "figures").glob("strip_*.png")):
        target = output / f"{figure.stem.rsplit('_', 1)[0]}_{e.name}.png"
        target.write_bytes(figure.read_bytes())
        shrunk(target)
    for name in ("summary", "verdicts"):
        (output / f"{name}_{e.name}.csv").write_text((e.output / f"{name}.csv").read_text())


def header(one: Training) -> dict[str, Any]:
    """What a training came to."""
    found = json.loads((one.folder / "train.json").read_text())
    names = ("recipe", "accuracy", "goal_met", "epochs", "seconds", "threads", "weights_sha256", "machine")
    return {name: found[name] for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(DATASETS), choices=DATASETS)
    parser.add_argument("--data-dir", type=Path, help="folder of the IDX files, or of folders of them by data set")
    parser.add_argument("--models", nargs="+", default=["cnn", "mlp"], choices=["cnn", "mlp"])
    parser.add_argument("--images", type=int, nargs="+", default=[FEW], help="first test images (published: 10)")
    parser.add_argument("--seeds", type=int, default=1, help="draws of random weights (published: 1)")
    parser.add_argument("--trainings", type=int, default=1, help="networks trained on true labels (published: 1)")
    pairs = [f"{data}_{model}" for data, model in product(DATASETS, ("cnn", "mlp"))]
    usual = [pair for pair in pairs if pair.startswith("mnist")]
    parser.add_argument("--permuted", nargs="*", default=usual, choices=pairs, help="with data randomization")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, default=Path("reproduction_work"), help="networks and runs are kept here")
    parser.add_argument("--output", type=Path, default=RESULTS / "reproduction")
    args = parser.parse_args()
    if absent := [path for path in CHESS if not path.is_file()]:
        parser.error(f"{absent[0]} is missing: it is part of this repository")
    clock, chosen = Clock(), experiments(args)
    needed, log = trainings(chosen), Log(args.work, clock)
    if not carried_out(chosen, args.workers):
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    every, others, tables = {}, {}, []
    for data, model in product(args.data, args.models):
        own = [e for e in chosen if (e.true.data, e.true.model) == (data, model)]
        few, *more = args.images
        every[f"{data} {model}"] = scores_of(own, few)
        others |= {f"{data} {model}, {images} images": scores_of(own, images) for images in more}
        tables.append(compared(every[f"{data} {model}"]))
        for e in own:
            kept(e, args.output)
    found, points = pd.concat(tables, ignore_index=True), inception_compared()
    found.to_csv(args.output / "comparison.csv", index=False, float_format="%.4f")
    points.to_csv(args.output / "inception.csv", index=False, float_format="%.4f")
    judged = [verdicts(e) for e in chosen if (e.true.data, e.true.model) == ("mnist", "cnn")][:1]
    further = {name: cells_ for name, rows in others.items() if len(cells_ := compared(rows))}
    without = f"without {COSTLY}, which takes thousands of gradients a map"
    also = [f"{name}, {without}: {agreement(cells_)}\n" for name, cells_ in further.items()]
    tested = cascades(every | others)
    parts = [markdown(found), *also, reasons(found, every), *judged, tested, inception_markdown(points)]
    drawn(every, args.output / "curves.png")
    log.close()
    words = "\n".join([*parts, times(needed, chosen, log.commands)])
    (args.output / "comparison.md").write_text(words)
    trained = {one.folder.name: header(one) for one in needed}
    manifest = {"command": " ".join(["python", *sys.argv]), "trainings": trained, **clock.manifest()}
    write_json(args.output / "manifest.json", manifest)
    print(words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
