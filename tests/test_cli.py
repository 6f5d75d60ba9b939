"""`python -m sanity.run` as a person meets it: what it writes, and one clear line for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from sanity.models import Preprocessing
from sanity.run import main


def factory() -> nn.Module:
    """Small network with a rectifier, seeded, on 20x20 pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 5),
        )  # fmt: skip
    network.preprocess = Preprocessing(20, 20)
    return network


def photographs(folder: Path, count: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 255, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo{i}.png")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos")
    return tmp_path


SMALL = ["--model", "tests.test_cli:factory", "--images", "photos", "--samples", "2", "--mask-steps", "2"]


def go(*arguments: str) -> int:
    return main([*SMALL, *arguments])


def test_a_run_leaves_table_figures_and_manifest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--output", "out", "--orders", "cascading", "independent", "--save-maps", "--strips", "1") == 0
    written = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())
    assert [name for name in written if not name.startswith("figures")] == [
        "fingerprints.parquet", "maps.safetensors", "predictions.parquet", "run.json", "scores.parquet", "strips.npz",
        "summary.csv", "summary.md", "unrelated.parquet", "verdicts.csv",
    ]  # fmt: skip
    assert "figures/strip_cascading_photo0.png" in written
    assert "figures/curve_independent_ssim.png" in written
    header = json.loads(Path("out/run.json").read_text())
    assert header["status"] == "complete"
    assert header["plan"]["samples"] == 2
    assert set(header["images"]) == {"photo0", "photo1", "photo2"}
    assert len(header["weights_sha256"]) == 64
    assert header["packages"]["torch"] == torch.__version__.split("+")[0]
    assert sum(header["counts"].values()) == 3 * 8 * 4 * 2 * 4
    maps = load_file("out/maps.safetensors")
    assert set(maps) >= {f"{order}/0/{stage}/edges" for order in ("cascading", "independent") for stage in "037"}
    assert maps["cascading/0/7/gradient"].shape == (3, 3, 20, 20)
    assert maps["cascading/0/7/gradient"].dtype == np.float32
    said = pd.read_parquet("out/predictions.parquet")
    assert len(said) == 3 * 2 * 4
    shown = capsys.readouterr().out
    assert "guided_backprop" in shown
    assert "written to out/" in shown


def test_the_table_is_the_rows_mean(place: Path) -> None:
    assert go("--output", "out", "--methods", "gradient") == 0
    rows, table = pd.read_parquet("out/scores.parquet"), pd.read_csv("out/summary.csv")
    want = rows.groupby(["order", "stage_index", "method", "similarity"])["value"].mean()
    got = table.set_index(["order", "stage_index", "method", "similarity"])["mean"]
    np.testing.assert_allclose(got.sort_index(), want.sort_index(), rtol=0, atol=1e-6)


def test_flags_win_over_config_and_config_over_preset(place: Path) -> None:
    Path("plan.yaml").write_text("samples: 3\nmethods: [gradient, smoothgrad]\nseeds: [5]\nstages: 2\n")
    assert go("--config", "plan.yaml", "--output", "out", "--seeds", "7") == 0
    plan = json.loads(Path("out/run.json").read_text())["plan"]
    assert (plan["samples"], plan["seeds"], plan["stages"]) == (3, [7], 2)
    assert plan["methods"] == ["gradient", "smoothgrad"]
    assert plan["mask_steps"] == 2


def test_a_plan_written_beside_results_runs_again_to_the_same_numbers(place: Path) -> None:
    methods = ["--methods", "gradient", "random"]
    assert go("--output", "one", *methods) == 0
    Path("again.yaml").write_text(yaml.safe_dump(json.loads(Path("one/run.json").read_text())["plan"]))
    assert main(["--config", "again.yaml", "--output", "two"]) == 0
    pd.testing.assert_frame_equal(*(pd.read_parquet(f"{name}/scores.parquet") for name in ("one", "two")))


