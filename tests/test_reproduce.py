"""The benchmarks of the published experiments: their plans, their comparison, their error rates."""

from __future__ import annotations

import importlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sanity.cli import parse, plan_of, with_preset
from sanity.experiment import Training
from sanity.session import parser

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="installed without benchmarks")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reproduce

    return reproduce


def experiment_of(bench: Any, model: str = "cnn", images: int = 10, permuted: bool = True) -> Any:
    true, other = (Training(Path("work"), Path("idx"), "mnist", model, kind) for kind in ("true", "permuted"))
    return bench.Experiment(true, other if permuted else None, images, 2, Path("work"))


def plan_for(bench: Any, model: str = "cnn", images: int = 10, permuted: bool = True) -> Any:
    one = experiment_of(bench, model, images, permuted)
    return plan_of(parse(parser(), with_preset(one.words(), "quick")))


def test_an_experiment_is_the_released_codes_plan(bench: Any) -> None:
    plan = plan_for(bench)
    assert plan.fresh_noise
    assert (plan.redraw, plan.reinit, plan.target, plan.limit, plan.samples) == (True, "module", "repredicted", 10, 50)
    assert plan.orders == ("cascading", "independent", "data")
    assert set(bench.cells()["method"]) <= set(plan.methods)
    assert set(bench.cells()["similarity"]) <= set(plan.similarities)
    assert plan.seeds == (0, 1)
    assert plan_for(bench, permuted=False).orders == ("cascading", "independent")


def test_what_cannot_be_had_is_left_out(bench: Any) -> None:
    assert not {"gradcam", "guided_gradcam"} & set(plan_for(bench, "mlp").methods)
    assert bench.COSTLY in plan_for(bench).methods
    assert bench.COSTLY not in plan_for(bench, images=200).methods


def rows_at(value: float, spread: float) -> pd.DataFrame:
    """Four images of the CNN's gradient after the logits, alternating around a mean."""
    shared = {"model": "mnist_cnn", "order": "cascading", "stage_index": 1, "stage": "softmax_linear", "seed": 0}
    found = pd.DataFrame({"image": list("abcd"), "value": value + spread * np.array([1, -1, 1, -1.0])})
    return found.assign(
        **shared, method="gradient", similarity="spearman_abs", status="ok", target=0, data="mnist", net="cnn"
    )


def test_cells_are_compared_in_standard_deviations_over_images(bench: Any) -> None:
    (cell,) = bench.compared(rows_at(0.5, 0.05)).itertuples()
    assert (cell.published, cell.method, cell.stage) == (0.601, "gradient", "softmax_linear")
    np.testing.assert_allclose([cell.reproduced, cell.difference, cell.std], [0.5, 0.5 - 0.601, 0.05], rtol=1e-12)
    np.testing.assert_allclose(cell.deviations, 0.101 / 0.05, rtol=1e-9)
    assert "outside two" in bench.markdown(bench.compared(rows_at(0.5, 0.05)))
    assert "1 of 1 cells within two" in bench.markdown(bench.compared(rows_at(0.5, 0.06)))


def test_networks_that_nothing_was_published_of_have_no_cells(bench: Any) -> None:
    assert bench.compared(rows_at(0.5, 0.1).assign(data="fashion-mnist")).empty


def test_a_training_is_asked_for_once_and_the_longest_first(bench: Any) -> None:
    made = {
        (model, kind): Training(Path("work"), Path("idx"), "mnist", model, kind)
        for model in ("mlp", "cnn")
        for kind in ("true", "permuted")
    }
    chosen = [
        bench.Experiment(made[model, "true"], made[model, "permuted"], images, 1, Path("work"))
        for model in ("mlp", "cnn")
        for images in (10, 200)
    ]
    order = [(one.model, one.labels) for one in bench.trainings(chosen)]
    assert order == [("cnn", "permuted"), ("mlp", "permuted"), ("cnn", "true"), ("mlp", "true")]


