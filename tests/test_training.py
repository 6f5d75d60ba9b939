"""The small classifiers: architecture, initialisers, labels, the loop, checkpoints, the command line."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.attr import LRP
from PIL import Image
from scipy.stats import kstest, truncnorm
from sklearn.datasets import load_digits
from torch import nn
from torch.testing import assert_close

from sanity import models, training
from sanity.networks import CNN, CNN_STAGES, MLP, MLP_STAGES, NETWORKS, Greyscale, untrained
from sanity.randomization import Draws, randomized, reinitialiser
from sanity.stages import written_out
from sanity.train import TrainingFolder, main
from sanity.training import DataSet, Recipe, Split, accuracy, begin, load_data, permuted, recipe, train, with_labels

DEVIATIONS = {
    CNN: {"hidden1": 0.1, "hidden2": 0.1, "fc1": 0.1, "softmax_linear": 0.1},
    MLP: {"hidden1": 2 / 784**0.5, "hidden2": 2 / 2500**0.5, "hidden3": 2 / 1500**0.5, "logits": 2 / 500**0.5},
}
QUICK = Recipe(model="mlp", goal=1, epochs=3, learning_rate=1e-3)


class Tiny(nn.Sequential):
    """Stands for the MLP where the loop is tested, not the network."""

    def __init__(self, classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, classes))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mlp", Tiny)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Scanned 8x8 digits of scikit-learn, three times enlarged and framed: (1797, 28, 28) uint8, (1797,)."""
    found = load_digits()
    large = np.kron(found.images, np.ones((1, 3, 3))) * 255 / 16
    return np.pad(large, ((0, 0), (2, 2), (2, 2))).astype(np.uint8), found.target.astype(np.uint8)


def split(pixels: np.ndarray, labels: np.ndarray) -> Split:
    return Split(torch.from_numpy(pixels[:, None]), torch.from_numpy(labels.astype(np.int64)))


def small(size: int = 120) -> DataSet:
    pixels, labels = digits()
    parts = (slice(size), slice(1000, 1040), slice(1400, 1797))
    return DataSet(*(split(pixels[part], labels[part]) for part in parts), sha256="digits")


def run(plan: Recipe, data: DataSet) -> training.State:
    state = begin(plan)
    for _ in train(plan, data, state):
        pass
    return state


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Networks


@pytest.mark.parametrize("make", [CNN, MLP])
def test_a_batch_becomes_logits(make):
    assert make()(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert make(4)(torch.rand(1, 1, 28, 28)).shape == (1, 4)


def test_published_sizes():
    shapes = {name: tuple(p.shape) for name, p in CNN().named_parameters() if p.ndim > 1}
    assert shapes == {
        "hidden1.weight": (32, 1, 5, 5),
        "hidden2.weight": (64, 32, 5, 5),
        "fc1.weight": (1024, 3136),
        "softmax_linear.weight": (10, 1024),
    }
    assert [tuple(p.shape) for p in MLP().parameters() if p.ndim > 1] == [
        (2500, 784), (1500, 2500), (500, 1500), (10, 500),
    ]  # fmt: skip


def test_the_cnn_is_what_the_table_says():
    network = CNN().double()
    p = {name: value.detach() for name, value in network.named_parameters()}
    pixels = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    x = pixels
    for name in ("hidden1", "hidden2"):
        x = nn.functional.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=2).clamp(min=0)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    x = (x.reshape(2, -1) @ p["fc1.weight"].T + p["fc1.bias"]).clamp(min=0)
    assert_close(network(pixels).detach(), x @ p["softmax_linear.weight"].T + p["softmax_linear.bias"])


def test_the_mlp_is_what_the_table_says():
    network = MLP().double()
    pixels = torch.rand(2, 1, 28, 28, dtype=torch.float64)
    x = pixels.reshape(2, -1)
    layers = [network.hidden1, network.hidden2, network.hidden3]
    for layer in layers:
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    assert_close(network(pixels), x @ network.logits.weight.T + network.logits.bias)


