"""From `python -m sanity.run` to `python -m sanity.gate`: a stored run holds enough to see a changed explainer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sanity import gate, run
from sanity.cli import parse, plan_of
from sanity.session import parser

NAME = "tests.test_gate_of_runs:mine"
PLAN = ["--model", "tests.test_cli:factory", "--images", "photos", "--methods", NAME, "--similarities", "ssim", "hog"]


def mine(network, images, targets):
    x = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(network(x).gather(1, targets[:, None]).sum(), x)
    return found


gradient = mine


def mirrored(network, images, targets):
    """Its similarities are those of the maps it mirrors."""
    return gradient(network, images, targets).flip(3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "photos").mkdir()
    draws = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(draws.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"photos/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run.main([*PLAN, "--output", "baseline"]) == 0
        assert run.main([*PLAN, "--output", "again", "--batch-size", "1"]) == 0
        patch.setattr("tests.test_gate_of_runs.mine", mirrored)
        assert run.main([*PLAN, "--output", "mirrored"]) == 0
    return folder


def test_the_same_again_in_other_batches_is_the_same(place, capsys):
    assert gate.main([str(place / "baseline"), str(place / "again")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("SAME: ")
    assert "not compared" not in said


def test_a_change_that_moves_no_similarity_is_seen_by_the_trained_maps(place, capsys):
    assert gate.main([str(place / "baseline"), str(place / "mirrored"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    moved = {group["similarity"] for group in found["groups"] if group["verdict"] == "changed"}
    assert moved == {"map", "map_abs"}
    scores = [group for group in found["groups"] if group["order"] == "cascading" and group["similarity"] == "ssim"]
    assert max(abs(group["shift"]) for group in scores) < 0.02


def test_a_run_from_before_fingerprints_were_kept_is_still_compared_and_said_so(place, tmp_path, capsys):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("run.json", "scores.parquet"):
        (old / name).write_bytes((place / "baseline" / name).read_bytes())
    assert gate.main([str(old), str(place / "again")]) == 0
    assert "the trained network's maps are not compared: no fingerprints.parquet in" in capsys.readouterr().out


def test_the_readmes_workflow_runs_with_the_flags_there_are():
    """Parsed by the verbs' own parsers; what is expected of a run is expected of methods that it has."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (workflow,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    commands = [shlex.split(step["run"], comments=True) for step in job["steps"] if "run" in step]
    arguments = [words[3:] for words in commands if words[:2] == ["python", "-m"]]
    taken, compared, expected = arguments
    plan = plan_of(parse(parser(), [word.replace("my_package.explain", "tests.test_gate_of_runs") for word in taken]))
    names = [method.name for method in plan.explainers()]
    similarities = plan.similarities
    values = gate.parser().parse_args(compared)
    assert (values.markdown, values.runs[1]) == (Path("$GITHUB_STEP_SUMMARY"), Path(taken[-1]))
    values = gate.parser().parse_args(expected)
    assert values.verdicts == Path(taken[-1])
    assert len(gate.expectations(values.expect, names, similarities)) == 2
