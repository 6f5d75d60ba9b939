import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, median_filter
from scipy.optimize import minimize
from torch import nn
from torch.testing import assert_close

from sanity.attributions.base import Inputs
from sanity.attributions.descent import DESCENTS
from sanity.attributions.masks import Regulariser, upsample
from sanity.attributions.nulls import NULLS, gaussian_blur, median_blur, null_images
from sanity.attributions.perturbation import (
    DEFAULT,
    LOCALIZATION,
    MEANINGFUL_PERTURBATION,
    PAPER,
    PORT,
    MaskProblem,
    MaskSettings,
    descend,
    meaningful_perturbation,
    optimise_mask,
    shifted,
)

OPTIMISERS = pytest.mark.parametrize("optimiser", DESCENTS)
SMALL = MaskSettings(steps=8, mask_size=4, mask_blur=0.7, null_radius=1.5, jitter=2, l1=1e-3, tv=0.01)


def pictures(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_network(classes=3, seed=0, gain=3.0):
    """A smooth convolutional classifier of three-channel pictures."""
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes)
    network = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        network[0].weight.mul_(gain)
        network[-1].weight.mul_(gain)
    return network


def batch(n=3, side=9, seed=0):
    return Inputs(
        pictures(n, 3, side, side, seed=seed),
        torch.zeros(n, dtype=torch.int64),
        tuple(f"picture {i}" for i in range(n)),
    )


class Blob(nn.Module):
    """Sees nothing but the mean brightness of rows and columns 8 to 15."""

    def forward(self, x):
        seen = x[:, :, 8:16, 8:16].mean((1, 2, 3))
        return torch.stack([12 * (seen - 0.5), 0 * seen], 1)


BLOB = MaskSettings(steps=25, mask_size=8, mask_blur=0, jitter=0, null="zero", l1=1e-3, tv=1e-4, learning_rate=0.05)
BRIGHT = Inputs(torch.ones(1, 3, 32, 32, dtype=torch.float64), torch.tensor([0]), ("bright",))
INSIDE = torch.zeros(32, 32, dtype=torch.bool)
INSIDE[8:16, 8:16] = True


# --- what stands in for the deleted -----------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "side"), [(0.4, 9), (2.0, 33), (10.0, 12)])
def test_gaussian_blur_is_scipys(sigma, side):
    images = pictures(2, 3, side, side + 2)
    want = gaussian_filter(images.numpy(), (0, 0, sigma, sigma), mode="nearest")
    assert_close(gaussian_blur(images, sigma), torch.from_numpy(want), rtol=0, atol=1e-13)


def test_gaussian_blur_of_radius_0_is_the_picture():
    images = pictures(1, 3, 5, 5)
    assert torch.equal(gaussian_blur(images, 0), images)


@pytest.mark.parametrize(("radius", "side"), [(1, 6), (5, 14), (5, 4)])
def test_median_blur_is_scipys(radius, side):
    images = pictures(2, 3, side, side + 3)
    size = (1, 1, 2 * radius + 1, 2 * radius + 1)
    want = median_filter(images.numpy(), size, mode="nearest")
    assert torch.equal(median_blur(images, radius), torch.from_numpy(want))


def test_constant_null_is_the_pictures_own_mean_colour_and_zero_is_zero():
    images = pictures(2, 3, 6, 7)
    constant = null_images(images, "constant", 0, ("a", "b"))
    want = images.numpy().mean((2, 3), keepdims=True) * np.ones((1, 1, 6, 7))
    assert_close(constant, torch.from_numpy(want), rtol=0, atol=1e-15)
    assert not null_images(images, "zero", 0, ("a", "b")).any()


def test_noise_null_has_the_pictures_moments_and_a_stream_of_its_own():
    images = pictures(2, 3, 64, 64) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    noise = null_images(images, "noise", 0, ("a", "b"), seed=1, draw=2)
    # 4096 normal pixels: the mean is known to s / 64, the standard deviation to s / sqrt(8192); five of those
    spread = images.std((2, 3), correction=0)
    assert ((noise.mean((2, 3)) - images.mean((2, 3))).abs() < 5 * spread / 64).all()
    assert ((noise.std((2, 3)) / spread - 1).abs() < 5 / math.sqrt(8192)).all()
    assert torch.equal(noise[1:], null_images(images[1:], "noise", 0, ("b",), seed=1, draw=2))
    for seed, draw, name in ((0, 2, "b"), (1, 3, "b"), (1, 2, "a")):
        assert not torch.equal(noise[1:], null_images(images[1:], "noise", 0, (name,), seed=seed, draw=draw))


