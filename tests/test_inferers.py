"""Volumes are mapped slice by slice, and keep their geometry."""

import torch
from monai.data import MetaTensor
from monai.inferers import SliceInferer

from bundle.inferers import SliceBatchInferer


def test_a_volume_equals_its_slices_one_by_one(detector):
    volume = torch.rand(1, 1, 48, 40, 5)
    found = SliceBatchInferer(batch_size=2)(volume, detector)
    for index in range(5):
        expected = detector.detect(volume[..., index])
        torch.testing.assert_close(found["map"][..., index], expected.anomaly_map, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["patch_map"][:, 0, ..., index], expected.patch_map, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["slice_scores"][:, index], expected.image_score, atol=1e-5, rtol=1e-5)


def test_a_slice_with_hardly_any_tissue_does_not_count_unless_all_are_so(detector):
    volume = torch.rand(1, 1, 48, 40, 3)
    volume[..., 1] = 0
    volume[0, 0, 20, 20, 1] = 1
    inferer = SliceBatchInferer(min_foreground=0.05)
    assert inferer(volume, detector)["slice_counts"].tolist() == [[True, False, True]]
    assert inferer(volume * 0, detector)["slice_counts"].all()


def test_a_slice_out_of_the_range_of_training_does_not_count(detector):
    volume = torch.rand(1, 1, 48, 40, 5)
    found = SliceBatchInferer(slice_range=[0.25, 0.5])(volume, detector)
    assert found["slice_counts"].tolist() == [[False, True, True, False, False]]
    assert found["map"].shape == volume.shape  # all slices have a map


def test_a_volume_equals_monais_slice_inferer(detector):
    volume = torch.rand(1, 1, 48, 40, 5)
    expected = SliceInferer(roi_size=(48, 40), spatial_dim=2, sw_batch_size=2)(volume, detector)
    torch.testing.assert_close(SliceBatchInferer()(volume, detector)["map"], expected, atol=1e-5, rtol=1e-5)


def test_flat_images_go_in_as_they_are(detector):
    image = torch.rand(2, 1, 48, 40)
    torch.testing.assert_close(SliceBatchInferer()(image, detector)["map"], detector(image))


def test_the_map_keeps_affine_and_history(detector):
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    volume = MetaTensor(torch.rand(1, 1, 48, 40, 2), affine=affine, meta={"filename_or_obj": "a"})
    anomaly_map = SliceBatchInferer()(volume, detector)["map"]
    assert torch.equal(anomaly_map.affine, volume.affine)
    assert anomaly_map.meta["filename_or_obj"] == "a"


def test_raw_values_on_request(detector):
    image = torch.rand(1, 1, 64, 64)
    detector.patch_score.healthy_mean.fill_(5.0)
    torch.testing.assert_close(SliceBatchInferer(raw=True)(image, detector)["map"], detector(image, raw=True))
