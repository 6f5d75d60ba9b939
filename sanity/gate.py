"""Is it still the same explainer? Two stored runs compared, or a run's verdicts with what is expected of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, cast

import pandas as pd

from sanity import summary
from sanity.command import guarded_main
from sanity.comparison import (
    ALPHA,
    CHANGED,
    FEWEST_IMAGES,
    INCONCLUSIVE,
    MAX_SHIFT,
    SAME,
    Finding,
    compare,
    exact_methods,
    map_scores,
)
from sanity.outcome import Case, Outcome
from sanity.parts import Parts, seeds_in
from sanity.records import write_text
from sanity.registry import suggest
from sanity.stored import Run, admit, read

INTRODUCTION = """Is it still the same explainer? Compares two stored runs, or checks the verdicts of one.

  python -m sanity.gate BASELINE CURRENT
  python -m sanity.gate BASELINE CURRENT --allow weights,seeds --junit gate.xml --markdown "$GITHUB_STEP_SUMMARY"
  python -m sanity.gate --verdicts RUN --expect gradient=pass,guided_backprop=fail

Changed: a mean shift above --max-shift whose 95 % interval lies wholly beyond it, after Benjamini and Hochberg's
correction for all comparisons; cells that are missing, extra or newly without a score; stages made of other
parameters. The same: an interval wholly within --max-shift. Else inconclusive: more images or seeds would tell."""
CODES = "Exit code: 0 the same, 1 changed (or inconclusive, unless that may pass), 2 input that cannot be used."

COLUMNS = {
    "model": "model", "methods": "method", "orders": "order", "similarities": "similarity", "seeds": "seed",
    "stages": "stage", "granularity": "stage", "images": "image",
}  # fmt: skip
"""Where a difference that is allowed leaves cells without a partner."""
OTHER_MAPS = {"model", "weights", "images", "target", "precision"}
"""Differences after which the trained network's maps are others, whatever the explainer does."""
JUDGE = "spearman_abs"
"""Similarity that `METHOD=verdict` speaks of: what a reader sees of a map, where it is strong, without its sign."""


def gate(
    baseline: Run,
    current: Run,
    max_shift: float = MAX_SHIFT,
    allowed: Sequence[str] = (),
    tolerant: bool = False,
) -> Outcome:
    """Compare two runs: scores at every stage and, where both kept fingerprints, the trained network's maps.

    Scores and maps are two families, each corrected at half the level. Raises ValueError for runs of
    different experiments (see `admit`), for runs without a common cell, and unless 0 <= max_shift < 1.
    """
    if not 0 <= max_shift < 1:
        raise ValueError(f"--max-shift must be at least 0 and below 1, not {max_shift}")
    apart = admit(baseline, current, allowed)
    columns = {COLUMNS[name] for name in apart if name in COLUMNS}
    groups, findings = compare(baseline.scores, current.scores, max_shift, columns, alpha=ALPHA / 2)
    if OTHER_MAPS & set(apart):
        findings = [one for one in findings if one.kind != "class"]
    maps, unlike, notes = _maps(baseline, current, apart, max_shift)
    groups = pd.concat([groups, maps], ignore_index=True)
    findings += [*unlike, *_stages(baseline.header, current.header)]
    data = {
        "baseline": str(baseline.path),
        "current": str(current.path),
        "max_shift": max_shift,
        "groups": groups.to_dict("records"),
        "findings": [asdict(one) for one in findings],
    }
    cases = [*_findings(findings), *_curves(groups, max_shift)]
    notes = [*_differing(apart, baseline.scores, current.scores), *notes, *_rule(groups, max_shift)]
    title = f"{current.path} against {baseline.path}"
    return Outcome(title, ("largest shift", "at", "stages moved"), cases, tolerant, notes, data)


def _maps(
    baseline: Run, current: Run, apart: Mapping[str, str], max_shift: float
) -> tuple[pd.DataFrame | None, list[Finding], list[str]]:
    """Groups and findings of the trained network's maps, if these can be compared, or a note why not."""
    old, new = baseline.fingerprints, current.fingerprints
    if differing := [name for name in apart if name in OTHER_MAPS]:
        return None, [], [f"the trained network's maps are not compared: {differing[0]} differs"]
    if old is not None and new is None:
        return None, [Finding("missing", "missing fingerprints.parquet of the trained network's maps", len(old))], []
    if old is None or new is None:
        return None, [], [f"the trained network's maps are not compared: no fingerprints.parquet in {baseline.path}"]
    columns = {"method"} if "methods" in apart else set()
    # not so for scores: a random network turns rounding into something like chance
    exact = exact_methods(old, new)
    groups, findings = compare(*map_scores(old, new), max_shift, columns, exact, ALPHA / 2)
    return groups, [one for one in findings if one.kind != "class"], []


