"""The sample cohort: SYNTHETIC brains with and without lesions, so that every command runs without a download.

A subject is made from the ICBM 152 tissue maps that the package nilearn ships (Fonov et al., NeuroImage 54:313-327,
2011): gray matter, white matter and CSF under a random affine and a random smooth deformation, with a FLAIR-like
contrast, fine texture, a bias field and Rician noise. No subject is a person.

Volumes are [X, Y, Z] in RAS orientation: x grows to the patient's right, y to the front, z to the head. Coordinates
are millimeters; intensities lie in [0, 1].
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import torch
from monai.transforms import RandAffineGrid, RandBiasField, RandRicianNoise, Resample
from numpy.random import RandomState
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from bundle.errors import BundleError

GENERATOR = "dinov3_spatial_ar sample cohort"
GENERATOR_VERSION = 1  # raise it with every change to what is written, so that old cohorts are made anew
ATLAS_FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"  # in nilearn: 1 mm, uint8, 0 to 255
DESCRIPTION = "SYNTHETIC dinov3_spatial_ar"  # in the header of every volume

MIN_LESION_PIXELS = 30  # a slice with fewer, but not none, is neither good nor Ungood: left out of the slices
STEPS = 5 * 255  # of a stored volume from 0 to 1; odd per gray level, so that rounding to a PNG never meets a tie

# The grid of a volume
IN_PLANE = (176, 208)  # voxels of 1 mm along x and y
SLAB_MM = (-5.0, 61.0)  # heights of the lowest and highest slice: the lower ventricles and the vertex
SLICE_GAP_MM = 6.0  # at most, between slices
TEMPLATE_CENTER_MM = (0.0, -18.0, 22.0)  # the middle of the template's grid

# A healthy subject
CONTRAST = (0.62, 0.48, 0.12)  # mean intensity of gray matter, white matter and CSF
CONTRAST_SPREAD = 0.03
TEXTURE = 0.05  # standard deviation, as a share of the intensity
TEXTURE_SIGMA_MM = 1.0
ROTATION = 0.07  # radians, at most, about each axis
SHIFT_MM = 3.0  # at most, along each axis
SCALE = 0.04  # at most, along each axis
DEFORMATION_MM = 3.0  # root mean square length
DEFORMATION_SIGMA_MM = 12.0
BIAS = 0.04  # largest coefficient of the log bias field
NOISE = 0.015

# A lesion
ROUGHNESS = 0.2  # standard deviation of the log radius
CORE = 0.6  # radius of a core, as a share of the lesion's
SKULL_MM = 15.0  # a mass pushes tissue less if it is nearer to the surface than this

MANIFEST_COLUMNS = ("file", "subject", "split", "slice", "label", "lesion_kind", "lesion_pixels")
ManifestRow = tuple[str, str, str, int, str, str, int]

FOLDERS = (
    "volumes/train",
    "volumes/valid",
    "volumes/test",
    "slices/train/good",
    "slices/valid/good/img",
    "slices/valid/good/label",
    "slices/valid/Ungood/img",
    "slices/valid/Ungood/label",
    "slices/test/good/img",
    "slices/test/good/label",
    "slices/test/Ungood/img",
    "slices/test/Ungood/label",
)

README = f"""SYNTHETIC sample cohort of the MONAI bundle dinov3_spatial_ar

No image shows a person: all are computed. They are for trying out and testing software; a result on them says nothing
about patients.

HOW IT IS MADE
Each subject is sampled from the ICBM 152 maps of gray and white matter; CSF is what is inside the brain and neither.
A random affine, a random smooth deformation of about 3 mm, a FLAIR-like contrast, fine texture, a bias field and
Rician noise make it an individual. All of it follows from the parameters in cohort.json.
One lesion per diseased subject, of one kind: bright, dark, ring (bright rim, dark core), diffuse (faint, soft border)
or mass_effect (pushes the tissue around it away). A mask is where the lesion has at least half of its full effect,
with the core of a ring and without the tissue that a mass only pushes.

