"""Train a small classifier on true or permuted labels: what `python -m sanity.train` does, from flags to files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sanity.cli import HelpFormatter, parse
from sanity.command import environment, guarded_main
from sanity.networks import NETWORKS
from sanity.records import write_json
from sanity.registry import first_line
from sanity.training import (
    DATASETS,
    LABELS,
    PRECISIONS,
    SCHEDULES,
    SPLITS,
    DataSet,
    Epoch,
    Recipe,
    State,
    accuracy,
    begin,
    find_folder,
    load_data,
    met,
    recipe,
    train,
    with_labels,
)

FORMAT = 2
INTRODUCTION = """Train the small classifiers of Adebayo et al. 2018 on true labels, or on labels permuted among images.

  python -m sanity.train --data mnist --model cnn --output DIR                       to 99 % of the test images
  python -m sanity.train --data mnist --model cnn --labels permuted --output DIR     to 95 % of the training images
  python -m sanity.run --model mnist_cnn --weights DIR/model.safetensors --images FOLDER_OF_IDX_FILES --limit 10

Training ends with the epoch that reaches the goal. The first 5000 training images are held out, as validation.
Killed at any moment, --resume goes on from the last whole epoch and comes to the same numbers on the same machine
with the same number of threads. Writes DIR/model.safetensors and DIR/train.json.
Exit code: 0 when the goal is met, 1 when it is not (the model is written all the same), 2 for what you must mend."""
OPTIONS: Mapping[str, tuple[Any, str]] = {
    "seed": (int, "seed of the first weights, the shuffles and the permutation of the labels"),
    "goal": (float, "accuracy to stop at: of test images for true labels, of training images for permuted ones"),
    "epochs": (int, "at most so many passes"),
    "batch_size": (int, "images a step"),
    "learning_rate": (float, "Adam's"),
    "schedule": (str, f"of the learning rate, over all epochs: {', '.join(SCHEDULES)}"),
    "precision": (str, f"of the products in training passes: {', '.join(PRECISIONS)}; accuracies: float32 always"),
    "weight_decay": (float, "factor of half the squares of hidden1's, hidden2's and fc1's weights; published: 0.001"),
}


def parser() -> ArgumentParser:
    """Flags of `python -m sanity.train`: what to train, the recipe's other fields, the output."""
    made = ArgumentParser(
        prog="sanity train", description=INTRODUCTION, formatter_class=HelpFormatter, exit_on_error=False
    )
    for name, known, words in (
        ("data", DATASETS, "data set"),
        ("model", NETWORKS, "network"),
        ("labels", LABELS, "labels to train on"),
    ):
        default = next(iter(known))
        made.add_argument(f"--{name}", default=default, metavar="NAME", help=f"{words}: {', '.join(known)}")
    made.add_argument(
        "--data-dir", type=Path | None, metavar="DIR", help="folder of the IDX files (default: fetched once, kept)"
    )
    made.add_argument(
        "--published", action="store_true", help="batch size, learning rate, format of the released code; hours"
    )
    for name, (kind, words) in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        made.add_argument(flag, type=kind | None, metavar="X", help=words)
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the trained network")
    made.add_argument("--resume", action="store_true", help="go on with an interrupted training in OUTPUT")
    return made


def command(arguments: Sequence[str]) -> int:
    """Parse, check, train, write; everything that can be refused is refused before the folder is touched."""
    values = parse(parser(), arguments)
    plan = recipe_of(values)
    data = with_labels(load_data(find_folder(plan.data, values.data_dir), plan.data), plan)
    folder = TrainingFolder(values.output)
    header = folder.open(plan, data, values.resume)
    if header["status"] != "complete":
        state = folder.restore(begin(plan))
        walk(plan, data, state, folder)
        header = folder.finish(plan, data, state, header)
    print(told(header, values.output))
    return 0 if header["goal_met"] else 1


def recipe_of(values: Namespace) -> Recipe:
    """Recipe of the flags; what was not given is the fast recipe's, or the published one's."""
    changes = {name: values[name] for name in OPTIONS if values[name] is not None}
    return recipe(values.data, values.model, values.labels, values.published, **changes)


def walk(plan: Recipe, data: DataSet, state: State, folder: TrainingFolder) -> None:
    """Train, each epoch kept before the next one starts; a bar shows loss, accuracy and the longest it may take."""
    size = len(data.train.labels)
    with tqdm(
        total=plan.epochs * size,
        initial=len(state.history) * size,
        unit=" images",
        unit_scale=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        desc=f"{plan.data} {plan.model}, {plan.labels} labels, at most {plan.epochs} epochs",
    ) as bar:

        def show(images: int, loss: float, right: float) -> None:
            bar.set_postfix_str(f"epoch {len(state.history) + 1}, loss {loss:.4f}, accuracy {right:.2%}", refresh=False)
            bar.update(images)

        for epoch in train(plan, data, state, show):
            folder.keep(state)
            tqdm.write(line(epoch), file=sys.stderr)


def line(epoch: Epoch) -> str:
    """One epoch in words."""
    after = "" if epoch.train is None else f" ({epoch.train:.2%} after)"
    other = {"validation": epoch.validation, "test": epoch.test}
    shares = "".join(f"{name} {share:.2%}, " for name, share in other.items() if share is not None)
    return (
        f"epoch {epoch.number}: loss {epoch.loss:.4f}, training accuracy {epoch.running:.2%}{after}, "
        f"{shares}{epoch.seconds:.1f} s"
    )