def _stages(baseline: Mapping[str, Any], current: Mapping[str, Any]) -> list[Finding]:
    """Parameters that a stage of both runs randomizes in one of them only, or that one left as they were."""
    found = []
    old, new = (header.get("stages") or {} for header in (baseline, current))
    for stage in (name for name in old if name in new):
        if changed := sorted(set(old[stage]) ^ set(new[stage])):
            found.append(
                Finding("stage", f"stage {stage} randomizes other parameters, such as {changed[0]}", len(changed))
            )
    kept = [{n for names in (h.get("unchanged_parameters") or {}).values() for n in names} for h in (baseline, current)]
    if fresh := sorted(kept[1] - kept[0]):
        found.append(
            Finding(
                "stage", f"{len(fresh)} parameters no longer change when randomized, such as {fresh[0]}", len(fresh)
            )
        )
    return found


def _differing(apart: Mapping[str, str], old: pd.DataFrame | Parts, new: pd.DataFrame | Parts) -> list[str]:
    """Notes on what was allowed to differ."""
    notes = [f"{name} may differ and does: {words}" for name, words in apart.items()]
    if "seeds" in apart:
        common = " ".join(map(str, sorted(seeds_in(old) & seeds_in(new))))
        alone = "no seed in common: images are paired, seeds are two samples"
        notes.append(f"only seeds {common} are compared" if common else alone)
    return notes


def _rule(groups: pd.DataFrame, max_shift: float) -> list[str]:
    """Notes on how the verdicts came about, and what would make them surer."""
    rule = (
        f"{len(groups)} groups of cells, {groups['n'].sum()} pairs; changed: a shift above {max_shift:g}, its 95 % "
        "interval beyond that, and Benjamini-Hochberg's q <= .025 within scores and within maps"
    )
    advice = "inconclusive: more images, or more seeds, would narrow the intervals"
    return [rule, advice] if (groups["verdict"] == INCONCLUSIVE).any() else [rule]


# --- what is told


def _findings(found: Sequence[Finding]) -> list[Case]:
    return [Case("cells", one.kind, CHANGED, ("", "", one.text)) for one in found]


def _curves(groups: pd.DataFrame, max_shift: float) -> list[Case]:
    """A case for each model, order, method and similarity: its stages in one."""
    cases = []
    for key, part in groups.groupby(["model", "order", "method", "similarity"], sort=False):
        model, order, method, similarity = cast(tuple[str, ...], key)
        part = part.sort_values("stage_index")
        verdict = next((v for v in (CHANGED, INCONCLUSIVE) if (part["verdict"] == v).any()), SAME)
        moved = part[part["verdict"] == verdict].to_dict("records")
        largest = max(moved, key=lambda group: abs(group["shift"]) if group["images"] > 0 else -1)
        count = f"{len(moved)} of {len(part)}, first {moved[0]['stage']}"
        if verdict == INCONCLUSIVE:
            count += f" ({_why(largest, max_shift)})"
        cells = (_shift(largest), str(largest["stage"]), count)
        details = "" if verdict == SAME else curve(part)
        cases.append(Case(f"{model}, {order}", f"{method}, {similarity}", verdict, cells, details))
    return cases


def _why(group: Mapping[Any, Any], max_shift: float) -> str:
    """Why a group is inconclusive."""
    if pd.isna(group["low"]) or group["images"] < FEWEST_IMAGES:
        return f"{group['images']:.0f} images: too few to tell, or a single seed a side"
    beyond = max(group["low"], -group["high"]) > max_shift
    return f"q {group['q']:.2f} after correction" if beyond else f"the interval reaches over {max_shift:g}"


def _shift(group: Mapping[Any, Any]) -> str:
    return f"{group['shift']:+.2f} [{group['low']:+.2f}, {group['high']:+.2f}]"


def curve(groups: pd.DataFrame) -> str:
    """The stages of one method and similarity as text: baseline, current, shift and verdict."""
    width = max(5, *groups["stage"].str.len())
    lines = [f"{'stage':<{width}}  baseline  current  shift [95 % interval]    verdict"]
    for row in groups.to_dict("records"):
        numbers = f"{row['baseline']:8.2f}  {row['current']:7.2f}  {_shift(row):<24}"
        lines.append(f"{row['stage']:<{width}}  {numbers} {row['verdict']}")
    return "\n".join(lines)


# --- verdicts


