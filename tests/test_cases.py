"""Every spelling of a data set is found, and what is wrong with one is named."""

import hashlib
import json
import random
import shutil
import unicodedata
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from monai.bundle import ConfigParser
from monai.transforms import Compose
from PIL import Image
from pydicom.data import get_testdata_file
from test_dicom_series import identity

from bundle.data import find_images, find_splits, keep_readable, read_splits
from bundle.data.cases import _named, add_keys, number_patients
from bundle.dicom.mr import mr_series, write_series
from bundle.errors import BundleError
from bundle.files import content_key, equal_across
from bundle.manifest import Manifest
from bundle.transforms import ExtractSlicesd, LoadCased


def picture(path: Path, size=(20, 20), value=100):
    """A picture that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", size, value)
    image.putdata(list(hashlib.sha256(str(path).encode()).digest()[: size[0]]))
    image.save(path)


def bmad(root: Path, train="train/good", valid="valid", ungood="Ungood", label="label", by_kind=False, suffix="png"):
    """A tiny set in one of BMAD's spellings: 2 healthy to train on, 1 + 1 to validate, 1 + 2 to test."""
    for name in ("h1", "h2"):
        picture(root / train / f"{name}.{suffix}")
    for split, anomalous in ((valid, ["v2"]), ("test", ["t2", "t3"])):
        for group, names in (("good", [f"{split[0]}1"]), (ungood, anomalous)):
            for name in names:
                image, mask = (f"img/{group}", f"{label}/{group}") if by_kind else (f"{group}/img", f"{group}/{label}")
                picture(root / split / image / f"{name}.{suffix}")
                picture(root / split / mask / f"{name}.png", value=255 if group == ungood else 0)
    return root


