"""Deletion evaluations against what can be worked out by hand, and `python -m sanity.deletion` as one meets it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.testing import assert_close

from sanity import images as image_sets
from sanity.adversarial import EPSILON, attack, attacked, recovery, value_range
from sanity.attributions import Inputs
from sanity.deletion import MeasuresFolder, main
from sanity.evaluation import Part, Settings, Task, evaluate, pointing
from sanity.models import Preprocessing, of_network
from sanity.plan import Plan
from sanity.pointing import hit, read_boxes, through
from sanity.report.deletions import summarize, wilson
from sanity.suppression import (
    ALPHAS,
    Scene,
    Values,
    curves,
    minimality,
    representativeness,
    saliency,
    tight_boxes,
)
from tests.conftest import seeded

SIDE, ROWS, COLUMNS, GAIN = 40, slice(10, 20), slice(12, 24), 6.0
ADDED = (slice(26, 34), slice(26, 36))
AREA = 10 * 12


class Region(nn.Module):
    """Logits: GAIN times the mean of one region, and 0."""

    def forward(self, x: Tensor) -> Tensor:
        seen = GAIN * x[:, :, ROWS, COLUMNS].mean((1, 2, 3))
        return torch.stack([seen, torch.zeros_like(seen)], 1)


class Two(nn.Module):
    """Logits: the mean of the region, and twice the mean of ADDED, 8 x 10, which is 5 % of the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, :, ROWS, COLUMNS].mean((1, 2, 3)), 2 * x[:, :, ADDED[0], ADDED[1]].mean((1, 2, 3))], 1)


def on(rows: slice, columns: slice, n: int = 1) -> Tensor:
    """1 on a region, 0 elsewhere: (N, 3, 40, 40)."""
    pixels = torch.zeros(n, 3, SIDE, SIDE, dtype=torch.float64)
    pixels[:, :, rows, columns] = 1
    return pixels


def scene_of(network: nn.Module, pixels: Tensor, radius: float = 10.0, batch_size: int = 8) -> Scene:
    logits = network(pixels)
    ids = tuple(f"image {i}" for i in range(len(pixels)))
    return Scene(network, Inputs(pixels, logits.argmax(1), ids, 3), logits, radius, batch_size)


def by_level(found: list[Values], evaluation: str) -> dict[float, Values]:
    return {one.level: one for one in found if one.evaluation == evaluation}


def test_the_smallest_box_is_the_region_that_the_network_looks_at() -> None:
    scene = scene_of(Region(), on(ROWS, COLUMNS))
    found = list(minimality(scene, saliency(on(ROWS, COLUMNS), scene.inputs)))
    assert [(one.level, one.values.tolist(), one.status) for one in found] == [
        (level, [AREA], ("ok",)) for level in (0.80, 0.90, 0.95, 0.99)
    ]


def test_levels_that_no_box_reaches_are_said_not_dropped() -> None:
    scene = scene_of(Region(), on(ROWS, COLUMNS, 2))
    maps = on(slice(0, 10), slice(12, 24), 2)
    maps[1] = 0
    # The upper half of the region: half of the logit goes, which is far from 99 % of the probability's fall.
    maps[0, :, 10:15] = 1
    for one in minimality(scene, saliency(maps, scene.inputs)):
        assert one.status == ("unreached", "constant map")
        assert one.values.isnan().all()
    rows = [
        ("a", "m", "minimality", 0.8, "blur", math.nan, "unreached"),
        ("b", "m", "minimality", 0.8, "blur", 5.0, "ok"),
    ]
    table = summarize(pd.DataFrame(rows, columns=["image", "method", "evaluation", "level", "null", "value", "status"]))
    assert table.iloc[0][["mean", "n", "n_unscored", "unscored"]].tolist() == [5.0, 1, 1, "1 unreached"]


def test_no_suppression_is_claimed_where_the_null_keeps_the_class() -> None:
    scene = scene_of(Region(), torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64))
    assert {one.status for one in minimality(scene, saliency(on(ROWS, COLUMNS), scene.inputs))} == {("no contrast",)}


def test_boxes_are_tight() -> None:
    above = torch.zeros(3, 9, 7, dtype=torch.bool)
    above[0, 2, 5] = above[0, 6, 1] = above[1, 8, 6] = True
    filled, area = tight_boxes(above)
    assert area.tolist() == [5 * 5, 1, 0]
    want = torch.zeros(9, 7, dtype=torch.bool)
    want[2:7, 1:6] = True
    assert torch.equal(filled[0], want)
    assert torch.equal(filled[1], above[1])


