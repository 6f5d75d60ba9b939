"""`--test` and `--data` of a run: what they stand for, what they train, what they refuse."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from sanity import experiment, training
from sanity.experiment import PRESETS, Training, spelt_out
from sanity.networks import NETWORKS
from sanity.run import main
from sanity.stored import read_rows


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """IDX files of bright squares whose place is their class: 120 training images, 12 test images."""
    folder, draws = tmp_path / "idx", np.random.default_rng(0)
    folder.mkdir()
    for split, count in (("train", 120), ("t10k", 12)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = draws.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for picture, label in zip(pixels, labels, strict=True):
            picture[5 * (label // 4) : 5 * (label // 4) + 6, 6 * (label % 4) : 6 * (label % 4) + 6] = 255
        for values, name in ((pixels, "images-idx3"), (labels, "labels-idx1")):
            head = np.array([0, 0, 8, values.ndim], np.uint8).tobytes() + np.array(values.shape, ">i4").tobytes()
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of one epoch, for their files and not for what they reach."""
    monkeypatch.setattr(training, "VALIDATION", 20)
    monkeypatch.setattr(training, "FAST", {key: {"epochs": 1} for key in training.FAST})


def test_arguments_without_these_flags_stay_as_they_are() -> None:
    words = ["--model", "cnn", "--seeds", "1", "2", "--data-driven", "--orders=data"]
    assert spelt_out(words) == (words, ())


def test_data_stands_for_model_images_weights_and_preset(digits: Path, tmp_path: Path) -> None:
    given = ["--data", "mnist", "--data-dir", str(digits), "--networks", str(tmp_path / "kept")]
    words, (made,) = spelt_out([*given, "--seeds", "3"])
    true, permuted = (str(tmp_path / "kept" / f"mnist_cnn_{kind}_0/model.safetensors") for kind in ("true", "permuted"))
    start = ["--preset", "as-released-mnist", "--model", "mnist_cnn", "--images", str(digits)]
    assert words == [*start, "--weights", true, "--seeds", "3"]
    assert made == Training(tmp_path / "kept", digits, "mnist", "cnn", "true")
    words, pair = spelt_out([*given, "--test=data"])
    assert words == [*start, "--orders", "data", "--weights", true, "--against", permuted]
    assert [one.labels for one in pair] == ["true", "permuted"]


def test_a_users_own_flags_win(digits: Path, tmp_path: Path) -> None:
    given = ["--test", "data", "--data", "mnist", "--data-dir", str(digits), "--weights", "A", "--against=B"]
    words, trainings = spelt_out([*given, "--preset", "paper"])
    assert trainings == ()
    assert words.count("--weights") == words.count("--preset") == 1
    assert words[-4:] == ["A", "--against=B", "--preset", "paper"]


def test_an_mlp_has_no_gradcam(digits: Path, tmp_path: Path) -> None:
    given = ["--data", "mnist", "--data-dir", str(digits), "--model", "mlp"]
    words, _ = spelt_out(given)
    assert "gradient" in words
    assert not {"gradcam", "guided_gradcam"} & set(words)
    assert "--methods" not in spelt_out([*given[:-1], "cnn"])[0]
    assert spelt_out([*given, "--methods", "edges"])[0].count("--methods") == 1
    for preset in PRESETS:
        words, _ = spelt_out([*given, "--preset", preset])
        assert "gradient" in words
        assert "gradcam" not in words
    assert "--methods" not in spelt_out([*given, "--preset", "quick"])[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--test", "labels"], "unknown test 'labels'; known: parameters, data"),
        (["--test"], "--test needs a value"),
        (["--data", "--model", "cnn"], "--data needs a value"),
        (["--data", "minst"], "unknown data 'minst'; did you mean mnist"),
        (["--data", "mnist", "--model", "resnet50"], "--data mnist goes with --model cnn or mlp, not resnet50"),
        (["--networks", "x"], "--networks goes with --data NAME"),
        (["--data-dir", "x"], "--data-dir goes with --data NAME"),
        (["--test", "data"], "--test data needs a network trained on permuted labels: --data NAME --model NAME"),
        (["--test", "data", "--orders", "cascading"], "--test data is --orders data; give one of the two"),
        (["--data", "mnist", "--data-dir", "nowhere"], "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert complaint in told
    assert len(told.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("short")
def test_what_is_refused_is_refused_before_any_training(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    words = ["--data", "mnist", "--data-dir", str(digits), "--networks", str(kept), "--methods", "gradiant"]
    assert main(words) == 2
    assert "did you mean gradient" in capsys.readouterr().err
    assert not kept.exists()


@pytest.mark.usefixtures("short")
def test_the_data_test_trains_what_is_missing_once_and_runs(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, output = tmp_path / "kept", tmp_path / "run"
    words = ["--test", "data", "--data", "mnist", "--data-dir", str(digits), "--networks", str(kept)]
    words += ["--methods", "gradient", "edges", "--limit", "4"]
    assert main([*words, "--output", str(output)]) == 0
    assert "training mnist cnn on permuted labels" in capsys.readouterr().err
    rows = read_rows(output / "scores.parquet")
    assert set(rows["order"]) == {"data"}
    assert set(rows["stage"]) == {"trained", "permuted labels"}
    readings = {"spearman_abs", "spearman"}
    assert set(rows["similarity"]) == readings | {f"{one}_foreground" for one in readings}
    header = json.loads((output / "run.json").read_text())
    assert header["plan"]["against"] == str(kept / "mnist_cnn_permuted_0" / "model.safetensors")
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    assert main([*words, "--output", str(tmp_path / "again")]) == 0
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert "training mnist" not in capsys.readouterr().err


@pytest.mark.usefixtures("short")
def test_a_finished_training_is_taken_and_another_ones_is_not(digits: Path, tmp_path: Path) -> None:
    made = Training(tmp_path / "kept", digits, "mnist", "mlp", "true")
    made.ensure()
    header = json.loads((made.folder / "train.json").read_text())
    header["recipe"]["epochs"] = 99
    (made.folder / "train.json").write_text(json.dumps(header))
    made.ensure()  # of another recipe, but finished
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    packed = other / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(gzip.decompress(packed.read_bytes())[:-1] + b"\x07"))
    with pytest.raises(ValueError, match="trained on other images than those in"):
        Training(made.root, other, "mnist", "mlp", "true").ensure()
    for nonsense in ([], {}, {"recipe": []}):
        (made.folder / "train.json").write_text(json.dumps(nonsense))
        with pytest.raises(ValueError, match="is no training's manifest"):
            made.ensure()
    header["recipe"]["seed"] = 5
    (made.folder / "train.json").write_text(json.dumps(header))
    with pytest.raises(ValueError, match="holds another training"):
        made.ensure()


def test_networks_are_kept_beside_torchs_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert experiment.cache() == tmp_path / "saliency_sanity"


def test_another_kind_of_network_is_refused_before_anything_is_written(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true, other = tmp_path / "true.safetensors", tmp_path / "other.safetensors"
    for kind, path in (("cnn", true), ("mlp", other)):
        save_file(NETWORKS[kind](10).state_dict(), path)
    words = ["--test", "data", "--model", "mnist_cnn", "--weights", str(true), "--against", str(other)]
    words += ["--images", str(digits), "--limit", "2", "--methods", "gradient", "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "other.safetensors is not for this network: for " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
