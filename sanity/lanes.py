"""Micro-batches side by side: one thread each on a processor, where many threads to one small layer only wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Barrier, Event
from typing import TypeVar

import torch

MOST = 8
"""More lanes than this give each more than one thread: every lane keeps activations of its own."""

T = TypeVar("T")
R = TypeVar("R")


class StoppedError(Exception):
    """Another lane failed, or the thread that waits for them all was interrupted."""


class Lanes:
    """`map` over a few things at once, each in a thread with its share of the processor's threads."""

    def __init__(self, count: int = 1) -> None:
        self.count = max(1, count)
        self._pool: ThreadPoolExecutor | None = None
        self._stopped = Event()

    def map(self, function: Callable[[T], R], things: Sequence[T]) -> list[R]:
        """`[function(thing) for thing in things]`; raises the first error, once all lanes have come to rest."""
        if self.count == 1 or len(things) == 1:
            return [function(thing) for thing in things]
        if self._pool is None:
            self._pool = _pool(self.count)
        waiting: list[Future[R]] = []
        try:
            # In here, too, the thread may be interrupted: what has begun must be told.
            waiting.extend(self._pool.submit(function, thing) for thing in things)
            done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
            for one in done:
                one.result()
        except BaseException:
            self._stopped.set()
            for one in waiting:
                one.cancel()
            wait(waiting)
            self._stopped.clear()
            raise
        return [one.result() for one in waiting]

    def check(self) -> None:
        """Raise StoppedError where there is no use in going on: to be called, in a lane, between its steps."""
        if self._stopped.is_set():
            raise StoppedError

    def close(self) -> None:
        """Let the threads go; what they are still at comes to rest first."""
        if self._pool is not None:
            self._stopped.set()
            self._pool.shutdown(cancel_futures=True)
            self._stopped.clear()
            self._pool = None


ALONE = Lanes()
"""One after the other, in the thread that asks."""


def _pool(count: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()

    def start() -> None:
        # Asked once, a thread no longer takes the number that holds for all when its first operation asks.
        torch.get_num_threads()
        torch.set_num_threads(max(1, threads // count))

    pool = ThreadPoolExecutor(count, "sanity-lane", start)
    # All are up before the last line: none may set its number afterwards.
    together = Barrier(count)
    for started in [pool.submit(together.wait) for _ in range(count)]:
        started.result()
    # What a thread sets holds for it alone and for threads yet to come: the caller's stays as it was.
    torch.set_num_threads(threads)
    return pool


def suited(device: torch.device | str, reentrant: bool) -> int:
    """Number of lanes for a network on a device; one where its forward pass might keep something in the network."""
    on_processor = torch.device(device).type == "cpu"
    return min(MOST, torch.get_num_threads()) if on_processor and reentrant else 1
