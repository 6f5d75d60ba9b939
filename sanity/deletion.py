"""Evaluate maps by deleting what they point at: what `python -m sanity.deletion` does, from flags to files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from sanity import images, models
from sanity.attributions import CONTROLS
from sanity.cli import HelpFormatter, add_fields, parse
from sanity.command import Clock, environment, guarded_main
from sanity.evaluation import EVALUATIONS, Measure, Part, Settings, Task, evaluate, with_controls
from sanity.folder import RunFolder
from sanity.plan import Plan, from_dict
from sanity.pointing import read_boxes
from sanity.records import counts, to_table, write_json
from sanity.report.deletions import caption, figures, summarize, terminal_tables, to_markdown
from sanity.report.figures import any_script
from sanity.session import setting_of, usual_batch

FORMAT = "deletion 1"
"""Changes whenever a change of the code would move numbers of an unchanged plan."""
INTRODUCTION = """Are the pixels that a map points at those that matter? Delete them, or show them alone, and ask again:
the evaluations of Fong and Vedaldi 2017, and insertion and deletion curves, for any method.

  python -m sanity.deletion --methods gradient,gradcam,meaningful_perturbation --output DIR
  python -m sanity.deletion --model resnet50 --images VOC/JPEGImages --boxes VOC/Annotations --output DIR
  python -m sanity.deletion --evaluations minimality curves --methods gradcam edges random --output DIR

Writes DIR/measures.parquet (one row an image), summary.csv and .md, run.json and figures/. A number that cannot be
had (a level that no box reaches, an attack that fools nobody) is a row with its reason and is counted."""
EXPLAINED = (
    "model", "weights", "images", "limit", "squash", "skip_bad_images", "target",
    "methods", "samples", "mask_steps", "precision",
)  # fmt: skip


def parser() -> ArgumentParser:
    """Flags of `python -m sanity.deletion`: fields of a plan, of the settings, and where it runs."""
    made = ArgumentParser(
        prog="sanity deletion",
        usage="sanity deletion [options]",
        description=INTRODUCTION,
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    add_fields(made.add_argument_group("what is explained"), Plan, EXPLAINED)
    words = "\n".join(f"{name}: {what}" for name, what in EVALUATIONS.items())
    add_fields(made.add_argument_group("what is measured", words), Settings)
    where = made.add_argument_group("where and how it runs: nothing here changes a number beyond rounding")
    where.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    where.add_argument("--batch-size", default="auto", metavar="N", help="evaluations at a time, or auto (default)")
    where.add_argument("--output", type=str, required=True, metavar="DIR", help="folder for the results")
    where.add_argument("--resume", action="store_true", help="go on with an interrupted run in OUTPUT")
    return made


def command(arguments: Sequence[str]) -> int:
    """Parse, check, measure, write; everything that can be refused is refused before the folder is touched."""
    values = parse(parser(), arguments)
    settings = settings_of(values)
    plan = with_controls(plan_of(values), settings, CONTROLS)
    values.verbose = False
    setting = setting_of(values)
    clock = Clock()
    boxes = read_boxes(Path(settings.boxes)) if "pointing" in settings.active and settings.boxes else {}
    classifier = models.load(plan.model, plan.weights)
    classifier = classifier.squashing() if plan.squash else classifier
    pictures = images.find(plan.images, skip_bad=plan.skip_bad_images, limit=plan.limit)
    size = setting.batch_size or usual_batch(setting.device)
    task = Task(plan, settings, classifier, pictures, boxes, setting.device, size)
    task.check()
    folder = MeasuresFolder(setting.output)
    header = folder.open(manifest(task), setting.resume)
    if header["status"] != "complete":
        walk(task, folder)
        header = folder.finish({**header, **clock.stamp()})
    publish(folder, header)
    return 0


def plan_of(values: Namespace) -> Plan:
    """The plan's part of the flags; `a,b` reads as two methods."""
    found = {name: values[name] for name in EXPLAINED}
    found["methods"] = _names(found["methods"])
    if found["target"] == "repredicted":
        raise ValueError("--target repredicted: nothing is randomized here; predicted, label or an index")
    return from_dict(found)


def settings_of(values: Namespace) -> Settings:
    """The settings' part of the flags."""
    given = {one.name: values[one.name] for one in fields(Settings)}
    found: dict[str, Any] = {key: tuple(_names(v)) if isinstance(v, list) else v for key, v in given.items()}
    return Settings(**found)


def _names(words: Sequence[str]) -> list[str]:
    return [name for word in words for name in ([word] if "=" in word else word.split(",")) if name]


