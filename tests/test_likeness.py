"""What is unlike the training data is named, as rarely as stated among healthy cases, and in words of no patient."""

import csv
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from builders import random_maps, small_detector
from monai.transforms import Compose
from test_dicom_objects import ALGORITHM, found_in, pictures_of
from test_dicom_series import series
from test_outputs import case, saver_in

from bundle.checkpoint import load_checkpoint
from bundle.compute import Compute
from bundle.data import EmbeddingDataset, EmbeddingStore
from bundle.dicom.objects import write_objects
from bundle.dicom.series import read_volume
from bundle.dicom.words import facts_of, header_words, name_words
from bundle.errors import BundleError
from bundle.learned import Learned, read_summary
from bundle.networks.likeness import FEWEST_CASES, CaseLikeness, SliceLikeness, careful_threshold
from bundle.results import Unlike
from bundle.training import Calibration
from bundle.transforms import ExtractSlicesd, LoadCased, OrientSlicesd, ScaleIntensityByModalityd

CHANNELS, SIDE = 24, 6
APPEARANCE = Unlike("appearance", "its looks differ from healthy training images by 9.0, threshold 3.0")


def healthy_slices(count, seed=0, shift=0.0):
    """Statistics of slices whose mean embeddings have a covariance of their own."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(CHANNELS + 3, CHANNELS + 3, generator=torch.Generator().manual_seed(9)) / CHANNELS**0.5
    return torch.randn(count, CHANNELS + 3, generator=generator) @ mixing + shift


def calibrated(training, validation, rate=0.1):
    """The part of slices and that of cases, each slice a patient; medians of patch maps are those of noise."""
    of_slices, of_cases = SliceLikeness(CHANNELS), CaseLikeness()
    of_slices.fit(healthy_slices(training))
    distances = of_slices.distance(healthy_slices(validation, seed=1))
    unlikeness = of_slices.calibrate(distances, torch.zeros(validation))
    of_cases.calibrate(unlikeness, torch.randn(validation), range(validation), [], rate)
    of_cases.remember(Learned({}, validation, False))
    return of_slices, of_cases


def share_unlike(parts, statistics):
    of_slices, of_cases = parts
    unlikeness = of_slices.combined(of_slices.distance(statistics), torch.zeros(len(statistics)))
    return float((unlikeness > of_cases.picture_threshold).float().mean())


@pytest.mark.parametrize(("training", "validation"), [(400, 300), (50, 25), (50, 5)])
def test_healthy_slices_are_called_unlike_as_rarely_as_stated(training, validation):
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        of_slices, of_cases = SliceLikeness(CHANNELS), CaseLikeness()
        of_slices.fit(healthy_slices(training, 10 * seed))
        distances = of_slices.distance(healthy_slices(validation, 10 * seed + 1))
        unlikeness = of_slices.calibrate(distances, torch.zeros(validation))
        of_cases.calibrate(unlikeness, torch.zeros(validation), range(validation), [], 0.05)
        shares.append(share_unlike((of_slices, of_cases), healthy_slices(1000, 10 * seed + 2)))
    assert 0.005 < np.mean(shares) < 0.09


@pytest.mark.parametrize(("training", "validation"), [(400, 300), (50, 5)])
def test_slices_of_another_mean_are_called_unlike_even_after_few_images(training, validation):
    assert share_unlike(calibrated(training, validation), healthy_slices(200, 7, shift=2.0)) > 0.99


def test_the_median_of_the_map_alone_makes_a_slice_unlike():
    of_slices, of_cases = calibrated(400, 300)
    of_slices.calibrate(of_slices.distance(healthy_slices(300, 1)), torch.randn(300))
    distance = of_slices.distance(healthy_slices(1, 3))
    assert float(of_slices.combined(distance, torch.tensor([8.0]))) > float(of_cases.picture_threshold)


def test_enough_patients_give_the_conformal_threshold_and_few_a_limit_beyond_their_largest():
    values = torch.arange(1.0, 100.0)
    assert careful_threshold(values, 0.01) == 99.0
    assert careful_threshold(torch.tensor([1.0, 2.0, 3.0]), 0.01) > 9.0
    assert careful_threshold(torch.tensor([1.0]), 0.01) == float("inf")


def test_a_lesion_moves_the_statistics_less_than_a_change_of_the_whole_image():
    part = SliceLikeness(CHANNELS)
    embeddings, inside = torch.zeros(1, CHANNELS, SIDE, SIDE), torch.ones(1, SIDE, SIDE) > 0
    brightness = torch.full((1, SIDE, SIDE), 0.5)
    lesion = embeddings.clone()
    lesion[..., :1, :1] = 1.0
    moved = [part.statistics(one, brightness, inside)[0, 0] for one in (lesion, embeddings + 1.0)]
    assert float(moved[0]) == pytest.approx(float(moved[1]) / SIDE**2)


def test_air_has_no_part_in_the_statistics():
    part = SliceLikeness(CHANNELS)
    embeddings, inside = torch.randn(1, CHANNELS, SIDE, SIDE), torch.rand(1, SIDE, SIDE) > 0.5
    brightness = torch.rand(1, SIDE, SIDE)
    other = torch.where(inside[:, None], embeddings, 5.0)
    first, second = (part.statistics(one, brightness, inside) for one in (embeddings, other))
    torch.testing.assert_close(first, second)
    assert float(first[0, -1]) == pytest.approx(float(inside.float().mean()))


def test_a_patient_counts_once_and_a_volume_by_its_median():
    likeness = CaseLikeness()
    unlikeness = torch.tensor([0.0, 1.0, 9.0, 0.0, 2.0, 8.0])
    likeness.calibrate(unlikeness, torch.zeros(6), [0, 0, 0, 1, 1, 1], [[0, 1, 2], [3, 4, 5]], 0.5)
    assert float(likeness.volume_threshold) == 2.0
    assert float(likeness.picture_threshold) == 9.0


# words


@pytest.mark.parametrize(
    ("name", "sequence", "contrast"),
    [
        ("sub-0001_flair.nii.gz", ["flair"], []),
        ("sub-01_ce-gd_T1w.nii.gz", ["t1"], ["agent"]),
        ("sub-01_T2w.nii", ["t2"], []),
        ("t2_tirm_tra_dark-fluid.nii.gz", ["flair"], []),
        ("Mueller_Anna_1957.nii.gz", [], []),
    ],
)
def test_a_name_gives_words_of_the_vocabulary_and_nothing_else(name, sequence, contrast):
    assert name_words(name) == {"sequence": sequence, "contrast": contrast}


def test_a_header_gives_sequence_agent_and_kernel(tmp_path):
    header = read_volume(series(tmp_path / "in")).files.headers()[0]
    header.SeriesDescription, header.ContrastBolusAgent = "AX T1 of Anna Mueller", "Gadovist"
    header.ConvolutionKernel = ["Br64f", "3"]
    assert header_words(header) == {"sequence": ["t1"], "contrast": ["agent"], "kernel": ["sharp"]}
    header.ContrastBolusAgent = ""
    assert header_words(header)["contrast"] == ["none"]


def test_an_agent_is_told_where_no_training_case_had_one():
    agent, none = {"words": {"contrast": ["agent"]}}, {"words": {"contrast": ["none"]}}
    [reason] = knowing(contrast=["none"]).reasons(0.0, False, agent)
    assert reason == ("contrast", "contrast agent, learned from none")
    assert not knowing(contrast=["agent", "none"]).reasons(0.0, False, agent)
    assert not knowing(contrast=["none"]).reasons(0.0, False, none)


def test_a_picture_of_8_bits_tells_neither_modality_nor_intensities():
    assert facts_of({"modality": "8bit", "intensity_scheme": "8bit"}) == {"modality": [], "scheme": []}
    assert facts_of({"modality": "CT", "intensity_scheme": "ct_brain"}) == {"modality": ["CT"], "scheme": ["ct_brain"]}


def knowing(**words):
    likeness = CaseLikeness()
    likeness.remember(Learned({kind: {word: 3 for word in seen} for kind, seen in words.items()}, 3, False))
    return likeness


@pytest.mark.parametrize(
    ("meta", "told"),
    [
        ({"modality": "MR", "words": {"sequence": ["flair"]}}, []),
        ({"modality": "CT"}, ["modality CT, learned from MR"]),
        ({"words": {"sequence": ["t1"]}}, ["sequence t1, learned from flair"]),
        ({"intensity_scheme": "ct_brain"}, ["intensities read as ct_brain, learned from mr"]),
        ({"words": {"contrast": ["agent"]}}, []),  # nothing is known of it
        ({"modality": ""}, []),
    ],
)
def test_what_no_training_case_had_is_told_in_words(meta, told):
    likeness = knowing(modality=["MR"], sequence=["flair"], scheme=["mr"])
    assert [reason.words for reason in likeness.reasons(0.0, False, meta)] == told


@pytest.mark.parametrize(
    "content",
    [
        b"no JSON",
        b'{"cases": {"modality": {"$import os": 1}}, "patients": 1, "of_volumes": false}',
        b'{"cases": {"modality": {"MR": -1}}, "patients": 1, "of_volumes": false}',
        b'{"cases": {"names": {"Anna": 1}}, "patients": 1, "of_volumes": false}',
        b'{"cases": {}, "patients": "$1", "of_volumes": false}',
        b'{"cases": [], "patients": 1, "of_volumes": false}',
        b"{}",
    ],
)
def test_a_damaged_summary_is_refused(content):
    with pytest.raises(BundleError, match="the summary of the training data is damaged"):
        read_summary(torch.tensor(list(content), dtype=torch.uint8))


# drift


def drifting(count, shift, patients=200):
    torch.manual_seed(3)
    likeness = CaseLikeness()
    likeness.calibrate(torch.randn(200), torch.randn(200), range(200), [], 0.01)
    likeness.remember(Learned({}, patients, False))
    return likeness.drift((torch.randn(count) + shift).tolist(), torch.randn(count).tolist())


def test_scores_that_drift_are_named_and_others_are_not():
    assert drifting(50, 0.0) == ""
    assert drifting(50, 1.5).startswith("scores higher than in healthy validation (p ")


def test_few_cases_are_not_compared():
    assert drifting(FEWEST_CASES - 1, 9.0) == ""


def test_few_validation_patients_show_less_drift():
    assert drifting(50, 0.8) != ""
    assert drifting(50, 0.8, patients=4) == ""


# in the detector


@pytest.fixture(scope="module")
def learned(features):
    torch.manual_seed(0)
    detector = small_detector(features, foreground="all")
    training, validation = random_maps(features, 16), random_maps(features, 12)
    detector.set_standardization(training.mean((0, 2, 3)), training.std((0, 2, 3)) + 1e-3)
    detector.fit_before_training([training], [validation])
    detector.fit_after_training([training])
    detector.calibrate([validation])
    detector.case_likeness.remember(Learned({"modality": {"MR": 16}}, 12, False))
    return detector.eval()


def test_the_state_holds_all_that_is_compared(learned, features):
    other = small_detector(features, foreground="all")
    other.load_state_dict(learned.state_dict())
    assert other.case_likeness.learned == learned.case_likeness.learned
    image = torch.rand(2, 1, 64, 64)
    torch.testing.assert_close(other.eval().detect(image).unlikeness, learned.detect(image).unlikeness)


def test_a_state_of_an_earlier_version_loads_and_compares_nothing(learned, features):
    parts = ("slice_likeness.", "case_likeness.")
    state = {name: value for name, value in learned.state_dict().items() if not name.startswith(parts)}
    other = small_detector(features, foreground="all")
    other.load_state_dict(state)
    assert not other.case_likeness.knows
    assert float(other.case_likeness.picture_threshold) == float("inf")


def test_raw_scores_compare_nothing(learned):
    assert not learned.detect(torch.rand(1, 1, 64, 64), raw=True).unlikeness.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_detector_tells_the_same(learned):
    image = torch.rand(2, 1, 80, 64)
    scripted = torch.jit.script(learned)
    torch.testing.assert_close(scripted.detect(image).unlikeness, learned.detect(image).unlikeness)
    assert torch.equal(scripted.case_likeness.summary, learned.case_likeness.summary)


def healthy_volumes(folder, detector, name):
    """The embeddings of three volumes of noise, as training makes them."""
    cases = []
    for number in range(3):
        volume = nib.Nifti1Image(np.random.default_rng(number).integers(1, 99, (32, 32, 3), np.uint8), np.eye(4))
        nib.save(volume, folder / f"sub-{number}_{name}.nii.gz")
        cases.append(
            {"image": str(folder / f"sub-{number}_{name}.nii.gz"), "name": f"{number}", "patient": f"{number}"}
        )
    reading = Compose(
        [LoadCased("image"), OrientSlicesd("image"), ScaleIntensityByModalityd("image"), ExtractSlicesd("image")]
    )
    store = EmbeddingStore(folder / "cache", folder, {})
    return EmbeddingDataset(cases, reading, detector, Compute("cpu", "fp32"), store)


def test_training_keeps_what_its_cases_tell_and_a_later_run_reads_it_from_the_cache(features, tmp_path):
    detector = small_detector(features, foreground="all")
    for _ in range(2):
        healthy = healthy_volumes(tmp_path, detector, "flair")
        assert (healthy.words()["sequence"], healthy.words()["plane"]) == ({"flair": 3}, {"axial": 3})
    detector.set_standardization(*healthy.channel_moments())
    detector.fit_before_training(healthy.batches(), healthy.batches())
    log = SimpleNamespace(log=lambda *_: None, describe=lambda *_: None, model=lambda *_: None)
    Calibration(detector, healthy, healthy, Compute("cpu", "fp32"), tmp_path / "model.pt", log).calibrate()
    other = small_detector(features, foreground="all")
    load_checkpoint(other, tmp_path / "model.pt")
    learned = other.case_likeness.learned
    assert (learned.cases["sequence"], learned.patients, learned.of_volumes) == ({"flair": 3}, 3, True)
    [reason] = other.case_likeness.reasons(0.0, True, {"words": name_words("sub-9_T1w.nii.gz")})
    assert reason.words == "sequence t1, learned from flair"


# where it is said


def unlike_case(folder, score=2.0, unlikeness=9.0):
    return case(folder, score) | {"pred_slice_unlikeness": torch.tensor([unlikeness])}


def test_a_case_that_is_unlike_is_named_in_log_table_and_overlay(learned, tmp_path, caplog, monkeypatch):
    captions = []
    picture = pytest.importorskip("PIL.Image").new("RGB", (8, 8))
    monkeypatch.setattr("bundle.writers.overlay", lambda *arguments: captions.append(arguments[-1]) or picture)
    learned.case_likeness.picture_threshold.fill_(3.0)
    saver = saver_in(tmp_path, learned)
    saver.save(unlike_case(tmp_path))
    saver.save_tables()
    assert f"'a' is unlike the training data, its map may mean nothing: {APPEARANCE.words}" in caplog.text
    assert captions[0].startswith(f"UNLIKE THE TRAINING DATA: {APPEARANCE.words}. ")
    with (tmp_path / "out" / "scores.csv").open() as stream:
        [row] = csv.DictReader(stream)
    assert (row["in_distribution"], row["unlike"], row["drift"]) == ("0", APPEARANCE.words, "")


def test_a_case_that_is_like_them_has_no_reason(learned, tmp_path):
    learned.case_likeness.picture_threshold.fill_(3.0)
    saver = saver_in(tmp_path, learned)
    saver.save(unlike_case(tmp_path, unlikeness=1.0))
    [row] = saver.tables[0].rows
    assert (row["in_distribution"], row["unlike"]) == (1, "")


def test_a_model_without_a_summary_says_so_once_and_leaves_the_column_empty(detector, tmp_path, caplog):
    caplog.set_level("INFO")
    saver = saver_in(tmp_path, detector)
    saver.tell_what_is_unknown()
    saver.save(unlike_case(tmp_path))
    assert caplog.text.count("the model keeps no summary of its training data") == 1
    assert saver.tables[0].rows[0]["in_distribution"] is None


def test_a_run_that_drifts_is_named_in_each_row_and_the_log(learned, tmp_path, caplog):
    saver = saver_in(tmp_path, learned)
    for number in range(FEWEST_CASES):
        saver.tables[0].add(saver_result(tmp_path, learned, 50.0 + number))
    rows = saver.tables[0].gathered()
    assert {row["drift"] for row in rows} == {rows[0]["drift"]}
    assert rows[0]["drift"].startswith("scores higher than in healthy validation")
    assert "the cases of this run drift" in caplog.text


def saver_result(folder, detector, score):
    from bundle.results import CaseResult

    return CaseResult.from_output(unlike_case(folder, score, 0.0), detector)


def test_the_segmentation_is_held_back_unless_asked_for(tmp_path):
    volume = read_volume(series(tmp_path / "in"))
    result = found_in(volume, unlike=(APPEARANCE,))
    for name, wanted in (("held", False), ("asked", True)):
        headers = volume.files.headers()
        write_objects(tmp_path / name, headers, result, pictures_of(volume), ALGORITHM, with_segmentation=wanted)
    assert not (tmp_path / "held_seg.dcm").exists()
    assert (tmp_path / "asked_seg.dcm").exists()
    assert (tmp_path / "held_heatmap.dcm").exists()


@pytest.mark.parametrize(
    ("unlike", "told"),
    [
        (
            (APPEARANCE, Unlike("modality", "modality CT, learned from MR")),
            {"Yes", "Looks unlike healthy training images", "Another modality than in training"},
        ),
        ((), {"No"}),
        (None, set()),
    ],
)
def test_the_report_says_whether_and_why_a_case_is_unlike(unlike, told, tmp_path):
    import highdicom as hd

    volume = read_volume(series(tmp_path / "in"))
    result = found_in(volume, unlike=unlike)
    write_objects(tmp_path / "a", volume.files.headers(), result, pictures_of(volume), ALGORITHM)
    study, *_ = hd.sr.srread(tmp_path / "a_report.dcm").content.get_image_measurement_groups()
    answers = [
        evaluation.value.meaning
        for evaluation in study.get_qualitative_evaluations()
        if "nlike" in evaluation.name.meaning
    ]
    assert set(answers) == told


def test_the_summary_holds_no_text_of_a_header(learned):
    kept = json.loads(bytes(learned.case_likeness.summary.tolist()))
    assert kept == {"cases": {"modality": {"MR": 16}}, "patients": 12, "of_volumes": False}
