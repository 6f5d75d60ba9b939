"""The published picture on a real trained Inception v3. Needs the real data; minutes of work."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sanity import models
from sanity.run import main

pytestmark = pytest.mark.slow


@pytest.fixture
def chess(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    folder = shared / "inception_v3_chess"
    if not folder.is_dir():
        pytest.skip(f"no trained Inception v3 at {folder}")
    monkeypatch.chdir(tmp_path)
    weights = folder / "inception_v3_chess.pth"
    return ["--model", "inception_v3", "--weights", str(weights), "--images", str(folder / "photos"), "--strips", "0"]


def test_guided_backprop_survives_the_higher_layers_and_the_gradient_does_not(chess: list[str]) -> None:
    methods = ["--methods", "gradient", "guided_backprop", "--similarities", "spearman_abs"]
    assert main([*chess, *methods, "--limit", "6", "--output", "out"]) == 0
    table = pd.read_csv("out/summary.csv").pivot_table(index="method", columns="stage", values="mean", sort=False)
    guided, gradient = table.loc["guided_backprop"], table.loc["gradient"]
    assert list(table.columns) == ["trained", "Logits", *models.INCEPTION_BLOCKS]
    assert (guided[["Logits", "Mixed_7c", "Mixed_7b", "Mixed_7a", "Mixed_6e"]] > 0.9).all()
    assert guided["Conv2d_1a_3x3"] < 0.2
    assert (gradient.drop("trained") < 0.6).all()


def test_the_article_preset_prints_class_and_probability_at_every_stage(
    chess: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--preset", "article", *chess, "--methods", "gradient", "--limit", "1", "--output", "out"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "bishop_00000000: class" in line]
    assert [line.split()[2] for line in lines] == ["trained", "Logits", *models.INCEPTION_BLOCKS]