def test_pooling_before_rectifying_is_the_same_network():
    """The cheaper order of training passes: the same logits and the same gradients, to the last bit."""
    torch.manual_seed(0)
    network, x = CNN().double(), torch.rand(4, 1, 28, 28, dtype=torch.float64)
    found = []
    for mode in (True, False):
        logits = network.train(mode)(x)
        found.append((logits, *torch.autograd.grad(logits.logsumexp(1).sum(), list(network.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("make", [CNN, MLP])
def test_initial_weights_are_the_released_codes(make):
    torch.manual_seed(0)
    check_initial(make())


def check_initial(network: nn.Module) -> None:
    for name, s in DEVIATIONS[type(network)].items():
        layer = network.get_submodule(name)
        values = layer.weight.detach().flatten()[:20_000].double().numpy()
        assert kstest(values, truncnorm(-2, 2, scale=s).cdf).pvalue > 1e-3, name
        assert np.all(layer.bias.detach().numpy() == np.float32(0.1 if isinstance(network, CNN) else 0)), name


@pytest.mark.parametrize(("make", "stages"), [(CNN, CNN_STAGES), (MLP, MLP_STAGES)])
def test_reinitialisation_by_module_is_the_released_codes(make, stages):
    network = make()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 7)
    found = written_out(network, stages)
    assert sum(len(stage.parameters) for stage in found) == len(list(network.parameters()))
    with randomized(network, found, "cascading", 0, Draws(reinitialiser("module"))) as visits:
        *_, last = visits
        assert last.unchanged == ()
        check_initial(network)
    assert all(bool((p == 7).all()) for p in network.parameters())


def test_a_copy_draws_its_own_weights():
    network = CNN()
    before = network.fc1.weight.clone()
    twin = copy.deepcopy(network)
    twin.fc1.reset_parameters()
    assert torch.equal(network.fc1.weight, before)
    assert not torch.equal(twin.fc1.weight, before)


def test_captums_relevance_propagation_knows_the_layers():
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    assert LRP(CNN().eval()).attribute(x, target=torch.tensor([0, 1])).shape == x.shape


def test_greyscale_is_the_grey_level_over_255():
    pixels = np.arange(784, dtype=np.uint8).reshape(28, 28)
    got = Greyscale()(Image.fromarray(pixels))
    assert got.dtype == torch.float32
    assert_close(got, torch.from_numpy(pixels / np.float32(255))[None], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_any_picture_becomes_a_grey_square(mode):
    got = Greyscale()(Image.new("RGB", (100, 40), (255, 255, 255)).convert(mode))
    assert_close(got, torch.ones(1, 28, 28), rtol=0, atol=0)


def test_there_are_no_pretrained_weights():
    with pytest.raises(ValueError, match=r"sanity\.train --data mnist --model mlp"):
        untrained("mlp")()


# Labels and data


def test_permuted_labels_keep_their_numbers_and_nothing_else():
    labels = torch.randint(10, (20_000,), generator=torch.Generator().manual_seed(0)) ** 2 % 7
    got = permuted(labels, 3)
    assert torch.equal(got.bincount(), labels.bincount())
    shares = labels.bincount() / len(labels)
    chance = float((shares**2).sum())
    agreeing = float((got == labels).double().mean())
    assert abs(agreeing - chance) < 4 * (chance / len(labels)) ** 0.5
    assert torch.equal(got, permuted(labels, 3))
    assert not torch.equal(got, permuted(labels, 4))


def test_only_the_labels_trained_on_are_permuted():
    data = small()
    assert with_labels(data, QUICK) is data
    got = with_labels(data, replace(QUICK, labels="permuted"))
    assert got.validation is data.validation
    assert got.test is data.test
    assert torch.equal(got.train.pixels, data.train.pixels)
    assert torch.equal(got.train.labels, permuted(data.train.labels, 0))


def write_idx(folder: Path, size: int = 90, end: str = "", **labels: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pixels, classes = digits()
    classes = classes.copy()
    for at, label in labels.items():
        classes[int(at[1:])] = label
    for name, part in (("train", slice(size)), ("t10k", slice(1400, 1440))):
        for kind, values in (("images-idx3", pixels[part]), ("labels-idx1", classes[part])):
            head = b"".join(n.to_bytes(4, "big") for n in (0x800 + values.ndim, *values.shape))
            data = head + values.tobytes()
            (folder / f"{name}-{kind}-ubyte{end}").write_bytes(gzip.compress(data) if end else data)
    return folder


@pytest.fixture
def held_out(monkeypatch):
    monkeypatch.setattr(training, "VALIDATION", 10)


@pytest.mark.parametrize(("below", "end"), [("", ""), ("raw", ".gz"), ("MNIST/raw", ""), ("mnist", ".gz")])
def test_data_is_found_and_split(tmp_path, held_out, below, end):
    write_idx(tmp_path / below, end=end)
    data = load_data(training.find_folder("mnist", tmp_path))
    pixels, labels = digits()
    for got, part in ((data.validation, slice(10)), (data.train, slice(10, 90)), (data.test, slice(1400, 1440))):
        np.testing.assert_array_equal(got.pixels[:, 0], pixels[part])
        np.testing.assert_array_equal(got.labels, labels[part])
        assert got.pixels.dtype == torch.uint8
    parts = (pixels[:90], labels[:90].astype(np.int64), pixels[1400:1440], labels[1400:1440].astype(np.int64))
    assert data.sha256 == hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_data_that_does_not_fit_is_refused(tmp_path, held_out):
    with pytest.raises(ValueError, match=r"labels .* go up to 12: more than 10 classes"):
        load_data(write_idx(tmp_path / "a", _3=12))
    with pytest.raises(ValueError, match="holds 10 training images: needs more than 10"):
        load_data(write_idx(tmp_path / "b", size=10))
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte .* in"):
        training.find_folder("mnist", tmp_path)


def test_data_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    def offline(root: str, download: bool) -> None:
        raise RuntimeError("Error downloading x:\nTried a, got:\nno network\n")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(models.vision().datasets, "FashionMNIST", offline)
    with pytest.raises(ValueError, match=r"^fashion-mnist is not in .*datasets and .* \(no network\); .*--data-dir$"):
        training.find_folder("fashion-mnist")


def test_mnist_itself(shared):
    data = load_data(training.find_folder("mnist", shared / "mnist"), "mnist")
    with pytest.raises(ValueError, match="holds mnist, not fashion-mnist"):
        load_data(training.find_folder("fashion-mnist", shared / "mnist"), "fashion-mnist")
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [55_000, 5_000, 10_000]
    assert data.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    mean = torch.cat([data.train.pixels, data.validation.pixels]).double().mean() / 255
    assert_close(mean, torch.tensor(0.1307, dtype=torch.float64), rtol=0, atol=5e-5)
    few = Split(data.test.pixels[:500], data.test.labels[:500])
    some = DataSet(Split(data.train.pixels[:1600], data.train.labels[:1600]), few, few, "")
    state = run(recipe("mnist", "cnn", epochs=1, batch_size=32, learning_rate=3e-4), some)
    assert state.history[-1].test > 0.5  # chance is .1; seeds 0, 1, 2 come to .73, .68, .74


# The loop


def test_training_stops_at_the_goal(tiny):
    plan = replace(QUICK, goal=0.8, epochs=30)
    history = run(plan, small(600)).history
    assert 1 <= len(history) < plan.epochs
    assert history[-1].test >= plan.goal
    assert all(epoch.test < plan.goal for epoch in history[:-1])
    assert [epoch.number for epoch in history] == list(range(1, len(history) + 1))


def test_permuted_labels_are_memorised_and_say_nothing_of_others(tiny):
    plan = replace(QUICK, labels="permuted", goal=0.95, epochs=200, precision="bfloat16", learning_rate=1e-2)
    data = with_labels(small(60), plan)
    state = run(plan, data)
    last = state.history[-1]
    assert len(state.history) < plan.epochs
    assert last.train >= plan.goal
    assert last.train == accuracy(state.network, data.train)
    assert all(epoch.train is None or epoch.train < plan.goal for epoch in state.history[:-1])
    assert last.test < 0.3
    assert state.history[0][3:6] == (None, None, None)
    assert all((epoch.test is None) == (epoch.running < plan.goal - training.NEAR) for epoch in state.history)


def test_accuracy_counts_every_image_once(tiny):
    state, data = begin(QUICK), small()
    said = state.network(data.train.pixels.float() / 255).argmax(1)
    want = float(np.mean(said.numpy() == data.train.labels.numpy()))
    assert accuracy(state.network, data.train) == accuracy(state.network, data.train, 7) == want


def test_held_out_images_move_no_weight(tiny):
    data = small()
    swapped = replace(data, validation=data.test, test=data.validation)
    a, b = (run(QUICK, one) for one in (data, swapped))
    assert same(a.network.state_dict(), b.network.state_dict())
    assert [e.test for e in a.history] == [e.validation for e in b.history]


def test_seeds_decide_the_numbers(tiny):
    data = small()
    a, b, c = (run(replace(QUICK, epochs=1, seed=seed), data).network.state_dict() for seed in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    begin(QUICK)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_numbers_too_small_to_be_normal_are_zero_in_steps_and_only_there(tiny):
    def doubled(*told: object) -> float:
        return float(torch.tensor([1e-39]) * 2)

    found: list[float] = []
    for _ in train(replace(QUICK, epochs=1), small(), begin(QUICK), lambda *told: found.append(doubled())):
        assert doubled() > 0
    assert found == [0.0] * len(found) != []


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_torchs_schedulers(schedule, tiny):
    plan, rates = replace(QUICK, schedule=schedule, epochs=4, batch_size=30), []
    state = begin(plan)
    for _ in train(plan, small(), state, lambda *told: rates.append(state.optimiser.param_groups[0]["lr"])):
        pass
    other = torch.optim.Adam(Tiny(2).parameters(), plan.learning_rate)
    kinds = {
        "constant": torch.optim.lr_scheduler.ConstantLR(other, 1),
        "linear": torch.optim.lr_scheduler.LinearLR(other, 1, 0, 16),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(other, 16),
    }
    want = []
    for _ in range(16):
        want.append(kinds[schedule].get_last_lr()[0])
        other.step()
        kinds[schedule].step()
    np.testing.assert_allclose(rates, want, rtol=1e-9, atol=1e-12)


def test_weight_decay_is_the_gradient_of_the_l2_loss():
    plan = Recipe(weight_decay=0.5, epochs=1, batch_size=16)
    data = small(16)
    state, other = begin(plan), begin(plan)
    next(train(plan, data, state))
    order = torch.randperm(16, generator=training.stream(0, "shuffle", 1))
    loss = nn.functional.cross_entropy(other.network(data.train.pixels[order] / 255), data.train.labels[order])
    layers = (other.network.hidden1, other.network.hidden2, other.network.fc1)
    (loss + 0.5 * sum((layer.weight**2).sum() / 2 for layer in layers)).backward()
    torch.optim.Adam(other.network.parameters(), plan.learning_rate).step()
    # Adam's first step is the gradient's sign, so a wrong sign anywhere shows as two steps' difference.
    for one, two in zip(state.network.parameters(), other.network.parameters(), strict=True):
        assert float(((one - two).abs() > plan.learning_rate).double().mean()) < 1e-3


def test_a_loss_that_is_no_number_is_an_error(tiny):
    state = begin(QUICK)
    nn.init.constant_(next(state.network.parameters()), float("inf"))
    with pytest.raises(ValueError, match="the loss is nan in epoch 1, at image 0: try a smaller --learning-rate"):
        next(train(QUICK, small(), state))
    assert state.history == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "cnm"}, "--model: unknown model 'cnm'; did you mean cnn"),
        ({"labels": "random"}, "--labels: unknown labels 'random'"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"precision": "float64"}, "did you mean bfloat16 or float32"),
        ({"epochs": 0}, "--epochs must be from 1"),
        ({"batch_size": 0}, "--batch-size must be from 1"),
        ({"goal": 1.5}, "--goal must be from 0 to 1, not 1.5"),
        ({"learning_rate": float("nan")}, "--learning-rate must be .* not nan"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"model": "mlp", "weight_decay": 1e-3}, "--weight-decay is for the CNN, not for mlp"),
    ],
)
def test_a_recipe_refuses_nonsense(change, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**change)


