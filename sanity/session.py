"""A run from flags to files: what `python -m sanity.run` does around the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from tqdm import tqdm

from sanity import attributions, experiment, fingerprints, images, models, parts, similarity, stages, summary
from sanity.cli import HelpFormatter, add_fields, parse, plan_of, with_preset
from sanity.cluster import Cluster, reached
from sanity.command import Clock, environment
from sanity.execution import Job, keep_fingerprints, spread, walk, work
from sanity.folder import RunFolder
from sanity.images import Images
from sanity.memory import hold
from sanity.models import MODELS, Classifier
from sanity.observation import CHUNK
from sanity.plan import Plan, presets
from sanity.randomization import ORDERS, REINITIALISERS
from sanity.records import PROTOCOL_VERSION, read_unrelated
from sanity.report.figures import draw
from sanity.run import prepare, suited_batch
from sanity.stages import Stage

DEFAULT_OUTPUT = "sanity_run"
FAILED = 1
"""Exit code of a run that is finished but for cells that failed again and again."""
GPU_BATCH = 64
LONG = 2000
"""Evaluations from which on it pays to measure which batch size is fastest."""
CPU_BATCH = 4
"""Measured: more evaluations at a time make tensors that the C library maps anew from the system, page by page."""
INTRODUCTION = """Does an explanation depend on the network? Replace the network's weights by random ones, stage by
stage, explain the same pictures again, and measure how alike the maps stay (Adebayo et al. 2018).

  python -m sanity.run                              bundled network and photographs, about a minute
  python -m sanity.run --model resnet50 --images photos/ --preset paper
  python -m sanity.run --model inception_v3 --weights FILE.pth --images photos/ --orders cascading independent
  python -m sanity.run --test data --data mnist --model cnn
  python -m sanity.run --methods gradient,my_package.mine:explain --config plan.yaml --output results/mine