def test_stages_from_a_file_of_ones_own(place: Path) -> None:
    Path("stages.yaml").write_text("top: '7'\nbottom: [3.weight, '0']\n")
    assert go("--stages", "stages.yaml", "--methods", "gradient", "--output", "out") == 0
    header = json.loads(Path("out/run.json").read_text())
    assert header["stages"] == {"top": ["7.weight", "7.bias"], "bottom": ["3.weight", "0.weight", "0.bias"]}
    assert header["untouched_parameters"] == ["1.weight", "1.bias", "3.bias"]


def test_verbose_prints_class_and_probability_at_every_stage(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--methods", "gradient", "--output", "out", "--verbose", "--limit", "1") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "photo0: class" in line]
    assert len(lines) == 4


def test_without_output_no_folder_is_overwritten(place: Path) -> None:
    assert go("--methods", "gradient") == 0
    assert go("--methods", "gradient", "--seeds", "1") == 0
    assert Path("sanity_run/run.json").exists()
    assert Path("sanity_run-2/run.json").exists()


def test_untrained_is_said_everywhere(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--model",
        "mobilenet_v2",
        "--weights",
        "random",
        "--images",
        "photos",
        "--limit",
        "1",
        "--stages",
        "1",
    ]
    assert main([*arguments, "--methods", "gradient", "--output", "out"]) == 0
    assert "mobilenet_v2 is untrained" in capsys.readouterr().out
    assert json.loads(Path("out/run.json").read_text())["trained"] is False


def bad(capsys: pytest.CaptureFixture[str], *arguments: str, small: bool = True) -> str:
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*")}
    assert main([*(SMALL if small else []), *arguments]) == 2
    captured = capsys.readouterr()
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*")} == before, "something was written"
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("sanity run: error: ")
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--modle", "x"], "did you mean --model?"),
        (["--model", "inception"], "unknown model 'inception'; did you mean inception_v3"),
        (["--methods", "gradiant"], "unknown method 'gradiant'; did you mean gradient"),
        (["--methods", "no.such:thing"], "cannot load 'no.such:thing'"),
        (["--methods", "gradient,gradient"], "--methods names something twice"),
        (["--methods", "smoothgrad:samples=many"], "'samples=many' is not samples=<int>"),
        (["--methods", "smoothgrad:sample=3"], "has no option 'sample'"),
        (["--orders", "cascade"], "unknown order 'cascade'; did you mean cascading"),
        (["--similarities", "ssmi"], "unknown similarity 'ssmi'; did you mean ssim"),
        (["--reinit", "he"], "unknown re-initialiser 'he'"),
        (["--preset", "fast"], "unknown preset 'fast'"),
        (["--granularity", "leaf"], "unknown granularity 'leaf'"),
        (["--precision", "float16"], "unknown precision 'float16'"),
        (["--target", "cat"], "unknown target 'cat'"),
        (["--target", "7"], "the network has 5 classes"),
        (["--target", "label"], "has no label"),
        (["--stages", "10"], "--stages 10: the network has 3 stages"),
        (["--stages", "0"], "--stages must be at least 1"),
        (["--stages", "nowhere"], "unknown stage 'nowhere'"),
        (["--stages", "gone.yaml"], "cannot read gone.yaml"),
        (["--samples", "0"], "--samples must be from 1"),
        (["--samples", "-3"], "--samples must be from 1"),
        (["--samples", "1e30"], "samples"),
        (["--limit", "0"], "--limit must be from 1"),
        (["--seeds", "-1"], "--seeds must be non-negative"),
        (["--batch-size", "0"], "--batch-size must be auto or a whole number"),
        (["--batch-size", "big"], "--batch-size must be auto or a whole number"),
        (["--images", "nowhere"], "nowhere"),
        (["--images", "empty"], "empty"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["--config", "list.yaml"], "Unexpected config"),
        (["--config", "typo.yaml"], "mehtods"),
        (["--config", "wrong.yaml"], "samples"),
        (["--weights", "gone.pth"], "no weights file gone.pth"),
        (["--output", "photos/photo0.png"], "is a file, not a folder"),
        (["--output", "photos/photo0.png/x"], "Not a directory"),
        (["--output", "photos"], "is not empty and holds no run"),
    ],
)
def test_a_mistake_is_one_clear_line_and_nothing_is_written(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    Path("empty").mkdir()
    Path("list.yaml").write_text("- a\n")
    Path("typo.yaml").write_text("mehtods: [gradient]\n")
    Path("wrong.yaml").write_text("samples: many\n")
    assert words in bad(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sees no GPU here; use --device cpu" in bad(capsys, "--device", "cuda")
    assert "--device tpu" in bad(capsys, "--device", "tpu")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nbroken", None])
def test_a_broken_picture_is_named_and_skipped_only_when_asked(
    place: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    whole = Path("photos/photo1.png").read_bytes()
    Path("photos/bad.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    words = bad(capsys)
    assert "bad.png" in words
    assert "--skip-bad-images" in words
    assert go("--skip-bad-images", "--methods", "gradient", "--output", "out") == 0
    assert list(json.loads(Path("out/run.json").read_text())["skipped_images"]) == ["bad"]
    assert "1 pictures could not be read" in capsys.readouterr().out


def test_another_plans_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--methods", "gradient", "--output", "out") == 0
    capsys.readouterr()
    assert "another plan's results (differs in seeds)" in bad(
        capsys, "--methods", "gradient", "--output", "out", "--seeds", "9"
    )
    assert "add --resume" in bad(capsys, "--methods", "gradient", "--output", "out")


def test_a_finished_run_is_not_computed_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert go("--methods", "gradient", "--output", "out") == 0
    stamp = Path("out/scores.parquet").stat().st_mtime_ns
    assert go("--methods", "gradient", "--output", "out", "--resume") == 0
    assert Path("out/scores.parquet").stat().st_mtime_ns == stamp


def slow_gradient(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient, taking its time, so that a test can interrupt it."""
    time.sleep(0.05)
    x = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x)[torch.arange(len(x)), targets].sum(), x)
    return found


LONG = [*SMALL, "--methods", "gradient", "smoothgrad", "random", "tests.test_cli:slow_gradient", "--batch-size", "1",
        "--orders", "cascading", "independent", "--seeds", "0", "1"]  # fmt: skip


def start(output: str, *more: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[1])
    # A test run in the background of a shell inherits an ignored SIGINT; a person's terminal does not.
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from sanity.run import main
sys.exit(main())
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, *LONG, "--output", output, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(output: str, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list(Path(output).glob("steps/*.scores.parquet"))) < count:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def finish(process: subprocess.Popen[str]) -> None:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err


def test_a_killed_run_resumes_to_the_same_rows_bit_for_bit(place: Path) -> None:
    finish(start("whole"))
    for steps in (0, 2, 7):
        process = start("killed", "--resume")
        wait_for_steps("killed", steps, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("killed", "--resume"))
    for name in ("scores.parquet", "predictions.parquet", "fingerprints.parquet", "summary.csv"):
        assert Path("killed", name).read_bytes() == Path("whole", name).read_bytes()
    assert not Path("killed/steps").exists()


def test_ctrl_c_ends_in_one_line_and_keeps_the_rows(place: Path) -> None:
    process = start("out")
    wait_for_steps("out", 1, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted; what was finished is kept, add --resume to go on" in err
    assert list(Path("out").glob("steps/*.scores.parquet"))


def test_a_full_disk_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sanity.folder import RunFolder
    from sanity.records import Step

    def full(self: RunFolder, step: Step) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "flush", full)
    assert go("--output", "out", "--methods", "gradient") == 2
    assert "sanity run: error: [Errno 28] No space left on device" in capsys.readouterr().err


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    for name in (
        "inception_v3",
        "guided_backprop",
        "bottom_up",
        "variance_scaling",
        "spearman_abs",
        "quick",
        "article",
    ):
        assert f"  {name}" in listed


def test_help_says_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "Does an explanation depend on the network?" in capsys.readouterr().out


def test_the_console_script_hands_over(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sanity.__main__ import main as sanity_main

    monkeypatch.setattr(sys, "argv", ["sanity", "rnu"])
    assert sanity_main() == 2
    assert "unknown verb 'rnu'; did you mean run" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sanity", "run", "--list"])
    assert sanity_main() == 0
