"""The pytest plugin, used as a user would: test files run by pytest itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

# loaded here because pytester forgets what a session inside loads, and these cannot be loaded twice
import sanity.fingerprints
import sanity.run  # noqa: F401
from sanity.gate import main
from sanity.pytest_plugin import folder_of

pytest_plugins = "pytester"

SETUP = """
import torch
from torch import nn

torch.manual_seed(0)
images = torch.randn(6, 3, 12, 12)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU(),
    nn.Conv2d(16, 16, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
)

def gradient(model, x, targets):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).gather(1, targets[:, None]).sum(), x)[0]

def picture(model, x, targets):
    return x.abs()
"""
CHOICES = "stages=3, similarities=['spearman_abs', 'spearman']"


@pytest.fixture
def project(pytester, monkeypatch):
    """A project whose tests are `body`; only this plugin is loaded, whether or not it is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(body, *flags):
        pytester.makepyfile(test_mine=SETUP + body)
        return pytester.runpytest_inprocess("-p", "sanity.pytest_plugin", "-q", *flags)

    return run


def a_test(method="gradient", body="pass", name="test_mine"):
    return f"""
def {name}(sanity_check):
    checked = sanity_check(model, images, method={method}, {CHOICES})
    {body}
"""


DEPENDS = "checked.assert_depends_on_parameters()"


def test_an_explainer_that_depends_on_the_parameters_passes(project):
    project(a_test(body="checked.assert_depends_on_parameters('spearman')")).assert_outcomes(passed=1)


def test_one_that_does_not_fails_with_its_curve_and_the_stages(project):
    done = project(a_test("picture", DEPENDS))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "*picture does not depend on the parameters (cascading): 1.00 *above*",
            "*spearman_abs to the trained network's maps, mean and 95 % interval:",
            "*trained * 1.00 [[] 1.00,  1.00] ####################",
            "*first stage that moved the maps: none",
            "*first stage that did not move them: * (1.00)",
        ]
    )


def test_too_few_images_do_not_show_it(project):
    done = project(a_test(body=DEPENDS).replace("images,", "images[:2],"))
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*gradient is not shown to depend on the parameters*too few maps scored*"])


def test_a_similarity_that_was_not_measured_is_named(project):
    done = project(a_test(body="checked.assert_depends_on_parameters('hog')"))
    done.stdout.fnmatch_lines(["*ValueError: no verdict by 'hog'; there are verdicts by spearman_abs, spearman*"])


def test_the_curve_names_the_first_stage_that_moved(project):
    body = """
    lines = checked.curve("spearman").splitlines()
    assert (checked.method, lines[0]) == ("gradient", "spearman to the trained network's maps, mean and 95 % interval:")
    assert [line.split()[0] for line in lines[1:5]] == ["trained", "8", "4..2", "0"]
    assert lines[5].startswith("first stage that moved the maps: 8 (")
    assert lines[6] == "first stage that did not move them: none"
"""
    project(a_test(body=body.strip())).assert_outcomes(passed=1)


def test_a_baseline_is_stored_then_met_then_missed(project, pytester):
    where = ("--sanity-baseline", "stored")
    missing = project(a_test(), *where)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(
        ["*no stored run of this test in *stored/test_mine.py-test_mine-*; store one with --sanity-update*"]
    )
    project(a_test(), *where, "--sanity-update").assert_outcomes(passed=1)
    (folder,) = (pytester.path / "stored").iterdir()
    names = {"run.json", "scores.parquet", "unrelated.parquet", "fingerprints.parquet"}
    assert {path.name for path in folder.iterdir()} == names
    assert list(json.loads((folder / "run.json").read_text())["stages"]) == ["8", "4..2", "0"]
    assert main(["--verdicts", str(folder), "--expect", "gradient:spearman=pass"]) == 0
    project(a_test(), *where).assert_outcomes(passed=1)
    # the same test, an explainer of the same name that now explains the next class
    wrong = a_test().replace(
        "def test_mine", "right = gradient\ndef gradient(m, x, t): return right(m, x, (t + 1) % 5)\n\ndef test_mine"
    )
    done = project(wrong, *where)
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["CHANGED: * changed*", "*gradient, map *changed*", "stage *baseline *current *shift*"])
    project(wrong, *where, "--sanity-max-shift", "0.999").assert_outcomes(failed=1)
    project(wrong, *where, "--sanity-update").assert_outcomes(passed=1)
    project(wrong, *where).assert_outcomes(passed=1)


def test_another_network_or_plan_is_not_compared(project):
    where = ("--sanity-baseline", "stored")
    project(a_test(), *where, "--sanity-update").assert_outcomes(passed=1)
    done = project(a_test().replace("stages=3", "stages=2"), *where)
    done.stdout.fnmatch_lines(["not the same experiment: stages: 3 against 2*or store anew with --sanity-update"])
    done = project("model = model[:-1].append(nn.Linear(16, 5))\n" + a_test(), *where)
    done.stdout.fnmatch_lines(["not the same experiment: weights: *"])


def test_two_checks_in_one_test_and_two_tests_are_kept_apart(project, pytester):
    body = f"sanity_check(model, images, method=picture, {CHOICES})"
    tests = a_test(body=body) + a_test("picture", name="test_other")
    where = ("--sanity-baseline", "stored")
    project(tests, *where, "--sanity-update").assert_outcomes(passed=2)
    assert len(list((pytester.path / "stored").iterdir())) == 3
    project(tests, *where).assert_outcomes(passed=2)


def test_folders_are_readable_short_and_different():
    root = Path("b")
    nodes = ["t.py::test_a[x/y z]", "t.py::test_a[x/y:z]", f"{'deep/' * 100}t.py::test", "t.py::test_é"]
    names = [folder_of(root, node, 1).name for node in nodes]
    assert len(set(names)) == 4
    assert names[0].startswith("t.py-test_a-x-y-z-")
    assert all(len(name) < 100 and name.isascii() for name in names)
    assert folder_of(root, nodes[0], 2).name == f"{names[0]}-2"


def test_updating_needs_a_place(project):
    done = project(a_test(), "--sanity-update")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--sanity-update needs --sanity-baseline DIR"])


def test_nothing_heavy_is_loaded_until_a_test_asks(tmp_path):
    heavy = {"torch", "pandas", "pyarrow", "scipy", "numpy"}
    light = f"import sys\n\ndef test_light():\n    assert not {heavy} & set(sys.modules)\n"
    (tmp_path / "test_light.py").write_text(light)
    program = (
        "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'sanity.pytest_plugin', '-p', 'no:cacheprovider', '.']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_is_declared():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert declared["entry-points"]["pytest11"] == {"sanity": "sanity.pytest_plugin"}
