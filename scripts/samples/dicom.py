"""Write the synthetic sample cohort as DICOM: python -m scripts.samples.dicom --cohort sample_cohort --out DIR."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import JPEGLSLossless, RLELossless, generate_uid
from tqdm import tqdm

from bundle.dicom.mr import SeriesIdentity, mr_series, write_series
from bundle.errors import BundleError, check_choice
from bundle.samples.cohort import DATALIST_NAMES, STEPS

GENERATOR = "dinov3_spatial_ar sample cohort as DICOM"
COMMENTS = "SYNTHETIC: computed by dinov3_spatial_ar, shows no person"
STUDY_DATE = "20260101"  # the same for all, so that the same cohort gives the same objects

TRANSFER_SYNTAXES = {
    "none": None,
    "rle": RLELossless,
    "jpeg-ls": JPEGLSLossless,
}


def make_sample_dicom(
    cohort: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | None = None,
    compress: str = "none",
    enhanced: bool = False,
) -> Path:
    """Write the volumes of a sample cohort as MR series, one study a subject: ``SPLIT/sub-NNNN/IM0001.dcm`` and so on.

    Pixels are integers, STEPS times the intensity: none is rounded. Identifiers follow from the content: the same
    cohort gives the same objects. ``datalist.json`` lists the series by split with their labels; ``cohort.json`` marks
    all as synthetic. The folder appears when all is written.

    Args:
        cohort: a folder that ``scripts.samples.cohort`` made.
        out: a new or empty folder, or one that this function made, which is replaced.
        split: ``train``, ``valid`` or ``test``; None: all.
        compress: a key of ``TRANSFER_SYNTAXES``, all lossless.
        enhanced: write one Legacy Converted Enhanced MR object a subject, with a frame for each slice.

    Returns:
        ``out``.

    Raises:
        BundleError: if ``cohort`` is none, ``out`` holds anything else, or a choice is unknown.
    """
    check_choice("compress", compress, TRANSFER_SYNTAXES)
    if split is not None:
        check_choice("split", split, DATALIST_NAMES)
    source, target = Path(cohort), Path(out).expanduser().resolve()
    record, datalist = _read(source / "cohort.json"), _read(source / "volumes" / "datalist.json")
    if target.is_file() or (target.exists() and any(target.iterdir()) and not _is_ours(target)):
        raise BundleError(f"'{target}' holds something else: name a new or empty folder for the DICOM cohort")
    chosen = {name for key, name in DATALIST_NAMES.items() if split in (None, key)}
    listed = {name: items for name, items in datalist.items() if name in chosen}

    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same file system, so that moving it into place cannot stop halfway.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as workspace:
        fresh = Path(workspace, "fresh")
        fresh.mkdir()
        items = [item for items in listed.values() for item in items]
        for item in tqdm(items, desc="DICOM cohort", unit="subject", disable=None):
            images: list[Dataset] = list(subject_series(source / "volumes" / item["image"]))
            if enhanced:
                images = [to_enhanced(images)]
            write_series(_compressed(images, compress), fresh / series_folder(item["image"]))
        lists = {
            name: [{"image": series_folder(item["image"]), **_label(item)} for item in items]
            for name, items in listed.items()
        }
        _write(fresh / "datalist.json", lists)
        settings = {"split": split, "compress": compress, "enhanced": enhanced}
        _write(fresh / "cohort.json", {"generator": GENERATOR, "cohort": record["parameters"], **settings})
        if target.exists():
            target.rename(Path(workspace, "replaced"))
        fresh.rename(target)
    return target


def series_folder(volume: str) -> str:
    """Where the series of a volume of the cohort lies: ``test/sub-0009_flair.nii.gz`` -> ``test/sub-0009``."""
    return volume.removesuffix("_flair.nii.gz")


def subject_series(file: Path) -> list[Dataset]:
    """The MR series of the volume in ``file``, ``sub-NNNN_flair.nii.gz``."""
    volume = nib.Nifti1Image.from_filename(file)
    # intensities are multiples of 1/STEPS, up to what nibabel rounds
    stored = np.rint(volume.get_fdata() * STEPS).astype(np.uint16)
    subject = file.name.removesuffix("_flair.nii.gz")
    digest = hashlib.sha256(stored.tobytes() + volume.affine.tobytes()).hexdigest()

    def uid(what: str) -> str:
        return generate_uid(entropy_srcs=[GENERATOR, subject, digest, what])

    identity = SeriesIdentity(
        patient_id=subject,
        patient_name=f"SYNTHETIC^{subject}",
        study_uid=uid("study"),
        series_uid=uid("series"),
        frame_of_reference_uid=uid("frame of reference"),
        study_date=STUDY_DATE,
        study_description="SYNTHETIC brain",
        series_description="SYNTHETIC FLAIR",
        comments=COMMENTS,
        body_part="BRAIN",
        manufacturer="dinov3_spatial_ar",
    )
    return mr_series(stored, volume.affine, identity)


def to_enhanced(images: list[Dataset]) -> Dataset:
    """The multi-frame object of a classic series: a series of its own in the same study.

    Raises:
        BundleError: if highdicom is missing.
    """
    try:
        from highdicom.legacy import LegacyConvertedEnhancedMRImage
    except ImportError as error:
        raise BundleError("enhanced objects need the package 'highdicom': pip install highdicom") from error
    series_uid = generate_uid(entropy_srcs=[images[0].SeriesInstanceUID, "enhanced"])
    image = LegacyConvertedEnhancedMRImage(
        images,
        series_instance_uid=series_uid,
        series_number=2,
        sop_instance_uid=generate_uid(entropy_srcs=[series_uid, "0"]),
        instance_number=1,
    )
    # each frame names what it was converted from; listed once more on top, dciodvfy calls it an error
    del image.ReferencedSeriesSequence
    return image


def _compressed(images: list[Dataset], compress: str) -> Iterator[Dataset]:
    syntax = TRANSFER_SYNTAXES[compress]
    for image in images:
        if syntax is not None:
            image.compress(syntax, generate_instance_uid=False)  # lossless: the same image
        yield image


def _label(item: dict) -> dict:
    return {"label": item["label"]} if "label" in item else {}


def _is_ours(folder: Path) -> bool:
    try:
        return _read(folder / "cohort.json").get("generator") == GENERATOR
    except BundleError:
        return False


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read '{path}': give a folder that python -m scripts.samples.cohort made") from error


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    """The options of the command, see :func:`make_sample_dicom`."""
    parser = argparse.ArgumentParser(description="Write the SYNTHETIC sample cohort as DICOM MR series.")
    parser.add_argument("--cohort", type=Path, required=True, help="made by python -m scripts.samples.cohort")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory, or an earlier one of these")
    parser.add_argument("--split", choices=DATALIST_NAMES, help="default: all")
    parser.add_argument("--compress", choices=TRANSFER_SYNTAXES, default="none", help="lossless (default: none)")
    parser.add_argument("--enhanced", action="store_true", help="one multi-frame object a subject")
    return parser


def main() -> None:
    """Write the series and tell where they lie."""
    try:
        directory = make_sample_dicom(**vars(make_parser().parse_args()))
    except BundleError as error:
        sys.exit(f"error: {error}")
    count = len(list(directory.rglob("*.dcm")))
    print(f"{count} SYNTHETIC DICOM objects are in {directory}")


if __name__ == "__main__":
    main()