SPELLINGS = {
    "plain": {},
    "images in img": {"train": "train/good/img"},
    "val": {"valid": "val"},
    "lower case": {"ungood": "ungood"},
    "anomaly_mask": {"label": "anomaly_mask"},
    "kind before class": {"by_kind": True},
    "jpeg images, png masks": {"suffix": "jpg"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_finds_every_spelling_of_bmad(tmp_path, spelling):
    splits = find_splits(bmad(tmp_path, **SPELLINGS[spelling]))
    assert len(splits["training"]) == 2
    assert [case["label"] for case in splits["validation"]] == [0]
    assert [(case["label"], Path(case["image"]).stem, Path(case["mask"]).stem) for case in splits["test"]] == [
        (0, "t1", "t1"),
        (1, "t2", "t2"),
        (1, "t3", "t3"),
    ]


def test_names_are_unique_and_keep_subfolders(tmp_path):
    splits = find_splits(bmad(tmp_path))
    assert [case["name"] for case in splits["test"]] == ["test/good/img/t1", "test/Ungood/img/t2", "test/Ungood/img/t3"]


def test_equal_names_keep_their_suffixes(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.bmp")
    assert sorted(case["name"] for case in find_images(tmp_path)) == ["a_bmp", "a_png"]


def test_a_set_with_image_labels_only_has_no_masks(tmp_path):
    for split, group in (("train", "good"), ("test", "good"), ("test", "Ungood")):
        picture(tmp_path / split / group / "a.png")
        picture(tmp_path / split / group / "b.png")
    found = [(case["label"], "mask" in case) for case in find_splits(tmp_path)["test"]]
    assert found == [(0, False)] * 2 + [(1, False)] * 2


def test_a_plain_folder_is_healthy_and_part_of_it_validates(tmp_path):
    for index in range(20):
        picture(tmp_path / "deep" / f"{index:02}.png")
    splits = find_splits(tmp_path, seed=1)
    names = [{case["name"] for case in splits[split]} for split in ("training", "validation", "test")]
    assert [len(split) for split in names] == [18, 2, 0]
    assert not names[0] & names[1]
    assert splits == find_splits(tmp_path, seed=1)
    assert splits != find_splits(tmp_path, seed=2)


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        ("RESC/test/good/a.png", r"since '.*RESC/test' is in it: give --dataset_dir '.*RESC'$"),
        ("RESC/Train/good/a.png", r"since '.*RESC/Train' is in it: give --dataset_dir '.*RESC'$"),
        ("Ungood/img/a.png", r"since '.*Ungood' is in it: give --dataset_dir the folder of healthy ones"),
        ("site/bad/a.png", r"since '.*site/bad' is in it"),
    ],
)
def test_a_folder_that_hides_test_or_anomalous_images_is_not_taken_for_healthy(tmp_path, inside, message):
    picture(tmp_path / "good" / "h.png")
    picture(tmp_path / "good" / "i.png")
    picture(tmp_path / inside)
    with pytest.raises(BundleError, match=message):
        find_splits(tmp_path)
    assert len(find_images(tmp_path)) == 3  # to infer on, it may be any folder


def test_reads_a_monai_datalist(tmp_path):
    lists = {
        "training": [{"image": "a.nii.gz"}, "b.nii.gz"],
        "validation": [{"image": "c.nii.gz", "label": 0}],
        "test": [{"image": "d.nii.gz", "label": "d_seg.nii.gz"}, {"image": "e.nii.gz", "label": 0}],
    }
    (tmp_path / "datalist.json").write_text(json.dumps(lists))
    splits = find_splits(tmp_path / "datalist.json")
    assert [case["name"] for case in splits["training"]] == ["a", "b"]
    assert splits["test"][0]["mask"] == str(tmp_path / "d_seg.nii.gz")
    assert splits["test"][1]["label"] == 0


def test_a_mask_without_label_is_taken_for_a_lesions(tmp_path):
    lists = {"training": ["a.png", "b.png"], "validation": ["c.png", {"image": "d.png", "mask": "d_mask.png"}]}
    (tmp_path / "datalist.json").write_text(json.dumps(lists))
    assert [case["name"] for case in find_splits(tmp_path / "datalist.json")["validation"]] == ["c"]


def test_a_folder_of_one_dicom_series_is_one_image(tmp_path):
    slice_ = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for index in range(3):
        slice_.SOPInstanceUID = f"1.2.3.{index}"
        slice_.file_meta.MediaStorageSOPInstanceUID = slice_.SOPInstanceUID
        slice_.InstanceNumber = index + 1
        slice_.ImagePositionPatient = [-158.1, -179.0, -75.7 + 5 * index]
        (tmp_path / "series").mkdir(exist_ok=True)
        slice_.save_as(tmp_path / "series" / f"{index}.dcm")
    cases = find_images(tmp_path)
    assert [case["name"] for case in cases] == ["series"]
    assert [case["name"] for case in find_images(tmp_path / "series")] == ["series"]
    image = LoadCased("image")(cases[0])["image"]
    assert image.shape == (1, 128, 128, 3)
    np.testing.assert_allclose(image.affine[:3, :3].norm(dim=0), [0.661468, 0.661468, 5.0], atol=1e-4)


@pytest.mark.parametrize(
    "files",
    [
        ["a.png", "a.jpg", "a_png.png"],
        ["a.png", "a.jpg", "a_png.bmp", "a_png_2.bmp"],
        ["a.png", "A.PNG", "b.png"],
        ["\u00e9.png", "e\u0301.png"],
        ["stra\u00dfe.png", "STRASSE.png", "strasse_png.png"],
        ["a.b/c.png", "a_b/c.png", "a.b/c.jpg"],
    ],
)
def test_names_never_collide_not_even_where_a_file_system_is_indifferent(tmp_path, files):
    for name in files:
        picture(tmp_path / name)
    cases = find_images(tmp_path)
    names = [unicodedata.normalize("NFC", case["name"]).casefold() for case in cases]
    assert len(set(names)) == len(cases) == len(files)
    assert find_images(tmp_path) == cases


def test_names_are_unique_whatever_the_names_of_files(tmp_path):
    """Of all sets of names over a small alphabet that looks like what names are made of."""
    drawn = random.Random(0)
    suffixes = (".png", ".jpg", ".nii.gz", ".dcm", "")
    for _ in range(300):
        parts = drawn.choices(["a", "A", "_png", "_jpg", ".png", "_2", ".", "b/"], k=40)
        files = {f"x{''.join(parts[i : i + drawn.randint(0, 3)])}{drawn.choice(suffixes)}" for i in range(30)}
        paths = [tmp_path / file for file in sorted(files)]
        cases = [{"image": str(path)} for path in [*paths, *paths[:2]]]  # two are listed again
        names = [case["name"] for case in _named(cases, [Path(case["image"]) for case in cases], tmp_path)]
        assert len({name.casefold() for name in names}) == len(cases)


def test_names_of_files_that_collide_with_nothing_do_not_depend_on_others(tmp_path):
    for name in ("a.png", "b.png", "b.jpg", "deep/b.png"):
        picture(tmp_path / name)
    (tmp_path / "deep/c.nii.gz").touch()
    assert [case["name"] for case in find_images(tmp_path)] == ["a", "b_jpg", "b_png", "deep/b", "deep/c"]


def test_a_name_leaves_room_for_what_results_add_to_it(tmp_path):
    long = "\u00e9" * 125
    for name in (f"{long}.png", f"{long[:-1]}e.png"):
        picture(tmp_path / name)
    names = [case["name"] for case in find_images(tmp_path)]
    assert len(set(names)) == 2
    for name in names:
        assert len(f"{name}_heatmap.nii.gz".encode()) <= 255
        assert name.startswith(long[:100])


def test_a_file_that_is_called_like_a_suffix_keeps_its_name(tmp_path):
    for name in (".png", "..png", "...png"):
        picture(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / name)
    assert {case["name"] for case in find_images(tmp_path)} == {".png", "..png", "...png"}


def found_by(find, data, output):
    """The names of what there is to learn and test on, or to infer on, in ``data``, with results in ``output``."""
    found = find(data, results=Manifest(output))
    return [case["name"] for case in (found if find is find_images else chain(*found.values()))]


@pytest.mark.parametrize("find", [find_images, find_splits])
@pytest.mark.parametrize("way", ["in", "link"])
def test_results_of_earlier_runs_are_no_data(tmp_path, find, way):
    output = tmp_path / "in/output"
    for name in ("a", "b", "output/deep/a_mask", "output/test_examples", "output/mlruns/1/artifacts/test_examples"):
        picture(tmp_path / f"in/{name}.png")
    (output / "test_scores.csv").touch()
    (output / "results.json").write_text(
        '{"tables": [], "results": {"a": {"input": "a", "files": ["deep/a_mask.png"]}}}'
    )
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert sorted(found_by(find, tmp_path / way, output)) == ["a", "b"]
    (output / "test_scores.csv").unlink()  # so that the figure is none of an evaluation
    with pytest.raises(BundleError, match="output/test_examples.png' lies in output_dir"):
        found_by(find, tmp_path / way, output)


@pytest.mark.parametrize("output", ["train/good", "valid", "test/Ungood", "test/Ungood/label", "."])
def test_an_output_folder_in_which_data_or_their_masks_lie_is_refused(tmp_path, output):
    data = bmad(tmp_path / "in")
    with pytest.raises(BundleError, match="lies in output_dir .*: give an --output_dir without images"):
        found_by(find_splits, data, data / output)
    assert len(found_by(find_splits, data, data / "output")) == 6


def test_only_images_that_a_command_needs_are_in_the_way_of_its_results(tmp_path):
    data = bmad(tmp_path / "in")
    find_splits(data, needed=("test",), results=Manifest(data / "train"))
    with pytest.raises(BundleError, match="lies in output_dir"):
        find_splits(data, needed=("test",), results=Manifest(data / "test"))


def test_images_of_a_datalist_are_not_in_the_folder_of_results(tmp_path):
    for name in ("a", "output/b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "data.json").write_text('{"training": ["a.png", "output/b.png"]}')
    with pytest.raises(BundleError, match="output/b.png' lies in output_dir"):
        found_by(find_splits, tmp_path / "data.json", tmp_path / "output")


def test_a_float_label_counts_and_another_number_is_refused(tmp_path):
    (tmp_path / "l.json").write_text('{"training": [{"image": "a.png", "label": 1.0}, "b.png"]}')
    with pytest.raises(BundleError, match="anomalous training images"):
        find_splits(tmp_path / "l.json")
    (tmp_path / "l.json").write_text('{"training": [{"image": "a.png", "label": 3}, "b.png"]}')
    with pytest.raises(BundleError, match="must be 0, 1 or the path"):
        find_splits(tmp_path / "l.json")


def test_inference_passes_over_masks(tmp_path):
    names = {case["name"] for case in find_images(bmad(tmp_path) / "test")}
    assert names == {"good/img/t1", "Ungood/img/t2", "Ungood/img/t3"}


def test_one_file_is_enough_for_inference(tmp_path):
    picture(tmp_path / "a.png")
    assert find_images(tmp_path / "a.png") == [{"image": str(tmp_path / "a.png"), "name": "a"}]


def test_volumes_in_bmad_folders_are_found(tmp_path):
    (tmp_path / "train/good").mkdir(parents=True)
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(np.zeros((20, 20, 4)), np.eye(4)), tmp_path / "train/good" / f"{name}.nii.gz")
    assert len(find_splits(tmp_path)["training"]) == 1


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root / "missing", "no data at .*missing.*--dataset_dir"),
        (lambda root: root, "no image in"),
        (lambda root: picture(root / "one.png") or root, "has 1 healthy image of one patient: at least 2"),
        (lambda root: (bmad(root) / "test/Ungood/label/t2.png").unlink() or root, r"no mask for .*t2\.png"),
        (lambda root: (root / "list.json").write_text("{") and root / "list.json", "cannot read datalist"),
        (lambda root: (root / "list.json").write_text("{}") and root / "list.json", "no training images"),
        (
            lambda r: (r / "l.json").write_text('{"training": [{"image": "a.png", "label": 1}]}') and r / "l.json",
            "anomalous training images",
        ),
    ],
)
def test_what_is_wrong_with_a_set_is_named(tmp_path, prepare, message):
    with pytest.raises(BundleError, match=message) as caught:
        find_splits(prepare(tmp_path))
    assert "\n" not in str(caught.value)


