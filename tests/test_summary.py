import itertools
import os
import subprocess
import sys
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sanity import summary as summaries
from sanity.summary import (
    Estimate,
    estimate,
    generator,
    interval,
    summarize,
    terminal_table,
    to_csv,
    to_markdown,
    verdicts,
)


def row(value, *, image="a", seed=0, stage=1, method="gradient", similarity="ssim", order="cascading"):
    """One row of scores; a value that is not a number is a constant map."""
    status = "ok" if np.isfinite(value) else "constant map"
    name = "trained" if stage == 0 else f"layer{stage}"
    keys = ("m", order, seed, stage, name, method, similarity, image, 3)
    columns = ["model", "order", "seed", "stage_index", "stage", "method", "similarity", "image", "target"]
    return dict(zip(columns, keys, strict=True)) | {"value": float(value), "status": status}


def course(method, values, *, stage, **how):
    return [row(v, image=f"i{k}", method=method, stage=stage, **how) for k, v in enumerate(values)]


def random_rows(stages=3, methods=("gradient", "edges", "random"), similarities=("ssim", "hog"), images=5):
    draws = np.random.default_rng(3)
    keys = itertools.product(range(stages), methods, similarities, (0, 1), range(images))
    return pd.DataFrame(
        [row(draws.normal(), image=f"i{k}", seed=seed, stage=s, method=m, similarity=q) for s, m, q, seed, k in keys]
    )


def test_means_counts_and_std_by_hand():
    rows = [row(0.1, image="a"), row(0.3, image="b"), row(np.nan, image="c")]
    rows += [row(0.5, image="a", seed=1), row(np.nan, image="b", seed=1), row(np.nan, image="c", seed=1)]
    (found,) = summarize(pd.DataFrame(rows)).to_dict("records")
    assert found["mean"] == pytest.approx((0.1 + 0.3 + 0.5) / 3, abs=1e-15)
    # image means are 0.3 (over two seeds) and 0.3 (over one): no spread
    assert found["std"] == pytest.approx(0, abs=1e-15)
    assert (found["n"], found["n_nan"]) == (3, 3)
    assert list(found)[:6] == ["model", "order", "stage_index", "stage", "method", "similarity"]


def test_std_is_over_images_with_ddof_0():
    found = summarize(pd.DataFrame(course("gradient", [0.0, 0.5, 1.0], stage=1))).iloc[0]
    assert found["std"] == pytest.approx(np.sqrt(1 / 6), abs=1e-15)


@pytest.mark.parametrize(("values", "n", "n_nan"), [([0.4], 1, 0), ([0.4, np.nan], 1, 1), ([np.nan] * 2, 0, 2)])
def test_too_few_scores_have_no_interval(values, n, n_nan):
    found = summarize(pd.DataFrame(course("gradient", values, stage=1))).iloc[0]
    assert (found["n"], found["n_nan"]) == (n, n_nan)
    assert np.isnan([found["low"], found["high"], found["std"]]).all()
    assert np.isnan(found["mean"]) if n == 0 else found["mean"] == 0.4


def test_a_value_that_is_not_ok_is_not_scored():
    rows = pd.DataFrame(course("gradient", [0.2, 0.4, 0.9], stage=1))
    rows.loc[2, "status"] = "non-finite map"
    found = summarize(rows).iloc[0]
    assert (found["n"], found["n_nan"]) == (2, 1)
    assert found["mean"] == pytest.approx(0.3, abs=1e-15)


def test_order_of_rows_is_canonical():
    rows = course("smoothgrad", [0.1], stage=2, similarity="hog") + course("gradient", [0.1], stage=2)
    rows += course("smoothgrad", [0.1], stage=0) + course("gradient", [0.1], stage=0, order="bottom_up")
    found = summarize(pd.DataFrame(rows))
    keys = list(found[["order", "stage_index", "method", "similarity"]].itertuples(index=False, name=None))
    assert keys == [
        ("cascading", 0, "smoothgrad", "ssim"),
        ("cascading", 2, "smoothgrad", "hog"),
        ("cascading", 2, "gradient", "ssim"),
        ("bottom_up", 0, "gradient", "ssim"),
    ]