def test_recipes_fast_and_as_published():
    want = Recipe("fashion-mnist", "mlp", epochs=50, batch_size=50, learning_rate=1e-4, goal=0.89)
    assert recipe("fashion-mnist", "mlp", published=True) == want
    assert recipe("mnist", "mlp", "permuted", epochs=7).epochs == 7
    # The released code decays the CNN's weights; labels without sense are learnt without.
    assert recipe("mnist", "cnn", published=True).weight_decay == 1e-3
    assert recipe("mnist", "cnn", "permuted", published=True).weight_decay == 0
    for (data, model), goal in training.GOALS.items():
        assert recipe(data, model).goal == goal
        assert recipe(data, model, "permuted").goal == 0.95
        assert set(NETWORKS) == {"cnn", "mlp"}


# Checkpoints


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    plan = Recipe(epochs=3, goal=1, schedule="cosine", precision="bfloat16", weight_decay=1e-3)
    data = small(100)
    whole = run(plan, data)
    folder = TrainingFolder(tmp_path)
    for _ in range(plan.epochs):
        state = folder.restore(begin(plan))
        next(train(plan, data, state))
        folder.keep(state)
    state = folder.restore(begin(plan))
    assert same(state.network.state_dict(), whole.network.state_dict())
    for one, two in zip(state.network.parameters(), whole.network.parameters(), strict=True):
        assert same(state.optimiser.state[one], whole.optimiser.state[two])
    assert [e[:-1] for e in state.history] == [e[:-1] for e in whole.history]