def broken_set(folder):
    for name in ("a", "b", "c"):
        picture(folder / f"{name}.png", size=(64, 64))
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
    return find_images(folder)


def test_the_first_unreadable_image_is_named(tmp_path):
    with pytest.raises(BundleError, match=r"cannot read .*b\.png"):
        keep_readable(broken_set(tmp_path), LoadCased("image"))


def test_unreadable_images_are_named_skipped_and_counted_on_request(tmp_path, caplog):
    good = keep_readable(broken_set(tmp_path), Compose([LoadCased("image")]), on_error="skip")
    assert [case["name"] for case in good] == ["a", "c"]
    assert "b.png" in caplog.text
    assert "skipped 1 of 3 images" in caplog.text


def test_a_set_of_unreadable_images_only_is_refused_even_when_skipping(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="none of 1 images can be read"):
        keep_readable(find_images(tmp_path), LoadCased("image"), on_error="skip")


def test_a_misspelled_on_error_is_named(tmp_path):
    with pytest.raises(BundleError, match="did you mean 'skip'"):
        keep_readable([], LoadCased("image"), on_error="skipp")


def test_healthy_images_that_the_feature_cache_knows_are_not_read_again(tmp_path):
    root = bmad(tmp_path)
    read = []
    known = {content_key(root / "train/good/h1.png")}
    picture(root / "train/good/h2.png", value=7)
    splits = read_splits(
        find_splits(root),
        lambda case: read.append(Path(case["image"]).stem) or {"image": np.zeros((1, 16, 16, 1))},
        store=known,
    )
    assert [Path(case["image"]).stem for case in splits["training"]] == ["h1", "h2"]
    assert "h2" in read
    assert "h1" not in read
    assert {"t1", "t2", "t3"} < set(read)  # test images are always read