def test_categorical_columns_and_no_rows_at_all():
    rows = random_rows()
    categorical = rows.astype(dict.fromkeys(["model", "order", "stage", "method", "similarity", "image"], "category"))
    found = summarize(categorical).astype({"model": str, "method": str})
    assert np.array_equal(found[summaries.STATISTICS], summarize(rows)[summaries.STATISTICS])
    assert summarize(rows.iloc[:0]).empty


def test_refusals_carry_values():
    rows = pd.DataFrame(course("gradient", [0.1, 0.2], stage=1))
    with pytest.raises(ValueError, match=r"lack the columns \['status'\]"):
        summarize(rows.drop(columns="status"))
    with pytest.raises(ValueError, match=r"a row twice.*'image': 'i1'"):
        summarize(pd.concat([rows, rows.iloc[1:]]))


def test_one_seed_is_the_plain_bootstrap():
    scores = np.random.default_rng(0).beta(2, 5, size=40)
    low, high = interval(scores[None], generator("x"), resamples=20_000)
    want = stats.bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    # a quantile at .025 of R draws has standard error sqrt(.025 * .975 / R) / density, .058 / se if normal
    error = 5 * np.sqrt(2 * 0.025 * 0.975 / 20_000) / 0.058 * scores.std() / np.sqrt(40)
    assert low == pytest.approx(want.low, abs=error)
    assert high == pytest.approx(want.high, abs=error)


def test_crossed_bootstrap_is_its_definition_written_as_loops():
    scores = np.random.default_rng(4).normal(size=(3, 4))
    scores[1, 2] = np.nan
    draws = np.random.default_rng(9)
    grids = [scores[np.ix_(draws.integers(3, size=3), images)] for images in draws.integers(4, size=(20_000, 4))]
    means = [np.nanmean(grid) for grid in grids if np.isfinite(grid).any()]
    low, high = interval(scores, generator("y"), resamples=20_000)
    want = np.quantile(means, [0.025, 0.975])
    error = 5 * np.sqrt(2 * 0.025 * 0.975 / 20_000) / 0.058 * np.std(means)
    assert [low, high] == pytest.approx(want, abs=error)


def test_images_are_the_same_under_every_seed():
    # scores that depend on the image only: seeds add nothing, however many there are
    scores = np.random.default_rng(5).normal(size=(1, 12))
    one = interval(scores, generator("a"), resamples=20_000)
    many = interval(np.repeat(scores, 10, 0), generator("b"), resamples=20_000)
    assert many == pytest.approx(one, abs=0.05 * (one[1] - one[0]))


def test_unscored_images_and_seeds_take_no_part():
    scores = np.random.default_rng(6).normal(size=(2, 6))
    padded = np.full((3, 9), np.nan)
    padded[:2, :6] = scores
    assert interval(padded, generator("k")) == interval(scores, generator("k"))


@pytest.mark.parametrize(("seeds", "images"), [(1, 40), (12, 25)])
def test_coverage(seeds, images):
    """True mean 0, effects of image, seed and both; 300 worlds."""
    draws, hits, worlds = np.random.default_rng(7), 0, 300
    for world in range(worlds):
        by_seed = draws.normal(size=(seeds, 1)) if seeds > 1 else 0
        scores = draws.normal(size=(1, images)) + by_seed + 0.5 * draws.normal(size=(seeds, images))
        low, high = interval(scores, generator(world), resamples=1000)
        hits += low <= 0 <= high
    # percentile intervals fall a little short of 95 %; 3 standard errors of 300 draws are .04
    assert 0.87 <= hits / worlds <= 0.99


def test_groups_do_not_depend_on_one_another_nor_on_the_order_of_rows():
    rows = random_rows()
    whole = summarize(rows)
    alone = summarize(rows[(rows["method"] == "edges") & (rows["stage_index"] == 2)])
    same = whole[(whole["method"] == "edges") & (whole["stage_index"] == 2)].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, same, check_exact=True)
    shuffled = summarize(rows.sample(frac=1, random_state=0))
    keys = summaries.KEY
    pd.testing.assert_frame_equal(
        shuffled.sort_values(keys, ignore_index=True),
        whole.sort_values(keys, ignore_index=True),
        check_exact=True,
    )


def at_the_end(gradient, *, random=(0.0, 0.01, -0.01, 0.0), trained=(1.0,) * 4, first=(0.6,) * 4):
    rows = course("gradient", trained, stage=0) + course("random", random, stage=0)
    rows += course("gradient", first, stage=1) + course("random", random, stage=1)
    rows += course("gradient", gradient, stage=2) + course("random", random, stage=2)
    return pd.DataFrame(rows)