Writes OUTPUT/scores.parquet (one row an image), predictions.parquet, fingerprints.parquet (of the trained maps, for
python -m sanity.gate), summary.csv and .md, verdicts.csv, run.json and figures/. Flags win over --config, and
--config over --preset."""


@dataclass(frozen=True)
class Setting:
    """How and where a plan is run: nothing here changes a number beyond rounding.

    batch_size: None for what suits the device; cluster: None for this process.
    """

    device: str
    batch_size: int | None
    output: Path
    resume: bool
    verbose: bool
    cluster: Cluster | None = None


FROZEN = ("frozen:METHOD", "any gradient-style method, LRP or DeepLIFT with activations frozen; Hara [p=80]")
WHAT = ("model", "weights", "against", "images", "limit", "squash", "skip_bad_images", "target")
RANDOMIZED = ("orders", "stages", "granularity", "reinit", "batchnorm", "redraw", "seeds")
COMPARED = ("methods", "samples", "fresh_noise", "mask_steps", "similarities", "precision")
KEPT = ("save_maps", "strips", "hide_pictures")


def parser() -> ArgumentParser:
    """Flags of `python -m sanity.run`, one for each field of a plan and for each of a setting."""
    made = ArgumentParser(
        prog="sanity run",
        usage="sanity run [options]",
        description=INTRODUCTION,
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    made.add_argument("--list", action="store_true", help="list models, methods, orders, similarities, presets")
    made.add_argument(
        "--preset",
        metavar="NAME",
        help=f"start from a plan file of the package: {', '.join(presets())} (default: quick)",
    )
    made.add_argument("--config", action="config", help="YAML plan file; its keys are the flags' names")
    small = made.add_argument_group("the published experiments on small networks; these stand for other flags")
    for name, (placeholder, words) in experiment.FLAGS.items():
        small.add_argument(f"--{name}", metavar=placeholder, help=words)
    for title, names in (
        ("what is explained", WHAT),
        ("how it is randomized", RANDOMIZED),
        ("how it is explained and compared", COMPARED),
        ("what is kept", KEPT),
    ):
        add_fields(made.add_argument_group(title), Plan, names)
    where = made.add_argument_group("where and how it runs: nothing here changes a number beyond rounding")
    where.add_argument("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda or cuda:N")
    where.add_argument("--batch-size", default="auto", metavar="N", help="evaluations at a time, or auto (default)")
    where.add_argument(
        "--output", type=str | None, metavar="DIR", help=f"folder for the results (default: a new {DEFAULT_OUTPUT})"
    )
    where.add_argument("--resume", action="store_true", help="go on with an interrupted run in OUTPUT")
    where.add_argument("--verbose", action="store_true", help="print every picture's class at every stage")
    many = made.add_argument_group("many workers and machines (pip install 'saliency-sanity[ray]')")
    many.add_argument(
        "--engine", choices=("embedded", "ray"), default="embedded", help="this process alone, or workers on Ray"
    )
    many.add_argument(
        "--address",
        type=str | None,
        metavar="HOST:PORT",
        help="a running Ray cluster, auto for this machine's (default: start one here, on loopback)",
    )
    many.add_argument("--workers", type=int | None, metavar="N", help="default: one a core, or one a GPU")
    many.add_argument(
        "--gpus-per-worker", type=float | None, metavar="F", help="default: 1 where the cluster has GPUs; .5 shares one"
    )
    return made


def command(arguments: Sequence[str]) -> int:
    """Parse, check, run, write; everything that can be refused is refused before the folder is touched."""
    plain, trainings = experiment.spelt_out(arguments)
    values = parse(parser(), with_preset(plain, "quick"))
    if values.list:
        print(listing())
        return 0
    plan, setting = plan_of(values), setting_of(values)
    for training in trainings:
        training.ensure()
    clock = Clock()
    hold()
    pictures = images.find(plan.images, skip_bad=plan.skip_bad_images, limit=plan.limit)
    classifier = models.load(plan.model, plan.weights)
    classifier = classifier.squashing() if plan.squash else classifier
    found = prepare(plan, classifier, pictures, setting.device)
    with reached(setting.cluster) if setting.cluster else nullcontext() as connection:
        if setting.batch_size is None:
            size = usual_batch(setting.device if connection is None else connection.device)
            if connection is None and not setting.resume and work(plan, pictures, found, frozenset()) >= LONG:
                size = suited_batch(plan, classifier, pictures, setting.device)
            setting = replace(setting, batch_size=size)
        folder = RunFolder(setting.output)
        header = folder.open(manifest(plan, setting, classifier, pictures, found), setting.resume)
        if header["status"] != "complete" or header.get("failures"):
            # A run that goes on does so with the batch size that it was begun with.
            size = header["batch_size"]
            job = Job(plan, classifier, pictures, found, folder, setting.device, size, setting.verbose)
            said = walk(job) if connection is None else spread(connection, job)
            if not {image for one in said["failures"] for image in one["images"]} & set(pictures.ids[:CHUNK]):
                keep_fingerprints(job)
            header = folder.finish({**header, **said, **clock.stamp()}, ranks(plan, pictures))
    publish(folder, header)
    return FAILED if header.get("failures") else 0


def setting_of(values: Namespace) -> Setting:
    """Check device, batch size, cluster and output. Raises ValueError in one line."""
    cluster, device = _cluster(values), values.device
    if device == "auto" or cluster:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    usable = ["cpu", "cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in usable or (device != "cpu" and not torch.cuda.is_available()):
        seen = torch.cuda.device_count() if torch.cuda.is_available() else "no"
        raise ValueError(f"--device {device}: torch {torch.__version__} sees {seen} GPU here; use --device cpu")
    size = None if values.batch_size == "auto" else values.batch_size
    if size is not None and not (str(size).isdecimal() and 1 <= int(size) <= 10**6):
        raise ValueError(f"--batch-size must be auto or a whole number from 1, not {size!r}")
    size = None if size is None else int(size)
    return Setting(device, size, _output(values.output, values.resume), values.resume, values.verbose, cluster)


def _cluster(values: Namespace) -> Cluster | None:
    """The cluster asked for, if the command knows of any."""
    flags = ("address", "workers", "gpus_per_worker")
    if values.get("engine") == "ray":
        return Cluster(values.address, values.workers, values.gpus_per_worker, values.device)
    for flag in flags:
        if values.get(flag) is not None:
            raise ValueError(f"--{flag.replace('_', '-')} goes with --engine ray")
    return None


def usual_batch(device: str) -> int:
    """Evaluations at a time that suit most networks on a device."""
    return CPU_BATCH if device == "cpu" else GPU_BATCH


def _output(given: str | None, resume: bool) -> Path:
    """The given folder; else the first free of sanity_run, sanity_run-2, ..., or the last taken to resume."""
    if given is not None:
        return Path(given)
    names = [Path(DEFAULT_OUTPUT), *(Path(f"{DEFAULT_OUTPUT}-{i}") for i in range(2, 10_000))]
    free = next(i for i, path in enumerate(names) if not path.exists())
    return names[max(free - 1, 0)] if resume else names[free]


def manifest(
    plan: Plan, setting: Setting, classifier: Classifier, pictures: Images, found: Sequence[Stage]
) -> dict[str, Any]:
    """What `run.json` says of a run before it starts."""
    return {
        "status": "running",
        "protocol_version": PROTOCOL_VERSION,
        "plan": plan.as_dict(),
        "model": classifier.name,
        "trained": classifier.trained,
        "weights": classifier.weights,
        "weights_sha256": classifier.weights_sha256,
        "stages": {stage.name: list(stage.parameters) for stage in found},
        "untouched_parameters": list(stages.untouched(classifier.network, found)),
        "images": {picture.id: picture.sha256 for picture in pictures.pictures},
        "images_sha256": pictures.digest,
        "skipped_images": dict(pictures.skipped),
        "device": setting.device if setting.device == "cpu" else torch.cuda.get_device_name(setting.device),
        "threads": torch.get_num_threads(),
        "batch_size": setting.batch_size,
        **environment(),
    }


def ranks(plan: Plan, pictures: Images) -> dict[str, Sequence[object]]:
    """Order of the rows of a finished run: the plan's own."""
    return {
        "seed": plan.seeds,
        "order": plan.orders,
        "method": [method.name for method in plan.explainers()],
        "similarity": plan.similarities,
        "image": pictures.ids,
    }