@pytest.mark.parametrize(("cache", "times"), [("off", 0), ("cache", 1)])
def test_images_are_hashed_once_with_a_feature_cache_and_not_at_all_without(tmp_path, monkeypatch, cache, times):
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: hashed.append(stream.name) or digest(stream, name))
    knobs = {"dataset_dir": str(bmad(tmp_path / "data")), "output_dir": str(tmp_path / "out"), "cache_dir": cache}
    parser = ConfigParser(ConfigParser.load_config_file("configs/train.json") | knobs)
    parser.update({"store::recipe": {}, "splits::transform": LoadCased("image"), "splits::healthy_transform": None})
    splits = parser.get_parsed_content("splits")
    healthy = [*splits["training"], *splits["validation"]]
    assert [hashed.count(case["image"]) for case in healthy] == [times] * len(healthy)


def test_processes_that_work_together_hash_a_share_each(tmp_path, monkeypatch):
    cases = [{"image": str(tmp_path / name)} for name in ("mine.png", "theirs.png")]
    picture(tmp_path / "mine.png")
    picture(tmp_path / "theirs.png")
    read = []
    monkeypatch.setattr("bundle.data.cases.content_key", lambda source: read.append(source) or "mine")
    monkeypatch.setattr("bundle.data.cases.shard", lambda items: items[::2])
    monkeypatch.setattr("bundle.data.cases.gather", lambda keys: [keys, {1: "theirs"}])
    add_keys(cases)
    assert [case["key"] for case in cases] == ["mine", "theirs"]
    assert read == [cases[0]["image"]]