def test_an_unknown_null_is_refused():
    with pytest.raises(ValueError, match="unknown null 'fog'"):
        null_images(pictures(1, 3, 4, 4), "fog", 1, ("a",))


# --- the mask and its cost --------------------------------------------------------------------------------


def test_nearest_masks_repeat_cells_and_are_then_blurred():
    coarse = pictures(2, 1, 4, 4)
    cells = coarse.numpy().repeat(3, 2).repeat(3, 3)
    want = gaussian_filter(cells, (0, 0, 1.5, 1.5), mode="nearest")
    got = upsample(coarse, (12, 12), MaskSettings(mask_blur=1.5))
    assert_close(got, torch.from_numpy(want), rtol=0, atol=1e-14)


def test_bilinear_masks_interpolate_between_the_centres_of_cells():
    coarse = torch.tensor([[0.0, 1.0]], dtype=torch.float64).view(1, 1, 1, 2)
    got = upsample(coarse, (1, 8), MaskSettings(upsampling="bilinear", mask_blur=0))
    assert got.flatten().tolist() == [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]


def slow_regulariser(mask, s):
    """One mask (h, w), cell by cell."""
    h, w = mask.shape
    cells = list(itertools.product(range(h), range(w)))
    down = {(i, j): float(mask[i + 1, j] - mask[i, j]) for i, j in cells if i + 1 < h}
    right = {(i, j): float(mask[i, j + 1] - mask[i, j]) for i, j in cells if j + 1 < w}
    mean = s.reduction == "mean"
    l1 = sum(abs(1 - float(mask[c])) if s.task == "deletion" else abs(float(mask[c])) for c in cells)
    if s.tv_kind == "isotropic":
        squares = [down.get(c, 0.0) ** 2 + right.get(c, 0.0) ** 2 for c in cells]
        tv = sum(x ** (s.tv_beta / 2) for x in squares) / (h * w if mean else 1)
    else:
        tv = sum(
            sum(abs(x) ** s.tv_beta for x in edges.values()) / (len(edges) if mean else 1) for edges in (down, right)
        )
    return s.l1 * l1 / (h * w if mean else 1) + s.tv * tv


KINDS = list(
    itertools.product(("isotropic", "anisotropic"), ("sum", "mean"), ("deletion", "preservation"), (1, 1.7, 3))
)


@pytest.mark.parametrize(("kind", "reduction", "task", "beta"), KINDS)
def test_the_regulariser_is_its_definition_and_its_gradient_that_of_finite_differences(kind, reduction, task, beta):
    s = MaskSettings(tv_kind=kind, reduction=reduction, task=task, tv_beta=beta, l1=0.3, tv=0.7)
    masks, regulariser = pictures(2, 1, 4, 5), Regulariser.of(s)
    want = [slow_regulariser(mask[0], s) for mask in masks]
    assert_close(regulariser.value(masks), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0)
    at = masks.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: regulariser.value(m), at)
    (slope,) = torch.autograd.grad(regulariser.value(at).sum(), at)
    assert_close(regulariser.gradient(masks), slope, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["isotropic", "anisotropic"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3)])
def test_a_flat_mask_has_no_variation_and_a_finite_slope(kind, shape):
    regulariser = Regulariser(l1=0.5, tv=1.0, beta=1.0, isotropic=kind == "isotropic", mean=True)
    flat = torch.full((1, 1, *shape), 0.25, dtype=torch.float64)
    at = flat.clone().requires_grad_()
    value = regulariser.value(at)
    assert value.item() == 0.375
    assert torch.equal(torch.autograd.grad(value.sum(), at)[0], regulariser.gradient(flat))
    assert torch.equal(regulariser.gradient(flat), torch.full_like(flat, -0.5 / flat.numel()))


