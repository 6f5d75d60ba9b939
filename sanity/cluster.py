"""The cluster that workers run on: reached or started by Ray, and shared out among them. Ray is imported here alone."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sanity.registry import first_line
from sanity.worker import Worker

KNOCK = 10.0
"""Seconds in which a cluster's address must answer."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster, and how it is shared out. Raises ValueError for numbers that make no sense.

    address: HOST:PORT, `auto` for the one on this machine, None to start one here, on loopback; workers: None for
    as many as the cluster holds at any time; gpus: of one worker, a part of one or several, None for one each
    where the cluster has some; device: auto, cpu or cuda.
    """

    address: str | None = None
    workers: int | None = None
    gpus: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.workers is not None and not 1 <= self.workers <= 10**5:
            raise ValueError(f"--workers must be from 1 to 10^5, not {self.workers}")
        if self.gpus is not None and not 0 <= self.gpus <= 64:
            raise ValueError(f"--gpus-per-worker must be from 0 to 64, not {self.gpus:g}")
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"--gpus-per-worker must be a part of one or a whole number, not {self.gpus:g}")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: what Ray may use of it."""

    cores: float
    gpus: float


def room(nodes: Sequence[Node], threads: int, gpus: float) -> int:
    """How many workers of so many threads and GPUs the nodes hold at once."""
    # Ray counts in ten thousandths; 1 / (1 / 3) must be 3.
    return sum(
        min(int(node.cores // threads), int(node.gpus / gpus + 1e-4) if gpus else int(node.cores)) for node in nodes
    )


def threads_of(nodes: Sequence[Node], workers: int | None, gpus: float) -> int:
    """Threads of a worker, at least 1: the cores divided among the workers, each whole on one machine.

    Without a number of workers there is one a core, as one thread is the most a core can give; with GPUs, one a
    GPU (or part of one), and the cores are divided among those.
    """
    if workers is None and not gpus:
        return 1
    wanted = workers if workers is not None else room(nodes, 1, gpus)
    most = max((int(node.cores) for node in nodes), default=1)
    return next((t for t in range(most, 1, -1) if room(nodes, t, gpus) >= wanted), 1)


@dataclass(frozen=True)
class Connection:
    """A cluster that was reached. ray: the module; gpus, threads: of each worker."""

    ray: Any
    cluster: Cluster
    gpus: float
    threads: int

    @property
    def device(self) -> str:
        """Where workers compute."""
        return "cuda" if self.gpus else "cpu"

    @property
    def wanted(self) -> int:
        """Workers to have now: those asked for, or as many as the nodes that are there hold."""
        return self.cluster.workers or room(nodes(self.ray), self.threads, self.gpus)

    def hire(self, *shared: Any) -> Any:
        """A new worker, on a node of its own as far as possible; it waits for one that has room."""
        settings = {
            "num_cpus": self.threads,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "scheduling_strategy": "SPREAD",
            # Before torch is loaded: threads that spin at barriers stall a machine that is full.
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}},
        }
        return self.ray.remote(RayWorker).options(**settings).remote(*shared)

    def alive(self, node: str) -> bool:
        """Whether a node, by its id, is still part of the cluster."""
        return any(one["NodeID"] == node and one["Alive"] for one in self.ray.nodes())


class RayWorker(Worker):
    """A worker as an actor of Ray."""

    def about(self) -> dict[str, str | int]:
        """What the driver must know of it, its node included."""
        import ray

        return {**super().about(), "node": ray.get_runtime_context().get_node_id()}


def nodes(ray: Any) -> list[Node]:
    """The machines that are there now."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(one.get("CPU", 0.0), one.get("GPU", 0.0)) for one in found]


@contextmanager
def reached(cluster: Cluster) -> Iterator[Connection]:
    """Connect, or start Ray here; leave it on the way out. Raises ImportError or ValueError in one line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray warns of what it will do about GPUs some day.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster.address is None:
        # Ray executes code for whoever reaches its ports; despite its name, this keeps them on loopback anywhere.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"--engine ray needs Ray ({first_line(error)}): pip install 'saliency-sanity[ray]'") from None
    if cluster.address is None and hasattr(ray, "_private"):
        # The same, where an explainer's module has imported Ray before.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    if cluster.address is not None and cluster.address != "auto":
        _knock(cluster.address)
    own = {"address": "local", "num_cpus": max(cores(), cluster.workers or 1), "include_dashboard": False}
    settings = own if cluster.address is None else {"address": cluster.address}
    try:
        ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"no Ray at {cluster.address}" if cluster.address else "Ray does not start here"
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    try:
        yield _shared_out(ray, cluster)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See that something listens there: Ray itself would try for many minutes. Raises ValueError in one line."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--address must be HOST:PORT or auto, not {address!r}")
    try:
        socket.create_connection((host, int(port)), KNOCK).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray at {address}: {error}") from None


def _shared_out(ray: Any, cluster: Cluster) -> Connection:
    found = nodes(ray)
    here = {node["NodeManagerAddress"] for node in ray.nodes()}
    if cluster.address is None and not all(address.startswith("127.") for address in here):
        raise ValueError(
            f"Ray would listen at {', '.join(here)}; start it yourself (ray start) and give --address auto"
        )
    seen = sum(node.gpus for node in found)
    gpus = cluster.gpus if cluster.gpus is not None else float(cluster.device != "cpu" and seen > 0)
    if cluster.device == "cpu" and gpus:
        raise ValueError(f"--device cpu and --gpus-per-worker {gpus:g} exclude one another")
    if cluster.device.startswith("cuda") and not gpus:
        raise ValueError(f"--device {cluster.device}: Ray sees {seen:g} GPU; use --device cpu")
    threads = threads_of(found, cluster.workers, gpus)
    if cluster.address is None and not room(found, threads, gpus):
        raise ValueError(f"--gpus-per-worker {gpus:g}: Ray sees {seen:g} GPU here")
    return Connection(ray, cluster, gpus, threads)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
