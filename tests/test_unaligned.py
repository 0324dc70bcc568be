"""The unaligned copy of a data set moves image and mask together, the same way each time."""

import numpy as np
import pytest
from PIL import Image

from bundle.data.cases import find_splits
from bundle.errors import BundleError
from scripts.samples.unaligned import write_unaligned


@pytest.fixture
def pictures(tmp_path):
    """A bright disk, off the middle, whose mask is the disk."""
    rows, columns = np.mgrid[:60, :80]
    disk = ((rows - 25) ** 2 + (columns - 45) ** 2 < 100).astype(np.uint8)
    for name, values in {
        "train/good/a.png": 200 * disk,
        "valid/good/img/b.png": 200 * disk,
        "test/good/img/c.png": 200 * disk,
        "test/Ungood/img/d.png": 200 * disk,
        "test/Ungood/label/d.png": 255 * disk,
    }.items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return tmp_path / "set"


def read(path):
    return np.asarray(Image.open(path))


def test_every_image_is_moved_and_its_mask_with_it(pictures, tmp_path):
    assert write_unaligned(pictures, tmp_path / "copy") == 4
    assert [len(cases) for cases in find_splits(tmp_path / "copy").values()] == [1, 1, 2]
    image, mask = (read(tmp_path / f"copy/test/Ungood/{kind}/d.png") for kind in ("img", "label"))
    assert image.shape == mask.shape == (60, 80)
    assert set(np.unique(mask)) == {0, 255}
    assert np.mean((image > 100) == (mask > 0)) > 0.99
    assert np.mean((mask > 0) == (read(pictures / "test/Ungood/label/d.png") > 0)) < 0.99


def test_the_copy_is_the_same_each_time(pictures, tmp_path):
    for name in ("one", "two"):
        write_unaligned(pictures, tmp_path / name)
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_images_of_a_set_are_moved_each_in_its_own_way(pictures, tmp_path):
    write_unaligned(pictures, tmp_path / "copy")
    first, second = (read(tmp_path / f"copy/{name}") for name in ("train/good/a.png", "test/good/img/c.png"))
    assert np.abs(first.astype(int) - second).max() > 50


def test_a_folder_that_is_not_empty_is_refused(pictures, tmp_path):
    with pytest.raises(BundleError, match="is not empty: give a new folder"):
        write_unaligned(pictures, pictures)
