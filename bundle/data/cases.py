"""What to train, validate, test and infer on: from a folder or a datalist to lists of cases.

A case is a dictionary: ``image`` (path, or the files of a DICOM series), ``name`` (unique, used for outputs), for
labeled sets ``mask`` (path) and ``label`` (1 if anomalous), ``patient`` where a datalist or a rule for names says so,
once it was read, the number of its ``slices``, and, once it is embedded or looked for in the feature cache, ``key`` (of
its content). All files are read once before work begins, so that a bad one is named in the first seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, dropwhile
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from tqdm import tqdm

from bundle.dicom.selection import Choice, SeriesRule, choose
from bundle.dicom.series import Series, group_series, patient_of, uid_of
from bundle.distributed import gather, shard
from bundle.errors import BundleError, check_choice, user_error
from bundle.files import (
    FLAT_SUFFIXES,
    PARTIAL,
    SUFFIXES,
    VOLUME_SUFFIXES,
    Source,
    content_key,
    equal_across,
    files_of,
    is_text,
    parts_of,
    state_of,
)
from bundle.manifest import Manifest
from bundle.transforms.loading import is_dicom_file

Case: TypeAlias = dict[str, Any]

SPLITS = ("training", "validation", "test")
ON_COPIES = ("warn", "raise", "skip")
VALIDATION_SHARE = 0.1  # of the healthy training cases, where a set brings no healthy validation cases of its own

LONGEST_NAME = 240  # bytes of a result's name without suffix: file systems take 255
# The spellings of BMAD's folders
_SPLIT_FOLDERS = {"training": ("train",), "validation": ("valid", "val", "validation"), "test": ("test",)}
_CLASS_FOLDERS = {0: ("good",), 1: ("ungood", "bad", "anomaly")}
_IMAGE_FOLDERS = ("img", "images", "image")
_MASK_FOLDERS = ("label", "labels", "anomaly_mask", "mask", "masks")
_LAYOUT_FOLDERS = {
    *chain.from_iterable((*_SPLIT_FOLDERS.values(), *_CLASS_FOLDERS.values())),
    *_IMAGE_FOLDERS,
}
_BIDS_SUBJECT = re.compile(r"(?:^|[/_])(sub-[0-9a-zA-Z]+)(?=[/_.]|$)")
_BEFORE_LAST_NUMBER = re.compile(r"(.*\D)\d+\D*$")  # 'p01_' of 'p01_045', where the last number may be a slice's
_VOLUMES_EACH = 12  # volumes or fewer in a folder may be the series of a patient; more are a collection
_NUMBER = re.compile(r"((?<=[a-z]t)|(?<!t))\d+", re.IGNORECASE)  # but for those in T1 and T2
_SLICES_EACH = 3  # files or more that have all but the last number in common look like slices of a patient

logger = logging.getLogger(__name__)


def read_splits(
    found: Mapping[str, list[Case]],
    transform: Callable[[Case], Any],
    healthy_transform: Callable[[Case], Any] | None = None,
    on_error: str = "raise",
    store: Container[str] | None = None,
) -> dict[str, list[Case]]:
    """The readable cases of each split of a data set, see :func:`keep_readable`.

    Args:
        found: the cases of each split, see :func:`find_splits`.
        transform: reads a case.
        healthy_transform: reads a case of the training and validation splits and cuts it into slices, so that one
            without any is a bad case; None: ``transform``.
        on_error: ``raise`` or ``skip``.
        store: the feature cache; healthy images that it knows by their content were read before, and are not again.
            Each healthy case then has its ``key``. None: there is no cache to look into.

    Raises:
        BundleError: for bad data, or if of a split of healthy images none can be read.
    """
    healthy = [*found["training"], *found["validation"]]
    if store is not None:
        add_keys(healthy)
    known = {id(case) for case in healthy if store is not None and case.get("key") in store and _is_text(case)}
    tests = {id(case) for case in found["test"]}

    def read(case: Case) -> Any:
        return (transform if healthy_transform is None or id(case) in tests else healthy_transform)(case)

    unknown = [case for split in SPLITS for case in found[split] if id(case) not in known]
    kept = known | {id(case) for case in keep_readable(unknown, read, on_error)}
    splits = {split: [case for case in found[split] if id(case) in kept] for split in SPLITS}
    for split in ("training", "validation"):
        if found[split] and not splits[split]:
            place = place_of(found[split][0])
            raise BundleError(f"no image of the {split} split can be read, the first is '{place}': check the files")
    return splits


def add_keys(cases: list[Case]) -> None:
    """Give each case whose files are there a ``key``, the hash of its image; those that have one keep it.

    Processes that work together hash a share each and tell each other.
    """
    unknown = [case for case in cases if "key" not in case]
    note_states(unknown)
    mine: dict[int, str] = {}
    for index in shard(range(len(unknown))):
        # one that is missing or no regular file, or vanishes now: whoever reads it names it
        with suppress(OSError):
            if all(file.is_file() for file in files_of(unknown[index]["image"])):
                mine[index] = content_key(unknown[index]["image"])
    for share in gather(mine):
        for index, key in share.items():
            unknown[index]["key"] = key


def note_states(cases: Iterable[Case]) -> None:
    """Give each case the ``state`` of its files, by which :func:`check_unchanged` knows them; it keeps one it has."""
    for case in cases:
        case.setdefault("state", _state(case))


def check_unchanged(case: Case) -> None:
    """Refuse a case whose files are not what they were when they were checked, if that is known.

    Raises:
        BundleError: if one has changed or vanished.
    """
    if "state" in case and case["state"] != _state(case):
        raise BundleError(f"'{place_of(case)}' has changed since it was checked: run again when its files are complete")


def _state(case: Case) -> list[Any]:
    return [state_of(case[key]) for key in ("image", "mask") if key in case]


def find_splits(
    dataset_dir: str | os.PathLike,
    seed: int = 0,
    needed: Sequence[str] = SPLITS,
    patient_pattern: str | None = None,
    healthy_images: int | None = None,
    follow_links: bool = False,
    results: Manifest | None = None,
    on_copies: str = "warn",
) -> dict[str, list[Case]]:
    """The cases of each split of a data set; of most files nothing is read but their names.

    Args:
        dataset_dir: a folder in BMAD layout (``train/good``, ``valid``, ``test``, in any of BMAD's spellings), a folder
            of healthy images or volumes, or a MONAI datalist JSON with the lists ``training``, ``validation``,
            ``test``, whose items have ``image``, for tests ``label`` (0, 1, or the path of a mask) or ``mask``, and
            perhaps ``patient``.
        seed: chooses the healthy validation cases where the set brings none: all images of a patient or none. The
            patient is that of the datalist, of ``patient_pattern``, of the DICOM header, or the BIDS subject
            (``sub-...``) in the file's name, whichever is known first.
        needed: the splits that are looked for; the others stay empty.
        patient_pattern: a regular expression that is searched in each case's path below the data folder, with ``/``,
            without suffix and without the leading folders of the layout (``train/good/img``), since a patient has the
            same name in every split. Its first group, or else the whole match, is the patient. None: no rule.
        healthy_images: how many of the training images are used, drawn by ``seed``; None: all.
        follow_links: read what links lead to that lead out of the folder. The folder itself may be a link, and a
            datalist may name any file.
        results: of earlier runs in the output folder, which are not looked for in a folder; None: nothing is written.
        on_copies: where training images are needed, what to do with images that are in two splits: ``warn``, ``raise``,
            or ``skip``, which leaves them out of the first of the two.

    Returns:
        ``training``, ``validation``, ``test``: lists of cases; the first two hold healthy cases only, since nothing may
        be chosen by anomalous ones.

    Raises:
        BundleError: if the folder is missing or empty, a mask is missing, healthy images of fewer than two patients are
            found, a patient or, on request, an image is in more than one split, anomalous or test images lie where only
            healthy ones are looked for, ``patient_pattern`` is no regular expression or matches nothing, test images
            alone are needed and there is none, a link leads out of the folder, or a needed image or its mask lies in
            the output folder.
    """
    check_choice("on_copies", on_copies, ON_COPIES)
    path = Path(os.path.abspath(dataset_dir))  # '.' has a name, too
    if not path.exists():
        raise BundleError(
            f"no data at '{path}': give --dataset_dir a BMAD folder, a folder of healthy images or a datalist"
        )
    if not follow_links:
        _refuse_links(path)
    if path.is_file():
        splits = _from_datalist(path)
    elif any(_subfolder(path, _SPLIT_FOLDERS[split]) for split in ("training", "test")):
        splits = _from_bmad(path, results)
    else:
        _check_healthy(path)
        splits = {"training": _unlabeled(path, results), "validation": [], "test": []}
    _refuse_in_output((case for split in needed for case in splits[split]), results)
    if "training" in needed:
        if patient_pattern is not None:
            _find_patients([case for split in SPLITS for case in splits[split]], patient_pattern)
        else:
            _take_folders_for_patients([case for split in SPLITS for case in splits[split]])
        splits |= _healthy(splits, path, seed)
        splits = _handle_copies(splits, on_copies)
        splits["training"] = _drawn(splits["training"], healthy_images, seed)
    if list(needed) == ["test"] and not splits["test"]:
        raise BundleError(f"'{path}' has no test images: put them into test/good and test/Ungood")
    return {split: splits[split] if split in needed else [] for split in SPLITS}


def _drawn(cases: list[Case], count: int | None, seed: int) -> list[Case]:
    """As many cases as wanted, always the same, in order of name."""
    if count is None:
        return cases
    if count < 1:
        raise BundleError(f"healthy_images is {count}: give at least 1, or null for all")
    return sorted(random.Random(seed).sample(cases, min(count, len(cases))), key=itemgetter("name"))


def _check_healthy(root: Path) -> None:
    """Raise where a folder of healthy images holds, by the names of its folders, others as well."""
    for directory, subfolders, _ in os.walk(root):
        names = {name.lower(): name for name in sorted(subfolders)}
        splits = [names[name] for split in ("training", "test") for name in _SPLIT_FOLDERS[split] if name in names]
        if splits:
            raise BundleError(
                f"'{root}' is no folder of healthy images, since '{Path(directory) / splits[0]}' is in it: give "
                f"--dataset_dir '{directory}'"
            )
        anomalous = [names[name] for name in _CLASS_FOLDERS[1] if name in names]
        if anomalous:
            raise BundleError(
                f"'{root}' is no folder of healthy images, since '{Path(directory) / anomalous[0]}' is in it: give "
                "--dataset_dir the folder of healthy ones, or one with train and test"
            )


def _healthy(splits: dict[str, list[Case]], path: Path, seed: int) -> dict[str, list[Case]]:
    """Training and validation cases, the latter taken from the former where there are none."""
    training = splits["training"]
    if not all(_is_healthy(case) for case in training):
        raise BundleError(
            f"'{path}' lists anomalous training images: training must be healthy, move them to the test split"
        )
    if not training:
        raise BundleError(f"no training images in '{path}': put healthy images into train/good")
    validation = [case for case in splits["validation"] if _is_healthy(case)]
    _warn_of_slices([*training, *validation])
    if not validation:
        training, validation = _by_patient(training, path, seed)
        logger.info(f"no healthy validation images in '{path}': {len(validation)} of the training images serve")
    training = _together(training)
    _check_patients({"training": training, "validation": validation, "test": splits["test"]})
    return {"training": training, "validation": validation}


def _together(cases: list[Case]) -> list[Case]:
    """The cases in their order, but those of a patient follow each other, as folds of what learns from them expect."""
    first: dict[str, int] = {}
    return sorted(cases, key=lambda case: first.setdefault(_owner(case), len(first)))


def _by_patient(cases: list[Case], path: Path, seed: int) -> tuple[list[Case], list[Case]]:
    """Training and validation, a tenth of the images or a few more, since no patient is in both."""
    cases = random.Random(seed).sample(cases, len(cases))
    owners: dict[str, list[Case]] = {}
    for case in cases:
        owners.setdefault(_owner(case), []).append(case)
    if len(owners) < 2:
        raise BundleError(
            f"'{path}' has {len(cases)} healthy image{'s' * (len(cases) > 1)} of one patient: at least 2 patients are "
            "needed, one to train and one to calibrate"
        )
    count = max(1, round(VALIDATION_SHARE * len(cases)))
    validation: list[Case] = []
    for own in list(owners.values())[:-1]:
        if len(validation) < count:
            validation += own
    chosen = {id(case) for case in validation}
    training = sorted((case for case in cases if id(case) not in chosen), key=lambda case: (_owner(case), case["name"]))
    return training, validation  # slices of a patient follow each other


def _check_patients(splits: dict[str, list[Case]]) -> None:
    """No patient may be in two splits: a network that knows the patient finds the patient healthy."""
    seen: dict[str, tuple[str, Case]] = {}
    for split, cases in splits.items():
        for case in cases:
            patient = _patient(case)
            if patient is None:
                continue
            first, other = seen.setdefault(patient, (split, case))
            if first != split:
                raise BundleError(
                    f"'{place_of(other)}' ({first}) and '{place_of(case)}' ({split}) are of one patient: move all "
                    "images of a patient into one split"
                )


def _handle_copies(splits: dict[str, list[Case]], on_copies: str) -> dict[str, list[Case]]:
    """Name images that are in two splits, or leave them out of the first of both.

    They are files that are equal byte by byte, and DICOM images and series of one UID. Test images always stay, so that
    scores can be compared with those of others.
    """
    found = _copies(splits)
    if not found:
        return splits
    (first, case), *_, (last, other) = found[0]
    left = {id(case) for same in found for split, case in same if split != same[-1][0]}
    told = (
        f"{len(left)} image{'s are' if len(left) > 1 else ' is'} in two splits, such as '{place_of(case)}' ({first}) "
        f"and '{place_of(other)}' ({last})"
    )
    if on_copies == "raise":
        raise BundleError(f"{told}: remove one of each pair, or give --on_copies skip")
    if on_copies == "warn":
        logger.warning(f"{told}, and results look better than they are: give --on_copies skip to use each once")
        return splits
    logger.warning(f"{told}: left out of the first of both")
    kept = {split: [case for case in cases if id(case) not in left] for split, cases in splits.items()}
    for split, cases in splits.items():
        if cases and not kept[split]:
            raise BundleError(
                f"each {split} image is in another split, too, such as '{place_of(cases[0])}': give others, or "
                "--on_copies warn to use them all the same"
            )
    return kept


def _copies(splits: Mapping[str, list[Case]]) -> list[list[tuple[str, Case]]]:
    """Cases of different splits that hold one image, with their splits in the order of :data:`SPLITS`."""
    cases = [(split, case) for split in SPLITS for case in splits[split]]
    parts = [(file, index) for index, (_, case) in enumerate(cases) for file in files_of(case["image"])]
    equal = equal_across([file for file, _ in parts], [cases[index][0] for _, index in parts])
    found = {tuple(sorted({parts[part][1] for part in same})) for same in equal}
    of_uid: dict[str, list[int]] = {}
    for index, (_, case) in enumerate(cases):
        if (file := _dicom_file(case)) and (uid := uid_of(file, of_series=len(files_of(case["image"])) > 1)):
            of_uid.setdefault(uid, []).append(index)
    found |= {tuple(same) for same in of_uid.values() if len({cases[index][0] for index in same}) > 1}
    return [[cases[index] for index in same] for same in sorted(found)]


def _patient(case: Case) -> str | None:
    """Whose image it is, if that is known; never shown."""
    if case.get("patient") is not None:
        return str(case["patient"])
    if file := _dicom_file(case):
        return patient_of(file)
    subject = _BIDS_SUBJECT.search(Path(case["name"]).as_posix())
    return subject[1] if subject else None


def _dicom_file(case: Case) -> Path | None:
    """The first DICOM file of an image; None where it has none."""
    source = case["image"]
    if isinstance(source, str) and source.lower().endswith((*FLAT_SUFFIXES, *VOLUME_SUFFIXES)):
        return None
    return next((file for file in files_of(source) if file.is_file() and is_dicom_file(file)), None)


def _owner(case: Case) -> str:
    """The patient; where none is known, each case is of a patient of its own."""
    return _patient(case) or case["name"]


def number_patients(cases: Iterable[Case]) -> list[int]:
    """The patient of each case as a number from 0; a case whose patient is unknown has a number of its own."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(_owner(case), len(numbers)) for case in cases]


def _find_patients(cases: list[Case], pattern: str) -> None:
    """Give each case the ``patient`` that ``pattern`` finds in its name, unless a datalist has said it."""
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise BundleError(
            f"patient_pattern '{pattern}' is no regular expression ({error}): give one whose first group is the "
            f"patient, such as '{_BEFORE_LAST_NUMBER.pattern}'"
        ) from error
    unknown = [case for case in cases if case.get("patient") is None]
    unmatched = []
    for case in unknown:
        match = rule.search(_own_name(case))
        patient = match and match[min(1, rule.groups)]
        if patient:
            case["patient"] = patient
        else:
            unmatched.append(_own_name(case))
    if unknown and len(unmatched) == len(unknown):
        raise BundleError(
            f"patient_pattern '{pattern}' finds no patient in any name, such as '{unmatched[0]}': give a regular "
            "expression whose first group is the patient"
        )
    logger.info(f"{len(unknown)} images are of {len(set(number_patients(unknown)))} patients by patient_pattern")
    if unmatched:
        logger.warning(
            f"patient_pattern '{pattern}' finds no patient in {len(unmatched)} of {len(unknown)} names, such as "
            f"'{unmatched[0]}': each of these is taken for a patient of its own, if its file does not say more"
        )


def _take_folders_for_patients(cases: list[Case]) -> None:
    """Give volumes that lie as the series of patients do, a folder for each, that folder as ``patient``.

    It is one where each of its volumes has a name of its own kind (``flair``, ``t1``, ``t2``) and other folders have
    volumes of the same kinds. Where names differ in numbers alone, nobody can tell series from subjects: a warning says
    so. Folders of different splits are never one patient, since numbers of patients often start again in each.
    """
    volumes = [case for case in cases if str(case["image"]).lower().endswith(VOLUME_SUFFIXES) and not _patient(case)]
    folders: dict[str, list[Case]] = {}
    for case in volumes:
        if "/" in _own_name(case):
            folders.setdefault(case["name"].rpartition("/")[0], []).append(case)
    several = {folder: own for folder, own in folders.items() if 1 < len(own) <= _VOLUMES_EACH}
    if len(several) < 2 or len(several) < len(folders) / 2:
        return
    kinds = {folder: [_kind(case, folder) for case in own] for folder, own in several.items()}
    spread = Counter(kind for own in kinds.values() for kind in set(own))
    alike = [folder for folder, own in kinds.items() if len(set(own)) == len(own) > sum(spread[k] < 2 for k in own) * 2]
    example, own = next(iter(several.items()))
    if len(alike) > len(several) / 2:
        for folder, members in folders.items():
            for case in members:
                case["patient"] = folder
        logger.info(
            f"{len(volumes)} volumes lie in {len(folders)} folders such as '{example}', each of which is taken for a "
            "patient: if they are not, give --patient_pattern"
        )
    elif any(len(set(own)) < len(own) for own in kinds.values()):
        logger.warning(
            f"folders such as '{example}' hold {len(own)} volumes, and each volume counts as a patient of its own: if "
            "a folder is a patient, give --patient_pattern '(.+)/'"
        )


def _kind(case: Case, folder: str) -> str:
    """What the name of a volume says beside its folder and numbers: ``flair`` of ``p07/p07_flair_2``."""
    stem = case["name"].rpartition("/")[2]
    return _NUMBER.sub("", stem.replace(folder.rpartition("/")[2], "")).strip("_-. ").lower()


def _warn_of_slices(cases: list[Case]) -> None:
    """Say so where names of pictures look like slices of patients whom nothing tells apart.

    Such names hold two numbers, that of a patient and, last, that of a slice. Names with one number say nothing.
    """
    pictures = [case for case in cases if str(case["image"]).lower().endswith(FLAT_SUFFIXES) and not _patient(case)]
    stems = Counter(match[1] for case in pictures if (match := _BEFORE_LAST_NUMBER.match(_own_name(case))))
    stems = Counter({stem: count for stem, count in stems.items() if re.search(r"\d", stem)})
    if len(stems) > 1 and stems.total() >= _SLICES_EACH * len(stems):
        example = next(name for name in map(_own_name, pictures) if name.startswith(tuple(stems)))
        logger.warning(
            f"names such as '{example}' look like {stems.total()} slices of {len(stems)} patients, and each counts as "
            f"a patient of its own: if so, give --patient_pattern '{_BEFORE_LAST_NUMBER.pattern}', what stands before "
            "the last number"
        )


def _own_name(case: Case) -> str:
    """The name without the leading folders of the layout, in which only the split and the class differ."""
    *folders, file = case["name"].split("/")
    return "/".join([*dropwhile(lambda folder: folder.lower() in _LAYOUT_FOLDERS, folders), file])


def _is_text(case: Case) -> bool:
    """Whether the names of its files are UTF-8."""
    return all(is_text(file) for key in ("image", "mask") if key in case for file in parts_of(case[key]))


def place_of(case: Case) -> str:
    """What a person finds the image by."""
    return str(case["image"] if isinstance(case["image"], str) else Path(case["image"][0]).parent)


def find_images(
    dataset_dir: str | os.PathLike,
    follow_links: bool = False,
    results: Manifest | None = None,
    series: SeriesRule | None = None,
) -> list[Case]:
    """Every image below a folder, or the one file, as unlabeled cases.

    In a folder, what is no image to examine is passed over and counted in one line, and so are folders of masks.

    Args:
        dataset_dir: the folder or file.
        follow_links: read what links lead to that lead out of the folder. The folder itself may be a link.
        results: of earlier runs in the output folder, which are not looked for in a folder; None: nothing is written.
        series: which DICOM series of a folder are images to examine; None: all.

    Raises:
        BundleError: if there is no image, a link leads out of the folder, or an image lies in the output folder.
    """
    path = Path(os.path.abspath(dataset_dir))  # '.' has a name, too
    if not path.exists():
        raise BundleError(f"no file or folder at '{path}': give --dataset_dir an image, a volume or a folder of them")
    if not follow_links:
        _refuse_links(path)
    cases = _unlabeled(path, results, series)
    _refuse_in_output(cases, results)
    return cases


def _refuse_in_output(cases: Iterable[Case], results: Manifest | None) -> None:
    """Refuse images and masks that lie in the folder of the results."""
    if results is not None:
        keys = ("image", "mask")
        results.refuse_inputs(file for case in cases for key in keys if key in case for file in files_of(case[key]))


def _refuse_links(root: Path) -> None:
    """Refuse a folder with links that lead out of it: what they lead to is nobody's who filled the folder.

    Raises:
        BundleError: with their number, and the first of them.
    """
    entries = (os.path.join(folder, name) for folder, folders, names in os.walk(root) for name in (*folders, *names))
    out = sorted(entry for entry in entries if os.path.islink(entry) and _leads_out(entry, root))
    if out:
        first, target = os.path.relpath(out[0], root), os.readlink(out[0])
        raise BundleError(
            f"{len(out)} link{'s' * (len(out) > 1)} in '{root}' lead{'s' * (len(out) == 1)} out of it, such as "
            f"'{first}' to '{target}': remove them, or give --follow_links true if they may be read"
        )


def _leads_out(path: str | os.PathLike, root: str | os.PathLike) -> bool:
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def keep_readable(cases: list[Case], transform: Callable[[Case], Any], on_error: str = "raise") -> list[Case]:
    """The cases that can be read; processes that work together read a share each and tell each other.

    Each has the number of its ``slices`` afterwards.

    Args:
        cases: to read, each once.
        transform: reads a case; raises :class:`BundleError` if it is bad.
        on_error: ``raise`` at the first bad case, or ``skip``: warn of each bad case, count them, and go on.

    Raises:
        BundleError: at the first bad case, or if none can be read.
    """
    check_choice("on_error", on_error, ("raise", "skip"))
    note_states(cases)

    def slices_or_problem(case: Case) -> int | str:
        if not _is_text(case):
            return f"the name {place_of(case)!a} is no UTF-8: rename the file, or skip such ones with --on_error skip"
        try:
            read = transform(case)
        except Exception as error:
            cause = user_error(error)
            if cause is None:
                raise
            return str(cause)
        return len(read) if isinstance(read, list) else int(read["image"].shape[-1])

    my_finds: dict[int, int | str] = {}
    mine = shard(range(len(cases)))
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending = zip(mine, pool.map(slices_or_problem, [cases[index] for index in mine]), strict=True)
        for index, found in tqdm(pending, desc="reading images", total=len(mine), leave=False):
            my_finds[index] = found
            if isinstance(found, str) and on_error == "raise":
                pool.shutdown(wait=False, cancel_futures=True)
                break
    finds = {index: found for share in gather(my_finds) for index, found in share.items()}
    problems = {index: found for index, found in finds.items() if isinstance(found, str)}
    for _, message in sorted(problems.items()):
        if on_error == "raise":
            raise BundleError(message)
        logger.warning(f"skipped: {message}")
    good = []
    for index, case in enumerate(cases):
        if index not in problems:
            case["slices"] = finds[index]
            good.append(case)
    if problems:
        logger.warning(f"skipped {len(problems)} of {len(cases)} images that cannot be read")
    if cases and not good:
        raise BundleError(
            f"none of {len(cases)} images can be read, the first is {place_of(cases[0])!a}: check the files"
        )
    return good


def _is_healthy(case: Case) -> bool:
    """Whether the label says so; where there is only a mask, it is taken for a lesion's."""
    return not case.get("label", "mask" in case)


class _Image(NamedTuple):
    """What an image is read from, and the path that it is named by."""

    source: Source
    path: Path


class _Found(NamedTuple):
    """The images in a folder in order of name, and what became of its DICOM series and of all other files."""

    images: list[_Image]
    choice: Choice


def _unlabeled(path: Path, results: Manifest | None = None, series: SeriesRule | None = None) -> list[Case]:
    if path.is_file():
        images = [_Image(str(path), path)]
    else:
        images, choice = _images_below(path, results, series)
        _check_any(path, images, choice)
    return _named(
        [{"image": image.source} for image in images],
        [image.path for image in images],
        path if path.is_dir() else path.parent,
    )


def _check_any(folder: Path, images: list[_Image], choice: Choice) -> None:
    """Refuse a folder without images, with what is there instead."""
    if not images and choice.misfits:
        raise BundleError(
            f"no series to examine in '{folder}', but {choice}: give another folder, or other --series_modality, "
            "--series_description, --series_orientation, null for any"
        )
    if not images:
        instead = f", but {choice}" if choice.passes_over else ""
        raise BundleError(
            f"no image in '{folder}'{instead}: put {', '.join(SUFFIXES)} files there, or give another folder"
        )


def _from_bmad(root: Path, results: Manifest | None) -> dict[str, list[Case]]:
    splits = {}
    for split in SPLITS:
        folder = _subfolder(root, _SPLIT_FOLDERS[split])
        pairs = [] if folder is None else [pair for label in (0, 1) for pair in _bmad_class(folder, label, results)]
        splits[split] = _named([case for case, _ in pairs], [path for _, path in pairs], root)
    return splits


def _bmad_class(split: Path, label: int, results: Manifest | None) -> Iterator[tuple[Case, Path]]:
    """The cases of one class in ``split``, from ``good/img``, ``good`` itself, or ``img/good``."""
    by_kind = _subfolder(split, _IMAGE_FOLDERS)  # img/good and label/good
    if by_kind:
        images = _subfolder(by_kind, _CLASS_FOLDERS[label])
        mask_root = _subfolder(split, _MASK_FOLDERS)
        masks = _subfolder(mask_root, _CLASS_FOLDERS[label]) if mask_root else None
        has_masks = mask_root is not None
    else:  # good/img and good/label
        folder = _subfolder(split, _CLASS_FOLDERS[label])
        images = folder and (_subfolder(folder, _IMAGE_FOLDERS) or folder)
        masks = folder and _subfolder(folder, _MASK_FOLDERS)
        has_masks = masks is not None
    if images is None:
        return
    by_stem = {_stem(mask.path): mask.source for mask in _images_below(masks, results).images} if masks else {}
    for image in _images_below(images, results).images:
        case: Case = {"image": image.source, "label": label}
        mask = by_stem.get(_stem(image.path))
        if mask is not None:
            case["mask"] = mask
        elif label == 1 and has_masks:
            raise BundleError(f"no mask for '{image.path}': put a file of the same name into '{masks or mask_root}'")
        yield case, image.path


def _from_datalist(path: Path) -> dict[str, list[Case]]:
    try:
        lists = dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read datalist '{path}' ({error}): give a JSON file, or a folder") from error
    splits = {}
    for split in SPLITS:
        items = lists.get(split) or (lists.get("testing") if split == "test" else None) or []
        cases = [_datalist_case(item, split, path) for item in items]
        splits[split] = _named(cases, [Path(place_of(case)) for case in cases], path.parent)
    return splits


def _datalist_case(item: Any, split: str, datalist: Path) -> Case:
    item = item if isinstance(item, dict) else {"image": item}
    if "image" not in item:
        raise BundleError(f"an item of '{split}' in '{datalist}' has no 'image': {json.dumps(item)[:100]}")
    image = item["image"]
    case: Case = {
        "image": [str(datalist.parent / file) for file in image]
        if isinstance(image, list)
        else str(datalist.parent / image)
    }
    if "patient" in item:
        case["patient"] = item["patient"]
    label = item.get("label")
    mask = item.get("mask", label if isinstance(label, str) else None)
    if mask is not None:
        case["mask"] = str(datalist.parent / mask)
    if isinstance(label, (int, float)):
        if label not in (0, 1):
            raise BundleError(f"label {label} of '{place_of(case)}' in '{datalist}' must be 0, 1 or the path of a mask")
        case["label"] = int(label)
    return case


def _images_below(folder: Path, results: Manifest | None = None, series: SeriesRule | None = None) -> _Found:
    """What lies below ``folder``, but for folders of masks; a line in the log counts what is passed over.

    A DICOM series is one image, in whatever folders its files lie.
    """
    others, dicom = [], []
    no_images: Counter[str] = Counter()
    for directory, subfolders, names in _walk(folder):
        subfolders[:] = sorted(
            name for name in subfolders if name.lower() not in _MASK_FOLDERS and not name.startswith(PARTIAL)
        )
        real = os.path.realpath(directory)
        own, emptied = [], []
        for file in (Path(directory) / name for name in sorted(names)):
            if results is not None and os.path.join(real, file.name) in results:
                no_images["result of an earlier run"] += 1
            elif is_dicom_file(file):
                own.append(file)
            elif file.name.lower().endswith(SUFFIXES):
                others.append(_Image(str(file), file))
            elif not file.suffix and file.is_file() and not file.stat().st_size:
                emptied.append(file)
            else:
                no_images["another format"] += 1
        # what was emptied beside other DICOM files is named when it is read, not passed over
        dicom += own + emptied if own else []
        if emptied and not own:
            no_images["another format"] += len(emptied)
    choice = choose(group_series(dicom), series)
    choice.no_images.update(no_images)
    if choice.passes_over:
        logger.info(f"passed over {choice} in '{folder}'")
    return _Found(sorted([*others, *_named_series(choice.series)], key=lambda image: image.path), choice)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk``, also through links that lead out of ``folder`` and were not refused; each folder once."""
    seen: set[str] = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        links = [name for name in subfolders if os.path.islink(os.path.join(directory, name))]
        for name in links:
            place = os.path.realpath(os.path.join(directory, name))
            if place in seen or not _leads_out(place, folder):
                subfolders.remove(name)
            seen.add(place)
        yield directory, subfolders, names


def _named_series(groups: list[Series]) -> list[_Image]:
    """Series by the name of the folder that is theirs alone, or ``folder/series-NUMBER``."""
    folders = [Path(os.path.commonpath([file.parent for file in group.files])) for group in groups]
    series_in = Counter(folders)
    return [
        _Image(str(group.files[0]), group.files[0])
        if len(group.files) == 1
        else _Image([str(file) for file in group.files], folder if series_in[folder] == 1 else folder / group.name)
        for group, folder in zip(groups, folders, strict=True)
    ]


def _stem(file: Path) -> str:
    """File name without the suffix, of which ``.nii.gz`` is one, unless there is nothing else."""
    suffix = next((s for s in SUFFIXES if file.name.lower().endswith(s)), "")
    stem = file.name[: len(file.name) - len(suffix)]
    return stem if stem.strip(".") else file.name


def _named(cases: list[Case], paths: list[Path], root: Path) -> list[Case]:
    """Give each case a name that no other has, not even where case and Unicode's form of letters do not count.

    It is the path below ``root`` without suffix. Where names would be equal, all of them keep their suffixes. Where
    they still are, a hash of the path follows, and a number where even that is the same.
    """
    spellings = [
        _spellings(case["image"], path, root, index)
        for index, (case, path) in enumerate(zip(cases, paths, strict=True))
    ]
    names = [next(spelling) for spelling in spellings]
    while twins := _twins(names):
        for index in twins:
            names[index] = next(spellings[index])
    for case, name in zip(cases, names, strict=True):
        case["name"] = name
    return cases


def _spellings(source: Source, path: Path, root: Path, index: int) -> Iterator[str]:
    """Names of a case, from the plain one to one that no other case has, again and again."""
    long = path.name.replace(".", "_")
    yield _below(path.with_name(_short(_stem(path))), root)
    yield _below(path.with_name(_short(long)), root)
    digest = _digest("\0".join(os.path.relpath(str(file), str(root)) for file in parts_of(source)))
    yield _below(path.with_name(_short(f"{long}-{digest}")), root)
    while True:  # the same files, listed again
        yield _below(path.with_name(_short(f"{long}-{digest}-{index}")), root)


def _short(name: str) -> str:
    """``name``; where results of this name would be too long for a file system, its beginning and a hash."""
    content = os.fsencode(name)
    if len(content) <= LONGEST_NAME:
        return name
    return f"{content[: LONGEST_NAME - 13].decode('utf-8', 'ignore')}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:12]


def _twins(names: list[str]) -> list[int]:
    """The places of names that a file system may take for one."""
    folded = [unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()) for name in names]
    counts = Counter(folded)
    return [index for index, name in enumerate(folded) if counts[name] > 1]


def _below(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file != root and file.is_relative_to(root) else file.name


def _subfolder(folder: Path, spellings: Iterable[str]) -> Path | None:
    """The subfolder of ``folder`` that has one of the ``spellings``, in any case."""
    return next((sub for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name.lower() in spellings), None)
