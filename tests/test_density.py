"""The density sees what it says it sees, contains the paper's, and its likelihood is one."""

import math
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from torch.nn import functional as F

from bundle.errors import BundleError
from bundle.networks import SpatialARDensity, load_paper_checkpoint
from bundle.networks.context import LinearContext
from bundle.networks.density import squared_error
from bundle.networks.gaussian import fit_gaussian, moments
from bundle.networks.masked import taps_around

GOLDEN = Path(__file__).parent / "data" / "golden"
MODES = {  # file: mode, dilations
    "paper_causal_dil1": ("causal", [1] * 5),
    "paper_causal_dil4": ("causal", [4] * 5),
    "paper_bidirectional_dil4": ("bidirectional", [4] * 5),
    "paper_standard_dil1": ("standard", [1] * 5),
}


PAPER = {"hidden_channels": 4, "kernel_size": 3, "linear_components": 0, "covariance": "isotropic"}


def paper_density(channels, dilations, mode="causal", **settings):
    return SpatialARDensity(channels, mode, dilations=dilations, **(PAPER | settings))


def seen_offsets(density: SpatialARDensity, size: int = 33) -> set[tuple[int, int]]:
    """Offsets (rows, columns) of the patches that the prediction at the center depends on, by gradient."""
    torch.manual_seed(0)
    density = density.double()
    for tensor in [*density.parameters(), *(density.linear.buffers() if density.linear else [])]:
        if tensor is not getattr(density.linear, "placement", None):
            torch.nn.init.uniform_(tensor, 0.1, 1.0)  # all positive: no path cancels and no ReLU closes
    features = torch.rand(1, density.in_channels, size, size, dtype=torch.float64, requires_grad=True)
    center = size // 2
    density(features)[0, :, center, center].sum().backward()
    rows, columns = torch.nonzero(features.grad[0].abs().sum(dim=0), as_tuple=True)
    return {(int(r) - center, int(c) - center) for r, c in zip(rows, columns, strict=True)}


def square(reach: int) -> set[tuple[int, int]]:
    return {(row, column) for row in range(-reach, reach + 1) for column in range(-reach, reach + 1)}