def test_a_healthy_volume_without_a_slice_to_learn_from_is_skipped_on_request(tmp_path, caplog):
    for name, value in (("a", 1), ("b", 1), ("empty", 0)):
        values = np.full((20, 20, 4), value, np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"{name}.nii.gz")
    load = LoadCased("image")
    splits = read_splits(find_splits(tmp_path), load, Compose([load, ExtractSlicesd("image")]), on_error="skip")
    assert sorted(case["name"] for split in splits.values() for case in split) == ["a", "b"]
    assert "'empty' has no slice" in caplog.text


def test_a_missing_image_is_named_with_a_feature_cache_too(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps({"training": ["a.png", "missing.png"]}))
    with pytest.raises(BundleError, match=r"no file at '.*missing\.png'"):
        read_splits(find_splits(tmp_path / "data.json"), LoadCased("image"), store=set())


def test_learns_from_as_many_healthy_images_as_wanted_always_the_same(tmp_path):
    for index in range(8):
        picture(bmad(tmp_path) / "train/good" / f"more{index}.png", value=index)
    names = [
        [case["name"] for case in find_splits(tmp_path, seed=seed, healthy_images=count)["training"]]
        for seed, count in ((0, 4), (0, 4), (1, 4), (0, 100))
    ]
    assert len(names[0]) == 4 and names[0] == names[1] != names[2] and len(names[3]) == 10
    with pytest.raises(BundleError, match="healthy_images is 0"):
        find_splits(tmp_path, healthy_images=0)


def slices(root, split="train/good", patients=range(4), count=6):
    """Slices of patients as pictures, named by patient and slice."""
    for patient in patients:
        for index in range(count):
            picture(root / split / f"p{patient:02}_{index:03}.png")
    return root


BEFORE_LAST_NUMBER = r"(.*\D)\d+\D*$"


@pytest.mark.parametrize("pattern", [r"(p\d+)_(\d+)", r"^p\d+", BEFORE_LAST_NUMBER])
def test_slices_of_a_patient_stored_as_pictures_stay_in_one_split(tmp_path, pattern):
    splits = find_splits(slices(tmp_path), patient_pattern=pattern)
    stems = [{Path(case["image"]).stem[:3] for case in splits[split]} for split in ("training", "validation")]
    assert len(splits["validation"]) == 6 and len(stems[1]) == 1
    assert not stems[0] & stems[1]


def test_a_pattern_sees_a_patient_in_two_splits_whose_folders_differ(tmp_path):
    slices(slices(tmp_path, patients=[1, 2]), "valid/good/img", patients=[2, 3])
    assert len(find_splits(tmp_path)["validation"]) == 12
    with pytest.raises(BundleError, match=r"p02_000.png' \(training\) and .*p02_000.png' \(validation\) are of one"):
        find_splits(tmp_path, patient_pattern="^(.+)_")


def test_a_pattern_sees_folders_of_patients(tmp_path):
    for patient in ("ann", "bob"):
        for index in range(3):
            picture(tmp_path / "train" / "good" / patient / f"{index}.png")
    assert len(find_splits(tmp_path, patient_pattern="^([^/]+)/")["validation"]) == 3


def volumes(root, names):
    """Empty files, of which nothing but names is looked at."""
    for name in names:
        file = root / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


SERIES = ("flair", "t1", "t1ce", "t2")
STUDIES = {
    # how the series of 6 patients may be called
    "equal names": [f"p{patient}/{kind}" for patient in range(6) for kind in SERIES],
    "two series": [f"p{patient}/{kind}" for patient in range(6) for kind in ("t1", "t2")],
    "numbers of patients": [f"train/good/BraTS_{p:03}/BraTS_{p:03}_{kind}" for p in range(6) for kind in SERIES],
    "names of patients": [f"{one}/{one}_{kind}" for one in ("ann", "bob", "cy", "di", "ed", "flo") for kind in SERIES],
    "one series is missing": [f"p{patient}/{kind}" for patient in range(6) for kind in SERIES][1:],
}


