"""pytest: `sanity_check(model, images, method=mine)` in a test, and gates against what a test found before.

    def test_mine(sanity_check):
        sanity_check(model, images, method=mine).assert_depends_on_parameters()

    pytest --sanity-baseline tests/baselines --sanity-update     stores what each such test finds
    pytest --sanity-baseline tests/baselines                     fails where that has changed

Loaded with every pytest session where the package is installed, so nothing heavy is imported until a test asks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from sanity.outcome import Outcome
    from sanity.stored import Run

CONTROL = "random"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the three options."""
    group = parser.getgroup("sanity", "sanity checks for saliency maps")
    group.addoption("--sanity-baseline", metavar="DIR", help="compare each sanity_check with the run stored in DIR")
    group.addoption("--sanity-update", action="store_true", help="store the runs in DIR instead of comparing")
    group.addoption(
        "--sanity-max-shift", metavar="X", type=float, help="largest mean shift that is none (default: 0.05)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse --sanity-update without a place to store."""
    if config.getoption("--sanity-update") and not config.getoption("--sanity-baseline"):
        raise pytest.UsageError("--sanity-update needs --sanity-baseline DIR")


@pytest.fixture
def sanity_check(request: pytest.FixtureRequest) -> Callable[..., Checked]:
    """`sanity_check(model, images, method=..., **choices)` runs `sanity.check` on one explainer.

    method: a name, a `Method` or a callable `(model, images, targets) -> (N, C or 1, H, W)`; choices: as
    `sanity.check` takes them, such as stages, labels, orders, seeds. With --sanity-baseline the test fails
    if the scores or the trained maps are not what the stored run of this test has.
    """
    option = request.config.getoption
    root, update = option("--sanity-baseline"), option("--sanity-update")
    calls = []

    def check(model: nn.Module, images: Tensor, *, method: Any, **choices: Any) -> Checked:
        __tracebackhide__ = True
        found = examine(model, images, method, choices)
        calls.append(found)
        if root:
            folder = folder_of(request.config.rootpath / root, request.node.nodeid, len(calls))
            _store(folder, found) if update else _compare(folder, found, option("--sanity-max-shift"))
        from sanity.parts import looked_at

        return Checked(looked_at(found.scores))

    return check


@dataclass(frozen=True)
class Checked:
    """What a check found. scores: one row an image, as `sanity.check` gives them, of the method and a control."""

    scores: pd.DataFrame

    @property
    def method(self) -> str:
        """Name of the explainer that was checked."""
        return str(self.scores["method"].iloc[0])

    def assert_depends_on_parameters(self, similarity: str = "spearman_abs") -> None:
        """Fail unless `sanity.verdicts` says pass, under every order of the check that has a verdict.

        The message holds the curve of the similarity, stage by stage, and names the first stage that
        moved the maps and the first that did not.
        """
        __tracebackhide__ = True
        from sanity.summary import verdicts

        found = verdicts(self.scores)
        own = found[(found["method"] == self.method) & (found["similarity"] == similarity)]
        if own.empty:
            known = ", ".join(found["similarity"].unique()) or "none: no order ends with all weights random"
            raise ValueError(f"no verdict by {similarity!r}; there are verdicts by {known}")
        failing = own[own["verdict"] != "pass"]
        if len(failing):
            raise AssertionError("\n\n".join(self._told(row) for row in failing.itertuples()))

    def _told(self, verdict: Any) -> str:
        words = {
            "fail": "does not depend on the parameters",
            "inconclusive": "is not shown to depend on the parameters",
        }
        head = f"{self.method} {words[verdict.verdict]} ({verdict.order}): {verdict.reason}"
        return f"{head}\n{self.curve(verdict.similarity, verdict.order)}"

    def curve(self, similarity: str = "spearman_abs", order: str = "cascading") -> str:
        """Similarity to the trained network's map at each stage, as text."""
        from sanity.summary import summarize

        rows, wanted = self.scores, (self.method, similarity, order)
        table = summarize(
            rows[(rows["method"] == wanted[0]) & (rows["similarity"] == wanted[1]) & (rows["order"] == wanted[2])]
        )
        width = max(7, *table["stage"].str.len())
        lines = [f"{similarity} to the trained network's maps, mean and 95 % interval:"]
        for row in table.to_dict("records"):
            bar = "#" * max(round(20 * row["mean"]), 0) if row["n"] else ""
            numbers = f"{row['mean']:5.2f} [{row['low']:5.2f}, {row['high']:5.2f}]"
            lines.append(f"  {row['stage']:<{width}} {numbers} {bar}".rstrip())
        return "\n".join([*lines, *_turning_points(table)])


def _turning_points(table: pd.DataFrame) -> list[str]:
    """Name the first stage that moved the maps at all, and the first that did not: mean below .95 or not."""
    from sanity.comparison import MAX_SHIFT

    stages = table[table["stage_index"] > 0]
    moved = stages["mean"] < 1 - MAX_SHIFT
    lines = []
    for words, part in (("moved the maps", stages[moved]), ("did not move them", stages[~moved])):
        first = f"{part.iloc[0]['stage']} ({part.iloc[0]['mean']:.2f})" if len(part) else "none"
        lines.append(f"first stage that {words}: {first}")
    return lines


def examine(model: nn.Module, images: Tensor, method: Any, choices: Mapping[str, Any]) -> Run:
    """Check one explainer beside the random control; also keep what a gate needs."""
    import pandas as pd

    from sanity import check, fingerprints, models
    from sanity import images as image_sets
    from sanity.plan import Plan
    from sanity.records import PROTOCOL_VERSION
    from sanity.stored import Run

    scores = check(model, images, methods=(method, CONTROL), **choices)
    labels = choices.get("labels")
    chosen: dict[str, Any] = {"target": "label"} if labels is not None else {}
    for name in choices.keys() - {"labels", "batch_size"}:
        chosen[name] = tuple(choices[name]) if isinstance(choices[name], list) else choices[name]
    plan = Plan(methods=(method, CONTROL), images="tensors", **chosen)
    classifier, pictures = models.of_network(model), image_sets.tensors(images.cpu(), labels=labels)
    device = str(next(model.parameters()).device)
    looks = fingerprints.fingerprints(
        plan, classifier, pictures, batch_size=choices.get("batch_size", 8), device=device
    )
    header = {
        "status": "complete",
        "protocol_version": PROTOCOL_VERSION,
        "plan": plan.as_dict(),
        "weights_sha256": classifier.weights_sha256,
        "images_sha256": pictures.digest,
        **{name: scores.attrs[name] for name in ("stages", "unchanged_parameters")},
    }
    unrelated = pd.DataFrame(scores.attrs.get("unrelated", []))
    return Run(Path("this test"), header, scores, pd.DataFrame(looks), unrelated if len(unrelated) else None)


def folder_of(root: Path, node: str, call: int) -> Path:
    """Where the runs of one test are kept: a name to read, a hash to tell tests apart, the call's number."""
    words = re.sub(r"[^A-Za-z0-9_.]+", "-", node)[-80:].strip("-.")
    digest = hashlib.sha256(node.encode()).hexdigest()[:8]
    return root / (f"{words}-{digest}" + (f"-{call}" if call > 1 else ""))


def _store(folder: Path, run: Run) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sanity import fingerprints
    from sanity.parts import looked_at
    from sanity.records import Score, schema, write_json

    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("scores", looked_at(run.scores)), ("unrelated", run.unrelated)):
        if rows is not None:
            plain = pa.table({field: rows[field] for field in Score._fields}, schema(Score))
            pq.write_table(plain, folder / f"{name}.parquet")
    if run.fingerprints is not None:
        fingerprints.write(folder / fingerprints.FILE, run.fingerprints.itertuples(index=False))
    write_json(folder / "run.json", run.header)


def _compare(folder: Path, run: Run, max_shift: float | None) -> None:
    __tracebackhide__ = True
    from sanity.comparison import MAX_SHIFT
    from sanity.gate import gate
    from sanity.stored import read

    if not folder.is_dir():
        pytest.fail(f"no stored run of this test in {folder}; store one with --sanity-update", pytrace=False)
    try:
        outcome = gate(read(folder), run, MAX_SHIFT if max_shift is None else max_shift)
    except ValueError as error:
        pytest.fail(f"{error}; or store anew with --sanity-update", pytrace=False)
    if outcome.exit_code:
        pytest.fail(_moved(outcome), pytrace=False)


def _moved(outcome: Outcome) -> str:
    """The gate's table, and the curves of what moved."""
    moved = [case for case in outcome.cases if case.verdict == outcome.verdict and case.details]
    return "\n\n".join([outcome.to_terminal(), *(f"{case.message}\n{case.details}" for case in moved[:4])])
