from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sanity import images, models
from sanity.engine import predict
from sanity.models import Preprocessing

EXPECTED = {
    "coffee": ("espresso", 0.957),
    "camera": ("tripod", 0.944),
    "stereo_motorcycle": ("moped", 0.582),
    "chelsea": ("tiger cat", 0.379),
    "rocket": ("missile", 0.364),
    "china": ("palace", None),
    "flower": ("daisy", None),
}


def test_the_bundled_network_recognises_the_bundled_photographs() -> None:
    classifier = models.load("efficientnet_lite0")
    pictures = images.bundled()
    probabilities = predict(classifier.network.eval(), pictures.load(classifier.preprocess), 8).softmax(1)
    for name, row in zip(pictures.ids, probabilities, strict=True):
        word, sure = EXPECTED[name]
        assert classifier.class_name(int(row.argmax())) == word
        assert sure is None or float(row.max()) == pytest.approx(sure, abs=6e-4)


def test_the_real_inception_recognises_its_photographs(shared: Path) -> None:
    folder = shared / "inception_v3_chess"
    classifier = models.load("inception_v3", str(folder / "inception_v3_chess.pth"))
    pieces = ["bishop", "king", "knight", "pawn", "queen", "rook"]
    pictures = images.folder(folder / "photos", limit=4)
    top1 = predict(classifier.network.eval(), pictures.load(classifier.preprocess), 4).argmax(1)
    assert [pieces[int(i)] for i in top1] == [name.split("_")[0] for name in pictures.ids]
    assert {p.dtype for p in classifier.network.parameters()} == {torch.float32}
    assert classifier.class_name(3) == "class 3"


def tiny() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    network.preprocess = Preprocessing(16, 12)
    return network


@pytest.fixture
def small(tmp_path: Path) -> tuple[models.Architecture, dict[str, torch.Tensor], Path]:
    """mobilenet_v2 with 5 classes: its state, and where a test may save it."""
    entry = next(m for m in models.MODELS if m.name == "mobilenet_v2")
    return entry, entry.build(5).state_dict(), tmp_path / "weights.pth"


def test_the_number_of_classes_follows_the_file(small: tuple[models.Architecture, dict, Path]) -> None:
    _, state, path = small
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    classifier = models.load("mobilenet_v2", str(path))
    assert classifier.network.classifier[1].out_features == 5
    assert classifier.trained
    assert classifier.weights == "file weights.pth"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_is_cast(small: tuple[models.Architecture, dict, Path], suffix: str) -> None:
    _, state, path = small
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    path = path.with_suffix(suffix)
    (save_file if suffix == ".safetensors" else torch.save)(half, path)
    network = models.load("mobilenet_v2", str(path)).network
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert torch.equal(network.classifier[1].weight, state["classifier.1.weight"].half().float())


def test_random_weights_say_so() -> None:
    first, second = (models.load("mobilenet_v2", "random") for _ in range(2))
    assert not first.trained
    assert first.weights == "untrained: random weights"
    assert first.weights_sha256 == second.weights_sha256


def refused(path: Path, name: str = "mobilenet_v2") -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (each caller matches its words)
        models.load(name, str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architectures_weights_are_refused_by_key(small: tuple[models.Architecture, dict, Path]) -> None:
    _, state, path = small
    torch.save(state, path)
    assert "is not for resnet50: it has no fc.weight" in refused(path, "resnet50")
    torch.save({k.replace("features.3.", "features.x."): v for k, v in state.items()}, path)
    words = refused(path)
    assert "missing (such as features.3.conv.0.0.weight)" in words
    assert "unknown (such as features.x.conv.0.0.weight)" in words
    torch.save({**state, "features.0.0.weight": torch.zeros(1)}, path)
    assert "1 of another shape (such as features.0.0.weight)" in refused(path)


def test_weights_with_nan_are_refused(small: tuple[models.Architecture, dict, Path]) -> None:
    _, state, path = small
    torch.save({**state, "features.0.0.weight": state["features.0.0.weight"] * float("nan")}, path)
    assert "hold NaN or infinity in features.0.0.weight (1 tensors)" in refused(path)


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Bomb()}, "bomb.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pth", "plain.pth"):
        assert f"cannot read weights {name}" in refused(Path(name))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not weights"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_holds_no_weights_is_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    assert f"cannot read weights {path}" in refused(path)
    assert f"no weights file {tmp_path / 'gone'}" in refused(tmp_path / "gone")


