import json
import re

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from sanity.records import Prediction
from sanity.report import figures, publication
from sanity.report.curves import curve, plot
from sanity.report.figures import draw
from sanity.report.looks import COLOURS, CONTROLS, looks, safe
from sanity.report.publication import STYLE, WIDTHS, panels, publish, spread
from sanity.report.runs import read_all
from sanity.report.strips import CELL, GAP, Stored, strip
from sanity.summary import summarize
from tests.stored import scores, store

METHODS = (
    "gradient",
    "smoothgrad",
    "gradient_x_input",
    "guided_backprop",
    "integrated_gradients",
    "meaningful_perturbation",
    "edges",
    "random",
)
STAGES = [
    "trained",
    "fc",
    *(f"Mixed_{k}" for k in ["7c", "7b", "7a", "6e", "6d", "6c", "6b", "6a", "5d", "5c", "5b"]),
]
STAGES += ["Conv2d_4a_3x3", "Conv2d_3b_1x1", "Conv2d_2b_3x3", "Conv2d_2a_3x3", "Conv2d_1a_3x3"]
COLUMNS = [
    "model",
    "order",
    "seed",
    "stage_index",
    "stage",
    "method",
    "similarity",
    "image",
    "target",
    "value",
    "status",
]


def some_maps(methods=METHODS, stages=18, side=32):
    draws = np.random.default_rng(0)
    maps = {m: draws.integers(-127, 128, (stages, side, side), dtype=np.int8) for m in methods}
    return maps | ({"edges": np.abs(maps["edges"])} if "edges" in maps else {})


def some_rows(methods=METHODS, stages=STAGES, orders=("cascading",), similarities=("ssim",), images=("a", "b", "c")):
    draws = np.random.default_rng(1)
    return pd.DataFrame(
        [
            ("inception_v3", o, 0, i, stage, m, s, image, 3, draws.uniform(), "ok")
            for o in orders
            for i, stage in enumerate(stages)
            for m in methods
            for s in similarities
            for image in images
        ],
        columns=COLUMNS,
    )


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def texts_outside(figure):
    """Texts that reach over the edge of the sheet."""
    figure.canvas.draw()
    edge = figure.bbox
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    assert len(shown) > 5
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
    # ticks beyond an axis' limits exist as objects that are not drawn
    return [
        (name, b.extents.tolist())
        for name, b in boxes
        if b.x0 < edge.x0 or b.y0 < edge.y0 or b.x1 > edge.x1 or b.y1 > edge.y1
    ]


