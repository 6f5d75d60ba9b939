"""Runs on real Ray clusters of two nodes on this machine: the same numbers, and nothing lost whatever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from sanity.run import main
from tests.test_cli import photographs

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")
ROOT = Path(__file__).resolve().parents[1]
DEADLINE = 120


def lingering(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The gradient, after a while: so that there is a middle of a cell to be killed in."""
    time.sleep(0.3)
    x = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x)[torch.arange(len(x)), targets].sum(), x)
    return found


def black(images: Tensor) -> bool:
    """Whether a picture among them is of one colour."""
    return bool((images.std((2, 3)) < 1e-6).all(1).any())


def exhausting(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Fails as a process without memory does, for the one picture that is black."""
    if black(images):
        raise MemoryError("no room for the black picture")
    return images


def refusing(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    if black(images):
        raise ValueError("the black picture is bad")
    return images


def fatal(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Kills its process, as the system does with one that takes too much memory."""
    if black(images):
        os.kill(os.getpid(), signal.SIGKILL)
    return images


def plan(*methods: str, seeds: int = 3, orders: int = 2) -> list[str]:
    """A plan of 2 chunks of pictures x seeds x orders."""
    return [
        "--model", "tests.test_cli:factory", "--images", "photos", "--similarities", "spearman", "ssim",
        "--precision", "float64", "--samples", "2", "--batch-size", "8", "--strips", "1",
        "--methods", *methods,
        "--seeds", *map(str, range(seeds)),
        "--orders", *("cascading", "independent")[:orders],
    ]  # fmt: skip


QUICK = plan("gradient", "smoothgrad")
SLOW = plan("smoothgrad", "tests.test_distributed:lingering")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ten pictures: two chunks."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos", 10)
    return tmp_path


class Machines:
    """A cluster of nodes on this machine; the driver's has no cores to work with, and so never leaves."""

    def __init__(self, *cores: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add(number) for number in cores]

    def add(self, cores: int) -> Any:
        return self.cluster.add_node(num_cpus=cores)

    def flags(self, workers: int | None = None) -> list[str]:
        flags = ["--engine", "ray", "--address", self.cluster.address]
        return flags if workers is None else [*flags, "--workers", str(workers)]


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machines]]:
    # Nodes are processes that inherit where tests are found.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made: list[Machines] = []

    def make(*cores: int) -> Machines:
        made.append(Machines(*cores))
        return made[-1]

    yield make
    for one in made:
        one.cluster.shutdown()


