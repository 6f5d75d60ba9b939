import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.stats import pearsonr, spearmanr
from skimage import feature, metrics
from torch.testing import assert_close

from sanity import maps
from sanity.similarity import (
    DEFAULTS,
    SIMILARITIES,
    compare,
    get,
    hog,
    hog_cell,
    hog_descriptor,
    pearson,
    spearman,
    ssim,
)

MEASURES = (pearson, spearman, ssim, hog)
SIZES = pytest.mark.parametrize("size", [28, 224, 299])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
EVERY = pytest.mark.parametrize("similarity", SIMILARITIES, ids=lambda s: s.name)
# scikit-image's cells sum up to 256 votes in float32: relative error under 256 * 2**-24.
VOTES = 256 * 2**-24


def pair(*shape, seed=0, dtype=torch.float64):
    """Two related maps in [-1, 1]; values beyond the 99th percentile tie."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn((2, *shape), generator=g, dtype=torch.float64)
    return maps.clip_signed(a).to(dtype), maps.clip_signed(a + 2 * b).to(dtype)


def each(f, a, b):
    """An oracle of two numpy arrays, image by image, in float64."""
    values = [f(x, y) for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def skimage_ssim(x, y, **options):
    fixed = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 2}
    return metrics.structural_similarity(x, y, **fixed, **options)


def skimage_hog(x, **options):
    cell = hog_cell(*x.shape[-2:])
    return feature.hog(x, 9, (cell, cell), (3, 3), block_norm="L2-Hys", **options)


def rank(x, y):
    return spearmanr(x.ravel(), y.ravel()).statistic


@DTYPES
@SIZES
def test_spearman_is_scipys(size, dtype):
    a, b = pair(2, size, size, dtype=dtype)
    assert_close(spearman(a, b), each(rank, a, b), rtol=0, atol=1e-12)


def test_spearman_shares_ranks_among_ties_as_scipy_does():
    a, b = pair(3, 299, 299)
    a[0], b[0] = (4 * a[0]).round(), b[0].relu()  # nine levels; half the pixels one tie
    a[1] = torch.where(a[1] > 0.99, a[1], 0 * a[1])  # nearly all one tie, of both signs of zero
    assert_close(spearman(a, b), each(rank, a, b), rtol=0, atol=1e-12)


@DTYPES
@SIZES
def test_pearson_is_scipys(size, dtype):
    a, b = pair(2, size, size, dtype=dtype)
    want = each(lambda x, y: pearsonr(x.ravel(), y.ravel()).statistic, a, b)
    assert_close(pearson(a, b), want, rtol=0, atol=1e-12)
    assert_close(pearson(a.double() * 1e-200, b.double() * 1e150), want, rtol=0, atol=1e-12)


@DTYPES
@SIZES
def test_ssim_is_scikit_images(size, dtype):
    a, b = pair(2, size, size, dtype=dtype)
    assert_close(ssim(a, b), each(skimage_ssim, a, b), rtol=0, atol=1e-12)


def test_ssim_of_colour_maps_averages_channels():
    a, b = pair(2, 3, 40, 33)
    want = each(lambda x, y: skimage_ssim(x, y, channel_axis=0), a, b)
    assert_close(ssim(a, b), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("window", "data_range"), [(5, 2.0), (11, 1.0), (7, 2.0)])
def test_ssim_of_another_window_is_the_formula(window, data_range):
    def formula(x, y):
        half = window // 2
        blur = lambda z: gaussian_filter(z, 1.5, radius=half)[half:-half, half:-half]  # noqa: E731
        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        return ((2 * mx * my + c1) * (2 * cov + c2) / (mx**2 + my**2 + c1) / (vx + vy + c2)).mean()

    a, b = pair(2, 28, 31)
    assert_close(ssim(a, b, window, data_range), each(formula, a, b), rtol=0, atol=1e-12)


@DTYPES
@SIZES
def test_hog_descriptor_is_scikit_images(size, dtype):
    a, b = pair(2, size, size, dtype=dtype)
    want = torch.from_numpy(np.stack([skimage_hog(x) for x in a.double().numpy()]))
    assert_close(hog_descriptor(a), want, rtol=0, atol=VOTES)
    expected = each(lambda x, y: pearsonr(skimage_hog(x), skimage_hog(y)).statistic, a, b)
    assert_close(hog(a, b), expected, rtol=0, atol=4 * VOTES)


def test_hog_descriptor_of_colour_maps_follows_the_strongest_channel():
    a, _ = pair(2, 3, 70, 53)
    want = torch.from_numpy(np.stack([skimage_hog(x, channel_axis=0) for x in a.numpy()]))
    assert_close(hog_descriptor(a), want, rtol=0, atol=VOTES)


def test_hog_cells_shrink_with_small_maps_only():
    assert [hog_cell(s, 299) for s in (6, 13, 28, 32, 47, 48, 224)] == [2, 2, 4, 4, 6, 16, 16]
    with pytest.raises(ValueError, match="at least 6x6 pixels: got 5x9"):
        hog_cell(5, 9)


def test_hog_is_blind_to_sign_and_counts_both_horizontal_directions_alike():
    ramp = torch.arange(30.0).expand(1, 30, 30) / 30 + pair(1, 30, 30)[0] * 1e-3
    assert_close(hog(ramp, -ramp), torch.ones(1).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_is_symmetric_one_for_itself_and_blind_to_batch_mates(measure):
    a, b = pair(3, 28, 28)
    assert_close(measure(a, a), torch.ones(3).double(), rtol=0, atol=1e-15)
    assert_close(measure(a, b), measure(b, a), rtol=0, atol=1e-14)
    assert_close(measure(a, b)[1:2], measure(a[1:2], b[1:2]), rtol=0, atol=1e-14)
    assert measure(a, b).dtype == torch.float64
    assert (measure(a, b) < 0.99).all()
    assert measure(a[:0], b[:0]).shape == (0,)


@pytest.mark.parametrize("measure", [pearson, spearman])
def test_a_negated_map_correlates_at_minus_one(measure):
    a, _ = pair(2, 28, 28)
    assert_close(measure(a, -a), -torch.ones(2).double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("measure", MEASURES)
def test_constant_and_non_finite_maps_give_nan(measure):
    a, b = pair(5, 28, 28)
    a[0], a[1, 3, 3], b[2, 0, 0], b[3] = 0.1, torch.nan, torch.inf, 0.0
    assert measure(a, b).isnan().tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_must_agree(measure):
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 28, 28\) and \(1, 28, 28\)"):
        measure(torch.zeros(2, 28, 28), torch.zeros(1, 28, 28))


@pytest.mark.parametrize("window", [11, 4, 0, -3])
def test_ssim_refuses_a_window_that_is_even_or_does_not_fit(window):
    with pytest.raises(ValueError, match=f"odd and fit the maps: got {window} for 10x20"):
        ssim(torch.zeros(1, 10, 20), torch.zeros(1, 10, 20), window)


levels = st.lists(st.integers(-20, 20), min_size=12, max_size=12)


@settings(max_examples=50, deadline=None)
@given(levels, levels)
def test_spearman_survives_monotone_transforms(x, y):
    a, b = (torch.tensor(v, dtype=torch.float64).view(1, 3, 4) for v in (x, y))
    plain = spearman(a, b)
    for transform in (lambda t: t**3 - 7, lambda t: (t / 5).exp(), lambda t: t.float() * 1e-30):
        assert_close(spearman(transform(a), b), plain, rtol=0, atol=0, equal_nan=True)
    assert_close(spearman(-a, b), -plain, rtol=0, atol=0, equal_nan=True)


def test_spearman_on_a_foreground_ranks_nothing_else():
    a, b = pair(3, 28, 28)
    a, b = (a * 4).round(), (b * 4).round()
    mask = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(1)) < 0.4
    want = [spearmanr(x[m], y[m]).statistic for x, y, m in zip(a.numpy(), b.numpy(), mask.numpy(), strict=True)]
    assert_close(spearman(a, b, mask), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)
    a[0][mask[0]], mask[1] = 2.0, False  # constant on the foreground; no foreground at all
    assert spearman(a, b, mask).isnan().tolist() == [True, True, False]
    with pytest.raises(ValueError, match=r"maps \(3, 28, 28\) and mask \(2, 28, 28\)"):
        spearman(a, b, mask[:2])


def colour_pair(seed=0, size=64):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn((2, 2, 3, size, size), generator=g, dtype=torch.float64)
    return a, a + b


def clipped(x):
    x = x.sum(0)
    return np.clip(x / np.percentile(np.abs(x), 99), -1, 1)


def unit(x):
    return (x - x.min()) / (x.max() - x.min())


def cut_signed(x):
    x = x.sum(0)
    s = abs(np.percentile(x, 99))
    return np.clip((x + s) / (2 * s), -1, 1)


def cut_absolute(x):
    x = np.abs(x).sum(0)
    return np.clip((x - x.min()) / (np.percentile(x, 99) - x.min()), 0, 1)


def colour_hog(x):
    return skimage_hog(unit(x), channel_axis=0)


ORACLES = {
    "ssim": (lambda x, y: skimage_ssim(clipped(x), clipped(y)), 1e-12),
    "spearman": (lambda x, y: rank(x.sum(0), y.sum(0)), 1e-12),
    "spearman_abs": (lambda x, y: rank(np.abs(x).sum(0), np.abs(y).sum(0)), 1e-12),
    "hog": (lambda x, y: pearsonr(skimage_hog(clipped(x)), skimage_hog(clipped(y))).statistic, 4 * VOTES),
    "ssim_released": (lambda x, y: skimage_ssim(unit(x), unit(y), channel_axis=0), 1e-12),
    "hog_released": (lambda x, y: rank(colour_hog(x), colour_hog(y)), 1e-4),  # a rounded vote may swap ranks
    "spearman_released": (lambda x, y: rank(cut_signed(x), cut_signed(y)), 1e-12),
    "spearman_abs_released": (lambda x, y: rank(cut_absolute(x), cut_absolute(y)), 1e-12),
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_registered_reading_is_what_it_says(name):
    a, b = colour_pair()
    similarity, (oracle, atol) = get(name), ORACLES[name]
    values, status = compare(similarity, similarity.describe(a), similarity.describe(b))
    assert_close(values, each(oracle, a, b), rtol=0, atol=atol)
    assert status == ("ok", "ok")


def test_the_published_ssim_has_a_window_of_five():
    a, b = colour_pair()
    similarity, scaled = get("ssim_published"), [maps.clip_signed(maps.signed(x)) for x in (a, b)]
    values, _ = compare(similarity, similarity.describe(a), similarity.describe(b))
    assert_close(values, ssim(*scaled, window=5), rtol=0, atol=0)
    assert (values - ssim(*scaled)).abs().min() > 1e-3


@pytest.mark.parametrize(
    ("name", "step"), [("spearman_abs_foreground", maps.absolute), ("spearman_foreground", maps.signed)]
)
def test_the_foreground_readings_need_their_mask(name, step):
    a, b = colour_pair()
    mask, similarity = a[:, 0] > 0, get(name)
    values, _ = compare(similarity, similarity.describe(a, mask), similarity.describe(b, mask))
    assert_close(values, spearman(step(a), step(b), mask), rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"{name} .* needs a mask"):
        similarity.describe(a)


@EVERY
def test_every_similarity_says_why_it_has_no_value(similarity):
    a, b = (torch.cat([x, x, x]) for x in colour_pair())
    a[0], a[1, 0, 0, 0], b[2, 1, 4, 4], b[3], a[4], b[4, 0, 0, 0] = (
        0.0,
        torch.nan,
        torch.inf,
        -3.0,
        1.0,
        torch.nan,
    )
    mask = torch.ones(6, 64, 64, dtype=torch.bool)
    values, status = compare(similarity, similarity.describe(a, mask), similarity.describe(b, mask))
    constant, non_finite = "constant map", "non-finite map"
    assert status == (constant, non_finite, non_finite, constant, non_finite, "ok")
    assert values.isnan().tolist() == [True] * 5 + [False]


@EVERY
def test_every_similarity_is_one_for_itself_and_blind_to_batch_mates(similarity):
    a, b = (x.float() for x in colour_pair())
    mask = b[:, 0] > 0
    whole, alone = similarity.describe(a, mask), similarity.describe(a[1:], mask[1:])
    other, other_alone = similarity.describe(b, mask), similarity.describe(b[1:], mask[1:])
    assert_close(compare(similarity, whole, whole)[0], torch.ones(2).double(), rtol=0, atol=1e-14)
    both, one = compare(similarity, whole, other)[0], compare(similarity, alone, other_alone)[0]
    assert_close(both[1:], one, rtol=0, atol=1e-12)


def test_a_descriptor_without_variance_is_a_constant_map():
    a = torch.zeros(1, 1, 60, 60)
    a[..., 59, 59] = 1.0  # beyond the last whole cell, so no vote is cast
    values, status = compare(get("hog"), get("hog").describe(a), get("hog").describe(a))
    assert (math.isnan(values.item()), status) == (True, ("constant map",))


def test_descriptions_of_different_maps_do_not_compare():
    a, b = colour_pair()
    with pytest.raises(ValueError, match="shapes differ"):
        compare(get("ssim"), get("ssim").describe(a), get("ssim").describe(b[:1]))


def test_names_are_unique_and_an_unknown_one_names_its_neighbours():
    names = [similarity.name for similarity in SIMILARITIES]
    assert len(set(names)) == len(names)
    assert [get(name).name for name in DEFAULTS] == ["ssim", "spearman", "spearman_abs", "hog"]
    with pytest.raises(ValueError, match=r"unknown similarity 'sspearman'.*spearman"):
        get("sspearman")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@EVERY
def test_the_gpu_agrees(similarity):
    a, b = colour_pair()
    mask = b[:, 0] > 0
    here = compare(similarity, similarity.describe(a, mask), similarity.describe(b, mask))
    there = compare(similarity, similarity.describe(a.cuda(), mask.cuda()), similarity.describe(b.cuda(), mask.cuda()))
    assert_close(there[0].cpu(), here[0], rtol=0, atol=1e-10)
    assert there[1] == here[1]
