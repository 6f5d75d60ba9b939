"""A worker without its cluster: what it hands back is what a run in one process yields."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch import Tensor, nn

from sanity import images, models
from sanity.blocks import Block, block_of, packed
from sanity.folder import RunFolder
from sanity.images import Images
from sanity.plan import Plan
from sanity.records import Cell, Key, Score, Step, to_table
from sanity.run import draws_of, prepare, run
from sanity.worker import Packet, Task, Worker

PLAN = Plan(methods=("smoothgrad", "edges"), samples=2, similarities=("spearman",), precision="float64", seeds=(0, 4))


@pytest.fixture
def shown(pictures: Tensor) -> Images:
    return images.tensors(pictures)


def task_of(network: nn.Module, shown: Images) -> Task:
    classifier = models.of_network(network)
    return Task(PLAN, classifier, prepare(PLAN, classifier, shown), draws_of(PLAN), 8, "cpu", 1)


def all_steps(task: Task, shown: Images) -> list[Step]:
    return list(run(PLAN, task.classifier, shown, task.stages, batch_size=8))


def taken(worker: Worker, cell: Cell, shown: Images, wanted: Sequence[Key]) -> Iterator[Packet]:
    packet = worker.start(cell, shown, wanted)
    yield packet
    while not packet.last:
        packet = worker.go_on()
        yield packet


def rows_of(packets: Sequence[Packet]) -> pd.DataFrame:
    found = [BytesIO(data) for packet in packets for name, data in packet.files.items() if "scores" in name]
    return pd.concat([pq.read_table(one).to_pandas() for one in found], ignore_index=True)


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_packets_hold_the_steps_of_a_run(awkward: nn.Module, shown: Images, seconds: float) -> None:
    task = task_of(awkward, shown)
    steps = all_steps(task, shown)
    worker = Worker(pickle.loads(pickle.dumps(replace(task, sources={}))), seconds)
    worker.task = replace(worker.task, sources=task.sources)
    packets = [
        packet
        for seed in PLAN.seeds
        for packet in taken(worker, Cell(0, seed, "cascading"), shown, [s.key for s in steps if s.key.seed == seed])
    ]
    assert [key for packet in packets for key in packet.keys] == [step.key for step in steps]
    assert len(packets) == (len(steps) + 2 if seconds == 0 else 2)
    want = to_table([score for step in steps for score in step.scores], Score).to_pandas()
    pd.testing.assert_frame_equal(rows_of(packets), want, rtol=0, atol=1e-12)


def test_the_trained_network_is_explained_once_a_chunk(awkward: nn.Module, shown: Images) -> None:
    task = task_of(awkward, shown)
    steps = all_steps(task, shown)
    worker = Worker(task, 1000)
    first, second = (
        next(taken(worker, Cell(0, seed, "cascading"), shown, [s.key for s in steps if s.key.seed == seed]))
        for seed in PLAN.seeds
    )
    looks = len(task.stages)
    assert first.evaluations == second.evaluations // looks * (looks + 1)


def test_only_the_steps_that_are_wanted_are_taken(awkward: nn.Module, shown: Images) -> None:
    task = task_of(awkward, shown)
    steps = [step for step in all_steps(task, shown) if step.key.seed == 4]
    wanted = [step.key for step in steps[2:]]
    packets = list(taken(Worker(task, 1000), Cell(0, 4, "cascading"), shown, wanted))
    assert [key for packet in packets for key in packet.keys] == wanted
    want = to_table([score for step in steps[2:] for score in step.scores], Score).to_pandas()
    pd.testing.assert_frame_equal(rows_of(packets), want, rtol=0, atol=1e-12)


def test_neighbouring_steps_share_files_and_gaps_part_them(awkward: nn.Module, shown: Images, tmp_path: Path) -> None:
    steps = all_steps(task_of(awkward, shown), shown)
    one, other = ([step for step in steps if step.key.seed == seed] for seed in PLAN.seeds)
    files = packed([*other[3:], *one[:2], one[3]])
    blocks = [Block(0, 0, "cascading", 0, 1), Block(0, 0, "cascading", 3, 3), Block(0, 4, "cascading", 3, 4)]
    names = [name for name in files if "scores" in name]
    assert names == [f"{block.stem}.scores.parquet" for block in blocks]
    assert list(files)[-3:] == names
    assert [block_of(Path(name)) for name in names] == blocks
    assert [name for name in files if "unrelated" in name] == [f"{blocks[0].stem}.unrelated.parquet"]
    folder = RunFolder(tmp_path / "run")
    folder.steps.mkdir(parents=True)
    folder.write(files)
    assert folder.blocks() == blocks
    assert folder.done() == {step.key for step in (*other[3:], *one[:2], one[3])}


def test_pictures_travel_in_their_bytes(tmp_path: Path) -> None:
    Image.new("RGB", (8, 6), (200, 100, 50)).save(tmp_path / "one.png")
    found = images.folder(tmp_path)
    sent = pickle.loads(pickle.dumps(images.carried(found)))
    (tmp_path / "one.png").unlink()
    assert sent == found
    assert sent.pictures[0].open().getpixel((0, 0)) == (200, 100, 50)
    with pytest.raises(FileNotFoundError):
        images.carried(found)


def test_tensors_travel_without_their_neighbours(pictures: Tensor) -> None:
    whole = images.tensors(pictures.repeat(100, 1, 1, 1))
    part = Images("part", whole.pictures[:2])
    sent = pickle.dumps(images.carried(part))
    assert len(sent) < len(pickle.dumps(part)) / 20
    assert all((a.pixels == b.pixels).all() for a, b in zip(pickle.loads(sent).pictures, part.pictures, strict=True))
