"""Tables of stored runs as Markdown and CSV."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sanity.report.looks import SYMBOLS, named, plural
from sanity.report.manifest import RULE, citations, facts, notes, provenance, rerun
from sanity.report.runs import StoredRun, differences, gist, leaderboard, ranked
from sanity.summary import to_csv, to_markdown

TITLE = "Sanity checks of saliency maps"
LEAD = (
    "Does an explanation depend on the network it explains? The weights were replaced by random ones, stage by stage, "
    "and the maps compared with the trained network's (Adebayo et al. 2018)."
)
BEST = "Bold: of those that pass, the nearest to zero and those whose interval overlaps its own; controls take no part."
SCORE_WORDS = "Mean similarity to the trained network's map at full randomization, its 95 % interval and the verdict"


def markdown(runs: Sequence[StoredRun], base: Path, command: str) -> str:
    """All runs as one Markdown document: leaderboard, then each run. Links are relative to the folder `base`."""
    board = leaderboard(runs)
    blocks = [f"# {TITLE}", LEAD, f"<!-- Generated; do not edit. {command} -->", *_board(runs, board)]
    for run in runs:
        blocks += _run(run, board[board["run"] == run.label], base)
    blocks += ["## How to cite", f"```bibtex\n{citations(runs[-1].header)}\n```"]
    return "\n\n".join(blocks) + "\n"


def _board(runs: Sequence[StoredRun], board: pd.DataFrame) -> list[str]:
    blocks = ["## Leaderboard", f"{SCORE_WORDS}; methods that fail least stand first. {BEST} {RULE}"]
    if unlike := differences(runs):
        blocks.append(f"**Beware**: these runs differ in more than the network: {', '.join(map(escaped, unlike))}.")
    if board.empty:
        blocks.append("No run holds an order that ends in full randomization: there are no verdicts.")
    for (order, similarity), part in board.groupby(["order", "similarity"], sort=False):
        blocks += [f"### {order}, {similarity}", grid(part, "run")]
    return blocks


def grid(part: pd.DataFrame, column: str) -> str:
    """Rows methods, best first; columns what `column` holds; cells score and verdict."""
    cells = {(row.method, getattr(row, column)): _verdict(row) for row in part.itertuples()}
    names = list(part[column].unique())
    return pipes(["method", *names], ([named(m), *(cells.get((m, name), "-") for name in names)] for m in ranked(part)))


def _verdict(row: Any) -> str:
    mean = f"**{row.score:z.2f}**" if row.best else f"{row.score:z.2f}"
    return f"{'n/a' if np.isnan(row.score) else f'{mean} {between(row)}'} {SYMBOLS[row.verdict]} {row.verdict}"


def between(row: Any) -> str:
    """Interval in brackets."""
    return "[n/a]" if np.isnan(row.low) else f"[{row.low:z.2f}, {row.high:z.2f}]"


def _run(run: StoredRun, board: pd.DataFrame, base: Path) -> list[str]:
    blocks = [f"## {escaped(run.label)}", f"Folder: {_link(run.folder, base)}"]
    blocks += [f"**{gist(board)}**", *(f"- {escaped(note)}" for note in notes(run.header, run.scores))]
    blocks += [
        folded("What was run", pipes(["", ""], facts(run.header, run.scores) + provenance(run.header))),
        folded("Verdicts and reasons", reasons(board)) if len(board) else "",
        folded("Similarity at every stage", re.sub("(?m)^## ", "#### ", to_markdown(run.summary))),
        folded("Maps without a score", lacking(run.unscored)) if len(run.unscored) else "",
        folded("Figures", _figures(run.folder, base)) if (run.folder / "figures").is_dir() else "",
        folded("How to run it again", f"```sh\n{rerun(run.header)}\n```") if run.plan else "",
    ]
    return [block for block in blocks if block]


def folded(title: str, body: str) -> str:
    """Block that a reader opens."""
    return f"<details><summary>{title}</summary>\n\n{body.strip()}\n\n</details>"


def reasons(board: pd.DataFrame) -> str:
    """Verdicts with their reasons."""
    columns = ["order", "similarity", "method", "verdict", "reason"]
    lines = ([*line[:2], named(line[2]), *line[3:]] for line in board[columns].itertuples(index=False, name=None))
    return pipes(columns, lines)


def lacking(unscored: pd.DataFrame) -> str:
    """Maps without a score, counted by stage: rows of `runs.unscored`."""
    lines = (
        [order, named(method), stage, f"{count} of {plural(maps, 'map')}", status]
        for order, method, status, _, stage, count, maps in unscored.itertuples(index=False, name=None)
    )
    return pipes(["order", "method", "stage", "without a score", "why"], lines)


def _figures(folder: Path, base: Path) -> str:
    files = sorted((folder / "figures").glob("*.png"))
    links = [f"- {_link(file, base)}" for file in files if not file.name.startswith("curve")]
    return "\n".join([*(f"!{_link(file, base)}" for file in files if file.name.startswith("curve")), "", *links])


def _link(path: Path, base: Path) -> str:
    try:
        place = Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()
    except ValueError:  # another drive
        place = path.resolve().as_posix()
    return f"[{escaped(path.name)}](<{place}>)"


def pipes(head: Sequence[object], lines: Iterable[Sequence[object]]) -> str:
    """Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(escaped(cell) for cell in row) + " |" for row in rows)


def escaped(cell: object) -> str:
    """Text that neither ends a cell nor opens a tag."""
    return " ".join(str(cell).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def csv(runs: Sequence[StoredRun]) -> dict[str, str]:
    """File name -> CSV: similarity at every stage, and verdicts; all runs below one another."""
    stages = pd.concat([run.summary.assign(run=run.label) for run in runs], ignore_index=True)
    stages = stages[["run", *[name for name in stages if name != "run"]]]
    return {"stages.csv": to_csv(stages), "verdicts.csv": to_csv(leaderboard(runs))}
