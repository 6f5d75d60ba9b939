"""Does the gate see planted faults, and does it stay silent when nothing but chance differs?

    python benchmarks/gate_confusion.py            about seven minutes on one core

A small network learns coloured digits in seconds. Faults are planted in its explainers, one at a time, and the
gate compares each with the sound run; then the sound run is repeated with other noise, threads and batch sizes.
Writes results/benchmarks/gate_confusion/{table.csv,table.md,manifest.json}.
"""

from __future__ import annotations

import sanity  # noqa: F401  (sets how OpenMP waits, before torch is loaded)

# isort: split
import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from sanity import images as image_sets
from sanity import models
from sanity.command import Clock
from sanity.comparison import CHANGED, INCONCLUSIVE, MAX_SHIFT, SAME
from sanity.fingerprints import fingerprints
from sanity.gate import gate
from sanity.plan import Plan
from sanity.records import PROTOCOL_VERSION, Score, to_table, write_json
from sanity.run import prepare, run
from sanity.stored import Run

OUTPUT = Path(__file__).parents[1] / "results" / "benchmarks" / "gate_confusion"
SIDE, IMAGES, SAMPLES = 16, 8, 8
Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]


# --- a network and pictures


class Network(nn.Module):
    """Three convolutions with BatchNorm, a mean over places, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.conv2, self.norm2, self.relu2 = nn.Conv2d(16, 32, 3, 2, padding=1), nn.BatchNorm2d(32), nn.ReLU()
        self.conv3, self.norm3, self.relu3 = nn.Conv2d(32, 48, 3, 2, padding=1), nn.BatchNorm2d(48), nn.ReLU()
        self.logits = nn.Linear(48, 10)

    def features(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.conv1(x)))
        x = self.relu2(self.norm2(self.conv2(x)))
        return self.relu3(self.norm3(self.conv3(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x).mean((2, 3)))


STAGES = {f"{name}": [name] for name in ("logits", "conv3", "conv2", "conv1")}
STAGES = {name: [name, name.replace("conv", "norm")] if "conv" in name else [name] for name in STAGES}


def coloured_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, (1797, 3, 16, 16) in [-1, 1]: each in a colour of its own, on a darker one."""
    digits = load_digits()
    grey = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    grey = F.interpolate(grey, (SIDE, SIDE), mode="bilinear", align_corners=False)
    colours = torch.rand(len(grey), 2, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    front, back = 0.6 + 0.4 * colours[:, 0], 0.4 * colours[:, 1]
    return (back + (front - back) * grey) * 2 - 1, torch.tensor(digits.target)


def trained(epochs: int = 6) -> tuple[Network, Tensor, float]:
    """The network, pictures it has not seen (297, 3, 16, 16), and its accuracy on them."""
    pixels, labels = coloured_digits()
    torch.manual_seed(0)
    network = Network()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(50):
            optimiser.zero_grad()
            F.cross_entropy(network(pixels[batch]), labels[batch]).backward()
            optimiser.step()
    network.eval()
    with torch.no_grad():
        right = network(pixels[1500:]).argmax(1) == labels[1500:]
    return network, pixels[1500:], float(right.float().mean())


# --- explainers as they should be


def gradient(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(network(x).gather(1, targets[:, None]).sum(), x)[0]


def gradient_abs(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return gradient(network, x, targets).abs().sum(1, keepdim=True)


def guided(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    hooks = guide(network)
    found = gradient(network, x, targets)
    for hook in hooks:
        hook.remove()
    return found


def guide(network: nn.Module) -> list[RemovableHandle]:
    """Let no negative gradient pass a rectifier."""
    rectifiers = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    return [m.register_full_backward_hook(lambda m, into, out: (into[0].clamp(min=0),)) for m in rectifiers]


def scaled(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    found = gradient_abs(network, x, targets)
    return found / found.amax((1, 2, 3), keepdim=True)


def smoothgrad(network: nn.Module, x: Tensor, targets: Tensor, samples: int = SAMPLES) -> Tensor:
    return mean_gradient(network, x + 0.3 * torch.randn((samples, *x.shape)), targets)


def mean_gradient(network: nn.Module, points: Tensor, targets: Tensor) -> Tensor:
    """Over points (samples, N, C, H, W), all evaluated at once."""
    return gradient(network, points.flatten(0, 1), targets.repeat(len(points))).view_as(points).mean(0)


def integrated(network: nn.Module, x: Tensor, targets: Tensor, baseline: float = 0.0) -> Tensor:
    fractions = ((torch.arange(SAMPLES) + 0.5) / SAMPLES)[:, None, None, None, None]
    return mean_gradient(network, baseline + fractions * (x - baseline), targets) * (x - baseline)


def cam(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Class activation map: (N, 1, 4, 4), enlarged."""
    with torch.no_grad():
        weights = network.logits.weight[targets]
        coarse = torch.einsum("nchw,nc->nhw", network.features(x), weights)[:, None]
    return F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)


SOUND: dict[str, Explainer] = {
    f.__name__: f for f in (gradient, gradient_abs, guided, scaled, smoothgrad, integrated, cam)
}


# --- faults


def wrong_class(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    return gradient(network, x, (targets + 1) % 10)


def hooks_left(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    guide(network)
    return gradient(network, x, targets)


DRAWS = np.random.default_rng(0)
"""Never set back, so that nothing a run does can seed it."""


def unseeded(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    noise = torch.from_numpy(DRAWS.standard_normal((SAMPLES, *x.shape))).to(x)
    return mean_gradient(network, x + 0.3 * noise, targets)


def in_training_mode(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    network.train()
    found = gradient(network, x, targets)
    network.eval()
    return found


def scaled_over_batch(network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    found = gradient_abs(network, x, targets)
    return found / found.max()


@dataclass(frozen=True)
class Named:
    """An explainer that goes by a name of ours."""

    name: str
    explainer: Explainer

    def __call__(self, network: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        return self.explainer(network, x, targets)


@dataclass(frozen=True)
class Fault:
    """method is explained by explainer instead; skip leaves a stage out; frozen leaves one as it was."""

    name: str
    method: str = ""
    explainer: Explainer = gradient
    skip: str = ""
    frozen: str = ""


FAULTS = (
    Fault("Guided Backprop becomes the gradient", "guided", gradient),
    Fault("a sign dropped", "gradient", lambda n, x, t: gradient(n, x, t).abs()),
    Fault(
        "channels summed before the absolute value",
        "gradient_abs",
        lambda n, x, t: gradient(n, x, t).sum(1, True).abs(),
    ),
    Fault("a wrong class", "gradient", wrong_class),
    Fault("half the samples", "smoothgrad", lambda n, x, t: smoothgrad(n, x, t, SAMPLES // 2)),
    Fault("a changed baseline", "integrated", lambda n, x, t: integrated(n, x, t, -1.0)),
    Fault("hooks left behind", "guided", hooks_left),
    Fault("noise not seeded", "smoothgrad", unseeded),
    Fault("BatchNorm in train mode", "gradient", in_training_mode),
    Fault("resize flipped", "cam", lambda n, x, t: cam(n, x, t).flip(3)),
    Fault("maps scaled over the batch", "scaled", scaled_over_batch),
    Fault("one stage skipped", skip="conv2"),
    Fault("one stage not really randomized", frozen="conv2"),
)


# --- runs


@dataclass
class Bench:
    """A trained network, its pictures, and how it is explained."""

    network: nn.Module
    pixels: Tensor
    explainers: Mapping[str, Explainer] = field(default_factory=lambda: SOUND)

    def run(self, fault: Fault | None = None, *, seeds: tuple[int, ...] = (0, 1, 2), batch_size: int = 8) -> Run:
        """One run in memory, as its folder would be read."""
        with torch.random.fork_rng():
            return self._run(fault or Fault(""), seeds, batch_size)

    def _run(self, fault: Fault, seeds: tuple[int, ...], batch_size: int) -> Run:
        chosen = {**self.explainers, **({fault.method: fault.explainer} if fault.method else {})}
        methods = tuple(Named(name, explainer) for name, explainer in chosen.items())
        plan = Plan(methods=(*methods, "random"), stages=STAGES, seeds=seeds, images="tensors")
        classifier = models.of_network(deepcopied(self.network))
        pictures = image_sets.tensors(self.pixels)
        stages = prepare(plan, classifier, pictures)
        kept = tuple(stage for stage in stages if stage.name != fault.skip)
        kept = tuple(replace(s, parameters=()) if s.name == fault.frozen else s for s in kept)
        steps = list(run(plan, classifier, pictures, kept, batch_size=batch_size))
        rows = [score for step in steps for score in step.scores]
        header = {
            "plan": {**plan.as_dict(), "methods": list(chosen)},
            "protocol_version": PROTOCOL_VERSION,
            "weights_sha256": classifier.weights_sha256,
            "images_sha256": pictures.digest,
            "stages": {stage.name: list(stage.parameters) for stage in kept},
            "unchanged_parameters": {str(step.key): list(step.unchanged) for step in steps if step.unchanged},
        }
        found = fingerprints(plan, classifier, pictures, batch_size=batch_size)
        return Run(Path(fault.name), header, to_table(rows, Score).to_pandas(), pd.DataFrame(found))


def deepcopied(network: nn.Module) -> nn.Module:
    """A network of the same weights that no hook was ever hung on."""
    copied = Network()
    copied.load_state_dict(network.state_dict())
    return copied.eval()


# --- the table


def judged(baseline: Run, current: Run) -> dict[str, object]:
    """What the gate says, and which methods it says it of."""
    whole = gate(baseline, current, allowed=["seeds"])
    changed = [case for case in whole.cases if case.verdict == CHANGED]
    named = [case.name.split(",")[0] if case.suite != "cells" else case.name for case in changed]
    groups = pd.DataFrame(whole.data["groups"])["verdict"]
    numbers = {f"groups_{verdict}": int((groups == verdict).sum()) for verdict in VERDICTS}
    return {"verdict": whole.verdict, **numbers, "named": " ".join(dict.fromkeys(named))}


def without_maps(run: Run) -> Run:
    return replace(run, fingerprints=None)


def rerun(bench: Bench, kind: str, number: int) -> Run:
    """Again, with another number of threads, another batch size, and what the kind says besides.

    Other noise: two seeds of random weights stay, the third, which the methods' noise is named by, is new.
    """
    torch.set_num_threads(1 + number % 2)
    size = (8, 4, 5, 3, 6)[number % 5]
    first = 100 + 3 * number
    seeds = {"other noise": (first, 1, 2), "other seeds": (first, first + 1, first + 2)}.get(kind, (0, 1, 2))
    made = bench.run(seeds=seeds, batch_size=size)
    torch.set_num_threads(1)
    return made


def measured(bench: Bench, reruns: int) -> Iterator[dict[str, object]]:
    """A row for each comparison."""
    sound = bench.run()
    for fault in FAULTS:
        about = {"runs": "a fault", "what": fault.name}
        faulty = bench.run(fault)
        yield {**about, "kind": "same seeds", **judged(sound, faulty)}
        yield {**about, "kind": "same seeds, scores alone", **judged(without_maps(sound), without_maps(faulty))}
        yield {**about, "kind": "other noise", **judged(sound, bench.run(fault, seeds=(3, 1, 2)))}
    careless = replace(bench, explainers={**SOUND, "smoothgrad": unseeded})
    kinds = {
        "other noise": (bench, reruns),
        "other seeds": (bench, reruns),
        "threads and batch size only": (bench, reruns // 4),
        "noise without a seed": (careless, reruns // 4),
    }
    for kind, (one, count) in kinds.items():
        baseline = one.run()
        for number in range(count):
            about = {"runs": "no fault", "what": f"rerun {number}", "kind": kind}
            yield {**about, **judged(baseline, rerun(one, kind, number))}


VERDICTS = (CHANGED, INCONCLUSIVE, SAME)


def told(rows: pd.DataFrame) -> str:
    """The confusion table, and the faults one by one."""
    heads = ["runs compared", "n", *VERDICTS, *(f"groups {verdict}" for verdict in VERDICTS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (runs, kind), part in rows.groupby(["runs", "kind"], sort=False):
        counts = [str((part["verdict"] == verdict).sum()) for verdict in VERDICTS]
        groups = [f"{part[f'groups_{verdict}'].mean():.1f}" for verdict in VERDICTS]
        lines.append(f"| {runs}, {kind} | {' | '.join([str(len(part)), *counts, *groups])} |")
    lines += ["", "Groups of cells (a method, similarity and stage; a mean over the n comparisons) bear the verdicts;"]
    lines += ["a comparison's is the worst of its groups' and of missing, extra or newly NaN cells."]
    faults = rows[rows["runs"] == "a fault"]
    kinds = list(faults["kind"].unique())
    lines += ["", f"| fault | {' | '.join(kinds)} | changed are (same seeds) |", "|---" * (2 + len(kinds)) + "|"]
    for name, part in faults.groupby("what", sort=False):
        lines.append(f"| {name} | {' | '.join(part['verdict'])} | {part.iloc[0]['named']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--reruns",
        type=int,
        default=100,
        help="with other noise, and with other seeds; of other kinds a quarter (default: 100)",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    values = parser.parse_args()
    clock = Clock()
    torch.set_num_threads(1)
    network, pixels, accuracy = trained()
    rows = pd.DataFrame(tqdm(measured(Bench(network, pixels[:IMAGES]), values.reruns), mininterval=10))
    values.output.mkdir(parents=True, exist_ok=True)
    rows.to_csv(values.output / "table.csv", index=False)
    (values.output / "table.md").write_text(told(rows))
    about = {
        "accuracy": accuracy,
        "images": IMAGES,
        "samples": SAMPLES,
        "reruns": values.reruns,
        "max_shift": MAX_SHIFT,
    }
    command = shlex.join(["python", "benchmarks/gate_confusion.py", *sys.argv[1:]])
    write_json(values.output / "manifest.json", {"command": command, **about, **clock.manifest()})
    print(told(rows))


if __name__ == "__main__":
    main()
