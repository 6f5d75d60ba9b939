from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sanity import attributions
from sanity.cli import parse, plan_of, with_preset
from sanity.plan import Plan, from_dict, preset, presets, read_yaml
from sanity.session import parser


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_a_plan_and_says_in_its_first_line_what_it_is(name: str) -> None:
    values = preset(name)
    values.pop("verbose", None)
    from_dict(values)
    assert presets()[name].read_text().startswith("# ")


def test_a_plan_written_down_reads_back_as_itself(tmp_path: Path) -> None:
    plan = Plan(methods=("gradient", "smoothgrad:sigma=0.2"), seeds=(3, 1), stages={"a": ["b", "c"]}, samples=4)
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan.as_dict()))
    assert from_dict(read_yaml(tmp_path / "plan.yaml")) == plan


def test_a_flag_switches_off_what_a_preset_switched_on() -> None:
    plain, off = (
        plan_of(parse(parser(), with_preset(["--preset", "as-released", *words], None)))
        for words in ([], ["--no-redraw", "--no-fresh-noise"])
    )
    assert (plain.redraw, plain.fresh_noise, plain.squash) == (True, True, True)
    assert (off.redraw, off.fresh_noise, off.squash) == (False, False, True)


def test_samples_and_steps_reach_the_methods_that_have_them() -> None:
    plan = Plan(methods=("gradient", "smoothgrad", "meaningful_perturbation"), samples=7, mask_steps=9)
    gradient, smoothgrad, mask = plan.explainers()
    assert gradient == attributions.find("gradient")
    assert smoothgrad.options["samples"] == 7
    assert mask.options["steps"] == 9
    assert "samples" not in mask.options


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mehtods": ["gradient"]}, "unknown plan key 'mehtods'; did you mean methods"),
        ({"samples": "many"}, "plan key 'samples': must be a whole number, not 'many'"),
        ({"samples": True}, "must be a whole number"),
        ({"redraw": "yes"}, "must be true or false"),
        ({"seeds": ["a"]}, "must be a list of whole numbers"),
        ({"methods": [1]}, "must be a list of names"),
        ({"model": ["a"]}, "must be text"),
        ({"methods": []}, "--methods is empty"),
        ({"seeds": [1, 1]}, "names something twice: 1 1"),
        ({"methods": ["smoothgrad", "smoothgrad:samples=3"]}, "'smoothgrad' twice"),
        ({"against": "x.pth"}, "the order data and --against FILE"),
        ({"limit": 0}, "--limit must be from 1"),
    ],
)
def test_nonsense_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dict(values)


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.yaml"):
        read_yaml(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ValueError, match="must hold names and values, not list"):
        read_yaml(tmp_path / "list.yaml")