def test_a_broken_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"cannot read .*checkpoint\.safetensors: .*; remove it to begin anew"):
        TrainingFolder(tmp_path).restore(begin(QUICK))


KILLED = """
import os, signal, sys
from torch import nn
from sanity import train, training

def keep(self, state, write=train.TrainingFolder.keep):
    # The second epoch is over and is not kept.
    write(self, state) if len(state.history) < 2 else os.kill(os.getpid(), signal.SIGKILL)

def tiny(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, classes))

training.VALIDATION, training.NETWORKS["mlp"], train.TrainingFolder.keep = 10, tiny, keep
train.main(sys.argv[1:])
"""


def test_a_training_that_is_killed_goes_on(tmp_path, held_out, tiny, capsys):
    folder = write_idx(tmp_path / "idx", size=200)
    words = ["--model", "mlp", "--data-dir", str(folder), "--goal", "1", "--output"]
    assert main([*words, str(tmp_path / "whole"), "--epochs", "3"]) == 1
    killed = [sys.executable, "-c", KILLED, *words, str(tmp_path / "killed"), "--epochs", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(killed, capture_output=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert main([*words, str(tmp_path / "killed"), "--epochs", "3"]) == 2
    assert "already holds this training; add --resume" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "killed"), "--epochs", "4", "--resume"]) == 2
    assert "another training (differs in epochs)" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "killed"), "--epochs", "3", "--resume"]) == 1
    models_of = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert models_of[0] == models_of[1]
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == ["model.safetensors", "train.json"]


