"""Does activation freezing (Hara) pass the sanity check? Figure, answer and table from stored runs.

    python -m sanity.run --config benchmarks/activation_freezing.yaml \\
        --output results/activation_freezing/efficientnet_lite0
    python -m sanity.run --config benchmarks/activation_freezing.yaml --model inception_v3 --weights FILE.pth \\
        --images FOLDER --limit 4 --samples 4 --seeds 0 --output results/activation_freezing/inception_v3
    python benchmarks/activation_freezing.py --weights FILE.pth --image PICTURE

For every method with and without freezing: similarity to the trained map at each stage, with bootstrap intervals over
images, verdict by the rule of `sanity.verdicts`, and the paired difference that freezing makes. Draws the source's
figure: maps without freezing in the top row, with freezing in the bottom row. Writes results/activation_freezing/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import measuring

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sanity import attributions, images, maps, models
from sanity.attributions import Inputs
from sanity.attributions.rectifiers import Rectifying, threshold
from sanity.command import Clock
from sanity.engine import Engine, predict
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.records import read_rows, read_unrelated, write_json
from sanity.summary import verdicts

OUTPUT = Path(__file__).parents[1] / "results" / "activation_freezing"
TITLES = {
    "gradient": "Gradient", "guided_backprop": "Guided Backprop", "lrp_epsilon": "LRP",
    "integrated_gradients": "Integrated Gradients", "smoothgrad": "SmoothGrad", "deeplift": "DeepLIFT",
}  # fmt: skip
RESAMPLES = 2000
P = 80.0


def differences(scores: pd.DataFrame) -> pd.DataFrame:
    """By order, similarity, stage and method: mean with and without freezing, and the paired difference's interval."""
    random = scores[(scores.stage_index > 0) & (scores.status == "ok")]
    keys = ["order", "similarity", "stage_index", "stage", "image", "seed"]
    wide = random.pivot_table(index=keys, columns="method", values="value").reset_index()
    rows = []
    generator = np.random.default_rng(0)
    for (order, similarity, index, stage), group in wide.groupby(keys[:4], sort=True):
        for method in TITLES:
            both = group[["image", method, f"frozen:{method}"]].dropna().groupby("image").mean()
            if both.empty:
                continue
            apart = (both[f"frozen:{method}"] - both[method]).to_numpy()
            drawn = generator.choice(apart, (RESAMPLES, len(apart))).mean(1)
            low, high = np.percentile(drawn, [2.5, 97.5])
            rows.append(
                {
                    "order": order, "similarity": similarity, "stage_index": index, "stage": stage, "method": method,
                    "images": len(apart), "plain": both[method].mean(), "frozen": both[f"frozen:{method}"].mean(),
                    "difference": apart.mean(), "low": low, "high": high,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def answers(run: Path) -> pd.DataFrame:
    """Verdict of each method without -> with freezing: a row a method and order, a column a similarity."""
    judged = verdicts(read_rows(run / "scores.parquet"), read_unrelated(run))
    said = judged.set_index(["method", "order", "similarity"])["verdict"]
    return pd.DataFrame(
        {"method": title, "order": order}
        | {s: f"{said[m, order, s]} -> {said[f'frozen:{m}', order, s]}" for s in judged["similarity"].unique()}
        for order in judged["order"].unique()
        for m, title in TITLES.items()
    )


def clipped(model: str, weights: str) -> pd.DataFrame:
    """By stage of a cascade, at one bundled photograph: of the units that freezing leaves live, how many are clipped.

    The largest share of any one rectifier: where it is 1, no gradient passes and the map is constant.
    """
    classifier, pictures = measuring.network(model, weights, 1)
    pixels = pictures.load(classifier.preprocess)
    stages = measuring.stages_of(classifier, pixels, None)
    rows = []

    def shares(found: list[float]) -> Rectifying:
        def keep(z: Tensor, rectify: Callable[[Tensor], Tensor]) -> Tensor:
            output = rectify(z)
            live = (output >= threshold(output, P)) & (output > 0)
            # A unit is clipped where its input is larger than its output.
            found.append(float((z > output)[live].double().mean()) if live.any() else 0.0)
            return output

        return Rectifying(keep, spare=True)

    draws = Draws(reinitialiser("variance_scaling"))
    with (
        torch.no_grad(),
        guarded(classifier.network),
        randomized(classifier.network, stages, "cascading", 0, draws) as walk,
    ):
        for visit in walk:
            found: list[float] = []
            with shares(found):
                classifier.network(pixels)
            rows.append({"stage": visit.stage.name, "largest share of live units clipped": max(found)})
    return pd.DataFrame(rows)


def figure(model: str, weights: str, picture: str | None, samples: int, path: Path) -> None:
    """One photograph: the six methods without (top) and with freezing (bottom)."""
    classifier = models.load(model, weights)
    pictures = images.find(picture or "bundled")
    chosen = next((p for p in pictures.pictures if "chelsea" in p.id), pictures.pictures[0])
    pixels = chosen.load(classifier.preprocess)[None].contiguous(memory_format=torch.channels_last)
    names = [f"{way}{method}" for way in ("", "frozen:") for method in TITLES]
    found = [attributions.find(name) for name in names]
    methods = [m.with_options(samples=samples) if "samples" in m.options else m for m in found]
    with guarded(classifier.network):
        target = predict(classifier.network, pixels, 1).argmax(1)
        drawn = Engine(methods, 4).explain(classifier.network, Inputs(pixels, target, (chosen.id,)))
    unscaled = classifier.preprocess.unscaled(pixels[0]).clamp(0, 1).permute(1, 2, 0).numpy()  # type: ignore[attr-defined]
    fig, axes = plt.subplots(2, 7, figsize=(11, 3.6), layout="constrained")
    axes[0, 0].imshow(unscaled)
    axes[0, 0].set_title(classifier.class_name(int(target)), fontsize=9)
    axes[1, 0].axis("off")
    for row, way in enumerate(("", "frozen:")):
        for column, (method, title) in enumerate(TITLES.items(), start=1):
            shown(axes[row, column], drawn[f"{way}{method}"])
            if row == 0:
                axes[row, column].set_title(title, fontsize=9)
        axes[row, 1].set_ylabel("frozen, p = 80" if way else "plain", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    fig.savefig(path, dpi=150)
    plt.close(fig)


def shown(axis: plt.Axes, found: Tensor) -> None:
    """A map: absolute values summed over channels, white to black at the 99th percentile."""
    axis.imshow(maps.clip_absolute(maps.absolute(found))[0], cmap="gray_r", vmin=0, vmax=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="weights of inception_v3; without, only EfficientNet-Lite0 is drawn")
    parser.add_argument("--image", help="picture for inception_v3")
    parser.add_argument("--samples", type=int, default=16, help="of SmoothGrad and Integrated Gradients in the figure")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    clock = Clock()
    figure("efficientnet_lite0", "pretrained", None, options.samples, options.output / "efficientnet_lite0.png")
    if options.weights:
        figure("inception_v3", options.weights, options.image, options.samples, options.output / "inception_v3.png")
    parts = ["# Does activation freezing pass the sanity check?"]
    table = clipped("efficientnet_lite0", "pretrained")
    parts += [
        "EfficientNet-Lite0 rectifies by clipping to [0, 6]. Freezing keeps the strongest fifth of a layer live; where "
        "all of it lies in the clip, no gradient passes, and the map is constant (no score). Seen at one photograph:",
        measuring.markdown(table),
    ]
    for run in sorted(path.parent for path in options.output.glob("*/scores.parquet")):
        table = differences(read_rows(run / "scores.parquet"))
        table.to_csv(options.output / f"{run.name}_differences.csv", index=False, float_format="%.4f")
        last = table[table.stage_index == table.groupby("order")["stage_index"].transform("max")]
        first = table[table.stage_index == 1]
        parts += [f"## {run.name}", "### Verdicts, plain -> frozen", measuring.markdown(answers(run))]
        for title, part in (("the first stage (logits) alone", first), ("all stages", last)):
            part = part[part.similarity.isin(["spearman_abs", "ssim"])]
            parts += [
                f"### Similarity to the trained map after randomizing {title}",
                measuring.markdown(part.drop(columns=["stage_index"])),
            ]
    text = "\n\n".join(parts) + "\n"
    (options.output / "answer.md").write_text(text)
    manifest = {"command": "python benchmarks/activation_freezing.py", "samples": options.samples}
    write_json(options.output / "manifest.json", {**manifest, **clock.manifest()})
    print(text)


if __name__ == "__main__":
    main()
