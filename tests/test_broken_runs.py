"""Folders that are nearly runs: gate and report say in one line what is wrong with them, and write nothing."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sanity import gate, report
from tests.stored import store


def header(**changes):
    def spoil(folder):
        known = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(known | changes))

    return spoil


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def column(change, name="scores.parquet"):
    """Rewrite a table as another program might: with types of its own choice."""

    def spoil(folder):
        pq.write_table(
            pa.Table.from_pandas(change(pd.read_parquet(folder / name)), preserve_index=False), folder / name
        )

    return spoil


def schema_version(version):
    def spoil(folder):
        path = folder / "scores.parquet"
        pq.write_table(pq.read_table(path).replace_schema_metadata({"sanity_schema": version}), path)

    return spoil


BROKEN = {
    "no header": (lambda folder: (folder / "run.json").unlink(), "holds no run: there is no run.json in it"),
    "header cut": (text("run.json", b'{"plan": '), "its run.json cannot be read: Expecting value"),
    "header of bytes": (text("run.json", b"\xff\xfe"), "its run.json cannot be read: 'utf-8' codec"),
    "header a list": (text("run.json", b"[1]"), "its run.json is no JSON object"),
    "plan a list": (header(plan=["model"]), "plan in its run.json is no JSON object"),
    "stages a list": (header(stages=["fc"]), "stages in its run.json is no JSON object"),
    "no scores": (lambda folder: (folder / "scores.parquet").unlink(), "scores.parquet: there is no such file"),
    "scores cut": (text("scores.parquet", b"PAR1"), "cannot read"),
    "column gone": (column(lambda rows: rows.drop(columns="target")), "lacks the columns ['target']"),
    "words for numbers": (column(lambda rows: rows.assign(value="high")), "column value: Failed to parse string"),
    "halves of stages": (column(lambda rows: rows.assign(stage_index=0.5)), "column stage_index: Float value 0.5"),
    "no rows": (column(lambda rows: rows.head(0)), ""),
    "newer": (schema_version("99"), "has schema 99, newer than 1: update saliency-sanity"),
    "no version": (schema_version("x"), "has schema 'x', which is no number"),
}


def refused(main, words, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert (said.err.count("\n"), said.out) == (1, "")
    return said.err


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_is_refused_in_one_line_by_gate_and_report(name, tmp_path, capsys):
    whole, broken = store(tmp_path / "whole"), store(tmp_path / "broken")
    spoil, words = BROKEN[name]
    spoil(broken)
    for runs in ([whole, broken], [broken, whole]):
        assert words in refused(gate.main, [*map(str, runs), "--junit", str(tmp_path / "gate.xml")], capsys)
    assert words in refused(gate.main, ["--verdicts", str(broken), "--expect", "gradient=pass"], capsys)
    if name not in ("no header", "no scores"):  # no runs at all to a report, which looks for some in a folder
        for format_ in ("html", "csv"):
            output = tmp_path / format_
            words_ = [str(broken), "--format", format_, "--output", str(output)]
            assert words in refused(report.main, words_, capsys)
            assert not output.exists()
    assert not (tmp_path / "gate.xml").exists()


def test_what_other_commands_leave_is_passed_over_by_a_report(tmp_path, capsys):
    """A deletion evaluation, say: its run.json stands beside other numbers than scores."""
    other = store(tmp_path / "results" / "deletion")
    (other / "scores.parquet").rename(other / "measures.parquet")
    words = ["--format", "csv", "--output", str(tmp_path / "csv")]
    assert "no run in" in refused(report.main, [str(other), *words], capsys)
    store(tmp_path / "results" / "run")
    assert report.main([str(tmp_path / "results"), *words]) == 0
    assert report.main([*map(str, (tmp_path / "results").iterdir()), *words]) == 0
    assert "deletion holds no run, passed over" in capsys.readouterr().err


def test_types_of_another_program_are_read_as_ours(tmp_path, capsys):
    whole, other = store(tmp_path / "whole"), store(tmp_path / "other")
    column(lambda rows: rows.astype({"method": "category", "stage_index": "int8", "value": "float32"}))(other)
    assert gate.main([str(whole), str(other)]) == 0
    assert capsys.readouterr().out.startswith("SAME")


def test_parts_of_a_header_may_be_null(tmp_path):
    whole, bare = store(tmp_path / "whole", stages=None, unchanged_parameters=None), store(tmp_path / "bare", plan=None)
    assert gate.main([str(whole), str(whole)]) == 0
    assert gate.main([str(bare), str(bare)]) == 0
    assert report.main([str(bare), "--output", str(tmp_path / "page.html")]) == 0


def test_scores_that_are_no_numbers_do_not_pass_for_the_same(tmp_path, capsys):
    whole, hollow = store(tmp_path / "whole"), store(tmp_path / "hollow")
    column(lambda rows: rows.assign(value=np.where(rows["stage"] == "fc", np.nan, rows["value"])))(hollow)
    assert gate.main([str(whole), str(hollow)]) == 1
    assert "ok became no value" in capsys.readouterr().out


@pytest.mark.parametrize("format_", ["html", "figure"])
def test_predictions_that_lack_a_column_are_refused(format_, tmp_path, capsys):
    folder = store(tmp_path / "run")
    column(lambda rows: rows.drop(columns="top1"), "predictions.parquet")(folder)
    assert report.main([str(folder), "--format", format_, "--output", str(tmp_path / "out")]) == 2
    assert "predictions.parquet lacks the columns ['top1']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("strips.npz", b"", "strips.npz holds no strips: No data left in file"),
        ("strips.npz", b"PK", "strips.npz holds no strips: "),
        ("predictions.parquet", b"", "cannot read"),
        ("unrelated.parquet", b"", "cannot read"),
    ],
)
def test_a_page_of_broken_parts_is_refused(name, content, words, tmp_path, capsys):
    folder = store(tmp_path / "run")
    (folder / name).write_bytes(content)
    assert words in refused(report.main, [str(folder), "--output", str(tmp_path / "page.html")], capsys)


@pytest.mark.parametrize("flag", ["--junit", "--markdown"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is(flag, tmp_path, capsys):
    folder = store(tmp_path / "run")
    other = {"--junit": "--markdown", "--markdown": "--junit"}[flag]
    for place, words in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "no" / "x", "cannot be written: no folder"),
    ):
        said = refused(gate.main, [*[str(folder)] * 2, flag, str(place), other, str(tmp_path / "out")], capsys)
        assert f"{flag} {place} {words}" in said
        assert not (tmp_path / "out").exists()