# The command line


def test_what_a_training_leaves_behind(tmp_path, held_out, capsys):
    folder = write_idx(tmp_path / "idx", size=200, end=".gz")
    words = ["--model", "mlp", "--data-dir", str(folder), "--goal", "0.1", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "goal of 10.00% (test) met after" in out
    assert "epoch 1: loss" in err
    header = json.loads((tmp_path / "out" / "train.json").read_text())
    model = tmp_path / "out" / "model.safetensors"
    network = MLP()
    network.load_state_dict(models.read_state_dict(model))
    data = load_data(folder)
    measured = {name: accuracy(network, getattr(data, name)) for name in ("train", "validation", "test")}
    assert header["accuracy"] == measured
    assert header["data_sha256"] == data.sha256
    assert header["weights_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert header["epochs"] == len(header["history"])
    assert header["status"] == "complete"
    assert torch.__version__.startswith(header["packages"]["torch"])
    assert main([*words, "--resume"]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--data", "mnits"], "did you mean mnist?"),
        (["--batchsize", "3"], "did you mean --batch-size?"),
        (["--goal", "2"], "--goal must be from 0 to 1, not 2"),
        (["--learning-rate", "fast"], "learning"),
        (["--data-dir", "nowhere"], "in 'nowhere'"),
    ],
)
def test_what_must_be_mended_is_one_line_and_exit_code_2(words, complaint, tmp_path, capsys):
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sanity train: error: ")
    assert complaint in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(tmp_path, held_out, capsys):
    folder = write_idx(tmp_path / "idx")
    (tmp_path / "file").write_text("mine")
    words = ["--data-dir", str(folder), "--output"]
    assert main([*words, str(folder)]) == 2
    assert "is not empty and holds no training" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "file")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_trained_networks_are_models_of_the_harness(kind, tmp_path):
    from safetensors.torch import save_file

    network = NETWORKS[kind]()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    found = models.load(f"mnist_{kind}", str(tmp_path / "model.safetensors"))
    assert same(found.network.state_dict(), network.state_dict())
    assert list(found.stages) == list(CNN_STAGES if kind == "cnn" else MLP_STAGES)
    assert found.preprocess(Image.new("RGB", (9, 9))).shape == (1, 28, 28)
    random = models.load(f"mnist_{kind}", "random")
    assert random.network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert not random.trained
    with pytest.raises(ValueError, match="comes without weights"):
        models.load(f"mnist_{kind}")
