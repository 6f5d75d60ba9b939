"""The steps of a plan that are still to be taken, in this process or by workers, written as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from sanity import fingerprints
from sanity.blocks import predictions as read_packed
from sanity.cells import Ledger
from sanity.cluster import Connection
from sanity.distributed import Crew, lacking
from sanity.distributed import manifest as of_crew
from sanity.engine import Engine
from sanity.folder import RunFolder
from sanity.images import Images
from sanity.models import Classifier
from sanity.observation import CHUNK, Seen
from sanity.plan import Plan
from sanity.randomization import steps
from sanity.records import Array, Key, Prediction
from sanity.run import draws_of, keys, run
from sanity.stages import Stage
from sanity.worker import Task


@dataclass(frozen=True)
class Job:
    """A plan with all that it names found: what is run, where, and the folder that it is written to."""

    plan: Plan
    classifier: Classifier
    pictures: Images
    stages: Sequence[Stage]
    folder: RunFolder
    device: str
    batch_size: int
    verbose: bool = False

    def work(self, done: frozenset[Key]) -> int:
        """Network evaluations still to be made."""
        return work(self.plan, self.pictures, self.stages, done)

    def bar(self, total: int) -> tqdm[Any]:
        """Progress with ETA, in network evaluations."""
        untrained = "" if self.classifier.trained else " (untrained)"
        return _bar(total, f"{self.classifier.name}{untrained}", smoothing=0.05)

    def tell(self, predictions: Iterable[Prediction]) -> None:
        """Print what the network says at a stage, where that is asked for."""
        for line in told(predictions) if self.verbose else ():
            tqdm.write(line)


def walk(job: Job) -> dict[str, Any]:
    """Take the steps that are not done yet, each written before the next; a bar shows evaluations and ETA.

    Returns what the manifest says of it.
    """
    done = _begun(job)

    def keep(seen: Seen) -> None:
        if seen.inputs.ids == job.pictures.ids[:CHUNK]:
            trained = fingerprints.seen_by(job.plan, job.classifier, seen)
            fingerprints.write(job.folder.steps / fingerprints.FILE, trained)

    with job.bar(job.work(done)) as bar:
        for step in run(
            job.plan,
            job.classifier,
            job.pictures,
            job.stages,
            batch_size=job.batch_size,
            device=job.device,
            done=done,
            on_progress=bar.update,
            on_trained=keep,
        ):
            job.folder.flush(step)
            bar.set_postfix_str(f"{step.key.order} {step.stage}")
            job.tell(step.predictions)
    return {"failures": []}


def spread(connection: Connection, job: Job) -> dict[str, Any]:
    """Let workers take the steps that are not done yet, each written as it comes; one bar for all of them.

    Returns what the manifest says of it. Cells that fail are tried again, and at last left out.
    """
    done = _begun(job)
    ledger = Ledger(lacking(job.plan, job.stages, job.pictures, done))
    batch_size, draws = job.batch_size, draws_of(job.plan)
    task = Task(job.plan, job.classifier, job.stages, draws, batch_size, connection.device, connection.threads)
    total = job.work(done)
    with job.bar(total) as bar:
        crew = Crew(connection, task, job.pictures, ledger, lambda crew: bar.set_postfix_str(_state(crew), False))
        bar.set_postfix_str(_state(crew))
        for packet in crew.run():
            job.folder.write(packet.files)
            # A chunk's trained maps are made anew by each worker that joins in: work, but not of the plan.
            bar.update(min(packet.evaluations, total - bar.n))
            job.tell(read_packed(packet.files))
    if ledger.failures and not job.folder.blocks():
        raise ValueError(f"every cell failed {ledger.attempts} times: {ledger.failures[0].reason}")
    return of_crew(crew)


def keep_fingerprints(job: Job) -> None:
    """Write the trained network's maps in short, for `python -m sanity.gate`; an interrupted run takes them anew."""
    run_saw = fingerprints.read(job.folder.steps / fingerprints.FILE)
    total = fingerprints.cost(job.plan, job.pictures, run_saw)
    with _bar(total, "fingerprints of the trained maps", leave=False) as bar:
        found = fingerprints.fingerprints(
            job.plan,
            job.classifier,
            job.pictures,
            batch_size=job.batch_size,
            device=job.device,
            on_progress=bar.update,
            run_saw=run_saw,
        )
    fingerprints.write(job.folder.path / fingerprints.FILE, found)


def work(plan: Plan, pictures: Images, stages: Sequence[Stage], done: frozenset[Key]) -> int:
    """Network evaluations still to be made."""
    engine, total = Engine(plan.explainers(), 1), 0
    for number, start in enumerate(range(0, len(pictures), CHUNK)):
        size = min(CHUNK, len(pictures) - start)
        pending = [key for key in keys(plan, stages, number) if key not in done]
        if pending:
            looks = 1 + sum(key.stage_index > 0 for key in pending)
            total += size * (engine.cost * looks + engine.again(plan.fresh_noise).cost)
    return total


def illustrations(plan: Plan, classifier: Classifier, pictures: Images, stages: Sequence[Stage]) -> dict[str, Array]:
    """What strips show beside the maps: stage names of each order, and the pictures as the network sees them."""
    shown: dict[str, Array] = {}
    for order in plan.orders:
        shown[f"stages/{order}"] = np.array([stage.name for stage, _ in steps(stages, order)])
    for picture in () if plan.hide_pictures else pictures.pictures[: plan.strips]:
        pixels = picture.load(classifier.preprocess)
        low, high = pixels.amin(), pixels.amax()
        grey = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
        shown[f"pictures/{picture.id}"] = grey.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return shown


def told(predictions: Iterable[Prediction]) -> list[str]:
    """One line a picture: what the network says at this stage."""
    return [
        f"{p.order} {p.stage_index:>2} {p.stage:<16} {p.image}: {p.top1_name} {p.top1_probability:.4f}"
        f" (explained class {p.target}: {p.target_probability:.4f})" + ("" if p.finite else "  logits not finite")
        for p in predictions
    ]


def _begun(job: Job) -> frozenset[Key]:
    """Keep the pictures that strips show; the steps that are done already."""
    job.folder.keep_pictures(illustrations(job.plan, job.classifier, job.pictures, job.stages))
    return job.folder.done()


def _state(crew: Crew) -> str:
    ledger = crew.ledger
    failed = f", {len(ledger.failures)} failed" if ledger.failures else ""
    return f"cells {ledger.finished}/{ledger.total}{failed}, workers {crew.present}"


def _bar(total: int, words: str, **options: Any) -> tqdm[Any]:
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(total=total, unit=" gradients", unit_scale=True, mininterval=interval, desc=words, **options)
