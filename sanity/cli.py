"""What the command line needs beside a plan: flags from its fields, one-line errors, progress, the manifest."""

from __future__ import annotations

import difflib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

import sanity
from sanity.plan import Plan, from_dict, presets

INTERRUPTED = 130


def add_fields(parser: ArgumentParser, schema: type[Any]) -> None:
    """One flag a field of a dataclass: its type, default and help are the field's own."""
    for one in fields(schema):
        default: Any = one.default
        flag, words = f"--{one.name.replace('_', '-')}", one.metadata["help"]
        kind = str(one.type)
        if kind == "bool":
            parser.add_argument(flag, action="store_true", help=words)
        elif kind.startswith("tuple"):
            of = int if "int" in kind else str
            parser.add_argument(flag, nargs="+", type=of, default=list(default), metavar="X", help=words)
        else:
            types: dict[str, Any] = {"str": str, "int": int, "int | None": int | None}
            parser.add_argument(flag, type=types.get(kind, Any), default=default, metavar="X", help=words)


def with_preset(arguments: Sequence[str], default: str | None) -> list[str]:
    """Put the preset's plan file first, so that a config file and flags win over it."""
    given, rest = default, []
    words = iter(arguments)
    for word in words:
        if word == "--preset":
            given = next(words, "")
        elif word.startswith("--preset="):
            given = word.removeprefix("--preset=")
        else:
            rest.append(word)
    if given is None:
        return rest
    from sanity.plan import preset

    preset(given)
    return ["--config", str(presets()[given]), *rest]


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse, turning every complaint into a one-line ValueError that names the nearest flag."""
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        words = " ".join(str(error).split())
        flags = [f for action in parser._actions for f in action.option_strings]
        wrong = next((w for w in words.replace(",", " ").split() if w.startswith("--") and w not in flags), "")
        near = difflib.get_close_matches(wrong.split("=")[0], flags, n=1) if wrong else []
        raise ValueError(words + (f" (did you mean {near[0]}?)" if near else "")) from None


def plan_of(values: Namespace) -> Plan:
    """Build the plan from parsed flags; `a,b` reads as two names wherever several may stand."""
    found = {f.name: values[f.name] for f in fields(Plan)}
    for key in ("methods", "orders", "similarities"):
        found[key] = [name for word in found[key] for name in _names(word)]
    if isinstance(found["stages"], str):
        names = found["stages"].split(",")
        found["stages"] = (
            int(names[0]) if names[0].isdecimal() and len(names) == 1 else names if len(names) > 1 else names[0]
        )
    return from_dict(found)


def _names(word: str) -> list[str]:
    return [word] if "=" in word else [name for name in word.split(",") if name]


def guarded_main(program: str, command: Callable[[], int]) -> int:
    """Run a command: what the user must mend is one line and exit code 2, Ctrl-C is exit code 130."""
    try:
        return command()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; what was finished is kept, add --resume to go on", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
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
    """When something started and how long it took."""

    def __init__(self) -> None:
        self.start, self.began = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")

    def stamp(self) -> Mapping[str, Any]:
        """Start (UTC) and seconds since."""
        return {"started": self.began, "seconds": round(time.perf_counter() - self.start, 1)}