@pytest.mark.parametrize("names", STUDIES.values(), ids=STUDIES)
def test_volumes_in_a_folder_for_each_patient_stay_in_one_split(tmp_path, caplog, names):
    caplog.set_level("INFO")
    splits = find_splits(volumes(tmp_path, names))
    folders = [{Path(case["image"]).parent for case in splits[split]} for split in ("training", "validation")]
    assert [len(split) for split in folders] == [5, 1] and not folders[0] & folders[1]
    assert number_patients(splits["validation"]) == [0] * len(splits["validation"])
    assert f"{len(names)} volumes lie in 6 folders such as" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        [f"train/good/s{number}" for number in range(20)],
        [f"good/{kind}" for kind in SERIES],
        [f"{site}/{site}{number:02}" for site in "ab" for number in range(20)],  # too many to be series
        [f"{site}/{one}" for site, some in (("a", ("ann", "bob")), ("b", ("cy", "di"))) for one in some],
        [f"sub-{number}/{kind}" for number in range(6) for kind in SERIES],  # whom the name tells
    ],
)
def test_other_folders_of_volumes_are_no_patients(tmp_path, caplog, names):
    caplog.set_level("INFO")
    splits = find_splits(volumes(tmp_path, names))
    assert not [case for split in splits.values() for case in split if "patient" in case]
    assert "folders such as" not in caplog.text


def test_folders_whose_volumes_have_numbers_for_names_are_told(tmp_path, caplog):
    find_splits(volumes(tmp_path, [f"p{patient}/{number:03}" for patient in range(6) for number in range(3)]))
    assert "folders such as 'p0' hold 3 volumes, and each volume counts as a patient of its own" in caplog.text
    assert "give --patient_pattern '(.+)/'" in caplog.text


def test_a_pattern_goes_before_folders(tmp_path):
    names = [f"site{site}/{kind}" for site in range(4) for kind in SERIES]
    splits = find_splits(volumes(tmp_path, names), patient_pattern="(.+)")
    assert {case["patient"] for split in splits.values() for case in split} == set(names)


def test_folders_of_one_name_in_two_splits_are_two_patients(tmp_path):
    names = [f"{split}/good/{patient}/{kind}" for split in ("train", "valid") for patient in "12" for kind in SERIES]
    splits = find_splits(volumes(tmp_path, names))
    assert [len(splits[split]) for split in ("training", "validation")] == [8, 8]


def test_training_images_of_a_patient_follow_each_other(tmp_path):
    items = [{"image": f"{index}.png", "patient": "abc"[index % 3]} for index in range(6)]
    (tmp_path / "data.json").write_text(json.dumps({"training": items, "validation": ["v.png"]}))
    found = [case["name"] for case in find_splits(tmp_path / "data.json")["training"]]
    assert found == ["0", "3", "1", "4", "2", "5"]


def test_a_datalist_goes_before_a_pattern_and_a_pattern_before_a_subject_in_the_name(tmp_path):
    training = [{"image": "sub-1_a.png", "patient": "x"}, "sub-2_a.png", "sub-3_a.png", "sub-3_b.png"]
    (tmp_path / "data.json").write_text(json.dumps({"training": training}))
    splits = find_splits(tmp_path / "data.json", patient_pattern="_(.)$")
    patients = {case["name"]: case["patient"] for split in splits.values() for case in split}
    assert patients == {"sub-1_a": "x", "sub-2_a": "a", "sub-3_a": "a", "sub-3_b": "b"}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(p", r"patient_pattern '\(p' is no regular expression \(missing \).*\): give one whose first group"),
        (r"(x\d+)_", r"patient_pattern '\(x\\d\+\)_' finds no patient in any name, such as 'p00_000': give"),
        ("(x*)", r"finds no patient in any name"),
    ],
)
def test_a_pattern_that_is_none_or_finds_no_patient_is_refused(tmp_path, pattern, message):
    with pytest.raises(BundleError, match=message) as caught:
        find_splits(slices(tmp_path), patient_pattern=pattern)
    assert "\n" not in str(caught.value)


def test_names_in_which_a_pattern_finds_no_patient_are_counted(tmp_path, caplog):
    picture(slices(tmp_path) / "train/good/other.png")
    find_splits(tmp_path, patient_pattern=r"p\d+")
    assert "finds no patient in 1 of 25 names, such as 'other'" in caplog.text


