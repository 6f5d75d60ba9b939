"""The published experiments again: train, randomize, compare with the published numbers, cell by cell.

    python benchmarks/reproduce.py                         MNIST, fetched by torchvision
    python benchmarks/reproduce.py --data-dir FOLDER       IDX files that are here already

Trains the CNN and the MLP on true and on permuted labels, runs the parameter and the data randomization tests on
the first test images, and prints published against reproduced. Finished parts are not done again: what was killed
goes on where it stopped. Writes results/reproduction/<data>_<model>/: the runs' tables and figures, and
comparison.csv, comparison.md, manifest.json.

Published numbers: the notebooks that came with Adebayo et al. 2018 (parameter randomization, CNN on MNIST, absolute
rank correlation, mean of 10 images) and its figures (data randomization, read off, +-0.02).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from sanity import run as sanity_run
from sanity import train as sanity_train
from sanity.command import Clock, environment
from sanity.records import read_rows, write_json
from sanity.training import find_folder

OUTPUT = Path(__file__).parents[1] / "results" / "reproduction"
STAGES = ("softmax_linear", "fc1", "hidden2", "hidden1")
CASCADE = {
    "gradient": (0.601, 0.396, 0.106, 0.082),
    "smoothgrad": (0.536, 0.330, 0.180, 0.213),
    "guided_backprop": (0.888, 0.773, 0.628, 0.444),
    "gradcam": (0.556, 0.344, 0.290, 0.299),
    "guided_gradcam": (0.555, 0.359, 0.329, 0.282),
    "integrated_gradients": (0.994, 0.993, 0.993, 0.992),
    "gradient_x_input": (0.993, 0.993, 0.993, 0.992),
    "integrated_gradients_smoothgrad": (0.577, 0.429, 0.379, 0.361),
}
"""CNN, MNIST, cascading, absolute rank correlation, mean of 10 images; standard deviations .03 to .23."""
PERMUTED = {
    "gradient": (0.16, 0.09),
    "smoothgrad": (0.24, 0.10),
    "guided_backprop": (0.57, 0.12),
    "gradcam": (0.03, 0.01),
    "guided_gradcam": (0.57, 0.12),
    "integrated_gradients": (0.99, 0.14),
    "integrated_gradients_smoothgrad": (0.46, 0.12),
    "gradient_x_input": (0.99, 0.13),
}
"""CNN, MNIST, true against permuted labels: (absolute, signed) rank correlation."""


def published(data: str, model: str) -> pd.DataFrame:
    """Published cells of one network: order, stage, similarity, method, published."""
    if (data, model) != ("mnist", "cnn"):
        return pd.DataFrame(columns=["order", "stage", "similarity", "method", "published"])
    rows = [
        ("cascading", stage, "spearman_abs", method, value)
        for method, values in CASCADE.items()
        for stage, value in zip(STAGES, values, strict=True)
    ]
    rows += [
        ("data", "permuted labels", similarity, method, value)
        for method, values in PERMUTED.items()
        for similarity, value in zip(("spearman_abs", "spearman"), values, strict=True)
    ]
    return pd.DataFrame(rows, columns=["order", "stage", "similarity", "method", "published"])


def compared(scores: pd.DataFrame, summary: pd.DataFrame, data: str, model: str) -> pd.DataFrame:
    """Published against reproduced: difference, interval of the reproduced mean, distance in standard deviations.

    The standard deviation is over images, the published bands' meaning.
    """
    spread = scores.groupby(["order", "stage", "similarity", "method"])["value"].std(ddof=0).rename("std_images")
    keys = ["order", "stage", "similarity", "method"]
    found = published(data, model).merge(summary[[*keys, "mean", "low", "high", "n", "n_nan"]], on=keys, how="left")
    found = found.merge(spread.reset_index(), on=keys, how="left")
    found["difference"] = found["mean"] - found["published"]
    found["deviations"] = found["difference"].abs() / found["std_images"]
    found["within_two"] = found["deviations"] <= 2
    return found


def markdown(found: pd.DataFrame) -> str:
    """The comparison as a table a person reads."""
    head = ["order", "stage", "similarity", "method", "published", "reproduced", "95 % interval", "difference", "std"]
    lines = ["| " + " | ".join(head) + " | |", "|" + "---|" * (len(head) + 1)]
    for row in found.itertuples():
        cells = [row.order, row.stage, row.similarity, row.method, f"{row.published:.3f}", f"{row.mean:.3f}"]
        cells += [f"[{row.low:.3f}, {row.high:.3f}]", f"{row.difference:+.3f}", f"{row.std_images:.3f}"]
        lines.append("| " + " | ".join(cells) + (" | |" if row.within_two else " | outside |"))
    return "\n".join(lines) + "\n"


def trained(args: argparse.Namespace, folder: Path, model: str, labels: str) -> Path:
    """Train one network, or find it trained; returns its weights."""
    output = args.work / f"{args.data}_{model}_{labels}"
    words = ["--data", args.data, "--model", model, "--labels", labels, "--data-dir", str(folder)]
    if sanity_train.main([*words, "--output", str(output), "--resume"]) == 2:
        sys.exit(2)
    return output / "model.safetensors"


def tested(args: argparse.Namespace, folder: Path, model: str) -> Path:
    """Run both randomization tests of one network; returns the run's folder."""
    true, permuted = (trained(args, folder, model, labels) for labels in ("true", "permuted"))
    output = args.work / f"run_{args.data}_{model}_{args.images}"
    words = ["--preset", "as-released-mnist", "--model", f"mnist_{model}", "--weights", str(true)]
    words += ["--images", str(folder), "--limit", str(args.images), "--output", str(output), "--resume"]
    words += ["--orders", "cascading", "independent", "data", "--against", str(permuted), "--strips", "3"]
    words += ["--seeds", *map(str, range(args.seeds))]
    if model == "mlp":  # no convolution, so no GradCAM
        words += ["--methods", *(m for m in CASCADE if "gradcam" not in m), "edges", "random"]
    if sanity_run.main(words):
        sys.exit(2)
    return output


