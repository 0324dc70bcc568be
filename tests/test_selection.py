"""Which series of a study are examined."""

import pytest
from pydicom import Dataset

from bundle.dicom.selection import SeriesRule, series_rule
from bundle.errors import BundleError
from bundle.learned import Learned

AXIAL, CORONAL, SAGITTAL = ([1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1])
TILTED = [1, 0, 0, 0, 0.9, 0.43588989]


def header(**values):
    found = Dataset()
    found.Modality, found.SeriesDescription = "MR", "AX T2 FLAIR (post)"
    found.ImageType, found.SliceThickness = ["ORIGINAL", "PRIMARY", "M_FFE"], 5
    found.ImageOrientationPatient = AXIAL
    for keyword, value in values.items():
        setattr(found, keyword, value)
    return found


@pytest.mark.parametrize(
    ("condition", "fits"),
    [
        ({"Modality": "mr"}, True),
        ({"Modality": "^CT$"}, False),
        ({"SeriesDescription": "flair"}, True),
        ({"SeriesDescription": "ax t2 flair (post)"}, True),  # as it stands, whatever it means as an expression
        ({"SeriesDescription": ["flair", "!sag"]}, True),
        ({"SeriesDescription": "!post"}, False),
        ({"ImageType": ["original", "!DERIVED"]}, True),
        ({"ImageType": ["ORIGINAL", "!M_FFE"]}, False),
        ({"SliceThickness": 5}, True),
        ({"SliceThickness": [5, "<"]}, False),
        ({"SliceThickness": [3, 5]}, True),
        ({"SliceThickness": [1, 3]}, False),
        ({"SliceThickness": [1, "!="], "Modality": "CT"}, False),
        ({"BodyPartExamined": "head"}, False),
        ({"BodyPartExamined": "!abdomen"}, True),
        ({"ImageOrientationPatient": "Axial"}, True),
        ({"ImageOrientationPatient": "coronal"}, False),
    ],
)
def test_a_series_is_examined_if_its_header_fulfills_every_condition(condition, fits):
    assert (SeriesRule(condition).misfit(header()) is None) == fits


@pytest.mark.parametrize(
    ("cosines", "plane"), [(AXIAL, "axial"), (TILTED, "axial"), (CORONAL, "coronal"), (SAGITTAL, "sagittal")]
)
def test_the_orientation_is_the_plane_that_slices_are_closest_to(cosines, plane):
    classic = header(ImageOrientationPatient=cosines)
    frames = header(ImageOrientationPatient=None)
    place, group = Dataset(), Dataset()
    place.ImageOrientationPatient = cosines
    group.PlaneOrientationSequence = [place]
    frames.SharedFunctionalGroupsSequence = [group]
    for other in ("axial", "coronal", "sagittal"):
        fits = [series_rule(orientation=other).misfit(one) is None for one in (classic, frames)]
        assert fits == [other == plane] * 2
    assert series_rule(orientation=plane).misfit(header(ImageOrientationPatient=None)) == f"not {plane}"


def test_as_learned_means_the_modality_and_sequence_of_training_cases():
    learned = Learned({"modality": {"MR": 9}, "sequence": {"flair": 8, "t2": 1}}, 5, True)
    rule = series_rule("learned", "learned", unseen=learned.unseen)
    assert rule.misfit(header()) is None
    assert rule.misfit(header(SeriesDescription="SURVEY JOHN DOE")) is None  # it tells no sequence
    assert rule.misfit(header(SeriesDescription="t1 mprage")) == "sequence t1, which the model has not learned from"
    assert rule.misfit(header(Modality="CT")) == "modality CT, which the model has not learned from"
    knows_nothing = series_rule("learned", "learned", unseen=Learned({}, 0, False).unseen)
    assert knows_nothing.misfit(header(Modality="CT")) is None


def test_no_reason_holds_a_text_of_the_header():
    secret = header(SeriesDescription="Doe^John t1", ImageType=["Doe"], SliceThickness=None, Modality="Doe^J")
    rules = [
        series_rule(
            "learned", "learned", unseen=Learned({"modality": {"MR": 1}, "sequence": {"pd": 1}}, 1, True).unseen
        ),
        *(SeriesRule({"SeriesDescription": text}) for text in ("flair", "!t1")),
        SeriesRule({"ImageType": "ORIGINAL"}),
        SeriesRule({"SliceThickness": [3, "<="]}),
    ]
    reasons = [rule.misfit(secret) for rule in rules]
    assert all(reasons) and "Doe" not in str(reasons)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"SeriesDescriptoin": "flair"}, "'SeriesDescriptoin' is no attribute of DICOM"),
        ({"SeriesDescription": "(flair"}, r"the condition '\(flair' of SeriesDescription has no meaning"),
        ({"SeriesDescription": ""}, "has no meaning"),
        ({"SeriesDescription": {"a": 1}}, "has no meaning"),
        ({"SliceThickness": [5, "=<"]}, "has no meaning"),
        ({"SliceThickness": [5, {}]}, "has no meaning"),
        ({"ImageOrientationPatient": "oblique"}, "orientation 'oblique' is unknown: give sagittal, coronal, axial"),
        ({"BodyPartExamined": "learned"}, "BodyPartExamined cannot be 'learned'"),
    ],
)
def test_a_condition_without_meaning_is_refused(conditions, message):
    with pytest.raises(BundleError, match=message):
        SeriesRule(conditions)