def test_names_that_look_like_slices_of_patients_are_told_with_the_pattern_that_groups_them(tmp_path, caplog):
    find_splits(slices(tmp_path))
    assert "names such as 'p00_000' look like 24 slices of 4 patients" in caplog.text
    assert f"give --patient_pattern '{BEFORE_LAST_NUMBER}'" in caplog.text
    caplog.clear()
    find_splits(tmp_path, patient_pattern=BEFORE_LAST_NUMBER)
    assert "look like" not in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        [f"no{index}" for index in range(20)],  # one number, of the image
        [f"{group}{index}" for group in ("te", "tr") for index in range(20)],
        [f"{index:05}" for index in range(20)],
        [f"p{index}_{side}1" for index in range(20) for side in "lr"],  # two images each
        [f"sub-{patient}_slice-{index}" for patient in range(4) for index in range(6)],  # whom the name tells apart
    ],
)
def test_names_that_do_not_look_like_slices_or_tell_the_patient_raise_no_warning(tmp_path, caplog, names):
    for name in names:
        picture(tmp_path / f"{name}.png")
    find_splits(tmp_path)
    assert caplog.text == ""


# images in two splits


def volume_in(path: Path):
    values = np.random.default_rng(path.name.encode()[0]).integers(0, 99, (20, 20, 4), np.uint8)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def study_in(folder: Path):
    write_series(mr_series(np.ones((20, 20, 3), np.uint16), np.eye(4), identity(folder.name)), folder)


KINDS = {".png": picture, ".nii": volume_in, "": study_in}  # by suffix; a folder is a DICOM series


def set_with_a_copy(root: Path, suffix: str):
    """Two healthy images to train on, one to validate, and one of the former among the test images."""
    for name in ("a", "b", "c"):
        KINDS[suffix](root / f"{name}{suffix}")
    (shutil.copytree if suffix == "" else shutil.copy)(root / f"b{suffix}", root / f"copy{suffix}")
    lists = {"training": ["a", "b"], "validation": ["c"], "test": ["copy"]}
    items = {
        split: [{"image": f"{name}{suffix}", "label": 0, "patient": name} for name in names]
        for split, names in lists.items()
    }
    (root / "datalist.json").write_text(json.dumps(items))
    return root / "datalist.json"


@pytest.mark.parametrize("suffix", KINDS)
def test_an_image_that_is_in_two_splits_is_named_in_one_line(tmp_path, caplog, suffix):
    splits = find_splits(set_with_a_copy(tmp_path, suffix))
    [line] = caplog.messages
    pair = f"'{tmp_path / 'b'}{suffix}' (training) and '{tmp_path / 'copy'}{suffix}' (test), and results look better"
    assert line.startswith(f"1 image is in two splits, such as {pair}")
    assert [len(splits[split]) for split in ("training", "validation", "test")] == [2, 1, 1]


@pytest.mark.parametrize("suffix", KINDS)
def test_images_in_two_splits_are_refused_or_left_out_of_the_first_on_request(tmp_path, caplog, suffix):
    data = set_with_a_copy(tmp_path, suffix)
    with pytest.raises(BundleError, match="1 image is in two splits, .*: remove one of each pair, or give --on_copies"):
        find_splits(data, on_copies="raise")
    splits = find_splits(data, on_copies="skip")
    names = {split: [case["name"] for case in cases] for split, cases in splits.items()}
    assert names == {"training": ["a"], "validation": ["c"], "test": ["copy"]}
    assert "1 image is in two splits" in caplog.text and "left out of the first of both" in caplog.text


def test_copies_in_bmad_folders_are_counted_once_each_and_masks_may_be_equal(tmp_path, caplog):
    root = bmad(tmp_path)
    for mask in root.rglob("label/*.png"):
        Image.new("L", (20, 20)).save(mask)  # all black
    find_splits(root, on_copies="raise")
    for name in ("t2", "t3"):
        shutil.copy(root / "train/good/h1.png", root / f"test/Ungood/img/{name}.png")
    shutil.copy(root / "valid/good/img/v1.png", root / "test/good/img/t1.png")
    find_splits(root)
    assert "2 images are in two splits" in caplog.text


