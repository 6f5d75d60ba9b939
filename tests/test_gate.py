"""The gate: what it calls same, changed and inconclusive; what it refuses; how it tells."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from sanity import summary
from sanity.comparison import CELL, GROUP, MAPS, adjusted, compare, exact_methods, map_scores
from sanity.gate import expect, gate, main
from sanity.outcome import Case, Outcome
from sanity.records import Score, schema
from sanity.stored import Run, admit, differences

STAGES = ("trained", "logits", "conv2", "conv1")
IMAGES = tuple(f"image-{i}" for i in range(8))


def scores(values=0.5, *, methods=("gradient",), similarities=("ssim",), seeds=(0,), images=IMAGES, stages=STAGES):
    """A table of scores; values: a number, or (stage, method, similarity, seed, image) -> number."""
    rows = []
    for (index, stage), method, similarity, seed, image in product(
        enumerate(stages), methods, similarities, seeds, images
    ):
        value = values(stage, method, similarity, seed, image) if callable(values) else values
        status = "ok" if np.isfinite(value) else "constant map"
        rows.append(("net", "cascading", seed, index, stage, method, similarity, image, 3, value, status))
    return pd.DataFrame(rows, columns=Score._fields)


def moved(rows, change, stage="conv2"):
    """The same rows with `change`, a number or one an image, added at one stage."""
    rows = rows.copy()
    at = rows["stage"] == stage
    added = dict(zip(IMAGES, np.broadcast_to(change, len(IMAGES)), strict=True))
    rows.loc[at, "value"] += rows.loc[at, "image"].map(added)
    return rows


def header(**changes):
    plan = {"model": "net", "methods": ["gradient"], "seeds": [0], "samples": None, "strips": 4, "images": "a"}
    whole = {
        "status": "complete",
        "plan": plan | {k: v for k, v in changes.items() if k in plan or k == "reinit"},
        "protocol_version": "1",
        "weights_sha256": "0" * 64,
        "images_sha256": "1" * 64,
    }
    return whole | {k: v for k, v in changes.items() if k in {*whole, "stages", "unchanged_parameters"}}


def a_run(rows, looks=None, name="run", **changes):
    return Run(Path(name), header(**changes), rows, looks)


def group_at(rows, stage, **where):
    for name, value in {"stage": stage, **where}.items():
        rows = rows[rows[name] == value]
    (only,) = rows.to_dict("records")
    return only


def verdict_at(old, new, stage="conv2", **how):
    return group_at(compare(old, new, **how)[0], stage)["verdict"]


# --- three values


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (0.0, "same"),
        (0.2, "changed"),
        (-0.2, "changed"),
        (0.049, "same"),
        (0.051, "changed"),
        ([0.01, -0.01] * 4, "same"),
        ([0.03, -0.03] * 4, "same"),
        ([0.3, 0.1] * 4, "changed"),
        ([0.3, -0.3] * 4, "inconclusive"),
        ([0.5, 0.0, 0.0, 0.0] * 2, "inconclusive"),
        ([0.06, 0.0] * 4, "inconclusive"),
    ],
)
def test_same_changed_inconclusive(change, verdict):
    rows = scores()
    found, findings = compare(rows, moved(rows, change))
    assert findings == []
    assert dict(zip(found["stage"], found["verdict"], strict=True)) == dict.fromkeys(STAGES, "same") | {
        "conv2": verdict
    }
    assert group_at(found, "conv2")["shift"] == pytest.approx(np.mean(change), abs=1e-12)


def test_both_a_shift_and_an_interval_beyond_it_are_needed():
    rows = scores()
    wide = moved(rows, np.array([0.9, 0.0, 0.1, 0.0, 0.2, 0.0, 0.1, 0.0]))
    found = group_at(compare(rows, wide)[0], "conv2")
    assert found["shift"] > 0.05 > found["low"]
    assert found["verdict"] == "inconclusive"
    narrow = moved(rows, np.linspace(0.02, 0.03, 8))
    found = group_at(compare(rows, narrow, max_shift=0.01)[0], "conv2")
    assert (found["verdict"], found["low"] > 0.01) == ("changed", True)


@pytest.mark.parametrize("count", [1, 2])
def test_a_handful_of_images_is_never_enough_for_a_change_but_rounding_stays_rounding(count):
    rows = scores(images=IMAGES[:count])
    assert verdict_at(rows, moved(rows, 0.4)) == "inconclusive"
    assert verdict_at(rows, moved(rows, 0.019)) == "same"
    assert verdict_at(rows, moved(rows, 0.04)) == "inconclusive"


def test_max_shift_zero_asks_for_equality():
    rows = scores()
    assert verdict_at(rows, rows, max_shift=0.0) == "same"
    assert verdict_at(rows, moved(rows, 1e-9), max_shift=0.0) == "changed"


def test_numbers_are_those_of_scipy_and_of_the_summary():
    draws = np.random.default_rng(0)
    old = scores(lambda *key: draws.normal(0.5, 0.1), methods=("a", "b", "c"), seeds=(0, 1))
    new = old.assign(value=old["value"] + draws.normal(0.1, 0.1, len(old)))
    found, _ = compare(old, new)
    p = []
    for row in found.to_dict("records"):
        at = np.logical_and.reduce([old[name] == row[name] for name in GROUP])
        change = (new["value"] - old["value"])[at].to_numpy().reshape(2, 8)
        images = change.mean(0)
        assert row["shift"] == pytest.approx(change.mean(), abs=1e-12)
        key = (*(row[name] for name in summary.KEY),)
        boot = summary.interval(change, summary.generator(*key))
        student = stats.t.interval(0.95, 7, images.mean(), stats.sem(images))
        assert row["low"] == pytest.approx(min(boot[0], student[0]), abs=1e-12)
        assert row["high"] == pytest.approx(max(boot[1], student[1]), abs=1e-12)
        side = np.sign(images.mean())
        p.append(stats.ttest_1samp(side * images, 0.05, alternative="greater").pvalue)
    assert found["p"].to_numpy() == pytest.approx(p, abs=1e-12)
    assert found["q"].to_numpy() == pytest.approx(stats.false_discovery_control(p), abs=1e-12)


@pytest.mark.parametrize("p", [[0.5], [0.01, 0.04, 0.03, 0.005], [0.0, 0.0, 1.0, 1.0], [0.2] * 5])
def test_adjusted_is_benjamini_and_hochbergs(p):
    assert adjusted(np.array(p)) == pytest.approx(stats.false_discovery_control(p), abs=1e-15)


def test_what_stands_alone_is_changed_and_among_many_is_not():
    change = np.array([0.30, 0.05, 0.20, 0.10, 0.30, 0.05, 0.20, 0.10])
    alone = scores(stages=("conv2",))
    found = group_at(compare(alone, moved(alone, change))[0], "conv2")
    assert (found["verdict"], found["q"]) == ("changed", found["p"])
    many = scores(stages=("conv2",), methods=[f"m{i}" for i in range(60)])
    one = many["method"] == "m0"
    among = pd.concat([moved(many[one], change), many[~one]])
    found = group_at(compare(many, among)[0], "conv2", method="m0")
    assert (found["verdict"], found["low"] > 0.05, found["q"] > 0.05) == ("inconclusive", True, True)
    exact = group_at(compare(many, among, exact={"m0"})[0], "conv2", method="m0")
    assert exact["verdict"] == "changed"


def test_order_of_rows_and_other_groups_do_not_matter_to_a_groups_numbers():
    draws = np.random.default_rng(2)
    old = scores(lambda *key: draws.uniform(), methods=("a", "b"), seeds=(0, 1))
    new = old.assign(value=old["value"] + draws.normal(0.0, 0.1, len(old)))
    whole = compare(old, new)[0]
    mixed = compare(old.sample(frac=1, random_state=1), new.sample(frac=1, random_state=2))[0]
    numbers = ["shift", "low", "high", "p"]
    by = {tuple(row[name] for name in GROUP): [row[n] for n in numbers] for row in mixed.to_dict("records")}
    alone = compare(old[old["method"] == "a"], new[new["method"] == "a"])[0]
    for table in (whole, alone):
        for row in table.to_dict("records"):
            assert [row[n] for n in numbers] == by[tuple(row[name] for name in GROUP)]


# --- chance


WORLDS = [f"world-{i}" for i in range(100)]
"""Each a method of its own, so that one table holds them all."""


def test_the_edge_of_no_change_is_crossed_as_rarely_as_it_says():
    """True shift exactly max_shift, the worst case of no change: p <= .05 in one world of twenty."""
    draws = np.random.default_rng(3)
    old = scores(stages=("conv2",), methods=WORLDS)
    found, _ = compare(old, old.assign(value=old["value"] + draws.normal(0.05, 0.1, len(old))))
    error = np.sqrt(0.05 * 0.95 / len(WORLDS))
    assert (found["p"] <= 0.05).mean() == pytest.approx(0.05, abs=3 * error)
    assert (found["verdict"] == "changed").sum() <= 1
    assert (found["verdict"] == "same").mean() <= 0.025 + 3 * error


def test_runs_of_other_seeds_are_two_samples():
    """Seeds matter much and images little: seeds paired by place, as if they were one, would cry wolf."""
    draws = np.random.default_rng(4)
    effect = {(world, seed): draws.normal(0.5, 0.2) for world in WORLDS for seed in range(8)}

    def value(stage, method, similarity, seed, image):
        return effect[method, seed] + draws.normal(0, 0.02)

    old, new = (scores(value, seeds=seeds, stages=("conv2",), methods=WORLDS) for seeds in ((0, 1, 2), (5, 6, 7)))
    apart, paired = compare(old, new)[0], compare(old, new.assign(seed=new["seed"] - 5))[0]
    assert (apart["p"] <= 0.05).mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(WORLDS))
    assert (apart["verdict"] == "changed").sum() == 0
    assert (paired["p"] <= 0.05).mean() > 0.5


def test_interval_between_other_seeds_is_welchs():
    draws = np.random.default_rng(5)
    effect = {seed: draws.normal(0.5, 0.1) for seed in range(8)}
    old = scores(lambda *key: effect[key[3]], seeds=(0, 1, 2), stages=("conv2",))
    new = scores(lambda *key: effect[key[3]], seeds=(5, 6, 7, 4), stages=("conv2",))
    found = group_at(compare(old, new)[0], "conv2")
    a, b = ([effect[seed] for seed in seeds] for seeds in ((0, 1, 2), (5, 6, 7, 4)))
    want = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((want.low, want.high), abs=1e-9)


def test_a_single_seed_a_side_says_nothing_of_seeds():
    old, new = scores(0.2, seeds=(0,)), scores(0.8, seeds=(1,))
    found, findings = compare(old, new)
    assert set(found["verdict"]) == {"inconclusive"}
    assert findings == []


def test_seeds_in_common_are_paired_and_the_others_left_out():
    old = scores(lambda *key: key[3] / 10, seeds=(0, 1, 2))
    new = scores(lambda *key: key[3] / 10, seeds=(2, 1, 9))
    found, findings = compare(old, new, apart={"seed"})
    assert set(found["verdict"]) == {"same"}
    assert set(found["n"]) == {16}
    assert findings == []
    assert len(compare(old, new)[1]) == 2


# --- findings


def test_missing_and_extra_cells_are_findings():
    rows = scores(methods=("gradient", "guided"))
    without = rows[rows["stage"] != "conv2"]
    (finding,) = compare(rows, without)[1]
    assert (finding.kind, finding.text, finding.cells) == ("missing", "missing stage conv2: 16 cells", 16)
    (finding,) = compare(without, rows)[1]
    assert (finding.kind, finding.text) == ("extra", "extra stage conv2: 16 cells")
    one = compare(rows, rows.drop(rows.index[0]))[1]
    assert [finding.text for finding in one] == ["missing in gradient, ssim, cascading at trained: 1 cell"]
    assert compare(rows, rows[rows["method"] == "guided"], apart={"method"})[1] == []


def test_stages_are_paired_by_name_whatever_their_number():
    rows = scores(lambda stage, *key: STAGES.index(stage) / 10)
    without = rows[rows["stage"] != "logits"]
    without = without.assign(stage_index=without["stage_index"].clip(upper=2))
    found, _ = compare(rows, without)
    assert dict(zip(found["stage"], found["shift"], strict=True)) == {"trained": 0, "conv2": 0, "conv1": 0}


def test_cells_newly_without_a_score_are_findings_and_never_silently_dropped():
    rows = scores()
    lost = rows.copy()
    lost.loc[lost["image"].isin(IMAGES[:2]) & (lost["stage"] == "conv1"), ["value", "status"]] = [
        np.nan,
        "constant map",
    ]
    found, (finding,) = compare(rows, lost)
    assert finding.text == "gradient, ssim, cascading at conv1: ok became constant map, 2 cells"
    assert (group_at(found, "conv1")["n"], group_at(found, "conv1")["n_nan"]) == (6, 2)
    assert compare(lost, rows)[1][0].text.endswith("constant map became ok, 2 cells")
    assert compare(lost, lost)[1] == []
    assert gate(a_run(rows), a_run(lost)).exit_code == 1


def test_what_has_no_score_in_either_run_is_the_same():
    rows = scores(lambda stage, *key: np.nan if stage == "conv1" else 0.4)
    found, findings = compare(rows, rows)
    assert (group_at(found, "conv1")["verdict"], findings) == ("same", [])
    assert gate(a_run(rows), a_run(rows)).exit_code == 0


def test_another_explained_class_is_a_finding_at_the_trained_network_only():
    rows = scores()
    other = rows.assign(target=rows["target"].where(rows["image"] != "image-2", 7))
    (finding,) = compare(rows, other)[1]
    assert finding.text == "explained class of 1 images, image-2: 3 became 7"
    later = rows.assign(target=rows["target"].where(rows["stage"] == "trained", 7))
    assert compare(rows, later)[1] == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.drop(columns="status"), r"lack the columns \['status'\]"),
        (
            lambda rows: pd.concat([rows, rows.head(1)]),
            "holds a cell twice: net/cascading/trained/gradient/ssim/0/image-0",
        ),
        (lambda rows: rows.assign(model="other"), "no cell in common: net/cascading.* against other/"),
    ],
)
def test_unusable_tables_are_refused(spoil, message):
    with pytest.raises(ValueError, match=message):
        compare(scores(), spoil(scores()))


# --- maps


def fingerprint(grids, look="first", seed=0, method="gradient", rms=1.0, balance=0.0):
    return pd.DataFrame(
        {
            "model": "net", "method": method, "image": IMAGES[: len(grids)], "look": look, "target": 3, "seed": seed,
            "signed": list(grids), "absolute": list(np.abs(grids)), "rms": rms, "balance": balance, "status": "ok",
        }
    )  # fmt: skip


def looks(first, again=None, other=None, **how):
    given = {"first": first, "again": first if again is None else again, "other": first if other is None else other}
    return pd.concat([fingerprint(grids, look, **how) for look, grids in given.items()], ignore_index=True)


def grids(seed, count=8):
    return np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)


def mean_of(table, similarity):
    return table.loc[table["similarity"] == similarity, "value"].mean()


@pytest.mark.parametrize(("factor", "value"), [(1, 1), (3, 1), (-1, -1)])
def test_maps_are_compared_by_the_angle_between_them(factor, value):
    old, new = map_scores(looks(grids(0)), looks(factor * grids(0)))
    assert mean_of(old, "map") == 1
    assert mean_of(new, "map") == pytest.approx(value, abs=1e-7)
    assert set(old["order"]) == {MAPS}
    assert old.columns.tolist() == new.columns.tolist()


def test_unrelated_maps_are_at_a_right_angle_and_a_known_angle_is_found():
    a, b = np.zeros((1, 64)), np.zeros((1, 64))
    a[0, :2], b[0, 2:4] = [1, -1], [1, -1]
    assert mean_of(map_scores(looks(a), looks(b))[1], "map") == pytest.approx(0, abs=1e-12)
    half = np.cos(0.3) * a + np.sin(0.3) * b
    assert mean_of(map_scores(looks(a), looks(half))[1], "map") == pytest.approx(1 - 0.6 / np.pi, abs=1e-12)


def test_the_second_look_is_what_to_expect_and_under_other_seeds_the_look_under_other_noise():
    base = looks(grids(0), again=grids(0) + 0.1 * grids(1), other=grids(0) + grids(2))
    same, _ = map_scores(base, looks(grids(0)))
    other, _ = map_scores(base, looks(grids(0), seed=5))
    assert mean_of(same, "map") > 0.9 > 0.6 > mean_of(other, "map") > 0.3


def test_scale_and_balance_are_compared():
    old, new = map_scores(looks(grids(0), rms=2.0), looks(grids(0), rms=1.0, balance=0.3))
    assert mean_of(old, "map_scale") - mean_of(new, "map_scale") == pytest.approx(np.log(2), abs=1e-12)
    assert mean_of(new, "map_balance") - mean_of(old, "map_balance") == pytest.approx(0.3, abs=1e-12)
    dead, _ = map_scores(looks(grids(0), rms=0.0), looks(grids(0)))
    assert set(dead.loc[dead["similarity"] == "map_scale", "status"]) == {"no value"}


def test_a_method_is_exact_if_it_repeats_itself_in_both_runs_whatever_the_noise():
    steady, shaky = looks(grids(0)), looks(grids(0), again=grids(1))
    assert exact_methods(steady, steady) == {"gradient"}
    assert exact_methods(steady, shaky) == exact_methods(shaky, steady) == set()
    noisy = looks(grids(0), other=grids(1))
    assert exact_methods(noisy, noisy) == {"gradient"}
    assert exact_methods(noisy, looks(grids(0), seed=1)) == set()
    assert exact_methods(steady, looks(grids(0), seed=1)) == {"gradient"}


def test_fingerprints_lacking_a_look_are_refused():
    whole = looks(grids(0))
    with pytest.raises(ValueError, match=r"lack the look 'again'; they have \['first', 'other'\]"):
        map_scores(whole, whole[whole["look"] != "again"])
    with pytest.raises(ValueError, match=r"fingerprints lack the columns \['rms', 'signed'\]"):
        map_scores(whole, whole.drop(columns=["rms", "signed"]))


def test_a_map_that_scores_cannot_tell_is_told_by_its_fingerprint():
    rows, mirrored = scores(), grids(0).reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)
    blind = gate(a_run(rows), a_run(rows))
    assert blind.exit_code == 0
    assert "the trained network's maps are not compared: no fingerprints.parquet in run" in blind.notes
    (lost,) = [c for c in gate(a_run(rows, looks(grids(0))), a_run(rows)).cases if c.verdict == "changed"]
    assert lost.cells[-1] == "missing fingerprints.parquet of the trained network's maps"
    found = gate(a_run(rows, looks(grids(0))), a_run(rows, looks(mirrored)))
    assert (found.verdict, found.exit_code) == ("changed", 1)
    assert [case.name for case in found.cases if case.verdict == "changed"] == ["gradient, map", "gradient, map_abs"]
    assert gate(a_run(rows, looks(grids(0))), a_run(rows, looks(grids(0)))).verdict == "same"


def test_maps_of_other_weights_are_not_compared():
    rows = scores()
    other = a_run(rows.assign(target=5), looks(grids(1)), weights_sha256="2" * 64)
    found = gate(a_run(rows, looks(grids(0))), other, allowed=["weights"])
    assert found.verdict == "same"
    assert "the trained network's maps are not compared: weights differs" in found.notes


# --- refusals


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"weights_sha256": "2" * 64}, "weights", "weights: 000000000000… against 222222222222…"),
        ({"images_sha256": "2" * 64}, "images", "images: 111111111111… against 222222222222…"),
        ({"protocol_version": "2"}, "protocol", "protocol: 1 against 2"),
        ({"samples": 25}, "samples", "samples: None against 25"),
        ({"methods": ["gradient", "edges"]}, "methods", "methods: current alone edges"),
        ({"seeds": [3]}, "seeds", "seeds: baseline alone 0, current alone 3"),
        ({"reinit": "permute"}, "reinit", "reinit: None against permute"),
    ],
)
def test_different_experiments_are_refused_with_what_differs_unless_allowed(change, name, words):
    old, new = a_run(scores()), a_run(scores(), **change)
    with pytest.raises(ValueError, match="not the same experiment") as caught:
        admit(old, new, ())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(admit(old, new, [name])) == {name}
    assert name in gate(old, new, allowed=[name]).notes[0]


def test_what_moves_no_number_is_not_asked():
    assert differences(header(), header(strips=0, images="/elsewhere/photos")) == {}
    assert differences(header(), header(reinit=False)) == {}
    assert differences(header(methods=["a", "b"]), header(methods=["b", "a"])) == {}
    assert differences(header(seeds=[0, 1]), header(seeds=[1, 0])) == {"seeds": "[0, 1] against [1, 0]"}


def test_unknown_names_to_allow_are_refused():
    with pytest.raises(ValueError, match="--allow: unknown difference 'weigths'; did you mean weights"):
        admit(a_run(scores()), a_run(scores()), ["weigths"])


def test_stages_made_of_other_parameters_under_the_same_plan_are_findings():
    old = a_run(scores(), stages={"conv2": ["conv2.weight", "conv2.bias"]})
    new = a_run(scores(), stages={"conv2": ["conv2.weight"]})
    assert gate(old, old).verdict == "same"
    found = gate(old, new)
    assert (found.exit_code, found.cases[0].cells[-1]) == (
        1,
        "stage conv2 randomizes other parameters, such as conv2.bias",
    )
    stuck = a_run(scores(), unchanged_parameters={"0/cascading/1": ["conv2.weight"]})
    found = gate(a_run(scores()), stuck)
    assert found.cases[0].cells[-1] == "1 parameters no longer change when randomized, such as conv2.weight"


# --- the command


def store(folder, rows, looks_=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(rows, schema(Score), preserve_index=False), folder / "scores.parquet")
    (folder / "run.json").write_text(json.dumps(header(**changes)))
    if looks_ is not None:
        looks_.to_parquet(folder / "fingerprints.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("runs")
    rows = scores(lambda *key: 0.9 - 0.2 * STAGES.index(key[0]), methods=("gradient", "guided"))
    noisy = moved(rows, [0.3, -0.3] * 4)
    gone = rows["method"] == "guided"
    return {
        "old": store(tmp_path / "old", rows, looks(grids(0))),
        "new": store(tmp_path / "new", pd.concat([moved(rows[gone], -0.3), rows[~gone]]), looks(grids(0))),
        "noisy": store(tmp_path / "noisy", noisy, looks(grids(0))),
        "other": store(tmp_path / "other", rows, looks(grids(0)), samples=25),
    }


@pytest.mark.parametrize(
    ("runs", "flags", "code", "words"),
    [
        (("old", "old"), (), 0, "SAME: "),
        (("old", "new"), (), 1, "CHANGED: 1 changed"),
        (("old", "noisy"), (), 1, "INCONCLUSIVE: 2 inconclusive"),
        (("old", "noisy"), ("--inconclusive", "pass"), 0, "INCONCLUSIVE: 2 inconclusive"),
        (("old", "new"), ("--inconclusive=pass",), 1, "CHANGED"),
        (("old", "new"), ("--max-shift", ".4"), 0, "SAME"),
        (("old", "other"), ("--allow", "samples"), 0, "samples may differ and does: None against 25"),
    ],
)
def test_exit_codes(folders, capsys, runs, flags, code, words):
    assert main([*(folders[name] for name in runs), *flags]) == code
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give two runs, BASELINE and CURRENT, not 0"),
        (["old"], "give two runs"),
        (["old", "nowhere"], "holds no run"),
        (["old", "other"], "not the same experiment: samples: None against 25"),
        (["old", "old", "--max-shift", "1"], "--max-shift must be at least 0 and below 1, not 1.0"),
        (["old", "old", "--max-shift", "nan"], "--max-shift must be"),
        (["old", "old", "--inconclusive", "maybe"], "invalid choice: 'maybe'"),
        (["old", "old", "--bogus"], "unrecognized arguments: --bogus"),
        (["--verdicts", "old"], "--verdicts RUN takes --expect"),
        (["--verdicts", "old", "--expect", "gradient"], "'gradient' must read METHOD=pass"),
        (["--verdicts", "old", "--expect", "gradient=good"], "must read METHOD=pass"),
        (["--verdicts", "old", "--expect", "gradent=pass"], "unknown method 'gradent'; did you mean gradient"),
        (["--verdicts", "old", "--expect", "gradient:sim=pass"], "unknown similarity 'sim'; did you mean ssim"),
    ],
)
def test_unusable_input_is_one_line_and_code_2(folders, capsys, arguments, words):
    assert main([folders.get(word, word) for word in arguments]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert (told.err.count("\n"), told.out) == (1, "")


def test_an_unfinished_or_broken_run_is_refused(folders, capsys, tmp_path):
    unfinished = store(tmp_path / "half", scores(), status="running")
    assert main([folders["old"], unfinished]) == 2
    assert "holds an unfinished run (status 'running')" in capsys.readouterr().err
    (tmp_path / "half" / "run.json").write_text(json.dumps(header()))
    (tmp_path / "half" / "scores.parquet").write_bytes(b"PAR1")
    assert main([folders["old"], unfinished]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_the_table_names_the_method_the_shift_and_the_first_stage(folders, capsys):
    main([folders["old"], folders["new"]])
    line = next(line for line in capsys.readouterr().out.splitlines() if "guided, ssim" in line)
    assert line.split("  ")[-1] == "1 of 4, first conv2"
    assert "-0.30 [-0.30, -0.30]" in line


def test_junit_counts_failures_and_holds_the_curve(folders, tmp_path):
    file = tmp_path / "gate.xml"
    main([folders["old"], folders["new"], "--junit", str(file)])
    root = ElementTree.parse(file).getroot()
    suites = {suite.get("name"): suite for suite in root}
    assert set(suites) == {"net, cascading", f"net, {MAPS}"}
    assert {k: suites["net, cascading"].get(k) for k in ("tests", "failures", "skipped")} == {
        "tests": "2", "failures": "1", "skipped": "0",
    }  # fmt: skip
    (failure,) = root.iter("failure")
    assert failure.get("type") == "changed"
    assert failure.get("message") == "guided, ssim: -0.30 [-0.30, -0.30], conv2, 1 of 4, first conv2"
    assert [line.split()[0] for line in failure.text.splitlines()] == ["stage", *STAGES]


@pytest.mark.parametrize(("choice", "tag"), [("fail", "failure"), ("pass", "skipped")])
def test_junit_tells_the_inconclusive_as_the_exit_code_does(folders, tmp_path, choice, tag):
    file = tmp_path / "gate.xml"
    main([folders["old"], folders["noisy"], "--junit", str(file), "--inconclusive", choice])
    root = ElementTree.parse(file).getroot()
    assert len(list(root.iter(tag))) == 2
    assert [suite.get("skipped") for suite in root] == ["2" if tag == "skipped" else "0", "0"]


def test_markdown_is_appended_and_its_table_is_whole(folders, tmp_path):
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    main([folders["old"], folders["new"], "--markdown", str(file)])
    text = file.read_text()
    assert text.startswith("before\n### CHANGED: 1 changed, ")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert "guided, ssim" in table[-1]


def test_json_is_all_there_is_on_stdout_and_strict(folders, capsys):
    assert main([folders["old"], folders["noisy"], "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (found["verdict"], found["exit_code"], found["findings"]) == ("inconclusive", 1, [])
    assert {group["stage"] for group in found["groups"]} == set(STAGES)
    assert {"shift", "low", "high", "q", "n", "verdict"} <= set(found["groups"][0])


def test_strange_names_do_not_break_what_is_written():
    case = Case("net | <b>", "a\x00b & \ud800|`x`", "changed", ("1", "2\n3", "x]]>"), "details \x1b[0m & <tag>")
    made = Outcome("t", ("a", "b", "c"), [case])
    (failure,) = ElementTree.fromstring(made.to_junit().encode()).iter("failure")
    assert failure.text == "details [0m & <tag>"
    row = made.to_markdown().splitlines()[4]
    assert row.replace("\\|", "").count("|") == 7
    assert "2 3" in row


def test_long_tables_are_cut_and_counted():
    cases = [Case("s", f"case {i}", "inconclusive" if i < 50 else "changed", ("x",)) for i in range(60)]
    told = Outcome("t", ("a",), cases).to_terminal().splitlines()
    assert len(told) == 2 + 40 + 1
    assert (told[2].split()[:3], told[-1]) == (["s", "case", "50"], "and 20 more")


# --- verdicts


@pytest.fixture
def judged():
    """gradient passes and guided fails by spearman_abs; by ssim both fail."""

    def value(stage, method, similarity, seed, image):
        if stage == "trained":
            return 1.0
        noise = 0.01 * IMAGES.index(image)
        return noise + (0.8 if method == "guided" or (similarity == "ssim" and method == "gradient") else 0.0)

    return scores(value, methods=("gradient", "guided", "random"), similarities=("ssim", "spearman_abs"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("gradient=pass,guided=fail", 0),
        ("gradient:ssim=fail,gradient=pass", 0),
        ("gradient=fail", 1),
        ("gradient:ssim=pass", 1),
        ("guided=inconclusive", 1),
    ],
)
def test_verdicts_against_what_is_expected(judged, text, code):
    assert expect(a_run(judged), text).exit_code == code


def test_the_plain_form_judges_by_spearman_abs_or_by_the_only_similarity(judged):
    (case,) = expect(a_run(judged), "gradient=pass").cases
    assert case.name == "gradient, spearman_abs"
    (case,) = expect(a_run(judged[judged["similarity"] == "ssim"]), "gradient=fail").cases
    assert case.name == "gradient, ssim"


def test_an_inconclusive_verdict_is_told_apart_from_a_wrong_one(judged):
    few = a_run(judged[judged["image"].isin(IMAGES[:2])])
    assert expect(few, "gradient=pass").verdict == "inconclusive"
    assert expect(few, "gradient=pass").exit_code == 1
    assert expect(few, "gradient=pass", tolerant=True).exit_code == 0
    assert expect(few, "gradient=inconclusive").exit_code == 0


def test_verdict_command_tells_the_reason(judged, tmp_path, capsys):
    folder = store(tmp_path / "run", judged)
    assert main(["--verdicts", folder, "--expect", "gradient=fail", "--junit", str(tmp_path / "v.xml")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("NOT AS EXPECTED: 1 not as expected of 1")
    assert "judged at conv1" in out
    assert len(list(ElementTree.parse(tmp_path / "v.xml").getroot().iter("failure"))) == 1


def test_a_run_without_a_verdict_is_refused(judged):
    with pytest.raises(ValueError, match="has no verdict: no order in it ends with all weights random"):
        expect(a_run(judged.assign(order="independent")), "gradient=pass")


def test_help_states_what_counts_as_changed(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "Benjamini and Hochberg" in said
    assert "Exit code: 0 the same, 1 changed" in said


# --- no torch


def test_two_stored_runs_are_gated_where_there_is_no_torch(folders):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from sanity.gate import main\n"
        f"code = main([{folders['old']!r}, {folders['new']!r}])\n"
        "heavy = {'matplotlib', 'sklearn', 'captum', 'jsonargparse', 'torchvision'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 10 + code)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (11, "")


# --- planted faults, of which benchmarks/gate_confusion.py has more


@pytest.fixture(scope="module")
def bench():
    path = Path(__file__).parents[1] / "benchmarks" / "gate_confusion.py"
    spec = importlib.util.spec_from_file_location("gate_confusion", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gate_confusion"] = module
    spec.loader.exec_module(module)
    network, pixels, _ = module.trained(epochs=1)
    chosen = {name: module.SOUND[name] for name in ("smoothgrad", "cam", "scaled")}
    made = module.Bench(network, pixels[:8], chosen)
    return module, made, made.run(seeds=(0,))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("half the samples", "smoothgrad"),
        ("resize flipped", "cam"),
        ("maps scaled over the batch", "scaled"),
        ("one stage skipped", "cells"),
    ],
)
def test_a_planted_fault_is_seen_and_nothing_else_is_blamed(bench, name, method):
    module, made, sound = bench
    fault = next(fault for fault in module.FAULTS if fault.name == name)
    found = gate(sound, made.run(fault, seeds=(0,)))
    blamed = {
        case.name.split(",")[0] if case.suite != "cells" else "cells"
        for case in found.cases
        if case.verdict == "changed"
    }
    assert (found.verdict, blamed) == ("changed", {method})


def test_other_noise_in_other_batches_changes_nothing(bench):
    _, made, sound = bench
    found = gate(sound, made.run(seeds=(7, 0), batch_size=5), allowed=["seeds"])
    assert found.verdict != "changed"
    assert "only seeds 0 are compared" in found.notes


def test_cells_are_what_the_issue_pairs_by():
    assert set(CELL) == {"model", "order", "stage", "method", "similarity", "image", "seed"}