def workers_at_work() -> list[int]:
    """Processes of workers that are in the middle of a cell."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if words.startswith((b"ray::RayWorker.start", b"ray::RayWorker.go_on")):
            found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)
    return found


def meanwhile(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def blocks(output: str) -> int:
    return len(list(Path(output).glob("steps/*.scores.parquet")))


def assert_same(one: str, other: str) -> None:
    """The same rows in the same places, the same numbers to rounding."""
    for name in ("scores", "predictions", "unrelated"):
        a, b = (pd.read_parquet(f"{folder}/{name}.parquet") for folder in (one, other))
        numbers = [column for column in a if a[column].dtype == np.float64]
        pd.testing.assert_frame_equal(a.drop(columns=numbers), b.drop(columns=numbers))
        for column in numbers:
            np.testing.assert_allclose(b[column], a[column], rtol=0, atol=1e-9)
    headers = [json.loads(Path(folder, "run.json").read_text()) for folder in (one, other)]
    for key in ("plan", "counts", "unchanged_parameters", "status", "stages", "untouched_parameters"):
        assert headers[0][key] == headers[1][key], key
    strips = [dict(np.load(f"{folder}/strips.npz")) for folder in (one, other)]
    assert strips[0].keys() == strips[1].keys()
    names = [sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*")) for folder in (one, other)]
    assert names[0] == names[1]


def manifest(output: str) -> dict[str, Any]:
    return json.loads(Path(output, "run.json").read_text())


def hired(output: str) -> int:
    return sum(kind["workers"] for kind in manifest(output)["workers"])


def test_a_worker_killed_in_the_middle_of_a_cell_costs_nothing_but_time(
    place: Path, machines: Callable[..., Machines]
) -> None:
    two = machines(1, 1)
    slow = plan("smoothgrad", "tests.test_distributed:lingering", seeds=2)
    killed: list[int] = []

    def kill() -> None:
        victim = until(workers_at_work)[0]
        os.kill(victim, signal.SIGKILL)
        killed.append(victim)

    killer = meanwhile(kill)
    assert main([*slow, "--output", "spread", *two.flags()]) == 0
    killer.join()
    assert killed
    assert manifest("spread")["failures"] == []
    # The one that takes its place is counted if it is up before the other has done all the rest.
    assert hired("spread") in (2, 3)
    assert main([*slow, "--output", "embedded"]) == 0
    assert_same("embedded", "spread")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_numbers_are_the_embedded_runs_for_any_number_of_workers(
    place: Path, machines: Callable[..., Machines], workers: int
) -> None:
    two = machines(2, 2)
    assert main([*QUICK, "--output", "spread", "--save-maps", *two.flags(workers)]) == 0
    assert hired("spread") == workers
    assert main([*QUICK, "--output", "embedded", "--save-maps"]) == 0
    assert_same("embedded", "spread")
    from safetensors.numpy import load_file

    one, other = (load_file(f"{folder}/maps.safetensors") for folder in ("embedded", "spread"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_node_that_leaves_is_replaced_by_those_that_stay(place: Path, machines: Callable[..., Machines]) -> None:
    two = machines(1, 1)

    def leave() -> None:
        until(lambda: blocks("spread") and len(workers_at_work()) == 2)
        two.cluster.remove_node(two.nodes[1], allow_graceful=False)

    leaver = meanwhile(leave)
    assert main([*SLOW, "--output", "spread", *two.flags()]) == 0
    leaver.join()
    assert manifest("spread")["failures"] == []
    assert main([*SLOW, "--output", "embedded"]) == 0
    assert_same("embedded", "spread")


@pytest.mark.slow
def test_a_node_that_joins_late_is_put_to_work(place: Path, machines: Callable[..., Machines]) -> None:
    one = machines(1)
    process = start("spread", *one.flags())
    until(lambda: blocks("spread") or process.poll() is not None)
    one.add(1)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, out + err
    assert hired("spread") == 2
    assert main([*SLOW, "--output", "embedded"]) == 0
    assert_same("embedded", "spread")


def blacken(place: Path) -> None:
    """Make the last picture, of the second chunk, one that the methods above choke on."""
    from PIL import Image

    Image.new("RGB", (30, 24)).save(place / "photos" / "photo9.png")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("refusing", "ValueError: the black picture is bad"),
        ("exhausting", "MemoryError: "),
        ("fatal", "its worker died, as for want of memory or by a signal"),
    ],
)
def test_a_cell_that_always_fails_is_given_up_and_told_while_the_others_finish(
    place: Path,
    machines: Callable[..., Machines],
    capsys: pytest.CaptureFixture[str],
    method: str,
    reason: str,
) -> None:
    blacken(place)
    choking = plan("gradient", f"tests.test_distributed:{method}", seeds=1)
    two = machines(1, 1)
    assert main([*choking, "--output", "spread", *two.flags()]) == 1
    shown = capsys.readouterr().out
    assert "note: failed 3 times and left out: cascading, seed 0, images photo8 to photo9" in shown
    failures = manifest("spread")["failures"]
    assert [(one["order"], one["images"], one["attempts"]) for one in failures] == [
        (order, ["photo8", "photo9"], 3) for order in ("cascading", "independent")
    ]
    assert all(one["reason"].startswith(reason) for one in failures)
    rows = pd.read_parquet("spread/scores.parquet")
    assert set(rows["image"]) == {f"photo{i}" for i in range(8)}
    assert len(rows) == 8 * 2 * 2 * 2 * 4
    assert (rows.groupby(["order", "stage", "method", "similarity"]).size() == 8).all()
    # Not forgotten: resumed, it is tried again, and fails again.
    assert main([*choking, "--output", "spread", "--resume", *two.flags()]) == 1
    pd.testing.assert_frame_equal(pd.read_parquet("spread/scores.parquet"), rows)


@pytest.mark.slow
def test_a_run_without_a_single_row_is_one_line(
    place: Path, machines: Callable[..., Machines], capsys: pytest.CaptureFixture[str]
) -> None:
    blacken(place)
    choking = plan("gradient", "tests.test_distributed:refusing", seeds=1)
    choking[choking.index("photos")] = "photos/photo9.png"
    assert main([*choking, "--output", "spread", *machines(1).flags()]) == 2
    assert "every cell failed 3 times: ValueError: the black picture is bad" in capsys.readouterr().err
    assert manifest("spread")["status"] == "running"


def start(output: str, *more: str) -> subprocess.Popen[str]:
    # A test run in the background of a shell inherits an ignored SIGINT; a person's terminal does not.
    program = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from sanity.run import main
sys.exit(main())
"""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *SLOW, "--output", output, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