def test_curves_and_their_areas_by_hand() -> None:
    scene = scene_of(Region(), on(ROWS, COLUMNS))
    nulls = {"deletion": "zero", "insertion": "zero"}
    found = list(curves(scene, saliency(on(ROWS, COLUMNS), scene.inputs), nulls, 40))
    gone = np.minimum(np.arange(41) * 40, AREA) / AREA
    want = {"deletion": 1 / (1 + np.exp(-GAIN * (1 - gone))), "insertion": 1 / (1 + np.exp(-GAIN * gone))}
    for name, curve in want.items():
        got = by_level(found, name)
        assert list(got) == [i / 40 for i in range(41)]
        np.testing.assert_allclose([one.values.item() for one in got.values()], curve, rtol=0, atol=1e-14)
        area = next(one for one in found if one.evaluation == f"{name}_area")
        assert area.values.item() == pytest.approx(((curve[1:] + curve[:-1]) / 2).mean(), abs=1e-14)
        assert math.isnan(area.level)


def test_representativeness_equals_a_slow_definition() -> None:
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    pixels += 0.3 * on(ROWS, COLUMNS, 2)
    scene = scene_of(Region(), pixels, radius=2.0)
    mask = on(slice(8, 21), slice(11, 25), 2)[:, :1] * pixels.mean(1, keepdim=True)
    found = list(representativeness(scene, saliency(mask, scene.inputs), ("blur", "constant", "zero")))

    def probability(picture: np.ndarray) -> float:
        return 1 / (1 + math.exp(-GAIN * picture[:, ROWS, COLUMNS].mean()))

    for n in range(2):
        x, m = pixels[n].numpy(), mask[n, 0].numpy()
        blurred = np.stack([gaussian_filter(plane, 2.0, mode="nearest") for plane in x])
        unit = (m - m.min()) / (m.max() - m.min())
        smooth = gaussian_filter(unit, 2.0, mode="nearest")
        kept = 1 - (smooth - smooth.min()) / (smooth.max() - smooth.min())
        low = {
            "representativeness": probability(x * (1 - unit) + blurred * unit),
            "representativeness_whole": probability(blurred),
        }
        nulls = {"blur": blurred, "constant": np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape), "zero": 0 * x}
        for one in found:
            score = probability(np.where(kept >= one.level, x, nulls[one.null]))
            want = (score - low[one.evaluation]) / (probability(x) - low[one.evaluation])
            assert one.values[n].item() == pytest.approx(want, abs=1e-9)
    assert len(found) == 2 * 3 * len(ALPHAS)
    assert all(one.values.tolist() == pytest.approx([1, 1]) for one in found if one.level == 0)


def test_attacks_step_by_epsilon_of_the_range_along_the_gradients_sign() -> None:
    weight = torch.randn(4, 3 * 5 * 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(75, 4, bias=False)).double()
    network[1].weight.data = weight
    preprocess = Preprocessing(5, 5, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (preprocess.mean, preprocess.std))
    black_white = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).round()
    pixels = (black_white - mean) / std
    logits = network(pixels).detach()
    for kind, label, sign in (("fgsm", logits.argmax(1), 1), ("least_likely", logits.argmin(1), -1)):
        got = attack(network, pixels, logits, kind, value_range(pixels, preprocess), 1)
        slope = (logits.softmax(1) - torch.eye(4, dtype=torch.float64)[label]) @ weight
        want = (black_white + sign * EPSILON * slope.view_as(pixels).sign()).clamp(0, 1)
        assert_close(got * std + mean, want, rtol=0, atol=1e-14)
    low, high = value_range(pixels, None)
    assert torch.equal(low[:, 0, 0, 0], pixels.flatten(1).amin(1))
    assert torch.equal(high[:, 0, 0, 0], pixels.flatten(1).amax(1))