def test_weights_that_cannot_be_fetched_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib import request
    from urllib.error import URLError

    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"no weights for resnet50: .*resnet50-0676ba61\.pth.*--weights FILE"):
        models.load("resnet50")


def test_an_unknown_model_is_answered_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match="unknown model 'inceptionv3'; did you mean inception_v3"):
        models.load("inceptionv3")


def test_any_torchvision_classifier_has_a_head_and_preprocessing() -> None:
    classifier = models.load("squeezenet1_1", "random")
    assert classifier.preprocess == Preprocessing(256, 224)
    assert classifier.stages == {}


@pytest.mark.parametrize("name", ["regnet_y_400mf", "swin_t", "vit_b_32", "densenet121", "googlenet", "alexnet"])
def test_the_head_of_any_classifier_is_its_last_layer(name: str) -> None:
    head = models._other(name).head
    last = {"swin_t": "head", "vit_b_32": "heads.head", "densenet121": "classifier", "alexnet": "classifier.6"}
    assert head == last.get(name, "fc")


def test_a_factory_brings_its_own_weights_and_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = models.load("tests.test_models:tiny")
    assert classifier.preprocess == Preprocessing(16, 12)
    assert classifier.trained
    with pytest.raises(ValueError, match=r"cannot load 'tests\.test_models:gone'"):
        models.load("tests.test_models:gone")
    with pytest.raises(ValueError, match=r"gave a dict, not a torch.nn.Module"):
        models.load("tests.test_models:EXPECTED")
    with pytest.raises(ValueError, match="makes its own weights"):
        models.load("tests.test_models:tiny", "random")


def test_a_network_with_nan_is_refused() -> None:
    network = tiny()
    with torch.no_grad():
        network[0].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in 0\.bias"):
        models.of_network(network)


def test_the_digest_sees_every_bit() -> None:
    network = tiny()
    before = models.digest(network)
    with torch.no_grad():
        network[4].bias[0] = torch.nextafter(network[4].bias[0], torch.tensor(9.0))
    assert models.digest(network) != before


@pytest.mark.parametrize("size", [(1, 1), (30, 500), (299, 299)])
def test_preprocessing_takes_any_size(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (127, 127, 127))
    pixels = Preprocessing(342, 299, (0.5,) * 3, (0.5,) * 3)(picture)
    assert pixels.shape == (3, 299, 299)
    np.testing.assert_allclose(pixels.numpy(), 127 / 127.5 - 1, atol=1e-6)


def test_a_torchvision_of_another_build_is_explained(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    program = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        from sanity.run import main
        sys.exit(main([]))
        """
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "operator torchvision::nms does not exist" in done.stderr
    assert "pip install --force-reinstall torch torchvision" in done.stderr
    assert "Traceback" not in done.stderr


def test_squashing_keeps_the_whole_picture() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :2] = 255
    squashed = Preprocessing(20, 20, (0.0,) * 3, (1.0,) * 3, squash=True)(Image.fromarray(pixels))
    want = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.LANCZOS)) / 255
    np.testing.assert_allclose(squashed.permute(1, 2, 0).numpy(), want, atol=1e-6)
    assert Preprocessing(20, 20, (0.0,) * 3, (1.0,) * 3)(Image.fromarray(pixels)).max() == 0
    with pytest.raises(ValueError, match="--squash: the preprocessing of Sequential is its own"):
        models.of_network(tiny()).squashing()
