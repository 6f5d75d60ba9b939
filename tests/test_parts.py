"""Scores that are too many for one table: joined in parts, and read a part at a time to the same end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from sanity import gate, joining, parts, summary
from sanity.records import Score, read_scores, to_table
from sanity.report.runs import read_all
from sanity.report.tables import markdown
from tests.stored import IMAGES, METHODS, STAGES, scores, store

ORDERS = ("cascading", "independent")
RANK = {"order": ORDERS, "method": METHODS, "similarity": ("ssim", "hog"), "image": IMAGES, "seed": (5, 0)}


def two_seeds(shift: float = 0.0) -> pd.DataFrame:
    rows = scores(orders=ORDERS)
    moved = rows["value"] + shift * (rows["stage_index"] > 0) * (rows["method"] == "gradient")
    return pd.concat([rows.assign(seed=5, value=moved), rows.assign(value=moved)], ignore_index=True)


def pieces(folder: Path, rows: pd.DataFrame) -> list[Path]:
    """The rows in files as workers send them, in no order."""
    folder.mkdir()
    shuffled = rows.sample(frac=1, random_state=0)
    paths = []
    for number, part in enumerate(np.array_split(np.arange(len(rows)), 7)):
        paths.append(folder / f"{number}.parquet")
        rows_of = shuffled.iloc[part].itertuples(index=False, name=None)
        pq.write_table(to_table(rows_of, Score), paths[-1])
    return paths


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The same run as one table and in parts, and another that moved, in parts."""
    monkeypatch.setattr(joining, "AT_ONCE", 50)
    found = {}
    for name, large, shift in (("whole", 10**9, 0), ("parts", 1, 0), ("moved", 1, 0.4), ("moved whole", 10**9, 0.4)):
        monkeypatch.setattr(joining, "LARGE", large)
        rows = two_seeds(shift)
        found[name] = store(tmp_path / name, orders=ORDERS, rows=rows)
        plan = json.loads((found[name] / "run.json").read_text())["plan"] | {"seeds": [5, 0]}
        counts = {"ok": int((rows["status"] == "ok").sum()), "constant map": int((rows["status"] != "ok").sum())}
        header = json.loads((found[name] / "run.json").read_text()) | {"plan": plan, "counts": counts}
        header["images"] = dict.fromkeys(IMAGES, "")
        (found[name] / "run.json").write_text(json.dumps(header))
        target = found[name] / "scores.parquet"
        assert joining.join(pieces(tmp_path / f"{name} pieces", rows), Score, RANK, target) == counts
        assert target.is_dir() == (large == 1)
    return found


def test_parts_hold_the_rows_of_one_table_in_its_order(runs: dict[str, Path]) -> None:
    pd.testing.assert_frame_equal(read_scores(runs["parts"]), read_scores(runs["whole"]))
    files = sorted((runs["parts"] / "scores.parquet").iterdir())
    assert len(files) == 2 * 2 * len(STAGES)
    assert not [path for path in runs["parts"].iterdir() if path.name.startswith(".")]


def test_a_part_has_all_seeds_of_its_order_and_stage(runs: dict[str, Path]) -> None:
    found = parts.scores(runs["parts"])
    assert isinstance(found, parts.Parts)
    assert sorted(found.files) == [(order, index) for order in ORDERS for index in range(len(STAGES))]
    for part in found:
        assert set(part["seed"]) == {5, 0}
        assert part.groupby(["order", "stage_index"]).ngroups == 1
    assert isinstance(parts.scores(runs["whole"]), pd.DataFrame)


def test_an_excerpt_has_all_rows_of_the_first_images(runs: dict[str, Path]) -> None:
    rows = parts.Parts(runs["parts"] / "scores.parquet").excerpt(2)
    assert list(rows["image"].unique()) == list(IMAGES[:2])
    assert len(rows) * 2 == len(read_scores(runs["whole"]))
    assert parts.images_in(rows) == len(IMAGES)


def test_summary_and_verdicts_are_the_same_to_the_last_bit(runs: dict[str, Path]) -> None:
    whole, divided = read_scores(runs["whole"]), parts.scores(runs["parts"])
    pd.testing.assert_frame_equal(summary.summarize(divided), summary.summarize(whole), check_exact=True)
    pd.testing.assert_frame_equal(summary.verdicts(divided), summary.verdicts(whole), check_exact=True)


def test_resampling_in_blocks_draws_what_one_block_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(3, 40))
    values[1, 5] = np.nan
    whole = summary.interval(values, np.random.default_rng(7))
    monkeypatch.setattr(summary, "DRAWN", 130)
    np.testing.assert_allclose(summary.interval(values, np.random.default_rng(7)), whole, rtol=0, atol=1e-12)


def test_reports_are_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    told = []
    for name in ("whole", "parts"):
        shutil.move(runs[name], tmp_path / "run")
        told.append(markdown(read_all([tmp_path / "run"]), tmp_path, "python"))
        shutil.move(tmp_path / "run", runs[name])
    assert told[0] == told[1]
    assert "constant map" in told[0]


@pytest.mark.parametrize("current", ["moved", "parts"])
def test_the_gate_finds_the_same_in_parts(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], current: str
) -> None:
    other = {"moved": "moved whole", "parts": "whole"}[current]
    codes, told = [], []
    for pair in ((runs["whole"], runs[other]), (runs["parts"], runs[current]), (runs["whole"], runs[current])):
        codes.append(gate.main([*map(str, pair), "--json"]))
        found = json.loads(capsys.readouterr().out)
        keyed = {(g["order"], g["stage"], g["method"], g["similarity"]): g for g in found["groups"]}
        told.append((keyed, sorted(one["text"] for one in found["findings"])))
    assert codes == ([1, 1, 1] if current == "moved" else [0, 0, 0])
    assert told[0] == told[1] == told[2]


def test_a_stage_that_one_run_lacks_is_found_in_parts(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    last = sorted((runs["parts"] / "scores.parquet").glob("*-0000-0003.parquet"))
    assert len(last) == 2
    for file in last:
        file.unlink()
    assert gate.main([str(runs["whole"]), str(runs["parts"])]) == 1
    assert "missing order cascading at stage 3: 80 cells" in capsys.readouterr().out


def test_an_empty_folder_is_one_line(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for file in (runs["parts"] / "scores.parquet").iterdir():
        file.unlink()
    assert gate.main([str(runs["whole"]), str(runs["parts"])]) == 2
    assert "scores.parquet: a folder without a table" in capsys.readouterr().err