def test_the_label_comes_back_only_where_the_map_finds_what_was_added() -> None:
    scene = scene_of(Two(), on(ROWS, COLUMNS, 3))
    pixels = on(ROWS, COLUMNS, 3) + on(*ADDED, 3)
    pixels[2] = on(ROWS, COLUMNS)[0]
    other = scene_of(Two(), pixels)
    assert other.inputs.targets.tolist() == [1, 1, 0]
    maps = torch.cat([on(*ADDED), on(slice(0, 8), slice(0, 10)), on(*ADDED)])
    clean = saliency(on(ROWS, COLUMNS, 3), scene.inputs)
    found = list(recovery(scene, clean, {"fgsm": other}, lambda s: saliency(maps, s.inputs)))
    five = by_level(found, "recovery_fgsm")[0.05]
    assert five.status == ("ok", "ok", "not fooled")
    assert five.values[:2].tolist() == [1, 0]
    kept = by_level(found, "recovery_none")[0.05]
    assert kept.values.tolist() == [1, 1, 1]


def test_an_attacked_picture_is_explained_for_the_class_it_is_taken_for() -> None:
    pixels = on(ROWS, COLUMNS) * 0.51 + on(*ADDED) * 0.25
    scene = scene_of(Two(), pixels)
    other = attacked(scene, "fgsm", Preprocessing(40, 40, (0.0,) * 3, (1.0,) * 3))
    assert (scene.inputs.targets.item(), other.inputs.targets.item()) == (0, 1)
    assert other.inputs.ids != scene.inputs.ids
    assert (other.inputs.pixels - pixels).abs().max().item() == pytest.approx(EPSILON)


# --- pointing


def test_hits_and_misses_by_hand() -> None:
    box = (10.0, 20.0, 30.0, 40.0)
    assert hit((10, 20), [box], 0)
    assert hit((29, 39), [box], 0)
    assert not hit((30, 39), [box], 0)
    assert hit((44, 30), [box], 15)
    assert not hit((45, 30), [box], 15)
    # 3, 4, 5: the centre (33.5, 44.5) is 3.5 and 4.5 from the corner
    assert hit((33, 44), [box], math.hypot(3.5, 4.5))
    assert not hit((33, 44), [box], 5.7)
    assert hit((0, 0), [box, (0.0, 0.0, 1.0, 1.0)], 0)


def test_the_peak_is_what_points_and_a_picture_without_a_box_is_said() -> None:
    maps = torch.zeros(4, 1, 40, 40, dtype=torch.float64)
    maps[:, 0, 30, 7] = 1
    maps[3] = 0
    inputs = Inputs(torch.zeros(4, 3, 40, 40), torch.zeros(4, dtype=torch.int64), ("a", "b", "c", "d"))
    boxes = [[(7.0, 30.0, 8.0, 31.0)], [(30.0, 7.0, 31.0, 8.0)], [], [(0.0, 0.0, 40.0, 40.0)]]
    (found,) = pointing(saliency(maps, inputs), boxes, 3)
    assert found.status == ("ok", "ok", "no box", "constant map")
    assert found.values[:2].tolist() == [1, 0]
    assert found.values[2:].isnan().all()


@pytest.mark.parametrize("size", [(100, 60), (61, 97), (30, 30), (200, 45)])
@pytest.mark.parametrize(
    "preprocess", [Preprocessing(48, 40), Preprocessing(32, 40), Preprocessing(48, 40, squash=True)]
)
def test_a_box_goes_where_its_pixels_go(size: tuple[int, int], preprocess: Preprocessing) -> None:
    """A white box, through the real preprocessing: the bright pixels' extent is the mapped box, to a pixel."""
    width, height = size
    box = (width * 0.4, height * 0.3, width * 0.62, height * 0.7)
    box = tuple(round(v) for v in box)
    picture = np.zeros((height, width, 3), np.uint8)
    picture[box[1] : box[3], box[0] : box[2]] = 255
    pixels = preprocess(Image.fromarray(picture))[0]
    low, high = (0 - preprocess.mean[0]) / preprocess.std[0], (1 - preprocess.mean[0]) / preprocess.std[0]
    bright = (pixels > (low + high) / 2).nonzero()
    want = [*bright.amin(0).flip(0).tolist(), *(bright.amax(0).flip(0) + 1).tolist()]
    np.testing.assert_allclose(through(preprocess, size, box), want, rtol=0, atol=1.0)


