"""All that follows from a map and the scores of slices follows in one place."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from bundle.errors import BundleError
from bundle.results import CaseResult, RestoredMap
from bundle.transforms import OrientSlicesd


def result(scores, counts=None, **options):
    shape = (4, 3, len(scores))
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    counts = np.ones(len(scores), bool) if counts is None else np.array(counts)
    options = {"on_file": RestoredMap(values, 2, tuple(range(len(scores)))), **options}
    return CaseResult("a", "a.nii", values[None], np.array(scores, np.float32), counts, **options)


def test_slices_that_count_come_first_then_by_their_scores():
    found = result([1.0, 9.0, 3.0, 3.0, 8.0], [True, False, True, True, False])
    assert found.ranking == [2, 3, 0, 1, 4]
    assert [one.rank for one in found.slices] == [3, 4, 1, 2, 5]
    assert [one.counts for one in found.slices] == [True, False, True, True, False]


def test_the_score_is_that_of_the_worst_slice_that_counts():
    found = result([1.0, 9.0, 3.5], [True, False, True])
    assert (found.score, found.worst_position) == (3.5, 2)


def test_only_slices_that_count_are_named():
    found = result([1.0, 9.0, 3.5], [True, False, True])
    assert [named.position for named in found.worst(1)] == [2]
    assert [named.position for named in found.worst(5)] == [2, 0]


def test_the_mask_is_where_the_map_exceeds_its_threshold():
    found = result([0.0, 0.0], threshold=20.0)
    np.testing.assert_array_equal(found.mask, found.restored.values > 20)
    assert found.mask.sum() == 3


def test_a_map_that_was_not_brought_back_is_named_with_the_remedy():
    with pytest.raises(BundleError, match=r"map of 'a\.nii' is not on the axes of its file: keep Invertd"):
        _ = result([1.0], on_file=None).mask


AFFINES = {
    "RAS": np.diag([1.0, 1.5, 4.0, 1.0]),
    "flipped": np.array([[-1.0, 0, 0, 80], [0, -1.5, 0, 90], [0, 0, -4.0, 50], [0, 0, 0, 1]]),
    "sagittal": np.array([[0, 0, 4.0, -30], [-1.5, 0, 0, 70], [0, 1.0, 0, -60], [0, 0, 0, 1]]),
}


def after_postprocessing(affine, plane):
    """What an engine has of a volume whose values tell their place in the file, and the values."""
    values = torch.arange(7 * 6 * 5, dtype=torch.float32).view(1, 7, 6, 5)
    meta = {"filename_or_obj": "a.dcm", "slice_axis": 2, "instances": (11, 12, 13, 14, 15)}
    orient = OrientSlicesd("image", plane)
    case = orient({"name": "a", "image": MetaTensor(values, affine=torch.from_numpy(affine), meta=meta)})
    anomaly_map = case["image"].clone()
    count = anomaly_map.shape[-1]
    pred = {"map": anomaly_map, "slice_scores": torch.rand(count), "slice_counts": torch.ones(count, dtype=torch.bool)}
    parser = ConfigParser(ConfigParser.load_config_file("configs/inference.json") | {"preprocessing": None})
    config = parser["postprocessing"]
    config["transforms"][-1]["transform"] = orient
    return ConfigParser({"postprocessing": config}).get_parsed_content("postprocessing")({**case, "pred": pred}), values


@pytest.mark.parametrize("plane", ["acquired", "axial", "coronal"])
@pytest.mark.parametrize("name", AFFINES)
def test_each_slice_has_its_index_in_the_file(name, plane):
    data, values = after_postprocessing(AFFINES[name], plane)
    found = CaseResult.from_output(data, SimpleNamespace(threshold=torch.tensor(1.0), image_threshold=torch.tensor(2)))
    np.testing.assert_array_equal(found.restored.values, values[0])
    np.testing.assert_allclose(found.restored.affine, AFFINES[name], atol=1e-6)
    for one in found.slices:
        seen = found.anomaly_map[0, ..., one.position]
        stored = found.restored.values.take(one.index, found.restored.slice_axis)
        assert set(seen.flat) == set(stored.flat)
    assert sorted(one.index for one in found.slices) == list(range(len(found.slices)))
    assert (found.name, found.path, found.threshold, found.image_threshold) == ("a", "a.dcm", 1.0, 2.0)


def test_slices_have_instances_only_where_they_are_those_of_the_files():
    stored = CaseResult.from_output(after_postprocessing(AFFINES["flipped"], "acquired")[0])
    assert [one.instance for one in stored.slices] == [11 + one.index for one in stored.slices]
    other = CaseResult.from_output(after_postprocessing(AFFINES["flipped"], "coronal")[0])
    assert {one.instance for one in other.slices} == {None}
