"""What every command shares, without torch: one-line errors and exit codes, time, versions and machine."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sanity

INTERRUPTED = 130


def guarded_main(program: str, command: Callable[[], int], advice: str = "") -> int:
    """Run a command: what the user must mend is one line and exit code 2, Ctrl-C is exit code 130.

    advice: what to say beside "interrupted".
    """
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted{advice and f'; {advice}'}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError, MemoryError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{program}: error: {lines[0]}", file=sys.stderr)
        return 2


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for a manifest."""
    packages = ("torch", "torchvision", "captum", "numpy", "scipy", "scikit-image", "pandas", "pyarrow", "pillow")
    return {
        "saliency_sanity": sanity.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {cpu_name()}",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """Name of the processor, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


def commit() -> str | None:
    """Git commit of a source checkout, with `+changes` if it was edited; None for an installed package."""
    here = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", str(here)) else head


class Clock:
    """When something started, by what code, and how long it took."""

    def __init__(self) -> None:
        self.start, self.began = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        # What is asked at the end may be told of a commit made meanwhile.
        self.environment = environment()

    def stamp(self) -> Mapping[str, Any]:
        """Start (UTC) and seconds since."""
        return {"started": self.began, "seconds": round(time.perf_counter() - self.start, 1)}

    def manifest(self) -> Mapping[str, Any]:
        """`stamp`, and `environment` as it was at the start."""
        return {**self.environment, **self.stamp()}
