"""Flags from a plan's fields, and a plan from parsed flags."""

from __future__ import annotations

import difflib
from argparse import BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from sanity.plan import Plan, from_dict, presets


class HelpFormatter(DefaultHelpFormatter):
    """Help as it was written: paragraphs keep their lines, and a default stands where it tells something."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        more |= {"max_help_position": 28, "width": 110}
        super().__init__(*arguments, **more)  # type: ignore[no-untyped-call]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: Any) -> str:
        default = action.default
        if default in (None, False, "==SUPPRESS==", "auto") or not action.help or "default" in action.help:
            return action.help or ""
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {words})"


def add_fields(parser: Any, schema: type[Any], names: Sequence[str] | None = None) -> None:
    """One flag a field of a dataclass: its type, default, help and placeholder are the field's own."""
    for one in (one for one in fields(schema) if names is None or one.name in names):
        default: Any = one.default
        flag, words = f"--{one.name.replace('_', '-')}", one.metadata["help"]
        kind = str(one.type)
        if kind == "bool":
            parser.add_argument(flag, action=BooleanOptionalAction, default=default, help=words)
        elif kind.startswith("tuple"):
            of = int if "int" in kind else str
            parser.add_argument(
                flag, nargs="+", type=of, default=list(default), metavar=one.metadata.get("metavar", "NAME"), help=words
            )
        else:
            types: dict[str, Any] = {"str": str, "int": int, "int | None": int | None, "str | None": str | None}
            parser.add_argument(
                flag,
                type=types.get(kind, Any),
                default=default,
                metavar=one.metadata.get("metavar", "NAME"),
                help=words,
            )


def with_preset(arguments: Sequence[str], default: str | None) -> list[str]:
    """Put the preset's plan file first, so that a config file and flags win over it.

    The default preset is for a bare call: with a config file and no `--preset`, the file says all.
    """
    given, rest = default, list[str]()
    words = iter(arguments)
    for word in words:
        if word == "--preset":
            given = next(words, "")
        elif word.startswith("--preset="):
            given = word.removeprefix("--preset=")
        else:
            rest.append(word)
    if given is None or (given == default and any(word.split("=")[0] == "--config" for word in rest)):
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