LOCAL = ["--engine", "ray", "--workers", "2"]


def of_session(process: subprocess.Popen[str]) -> set[int]:
    """The process, its children and theirs, however they were started: all that came of it."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> set[str]:
    """Addresses, in /proc's hexadecimal, on which any of the processes listens."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(str(link.readlink()))
            except OSError:
                continue
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def gone(pids: set[int]) -> bool:
    """Whether none runs any more; who adopts the dead may be slow to bury them."""
    try:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        return all(path.read_text().rpartition(")")[2].split()[0] == "Z" for path in states if path.exists())
    except OSError:  # one ended meanwhile
        return False


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_another_engine_goes_on(place: Path) -> None:
    process = start("out", *LOCAL)
    until(lambda: blocks("out") or process.poll() is not None)
    family = of_session(process)
    # Ray executes code for whoever reaches its ports.
    assert listening(family) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert listening(family)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted; what was finished is kept, add --resume to go on" in err
    assert blocks("out") > 0
    until(lambda: gone(family))
    kept = {path: path.stat().st_mtime_ns for path in Path("out/steps").glob("*.scores.parquet")}
    assert main([*SLOW, "--output", "embedded"]) == 0
    finished = start("out", "--resume")
    until(lambda: blocks("out") > len(kept) or finished.poll() is not None)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path.exists())
    said, err = finished.communicate(timeout=DEADLINE)
    assert finished.returncode == 0, said + err
    assert_same("embedded", "out")


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_running_and_is_resumed_by_either_engine(place: Path) -> None:
    embedded = start("out")
    until(lambda: blocks("out") > 2 or embedded.poll() is not None)
    embedded.kill()
    embedded.communicate()
    early = blocks("out")
    spread = start("out", "--resume", *LOCAL)
    until(lambda: blocks("out") > early or spread.poll() is not None)
    family = of_session(spread)
    spread.kill()
    spread.communicate()
    until(lambda: gone(family))
    again = start("out", "--resume", *LOCAL)
    out, err = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, out + err
    assert main([*SLOW, "--output", "embedded"]) == 0
    assert_same("embedded", "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "2"], "--workers goes with --engine ray"),
        (["--address", "auto"], "--address goes with --engine ray"),
        (["--engine", "ray", "--workers", "0"], "--workers must be from 1 to 10^5, not 0"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "no Ray at 127.0.0.1:1"),
    ],
)
def test_flags_that_make_no_sense_are_one_line_and_touch_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main([*QUICK, "--output", "out", *flags]) == 2
    assert words in capsys.readouterr().err
    assert not Path("out").exists()