def told(header: Mapping[str, Any], output: Path) -> str:
    """What came out, and where it lies."""
    plan, found = header["recipe"], header["accuracy"]
    shares = ", ".join(f"{name} {found[name]:.2%}" for name in ("train", "validation", "test"))
    judged = LABELS[plan["labels"]]
    verdict = "met" if header["goal_met"] else "NOT met"
    return (
        f"{plan['data']} {plan['model']}, {plan['labels']} labels, seed {plan['seed']}: {shares}; "
        f"goal of {plan['goal']:.2%} ({judged}) {verdict} after {header['epochs']} epochs, {header['seconds']:.0f} s\n"
        f"written to {output}/: model.safetensors, train.json"
    )


class TrainingFolder:
    """A training's output folder: `train.json` first, a checkpoint an epoch, the model last. Each file whole or not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest, self.checkpoint = path / "train.json", path / "checkpoint.safetensors"

    def open(self, plan: Recipe, data: DataSet, resume: bool) -> dict[str, Any]:
        """Start or resume; returns the manifest in force.

        Raises ValueError if the folder holds anything but this training, or this training without resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output {self.path} is a file, not a folder")
        header = {
            "status": "running",
            "format": FORMAT,
            "recipe": asdict(plan),
            "data_sha256": data.sha256,
            "threads": torch.get_num_threads(),
            **environment(),
        }
        if self.manifest.exists():
            return self._reopen(header, resume)
        if self.path.exists() and any(p.name != ".train.json.part" for p in self.path.iterdir()):
            raise ValueError(f"output {self.path} is not empty and holds no training; give another --output")
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.manifest, header)
        return header

    def _reopen(self, header: Mapping[str, Any], resume: bool) -> dict[str, Any]:
        try:
            old: dict[str, Any] = json.loads(self.manifest.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {self.manifest}: {first_line(error)}") from None
        if not isinstance(old, dict) or not isinstance(old.get("recipe"), dict) or "status" not in old:
            raise ValueError(f"{self.manifest} is no training's manifest; give another --output")
        plans = old["recipe"], header["recipe"]
        differing = [name for name in plans[1] if plans[0].get(name) != plans[1][name]]
        differing += [name for name in ("format", "data_sha256") if old.get(name) != header[name]]
        if differing:
            raise ValueError(
                f"output {self.path} holds another training (differs in {', '.join(differing)}); give another --output"
            )
        if not resume:
            raise ValueError(f"output {self.path} already holds this training; add --resume, or give another --output")
        return old

    def keep(self, state: State) -> None:
        """Write the checkpoint of a whole epoch: tensors of network and optimiser, the history beside them."""
        held = {f"network/{name}": value for name, value in state.network.state_dict().items()}
        for number, values in state.optimiser.state_dict()["state"].items():
            held |= {f"optimiser/{number}/{name}": value for name, value in values.items()}
        tensors = {name: value.contiguous() for name, value in held.items()}
        history = {"history": json.dumps(state.history)}
        _whole(self.checkpoint, lambda path: save_file(tensors, path, history))

    def restore(self, state: State) -> State:
        """Bring a fresh state to where the checkpoint is, if there is one. ValueError for a broken one."""
        if not self.checkpoint.exists():
            return state
        try:
            with safe_open(self.checkpoint, "pt") as file:
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
                history = json.loads(file.metadata()["history"])
            network = {name.removeprefix("network/"): held.pop(name) for name in list(held) if name[0] == "n"}
            state.network.load_state_dict(network)
            self._restore_optimiser(state.optimiser, held)
            state.history = [Epoch(*epoch) for epoch in history]
        except Exception as error:
            raise ValueError(f"cannot read {self.checkpoint}: {first_line(error)}; remove it to begin anew") from None
        return state

    def _restore_optimiser(self, optimiser: torch.optim.Optimizer, held: Mapping[str, Tensor]) -> None:
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        found: dict[int, dict[str, Tensor]] = {}
        for name, value in held.items():
            _, number, own = name.split("/")
            # A file has no strides: moments lie in memory as their parameters do.
            place = torch.empty_like(parameters[int(number)]) if value.ndim else torch.empty_like(value)
            found.setdefault(int(number), {})[own] = place.copy_(value)
        optimiser.load_state_dict({"state": found, "param_groups": optimiser.state_dict()["param_groups"]})

    def finish(self, plan: Recipe, data: DataSet, state: State, header: Mapping[str, Any]) -> dict[str, Any]:
        """Write the model and the manifest; the checkpoint goes."""
        model = self.path / "model.safetensors"
        weights = {name: value.contiguous() for name, value in state.network.state_dict().items()}
        _whole(model, lambda path: save_file(weights, path))
        last = state.history[-1]
        known = {name: getattr(last, name) for name in SPLITS}
        shares = {
            name: accuracy(state.network, getattr(data, name)) if share is None else share
            for name, share in known.items()
        }
        complete = {
            **header,
            **environment(),
            "status": "complete",
            "accuracy": shares,
            "goal_met": met(plan, state.history),
            "epochs": len(state.history),
            "seconds": round(sum(epoch.seconds for epoch in state.history), 1),
            "weights_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
            "history": [epoch._asdict() for epoch in state.history],
        }
        write_json(self.manifest, complete)
        self.checkpoint.unlink(missing_ok=True)
        return complete


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sanity.train`: exit code 0, 1 for a goal that was missed, 2 for what the user must mend."""
    return guarded_main(
        "sanity train",
        lambda: command(sys.argv[1:] if arguments is None else arguments),
        "whole epochs are kept: add --resume to go on",
    )


if __name__ == "__main__":
    sys.exit(main())