def test_an_experiment_runs_as_soon_as_its_networks_are_there(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    slow, quick = Event(), experiment_of(bench, "mlp")

    def ensure(one: Training) -> None:
        if one.model == "cnn":
            assert slow.wait(60)
        done.append(one.folder.name)

    def ran(one: Any) -> int:
        done.append(one.output.name)
        slow.set()
        return 2 if one.true.model == "cnn" else 0

    monkeypatch.setattr(bench, "processes", ThreadPoolExecutor)
    monkeypatch.setattr(bench, "ran", ran)
    monkeypatch.setattr(Training, "ensure", ensure)
    assert bench.carried_out([quick], 3)
    done.clear()
    slow.clear()
    assert not bench.carried_out([experiment_of(bench, "cnn"), quick], 3)
    assert done.index("run_mnist_mlp_0_10") < done.index("mnist_cnn_true_0") < done.index("run_mnist_cnn_0_10")
    monkeypatch.setattr(Training, "ensure", lambda one: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench.carried_out([quick], 3)


def test_every_command_that_did_a_part_is_kept(bench: Any, tmp_path: Path) -> None:
    bench.Log(tmp_path, bench.Clock())  # killed before its end
    bench.Log(tmp_path, bench.Clock()).close()
    killed, ended = bench.Log(tmp_path, bench.Clock()).commands[:-1]
    assert (killed["seconds"], set(killed)) == (None, {"command", "started", "seconds"})
    assert ended["seconds"] >= 0
    words = bench.times([], [], [killed, {**ended, "seconds": 90.0}])
    assert re.search(r"`, \S+ \| stopped \|", words)
    assert "| 1.5 |" in words


def test_inceptions_points_stand_beside_the_stored_run(bench: Any) -> None:
    found = bench.inception_compared()
    assert len(found) == len(bench.inception())
    assert found[["mean", "low", "high"]].notna().all(axis=None)


def test_verdicts_of_planted_explainers_are_counted(bench: Any) -> None:
    import verdict_errors

    said = [("gradient", "pass"), ("gradient", "fail"), ("edges", "inconclusive"), ("random", "uninformative")]
    said.append(("random", "inconclusive"))
    found = pd.DataFrame(said, columns=["method", "verdict"]).assign(similarity="ssim")
    table = verdict_errors.errors(found).query("similarity == 'ssim'").set_index("method")
    assert table[["right", "wrong", "missed"]].to_numpy().tolist() == [[0.5, 0.5, 0], [0, 0, 1], [0.5, 0, 0.5]]
    one = verdict_errors.judged(0, 5, 2).set_index(["method", "similarity"])["verdict"]
    assert set(one["edges"]) == set(one["headless"]) == {"fail"}
    assert set(one["random"]) == {"uninformative"}


@pytest.mark.usefixtures("bench")
def test_a_path_is_said_to_pass_a_published_value_or_how_near_it_comes() -> None:
    from reasons import PASSES, passing

    assert passing([0.1, 0.5, 0.4], 0.45) == PASSES
    assert "no nearer to the published 0.60 than 0.50" in passing([0.1, 0.5, 0.4], 0.6)


@pytest.fixture
def measured(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reasons with tables of their own: a cascade with and without decay, and permuted labels being learnt."""
    import reasons

    length = {"decay": [0.001] * 3 + [0.0] * 3, "method": "gradient", "stage": "softmax_linear"}
    pd.DataFrame(length | {"mean": [0.1, 0.5, 0.7, 0.1, 0.2, 0.2]}).to_csv(tmp_path / "length.csv", index=False)
    path = {"method": "gradient", "similarity": "spearman_abs", "epoch": [-1, 0, 5], "mean": [0.3, 0.31, 0.4]}
    pd.DataFrame(path).to_csv(tmp_path / "memorising.csv", index=False)
    monkeypatch.setattr(reasons, "LENGTH", tmp_path / "length.csv")
    monkeypatch.setattr(reasons, "MEMORISING", tmp_path / "memorising.csv")
    return reasons


def test_a_cell_outside_is_told_with_what_was_measured_of_it(bench: Any, measured: Any) -> None:
    rows = rows_at(0.5, 0.05)
    assert measured.reasons(bench.compared(rows_at(0.5, 0.06)), {}) == ""
    words = measured.reasons(bench.compared(rows), {"mnist cnn": rows})
    assert "with weight decay 0.10, 0.50, 0.70 after 0, 1, ... epochs, which passes the published value" in words
    assert "without weight decay 0.10, 0.20, 0.20 after 0, 1, ... epochs, which comes no nearer" in words
    other = rows.assign(stage="fc1")
    assert "nothing was measured of it" in measured.reasons(bench.compared(other), {"mnist cnn": other})


def test_the_data_test_is_told_with_what_was_learnt_and_what_it_started_from(bench: Any, measured: Any) -> None:
    rows = rows_at(0.5, 0.05).assign(order="data", stage="permuted labels")
    words = measured.reasons(bench.compared(rows), {"mnist cnn": rows})
    assert "0.30 between two networks that were never trained, and 0.31, 0.40" in words
    assert "which comes no nearer to the published 0.16 than 0.30" in words
    assert "started from the same weights" not in words
    both = pd.concat([rows, rows.assign(seed=1000, value=rows["value"] - 0.2)])
    words = measured.reasons(bench.compared(rows), {"mnist cnn": both})
    assert "0.50 where both networks started from the same weights, 0.30 where they did not" in words


@pytest.mark.parametrize(("name", "parts"), [("breakdown", "WATCHED"), ("paper_grid", "PARTS")])
def test_what_a_profile_watches_is_there(monkeypatch: pytest.MonkeyPatch, name: str, parts: str) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module(name)
    for owner, function, _ in getattr(benchmark, parts):
        assert callable(getattr(owner, function))
