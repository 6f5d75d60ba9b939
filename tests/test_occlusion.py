from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn
from torch.testing import assert_close

from sanity import attributions
from sanity.attributions import Inputs
from sanity.attributions.occlusion import RandomMasks, windows
from sanity.engine import Engine
from sanity.streams import stream

TARGETS = torch.tensor([2, 0, 3])


def explain(network: nn.Module, pixels: Tensor, spec: str) -> Tensor:
    method = attributions.find(spec)
    inputs = Inputs(pixels, TARGETS[: len(pixels)], ("a", "b", "c")[: len(pixels)], seed=5)
    return Engine([method], 8).explain(network, inputs)[method.name]


# --- occlusion


def test_occlusion_is_the_mean_fall_over_the_windows_that_cover_a_pixel(awkward: nn.Module, pictures: Tensor) -> None:
    """Sides 17 and 14, windows 5 and 4."""
    pixels = pictures[:, :, :, :14]
    found = explain(awkward, pixels, "occlusion:positions=5,window=0.3")
    assert [(w.start, w.stop) for w in windows(17, 5, 0.3)] == [(0, 5), (3, 8), (6, 11), (9, 14), (12, 17)]
    assert [w.stop - w.start for w in windows(14, 5, 0.3)] == [4] * 5
    rows, columns = windows(17, 5, 0.3), windows(14, 5, 0.3)
    want = np.zeros((3, 17, 14))
    for n, target in enumerate(TARGETS.tolist()):
        for i in range(17):
            for j in range(14):
                falls = []
                for r in (r for r in rows if r.start <= i < r.stop):
                    for c in (c for c in columns if c.start <= j < c.stop):
                        covered = pixels[n : n + 1].clone()
                        covered[0, :, r, c] = 0
                        with torch.no_grad():
                            falls.append(float((awkward(pixels[n : n + 1]) - awkward(covered))[0, target]))
                want[n, i, j] = np.mean(falls)
    assert_close(found[:, 0], torch.tensor(want), rtol=1e-9, atol=1e-12)


def test_occlusion_equals_captums(awkward: nn.Module, pictures: Tensor) -> None:
    pixels = pictures[:, :, :15, :15]
    want = captum.attr.Occlusion(awkward).attribute(pixels, (3, 3, 3), strides=(3, 2, 2), target=TARGETS, baselines=0)
    found = explain(awkward, pixels, "occlusion:positions=7,window=0.2")
    # captum adds up in float32
    assert_close(found, want[:, :1].double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 28, 224, 299])
@pytest.mark.parametrize("positions", [1, 2, 7, 14])
@pytest.mark.parametrize("fraction", [0.0, 0.15, 0.5, 1.0, 3.0])
def test_windows_leave_no_pixel_out(length: int, positions: int, fraction: float) -> None:
    found = windows(length, positions, fraction)
    assert len(found) == positions
    assert (found[0].start, found[-1].stop) == (0, length) or positions == 1
    assert {i for one in found for i in range(one.start, one.stop)} == set(range(length))
    assert len({one.stop - one.start for one in found}) == 1


def test_a_pixel_that_nothing_reads_makes_no_fall(pictures: Tensor) -> None:
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1, :4, :4].sum((2, 3)).expand(-1, 4)

    found = explain(Corner(), pictures, "occlusion:positions=17,window=0.01")
    assert not found[:, :, 4:].any()
    assert not found[:, :, :, 4:].any()
    # Windows of one pixel: each pixel's own value is what its absence costs.
    assert_close(found[:, 0, :4, :4], pictures[:, 0, :4, :4], rtol=1e-10, atol=1e-12)


# --- RISE


def enlarged(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixel centres, the edge repeated: by scipy."""
    rows = (np.arange(height) + 0.5) * grid.shape[0] / height - 0.5
    columns = (np.arange(width) + 0.5) * grid.shape[1] / width - 0.5
    places = np.meshgrid(rows, columns, indexing="ij")
    return map_coordinates(grid, places, order=1, mode="nearest")


def masks_of(name: str, count: int, cells: int, probability: float) -> list[np.ndarray]:
    """The masks of an image of 17 x 15, drawn here from its named stream."""
    draw, cell = stream(5, name, "rise"), (-(-17 // cells), -(-15 // cells))
    made = []
    for _ in range(count):
        grid = (torch.rand(cells, cells, generator=draw) < probability).double().numpy()
        large = enlarged(grid, (cells + 1) * cell[0], (cells + 1) * cell[1])
        down, right = (int(torch.randint(c, (), generator=draw)) for c in cell)
        made.append(large[down : down + 17, right : right + 15])
    return made


def test_rise_is_the_mean_of_masks_weighed_by_the_probability(awkward: nn.Module, pictures: Tensor) -> None:
    found = explain(awkward, pictures, "rise:masks=6,cells=4,probability=0.4")
    for n, (name, target) in enumerate(zip("abc", TARGETS.tolist(), strict=True)):
        want = torch.zeros(17, 15, dtype=torch.float64)
        for mask in masks_of(name, 6, 4, 0.4):
            drawn = torch.tensor(mask)
            with torch.no_grad():
                want += awkward(pictures[n : n + 1] * drawn).softmax(1)[0, target] * drawn / 6 / 0.4
        # Masks are enlarged in float32.
        assert_close(found[n, 0], want, rtol=1e-5, atol=1e-6)


def test_masks_lie_between_nought_and_one_and_average_their_probability() -> None:
    masks = RandomMasks((40, 30), 7, 0.3, stream(0, "masks"))
    drawn = torch.stack([masks.draw() for _ in range(600)])
    assert drawn.shape == (600, 40, 30)
    assert (float(drawn.min()), float(drawn.max())) == (0, 1)
    # A pixel's standard deviation is at most that of a coin, 0.46; 600 masks, five standard errors.
    assert ((drawn.mean(0) - 0.3).abs() < 5 * 0.46 / 600**0.5).all()


def test_rise_finds_the_only_pixels_that_matter(pictures: Tensor) -> None:
    class Patch(nn.Module):
        """One class for brightness of a patch, one against it."""

        def forward(self, x: Tensor) -> Tensor:
            bright = 10 * x[:, :, 10:14, 2:6].mean((1, 2, 3)) - 5
            return torch.stack([bright, -bright], 1)

    inputs = Inputs(torch.ones_like(pictures), torch.tensor([0, 0, 0]), ("a", "b", "c"), seed=5)
    found = Engine([attributions.find("rise:masks=800")], 8).explain(Patch(), inputs)["rise"]
    places = [divmod(int(place), 15) for place in found.flatten(1).argmax(1)]
    assert all(10 <= row < 14 and 2 <= column < 6 for row, column in places)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("occlusion:positions=0", "positions must be finite and at least 1, not 0"),
        ("occlusion:window=-1", "window must be finite and at least 0, not -1.0"),
        ("rise:masks=0", "masks must be finite and at least 1, not 0"),
        ("rise:probability=0", r"probability must lie in \(0, 1\], not 0.0"),
        ("rise:probability=1.5", r"probability must lie in \(0, 1\], not 1.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_when_given(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attributions.find(spec)
