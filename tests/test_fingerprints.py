"""What is kept of the trained network's maps."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from sanity import images as image_sets
from sanity import models
from sanity.fingerprints import cost, described, fingerprints, read, seen_by, write
from sanity.plan import Plan
from sanity.records import read_rows
from sanity.run import prepare, run

LOOKS = ("first", "again", "other")


def looked(network, pixels, *methods, seeds=(0,), batch_size=8):
    plan = Plan(methods=methods, images="tensors", seeds=seeds, samples=2)
    found = fingerprints(plan, models.of_network(network), image_sets.tensors(pixels), batch_size=batch_size)
    return pd.DataFrame(found)


def maps_of(rows, method, look):
    part = rows[(rows["method"] == method) & (rows["look"] == look)]
    return np.stack(part["signed"].to_list())


def test_a_fingerprint_is_the_maps_cell_means_and_moments():
    a = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for one, (signed, absolute, rms, balance, status) in zip(a.numpy(), described(a), strict=True):
        cells = one.sum(0).reshape(8, 2, 8, 3).mean((1, 3)), np.abs(one).sum(0).reshape(8, 2, 8, 3).mean((1, 3))
        assert np.allclose([signed, absolute], [cell.ravel() for cell in cells], rtol=0, atol=1e-14)
        assert rms == pytest.approx(np.sqrt(np.mean(one.sum(0) ** 2)), abs=1e-14)
        assert balance == pytest.approx(one.sum() / np.abs(one.sum(0)).sum(), abs=1e-14)
        assert status == "ok"


def test_maps_without_a_value_say_so():
    a = torch.zeros(3, 1, 8, 8)
    a[1], a[2, 0, 0, 0] = 2.0, torch.nan
    (dead, flat, broken) = described(a)
    assert (dead[2], np.isnan(dead[3]), dead[4]) == (0.0, True, "constant map")
    assert flat[2:] == (2.0, 1.0, "constant map")
    assert (np.isnan(broken[2]), broken[4]) == (True, "non-finite map")


def test_the_packages_own_methods_are_looked_at_again_only_under_other_noise(awkward, pictures):
    rows = looked(awkward, pictures, "gradient", "smoothgrad")
    assert rows.groupby(["method", "look"]).size().to_dict() == {
        (method, look): 3 for method in ("gradient", "smoothgrad") for look in LOOKS
    }
    for method, other in (("gradient", True), ("smoothgrad", False)):
        first, again, noise = (maps_of(rows, method, look) for look in LOOKS)
        assert np.array_equal(first, again)
        assert np.array_equal(first, noise) == other
    elsewhere = looked(awkward, pictures, "smoothgrad", seeds=(5,))
    assert not np.allclose(maps_of(rows, "smoothgrad", "first"), maps_of(elsewhere, "smoothgrad", "first"))
    assert set(elsewhere["seed"]) == {5}


def test_a_method_from_outside_takes_three_looks_and_shows_what_does_not_repeat(awkward, pictures):
    calls = []

    def restless(network, images, targets):
        calls.append(len(images))
        return images * len(calls)

    restless.name = "gradient"  # which does not make it ours
    rows = looked(awkward, pictures, restless)
    assert calls == [3, 3, 3]
    first, again, other = (maps_of(rows, "gradient", look) for look in LOOKS)
    error = 8 * np.finfo(np.float32).eps * 9  # maps in float32, up to 3 channels of 3
    assert np.allclose([2 * first, 3 * first], [again, other], rtol=0, atol=error)


def test_the_cost_is_what_is_evaluated(awkward, pictures):
    def mine(network, images, targets):
        return images

    plan = Plan(methods=("gradient", "smoothgrad", "edges", mine), images="tensors", samples=3)
    images, counted = image_sets.tensors(pictures), []
    fingerprints(plan, models.of_network(awkward), images, on_progress=counted.append)
    # the gradient once, smoothgrad's three points under two noises, a stranger three times
    assert sum(counted) == cost(plan, images) == 3 * (1 + 2 * 3 + 3)


def test_what_the_run_saw_of_the_packages_own_methods_is_not_looked_at_again(awkward, pictures, tmp_path):
    def mine(network, images, targets):
        return images

    plan = Plan(methods=("gradient", "smoothgrad", mine), images="tensors", samples=3)
    images, classifier, counted, chunks = image_sets.tensors(pictures), models.of_network(awkward), [], []
    stages = prepare(plan, classifier, images)
    for _ in run(plan, classifier, images, stages, on_trained=chunks.append):
        pass
    (seen,) = chunks
    write(tmp_path / "f.parquet", seen_by(plan, classifier, seen))
    run_saw = read(tmp_path / "f.parquet")
    short = fingerprints(plan, classifier, images, run_saw=run_saw, on_progress=counted.append)
    # only smoothgrad under other noise, and the stranger three times
    assert sum(counted) == cost(plan, images, run_saw) == 3 * (3 + 3)
    long = fingerprints(plan, classifier, images)
    for found, name in ((short, "short"), (long, "long")):
        write(tmp_path / name, sorted(found, key=lambda one: (one.method, one.look, one.image)))
    assert (tmp_path / "short").read_bytes() == (tmp_path / "long").read_bytes()
    assert read(tmp_path / "nowhere") == []


def test_at_most_eight_images_are_looked_at_whatever_the_batch(awkward):
    pixels = torch.rand(11, 3, 17, 15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one, many = (looked(awkward, pixels, "gradient", batch_size=size) for size in (3, 8))
    assert one["image"].nunique() == 8
    assert np.allclose(maps_of(one, "gradient", "first"), maps_of(many, "gradient", "first"), rtol=1e-5, atol=1e-7)


def test_the_network_is_left_as_it_was(awkward, pictures):
    def careless(network, images, targets):
        network.train()
        network(images)
        return images

    before = {name: value.clone() for name, value in awkward.state_dict().items()}
    looked(awkward, pictures, careless)
    after = awkward.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in awkward.modules() if isinstance(module, nn.BatchNorm2d))


def test_fingerprints_survive_the_disk(awkward, pictures, tmp_path):
    rows = looked(awkward, pictures, "gradient")
    write(tmp_path / "f.parquet", rows.itertuples(index=False))
    back = read_rows(tmp_path / "f.parquet")
    assert back.columns.tolist() == rows.columns.tolist()
    assert np.allclose(np.stack(back["signed"].to_list()), np.stack(rows["signed"].to_list()), rtol=1e-6, atol=0)
    plain = [name for name in rows if name not in ("signed", "absolute")]
    pd.testing.assert_frame_equal(back[plain], rows[plain], check_dtype=False)