def overlaps(figure, texts):
    boxes = [t.get_window_extent() for t in figure.findobj(Text) if t.get_text() in texts and t.get_rotation() == 0]
    return [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


@pytest.mark.parametrize("pictured", [True, False])
def test_strip_of_eight_methods_and_nineteen_columns(pictured):
    picture = np.full((20, 20, 3), (10, 200, 30), np.uint8) if pictured else None
    figure = strip(some_maps(), STAGES, picture, title="inception_v3, cascading randomization")
    image = pixels(figure)
    width = 18 + pictured
    assert image.shape[1] >= width * (CELL + GAP)
    assert image.shape[0] >= 8 * (CELL + GAP)
    assert texts_outside(figure) == []
    assert overlaps(figure, set(METHODS)) == []
    assert (np.abs(image.astype(int) - (10, 200, 30)).max(2) <= 5).sum() >= pictured * 8 * (CELL - 4) ** 2


@pytest.mark.parametrize("title", ["", "short", "a very long title " * 12, "two\nlines", "a $dollar$ and_{braces}"])
@pytest.mark.parametrize("stages", [["trained", "logits"], ["trained", "a_stage_with_quite_a_long_name.of.a.layer"]])
def test_nothing_of_a_small_strip_is_cut_off(title, stages):
    figure = strip(some_maps(("gradient", "package.module:a_long_callable"), len(stages)), stages, title=title)
    assert texts_outside(figure) == []


def colour_of_cell(figure, row, column):
    """Median colour of a cell's inner part, found by the sheet's own geometry."""
    page_axes = figure.axes[0]
    frames = [p for p in page_axes.patches if p.get_width() == CELL]
    xs, ys = (
        sorted({round(v) for v in values}) for values in zip(*((p.get_x(), p.get_y()) for p in frames), strict=True)
    )
    x, y = xs[column], ys[row]
    return np.median(pixels(figure)[y + 4 : y + CELL - 4, x + 4 : x + CELL - 4].reshape(-1, 3), axis=0)


def half_and_half(value, side=16):
    """A map that is `value` but for a thin line, so that it is not constant."""
    flat = np.full((side, side), value, np.int8)
    flat[0] = value // 2 + 1
    return flat


def test_colours_white_at_zero_red_above_blue_below_grey_for_unsigned():
    signed = np.stack([half_and_half(127), half_and_half(-127), half_and_half(0)])
    unsigned = np.stack([half_and_half(127), half_and_half(0), half_and_half(64)])
    figure = strip({"signed": signed, "unsigned": unsigned}, ["trained", "a", "b"])
    red, blue, white = (colour_of_cell(figure, 0, k) for k in range(3))
    assert red[0] > 90 > red[2]
    assert blue[2] > 90 > blue[0]
    assert (white >= 240).all()
    black, paper, grey = (colour_of_cell(figure, 1, k) for k in range(3))
    assert (black <= 8).all()
    assert (paper == 255).all()
    assert np.ptp(grey) <= 8
    assert 60 < grey[0] < 200


def test_a_method_is_unsigned_only_if_no_stage_is_negative():
    stack = np.stack([half_and_half(127), half_and_half(-127)])
    figure = strip({"gradient": stack}, ["trained", "a"])
    assert colour_of_cell(figure, 0, 0)[0] > 90


@pytest.mark.parametrize(("value", "word"), [(-128, "n/a"), (0, "constant"), (127, "constant")])
def test_missing_and_constant_maps_are_hatched_and_named(value, word):
    maps = some_maps(("gradient", "edges"), 3)
    maps["edges"][1] = value
    figure = strip(maps, ["trained", "a", "b"])
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert len(hatched) == 1
    (mark,) = [t for t in figure.findobj(Text) if t.get_text() == word]
    assert hatched[0].get_window_extent().contains(*mark.get_window_extent().get_points().mean(0))
    # a missing map does not make a method signed: its other maps stay grey
    assert np.ptp(colour_of_cell(figure, 1, 2)) <= 8


def test_the_scale_rule_is_stated_and_each_kind_of_map_has_its_bar():
    figure = strip(some_maps(("gradient", "edges"), 3), ["trained", "a", "b"])
    said = " ".join(" ".join(t.get_text() for t in figure.findobj(Text)).split())
    assert "channels summed, divided by the 99th percentile of its absolute value, clipped to [-1, 1]" in said
    assert len(figure.axes) == 3
    assert len(strip(some_maps(("gradient",), 2), ["trained", "a"]).axes) == 2


def test_small_maps_keep_square_pixels():
    checker = (np.indices((8, 8)).sum(0) % 2 * 254 - 127).astype(np.int8)
    figure = strip({"gradient": np.stack([checker, checker])}, ["trained", "a"])
    frame = next(p for p in figure.axes[0].patches if p.get_width() == CELL)
    x, y = round(frame.get_x()), round(frame.get_y())
    line = pixels(figure)[y + 6, x + 2 : x + CELL - 2, 0].astype(int)
    assert (np.abs(np.diff(line)) > 40).sum() == 7


def test_strip_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"maps of 'gradient': shape \(3, 32, 32\) for 2 stages"):
        strip(some_maps(("gradient",), 3), ["trained", "a"])
    with pytest.raises(ValueError, match="no maps"):
        strip({}, ["trained"])