WHAT LIES WHERE
volumes/SPLIT/sub-NNNN_flair.nii.gz   the image: RAS, 1 mm in plane, affine in mm, intensity 0 to 1
volumes/SPLIT/sub-NNNN_lesion.nii.gz  its lesion mask, 0 or 1; all 0 for a healthy subject; none in train
slices/train/good/NAME.png            healthy slices to learn from (BMAD layout)
slices/SPLIT/LABEL/img/NAME.png       slices of valid and test; LABEL is good (no lesion in this slice) or Ungood
slices/SPLIT/LABEL/label/NAME.png     their masks, 0 or 255
manifest.csv                          one line per slice: {", ".join(MANIFEST_COLUMNS)}
cohort.json                           parameters and list of files

NAME is sub-NNNN_slice-KK, KK the index along z of the volume, from 0 at the bottom.
lesion_kind is the subject's, 'none' if it is healthy; so a good slice of a diseased subject carries its kind too.
A slice is Ungood from {MIN_LESION_PIXELS} lesion pixels on. Those with fewer, but not none, are left out everywhere
but in the volumes.
A PNG shows the volume in radiological display, orientation PLS: front on top, the patient's right on the left.
Its gray level is round(255 * intensity), the same for every slice and subject.

SOURCE AND LICENSE OF THE ICBM 152 MAPS
ICBM 152 nonlinear symmetric 2009a, as shipped by nilearn. V. Fonov, A. C. Evans, K. Botteron, C. R. Almli,
R. C. McKinstry, D. L. Collins: Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54:313-327,
2011, doi:10.1016/j.neuroimage.2010.07.033. nilearn's description gives the license as 'unknown'; the atlas is published
by the Montreal Neurological Institute under this notice:

Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property
loss, or injury to subjects or patients resulting from the use or misuse of this software package.
"""


@dataclass(frozen=True)
class LesionKind:
    """What a kind of lesion looks like; pairs are the ends of a uniform draw.

    Args:
        radius: mean radius in mm.
        intensity: of the lesion, or of its rim if it has a core.
        edge: half the width of the soft border, as a share of the radius.
        opacity: share of the tissue's intensity that the lesion's replaces.
        core: intensity of the core, if it has one.
        pushes: whether it displaces the tissue around it.
    """

    radius: tuple[float, float]
    intensity: tuple[float, float]
    edge: float = 0.12
    opacity: float = 1.0
    core: tuple[float, float] | None = None
    pushes: bool = False


DATALIST_NAMES = {"train": "training", "valid": "validation", "test": "test"}

LESION_KINDS = {
    "bright": LesionKind(radius=(6, 13), intensity=(0.72, 0.84)),
    "dark": LesionKind(radius=(6, 13), intensity=(0.22, 0.32)),
    "ring": LesionKind(radius=(9, 15), intensity=(0.72, 0.84), core=(0.24, 0.36)),
    "diffuse": LesionKind(radius=(12, 18), intensity=(0.82, 0.94), edge=0.45, opacity=0.75),
    "mass_effect": LesionKind(radius=(11, 17), intensity=(0.74, 0.86), pushes=True),
}


@dataclass(frozen=True)
class Parameters:
    """What decides the content of a cohort; see :func:`make_sample_cohort`."""

    seed: int
    train_subjects: int
    valid_subjects: int
    test_subjects: int
    slices_per_subject: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            low = 1 if name == "slices_per_subject" else 0
            if not isinstance(value, int) or not low <= value < 2**32:
                raise BundleError(f"sample cohort: {name} is {value!r}: give a whole number from {low} to {2**32 - 1}")


class Slab(NamedTuple):
    """The grid of a volume: ``affine`` [4, 4] from voxels to mm, and ``points`` [3, X, Y, Z], each voxel in mm."""

    affine: np.ndarray
    points: Tensor

    @property
    def spacing(self) -> list[float]:
        """Size of a voxel in mm."""
        return self.affine.diagonal()[:3].tolist()


class Subject(NamedTuple):
    """A synthetic subject: ``image`` [X, Y, Z] float32 in [0, 1] and ``lesion`` [X, Y, Z] bool."""

    image: np.ndarray
    lesion: np.ndarray


def made_if_missing(dataset_dir: str | os.PathLike[str], cohort_dir: str | os.PathLike[str]) -> str:
    """``dataset_dir``; if it lies in ``cohort_dir`` and is missing, the sample cohort is made there.

    Of processes that work together one makes it, the others find it.

    Raises:
        BundleError: see :func:`make_sample_cohort`.
    """
    wanted = Path(dataset_dir)
    if not wanted.exists() and Path(cohort_dir).resolve() in wanted.resolve().parents:
        with idist.one_rank_first():
            make_sample_cohort(cohort_dir)
    return str(dataset_dir)


def make_sample_cohort(
    directory: str | os.PathLike[str],
    seed: int = 0,
    train_subjects: int = 40,
    valid_subjects: int = 10,
    test_subjects: int = 20,
    slices_per_subject: int = 12,
) -> Path:
    """Write the sample cohort to ``directory``, unless it is already there.

    The content follows from the parameters alone, and a subject from seed, number, kind and slices alone. The files
    appear under ``directory`` only when all are written. A cohort with other parameters, or one that lost files, is
    replaced. ``README.txt`` in the directory explains the layout.

    Args:
        directory: a new or empty directory, or one that holds a sample cohort.
        seed: 0 to 2**32 - 1.
        train_subjects: healthy subjects to learn from.
        valid_subjects: subjects to choose thresholds with; every second one is healthy.
        test_subjects: subjects to report on; every fourth one is healthy.
        slices_per_subject: axial slices; up to 12 lie 6 mm apart, more lie closer.

    Returns:
        ``directory``.

    Raises:
        BundleError: if ``directory`` holds anything but a cohort, a number is out of range, or nilearn is missing.
    """
    parameters = Parameters(seed, train_subjects, valid_subjects, test_subjects, slices_per_subject)
    target = Path(directory).expanduser().resolve()
    if holds_cohort(target, parameters):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same file system, so that moving it into place cannot stop halfway.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as workspace:
        fresh = Path(workspace, "fresh")
        write_cohort(fresh, parameters)
        if target.exists():
            target.rename(Path(workspace, "replaced"))
        fresh.rename(target)
    return target


def holds_cohort(directory: Path, parameters: Parameters) -> bool:
    """Whether ``directory`` holds every file of the cohort with these ``parameters``.

    Raises:
        BundleError: if it does not, and replacing ``directory`` would delete what is not of a cohort.
    """
    if directory.is_file():
        raise BundleError(f"'{directory}' is a file: name a new or empty directory for the sample cohort")
    if not directory.exists():
        return False
    record_file = directory / "cohort.json"
    record = read_record(record_file)
    if record:
        listed = {directory / file for file in record.pop("files", [])}
        found = {path for path in directory.rglob("*") if path.is_file()}
        if record == make_record(parameters) and listed <= found:
            return True
        foreign = sorted(found - listed - {record_file})
    else:
        foreign = sorted(directory.iterdir())
    if foreign:
        raise BundleError(f"'{foreign[0]}' is not of a sample cohort: name a new or empty directory for the cohort")
    return False


def make_record(parameters: Parameters) -> dict:
    """What ``cohort.json`` tells beside the list of files."""
    return {"generator": GENERATOR, "version": GENERATOR_VERSION, "parameters": asdict(parameters)}


def read_record(path: Path) -> dict:
    """The content of a ``cohort.json``, empty if ``path`` is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and record.get("generator") == GENERATOR else {}


