"""One image, one method: what is printed, what is written, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanity import explain, models

MASKS = {"perturbed", "heatmap", "mask", "overlay"}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    from sanity import images

    path = tmp_path / "photo.png"
    images.find("bundled", limit=1).pictures[0].open().save(path)
    return path


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem.removeprefix("photo_"): np.asarray(Image.open(path)) for path in folder.glob("photo_*.png")}


def test_a_mask_is_told_and_drawn(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "here"
    assert explain.main([str(photo), "--method", "meaningful_perturbation:steps=20", "--output", str(out)]) == 0
    told = capsys.readouterr().out
    before = float(re.search(r"Category with highest probability: .* ([\d.]+)%\n", told)[1])
    deleted, after = map(float, re.search(r"After masking ([\d.]+)% of the picture: .* ([\d.]+)%;", told).groups())
    assert after < before
    found = pictures(out)
    assert set(found) == MASKS
    assert {one.shape[:2] for one in found.values()} == {(224, 224)}
    # The mask's picture is the mask: white keeps, and what it keeps is the photograph.
    assert 100 - found["mask"].mean() / 2.55 == pytest.approx(deleted, abs=0.3)
    kept = found["mask"] == 255
    preprocess = models.load("efficientnet_lite0").preprocess
    want = (preprocess.unscaled(preprocess(Image.open(photo))) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.abs(found["perturbed"].astype(int) - want)[kept].max(initial=0) <= 1


def test_every_other_method_is_a_heat_map(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain.main([str(photo), "--method", "gradcam", "--output", str(tmp_path), "--target", "3"]) == 0
    assert "Explained category: " in capsys.readouterr().out
    assert set(pictures(tmp_path)) == {"", "heatmap", "overlay"} - {""} | ({"photo"} & set(pictures(tmp_path)))


def test_masks_are_compact_unless_the_user_says_otherwise() -> None:
    assert explain.find("meaningful_perturbation").options["l1"] == 0.0008
    assert explain.find("meaningful_perturbation").options["steps"] == 100
    found = explain.find("meaningful_perturbation:steps=7,l1=0.5").options
    assert (found["steps"], found["l1"], found["mask_blur"]) == (7, 0.5, 3.0)
    assert explain.find("smoothgrad:samples=3").options["samples"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["PHOTO", "--method", "gradcan"], "did you mean gradcam"),
        (["PHOTO", "--method", "meaningful_perturbation:stepps=3"], "no option 'stepps'"),
        (["PHOTO", "--target", "1000"], "--target 1000: the network has 1000 classes"),
        (["FOLDER"], "is a folder"),
        (["BROKEN"], "bad picture"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    places = {"PHOTO": str(photo), "FOLDER": str(tmp_path), "BROKEN": str(tmp_path / "broken.png")}
    out = tmp_path / "out"
    assert explain.main([*(places.get(word, word) for word in arguments), "--output", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1
    assert not out.exists()


def test_the_macaque_goes_and_the_picture_stays(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shared / "photos" / "macaque.jpg"
    assert explain.main([str(path), "--method", "meaningful_perturbation", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    name, before = re.search(r"Category with highest probability: (.*) ([\d.]+)%\n", told).groups()
    deleted, after = map(float, re.search(rf"After masking ([\d.]+)% of the picture: {name} ([\d.]+)%;", told).groups())
    assert name == "macaque"
    assert float(before) > 50
    assert after < 5
    assert deleted < 25
