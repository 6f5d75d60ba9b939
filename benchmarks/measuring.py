"""What the speed benchmarks share: the networks they time, interleaved repetitions, tables beside a manifest."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from unittest import mock

import sanity  # noqa: F401  (before torch: it sets how OpenMP waits)

# isort: split
import pandas as pd
import torch
from tqdm import tqdm

from sanity import images, models
from sanity.command import Clock
from sanity.images import Images
from sanity.memory import hold
from sanity.models import Classifier
from sanity.records import write_json
from sanity.stages import Stage, derived, grouped, written_out

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"
T, R = TypeVar("T"), TypeVar("R")


def parser(words: str | None, model: str, weights: str, **numbers: int) -> argparse.ArgumentParser:
    """Flags that benchmarks of a network share, with their defaults; `numbers` become flags of whole numbers."""
    made = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default=model)
    made.add_argument("--weights", default=weights, help="FILE, pretrained or random")
    for name, default in numbers.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return made


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """What a manifest keeps of the flags: of weights the file's name, not where it lay."""
    return {**vars(options), "weights": Path(options.weights).name}


def network(name: str, weights: str, limit: int) -> tuple[Classifier, Images]:
    """A model with weights (FILE, pretrained or random), and bundled photographs; memory is held as a command does."""
    hold()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.load(name, weights), images.find("bundled", limit=limit)


def stages_of(classifier: Classifier, example: torch.Tensor, number: int | None) -> tuple[Stage, ...]:
    """All stages, or as many groups of neighbours."""
    found = (
        written_out(classifier.network, classifier.stages)
        if classifier.stages
        else derived(classifier.network, example)
    )
    return found if number is None else grouped(found, number)


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int) -> pd.DataFrame:
    """Wall and processor seconds of each contender, A B C A B C ...: rows of contender, repeat, wall, cpu."""
    rows = []
    with tqdm(total=repeats * len(contenders), unit="run") as bar:
        for repeat in range(repeats):
            for name, contender in contenders.items():
                bar.set_description(name)
                wall, cpu = time.perf_counter(), time.process_time()
                contender()
                rows.append(
                    {
                        "contender": name,
                        "repeat": repeat,
                        "wall": time.perf_counter() - wall,
                        "cpu": time.process_time() - cpu,
                    }
                )
                bar.update()
    return pd.DataFrame(rows)


def processes(workers: int) -> ProcessPoolExecutor:
    """Processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,))


def spread(work: Callable[[T], R], jobs: Iterable[T], workers: int) -> list[R]:
    """Do jobs in processes of one thread each."""
    with processes(workers) as pool:
        return list(pool.map(work, jobs))


def peak_memory() -> float:
    """Largest resident set of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def progress() -> Iterator[Callable[[int], object]]:
    """A bar of network evaluations."""
    with tqdm(unit=" evaluations", unit_scale=True, leave=False, mininterval=1) as bar:
        yield bar.update


@contextmanager
def watched(
    parts: Iterable[tuple[Any, str, str]],
    seconds: MutableMapping[str, float],
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[None]:
    """Add up, by words, the seconds spent in functions, by any thread: owner, name, words."""
    lock = Lock()

    def timed(function: Callable[..., Any], words: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    seconds[words] = seconds.get(words, 0.0) + now() - start

        return call

    with ExitStack() as stack:
        for owner, name, words in parts:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), words)))
        yield


def keep(folder: Path, table: pd.DataFrame, text: str, clock: Clock) -> None:
    """Write table.csv, table.md and manifest.json, and print the text."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "table.csv", index=False, float_format="%.4f")
    (folder / "table.md").write_text(text + "\n")
    write_json(folder / "manifest.json", {"command": " ".join(["python", *sys.argv]), **clock.manifest()})
    print(text)


def publish(name: str, tables: Mapping[str, pd.DataFrame], words: Sequence[str], clock: Clock, **more: Any) -> None:
    """Write results/benchmarks/NAME/: a CSV a table, table.md with the words, run.json; and print it."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {name}", *words]
    for title, table in tables.items():
        table.to_csv(folder / f"{title}.csv", index=False, float_format="%.6g")
        parts += [f"## {title}", markdown(table)]
    text = "\n\n".join(parts) + "\n"
    (folder / "table.md").write_text(text)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    manifest = {"command": command, "threads": torch.get_num_threads(), **more, **clock.manifest()}
    write_json(folder / "run.json", manifest)
    print(text)


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table, numbers to four digits."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "" if pd.isna(value) else f"{value:.4g}"
        return str(value)

    head = [str(column) for column in table.columns]
    body = [[cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])