def kept(run: Path, output: Path) -> None:
    """Copy a run's tables and figures; its raw arrays stay in the working folder."""
    output.mkdir(parents=True, exist_ok=True)
    for name in ("summary.csv", "summary.md", "verdicts.csv", "run.json", "scores.parquet"):
        shutil.copy(run / name, output / name)
    shutil.copytree(run / "figures", output / "figures", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--data-dir", type=Path, help="folder of the IDX files (default: fetched once)")
    parser.add_argument("--models", nargs="+", default=["cnn", "mlp"], choices=["cnn", "mlp"])
    parser.add_argument("--images", type=int, default=10, help="first test images (published: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="randomizations of the weights (published: 1)")
    parser.add_argument("--work", type=Path, default=Path("reproduction_work"), help="networks and runs are kept here")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    folder = find_folder(args.data, args.data_dir)
    for model in args.models:
        clock, output = Clock(), args.output / f"{args.data}_{model}"
        run = tested(args, folder, model)
        kept(run, output)
        scores, summary = read_rows(run / "scores.parquet"), pd.read_csv(run / "summary.csv")
        found = compared(scores, summary, args.data, model)
        if len(found):
            found.to_csv(output / "comparison.csv", index=False, float_format="%.4f")
            (output / "comparison.md").write_text(markdown(found))
            print(markdown(found))
            print(f"{int(found['within_two'].sum())} of {len(found)} cells within two standard deviations")
        training = {
            labels: json.loads((args.work / f"{args.data}_{model}_{labels}" / "train.json").read_text())
            for labels in ("true", "permuted")
        }
        command = " ".join(["python", "benchmarks/reproduce.py", *sys.argv[1:]])
        manifest = {"command": command, "training": training, **environment(), **clock.stamp()}
        write_json(output / "manifest.json", manifest)


if __name__ == "__main__":
    main()