def test_boxes_by_hand_and_what_is_cropped_away() -> None:
    # 100 x 50 -> 80 x 40 -> the middle 20 of each: left 30, top 10
    cut = Preprocessing(40, 20)
    assert through(cut, (100, 50), (45, 20, 55, 30)) == pytest.approx((6, 6, 14, 14))
    assert through(cut, (100, 50), (0, 0, 50, 25)) == pytest.approx((0, 0, 10, 10))
    assert through(cut, (100, 50), (0, 0, 20, 50)) is None
    squashed = Preprocessing(40, 20, squash=True)
    assert through(squashed, (100, 50), (10, 10, 20, 20)) == pytest.approx((2, 4, 4, 8))


def test_boxes_are_read_from_json_and_voc(tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text('{"dog": [[1, 2, 3, 4], [5, 6, 7.5, 8]], "none": []}')
    assert read_boxes(tmp_path / "boxes.json") == {"dog": ((1, 2, 3, 4), (5, 6, 7.5, 8)), "none": ()}
    one = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></part>"
    (tmp_path / "cat.xml").write_text(f"<annotation><object><name>cat</name>{part}{one}</object></annotation>")
    # VOC counts from 1 and includes the last pixel; a person's head is no object
    assert read_boxes(tmp_path) == {"cat": ((0, 1, 10, 20),)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[1]", "must hold image -> boxes, not list"),
        ('{"a": [[1, 2, 3]]}', "is no box"),
        ('{"a": [[3, 2, 1, 4]]}', "image 'a': [3, 2, 1, 4] is no box"),
        ('{"a": [["1", 2, 3, 4]]}', "is no box"),
        ('{"a": 5}', "5 is no box"),
        ('{"a": [[0, 0, NaN, 1]]}', "is no box"),
    ],
)
def test_boxes_that_are_none_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ValueError, match="--boxes") as caught:
        read_boxes(tmp_path / "boxes.json")
    assert words in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        read_boxes(tmp_path / "gone.json")


# --- intervals


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 10)])
def test_shares_have_wilsons_interval(hits: int, n: int) -> None:
    want = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((want.low, want.high), abs=1e-12)


def test_a_constant_share_keeps_its_doubt() -> None:
    rows = [(str(i), "m", "pointing", math.nan, "", 1.0, "ok") for i in range(4)]
    table = summarize(pd.DataFrame(rows, columns=["image", "method", "evaluation", "level", "null", "value", "status"]))
    assert table["low"].item() < 0.6
    assert table["high"].item() == 1


# --- the verb


def factory() -> nn.Module:
    """Small network with a rectifier, seeded, on 20x20 pictures."""
    layers = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5)
    )
    network = seeded(layers).float()
    network.preprocess = Preprocessing(24, 20)
    return network


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    generator = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(generator.integers(0, 255, (24, 30, 3), dtype=np.uint8)).save(f"photos/photo{i}.png")
    Path("boxes.json").write_text('{"photo0": [[10, 5, 20, 15]], "photo1": [[0, 0, 1, 1]]}')
    return tmp_path


SMALL = ["--model", "tests.test_deletion:factory", "--images", "photos", "--radius", "3", "--curve-steps", "4"]


def go(*arguments: str) -> int:
    return main([*SMALL, *arguments])


def test_rows_table_figures_and_manifest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--methods", "gradient", "--nulls", "noise", "--boxes", "boxes.json", "--output", "out") == 0
    written = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())
    assert {"measures.parquet", "run.json", "summary.csv", "summary.md", "figures/curves.png"} <= set(written)
    rows = pd.read_parquet("out/measures.parquet")
    assert list(rows.columns) == ["image", "method", "evaluation", "level", "null", "value", "status"]
    assert list(rows["method"].unique()) == ["gradient", "edges", "random"]  # controls join the pointing game
    assert (rows["value"].isna() == (rows["status"] != "ok")).all()
    each = rows.groupby(["method", "image"]).size()
    assert (each == 2 * 1 * 20 + 4 + 2 * (5 + 1) + 3 * 3 + 1).all()
    pointed = rows[rows["evaluation"] == "pointing"].set_index(["method", "image"])["status"]
    assert pointed["gradient"].tolist() == ["ok", "no box", "no box"]  # photo1's corner is cropped away
    header = json.loads(Path("out/run.json").read_text())
    assert header["status"] == "complete"
    assert sum(header["counts"].values()) == len(rows)
    assert header["plan"]["radius"] == 3
    table = pd.read_csv("out/summary.csv")
    assert (table["n"] + table["n_unscored"] == 3).all()
    shown = capsys.readouterr().out
    assert "Smallest box" in shown
    assert "written to out/" in shown


