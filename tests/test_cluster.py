"""How a cluster is shared out, and what is said where there is none; no Ray is started here."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sanity.cluster import Cluster, Node, reached, room, threads_of


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "threads"),
    [
        ([Node(16, 0)], None, 0, 1),
        ([Node(16, 0)], 4, 0, 4),
        ([Node(16, 0)], 5, 0, 3),
        # 32 cores in all, but ten threads fit once on each node only.
        ([Node(16, 0), Node(16, 0)], 3, 0, 8),
        ([Node(2, 0)], 4, 0, 1),
        ([Node(64, 8)], None, 1, 8),
        ([Node(64, 8)], None, 0.5, 4),
        ([Node(4, 8)], None, 1, 1),
        ([Node(8, 0), Node(64, 8)], None, 1, 8),
        ([], 2, 0, 1),
    ],
)
def test_cores_are_divided_among_the_workers(nodes: list[Node], workers: int | None, gpus: float, threads: int) -> None:
    assert threads_of(nodes, workers, gpus) == threads


def test_thirds_of_a_gpu_are_three() -> None:
    assert room([Node(16, 1)], 1, 1 / 3) == 3
    assert room([Node(16, 0)], 1, 1) == 0
    assert room([Node(3, 0), Node(5, 0)], 2, 0) == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"workers": 0}, "--workers must be from 1 to 10\\^5, not 0"),
        ({"gpus": -1.0}, "--gpus-per-worker must be from 0 to 64, not -1"),
        ({"gpus": 1.5}, "--gpus-per-worker must be a part of one or a whole number, not 1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Cluster(**values)


def test_without_ray_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"--engine ray needs Ray \(.*\): pip install 'saliency-sanity\[ray\]'"):
        reached(Cluster()).__enter__()


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "no Ray at 127.0.0.1:1: .*refused"), ("somewhere", "--address must be HOST:PORT or auto")],
)
def test_an_address_that_does_not_answer_is_one_line(address: str, words: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=words):
        reached(Cluster(address)).__enter__()


def test_the_embedded_engine_never_imports_ray() -> None:
    program = "import sys; sys.modules['ray'] = None; import sanity.session; sanity.session.listing()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