def verdict_of(rows, method="gradient", **how):
    found = verdicts(rows, **how)
    return found[found["method"] == method].iloc[0]


NAN = float("nan")


@pytest.mark.parametrize(
    ("gradient", "control", "trained", "verdict", "reason"),
    [
        ([0.0, 0.02, -0.02, 0.0], [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "pass", "at or below 0.06"),
        ([-0.9, -0.8, -0.9, -0.8], [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "pass", "at or below"),
        ([0.6, 0.62, 0.58, 0.6], [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "fail", "above 0.06"),
        ([0.6, 0.62, 0.58, 0.6], [0.6, 0.62, 0.58, 0.6], [1.0] * 4, "pass", "at or below 0.68"),
        ([-0.3, 0.4, -0.2, 0.3], [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "inconclusive", "straddles"),
        ([0.0, 0.5, -0.3, 0.4], [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "inconclusive", "straddles"),
        ([0.6, 0.62], [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "inconclusive", "too few maps scored: 2 of 2"),
        (
            [0.6, 0.6, 0.6, NAN, NAN, NAN, NAN],
            [0.0] * 4,
            [1.0] * 4,
            "inconclusive",
            "too few maps scored: 3 of 7",
        ),
        ([NAN] * 4, [0.0, 0.01, -0.01, 0.0], [1.0] * 4, "inconclusive", "too few maps scored: 0 of 4"),
        ([0.6] * 4, [0.0, NAN, NAN, 0.0], [1.0] * 4, "inconclusive", "no null level"),
        ([0.0] * 4, [0.0, 0.01, -0.01, 0.0], [0.0, 0.03, 0.01, 0.02], "inconclusive", "uninformative"),
    ],
)
def test_verdicts_truth_table(gradient, control, trained, verdict, reason):
    found = verdict_of(at_the_end(gradient, random=control, trained=trained))
    assert found["verdict"] == verdict
    assert reason in found["reason"]
    assert "judged at layer2" in found["reason"]
    assert list(found.index) == summaries.VERDICT_COLUMNS


def test_verdict_numbers_by_hand():
    values, control = [0.5, 0.6, 0.7, 0.8], [0.0, 0.1, 0.2, 0.3]
    found = verdict_of(at_the_end(values, random=control))
    # four images: Student's interval, mean +- t(3) s / 2, is the wider one
    half = stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert found["score"] == pytest.approx(0.65, abs=1e-14)
    assert [found["low"], found["high"]] == pytest.approx([0.65 - half, 0.65 + half], abs=1e-12)
    assert found["null_high"] == pytest.approx(0.15 + half, abs=1e-12)


def test_the_margin_moves_the_bar():
    rows = at_the_end([0.3, 0.31, 0.29, 0.3])
    assert [verdict_of(rows, margin=m)["verdict"] for m in (0.0, 0.1, 0.5)] == ["fail", "fail", "pass"]


def test_a_map_blind_to_the_logits_fails_however_little_is_left_at_the_end():
    found = verdict_of(at_the_end([0.0] * 4, first=(0.99, 0.98, 1.0, 0.99)))
    assert found["verdict"] == "fail"
    assert found["reason"].startswith("blind to layer1: 0.99 [")
    maybe = verdict_of(at_the_end([0.0] * 4, first=(0.99, 0.7, 1.0, 0.8)))
    assert maybe["verdict"] == "inconclusive"
    assert maybe["reason"].startswith("perhaps blind to layer1")


def test_maps_of_other_images_are_the_level_where_they_are_known():
    rows = at_the_end([0.3, 0.31, 0.29, 0.3])
    other = pd.DataFrame(course("gradient", [0.3, 0.32, 0.31, 0.3], stage=0))
    assert verdict_of(rows)["verdict"] == "fail"
    assert verdict_of(rows, unrelated=other)["verdict"] == "pass"
    assert verdict_of(rows, unrelated=other[other["method"] == "none"])["verdict"] == "fail"
    rows.attrs["unrelated"] = other.to_dict("records")
    assert verdict_of(rows)["verdict"] == "pass"


def test_a_pass_says_how_long_the_method_held_on():
    assert verdict_of(at_the_end([0.0] * 4))["reason"].endswith("judged at layer2; mean above 0.5 through layer1")


def test_the_control_itself_is_never_judged():
    found = verdict_of(at_the_end([0.0] * 4), method="random")
    assert found["verdict"] == "inconclusive"
    assert "uninformative" in found["reason"]


def test_no_control_no_verdict_and_none_for_independent_orders():
    rows = at_the_end([0.0] * 4)
    assert verdict_of(rows[rows["method"] != "random"])["verdict"] == "inconclusive"
    assert np.isnan(verdict_of(rows[rows["method"] != "random"])["null_high"])
    assert verdicts(rows.assign(order="independent")).empty
    assert verdicts(rows[rows["stage_index"] == 0]).empty
    both = pd.concat([rows, rows.assign(order="bottom_up")])
    assert verdicts(both)["order"].tolist() == ["cascading"] * 2 + ["bottom_up"] * 2


def test_rows_without_a_trained_stage_can_be_judged():
    rows = at_the_end([0.0, 0.02, -0.02, 0.0])
    assert verdict_of(rows[rows["stage_index"] > 0])["verdict"] == "pass"


def test_csv_reads_back():
    summary = summarize(random_rows())
    back = pd.read_csv(StringIO(to_csv(summary)))
    assert list(back.columns) == list(summary.columns)
    assert np.abs(back["mean"] - summary["mean"]).max() <= 0.5e-6
    missing = to_csv(summarize(pd.DataFrame([row(np.nan)])))
    assert missing.splitlines()[1] == "m,cascading,1,layer1,gradient,ssim,NaN,NaN,NaN,NaN,0,1"


def test_markdown_cells_by_hand():
    rows = course("gra|dient", [0.5, 0.5], stage=0) + course("gra|dient", [0.25, np.nan], stage=1)
    rows += course("edges", [np.nan, np.nan], stage=1)
    lines = to_markdown(summarize(pd.DataFrame(rows))).splitlines()
    assert "## m, cascading, ssim" in lines
    assert lines[-4:] == [
        "| method | trained | layer1 |",
        "| --- | --- | --- |",
        r"| gra\|dient | 0.50 [0.50, 0.50] | 0.25 [n/a] (1 NaN) |",
        "| edges | - | n/a (2 NaN) |",
    ]


@pytest.mark.parametrize("similarities", [1, 4, 9])
def test_terminal_table_fits_and_aligns(similarities):
    names = tuple(f"similarity_{k}" for k in range(similarities))
    rows = random_rows(5, ("meaningful_perturbation", "package.module:a_callable_of_ones_own"), names)
    rows.loc[0, ["value", "status"]] = [np.nan, "constant map"]
    text = terminal_table(summarize(rows))
    assert max(map(len, text.splitlines())) <= 100
    assert "first = layer1, mid = layer2, last = layer4" in text
    assert all(name in text for name in names)
    assert f"1 of all {len(rows)} scores" in text
    lines = [line for line in text.splitlines() if line.startswith("meaning")]
    dots = [[i for i, c in enumerate(line) if c == "."] for line in lines]
    assert all(places == max(dots, key=len)[: len(places)] for places in dots)


def test_terminal_table_by_hand():
    rows = course("gradient", [1.0, 1.0], stage=0) + course("gradient", [-0.25, np.nan], stage=1)
    assert terminal_table(summarize(pd.DataFrame(rows))).splitlines() == [
        "m, cascading: means of 2 scores; only = layer1",
        "                ssim",
        "method          only",
        "gradient       -0.25*",
        "* without NaN: 1 of all 4 scores (constant or non-finite maps)",
    ]


def test_an_estimate_prints_without_a_negative_zero():
    assert str(Estimate(-0.001, -0.004, 0.5)) == "0.00 [0.00, 0.50]"
    assert estimate(np.array([[np.nan]]), 1, ("k",)).n_nan == 1


def test_without_torch_and_the_same_draws_in_every_process():
    code = (
        "import sys, sanity.summary, sanity.report; assert 'torch' not in sys.modules; "
        "print(sanity.summary.generator('m', 'cascading', 1).integers(1 << 40))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == generator("m", "cascading", 1).integers(1 << 40)
    assert int(done.stdout) != generator("m", "cascading", 2).integers(1 << 40)
