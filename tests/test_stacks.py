"""Slices of a tilted gantry: straight for the networks, and all results on the slices of the source."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from monai.data import MetaTensor
from monai.transforms import Compose
from pydicom import dcmread
from test_dicom_series import identity
from test_outputs import infer

from bundle.dicom.mr import mr_series, write_series
from bundle.dicom.objects import Algorithm, write_objects
from bundle.dicom.series import is_tilted, read_headers, read_volume, tilt_of
from bundle.errors import BundleError
from bundle.results import CaseResult
from bundle.transforms import LoadCased, OrientSlicesd, StraightenStackd

SHAPE = (40, 36, 12)
STEP = 5.0  # mm of the table, from slice to slice
LESION = np.array([4.0, 11.0, 31.0])  # mm, RAS; 6 mm in radius


def tilted_affine(degrees=20):
    """Slices turned about the axis from left to right, on a table that moves along the patient."""
    turn = nib.eulerangles.euler2mat(x=np.radians(degrees))
    columns = np.column_stack([turn[:, 0], turn[:, 1] * 1.2, [0, 0, STEP]])
    return nib.affines.from_matvec(columns, [-20, -22, 6])


def places(affine, shape=SHAPE):
    """[3, x, y, slices] mm."""
    return np.einsum("ij,j...->i...", affine, np.stack([*np.indices(shape), np.ones(shape)]))[:3]


def smooth(at):
    """A head that no resampling can spoil."""
    x, y, z = at
    return 500 + 200 * np.sin(x / 14) + 200 * np.cos(y / 17) * np.sin(z / 19)


def lesioned(at):
    return smooth(at) + 2000 * (np.linalg.norm(at - LESION[:, None, None, None], axis=0) < 6)


def tilted_series(folder, what=smooth, change=None):
    """The series of what a tilted gantry sees."""
    sheared = tilted_affine()
    upright = sheared.copy()
    upright[:3, 2] -= tilt_of(sheared)
    normal = upright[:3, 2] / np.linalg.norm(upright[:3, 2])
    images = mr_series(what(places(sheared)).astype(np.uint16), upright, identity())
    for image in images:
        place = np.array(image.ImagePositionPatient, float) * [-1, -1, 1]
        index = round(float((place - upright[:3, 3]) @ normal / np.linalg.norm(upright[:3, 2])))
        place = (place + index * tilt_of(sheared)) * [-1, -1, 1]
        image.ImagePositionPatient = [round(float(one), 4) for one in place]
    if change:
        change(images)
    return write_series(images, folder)


def tilted_nifti(file, what=smooth):
    nib.save(nib.Nifti1Image(what(places(tilted_affine())).astype(np.float32), tilted_affine()), file)
    return str(file)


def straight(source, **options):
    loaded = LoadCased("image")({"image": source})
    return loaded["image"], StraightenStackd("image", **options)(loaded)["image"]


def test_a_tilted_series_becomes_a_straight_volume_with_its_values_at_their_places(tmp_path):
    tilted_series(tmp_path / "s")
    source, image = straight(str(tmp_path / "s"))
    affine = image.affine.numpy()
    assert is_tilted(source.affine.numpy(), 12) and not is_tilted(affine, 12)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(affine[:3, :3].T @ affine[:3, :3], np.diag(lengths**2), atol=1e-4)
    assert lengths[2] == pytest.approx(STEP * np.cos(np.radians(20)), abs=1e-4)
    assert image.shape[-1] == 12 and image.shape[2] > source.shape[2]
    index = np.linalg.inv(source.affine.numpy())
    at = places(affine, image.shape[1:])
    in_source = np.einsum("ij,j...->i...", index, np.stack([*at, np.ones(at.shape[1:])]))[:3]
    last = np.reshape(SHAPE, (3, 1, 1, 1)) - 1
    inside = ((in_source > -1e-3) & (in_source < last + 1e-3)).all(axis=0)
    assert inside.sum() > 0.9 * np.prod(SHAPE)
    np.testing.assert_allclose(image[0].numpy()[inside], smooth(at)[inside], atol=2)  # of 900
    outside = ((in_source < -1) | (in_source > last + 1)).any(axis=0)
    assert outside.any() and (image[0].numpy()[outside] == float(source.min())).all()


def test_the_way_back_leads_to_the_voxels_of_the_source(tmp_path):
    tilted_series(tmp_path / "s")
    loaded = LoadCased("image")({"image": str(tmp_path / "s")})
    steps = Compose([StraightenStackd("image"), OrientSlicesd("image")])
    there = steps(loaded)
    assert there["image"].shape != loaded["image"].shape
    back = steps.inverse(there)["image"]
    assert back.shape == loaded["image"].shape
    np.testing.assert_allclose(back.affine, loaded["image"].affine)
    # of 900, interpolated twice; rows at the border mix with what lies outside
    np.testing.assert_allclose(back[:, :, 1:-1], loaded["image"][:, :, 1:-1], atol=4)


def test_the_same_stack_as_nifti_becomes_the_same_volume(tmp_path):
    files = tilted_series(tmp_path / "s")
    volume = read_volume(files)
    nib.save(nib.Nifti1Image(volume.pixels[0], volume.affine), tmp_path / "a.nii.gz")
    _, of_dicom = straight(str(tmp_path / "s"))
    _, of_nifti = straight(str(tmp_path / "a.nii.gz"))
    np.testing.assert_allclose(of_nifti, of_dicom, atol=0.1)
    np.testing.assert_allclose(of_nifti.affine, of_dicom.affine, atol=1e-4)


def test_the_same_stack_as_nrrd_becomes_the_same_volume(tmp_path):
    file = tilted_nifti(tmp_path / "a.nii.gz")
    source, of_nifti = straight(file)
    image = SimpleITK.GetImageFromArray(source[0].numpy().T)
    lps = np.diag([-1, -1, 1, 1]) @ source.affine.numpy()
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"))
    _, of_nrrd = straight(str(tmp_path / "a.nrrd"))
    np.testing.assert_allclose(of_nrrd, of_nifti, atol=0.1)
    np.testing.assert_allclose(of_nrrd.affine, of_nifti.affine, atol=1e-4)


def test_what_stands_straight_stays_as_it_is(tmp_path):
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ np.diag([1, 1, 5]), [1, 2, 3])
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.float32), affine), tmp_path / "a.nii")
    straighten = StraightenStackd("image")
    source = LoadCased("image")({"image": str(tmp_path / "a.nii")})
    straightened = straighten(source)
    assert straightened["image"] is source["image"]
    assert straighten.inverse(straightened)["image"] is source["image"]


def test_a_mask_keeps_its_values(tmp_path):
    file = tilted_nifti(tmp_path / "a.nii.gz")
    mask = (places(tilted_affine())[1] > 0) * np.float32(255)
    nib.save(nib.Nifti1Image(mask, tilted_affine()), tmp_path / "m.nii.gz")
    loaded = LoadCased(("image", "mask"))({"image": file, "mask": str(tmp_path / "m.nii.gz")})
    found = StraightenStackd(("image", "mask"), mode=("linear", "nearest"))(loaded)
    assert set(np.unique(found["mask"])) == {0, 255}
    assert found["mask"].shape == found["image"].shape
    assert len(np.unique(found["image"])) > 1000


def test_a_straight_volume_keeps_the_limit(tmp_path):
    file = tilted_nifti(tmp_path / "a.nii.gz")
    assert straight(file, max_voxels=40 * 80 * 12)
    with pytest.raises(BundleError, match="more than max_voxels"):
        straight(file, max_voxels=int(np.prod(SHAPE)))


def test_an_unknown_mode_is_refused():
    with pytest.raises(BundleError, match="mode 'cubic' is unknown"):
        StraightenStackd("image", mode="cubic")


def center_of(values, affine):
    """Where a lesion is seen, mm in RAS."""
    return (affine @ [*np.argwhere(values).mean(axis=0), 1])[:3]


def seen_by(preprocessing, source):
    """A result that marks what is brighter than any healthy tissue."""
    data = preprocessing({"image": source})
    image = data["image"]
    scores = image.amax((0, 1, 2)).as_tensor()
    restored = preprocessing.inverse({"image": image.clone()})["image"]
    return CaseResult.from_output(
        {
            "image": image,
            "pred_map": image,
            "pred_map_restored": restored,
            "pred_slice_scores": scores,
            "pred_slice_counts": scores > 0,
        },
        type("Detector", (), {"threshold": 1700.0, "image_threshold": 1700.0}),
    ), image


def test_a_lesion_is_found_at_its_place_in_mask_and_dicom_results(tmp_path):
    files = tilted_series(tmp_path / "s", lesioned)
    preprocessing = Compose([LoadCased("image"), StraightenStackd("image"), OrientSlicesd("image")])
    result, image = seen_by(preprocessing, str(tmp_path / "s"))
    assert isinstance(image, MetaTensor) and not is_tilted(image.affine.numpy(), 12)
    np.testing.assert_allclose(center_of(result.mask, result.restored.affine), LESION, atol=1)
    truth = lesioned(places(tilted_affine())) > 1700
    assert result.mask.shape == SHAPE and 0.8 < result.mask.sum() / truth.sum() < 1.2

    sources = read_headers(files)
    assert result.shows_stored_slices
    assert [one.index for one in result.slices] in ([*range(12)], [*range(12)][::-1])
    worst = sources[result.worst(1)[0].index]
    normal = np.cross(worst.ImageOrientationPatient[:3], worst.ImageOrientationPatient[3:])
    assert abs((LESION * [-1, -1, 1] - np.array(worst.ImagePositionPatient, float)) @ normal) < 6

    pictures = np.zeros((*result.mask.T.shape, 3), np.uint8)
    write_objects(tmp_path / "r", sources, result, pictures, Algorithm("1", "a" * 64, "b" * 64))
    where = {header.SOPInstanceUID: np.array(header.ImagePositionPatient, float) for header in sources}
    for name in ("r_seg.dcm", "r_heatmap.dcm"):
        found = dcmread(tmp_path / name)
        hot = found.pixel_array if name == "r_seg.dcm" else found.pixel_array > 0.5
        hot = hot.reshape(-1, found.Rows, found.Columns)
        assert found.NumberOfFrames == (12 if name == "r_heatmap.dcm" else len(hot))
        marked = []
        for frame, plane in zip(found.PerFrameFunctionalGroupsSequence, hot, strict=True):
            position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, float)
            source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            np.testing.assert_allclose(position, where[source], atol=1e-3)
            cosines = np.array(sources[0].ImageOrientationPatient, float).reshape(2, 3)
            rows, columns = map(float, sources[0].PixelSpacing)
            for row, column in np.argwhere(plane):
                marked.append(position + cosines[0] * columns * column + cosines[1] * rows * row)
        np.testing.assert_allclose(np.mean(marked, axis=0) * [-1, -1, 1], LESION, atol=1)
    for number, header in enumerate(sources, start=1):
        overlay = dcmread(tmp_path / "r_overlay" / f"IM{number:04d}.dcm")
        np.testing.assert_allclose(overlay.ImagePositionPatient, header.ImagePositionPatient, atol=1e-3)
        assert overlay.SourceImageSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID


@pytest.mark.slow
def test_inference_writes_results_on_the_slices_of_a_tilted_series(tmp_path):
    files = tilted_series(tmp_path / "in" / "p", lesioned)
    infer(tmp_path / "in", tmp_path / "out", write_dicom=True, segment_unlike=True)
    volume = read_volume(files)
    for kind in ("map", "mask", "heatmap"):
        written = nib.load(tmp_path / "out" / f"p_{kind}.nii.gz")
        assert written.shape == SHAPE
        np.testing.assert_allclose(written.affine, volume.affine, atol=1e-4)
        assert (written.header["sform_code"], written.header["qform_code"]) == (1, 0)
    assert nib.load(tmp_path / "out" / "p_map.nii.gz").get_fdata().std() > 0
    assert len(dcmread(tmp_path / "out" / "p_heatmap.dcm").PerFrameFunctionalGroupsSequence) == 12


@pytest.mark.slow
def test_workers_straighten_after_their_parent_has(tmp_path):
    for name in "abc":
        tilted_series(tmp_path / "in" / name)
    infer(tmp_path / "in", tmp_path / "out", num_workers=2)
    assert len(list((tmp_path / "out").glob("*_map.nii.gz"))) == 3


def test_a_table_that_moved_once_is_no_tilted_gantry(tmp_path):
    def change(images):
        for image in images[7:]:
            x, y, z = image.ImagePositionPatient
            image.ImagePositionPatient = [x + 2, y, z]

    with pytest.raises(BundleError, match="is no straight stack: .* as with a moved table"):
        read_volume(tilted_series(tmp_path / "s", change=change))
