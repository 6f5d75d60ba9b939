"""How many network evaluations fit into memory at once, how many run fastest, and what is done when it was too many."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

SHARE = 0.5
"""Of the memory that is free, how much the activations of one micro-batch may take."""
CANDIDATES = {"cpu": (4, 8, 16, 32, 64), "cuda": (16, 32, 64, 128, 256)}
"""Tried in this order until one is no faster: photographs take 4 to 16 at a time, 28x28 digits more."""
GAIN = 0.03
"""A larger micro-batch must be faster than a smaller one by this much."""
PATIENCE = 3.0
"""Seconds after which no larger micro-batch is tried: a short run should not wait for what it hardly gains by."""

T = TypeVar("T")


MALLOC = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26)}
"""Numbers of glibc's malloc.h, and what they are set to: one heap for all threads, from which nothing is given back."""


def hold() -> bool:
    """Let this process keep the memory that it frees: otherwise the system maps every large activation anew, by pages.

    Done by the commands, whose process is theirs, and never by `sanity.check`. Returns whether the C library is one
    that can be told: glibc.
    """
    try:
        told = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # All of them, whatever the first one answers.
    answers = [told(*pair) for pair in MALLOC.values()]
    return all(answers)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a processor or a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    # The last is what CUDA's libraries say of room for themselves.
    said = ("can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in text for words in said)


def tried(evaluate: Callable[[], T]) -> T | None:
    """`evaluate()`, or None if memory did not suffice.

    The error is dropped here, and with it the frames that hold what was allocated.
    """
    try:
        return evaluate()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def in_parts(evaluate: Callable[[slice], T], count: int, size: int) -> tuple[list[T], int]:
    """`evaluate` for slices of at most `size` of `count` things; size is halved whenever memory does not suffice.

    Returns the parts and the size that sufficed. Raises MemoryError when one thing alone is too much.
    """
    parts: list[T] = []
    start = 0
    while start < count:
        part = slice(start, min(start + size, count))
        found = tried(lambda part=part: evaluate(part))  # type: ignore[misc]
        if found is not None:
            parts.append(found)
            start = part.stop
        elif size == 1:
            raise MemoryError("there is not enough memory for a single evaluation of the network")
        else:
            size = max(1, min(size, count) // 2)
    return parts, size


def available(device: torch.device) -> int:
    """Bytes of memory that are free on a device; on a processor as Linux tells, 4 GiB where nothing tells."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        with open("/proc/meminfo") as lines:  # noqa: PTH123
            words = dict(line.split(":") for line in lines)
        return int(words["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 2**30


def bytes_of(evaluate: Callable[[Tensor], Tensor], example: Tensor) -> int:
    """Memory that the graph of `evaluate(example)` keeps for its backward pass; example (1, C, H, W)."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        evaluate(example.detach().requires_grad_())
    return max(1, sum(kept.values()))


def fastest(
    step: Callable[[int], object], candidates: Sequence[int], bytes_each: int, free: int, rounds: int = 2
) -> int:
    """The candidate whose step takes the least time an evaluation, of those that fit into memory.

    step(n) makes n evaluations at once; the first round only warms up. A candidate that is no faster than the one
    before, or runs out of memory, ends the search, as does PATIENCE. Returns at least 1: the smallest candidate halved,
    if not even that fits.
    """
    end = time.perf_counter() + PATIENCE
    fitting = [n for n in candidates if n * bytes_each <= free * SHARE]
    if not fitting:
        return max(1, int(free * SHARE / bytes_each))
    best, least = fitting[0], float("inf")
    for n in fitting:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            if tried(lambda n=n: (step(n), True)) is None:  # type: ignore[misc]
                return best
            times.append((time.perf_counter() - start) / n)
        if min(times) >= least * (1 - GAIN):
            return best
        best, least = n, min(times)
        if time.perf_counter() > end:
            break
    return best