def publish(folder: RunFolder, header: Mapping[str, Any]) -> None:
    """Summary, verdicts and figures of a finished run, and the paths of all that was written."""
    scores = parts.scores(folder.path)
    table, judged = summary.summarize(scores), summary.verdicts(scores, read_unrelated(folder.path))
    (folder.path / "summary.csv").write_text(summary.to_csv(table))
    (folder.path / "summary.md").write_text(summary.to_markdown(table))
    judged.to_csv(folder.path / "verdicts.csv", index=False, float_format="%.6f")
    with tqdm(desc="figures", unit=" figures", leave=False, mininterval=1) as bar:
        drawn = draw(folder.path, lambda done, total: _show(bar, done, total), table)
    if not header.get("failures"):
        folder.tidy()
    print(summary.terminal_table(table))
    for warning in warnings(header):
        print(f"note: {warning}")
    tables = ("scores.parquet", "predictions.parquet", fingerprints.FILE, "summary.csv", "summary.md", "verdicts.csv")
    print(f"\nwritten to {folder.path}/: {', '.join(tables)}, run.json, figures/ ({len(drawn)} pictures)")


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def warnings(header: Mapping[str, Any]) -> list[str]:
    """What a reader of the numbers must know."""
    found = []
    if not header["trained"]:
        found.append(f"{header['model']} is untrained: these numbers say nothing of a trained network")
    untouched = header["untouched_parameters"]
    if untouched:
        found.append(f"{len(untouched)} parameters are in no stage and stay trained, such as {untouched[0]}")
    for one in header.get("failures", []):
        where = f"{one['order']}, seed {one['seed']}, images {one['images'][0]} to {one['images'][-1]}"
        found.append(f"failed {one['attempts']} times and left out: {where}: {one['reason']} (--resume tries again)")
    bad = {status: n for status, n in header["counts"].items() if status != "ok"}
    if bad:
        found.append("scores that are NaN: " + ", ".join(f"{n} for a {status}" for status, n in bad.items()))
    if header["skipped_images"]:
        found.append(f"{len(header['skipped_images'])} pictures could not be read and were skipped")
    return found


def listing() -> str:
    """Everything that can be named on the command line."""
    blocks = [
        (
            "models",
            [(m.name, m.source) for m in MODELS] + [("...", "any torchvision classifier, package.module:factory")],
        ),
        ("methods", [*((m.name, _about(m)) for m in attributions.registered().values()), FROZEN]),
        ("orders", list(ORDERS.items())),
        ("re-initialisers", list(REINITIALISERS.items())),
        ("similarities", [(s.name, s.source) for s in similarity.SIMILARITIES]),
        ("presets", [(name, _first_comment(path)) for name, path in presets().items()]),
    ]
    lines = []
    for title, entries in blocks:
        wide = max(len(name) for name, _ in entries)
        lines += [title, *(f"  {name:<{wide}}  {words}" for name, words in entries), ""]
    return "\n".join(lines)


def _about(method: attributions.Method) -> str:
    options = ", ".join(f"{key}={value}" for key, value in method.options.items())
    random = "deterministic" if method.deterministic else "random, seeded"
    return f"{random}; {method.cost} evaluations; {method.source}" + (f" [{options}]" if options else "")


def _first_comment(path: Path) -> str:
    return path.read_text().splitlines()[0].lstrip("# ")