def test_a_healthy_image_is_not_in_training_and_validation_both_on_request(tmp_path):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png")
        shutil.copy(tmp_path / f"{name}.png", tmp_path / f"{name}_2.png")
    splits = find_splits(tmp_path, on_copies="skip")
    assert len(splits["training"]) == 4 and len(splits["validation"]) == 1
    assert not {Path(case["image"]).stem[0] for case in splits["training"]} & {
        Path(case["image"]).stem[0] for case in splits["validation"]
    }


def test_a_split_of_nothing_but_copies_is_refused(tmp_path):
    for split in ("train", "valid", "test"):
        for name in ("a", "b"):
            picture(tmp_path / "x" / f"{name}.png")
            (tmp_path / split / "good").mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "x" / f"{name}.png", tmp_path / split / "good" / f"{name}.png")
    with pytest.raises(BundleError, match="each training image is in another split, too"):
        find_splits(tmp_path, on_copies="skip")


def test_a_dicom_image_that_was_stored_anew_under_its_uid_is_a_copy(tmp_path, caplog):
    data = set_with_a_copy(tmp_path, "")
    for file in (tmp_path / "copy").iterdir():
        image = pydicom.dcmread(file)
        image.PatientID = image.PatientName = "another"
        image.save_as(file)
    find_splits(data)
    assert "1 image is in two splits" in caplog.text


def test_files_of_one_size_are_told_apart_by_a_few_bytes(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr("bundle.files.file_sha256", lambda file: hashed.append(file) or b"")
    files = [tmp_path / f"{number}.bin" for number in range(4)]
    for number, file in enumerate(files):
        file.write_bytes(bytes(2**20) + bytes([number // 2]) + bytes(2**20))
    assert equal_across(files, [0, 1, 2, 3]) == [[0, 1], [2, 3]]
    assert equal_across(files, [0, 0, 1, 1]) == []
    assert hashed == files
    assert equal_across([files[0], tmp_path / "missing"], [0, 1]) == []


def test_a_misspelled_on_copies_is_named(tmp_path):
    picture(tmp_path / "a.png")
    with pytest.raises(BundleError, match="on_copies"):
        find_splits(tmp_path, on_copies="wran")


def test_patients_have_numbers_and_a_case_of_nobody_known_one_of_its_own():
    cases = [{"name": name, "image": f"{name}.png"} for name in ("sub-1_a", "x", "sub-2_a", "sub-1_b", "y")]
    assert number_patients(cases) == [0, 1, 2, 0, 3]


# links


@pytest.fixture
def linked(tmp_path):
    """A data folder with links that lead out of it: to a file, to a folder, and to a file that is not there."""
    outside, root = tmp_path / "outside", tmp_path / "data"
    picture(root / "own.png")
    picture(outside / "secret.png")
    picture(outside / "more/a.png")
    (root / "file.png").symlink_to(outside / "secret.png")
    (root / "folder").symlink_to(outside / "more")
    (root / "gone").symlink_to("/nowhere")
    return root


@pytest.mark.parametrize("find", [find_images, find_splits])
def test_links_that_lead_out_of_the_data_are_named_counted_and_refused(linked, find):
    with pytest.raises(BundleError) as caught:
        find(linked)
    message = str(caught.value)
    assert "3 links in" in message and "'file.png' to " in message and "--follow_links true" in message


def test_links_are_followed_on_request_each_folder_once(linked):
    (linked / "again").symlink_to(linked / "folder")
    (linked / "loop").symlink_to(linked)
    names = [case["name"] for case in find_images(linked, follow_links=True)]
    assert names == ["again/a", "file", "own"]


def test_a_data_folder_may_be_a_link_and_links_within_it_are_no_matter(tmp_path):
    picture(tmp_path / "real" / "a.png")
    (tmp_path / "real" / "b.png").symlink_to("a.png")
    (tmp_path / "real" / "loop").symlink_to("../real")
    (tmp_path / "link").symlink_to("real")
    assert [case["name"] for case in find_images(tmp_path / "link")] == ["a", "b"]


def test_a_linked_folder_of_the_layout_is_refused_and_read_on_request(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    picture(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "good").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="1 link in .* leads out of it"):
        find_splits(tmp_path / "data")
    found = find_splits(tmp_path / "data", follow_links=True)
    assert len(found["training"]) + len(found["validation"]) == 2