def write_cohort(directory: Path, parameters: Parameters) -> None:
    """Write every file of a cohort to the new ``directory``."""
    for folder in FOLDERS:
        (directory / folder).mkdir(parents=True)
    tissues = load_tissues()
    slab = make_slab(parameters.slices_per_subject)
    rows: list[ManifestRow] = []
    volumes: dict[str, list[dict]] = {"training": [], "validation": [], "test": []}
    for number, split, kind in tqdm(list(plan_subjects(parameters)), desc="sample cohort", unit="subject"):
        subject = synthesize(tissues, slab, parameters.seed, number, kind)
        name = f"sub-{number:04d}"
        write_volumes(directory / "volumes" / split, name, subject, slab, with_lesion=split != "train")
        volumes[DATALIST_NAMES[split]].append(datalist_item(split, name, subject))
        rows += write_slices(directory, split, name, kind or "none", subject)
    write_manifest(directory / "manifest.csv", rows)
    (directory / "volumes" / "datalist.json").write_text(json.dumps(volumes, indent=1) + "\n", encoding="utf-8")
    (directory / "README.txt").write_text(README, encoding="utf-8")
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    record = {**make_record(parameters), "files": files}
    (directory / "cohort.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plan_subjects(parameters: Parameters) -> Iterator[tuple[int, str, str | None]]:
    """Number (from 1), split and lesion kind (None if healthy) of every subject; the kinds take turns."""
    numbers = itertools.count(1)
    for split, subjects, healthy_every in (
        ("train", parameters.train_subjects, 1),
        ("valid", parameters.valid_subjects, 2),
        ("test", parameters.test_subjects, 4),
    ):
        kinds = itertools.cycle(LESION_KINDS)
        for position in range(1, subjects + 1):
            yield next(numbers), split, next(kinds) if position % healthy_every else None


def load_tissues() -> Tensor:
    """Shares of gray matter, white matter and CSF [3, X, Y, Z] in each 1 mm voxel of the ICBM 152 template.

    CSF is what is inside the brain and neither gray nor white. The template's T1 image is zero outside the brain and
    above zero in all of it, ventricles included.

    Raises:
        BundleError: if nilearn, which ships the maps, is not installed.
    """
    package = importlib.util.find_spec("nilearn")  # its import would take seconds and is not needed
    if package is None or package.origin is None:
        raise BundleError(
            "the sample cohort needs the brain maps in the package nilearn, which the extra 'sample' has: "
            'pip install -e ".[sample]"'
        )
    folder = Path(package.origin).parent / "datasets" / "data"
    gray, white, t1 = (
        np.asarray(nib.Nifti1Image.from_filename(folder / ATLAS_FILE.format(name)).dataobj)
        for name in ("gm", "wm", "t1")
    )
    csf = (t1 > 0) * (255 - gray - white)
    return torch.from_numpy(np.stack([gray, white, csf])).float() / 255


def make_slab(slices: int) -> Slab:
    """The grid of ``slices`` axial slices on which every subject is sampled."""
    low, high = SLAB_MM
    size = np.array([*IN_PLANE, slices])
    spacing = np.array([1.0, 1.0, min(SLICE_GAP_MM, (high - low) / max(slices - 1, 1))])
    first = np.array([*TEMPLATE_CENTER_MM[:2], (low + high) / 2]) - spacing * (size - 1) / 2
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = first
    axes = [torch.from_numpy(start + step * np.arange(n)) for start, step, n in zip(first, spacing, size, strict=True)]
    return Slab(affine, torch.stack(torch.meshgrid(*axes, indexing="ij")).float())


def synthesize(tissues: Tensor, slab: Slab, seed: int, number: int, kind: str | None = None) -> Subject:
    """Subject ``number`` of a cohort, healthy or with a lesion of ``kind``.

    Anatomy, lesion and scan draw from streams of their own: with and without a lesion it is the same subject.
    """
    anatomy, disease, scan = (RandomState([seed, number, stream]) for stream in range(3))
    contrast = torch.from_numpy(anatomy.normal(CONTRAST, CONTRAST_SPREAD)).float()
    coordinates = template_coordinates(anatomy, slab)
    texture = 1 + TEXTURE * smooth_noise(anatomy, slab, TEXTURE_SIGMA_MM)[0]
    shares = sample(tissues, coordinates)
    if kind is None:
        image = mix(contrast, shares)
        lesion = torch.zeros_like(image, dtype=torch.bool)
    else:
        look = LESION_KINDS[kind]
        level, center = grow_lesion(disease, look, slab, shares)
        if look.pushes:
            shares = sample(tissues, coordinates + push_tissue(level, center, slab, shares))
        image, lesion = paint_lesion(disease, look, mix(contrast, shares), level, shares)
    inside = shares.sum(0) > 0.5
    image = acquire(scan, image * texture) * inside
    return Subject(quantize(image.numpy()), (lesion & inside).numpy())


def mix(contrast: Tensor, shares: Tensor) -> Tensor:
    """The intensity [X, Y, Z] of tissues with these ``shares`` [3, X, Y, Z] and intensities [3]."""
    return torch.einsum("t,txyz->xyz", contrast, shares)


def template_coordinates(random: RandomState, slab: Slab) -> Tensor:
    """Where each voxel of a subject lies in the template, in mm from the middle of its grid [3, X, Y, Z]."""
    centered = slab.points - torch.tensor(TEMPLATE_CENTER_MM).reshape(3, 1, 1, 1)
    homogeneous = torch.cat([centered, torch.ones_like(centered[:1])])
    affine = RandAffineGrid(rotate_range=[ROTATION] * 3, translate_range=[SHIFT_MM] * 3, scale_range=[SCALE] * 3)
    affine.set_random_state(state=random)
    moved = affine(grid=homogeneous)[:3]
    return moved + DEFORMATION_MM / math.sqrt(3) * smooth_noise(random, slab, DEFORMATION_SIGMA_MM, channels=3)


def smooth_noise(random: RandomState, slab: Slab, sigma: float, channels: int = 1) -> Tensor:
    """Gaussian noise [channels, X, Y, Z] of standard deviation 1, smooth over ``sigma`` mm."""
    size = slab.points.shape[1:]
    # A lattice of half a sigma carries all that the smoothing leaves, in a fraction of the time.
    steps = [max(sigma / 2, spacing) for spacing in slab.spacing]
    lattice = [math.ceil(n * spacing / step) for n, spacing, step in zip(size, slab.spacing, steps, strict=True)]
    noise = random.standard_normal((channels, *lattice))
    noise = ndimage.gaussian_filter(noise, [0.0, *(sigma / step for step in steps)], mode="wrap")
    noise /= noise.std()
    return F.interpolate(torch.from_numpy(noise)[None].float(), size=size, mode="trilinear")[0]


def sample(tissues: Tensor, coordinates: Tensor) -> Tensor:
    """The shares [3, X, Y, Z] of ``tissues`` at ``coordinates`` in mm from the middle of their 1 mm grid."""
    return torch.as_tensor(Resample(padding_mode="zeros", dtype=np.float32)(tissues, coordinates))


def grow_lesion(random: RandomState, look: LesionKind, slab: Slab, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The shape and place of a lesion that starts in white matter.

    Returns:
        level [X, Y, Z]: 0 in the center, 1 on the border of an ellipsoid whose radius varies smoothly;
        center [3, 1, 1, 1] in mm.
    """
    radius = random.uniform(*look.radius)
    candidates = np.argwhere((shares[1].numpy() > 0.5) & (depth_in_brain(slab, shares) > 0.8 * radius))
    x, y, z = candidates[random.randint(len(candidates))]
    center = slab.points[:, x, y, z].reshape(3, 1, 1, 1)
    radii = torch.from_numpy(radius * random.uniform(0.8, 1.2, size=(3, 1, 1, 1))).float()
    distance = ((slab.points - center) / radii).square().sum(0).sqrt()
    return distance * torch.exp(ROUGHNESS * smooth_noise(random, slab, radius / 2)[0]), center


def push_tissue(level: Tensor, center: Tensor, slab: Slab, shares: Tensor) -> Tensor:
    """The way [3, X, Y, Z] in mm from each voxel to where its tissue lay before a mass of shape ``level`` grew.

    As if a disk grew in a plane, the square of the distance from the center grows by the same amount everywhere;
    but the skull holds the surface of the brain in place.
    """
    contraction = 1 - (1 - level.clamp(min=1) ** -2).sqrt()
    freedom = torch.from_numpy(depth_in_brain(slab, shares) / SKULL_MM).clamp(max=1).float()
    return (center - slab.points) * contraction * freedom


def depth_in_brain(slab: Slab, shares: Tensor) -> np.ndarray:
    """The distance [X, Y, Z] in mm of each voxel from the surface of the brain, 0 outside."""
    return ndimage.distance_transform_edt(shares.sum(0) > 0.5, sampling=slab.spacing)


def paint_lesion(
    random: RandomState, look: LesionKind, image: Tensor, level: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """``image`` [X, Y, Z] with a lesion of the shape ``level``, and the lesion's mask [X, Y, Z].

    The mask is where the lesion has at least half of its full effect. CSF stays as it is, unless a mass fills it.
    """
    tissue = shares.sum(0) if look.pushes else shares[:2].sum(0)
    cover = ramp(level, 1, look.edge) * tissue
    intensity = torch.full_like(level, random.uniform(*look.intensity))
    if look.core is not None:
        core = torch.full_like(level, random.uniform(*look.core))
        intensity = torch.lerp(intensity, core, ramp(level, CORE, look.edge))
    return torch.lerp(image, intensity, look.opacity * cover), cover >= 0.5


def ramp(level: Tensor, border: float, edge: float) -> Tensor:
    """1 inside of ``border`` and 0 outside, linear from ``border - edge`` to ``border + edge``."""
    return ((border + edge - level) / (2 * edge)).clamp(0, 1)


def acquire(random: RandomState, image: Tensor) -> Tensor:
    """``image`` [X, Y, Z] as a scanner would show it: with a bias field and Rician noise."""
    bias = RandBiasField(prob=1, coeff_range=(-BIAS, BIAS))
    noise = RandRicianNoise(prob=1, std=NOISE, sample_std=False)
    for transform in (bias, noise):
        transform.set_random_state(state=random)
    return torch.as_tensor(noise(bias(image[None])))[0]


def quantize(image: np.ndarray) -> np.ndarray:
    """``image`` within [0, 1] and in the steps of a stored volume, float32."""
    return (np.round(image.clip(0, 1) * STEPS) / STEPS).astype(np.float32)


def to_gray_levels(image: np.ndarray) -> np.ndarray:
    """The uint8 gray levels of a PNG: round(255 * image) for an ``image`` in [0, 1]."""
    return np.round(255 * image.clip(0, 1)).astype(np.uint8)


def radiological(volume: np.ndarray) -> np.ndarray:
    """A RAS volume [X, Y, Z] in orientation PLS [rows, columns, Z]: front on top, the patient's right on the left."""
    return volume[::-1, ::-1].swapaxes(0, 1)


def write_volumes(folder: Path, name: str, subject: Subject, slab: Slab, with_lesion: bool) -> None:
    """Write a subject's image and, if asked, its lesion mask."""
    write_nifti(folder / f"{name}_flair.nii.gz", subject.image, slab.affine, np.int16, slope=1 / STEPS)
    if with_lesion:
        write_nifti(folder / f"{name}_lesion.nii.gz", subject.lesion, slab.affine, np.uint8, slope=1)


def datalist_item(split: str, name: str, subject: Subject) -> dict:
    """The volume as an item of a MONAI datalist, with paths relative to ``volumes``."""
    item: dict = {"image": f"{split}/{name}_flair.nii.gz"}
    if split != "train":
        item |= {"mask": f"{split}/{name}_lesion.nii.gz", "label": int(subject.lesion.any())}
    return item


def write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray, dtype: type[np.integer], slope: float) -> None:
    """Write ``volume`` as integers of ``dtype`` that stand for multiples of ``slope``."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_slope_inter(slope, 0)
    header.set_xyzt_units("mm")
    header["descrip"] = DESCRIPTION
    nib.save(nib.Nifti1Image(volume.astype(np.float32), affine, header), path)


def write_slices(directory: Path, split: str, name: str, kind: str, subject: Subject) -> list[ManifestRow]:
    """Write a subject's slices, and their masks unless for training, in BMAD layout; return their manifest rows."""
    gray_levels = radiological(to_gray_levels(subject.image))
    masks = radiological(255 * subject.lesion.astype(np.uint8))
    rows: list[ManifestRow] = []
    for index, pixels in enumerate(subject.lesion.sum((0, 1)).tolist()):
        if 0 < pixels < MIN_LESION_PIXELS:
            continue
        label = "Ungood" if pixels else "good"
        folder = Path("slices", split, label)
        file = f"{name}_slice-{index:02d}.png"
        image_file = folder / file if split == "train" else folder / "img" / file
        write_png(directory / image_file, gray_levels[..., index])
        if split != "train":
            write_png(directory / folder / "label" / file, masks[..., index])
        rows.append((image_file.as_posix(), name, split, index, label, kind, pixels))
    return rows


def write_png(path: Path, gray_levels: np.ndarray) -> None:
    """Write ``gray_levels`` [rows, columns], uint8."""
    Image.fromarray(np.ascontiguousarray(gray_levels)).save(path)


def write_manifest(path: Path, rows: Iterable[ManifestRow]) -> None:
    """Write a line with the column names and one for each of ``rows``."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([MANIFEST_COLUMNS, *rows])
