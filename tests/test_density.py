"""The density network is the paper's, and sees what it says it sees."""

from math import gcd
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from bundle.errors import BundleError
from bundle.networks import SpatialARDensity, load_paper_checkpoint
from bundle.networks.density import squared_error

GOLDEN = Path(__file__).parent / "data" / "golden"
MODES = {  # file: mode, dilations
    "paper_causal_dil1": ("causal", [1] * 5),
    "paper_causal_dil4": ("causal", [4] * 5),
    "paper_bidirectional_dil4": ("bidirectional", [4] * 5),
    "paper_standard_dil1": ("standard", [1] * 5),
}


def seen_offsets(density: SpatialARDensity, size: int = 33) -> set[tuple[int, int]]:
    """Offsets (rows, columns) of the patches that the prediction at the center depends on, by gradient."""
    torch.manual_seed(0)
    density = density.double()
    for parameter in density.parameters():
        torch.nn.init.uniform_(parameter, 0.1, 1.0)  # all positive: no path cancels and no ReLU closes
    features = torch.rand(1, density.in_channels, size, size, dtype=torch.float64, requires_grad=True)
    center = size // 2
    density(features)[0, :, center, center].sum().backward()
    rows, columns = torch.nonzero(features.grad[0].abs().sum(dim=0), as_tuple=True)
    return {(int(r) - center, int(c) - center) for r, c in zip(rows, columns, strict=True)}


@pytest.mark.parametrize("name", MODES)
def test_equals_the_authors_code(name):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    mode, dilations = MODES[name]
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.") and "mask" not in k}
    density = SpatialARDensity(24, 16, dilations, mode=mode)
    density.load_state_dict(state)
    prediction = density(golden["features"])
    patch_map = squared_error(prediction, golden["features"])
    torch.testing.assert_close(prediction, golden["prediction"], atol=1e-5, rtol=0)
    torch.testing.assert_close(patch_map, golden["patch_map"], atol=1e-5, rtol=0)
    image_map = F.interpolate(patch_map[:, None], (240, 240), mode="bilinear", align_corners=False)
    torch.testing.assert_close(image_map, golden["image_map_240"], atol=1e-5, rtol=0)


def test_builds_the_network_of_an_authors_checkpoint():
    golden = load_file(GOLDEN / "paper_causal_dil4.safetensors")
    density = load_paper_checkpoint(GOLDEN / "paper_checkpoint_causal_dil4.pth", dilations=[4] * 5)
    assert density.describe() == {"mode": "causal", "hidden_channels": 16, "dilations": [4] * 5, "kernel_size": 3}
    torch.testing.assert_close(density(golden["features"]), golden["prediction"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODES)
def test_infers_the_mode_of_an_authors_checkpoint(name, tmp_path):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    mode, dilations = MODES[name]
    state = {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "paper.pth")
    assert load_paper_checkpoint(tmp_path / "paper.pth", dilations).mode == mode


def test_refuses_an_authors_checkpoint_with_other_dilations():
    with pytest.raises(BundleError, match=r"5 layers, but 3 dilations"):
        load_paper_checkpoint(GOLDEN / "paper_checkpoint_causal_dil4.pth", dilations=[4] * 3)


def test_refuses_a_file_that_is_no_authors_checkpoint(tmp_path):
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(BundleError, match=r"other\.pth' is no checkpoint of the authors' code"):
        load_paper_checkpoint(tmp_path / "other.pth", dilations=[1])


def test_causal_sees_only_what_comes_before():
    seen = seen_offsets(SpatialARDensity(3, 4, [1, 2, 4, 2, 1]))
    assert all(row < 0 or (row == 0 and column < 0) for row, column in seen)


def test_causal_with_dilation_1_sees_its_four_neighbors():
    assert {(0, -1), (-1, -1), (-1, 0), (-1, 1)} <= seen_offsets(SpatialARDensity(3, 4, [1] * 5))


def test_causal_with_dilation_4_sees_a_lattice_and_no_neighbor():
    seen = seen_offsets(SpatialARDensity(3, 4, [4] * 5), size=49)
    assert gcd(*(abs(value) for offset in seen for value in offset)) == 4
    assert len(seen) == 50


def test_bidirectional_with_constant_dilation_sees_its_own_target():
    assert (0, 0) in seen_offsets(SpatialARDensity(3, 4, [4] * 3, mode="bidirectional"))


def test_bidirectional_with_odd_then_even_dilations_never_sees_its_own_target():
    seen = seen_offsets(SpatialARDensity(3, 4, [1, 2, 4, 2, 2], mode="bidirectional"))
    neighbors = {(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)} - {(0, 0)}
    assert (0, 0) not in seen
    assert neighbors <= seen


def test_standard_sees_everything_in_reach():
    seen = seen_offsets(SpatialARDensity(3, 4, [1, 1], mode="standard"))
    assert seen == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


def test_masks_are_neither_trained_nor_saved():
    density = SpatialARDensity(3, 4, [1, 2])
    assert [name for name, _ in density.named_parameters()] == [
        "net.0.weight",
        "net.0.bias",
        "net.2.weight",
        "net.2.bias",
    ]
    assert set(density.state_dict()) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}


def test_hidden_taps_get_no_gradient():
    density = SpatialARDensity(3, 4, [1, 1])
    density(torch.rand(1, 3, 5, 5)).sum().backward()
    first = density.net[0]
    assert torch.all(first.weight.grad[:, :, first.taps == 0] == 0)


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_any_kernel_keeps_the_size_of_the_map(kernel_size):
    assert SpatialARDensity(3, 4, [1, 2, 3], kernel_size)(torch.rand(2, 3, 6, 9)).shape == (2, 3, 6, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "casual"}, "did you mean 'causal'"),
        ({"kernel_size": 4}, "must be odd"),
        ({"dilations": []}, "one whole number >= 1 per layer"),
        ({"hidden_channels": 0}, "at least 1"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(BundleError, match=message):
        SpatialARDensity(3, **arguments)