def test_an_interrupted_run_resumes_to_the_same_rows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--methods", "gradient,edges,random", "--evaluations", "minimality,recovery"]
    assert go(*arguments, "--output", "whole") == 0
    keep = MeasuresFolder.keep

    def kept(self: MeasuresFolder, part: Part, found: list[object]) -> None:
        if part.method == 1:
            raise KeyboardInterrupt
        keep(self, part, found)

    monkeypatch.setattr(MeasuresFolder, "keep", kept)
    assert go(*arguments, "--output", "out") == 130
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert len(list(Path("out/steps").glob("*.parquet"))) == 1
    assert go(*arguments, "--output", "out") == 2
    assert go(*arguments, "--output", "out", "--resume") == 0
    pd.testing.assert_frame_equal(*(pd.read_parquet(f"{name}/measures.parquet") for name in ("whole", "out")))


def rows_of(pixels: Tensor, batch_size: int, *methods: str) -> pd.DataFrame:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 13, 4)))
    ids = [f"image {i}" for i in range(len(pixels))]
    plan = Plan(methods=methods, images="tensors", precision="float64", samples=3, mask_steps=2)
    pictures = image_sets.tensors(pixels, ids)
    task = Task(plan, Settings(radius=2, curve_steps=4), of_network(network), pictures, batch_size=batch_size)
    told: list[int] = []
    found = pd.DataFrame([row for _, part in evaluate(task, on_progress=told.append) for row in part])
    assert sum(told) == sum(task.cost(part) for part in task.parts())
    return found


def test_neither_batch_mates_nor_batch_size_matter() -> None:
    pixels = torch.rand(3, 3, 17, 15, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    methods = ("gradient", "smoothgrad", "edges", "random", "meaningful_perturbation")
    together, by_one = rows_of(pixels, 7, *methods), rows_of(pixels, 1, *methods)
    first = rows_of(pixels[:1], 7, *methods)
    assert set(together["status"]) >= {"ok"}
    pd.testing.assert_frame_equal(together, by_one, rtol=0, atol=1e-9)
    mine = together[together["image"] == "image 0"].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, first, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "gradiant"], "unknown method 'gradiant'; did you mean gradient"),
        (["--evaluations", "minimal"], "unknown evaluation 'minimal'; did you mean minimality"),
        (["--evaluations", "curves,curves"], "names something twice"),
        (["--nulls", "blurr"], "unknown null 'blurr'; did you mean blur"),
        (["--deletion-null", "black"], "unknown deletion-null 'black'"),
        (["--reduction", "sum"], "unknown reduction 'sum'"),
        (["--radius", "-1"], "--radius must be from 0"),
        (["--curve-steps", "0"], "--curve-steps must be from 1"),
        (["--seed", "-1"], "--seed must be"),
        (["--target", "repredicted"], "--target repredicted"),
        (["--target", "9"], "the network has 5 classes"),
        (["--boxes", "gone.json"], "no such file"),
        (["--boxes", "strange.json"], "names none of the 3 images"),
        (["--batch-size", "0"], "--batch-size must be"),
        (["--images", "nowhere"], "nowhere"),
        (["--radios", "3"], "did you mean --radius?"),
        (["--output", "photos"], "is not empty and holds no run"),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("strange.json").write_text('{"else": [[1, 2, 3, 4]]}')
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    assert main([*SMALL, "--output", "out", *arguments]) == 2
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sanity deletion: error: ")
    assert words in lines[0]


def test_the_folder_is_asked_for(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 2
    assert "output" in capsys.readouterr().err


def test_representativeness_over_levels_has_its_interval_over_images() -> None:
    rows = [
        (image, "gradient", "representativeness", level, "blur", value, "ok" if value is not None else "flat")
        for image, values in {"a": (0.2, 0.4), "b": (0.6, None), "c": (None, None)}.items()
        for level, value in zip((0.0, 0.5), values, strict=True)
    ]
    columns = ["image", "method", "evaluation", "level", "null", "value", "status"]
    table = summarize(pd.DataFrame(rows, columns=columns).astype({"value": float}))
    (over,) = table[table.evaluation == "representativeness_over_levels"].itertuples()
    assert over.mean == pytest.approx((0.3 + 0.6) / 2)
    assert (over.n, over.n_unscored, over.unscored) == (2, 1, "1 flat")
    assert over.low <= over.mean <= over.high
    assert len(table) == 3