def expectations(text: str, methods: Collection[str], similarities: Collection[str]) -> dict[tuple[str, str], str]:
    """`METHOD=verdict,METHOD:SIMILARITY=verdict` -> (method, similarity) -> verdict.

    Without a similarity, spearman_abs is meant, or the run's only one. Raises ValueError for what the run lacks.
    """
    wanted = {}
    for part in text.split(","):
        name, equals, verdict = part.strip().rpartition("=")
        if not equals or verdict not in ("pass", "fail", "inconclusive"):
            raise ValueError(f"--expect: {part!r} must read METHOD=pass, METHOD=fail or METHOD=inconclusive")
        method, similarity = (name, "") if name in methods else name.rpartition(":")[::2]
        similarity = similarity or (next(iter(similarities)) if len(similarities) == 1 else JUDGE)
        if method not in methods:
            raise ValueError(f"--expect: {suggest('method', name, methods)}")
        if similarity not in similarities:
            raise ValueError(f"--expect: {suggest('similarity', similarity, similarities)}")
        wanted[method, similarity] = verdict
    return wanted


def expect(run: Run, text: str, tolerant: bool = False) -> Outcome:
    """Check a run's verdicts (`summary.verdicts`), under every order that has one, against what is expected."""
    found = summary.verdicts(run.scores, run.unrelated)
    if found.empty:
        raise ValueError(f"{run.path} has no verdict: no order in it ends with all weights random")
    wanted = expectations(text, list(found["method"].unique()), list(found["similarity"].unique()))
    cases = []
    for row in found.to_dict("records"):
        if right := wanted.get((row["method"], row["similarity"])):
            is_so = row["verdict"]
            verdict = SAME if is_so == right else INCONCLUSIVE if is_so == INCONCLUSIVE else CHANGED
            names = f"{row['model']}, {row['order']}", f"{row['method']}, {row['similarity']}"
            cases.append(Case(*names, verdict, (is_so, right, row["reason"]), row["reason"]))
    words = {SAME: "as expected", CHANGED: "not as expected", INCONCLUSIVE: "inconclusive"}
    data = {
        "run": str(run.path),
        "verdicts": found.to_dict("records"),
        "expected": {f"{m}:{s}": v for (m, s), v in wanted.items()},
    }
    return Outcome(f"verdicts of {run.path}", ("is", "expected", "reason"), cases, tolerant, (), data, words)


# --- the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise, so that a slip is one line like any other."""
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Flags of `python -m sanity.gate`."""
    made = _Parser(
        prog="sanity gate", description=INTRODUCTION, epilog=CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "runs", nargs="*", metavar="RUN", type=Path, help="folders of the baseline and of the current run"
    )
    made.add_argument(
        "--max-shift",
        type=float,
        default=MAX_SHIFT,
        metavar="X",
        help="largest mean shift that is none (default: %(default)s)",
    )
    made.add_argument(
        "--allow",
        default="",
        metavar="A,B",
        help="compare although these differ: weights, images, protocol, or keys of the plan",
    )
    made.add_argument(
        "--inconclusive",
        choices=("fail", "pass"),
        default="fail",
        help="what an inconclusive result means for the exit code (default: %(default)s)",
    )
    made.add_argument("--verdicts", type=Path, metavar="RUN", help="check one run's verdicts instead; needs --expect")
    made.add_argument(
        "--expect",
        metavar="M=V,...",
        help=f"METHOD=pass, fail or inconclusive, judged by {JUDGE}; METHOD:SIMILARITY=... by another",
    )
    made.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="append a job summary in Markdown")
    made.add_argument("--json", action="store_true", help="print JSON, every group's numbers, instead of the table")
    return made


def command(arguments: Sequence[str]) -> int:
    """Parse, compare, tell."""
    values = parser().parse_args(arguments)
    for flag, path in (("--junit", values.junit), ("--markdown", values.markdown)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            why = "is a folder; name a file" if path.is_dir() else f"cannot be written: no folder {path.parent}"
            raise ValueError(f"{flag} {path} {why}")
    found = _found(values)
    if values.junit:
        write_text(values.junit, found.to_junit())
    if values.markdown:
        with values.markdown.open("a", encoding="utf-8") as file:
            file.write(found.to_markdown())
    print(found.to_json() if values.json else found.to_terminal(), end="")
    return found.exit_code


def _found(values: argparse.Namespace) -> Outcome:
    tolerant = values.inconclusive == "pass"
    if values.verdicts:
        if values.runs or values.allow or not values.expect:
            raise ValueError("--verdicts RUN takes --expect METHOD=verdict,..., and neither another run nor --allow")
        return expect(read(values.verdicts), values.expect, tolerant)
    if len(values.runs) != 2 or values.expect:
        raise ValueError(f"give two runs, BASELINE and CURRENT, not {len(values.runs)}; or --verdicts RUN --expect ...")
    baseline, current = map(read, values.runs)
    allowed = [name for name in values.allow.split(",") if name]
    return gate(baseline, current, values.max_shift, allowed, tolerant)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m sanity.gate`: see `CODES`."""
    return guarded_main("sanity gate", lambda: command(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
