r"""Tables of stored runs as LaTeX: booktabs, one file a table, ready to \input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sanity.report.looks import CONTROLS, WORDS, ending, plural, safe
from sanity.report.runs import StoredRun, leaderboard, nearest_zero, ranked
from sanity.summary import UNORDERED

WIDEST = 8
SPECIAL = {c: f"\\{c}" for c in "#$%&_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
# marks hang over the gap between columns, so that the numbers stay aligned
MARKS = {"fail": r"\rlap{$^{\dagger}$}", "inconclusive": r"\rlap{$^{?}$}", "pass": ""}
LACKS = r"\rlap{$^{*}$}"
PLUS = r"mean $\pm$ half the width of its 95\,\% interval"
BOLD = "Bold: {}, the nearest to zero and those whose interval overlaps its own; controls (in italics) take no part{}."
DAGGERS = r"$\dagger$: fails the sanity check; $?$: inconclusive."
STAR = r"$*$: the mean leaves out maps without a score: {}."


def latex(runs: Sequence[StoredRun]) -> dict[str, str]:
    r"""File name -> LaTeX table. Needs \usepackage{booktabs}.

    `leaderboard_<order>_<similarity>`: methods x runs, final similarity and verdict;
    `stages_<run>_<order>_<similarity>`: stages x methods, at most 8 methods a table.
    """
    board = leaderboard(runs)
    tables = {}
    for (order, similarity), part in board.groupby(["order", "similarity"], sort=False):
        name = f"leaderboard_{safe(str(order))}_{safe(str(similarity))}"
        tables[name] = final(part, str(order), str(similarity), name)
    for run in runs:
        failing = board[board["run"] == run.label]
        for (order, similarity), part in run.summary.groupby(["order", "similarity"], sort=False):
            methods = list(part["method"].unique())
            pieces = [list(piece) for piece in np.array_split(methods, -(-len(methods) // WIDEST))]
            for number, piece in enumerate(pieces, 1):
                name = f"stages_{safe(run.label)}_{safe(str(order))}_{safe(str(similarity))}"
                name += f"_{number}" if len(pieces) > 1 else ""
                tables[name] = stages(part, piece, run, failing, name)
    return {f"{name}.tex": table for name, table in tables.items()}


def final(part: pd.DataFrame, order: str, similarity: str, name: str) -> str:
    """Methods x runs: final similarity, best and failing marked."""
    runs = list(part["run"].unique())
    cells = {(row.method, row.run): _marked(row) for row in part.itertuples()}
    frame = pd.DataFrame([[cells.get((m, run), "--") for run in runs] for m in ranked(part)])
    frame.index = pd.Index([_method(m) for m in ranked(part)])
    frame.columns = pd.Index([_broken(run, 18) for run in runs])
    words = [
        f"Similarity to the trained network's map ({_similarity(similarity)}) {escape(ending(order))}: {PLUS}.",
        BOLD.format("of those that pass", ""),
        DAGGERS,
    ]
    return styled(frame, "l" + "r" * len(runs), " ".join(words), name, wide=len(runs) > 3)


def _marked(row: Any) -> str:
    if np.isnan(row.score):
        return "n/a" + MARKS[row.verdict]
    return number(row.score, row.low, row.high, bool(row.best)) + MARKS[row.verdict]


def stages(part: pd.DataFrame, methods: Sequence[str], run: StoredRun, board: pd.DataFrame, name: str) -> str:
    """Stages x methods of one run, order and similarity: mean and interval, best of each stage bold."""
    order, similarity = str(part["order"].iloc[0]), str(part["similarity"].iloc[0])
    at_last = board[(board["order"] == order) & (board["similarity"] == similarity)]
    failing = {str(row.method): str(row.verdict) for row in at_last.itertuples()}
    rows = {str(stage): _row(cells, methods) for (_, stage), cells in part.groupby(["stage_index", "stage"])}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.Index([escape(stage) for stage in rows])
    frame.columns = pd.Index([_head(m, failing.get(m, "pass")) for m in methods])
    of = part[part["method"].isin(methods)].groupby("method", sort=False)[["n", "n_nan"]].sum()
    lacks = [f"{escape(str(m))} {row.n_nan} of {row.n + row.n_nan}" for m, row in of.iterrows() if row.n_nan]
    number = int((part["n"] + part["n_nan"]).max())
    words = [
        f"{escape(run.label)}, {escape(order)} randomization: similarity to the trained network's map "
        f"({_similarity(similarity)}), {PLUS}, of {plural(number, 'score')} (images and seeds) a cell.",
        BOLD.format("at each stage", ", nor do means of less than half the maps"),
        "" if order in UNORDERED else DAGGERS,
        STAR.format(", ".join(lacks)) if lacks else "",
    ]
    return styled(frame, "l" + "r" * len(methods), " ".join(filter(None, words)), name, wide=len(methods) > 3)


def _row(cells: pd.DataFrame, methods: Sequence[str]) -> list[str]:
    scored = (cells["stage_index"] > 0) & (cells["n"] > cells["n_nan"])
    free = cells[scored & ~cells["method"].isin(CONTROLS)]
    best = set(nearest_zero(free, "mean")["method"])
    found = {str(row.method): _cell(row, row.method in best) for row in cells.itertuples()}
    return [found.get(m, "--") for m in methods]


def _cell(row: Any, best: bool) -> str:
    if not row.n:
        return f"n/a{LACKS}"
    return number(row.mean, row.low, row.high, best) + (LACKS if row.n_nan else "")


def number(mean: float, low: float, high: float, bold: bool = False) -> str:
    r"""`$0.18{\scriptstyle\pm.07}$`; without an interval the mean alone."""
    text = rf"\mathbf{{{mean:z.2f}}}" if bold else f"{mean:z.2f}"
    half = "" if np.isnan(low) else rf"{{\scriptstyle\pm{f'{(high - low) / 2:.2f}'.removeprefix('0')}}}"
    return f"${text}{half}$"


def styled(frame: pd.DataFrame, columns: str, caption: str, name: str, *, wide: bool) -> str:
    """Cells that are LaTeX already -> a floating booktabs table with caption, label and small type."""
    style = frame.style.set_table_styles(
        [
            {"selector": "vspace", "props": ":{3pt};"},
            {"selector": "footnotesize", "props": ":;"},
            {"selector": "setlength", "props": f":{{\\tabcolsep}}{{{3 if wide else 6}pt}};"},
        ]
    )
    text: str = style.to_latex(
        column_format=f"@{{}}{columns}@{{}}",
        hrules=True,
        caption=caption,
        label=f"tab:{label(name)}",
        environment="table*" if wide else "table",
        position="t",
        position_float="centering",
    )
    return f"% needs \\usepackage{{booktabs}}\n{text}"


def label(name: str) -> str:
    r"""Text that may stand in \label."""
    return re.sub(r"[^A-Za-z0-9:.-]+", "-", name).strip("-")


def escape(text: str) -> str:
    """Plain text -> LaTeX."""
    return "".join(SPECIAL.get(c, c) for c in text)


def _similarity(name: str) -> str:
    return escape(WORDS.get(name, name).rstrip(","))


def _method(name: str) -> str:
    return rf"\emph{{{escape(name)}}}" if name in CONTROLS else escape(name)


def _head(method: str, verdict: str) -> str:
    """Name of a method over a narrow column: broken at its underscores, marked if it fails."""
    mark = "" if method in CONTROLS else MARKS[verdict]
    return _broken(method, 10, mark, italic=method in CONTROLS)


def _broken(name: str, width: int, mark: str = "", *, italic: bool = False) -> str:
    lines = [""]
    for piece in re.findall(r"[^_ :/.]+[_ :/.]?|[_ :/.]", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    found = [rf"\emph{{{escape(line)}}}" if italic else escape(line) for line in lines]
    return r"{\scriptsize\shortstack[r]{" + r" \\ ".join(found) + mark + "}}"
