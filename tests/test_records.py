from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from sanity.folder import RunFolder
from sanity.records import (
    SCHEMA_VERSION,
    Key,
    Prediction,
    Score,
    Step,
    read_header,
    read_rows,
    to_table,
)

HEADER = {
    "status": "running",
    "plan": {"model": "m", "seeds": [0]},
    "protocol_version": "1",
    "weights_sha256": "w",
    "images_sha256": "i",
}
RANK = {"order": ["cascading", "independent"], "method": ["z", "a"], "image": ["two", "one"]}


def step_of(key: Key, images: tuple[str, ...] = ("one",), value: float = 0.5) -> Step:
    place = ("m", key.order, key.seed, key.stage_index, f"s{key.stage_index}")
    scores = [Score(*place, method, "ssim", image, 3, value, "ok") for image in images for method in "az"]
    said = [Prediction(*place, image, 1, "cat", 0.5, 3, 0.25, True) for image in images]
    panel = np.full((2, 2), key.stage_index, np.int8)
    maps = {f"{key.order}/{key.seed}/{key.stage_index}/a": np.full((len(images), 1, 2, 2), float(key.chunk))}
    panels = {(image, "a"): panel for image in images}
    return Step(key, place[4], scores, said, panels, maps, ("p",) if key.stage_index else ())


def test_rows_keep_types_and_nan(tmp_path: Path) -> None:
    row = Score("m", "cascading", 7, 2, "fc", "gradient", "hog", "one", 3, math.nan, "constant map")
    pq.write_table(to_table([row], Score), tmp_path / "scores.parquet")
    table = pq.read_table(tmp_path / "scores.parquet")
    assert [str(field.type) for field in table.schema] == [
        "string", "string", "int64", "int64", "string", "string", "string", "string", "int64", "double", "string"
    ]  # fmt: skip
    (read,) = read_rows(tmp_path / "scores.parquet").itertuples(index=False)
    assert read[:9] == row[:9]
    assert math.isnan(read.value)
    assert to_table([], Prediction).num_rows == 0


def test_newer_rows_are_refused_and_older_are_read(tmp_path: Path) -> None:
    table = to_table([], Score)
    pq.write_table(table.replace_schema_metadata({}), tmp_path / "old.parquet")
    assert read_rows(tmp_path / "old.parquet").empty
    pq.write_table(table.replace_schema_metadata({"sanity_schema": str(SCHEMA_VERSION + 1)}), tmp_path / "new.parquet")
    with pytest.raises(ValueError, match=r"new\.parquet has schema 2, newer than 1: update saliency-sanity"):
        read_rows(tmp_path / "new.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.parquet"):
        read_rows(tmp_path / "broken.parquet")


def test_finished_rows_stand_in_the_plans_order_whatever_order_they_came_in(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(HEADER, resume=False)
    keys = [Key(c, 0, o, i) for c in (1, 0) for o in ("independent", "cascading") for i in (1, 0)]
    for key in keys:
        folder.flush(step_of(key, ("one",) if key.chunk else ("two",)))
    assert folder.done() == frozenset(keys)
    header = folder.finish(HEADER, RANK)
    folder.tidy()
    rows = read_rows(folder.path / "scores.parquet")
    assert list(rows[["order", "stage_index", "method", "image"]].itertuples(index=False, name=None)) == [
        (order, i, method, image)
        for order in ("cascading", "independent")
        for i in (0, 1)
        for method in "za"
        for image in ("two", "one")
    ]
    assert header["counts"] == {"ok": 16}
    assert header["unchanged_parameters"] == {"0/cascading/1": ["p"], "0/independent/1": ["p"]}
    assert read_header(folder.path)["status"] == "complete"
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "maps.safetensors", "predictions.parquet", "run.json", "scores.parquet", "strips.npz", "unrelated.parquet"
    ]  # fmt: skip
    assert load_file(folder.path / "maps.safetensors")["cascading/0/1/a"][:, 0, 0, 0].tolist() == [0.0, 1.0]
    with np.load(folder.path / "strips.npz") as strips:
        assert strips["maps/independent/one/a"][:, 0, 0].tolist() == [0, 1]


def test_a_step_half_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(HEADER, resume=False)
    written: list[Path] = []

    def full(path: Path, contents: bytes) -> int:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        with path.open("wb") as file:
            return file.write(contents)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        folder.flush(step_of(Key(0, 0, "cascading", 1)))
    assert folder.done() == frozenset()
    assert not list(folder.steps.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": {"model": "other", "seeds": [0]}}, "another plan's results (differs in model)"),
        ({"plan": {"model": "m", "seeds": [0], "new": 1}}, "(differs in new)"),
        ({"weights_sha256": "v"}, "(differs in weights_sha256)"),
        ({"images_sha256": "j", "protocol_version": "2"}, "(differs in images_sha256, protocol_version)"),
    ],
)
def test_another_plans_folder_is_refused_with_what_differs(tmp_path: Path, change: dict, words: str) -> None:
    RunFolder(tmp_path / "run").open(HEADER, resume=False)
    for resume in (False, True):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            RunFolder(tmp_path / "run").open({**HEADER, **change}, resume)
        assert words in str(caught.value)


def test_the_same_plan_is_resumed_only_when_asked(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").open({**HEADER, "batch_size": 3}, resume=True)
    with pytest.raises(ValueError, match="already holds this plan's run; add --resume"):
        RunFolder(tmp_path / "run").open(HEADER, resume=False)
    assert RunFolder(tmp_path / "run").open({**HEADER, "batch_size": 9}, resume=True)["batch_size"] == 3


def test_a_folder_of_other_things_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        RunFolder(tmp_path).open(HEADER, resume=True)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        RunFolder(tmp_path / "thesis.tex").open(HEADER, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="holds no run"):
        read_header(tmp_path)