@pytest.mark.parametrize("name", MODES)
def test_equals_the_authors_code(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    mode, dilations = MODES[name]
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.") and "mask" not in k}
    density = paper_density(24, dilations, mode, hidden_channels=16)
    density.contexts[0].load_state_dict(state)
    prediction = density(golden["features"])
    patch_map = squared_error(prediction, golden["features"])
    torch.testing.assert_close(prediction, golden["prediction"], atol=1e-5, rtol=0)
    torch.testing.assert_close(patch_map, golden["patch_map"], atol=1e-5, rtol=0)
    image_map = F.interpolate(patch_map[:, None], (240, 240), mode="bilinear", align_corners=False)
    torch.testing.assert_close(image_map, golden["image_map_240"], atol=1e-5, rtol=0)


def test_builds_the_network_of_an_authors_checkpoint():
    golden = load_file(GOLDEN / "paper_causal_dil4.safetensors")
    density = load_paper_checkpoint(GOLDEN / "paper_checkpoint_causal_dil4.pth", dilations=[4] * 5)
    settings = {"mode": "causal", "hidden_channels": 16, "dilations": [4] * 5, "kernel_size": 3, "linear_components": 0}
    assert settings.items() <= density.describe().items()
    torch.testing.assert_close(density(golden["features"]), golden["prediction"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODES)
def test_infers_the_mode_of_an_authors_checkpoint(name, tmp_path):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    mode, dilations = MODES[name]
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "paper.pth")
    assert load_paper_checkpoint(tmp_path / "paper.pth", dilations).describe()["mode"] == mode


def test_refuses_an_authors_checkpoint_with_other_dilations():
    with pytest.raises(BundleError, match=r"5 layers, but 3 dilations"):
        load_paper_checkpoint(GOLDEN / "paper_checkpoint_causal_dil4.pth", dilations=[4] * 3)


def test_refuses_a_file_that_is_no_authors_checkpoint(tmp_path):
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(BundleError, match=r"other\.pth' is no checkpoint of the authors' code"):
        load_paper_checkpoint(tmp_path / "other.pth", dilations=[1])


def comes_before(offset: tuple[int, int]) -> bool:
    return offset[0] < 0 or (offset[0] == 0 and offset[1] < 0)


def test_causal_sees_only_what_comes_before():
    assert all(map(comes_before, seen_offsets(paper_density(3, [1, 2, 4, 2, 1]))))


def test_causal_with_a_linear_prediction_sees_only_what_comes_before():
    density = SpatialARDensity(3, "causal", hidden_channels=4, dilations=[1, 1], kernel_size=3, linear_components=2)
    assert all(map(comes_before, seen_offsets(density)))


def test_causal_with_dilation_1_sees_its_four_neighbors():
    assert {(0, -1), (-1, -1), (-1, 0), (-1, 1)} <= seen_offsets(paper_density(3, [1] * 5))


def test_causal_with_dilation_4_sees_a_lattice_and_no_neighbor():
    seen = seen_offsets(paper_density(3, [4] * 5), size=49)
    assert gcd(*(abs(value) for offset in seen for value in offset)) == 4
    assert len(seen) == 50


@pytest.mark.parametrize(("dilations", "count"), [([1, 2, 4, 2, 1], 175), ([1, 2, 4, 8, 8], 642)])
def test_causal_with_dilations_of_gcd_1_sees_all_four_neighbors_and_no_lattice(dilations, count):
    seen = seen_offsets(paper_density(3, dilations), size=57)
    assert {(0, -1), (-1, -1), (-1, 0), (-1, 1)} <= seen
    assert gcd(*(abs(value) for offset in seen for value in offset)) == 1
    assert len(seen) == count


def test_bidirectional_with_constant_dilation_sees_its_own_target():
    assert (0, 0) in seen_offsets(paper_density(3, [4] * 3, "bidirectional"))


def test_bidirectional_with_odd_then_even_dilations_sees_all_neighbors_and_never_its_own_target():
    seen = seen_offsets(paper_density(3, [1, 2, 4, 2, 2], "bidirectional"))
    assert (0, 0) not in seen
    assert square(1) - {(0, 0)} <= seen
    assert len(seen) == 408


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("dilations", [[1], [1, 1], [1, 2], [1, 2, 2], [3, 2, 4], [2, 1, 1]])
def test_bidirectional_says_by_a_warning_whether_it_sees_its_own_target(dilations, kernel_size, caplog):
    density = paper_density(2, dilations, "bidirectional", kernel_size=kernel_size)
    leaks = (0, 0) in seen_offsets(density, size=63)
    assert ("gives no likelihood" in caplog.text) == leaks
    assert density.likelihood == ("none" if leaks else "composite")


def test_every_density_is_named_for_the_likelihood_that_it_gives(caplog):
    assert SpatialARDensity(64).likelihood == SpatialARDensity(64, "streams").likelihood == "composite"
    assert paper_density(3, [4] * 5).likelihood == "joint"
    assert paper_density(3, [1], orders=2).likelihood == "composite"
    assert "likelihood" not in caplog.text
    assert paper_density(3, [1], "standard").likelihood == "none"


@pytest.mark.parametrize("dilations", [4, [], [1.5], [0]])
def test_dilations_that_are_no_list_of_whole_numbers_are_refused(dilations):
    with pytest.raises(BundleError, match=r"dilations is .*: one whole number >= 1 per layer"):
        SpatialARDensity(64, "causal", dilations=dilations)


@pytest.mark.parametrize("dilations", [[1], [1, 1, 2]])
def test_streams_see_every_direction_and_never_their_own_target(dilations):
    seen = seen_offsets(
        SpatialARDensity(3, "streams", hidden_channels=4, dilations=dilations, kernel_size=3, linear_components=0),
        size=25,
    )
    assert (0, 0) not in seen
    reach = sum(dilations)
    assert square(reach) - {(0, 0)} <= seen
    assert {(-reach - 1, 0), (reach + 1, 0), (0, -reach - 1), (0, reach + 1)} <= seen


@pytest.mark.parametrize("linear_components", [0, 2])
@pytest.mark.parametrize(("kernel_size", "guard"), [(3, 0), (7, 1), (9, 2)])
def test_guarded_sees_the_ring_and_nothing_inside_the_guard(kernel_size, guard, linear_components):
    density = SpatialARDensity(
        3, hidden_channels=4, kernel_size=kernel_size, guard=guard, linear_components=linear_components
    )
    assert seen_offsets(density) == square(kernel_size // 2) - square(guard)


@pytest.mark.parametrize("share", [True, False])
def test_two_raster_orders_see_both_sides_and_four_see_all_but_the_target(share):
    two = seen_offsets(paper_density(3, [1, 1], orders=2, share_orders=share), size=13)
    four = seen_offsets(paper_density(3, [1, 1], orders=4, share_orders=share), size=13)
    assert {(-row, -column) for row, column in two} == two
    assert (0, 0) not in two and square(1) - {(0, 0)} <= two
    assert four == square(2) - {(0, 0)}


def test_separate_orders_have_weights_of_their_own_and_shared_ones_do_not():
    count = {share: len(paper_density(3, [1, 1], orders=4, share_orders=share).contexts) for share in (True, False)}
    assert count == {True: 1, False: 4}


def test_a_position_code_tells_equal_surroundings_apart_and_shows_no_target():
    density = SpatialARDensity(3, hidden_channels=4, linear_components=0, position_code=True)
    assert seen_offsets(density) == square(3) - square(1)
    flat = density(torch.ones(1, 3, 33, 33, dtype=torch.float64))[0, 0]
    assert not torch.allclose(flat[10, 10], flat[20, 20])


def test_standard_sees_everything_in_reach():
    assert seen_offsets(paper_density(3, [1, 1], "standard")) == square(2)


@pytest.mark.parametrize("mode", ["zero", "position"])
def test_modes_that_look_at_no_patch_depend_on_none_and_have_nothing_to_learn(mode):
    density = SpatialARDensity(3, mode, linear_components=0)
    density.fit_linear([torch.rand(4, 3, 5, 6)], [])
    first, second = torch.rand(2, 3, 5, 6), torch.rand(2, 3, 5, 6)
    assert torch.equal(density(first), density(second))
    assert not list(density.parameters())
    assert density.likelihood == "joint"
    density.loss(density(first), first).backward()


def test_without_a_prediction_the_residual_is_the_embedding_itself():
    features = torch.rand(2, 3, 5, 6)
    assert torch.equal(SpatialARDensity(3, "zero", linear_components=0).residual(features), features)


def test_the_position_mean_is_the_mean_at_each_position_over_all_batches():
    healthy = torch.rand(7, 3, 5, 6)
    density = SpatialARDensity(3, "position", linear_components=0, covariance="diagonal", position_code=True)
    density.fit_linear(healthy.split(3), [])
    torch.testing.assert_close(density.residual(healthy), healthy - healthy.mean(0))


def test_a_fitted_position_mean_can_be_loaded_and_scripted():
    density, other = (SpatialARDensity(3, "position", linear_components=0) for _ in range(2))
    features = torch.rand(4, 3, 5, 6)
    density.fit_linear([features], [])
    other.load_state_dict(density.state_dict())
    assert torch.equal(other(features), density(features))
    assert torch.equal(torch.jit.script(density)(features), density(features))


def test_masks_are_neither_trained_nor_saved():
    context = paper_density(3, [1, 2]).contexts[0]
    expected = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert [name for name, _ in context.named_parameters()] == expected
    assert set(context.state_dict()) == set(expected)


# the linear prediction


def smooth_fields(count, seed=0):
    """Embeddings in which neighbors depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    return F.avg_pool2d(torch.randn(count, 6, 14, 14, generator=generator), 3, 1)


def test_the_linear_prediction_is_least_squares_on_the_ring():
    fields, held_out = smooth_fields(40), smooth_fields(20, seed=1)
    linear = LinearContext(6, 6, taps_around(3))
    linear.RIDGES = (1e-9,)
    linear.fit([fields[:25], fields[25:]], [held_out])
    # the inside of the maps, where all neighbors exist
    inside, around = fields[:, :, 1:-1, 1:-1], F.unfold(fields, 3).unflatten(1, (6, 9))
    context = around[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].flatten(1, 2).transpose(1, 2).flatten(0, 1)
    context = torch.cat([context, torch.ones(len(context), 1)], dim=1).double()
    target = inside.movedim(1, -1).flatten(0, 2).double()
    best = target - context @ torch.linalg.lstsq(context, target).solution
    found = (fields - linear(fields))[:, :, 1:-1, 1:-1].square().mean()
    assert float(found) == pytest.approx(float(best.square().mean()), rel=0.02)


def test_the_ridge_is_the_best_on_held_out_images():
    few, many = smooth_fields(2), smooth_fields(40, seed=1)
    losses = {}
    for ridge in (*LinearContext.RIDGES, None):
        linear = LinearContext(6, 6, taps_around(7, 1))
        linear.RIDGES = LinearContext.RIDGES if ridge is None else (ridge,)
        linear.fit([few], [many])
        losses[ridge] = float((many - linear(many)).square().mean(dim=(0, 2, 3)).log().sum())
    assert losses.pop(None) == pytest.approx(min(losses.values()), rel=1e-4)


def test_a_new_density_predicts_what_the_linear_prediction_does():
    density = SpatialARDensity(6, hidden_channels=8, linear_components=6)
    density.fit_linear([smooth_fields(10)], [smooth_fields(4, seed=1)])
    fields = smooth_fields(2, seed=2)
    torch.testing.assert_close(density(fields), density.linear(fields))


# the likelihood


@pytest.mark.parametrize("covariance", ["isotropic", "diagonal", "low_rank", "full"])
def test_the_log_likelihood_of_a_patch_is_that_of_a_normalized_gaussian(covariance):
    density = SpatialARDensity(6, hidden_channels=8, linear_components=0, covariance=covariance, rank=2, shrinkage=0.1)
    fields = smooth_fields(6) * torch.linspace(0.5, 2, 6).view(1, 6, 1, 1) + 1
    density.fit_covariance([fields])
    torch.nn.init.normal_(density.contexts[0].predict.weight, std=0.3)
    prediction = density(fields).detach()
    found = density.log_likelihood(prediction, fields).flatten().detach()
    residual = (fields - prediction[:, :6] - density.residual_mean[:, None, None]).movedim(1, -1).reshape(-1, 6).numpy()
    if covariance == "diagonal":
        variance = prediction[:, 6:].exp().movedim(1, -1).reshape(-1, 6).numpy()
        expected = -0.5 * (residual**2 / variance + np.log(2 * math.pi * variance)).sum(1)
    else:
        matrix = torch.linalg.inv(density.whitening.double().T @ density.whitening.double()).numpy()
        expected = multivariate_normal(np.zeros(6), (matrix + matrix.T) / 2).logpdf(residual)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_the_isotropic_loss_is_the_mean_squared_error_of_the_paper():
    density, fields = paper_density(6, [1, 1]), smooth_fields(3)
    prediction = density(fields)
    torch.testing.assert_close(density.loss(prediction, fields), F.mse_loss(prediction, fields))


def test_the_fitted_covariance_is_ledoit_and_wolfs():
    patches = torch.randn(60, 8, 1, 1) * torch.linspace(0.8, 1.2, 8).view(1, 8, 1, 1) + 5
    mean, whitening, log_determinant = fit_gaussian(patches.split(25), "full")
    expected, _ = ledoit_wolf(patches.flatten(1).double().numpy())
    found = torch.linalg.inv(whitening.double() @ whitening.double())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, patches.flatten(1).mean(0), rtol=1e-5)
    assert float(log_determinant) == pytest.approx(np.linalg.slogdet(expected)[1], rel=1e-4)


def test_a_low_rank_covariance_keeps_the_leading_directions_and_the_total_variance():
    patches = torch.randn(500, 8, 1, 1) * torch.tensor([5.0, 3, 1, 0.9, 0.8, 0.7, 0.6, 0.5]).view(1, 8, 1, 1)
    _, whitening, _ = fit_gaussian([patches], "low_rank", rank=2, shrinkage=0.0)
    covariance = torch.linalg.inv(whitening.double() @ whitening.double())
    _, full = moments([patches])
    values, exact = torch.linalg.eigvalsh(covariance), torch.linalg.eigvalsh(full)
    torch.testing.assert_close(values[-2:], exact[-2:], rtol=1e-4, atol=0)
    assert float(values[:6].std()) < 1e-3
    assert float(covariance.trace()) == pytest.approx(float(full.trace()), rel=1e-4)


@pytest.mark.slow
def test_learned_variances_make_noisy_patches_less_surprising():
    torch.manual_seed(0)
    density = SpatialARDensity(2, hidden_channels=8, kernel_size=3, guard=0, linear_components=0, covariance="diagonal")
    noise = torch.randn(64, 2, 6, 6) * torch.tensor([0.2, 3.0]).repeat_interleave(32).view(64, 1, 1, 1)
    optimizer = torch.optim.Adam(density.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        density.loss(density(noise), noise).backward()
        optimizer.step()
    lengths = density.residual(noise).detach().square().mean(dim=(1, 2, 3))
    assert 0.5 < float(lengths[32:].mean() / lengths[:32].mean()) < 2


def test_hidden_taps_get_no_gradient():
    density = paper_density(3, [1, 1])
    density(torch.rand(1, 3, 5, 5)).sum().backward()
    first = density.contexts[0].net[0]
    assert torch.all(first.weight.grad[:, :, first.taps == 0] == 0)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_any_kernel_keeps_the_size_of_the_map(kernel_size):
    density = paper_density(3, [1, 2, 3], kernel_size=kernel_size)
    assert density(torch.rand(2, 3, 6, 9)).shape == (2, 3, 6, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "casual"}, "did you mean 'causal'"),
        ({"covariance": "ful"}, "did you mean 'full'"),
        ({"orders": 3}, "orders is 3: 1, 2 or 4"),
        ({"guard": 3}, "guard is 3: give 0 to 2"),
        ({"shrinkage": 2.0}, "shrinkage is 2.0: null, or 0 to 1"),
        ({"linear_components": 9}, "linear_components is 9: 0 to 3"),
        ({"mode": "standard"}, "sees its own target"),
        ({"mode": "position"}, "linear_components is 2: mode .position. looks at no other patch: give 0"),
        ({"mode": "zero", "linear_components": 0, "orders": 2}, "orders is 2: mode .zero. looks at no other patch"),
        ({"kernel_size": 4}, "must be odd"),
        ({"mode": "causal", "dilations": []}, "one whole number >= 1 per layer"),
        ({"hidden_channels": 0}, "at least 1"),
        ({"dilations": [1]}, "setting of mode 'guarded' 'dilations' is unknown"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(BundleError, match=message):
        SpatialARDensity(3, **{"linear_components": 2, **arguments})
