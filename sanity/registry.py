"""Looking things up by name: near-miss suggestions, and objects named `package.module:attribute`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


def suggest(kind: str, name: str, known: Iterable[str]) -> str:
    """One line for an unknown name: what was asked for, the nearest known names, or all of them."""
    names = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
    return f"unknown {kind} {name!r}; {hint}"


def load_object(path: str) -> Any:
    """Import `package.module:attribute`. Raises ValueError in one line when it cannot be had."""
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot load {path!r}: {error}") from None
    return found


def first_line(error: BaseException) -> str:
    """An error's first line, or its type's name where it has no words."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
