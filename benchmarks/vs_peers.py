"""The same cells by Quantus with captum and by this package: how long, and do they agree?

    pip install '.[bench]'
    python benchmarks/vs_peers.py --model efficientnet_lite0 --images 2
    python benchmarks/vs_peers.py --model inception_v3 --weights FILE.pth --images 1

Cascading randomization of the same stages with the same random weights, the same photographs and classes; gradient,
SmoothGrad, Integrated Gradients and Guided Backprop; Spearman's rank correlation of the absolute maps, clipped at the
99th percentile. Quantus 0.6's MPRT walks over modules with `reset_parameters`; here it is given the stages, and weights
already drawn. Interleaved in one process; medians and ratios. Writes results/benchmarks/vs_peers_MODEL/.

captum's Guided Backprop is the plain gradient on both networks, whose rectifiers its hooks do not see: its cells are
timed, and their agreement is told apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from typing import Any
from unittest import mock

import measuring
import numpy as np
import pandas as pd
import quantus
import torch
from captum.attr import GuidedBackprop, IntegratedGradients, NoiseTunnel, Saliency
from quantus.helpers.model.pytorch_model import PyTorchModel
from torch import Tensor, nn

from sanity.command import Clock
from sanity.engine import predict
from sanity.observation import load
from sanity.plan import Plan
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.run import run

METHODS = ("gradient", "smoothgrad", "integrated_gradients", "guided_backprop")
SIGMA = 0.15
PRECISIONS = ("float32", "bfloat16")


@contextmanager
def staged(values: list[tuple[str, dict[str, Tensor]]]) -> Iterator[None]:
    """Let Quantus' layers be stages with given values: name -> parameters, in order."""

    def generate(self: PyTorchModel, order: str = "top_down", seed: int = 42) -> Iterator[tuple[str, nn.Module]]:
        copy = deepcopy(self.model)
        named = dict(copy.named_parameters())
        for name, drawn in values:
            with torch.no_grad():
                for parameter, value in drawn.items():
                    named[parameter].copy_(value)
            yield name, copy

    length = property(lambda self: len(values))
    with (
        mock.patch.object(PyTorchModel, "get_random_layer_generator", generate),
        mock.patch.object(PyTorchModel, "random_layer_generator_length", length),
    ):
        yield


