import numpy as np
import pytest
import torch
from torch.testing import assert_close

from sanity import maps


def attributions(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SCALINGS = (maps.clip_signed, maps.clip_absolute, maps.signed_released, maps.by_maximum, maps.min_max)


def test_reductions_by_hand():
    a = torch.tensor([[[[1.0, -2.0]], [[-3.0, -4.0]], [[0.5, 0.0]]]])
    assert torch.equal(maps.signed(a), torch.tensor([[[-1.5, -6.0]]]))
    assert torch.equal(maps.absolute(a), torch.tensor([[[4.5, 6.0]]]))
    assert maps.colour(a) is a


@pytest.mark.parametrize("reduce", [maps.signed, maps.absolute, maps.colour])
def test_a_reduction_refuses_other_shapes(reduce):
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\): got shape \(2, 5, 5\)"):
        reduce(torch.zeros(2, 5, 5))


@pytest.mark.parametrize("q", [0.0, 0.01, 0.37, 0.5, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 5, 7), (2, 28, 28), (1, 299, 299), (2, 3, 9, 8)])
def test_quantile_is_numpys(q, shape):
    x = attributions(*shape)
    want = [np.percentile(image, 100 * q) for image in x.numpy()]
    assert_close(maps.quantile(x, q), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_quantile_has_no_size_limit_and_keeps_float32():
    x = torch.arange(17_000_000, dtype=torch.float64).view(1, 1000, -1)  # torch.quantile stops at 2**24
    assert_close(maps.quantile(x, 0.9999).item(), 0.9999 * 16_999_999, rtol=1e-12, atol=0)
    x = attributions(2, 50, 50, dtype=torch.float32)
    want = [np.percentile(image.astype(np.float64), 99) for image in x.numpy()]
    assert_close(maps.quantile(x, 0.99), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    assert all(scale(x).dtype == torch.float32 for scale in SCALINGS)


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_quantile_refuses_nonsense(q):
    with pytest.raises(ValueError, match=f"lies in .0, 1.: got {q}"):
        maps.quantile(torch.zeros(1, 2, 2), q)


def released(x):
    """The released visualisation code's two scalings and ours, in numpy, one image at a time."""
    p99, s = np.percentile(x, 99), np.percentile(np.abs(x), 99)
    return {
        maps.clip_signed: np.clip(x / s, -1, 1),
        maps.clip_absolute: np.clip((x - x.min()) / (p99 - x.min()), 0, 1),
        maps.signed_released: np.clip((x + abs(p99)) / (2 * abs(p99)), -1, 1),
        maps.by_maximum: x / np.abs(x).max(),
        maps.min_max: (x - x.min()) / (x.max() - x.min()),
    }


@pytest.mark.parametrize("scale", SCALINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(3, 28, 28), (2, 3, 31, 17)])
def test_scalings_are_those_of_numpy(scale, shape):
    x = attributions(*shape) * torch.tensor([1.0, 1e-12, 1e9])[: shape[0]].view(-1, *[1] * (len(shape) - 1))
    want = torch.from_numpy(np.stack([released(image)[scale] for image in x.numpy()]))
    assert_close(scale(x), want, rtol=1e-12, atol=1e-12)
    assert_close(scale(x)[:1], scale(x[:1]), rtol=0, atol=0)  # batch-mates do not matter


def test_clip_signed_of_a_sparse_map_divides_by_its_maximum():
    x = torch.zeros(1, 20, 20)
    x[0, 3, 4], x[0, 5, 6] = -4.0, 2.0  # 2 of 400 pixels: the 99th percentile of |x| is 0
    scaled = maps.clip_signed(x)
    assert (scaled[0, 3, 4], scaled[0, 5, 6]) == (-1.0, 0.5)
    assert scaled.count_nonzero() == 2
    assert maps.status(maps.clip_absolute(x.abs())) == (maps.NON_FINITE,)  # the released code's 0/0


@pytest.mark.parametrize("scale", SCALINGS, ids=lambda f: f.__name__)
def test_a_map_without_a_scale_is_nan(scale):
    assert scale(torch.zeros(1, 4, 4)).isnan().all()
    if scale in (maps.clip_absolute, maps.min_max):
        assert scale(torch.full((1, 4, 4), 0.3)).isnan().all()


def test_status_names_each_map():
    x = attributions(6, 4, 5)
    x[1], x[2, 0, 0], x[3, 1, 2], x[4] = 0.1, torch.nan, -torch.inf, torch.inf
    want = (maps.OK, maps.CONSTANT, *[maps.NON_FINITE] * 3, maps.OK)
    assert maps.status(x) == want == ("ok", "constant map", *["non-finite map"] * 3, "ok")
    assert maps.status(x[:0]) == ()
