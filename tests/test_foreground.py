"""The body is found on the grid of patches, holes included, and an image without air is all body."""

import pytest
import torch

from bundle.errors import BundleError
from bundle.networks.foreground import Foreground, mean_brightness


def found(brightness, foreground="auto"):
    return Foreground(list(brightness.shape[-2:]), foreground)(brightness[None])[0]


def test_dark_patches_around_the_body_are_air():
    brightness = torch.zeros(6, 8)
    brightness[1:5, 2:7] = 0.3
    assert torch.equal(found(brightness), brightness > 0)


def test_a_black_cyst_inside_the_body_is_body():
    brightness = torch.full((7, 7), 0.3)
    brightness[0], brightness[:, 0] = 0, 0
    brightness[3:5, 2:4] = 0  # closed
    inside = found(brightness)
    assert inside[1:, 1:].all() and not inside[0].any() and not inside[:, 0].any()


def test_a_notch_at_the_rim_of_the_body_stays_air():
    brightness = torch.full((7, 7), 0.3)
    brightness[:3, 3] = 0
    assert not found(brightness)[:3, 3].any()


@pytest.mark.parametrize("level", [0.05, 1.0])
def test_an_image_without_air_is_all_body(level):
    assert found(torch.full((5, 6), level)).all()


def test_all_takes_every_patch_and_a_number_is_a_threshold():
    brightness = torch.tensor([[0.0, 0.1, 0.4]])
    assert found(brightness, "all").all()
    assert found(brightness, 0.2).tolist() == [[False, False, True]]
    assert found(brightness).tolist() == [[False, True, True]]


@pytest.mark.parametrize("value", ["some", 1.0, -0.1, False])
def test_another_word_or_a_threshold_out_of_range_is_refused(value):
    with pytest.raises(BundleError, match="give auto, all, or an intensity"):
        Foreground([4, 4], value)


def test_brightness_is_the_mean_intensity_of_each_patch():
    image = torch.rand(2, 3, 32, 48)
    brightness = mean_brightness(image, 16)
    assert brightness.shape == (2, 1, 2, 3)
    torch.testing.assert_close(brightness[1, 0, 1, 2], image[1, :, 16:, 32:].mean())