@pytest.mark.parametrize("order", ["cascading", "independent", "bottom_up", "of_ones_own"])
@pytest.mark.parametrize("count", [8, 7])
def test_nothing_of_a_curve_is_cut_off(order, count):
    rows = some_rows(METHODS[-count:], STAGES if count == 8 else STAGES[:10], (order,))
    rows.loc[5, ["value", "status"]] = [np.nan, "constant map"]
    figure = curve(summarize(rows), order, "ssim", title=f"inception_v3, {order} randomization: " + "long, " * 30)
    image = pixels(figure)
    assert image.shape == (870, 1650, 3)
    assert texts_outside(figure) == []
    names = [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    assert len(names) == count
    assert sum("(1 NaN)" in name for name in names) == 1
    legend = figure.axes[0].get_legend().get_window_extent()
    assert legend.x0 >= figure.axes[0].bbox.x1
    assert not any(t.get_window_extent().overlaps(legend) for t in figure.texts if t.get_text())


def test_curve_draws_the_summary_and_shows_zero_and_one():
    summary = summarize(some_rows(("gradient", "edges"), STAGES[:4]))
    axes = curve(summary, "cascading", "ssim").axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    own = summary[summary["method"] == "gradient"]
    assert np.array_equal(lines["gradient"].get_ydata(), own["mean"])
    assert np.array_equal(lines["gradient"].get_xdata(), [0, 1, 2, 3])
    assert [t.get_text() for t in axes.get_xticklabels()] == STAGES[:4]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == own["high"].max()
    assert band[:, 1].min() == own["low"].min()
    low, high = axes.get_ylim()
    assert low <= -0.05
    assert high >= 1.05
    assert lines["edges (control)"].get_color() == "#6B6B6B"
    assert lines["edges (control)"].get_linestyle() == "--"
    assert lines["gradient"].get_linestyle() == "-"


def test_an_independent_order_is_not_joined():
    summary = summarize(some_rows(("gradient", "random"), STAGES[:4], ("independent",)))
    axes = curve(summary, "independent", "ssim").axes[0]
    bars = {bar.get_label(): bar for bar in axes.containers}
    points, _, (whiskers,) = bars["gradient"].lines
    assert points.get_linestyle() == "None"
    ends = np.array([segment[:, 1] for segment in whiskers.get_segments()])
    own = summary[summary["method"] == "gradient"]
    assert ends == pytest.approx(own[["low", "high"]].to_numpy(), abs=1e-12)


def test_lines_are_told_apart_by_more_than_colour():
    found = list(looks(f"method{k}" for k in range(40)).values())
    assert len(set(found)) == 40
    assert len({look.marker for look in found[:7]}) == len({look.colour for look in found[:7]}) == 7


def linear(colours):
    """sRGB hex -> linear light (N, 3). [IEC 61966-2-1]"""
    values = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


# Machado, Oliveira and Fernandes 2009, severity 1
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def test_lines_stand_out_from_paper():
    """WCAG 2.2, success criterion 1.4.11: graphics at least 3:1 against white."""
    luminance = linear([*COLOURS, *(look.colour for look in CONTROLS.values())]) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05) >= 3).all()


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_colours_are_told_apart_by_colour_blind_readers(kind):
    seen = np.clip(linear(COLOURS) @ np.array(DEFICIENCIES[kind]).T, 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(encoded)
    apart = deltaE_ciede2000(lab[:, None], lab[None]) + 1e3 * np.eye(len(COLOURS))
    assert apart.min() >= 16


def test_curve_refuses_what_is_not_there():
    with pytest.raises(ValueError, match="no scores for order 'bottom_up' and similarity 'ssim'"):
        curve(summarize(some_rows(("gradient",), STAGES[:2])), "bottom_up", "ssim")


@pytest.fixture
def run_folder(tmp_path):
    images = ("photos/a b.jpg", "photos/a?b.jpg")
    rows = some_rows(("gradient", "edges"), STAGES[:3], ("cascading", "independent"), ("ssim", "hog"), images)
    rows.to_parquet(tmp_path / "scores.parquet")
    (tmp_path / "run.json").write_text(json.dumps({"plan": {"weights": "random"}}))
    arrays = {f"pictures/{images[0]}": np.zeros((32, 32, 3), np.uint8)}
    for order in ("cascading", "independent"):
        arrays[f"stages/{order}"] = np.array(STAGES[:3])
        for image in images:
            arrays |= {f"maps/{order}/{image}/{m}": a for m, a in some_maps(("gradient", "edges"), 3).items()}
    np.savez(tmp_path / "strips.npz", **arrays)
    return tmp_path


def test_draw_writes_every_figure_and_reports_progress(run_folder):
    seen = []
    files = draw(run_folder, lambda done, total: seen.append((done, total)))
    assert sorted(f.name for f in files) == sorted(f.name for f in (run_folder / "figures").iterdir())
    assert {f.name for f in files} == {
        *(f"strip_{o}_photos_a_b.jpg{tail}.png" for o in ("cascading", "independent") for tail in ("", "_")),
        *(f"curve_{o}_{s}.png" for o in ("cascading", "independent") for s in ("ssim", "hog")),
    }
    assert seen == [(k, 8) for k in range(1, 9)]
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert image.width >= (420 if file.name.startswith("strip") else 1650)


def titles(folder):
    scores = pd.read_parquet(folder / "scores.parquet")
    return [
        job.keywords.get("title", job.args[-1])
        for _, job in [*figures._strips(folder, scores, "net"), *figures._curves(scores, "net", summarize(scores))]
    ]


def test_titles_name_the_explained_class(run_folder):
    assert "explained class: 3\n" in titles(run_folder)[0]
    said = Prediction("net", "cascading", 0, 0, "trained", "cat", 3, "espresso", 0.9, 3, 0.9, True)
    pd.DataFrame([said]).to_parquet(run_folder / "predictions.parquet")
    assert "explained class: espresso\n" in titles(run_folder)[0]
    scores = pd.read_parquet(run_folder / "scores.parquet")
    scores.loc[scores["stage_index"] == 2, "target"] = 5
    scores.to_parquet(run_folder / "scores.parquet")
    assert "explained class: predicted anew at each stage\n" in titles(run_folder)[0]
    assert (
        titles(run_folder)[-1] == "net, independent randomization: mean of 2 images, 1 seed (bars: its 95 % interval)"
    )


def test_untrained_networks_are_called_so(run_folder, monkeypatch):
    said = []
    monkeypatch.setattr(figures, "curve", lambda *a, title: said.append(title) or curve(*a, title=title))
    draw(run_folder)
    assert all(title.startswith("inception_v3 (untrained), ") for title in said)
    assert len(said) == 4


def test_no_strips_file_leaves_curves(run_folder):
    (run_folder / "strips.npz").unlink()
    assert len(draw(run_folder)) == 4


def test_what_cannot_be_drawn_is_one_clear_error(run_folder):
    (run_folder / "strips.npz").write_bytes((run_folder / "strips.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"strips\.npz"):
        draw(run_folder)
    scores = pd.read_parquet(run_folder / "scores.parquet")
    scores.iloc[:0].to_parquet(run_folder / "scores.parquet")
    with pytest.raises(ValueError, match=r"scores of one model expected, found \[\]"):
        draw(run_folder)
    with pytest.raises(ValueError, match=r"scores\.parquet: there is no such file"):
        draw(run_folder / "nowhere")


def test_names_in_other_scripts_and_long_ones(run_folder):
    assert safe("写真/猫 1.jpg") == "写真_猫_1.jpg"
    assert len(safe("x" * 500)) == 80


def test_pyplots_state_is_left_alone(run_folder):
    before = mpl.get_backend(auto_select=False)
    draw(run_folder)
    assert mpl.get_backend(auto_select=False) == before


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """One run's figures for a paper: of one similarity and one image."""
    base = tmp_path_factory.mktemp("paper")
    runs = read_all([store(base / "run", rows=scores(similarities=("ssim",)), shown=("a<b>&'c.jpg",))])
    seen = []
    files = publish(runs, base / "figures", lambda done, total: seen.append((done, total)))
    assert seen == [(k, 4) for k in range(1, 5)]
    return {file.name: file for file in files}


def test_every_figure_of_a_paper_is_written_in_both_widths_and_formats(published, tmp_path):
    stems = {file.stem for file in published.values() if file.suffix == ".pdf"}
    assert stems == {
        f"net_{kind}_{w}" for kind in ("curve_cascading_ssim", "strip_cascading_a_b_c.jpg") for w in WIDTHS
    }
    assert {file.stem for file in published.values() if file.suffix == ".svg"} == stems
    captions = published["captions.txt"].read_text()
    assert all(f"{name}: " in captions for name in stems)
    assert "image a<b>&'c.jpg, explained class: class 2." in captions
    (run,) = read_all([store(tmp_path / "run", orders=("cascading", "independent"))])
    named = {stem for stem, _, _ in publication._jobs(run)}
    assert len(named) == 2 * (2 * 2 + 1 + 2 * 2)
    assert "net_curves_independent_2col" in named


def test_papers_get_their_widths_and_embedded_fonts(published):
    """Types 0 and 42 with the font's file inside; Type 3, which publishers refuse, nowhere."""
    for name, file in published.items():
        inches = WIDTHS["1col" if "_1col" in name else "2col"]
        if name.endswith(".pdf"):
            text = file.read_bytes()
            box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ", text)
            assert float(box[1]) == pytest.approx(72 * inches, abs=0.01)
            fonts = re.findall(rb"/Subtype /(Type\w+|CIDFont\w+)", text)
            assert set(fonts) == {b"Type0", b"CIDFontType2"}
            assert text.count(b"/FontFile2") == fonts.count(b"CIDFontType2") > 0
        elif name.endswith(".svg"):
            text = file.read_text()
            assert float(re.search(r'width="([\d.]+)pt"', text)[1]) == pytest.approx(72 * inches, abs=0.01)
            assert "<text" not in text
            assert "font-family" not in text


def test_the_same_run_gives_the_same_files(published, tmp_path):
    (run,) = read_all([published["captions.txt"].parents[1] / "run"])
    again = publish([run], tmp_path)
    assert {file.name: file.read_bytes() for file in again} == {n: f.read_bytes() for n, f in published.items()}


@pytest.mark.parametrize(("width", "pictured"), [("1col", True), ("2col", False)])
def test_nothing_of_a_papers_strip_is_cut_off(width, pictured):
    maps = some_maps()
    maps["meaningful_perturbation"][1:3] = 7
    picture = np.zeros((20, 20, 3), np.uint8) if pictured else None
    with mpl.rc_context(STYLE):
        figure = publication.strip(Stored(maps, STAGES, picture), width)
        figure.set_dpi(600)
        assert texts_outside(figure) == []
        assert overlaps(figure, {"gradient", "smoothgrad", "edges", "random"}) == []
        assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_text().strip()) >= 5
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert len(hatched) == (2 if width == "2col" else 1)


def test_one_column_shows_a_few_stages_the_first_and_last_among_them():
    assert spread(4, 6) == [0, 1, 2, 3]
    assert spread(18, 6) == [0, 1, 5, 9, 13, 17]
    for stages in range(7, 40):
        kept = spread(stages, 6)
        assert kept == sorted(set(kept))
        assert (len(kept), kept[0], kept[1], kept[-1]) == (6, 0, 1, stages - 1)


@pytest.mark.parametrize(("order", "count"), [("cascading", 4), ("independent", 5), ("cascading", 1)])
def test_panels_share_one_scale_and_cut_nothing(order, count):
    similarities = ["ssim", "spearman", "spearman_abs", "hog", "of_ones_own"][:count]
    rows = some_rows(METHODS[3:], STAGES[:9], (order,), similarities)
    rows.loc[rows.index[-1], "value"] = -0.6
    rows.loc[rows.query("similarity == 'ssim' and method == 'edges'").index[:4], ["value", "status"]] = [
        np.nan,
        "constant map",
    ]
    with mpl.rc_context(STYLE):
        figure = panels(summarize(rows), order, similarities)
        figure.set_dpi(300)
        FigureCanvasAgg(figure).draw()
        assert texts_outside(figure) == []
    used = [axes for axes in figure.axes if axes.get_visible()]
    assert len(used) == count
    assert len({axes.get_ylim() for axes in used}) == 1
    assert used[0].get_title() == "SSIM"
    names = [t.get_text() for t in figure.legends[0].get_texts()]
    assert ("edges (control) (4 NaN)" if count == 1 else "edges (control) (0 to 4 NaN)") in names
    legend = figure.legends[0].get_window_extent()
    assert not any(axes.get_tightbbox().overlaps(legend) for axes in used)


def test_long_method_names_break_near_the_middle():
    assert publication._broken("gradient") == "gradient"
    assert publication._broken("integrated_gradients") == "integrated_\ngradients"
    assert publication._broken("abcdefghijklmnop") == "abcdefghijklmnop"


def test_a_method_looks_the_same_in_panels_that_share_a_legend():
    rows = scores()
    names = list(dict.fromkeys(rows["method"]))
    figure = Figure()
    FigureCanvasAgg(figure)
    whole, part = figure.subplots(1, 2)
    for axis, kept in ((whole, names), (part, names[1:])):
        summary = summarize(rows[rows["method"].isin(kept)])
        plot(axis, summary, "cascading", rows["similarity"].iloc[0], methods=names)
    found = [{line.get_label(): line.get_color() for line in axis.get_lines()} for axis in (whole, part)]
    shared = [name for name in found[1] if not name.startswith("_")]
    assert len(shared) == len(names) - 1
    assert all(found[0][name] == found[1][name] for name in shared)
