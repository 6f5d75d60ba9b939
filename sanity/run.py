"""The test itself: randomize, explain again, compare; from Python and as `python -m sanity.run`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from sanity import images as image_sets
from sanity import models
from sanity.attributions import Explainer, Method
from sanity.engine import Engine, best_batch, predict
from sanity.images import Images
from sanity.lanes import Lanes, suited
from sanity.models import Classifier
from sanity.observation import (
    CHUNK,
    Baseline,
    Seen,
    compare,
    explained,
    glance,
    load,
    look_through,
    working,
)
from sanity.plan import DEFAULT_METHODS, Members, Plan, read_yaml
from sanity.randomization import Draws, Other, randomized, reinitialiser, steps
from sanity.records import Cell, Key, Score, Step, to_table
from sanity.registry import suggest
from sanity.stages import Stage, derived, grouped, select, untouched, written_out


def run(
    plan: Plan,
    classifier: Classifier,
    images: Images,
    stages: Sequence[Stage],
    *,
    batch_size: int = 8,
    device: str = "cpu",
    done: frozenset[Key] = frozenset(),
    on_progress: Callable[[int], object] = lambda evaluations: None,
    on_trained: Callable[[Seen], object] = lambda seen: None,
) -> Iterator[Step]:
    """Run a plan: for every chunk of images, seed, order and stage, how alike the maps still are.

    Steps in `done` are not taken again. The network is changed in place and left as it came. on_trained is
    given what the trained network shows of each chunk that is looked at.
    """
    network = classifier.network
    sources = draws_of(plan)
    with working(network, plan, device), closing(Lanes(suited(device, classifier.reentrant))) as lanes:
        engine = Engine(plan.explainers(), batch_size, on_progress, lanes=lanes)
        for number, chunk in enumerate(images.chunks(CHUNK)):
            if done.issuperset(keys(plan, stages, number)):
                continue
            base = Baseline(glance(engine, plan, classifier, chunk, device), on_trained)
            for seed, order in product(plan.seeds, plan.orders):
                cell = Cell(number, seed, order)
                yield from walk(engine, plan, classifier, stages, sources[order], base, cell, done)


def walk(
    engine: Engine,
    plan: Plan,
    classifier: Classifier,
    stages: Sequence[Stage],
    source: Draws | Other,
    base: Baseline,
    cell: Cell,
    done: frozenset[Key],
) -> Iterator[Step]:
    """Take one chunk of images through one order under one seed, within `working`; steps in `done` are left out."""
    network = classifier.network
    with randomized(network, stages, cell.order, cell.seed, source, plan.batchnorm == "reset") as visits:
        pending = [key for index in range(len(visits)) if (key := Key(*cell, index)) not in done]
        for key, visit, seen in look_through(engine, plan, network, base, visits, pending):
            yield compare(plan, classifier, key, visit, base, seen, engine.lanes)


def keys(plan: Plan, stages: Sequence[Stage], chunk: int) -> list[Key]:
    """Steps of one chunk of images, the trained network's (index 0) included."""
    pairs = product(plan.seeds, plan.orders)
    return [Key(chunk, seed, order, i) for seed, order in pairs for i in range(len(steps(stages, order)))]


def draws_of(plan: Plan) -> Mapping[str, Draws | Other]:
    """Where each order's values come from: random, but for the order data from another training."""
    random = Draws(reinitialiser(plan.reinit), plan.redraw)
    if plan.against is None:
        return dict.fromkeys(plan.orders, random)
    other = Other(models.read_state_dict(Path(plan.against)), f"file {Path(plan.against).name}")
    return {order: other if order == "data" else random for order in plan.orders}


def resolve_stages(plan: Plan, classifier: Classifier, example: Tensor) -> tuple[Stage, ...]:
    """The plan's choice of stages for a network; example (1, C, H, W) is run where they must be derived."""
    choice = plan.stages
    if isinstance(choice, str) and choice.endswith((".yaml", ".yml")):
        choice = read_yaml(Path(choice))
    if isinstance(choice, Mapping):
        return written_out(classifier.network, choice)
    if classifier.stages and plan.granularity == "block":
        stages = written_out(classifier.network, classifier.stages)
    else:
        stages = derived(classifier.network, example, plan.granularity)
    if not stages:
        raise ValueError(f"{classifier.name} has no parameters to randomize")
    if isinstance(choice, int):
        return grouped(stages, choice)
    names = (choice,) if isinstance(choice, str) else choice
    return stages if names == ("all",) else select(stages, names)