def slow_objective(network, inputs, s, coarse, index, shift):
    """One picture, pixel by pixel: mean colour for what is deleted, cells repeated, the picture moved below."""
    picture, mask = inputs.pixels[index].numpy(), coarse[index, 0].numpy()
    channels, height, width = picture.shape
    phi = np.empty_like(picture)
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        m = mask[i * mask.shape[0] // height, j * mask.shape[1] // width]
        moved = picture[c, max(i - shift[0], 0), max(j - shift[1], 0)]
        phi[c, i, j] = m * moved + (1 - m) * picture[c].mean()
    logits = network(torch.from_numpy(phi)[None])[0].tolist()
    probability = math.exp(logits[int(inputs.targets[index])]) / sum(map(math.exp, logits))
    wanted = probability if s.task == "deletion" else 1 - probability
    return wanted + slow_regulariser(coarse[index, 0], s)


@pytest.mark.parametrize("task", ["deletion", "preservation"])
def test_the_objective_is_its_definition_pixel_by_pixel(task):
    s = replace(SMALL, null="constant", mask_blur=0, task=task, jitter=3)
    network, inputs, coarse = small_network(), batch(side=8), pictures(3, 1, 4, 4, seed=5)
    problem = MaskProblem(network, inputs, s)
    shifts = problem.shifts(6)
    assert any(down != right for down, right in shifts)
    want = [slow_objective(network, inputs, s, coarse, i, shifts[i]) for i in range(3)]
    with torch.no_grad():
        assert_close(problem.objective(coarse, 6), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("null", NULLS)
def test_the_objective_gradient_is_that_of_finite_differences(null):
    radius = 2 if null == "median" else 1.5
    s = replace(SMALL, null=null, null_radius=radius, noise_on_image=0.1, upsampling="bilinear")
    problem = MaskProblem(small_network(), batch(), s)
    coarse = pictures(3, 1, 4, 4, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: problem.objective(m, 2), coarse)


@OPTIMISERS
def test_each_descent_is_given_the_objective_it_records(optimiser):
    problem = MaskProblem(small_network(), batch(), replace(SMALL, optimiser=optimiser))
    _, objective = descend(problem)
    with torch.no_grad():
        want = problem.objective(problem.start(), 0)
    assert objective.shape == (8, 3)
    assert_close(objective[0], want, rtol=1e-13, atol=0)


def test_masks_are_never_finer_than_the_picture():
    result = optimise_mask(small_network(), batch(2, side=5), replace(DEFAULT, steps=2))
    assert result.coarse.shape == (2, 1, 5, 5)
    assert result.mask.shape == (2, 1, 5, 5)


# --- what the masks find ----------------------------------------------------------------------------------


@OPTIMISERS
def test_the_mask_covers_the_planted_blob_and_nothing_else(optimiser):
    result = optimise_mask(Blob(), BRIGHT, replace(BLOB, optimiser=optimiser))
    assert result.before.item() == pytest.approx(1 / (1 + math.exp(-6)), rel=1e-12)
    assert result.after.item() < 0.05
    assert result.mask[0, 0][INSIDE].max() < 0.4
    assert result.mask[0, 0][~INSIDE].min() > 0.8
    assert result.mask[0, 0][~INSIDE].mean() > 0.97


@OPTIMISERS
def test_preservation_keeps_the_planted_blob_and_deletes_the_rest(optimiser):
    s = replace(BLOB, optimiser=optimiser, task="preservation")
    result = optimise_mask(Blob(), BRIGHT, s)
    assert result.after.item() > 0.9
    assert result.mask[0, 0][INSIDE].min() > 0.7
    assert result.mask[0, 0][~INSIDE].mean() < 0.1


@pytest.mark.parametrize("null", NULLS)
def test_every_null_takes_the_blob_away(null):
    dark = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    dark[..., 8:16, 8:16] = 1
    s = replace(BLOB, null=null, null_radius=9 if null == "median" else 10)
    result = optimise_mask(Blob(), Inputs(dark, torch.tensor([0]), ("blob",)), s)
    assert result.after < 0.1 < 0.99 < result.before
    assert result.mask[0, 0][INSIDE].mean() < 0.6 < 0.9 < result.mask[0, 0][~INSIDE].mean()


@pytest.mark.parametrize(("task", "inside", "outside"), [("deletion", 1, 0), ("preservation", 1, 0)])
def test_attributions_are_high_at_the_evidence_for_either_task(task, inside, outside):
    found = meaningful_perturbation(Blob(), BRIGHT, **asdict(replace(BLOB, task=task)))
    assert found.shape == (1, 1, 32, 32)
    assert found[0, 0][INSIDE].mean().item() == pytest.approx(inside, abs=0.35)
    assert found[0, 0][~INSIDE].mean().item() == pytest.approx(outside, abs=0.1)


def test_the_registry_entry_returns_one_minus_the_mask_of_the_default():
    method, inputs = MEANINGFUL_PERTURBATION.with_options(steps=3), batch(2)
    want = optimise_mask(small_network(), inputs, replace(DEFAULT, steps=3)).mask
    assert torch.equal(method(small_network(), inputs), 1 - want)
    assert (method.cost, method.deterministic) == (3, False)
    assert MaskSettings(**MEANINGFUL_PERTURBATION.options) == DEFAULT


# --- descents ---------------------------------------------------------------------------------------------


def test_adam_is_torchs_with_a_clamp():
    s = replace(SMALL, optimiser="adam", noise_on_image=0.1)
    problem = MaskProblem(small_network(), batch(), s)
    coarse, objective = descend(problem)
    mask = nn.Parameter(problem.start())
    torchs, seen = torch.optim.Adam([mask], lr=s.learning_rate), []
    for step in range(s.steps):
        torchs.zero_grad()
        value = problem.objective(mask, step)
        value.sum().backward()
        torchs.step()
        mask.data.clamp_(0, 1)
        seen.append(value.detach())
    assert_close(objective, torch.stack(seen), rtol=1e-9, atol=0)
    assert_close(coarse, mask.detach(), rtol=0, atol=1e-9)


class Linear(nn.Module):
    """Log-odds that are a plane of the picture, so that the objective with a zero null is known in full."""

    def __init__(self, size):
        super().__init__()
        self.plane = pictures(size, seed=9) / 2 - 0.15

    def forward(self, x):
        odds = (x.mean(1).flatten(1) * self.plane).sum(1)
        return torch.stack([odds, 0 * odds], 1)


@pytest.mark.parametrize(("optimiser", "steps"), [("sequential", 40), ("lbfgs", 100)])
def test_descents_end_where_scipys_bounded_lbfgs_ends(optimiser, steps):
    inputs = Inputs(torch.ones(1, 3, 6, 6, dtype=torch.float64), torch.tensor([0]), ("plane",))
    s = MaskSettings(
        steps=steps, optimiser=optimiser, mask_size=6, mask_blur=0, jitter=0, null="zero", l1=0.005, tv=0.05, tv_beta=2
    )
    problem = MaskProblem(Linear(36), inputs, s)

    def value_and_slope(m):
        mask = torch.from_numpy(m).view(1, 1, 6, 6).requires_grad_()
        value = problem.objective(mask, 0).sum()
        return value.item(), torch.autograd.grad(value, mask)[0].flatten().numpy()

    best = minimize(value_and_slope, np.ones(36), jac=True, bounds=[(0, 1)] * 36, options={"ftol": 1e-15, "gtol": 1e-9})
    assert 0 < sum((best.x <= 0) | (best.x >= 1)) < 36
    coarse, objective = descend(problem)
    reached = problem.objective(coarse, 0).item()
    assert best.fun - 1e-9 < reached < best.fun * (1 + 1e-3)
    assert reached < 0.8 * objective[0].item()


def test_lbfgs_never_goes_up_from_one_accepted_mask_to_the_next():
    problem = MaskProblem(small_network(), batch(), replace(SMALL, optimiser="lbfgs"))
    descent, values = DESCENTS["lbfgs"](problem.start(), problem.settings), []
    for _ in range(40):
        point = descent.point.requires_grad_()
        odds = problem.odds(problem.disturbed(point, 0))
        (gradient,) = torch.autograd.grad(odds.sum(), point)
        descent.update(odds.detach(), gradient)
        values.append(problem.objective(descent.result, 0).detach())
    drops = -torch.stack(values).diff(dim=0)
    assert drops.min() >= 0
    assert (drops.sum(0) > 0.005).all()


@pytest.mark.parametrize("optimiser", ["adam", "sequential"])
def test_the_objective_falls_without_a_rise_on_a_smooth_problem(optimiser):
    s = replace(BLOB, optimiser=optimiser, learning_rate=0.01, steps=30)
    objective = optimise_mask(Blob(), BRIGHT, s).objective[:, 0]
    # the sequential box may overshoot by what its plane leaves out, a thousandth of the fall
    assert objective.diff().max() <= (0 if optimiser == "adam" else 1e-3)
    assert objective[-1] < objective[0] - 0.02


def test_the_default_goes_on_where_the_softmax_is_saturated():
    class Sure(nn.Module):
        def forward(self, x):
            seen = x.mean((1, 2, 3))
            return torch.stack([40 * (seen - 0.5), 0 * seen], 1)

    inputs = Inputs(torch.ones(1, 3, 8, 8), torch.tensor([0]), ("sure",))
    s = replace(BLOB, l1=1e-3)
    assert optimise_mask(Sure(), inputs, replace(s, optimiser="adam")).after > 0.999
    assert optimise_mask(Sure(), inputs, s).after < 0.05


# --- one picture at a time --------------------------------------------------------------------------------


@OPTIMISERS
@pytest.mark.parametrize("null", ["blur", "noise"])
def test_batch_mates_do_not_matter(optimiser, null):
    s = replace(SMALL, optimiser=optimiser, null=null, noise_on_image=0.05)
    network, inputs = small_network(), batch(3)
    together = optimise_mask(network, inputs, s)
    for i in (2, 0, 1):
        alone = optimise_mask(
            network, Inputs(inputs.pixels[i : i + 1], inputs.targets[i : i + 1], inputs.ids[i : i + 1]), s
        )
        for name in ("mask", "coarse", "perturbed", "before", "after"):
            assert_close(getattr(together, name)[i], getattr(alone, name)[0], rtol=0, atol=1e-10)
        assert_close(together.objective[:, i], alone.objective[:, 0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", [{"jitter": 3}, {"noise_on_image": 0.1}, {"null": "noise"}])
def test_the_seed_decides_every_draw(change):
    network, inputs, s = small_network(), batch(2), replace(SMALL, **{"jitter": 0, **change})
    mask = optimise_mask(network, inputs, s).mask
    torch.rand(7)  # the global generator plays no part
    assert torch.equal(mask, optimise_mask(network, inputs, s).mask)
    assert not torch.equal(mask, optimise_mask(network, replace(inputs, seed=1), s).mask)
    assert not torch.equal(mask, optimise_mask(network, replace(inputs, ids=("x", "y")), s).mask)


def test_without_draws_the_seed_is_idle():
    network, inputs, s = small_network(), batch(2), replace(SMALL, jitter=0)
    assert torch.equal(optimise_mask(network, inputs, s).mask, optimise_mask(network, replace(inputs, seed=1), s).mask)


def test_shifts_take_every_value_up_to_the_jitter_and_are_named_by_picture_and_step():
    problem = MaskProblem(small_network(), batch(3), replace(SMALL, jitter=3))
    drawn = [problem.shifts(step) for step in range(60)]
    assert {shift for shifts in drawn for shift in shifts} == set(itertools.product(range(4), repeat=2))
    assert drawn[7] == problem.shifts(7) != problem.shifts(8)
    assert any(a != b for a, b, _ in drawn)


def test_shifted_moves_each_picture_and_repeats_its_edge():
    images = pictures(2, 1, 3, 4)
    moved = shifted(images, [(0, 0), (2, 1)])
    assert torch.equal(moved[0], images[0])
    want = [[images[1, 0, max(i - 2, 0), max(j - 1, 0)].item() for j in range(4)] for i in range(3)]
    assert moved[1, 0].tolist() == want


# --- manners ----------------------------------------------------------------------------------------------


@OPTIMISERS
def test_the_network_and_the_pictures_stay_as_they_were(optimiser):
    network, inputs = small_network(), batch(2)
    network[0].bias.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    wanted, pixels = [p.requires_grad for p in network.parameters()], inputs.pixels.clone()
    with torch.no_grad():
        result = optimise_mask(network, inputs, replace(SMALL, optimiser=optimiser, steps=3))
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == wanted
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(inputs.pixels, pixels)
    assert not inputs.pixels.requires_grad
    assert not any(getattr(result, name).requires_grad for name in vars(result))


@OPTIMISERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_pictures_dtype_and_hang_together(optimiser, dtype):
    network, inputs = small_network().to(dtype), batch(2)
    inputs = replace(inputs, pixels=inputs.pixels.to(dtype))
    steps = []
    s = replace(SMALL, optimiser=optimiser)
    result = optimise_mask(network, inputs, s, on_step=lambda step, value: steps.append((step, value)))
    assert all(value.dtype == dtype for value in vars(result).values())
    assert [step for step, _ in steps] == list(range(8))
    assert torch.equal(torch.stack([value for _, value in steps]), result.objective)
    assert result.mask.min() >= 0
    assert result.mask.max() <= 1
    with torch.no_grad():
        before, after = (
            network(x).softmax(1).gather(1, inputs.targets[:, None])[:, 0] for x in (inputs.pixels, result.perturbed)
        )
    tiny = 100 * torch.finfo(dtype).eps
    assert_close((result.before, result.after), (before, after), rtol=tiny, atol=tiny)
    null = gaussian_blur(inputs.pixels, s.null_radius)
    assert_close(result.perturbed, result.mask * inputs.pixels + (1 - result.mask) * null, rtol=tiny, atol=tiny)


def test_a_network_that_sees_nothing_deletes_nothing():
    class Blind(nn.Module):
        def forward(self, x):
            return 0 * x.mean((2, 3))

    for optimiser in DESCENTS:
        assert optimise_mask(Blind(), batch(1), replace(SMALL, optimiser=optimiser)).mask.eq(1).all()


def test_one_class_has_no_probability_to_take_away():
    with pytest.raises(ValueError, match=r"two classes or more, not \(2, 1\)"):
        optimise_mask(small_network(classes=1), replace(batch(2), targets=torch.zeros(2, dtype=torch.int64)), SMALL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@OPTIMISERS
def test_a_cuda_device_gives_the_same_masks(optimiser):
    network, inputs, s = small_network(), batch(2), replace(SMALL, optimiser=optimiser, noise_on_image=0.1)
    want = optimise_mask(network, inputs, s).mask
    got = optimise_mask(network.cuda(), replace(inputs, pixels=inputs.pixels.cuda()), s).mask
    assert got.is_cuda
    assert_close(got.cpu(), want, rtol=0, atol=1e-9)


# --- settings ---------------------------------------------------------------------------------------------


def test_presets_hold_the_published_numbers():
    paper = {
        "steps": 300,
        "optimiser": "adam",
        "learning_rate": 0.1,
        "l1": 1e-4,
        "tv": 1e-2,
        "tv_beta": 3,
        "tv_kind": "isotropic",
    }
    paper |= {
        "reduction": "sum",
        "mask_size": 28,
        "upsampling": "nearest",
        "mask_blur": 5,
        "jitter": 3,
        "task": "deletion",
    }
    paper |= {"null": "blur", "null_radius": 10, "noise_on_image": 0}
    port = {
        "steps": 500,
        "optimiser": "adam",
        "learning_rate": 0.1,
        "l1": 0.01,
        "tv": 0.2,
        "tv_beta": 3,
        "tv_kind": "anisotropic",
    }
    port |= {
        "reduction": "mean",
        "mask_size": 28,
        "upsampling": "nearest",
        "mask_blur": 0,
        "jitter": 0,
        "task": "deletion",
    }
    port |= {"null": "median", "null_radius": 5, "noise_on_image": 0.2}
    assert asdict(PAPER) == paper
    assert asdict(PORT) == port
    assert asdict(LOCALIZATION) == paper | {"l1": 1e-3, "tv": 1e-2, "tv_beta": 2}
    assert asdict(DEFAULT) == paper | {"steps": 50, "optimiser": "sequential"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be finite and at least 1, not 0"),
        ("steps", 2.5, "steps must be a whole number, not 2.5"),
        ("mask_size", 0, "mask_size must be finite and at least 1, not 0"),
        ("l1", -1e-4, "l1 must be finite and at least 0, not -0.0001"),
        ("tv", math.nan, "tv must be finite and at least 0, not nan"),
        ("tv_beta", 0.5, "tv_beta must be finite and at least 1, not 0.5"),
        ("learning_rate", 0, "learning_rate must be above 0, not 0"),
        ("learning_rate", math.inf, "learning_rate must be finite and at least 0, not inf"),
        ("jitter", -1, "jitter must be finite and at least 0, not -1"),
        ("mask_blur", -1, "mask_blur must be finite and at least 0, not -1"),
        ("noise_on_image", -0.1, "noise_on_image must be finite and at least 0, not -0.1"),
        ("optimiser", "sgd", "optimiser 'sgd' is not one of sequential, adam, lbfgs"),
        ("null", "fog", "null 'fog' is not one of blur, median, constant, zero, noise"),
        ("task", "insertion", "task 'insertion' is not one of deletion, preservation"),
        ("tv_kind", "l0", "tv_kind 'l0' is not one of isotropic, anisotropic"),
        ("reduction", "max", "reduction 'max' is not one of sum, mean"),
        ("upsampling", "cubic", "upsampling 'cubic' is not one of bilinear, nearest"),
    ],
)
def test_settings_refuse_nonsense(name, value, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(DEFAULT, **{name: value})


def test_a_median_takes_whole_pixels():
    with pytest.raises(ValueError, match=r"null_radius must be a whole number, not 2\.5"):
        MaskSettings(null="median", null_radius=2.5)
