"""Flags from a plan's fields, and a plan from parsed flags."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from sanity.plan import Plan, from_dict, presets


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