def refuse_unsuited(methods: Sequence[Method], network: nn.Module, example: Tensor) -> None:
    """Raise ValueError for a method that would not be itself on this network; example (1, C, H, W)."""
    for method in methods:
        if reason := method.unsuited(network, example, method.options):
            raise ValueError(f"method {method.name!r} does not suit this network: {reason}")


def prepare(plan: Plan, classifier: Classifier, images: Images, device: str = "cpu") -> tuple[Stage, ...]:
    """Check a plan against its network and pictures before anything is written; returns the stages."""
    network = classifier.network
    with working(network, plan, device):
        example = load(classifier, images.limit(1), plan, device)
        explained(plan.target, predict(network, example, 1).expand(len(images), -1), images)
        refuse_unsuited(plan.explainers(), network, example)
        found = resolve_stages(plan, classifier, example)
        if plan.against is not None:
            # The other network must fit before anything is run or written, not when its turn has come.
            other, own, (whole, _) = draws_of(plan)["data"], network.state_dict(), steps(found, "data")[1]
            for name in whole.parameters:
                other.of(network, name, own[name], 0, "")
        return found


def suited_batch(plan: Plan, classifier: Classifier, images: Images, device: str) -> int:
    """Number of evaluations at a time that runs fastest on this machine and fits into its memory, measured."""
    with working(classifier.network, plan, device), closing(Lanes(suited(device, classifier.reentrant))) as lanes:
        example = load(classifier, images.limit(1), plan, device)
        return best_batch(classifier.network, example, lanes)


def check(
    model: nn.Module,
    images: Tensor,
    *,
    methods: str | Sequence[str | Method | Explainer] = DEFAULT_METHODS,
    stages: str | int | Sequence[str] | Members = "all",
    labels: Sequence[int] | Tensor | None = None,
    batch_size: int = 8,
    **choices: Any,
) -> pd.DataFrame:
    """Test explainers on a network of one's own: one row an image, stage, method and similarity.

    images (N, C, H, W), as the network takes them; labels (N,), explained instead of the predictions;
    methods: names, `Method`s or callables `(model, images, targets) -> (N, C or 1, H, W)`; stages: "all"
    (derived from the order of execution), a number, names, or name -> modules or parameters; choices:
    any other field of `Plan`, such as orders, similarities, seeds, samples, reinit. The model is used on
    its own device and left exactly as it was. Raises ValueError for anything that makes no sense.

    The columns are those of `scores.parquet`; `sanity.summarize` and `sanity.verdicts` take the frame. Its
    `attrs["untouched_parameters"]` lists what no stage reached, and so was never random; `attrs["stages"]` and
    `attrs["unchanged_parameters"]` are those of `run.json`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor (N, C, H, W), not a {type(images).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    if unknown := sorted(set(choices) - {field.name for field in fields(Plan)}):
        raise ValueError(suggest("choice", unknown[0], [field.name for field in fields(Plan)]))
    methods = (methods,) if isinstance(methods, str) else methods
    fixed = {"target": "label"} if labels is not None else {}
    listed = stages if isinstance(stages, str | int | Mapping) else tuple(stages)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in {**fixed, **choices}.items()}
    chosen: dict[str, Any] = {"methods": tuple(methods), "stages": listed, "images": "tensors", **values}
    plan = Plan(**chosen)
    parameter = next(model.parameters(), torch.empty(0))
    device = str(parameter.device)
    classifier, pictures = models.of_network(model), image_sets.tensors(images.cpu(), labels=labels)
    found = prepare(plan, classifier, pictures, device)
    taken = list(run(plan, classifier, pictures, found, batch_size=batch_size, device=device))
    frame: pd.DataFrame = to_table([score for step in taken for score in step.scores], Score).to_pandas()
    # Travels with the frame, so that `sanity.verdicts(frame)` knows what maps of different images show.
    frame.attrs["untouched_parameters"] = list(untouched(model, found))
    frame.attrs["stages"] = {stage.name: list(stage.parameters) for stage in found}
    frame.attrs["unchanged_parameters"] = {
        f"{step.key.seed}/{step.key.order}/{step.key.stage_index}": list(step.unchanged)
        for step in taken
        if step.unchanged
    }
    frame.attrs["unrelated"] = [score._asdict() for step in taken for score in step.unrelated]
    return frame


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sanity.run`: exit code 0, 2 for what the user must mend, 130 after Ctrl-C."""
    from sanity.command import guarded_main

    def go() -> int:
        from sanity.session import command

        return command(sys.argv[1:] if arguments is None else arguments)

    return guarded_main("sanity run", go, "what was finished is kept, add --resume to go on")


if __name__ == "__main__":
    sys.exit(main())
