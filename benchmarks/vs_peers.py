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

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
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
from sanity.images import Images
from sanity.observation import load
from sanity.plan import Plan
from sanity.randomization import Draws, guarded, randomized, reinitialiser
from sanity.run import run
from sanity.stages import Stage

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


def drawn(
    network: nn.Module, stages: Sequence[Stage], plan: Plan, example: Tensor, batch: int
) -> tuple[Tensor, list[tuple[str, dict[str, Tensor]]]]:
    """Classes that the trained network predicts, and each stage's random weights, as our own run draws them."""
    values = []
    with guarded(network):
        targets = predict(network, example, batch).argmax(1)
        with randomized(network, stages, "cascading", 0, Draws(reinitialiser(plan.reinit))) as walk:
            for index in range(1, len(walk)):
                stage = walk.enter(index).stage
                named = dict(network.named_parameters())
                values.append((stage.name, {n: named[n].detach().clone() for n in stage.parameters}))
    return targets, values


def quantus_scores(
    network: nn.Module,
    values: list[tuple[str, dict[str, Tensor]]],
    pictures: Images,
    example: Tensor,
    targets: Tensor,
    options: Namespace,
) -> pd.DataFrame:
    """Every cell by Quantus' MPRT over captum's methods: method, stage, image, value."""
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
        with staged(values):
            scores = metric(
                model=network,
                x_batch=example.contiguous().numpy(),
                y_batch=targets.numpy(),
                explain_func=captum_maps(method, options.samples, options.quantus_batch),
                channel_first=True,
                batch_size=options.quantus_batch,
                device="cpu",
            )
        del scores["original"]
        for stage, cells in scores.items():
            for image, value in zip(pictures.ids, cells, strict=True):
                found.append({"method": method, "stage": stage, "image": image, "value": value})
    return pd.DataFrame(found)


def main() -> None:
    numbers = {"images": 2, "samples": 50, "batch_size": 4, "quantus_batch": 16, "repeats": 2}
    parser = measuring.parser(__doc__, "efficientnet_lite0", "pretrained", **numbers)
    parser.add_argument("--stages", type=int, help="merge the stages into so many (default: all)")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    options = parser.parse_args()
    clock = Clock()
    classifier, pictures = measuring.network(options.model, options.weights, options.images)
    plan = Plan(methods=METHODS, similarities=("spearman_abs",), samples=options.samples)
    example = load(classifier, pictures, plan, "cpu")
    stages = measuring.stages_of(classifier, example[:1], options.stages)
    network = classifier.network.eval()
    targets, values = drawn(network, stages, plan, example, options.batch_size)
    rows: dict[str, pd.DataFrame] = {}

    def theirs() -> None:
        rows["quantus"] = quantus_scores(network, values, pictures, example, targets, options)

    def ours(precision: str) -> None:
        steps = run(replace(plan, precision=precision), classifier, pictures, stages, batch_size=options.batch_size)
        rows[precision] = pd.DataFrame([score._asdict() for step in steps for score in step.scores])

    contenders = {"quantus": theirs, **{p: partial(ours, p) for p in options.precisions}}
    times = measuring.interleaved(contenders, options.repeats)
    words = [
        f"{classifier.name}, {len(pictures)} photographs, {len(stages)} stages cascading, {', '.join(METHODS)}, "
        f"{options.samples} samples, {options.batch_size} evaluations at a time ({options.quantus_batch} for Quantus), "
        f"{torch.get_num_threads()} threads, {options.repeats} repetitions, interleaved. "
        f"Quantus {version('quantus')}, captum {version('captum')}.",
        "Goal: 4 times in float32, 7 times in bfloat16.",
    ]
    ratios = ratios_of(times, len(METHODS) * len(stages) * len(pictures))
    tables = {"times": ratios, "agreement": agreement(rows), "runs": times}
    measuring.publish(f"vs_peers_{classifier.name}", tables, words, clock, options=measuring.chosen(options))


def ratios_of(times: pd.DataFrame, cells: int) -> pd.DataFrame:
    """Medians of each contender, and how many times faster than Quantus it is."""
    medians = times.groupby("contender", sort=False)[["wall", "cpu"]].median().reset_index()
    for kind in ("wall", "cpu"):
        reference = medians.set_index("contender")[kind]["quantus"]
        medians[f"times faster ({kind})"] = reference / medians[kind]
    return medians.assign(**{"wall seconds a cell": medians["wall"] / cells})


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