def manifest(task: Task) -> dict[str, Any]:
    """What `run.json` says before the first number."""
    classifier, explained = task.classifier, task.plan.as_dict()
    digest = hashlib.sha256(repr(sorted(task.boxes.items())).encode()).hexdigest()
    return {
        "status": "running",
        "protocol_version": FORMAT,
        "plan": {
            **{name: explained[name] for name in EXPLAINED},
            **task.settings.as_dict(),
            "boxes_sha256": digest,
        },
        "model": classifier.name,
        "trained": classifier.trained,
        "weights": classifier.weights,
        "weights_sha256": classifier.weights_sha256,
        "images": {picture.id: picture.sha256 for picture in task.images.pictures},
        "images_sha256": task.images.digest,
        "skipped_images": dict(task.images.skipped),
        "device": task.device if task.device == "cpu" else torch.cuda.get_device_name(task.device),
        "threads": torch.get_num_threads(),
        "batch_size": task.batch_size,
        **environment(),
    }


def walk(task: Task, folder: MeasuresFolder) -> None:
    """Take the parts that are not done yet, each written before the next; a bar shows evaluations and ETA."""
    done, names = folder.done(), [method.name for method in task.plan.explainers()]
    with tqdm(
        total=sum(task.cost(part) for part in task.parts() if part not in done),
        unit=" evaluations",
        unit_scale=True,
        smoothing=0.05,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        desc=f"{task.classifier.name}{'' if task.classifier.trained else ' (untrained)'}",
    ) as bar:
        for part, found in evaluate(task, done, bar.update):
            folder.keep(part, found)
            bar.set_postfix_str(names[part.method])


class MeasuresFolder(RunFolder):
    """An output folder: a run's, but for what a step is. Each part is written whole before the next one starts."""

    def keep(self, part: Part, found: Sequence[Measure]) -> None:
        """Write one part."""
        table = to_table(found, Measure)
        _whole(self.steps / f"{part.chunk:06d}-{part.method:04d}.parquet", lambda path: pq.write_table(table, path))

    def done(self) -> frozenset[Part]:  # type: ignore[override]  # a part here is not a step of a cascade
        """Parts already written."""
        return frozenset(Part(*map(int, path.stem.split("-"))) for path in self.steps.glob("[0-9]*.parquet"))

    def finish(self, header: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Join the parts, method by method, into measures.parquet; the manifest is complete with it."""
        paths = sorted(self.steps.glob("[0-9]*.parquet"), key=lambda path: path.stem.split("-")[::-1])
        frame = pd.concat([pq.read_table(path).to_pandas() for path in paths], ignore_index=True)
        table = to_table(frame.itertuples(index=False, name=None), Measure)
        _whole(self.path / "measures.parquet", lambda path: pq.write_table(table, path))
        complete = {**header, "status": "complete", "counts": counts(frame)}
        write_json(self.path / "run.json", complete)
        return complete


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def publish(folder: MeasuresFolder, header: dict[str, Any]) -> None:
    """Summary and figures of finished measures, and where all of it lies."""
    rows = pq.read_table(folder.path / "measures.parquet").to_pandas()
    summary = summarize(rows)
    name = header["model"] + ("" if header["trained"] else " (untrained)")
    summary.to_csv(folder.path / "summary.csv", index=False, float_format="%.6f", na_rep="NaN")
    (folder.path / "summary.md").write_text(f"# {caption(rows, name)}\n\n{to_markdown(summary)}")
    (folder.path / "figures").mkdir(exist_ok=True)
    drawn = figures(summary, caption(rows, name))
    with any_script():
        for stem, figure in drawn.items():
            figure.savefig(folder.path / "figures" / f"{stem}.png", metadata={"Software": None})
    folder.tidy()
    print(terminal_tables(summary))
    if not header["trained"]:
        print(f"note: {header['model']} is untrained: these numbers say nothing of a trained network")
    if header["skipped_images"]:
        print(f"note: {len(header['skipped_images'])} pictures could not be read and were skipped")
    files = "measures.parquet, summary.csv, summary.md, run.json"
    print(f"\nwritten to {folder.path}/: {files}, figures/ ({len(drawn)} pictures)")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sanity.deletion`: exit code 0, 2 for what the user must mend, 130 after Ctrl-C."""
    return guarded_main(
        "sanity deletion",
        lambda: command(sys.argv[1:] if arguments is None else arguments),
        "what was finished is kept, add --resume to go on",
    )


if __name__ == "__main__":
    sys.exit(main())
