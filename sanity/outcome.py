"""What a gate found, told four ways: for a terminal, as Markdown, as JUnit XML, as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from sanity.comparison import CHANGED, INCONCLUSIVE, SAME

SHOWN = 40
"""Rows of a table that a terminal or a summary gets; the rest is counted, and stands in JSON and JUnit."""


@dataclass(frozen=True)
class Case:
    """One thing that was judged: cells, a line's worth for a table; details, any number of lines."""

    suite: str
    name: str
    verdict: str
    cells: Sequence[str]
    details: str = ""

    @property
    def message(self) -> str:
        """One line."""
        return f"{self.name}: {', '.join(cell for cell in self.cells if cell)}"


@dataclass(frozen=True)
class Outcome:
    """All cases and what to make of them. columns name the cells; tolerant lets inconclusive pass."""

    title: str
    columns: Sequence[str]
    cases: Sequence[Case]
    tolerant: bool = False
    notes: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=lambda: {v: v for v in (SAME, CHANGED, INCONCLUSIVE)})

    @property
    def verdict(self) -> str:
        """The worst of the cases'."""
        found = {case.verdict for case in self.cases}
        return next((verdict for verdict in (CHANGED, INCONCLUSIVE) if verdict in found), SAME)

    @property
    def exit_code(self) -> int:
        """0 if the same, or inconclusive and that is tolerated; else 1."""
        return int(self.verdict == CHANGED or (self.verdict == INCONCLUSIVE and not self.tolerant))

    @property
    def headline(self) -> str:
        """Verdict and how many cases have which."""
        counts = Counter(case.verdict for case in self.cases)
        parts = [f"{counts[v]} {self.words[v]}" for v in (CHANGED, INCONCLUSIVE, SAME) if counts[v]]
        return f"{self.words[self.verdict].upper()}: {', '.join(parts)} of {len(self.cases)} ({self.title})"

    def _told(self) -> tuple[list[list[str]], str]:
        """Rows of what is not the same, worst first, as far as they are shown; and what is said of the rest."""
        rest = [case for case in self.cases if case.verdict != SAME]
        rest.sort(key=lambda case: case.verdict != CHANGED)
        rows = [[case.suite, case.name, self.words[case.verdict], *case.cells] for case in rest[:SHOWN]]
        return rows, f"and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""

    def to_terminal(self) -> str:
        """Headline, a table of what is not the same, notes."""
        rows, more = self._told()
        table = [["", "", "verdict", *self.columns], *rows] if rows else []
        width = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, width, strict=True)).rstrip() for row in table]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.headline, *lines, *filter(None, [more]), *notes]) + "\n"

    def to_markdown(self) -> str:
        """The same as a job summary."""
        rows, more = self._told()
        blocks = [f"### {_plain(self.headline)}"]
        if rows:
            table = [["run", "what", "verdict", *self.columns], ["---"] * (3 + len(self.columns)), *rows]
            blocks.append("\n".join("| " + " | ".join(_plain(cell) for cell in row) + " |" for row in table))
        blocks += filter(None, [more, "\n".join(f"- {_plain(note)}" for note in self.notes)])
        return "\n\n".join(blocks) + "\n"

    def to_junit(self) -> str:
        """JUnit XML: a suite a model and order, a case a method and similarity; failures hold the curve."""
        root = ElementTree.Element("testsuites", name="sanity gate")
        suites = {name: [case for case in self.cases if case.suite == name] for name in self._suites()}
        for name, cases in suites.items():
            failed = sum(self._fails(case) for case in cases)
            skipped = sum(case.verdict == INCONCLUSIVE for case in cases) if self.tolerant else 0
            counts = {"tests": str(len(cases)), "failures": str(failed), "skipped": str(skipped), "errors": "0"}
            suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(name), **counts})
            for case in cases:
                self._add_case(suite, case)
        ElementTree.indent(root)
        written: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        return written.decode() + "\n"

    def _suites(self) -> list[str]:
        return list(dict.fromkeys(case.suite for case in self.cases))

    def _fails(self, case: Case) -> bool:
        return case.verdict == CHANGED or (case.verdict == INCONCLUSIVE and not self.tolerant)

    def _add_case(self, suite: ElementTree.Element, case: Case) -> None:
        made = ElementTree.SubElement(suite, "testcase", classname=_xml(case.suite), name=_xml(case.name))
        if case.verdict != SAME:
            kind = {"type": self.words[case.verdict]} if self._fails(case) else {}
            tag = "failure" if self._fails(case) else "skipped"
            told = ElementTree.SubElement(made, tag, {"message": _xml(case.message), **kind})
            told.text = _xml(case.details) or None

    def to_json(self) -> str:
        """Everything, numbers that are not finite as null."""
        whole = {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "title": self.title,
            "notes": list(self.notes),
            **self.data,
        }
        return json.dumps(_finite(whole), indent=1, allow_nan=False) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    escaped = "".join(f"\\{c}" if c in "\\|*_`<>[]#" else c for c in text)
    return " ".join(escaped.split())


def _xml(text: str) -> str:
    """Leave out what XML cannot hold."""
    return "".join(c for c in text if c in "\t\n" or (c >= " " and not "\ud800" <= c <= "\udfff" and c < "\ufffe"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