def captum_maps(method: str, samples: int, batch: int) -> Any:
    """An `explain_func` of Quantus: absolute maps as protocols have them, (N, 1, H, W)."""

    def explain(model: nn.Module, inputs: Any, targets: Any, **kwargs: Any) -> np.ndarray:
        x, y = torch.as_tensor(inputs).float(), torch.as_tensor(targets)
        if method == "smoothgrad":
            maps = []
            for one, target in zip(x, y, strict=True):
                sigma = SIGMA * float(one.max() - one.min())
                tunnel = NoiseTunnel(Saliency(model))
                sizes = {"nt_samples": samples, "nt_samples_batch_size": batch, "stdevs": sigma}
                maps.append(tunnel.attribute(one[None], target=target, abs=False, **sizes))
            found = torch.cat(maps)
        elif method == "integrated_gradients":
            ways = {"n_steps": samples, "internal_batch_size": batch, "method": "riemann_middle"}
            found = IntegratedGradients(model).attribute(x, target=y, **ways)
        elif method == "guided_backprop":
            found = GuidedBackprop(model).attribute(x, target=y)
        else:
            found = Saliency(model).attribute(x, target=y, abs=False)
        summed = found.abs().sum(1, keepdim=True).detach().numpy()
        low = summed.min((1, 2, 3), keepdims=True)
        high = np.percentile(summed, 99, axis=(1, 2, 3), keepdims=True)
        return np.clip((summed - low) / (high - low), 0, 1)

    return explain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--weights", default="pretrained")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--stages", type=int, help="merge the stages into so many (default: all)")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4, help="evaluations at a time, of both")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    plan = Plan(methods=METHODS, similarities=("spearman_abs",), samples=options.samples)
    example = load(classifier, pictures, plan, "cpu")
    stages = measuring.stages_of(classifier, example[:1], options.stages)
    rows: dict[str, pd.DataFrame] = {}

    network = classifier.network.eval()
    with guarded(network):
        targets = predict(network, example, options.batch_size).argmax(1)
        with randomized(network, stages, "cascading", 0, Draws(reinitialiser(plan.reinit))) as walk:
            values = []
            for index in range(1, len(walk)):
                visit = walk.enter(index)
                drawn = {n: p.detach().clone() for n, p in network.named_parameters() if n in visit.stage.parameters}
                values.append((visit.stage.name, drawn))

    def theirs() -> None:
        found = []
        for method in METHODS:
            metric = quantus.MPRT(
                similarity_func=quantus.similarity_func.correlation_spearman,
                layer_order="top_down",
                normalise=False,
                abs=True,
                disable_warnings=True,
                return_average_correlation=False,
                return_last_correlation=False,
            )
            explain = captum_maps(method, options.samples, options.batch_size)
            with staged(values):
                scores = metric(
                model=network, x_batch=example.contiguous().numpy(), y_batch=targets.numpy(), explain_func=explain,
                channel_first=True, batch_size=options.batch_size, device="cpu",
            )  # fmt: skip
            del scores["original"]
            for stage, cells in scores.items():
                for image, value in zip(pictures.ids, cells, strict=True):
                    found.append({"method": method, "stage": stage, "image": image, "value": value})
        rows["quantus"] = pd.DataFrame(found)

    def ours(precision: str) -> None:
        chosen = Plan(**{**vars(plan), "precision": precision})
        steps = run(chosen, classifier, pictures, stages, batch_size=options.batch_size)
        rows[precision] = pd.DataFrame([score._asdict() for step in steps for score in step.scores])

    contenders = {"quantus": theirs, **{p: (lambda p=p: ours(p)) for p in options.precisions}}  # type: ignore[misc]
    times = measuring.interleaved(contenders, options.repeats)
    medians = times.groupby("contender", sort=False)[["wall", "cpu"]].median().reset_index()
    cells = len(METHODS) * len(stages) * len(pictures)
    for kind in ("wall", "cpu"):
        reference = medians.set_index("contender")[kind]["quantus"]
        medians[f"times faster ({kind})"] = reference / medians[kind]
    medians["wall seconds a cell"] = medians["wall"] / cells
    words = [
        f"{classifier.name}, {len(pictures)} photographs, {len(stages)} stages cascading, {', '.join(METHODS)}, "
        f"{options.samples} samples, {options.batch_size} evaluations at a time, {torch.get_num_threads()} threads, "
        f"{options.repeats} repetitions, interleaved. Quantus {version('quantus')}, "
        f"captum {version('captum')}.",
        "Goal: 4 times in float32, 7 times in bfloat16.",
    ]
    tables = {"times": medians, "agreement": agreement(rows), "runs": times}
    measuring.publish(f"vs_peers_{classifier.name}", tables, words, clock, options=vars(options) | {"weights": "..."})


def agreement(rows: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """By method: mean score of each, and the mean and largest difference of cells from Quantus'."""
    index = ["method", "stage", "image"]
    reference = rows.pop("quantus").set_index(index)["value"]
    found = []
    for precision, frame in rows.items():
        values = frame[frame.stage_index > 0].set_index(index)["value"]
        both = pd.concat([reference, values], axis=1, keys=["quantus", "here"]).dropna()
        for method, cells in both.groupby("method", sort=False):
            apart = (cells.here - cells.quantus).abs()
            found.append(
                {
                    "precision": precision, "method": method, "cells": len(cells), "mean quantus": cells.quantus.mean(),
                    "mean here": cells.here.mean(), "mean difference": apart.mean(), "largest": apart.max(),
                }
            )  # fmt: skip
    return pd.DataFrame(found)


if __name__ == "__main__":
    main()
