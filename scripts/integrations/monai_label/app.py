"""The MONAI Label app that serves the bundle beside it; runs in MONAI Label's environment, as ``main.py`` of the app.

It differs from MONAI Label's own app for bundles where an anomaly detector differs from a segmentation network: labels
that are empty say which images are healthy, and from these alone it learns; the mask is cut at the threshold of the
checkpoint; and what is wrong with images or checkpoint reaches the client as one line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from dicomweb_client.session_utils import create_session_from_user_pass
from fastapi import HTTPException
from monai.data import MetaTensor
from monai.transforms import LoadImage
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import device_list

from bundle import NAME, __version__
from bundle.dicom.words import header_words
from bundle.errors import BundleError, log_single_lines, user_error
from bundle.files import NIFTI_SUFFIXES, is_flat
from bundle.results import CaseResult
from bundle.writers import nifti_of

HEALTHY = "healthy"  # tag of empty labels of DICOM series, which DICOM SEG cannot hold
UNPROCESSABLE = 422

logger = logging.getLogger(__name__)


class BundleApp(MONAILabelApp):
    """One model, named as the bundle, that segments ``anomaly`` and learns from healthy images."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        logging.captureWarnings(True)
        log_single_lines()  # a training has MONAI Label's own handlers
        self.bundle_dir = os.path.join(app_dir, "model", NAME)
        super().__init__(
            app_dir, studies, conf, name=NAME, description="Unsupervised anomaly maps", version=__version__
        )

    def init_infers(self) -> dict[str, InferTask]:
        """The detector of ``models/model.pt``."""
        return {NAME: AnomalyInfer(self.bundle_dir, self.conf, type=InferType.SEGMENTATION, load_strict=True)}

    def init_trainers(self) -> dict[str, TrainTask]:
        """The training of ``configs/train.json``."""
        return {NAME: HealthyTrain(self.bundle_dir, self.conf)}

    def init_strategies(self) -> dict[str, Strategy]:
        """Which image is labeled next."""
        return {"random": Random(), "first": First()}

    def _init_dicomweb_datastore(self) -> Datastore:
        user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        client = DICOMwebClientX(
            url=self.studies,
            session=create_session_from_user_pass(user, password) if user and password else None,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
        )
        return SeriesDatastore(
            client, settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER, settings.MONAI_LABEL_DICOMWEB_CACHE_PATH
        )

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Mask of an image, with its scores as result."""
        with self._one_line():
            image = request["image"]
            stored = datastore or self.datastore()
            if isinstance(image, str) and not os.path.exists(image) and not stored.get_image_uri(image):
                raise BundleError(f"no image '{image}': GET /datastore/?output=all lists those that are there")
            told = stored.told(image) if isinstance(stored, SeriesDatastore) else {}
            return super().infer(request | {"told": told}, datastore)

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """Train on the healthy images; the model is replaced at the end, or not at all."""
        with self._one_line():
            return super().train(request)

    @contextmanager
    def _one_line(self) -> Any:
        try:
            yield
        except Exception as error:
            cause = user_error(error)
            if cause is None:
                raise
            if self._server_mode:
                raise HTTPException(UNPROCESSABLE, str(cause)) from error
            sys.exit(f"error: {cause}")  # a training in a process of its own, whose last lines GET /train/ shows


class AnomalyInfer(BundleInferTask):
    """The map of ``configs/inference.json``, cut at the threshold of the checkpoint, on the grid of the file."""

    def __init__(self, path: str, conf: dict[str, str], **options: Any) -> None:
        super().__init__(path, conf, add_post_restore=False, **options)
        self.network = self.bundle_config.get_parsed_content("network")  # in the precision that inference runs in

    def pre_transforms(self, data: Any = None) -> Sequence[Callable]:
        """Those of the bundle; the modality of a series is known before its intensities are read."""
        load, *more = super().pre_transforms(data)
        return [load, self._tell, *more]

    def _tell(self, data: dict[str, Any]) -> dict[str, Any]:
        data["image"].meta.update(data["told"])
        return data

    def post_transforms(self, data: Any = None) -> Sequence[Callable]:
        """Those of the bundle, which bring the map to the axes of the file, and the threshold."""
        return [*super().post_transforms(data), self._cut]

    def _cut(self, data: dict[str, Any]) -> dict[str, Any]:
        result = CaseResult.from_output(data, self._get_network(data["device"], data))
        if result.unlike:
            logger.warning(result.doubt("the image"))
            if data.get("wanted") == "dicom_seg" and not self.bundle_config["segment_unlike"]:
                raise BundleError(
                    f"{result.doubt('the image')}; a DICOM segmentation would call it a lesion: ask for output=image, "
                    "or start the server with --segment_unlike=true"
                )
        values = torch.from_numpy(result.mask.astype(np.uint8))
        mask = MetaTensor(values, meta=data["pred_map_restored"].meta)
        data[self.output_label_key] = mask[..., 0] if is_flat(data["image_path"]) else mask
        data[self.output_json_key] = {
            "score": result.score,
            "image_threshold": result.image_threshold,
            "threshold": result.threshold,
            "unlike": result.warning,
            "worst_slices": [named.index for named in result.worst(self.bundle_config["worst_slices"])],
            "slice_scores": [one.score for one in sorted(result.slices, key=attrgetter("index"))],
        }
        return data

    def writer(self, data: dict[str, Any], extension: Any = None, dtype: Any = None) -> tuple[Any, Any]:
        """NIfTI as the bundle writes it, with every affine, of which ITK keeps only some; other formats by ITK."""
        source = str(data["image_path"])
        wanted = str(data.get("result_extension") or source)
        suffix = next((suffix for suffix in NIFTI_SUFFIXES if wanted.endswith(suffix)), None)
        if suffix is None:
            return tuple(super().writer(data, extension, dtype))
        mask: MetaTensor = data[self.output_label_key]
        values = mask.numpy().astype(data.get("result_dtype") or np.uint8)
        with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file:
            nib.save(nifti_of(values, mask.affine.numpy(), source, mask.meta["slice_axis"] is not None), file.name)
        return file.name, data[self.output_json_key]


class HealthyTrain(BundleTrainTask):
    """The training of ``configs/train.json``, on the images whose saved label is empty."""

    def config(self) -> dict[str, Any]:
        """What a client may choose."""
        return {"device": device_list(), "max_epochs": self.bundle_config.get_parsed_content("max_epochs")}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train and write ``models/model.pt``.

        Raises:
            BundleError: if fewer than two images are healthy, or one is bad.
        """
        # nothing else of a request goes on: the bundle's config would evaluate texts that begin with $
        devices = [*device_list(), "cpu", "cuda"]
        device = request.get("device") or devices[0]
        device = device[0] if isinstance(device, list) else device
        epochs = request.get("max_epochs") or self.config()["max_epochs"]
        if device not in devices or not isinstance(epochs, int):
            raise BundleError(
                f"device {device!r} and max_epochs {epochs!r} were asked for: give one of {', '.join(devices)}, and a "
                "number of epochs"
            )
        return dict(
            super().__call__({"model": NAME, "max_epochs": epochs, "device": device, "multi_gpu": False}, datastore)
        )

    def _fetch_datalist(self, request: dict[str, Any], datastore: Datastore) -> list[dict[str, Any]]:
        labeled = datastore.datalist()
        healthy = [item["image"] for item in labeled if is_empty(item["label"])]
        logger.info(f"{len(healthy)} of {len(labeled)} labeled images have an empty label: training learns from these")
        if len(healthy) < 2:
            raise BundleError(
                f"{len(healthy)} of {len(labeled)} labeled images have an empty label: save one for each of at least 2 "
                "healthy images, one to train and one to calibrate"
            )
        if self.bundle_config["model"]["intensity"] == "auto" and any(
            _header(image, datastore).get("Modality") == "CT" for image in healthy
        ):
            raise BundleError(
                "the model was trained with intensity auto, but MONAI Label hands series to a training without their "
                "modality, CT: train on the command line, with a window such as --intensity ct_soft_tissue"
            )
        return [{"image": image, **_patient(image, datastore)} for image in healthy]

    def _partition_datalist(
        self, datalist: list[dict[str, Any]], request: dict[str, Any], shuffle: bool = False
    ) -> tuple[list[dict[str, Any]], None]:
        return datalist, None  # the bundle splits, by patient

    def _load_checkpoint(self, model_pytorch: str, pretrained: bool, train_handlers: list[dict[str, Any]]) -> None:
        """Nothing: fits in closed form and calibration start from the images."""

    def _update_overrides(self, overrides: dict[str, Any]) -> dict[str, Any]:
        healthy = Path(self.bundle_path, "healthy.json")
        healthy.write_text(json.dumps({"training": overrides["train#dataset#data"]}))
        overrides |= {
            "dataset_dir": str(healthy),
            "train#dataset#data": "$@splits['training']",
            "logging_file": False,  # else the server's own logging would be replaced
        }
        return overrides


class SeriesDatastore(DICOMWebDatastore):
    """The series of a DICOMweb server, of which some are healthy.

    MONAI Label sends final labels to the server as DICOM SEG, which cannot be empty: an empty one stays here, under a
    tag of its own, until the series gets another label.
    """

    def get_image_uri(self, image_id: str) -> str:
        """The series as NIfTI.

        Raises:
            BundleError: if its slices are no volume, which the conversion would not notice.
        """
        path: str = super().get_image_uri(image_id)
        check_slices(self._files(image_id))
        return path

    def told(self, image_id: str) -> dict[str, Any]:
        """What only the headers of a fetched series say of how it was made; nothing of any other image."""
        files = self._files(image_id)
        return header_meta(files) if files else {}

    def _files(self, image_id: str) -> list[Path]:
        return sorted(Path(self._datastore.image_path(), image_id).glob("*.dcm"))

    def save_label(
        self, image_id: str, label_filename: str, label_tag: str, label_info: dict[str, Any], label_id: str = ""
    ) -> str:
        """Keep an empty label here, and send any other one."""
        if label_tag == DefaultLabelTag.FINAL:
            if is_empty(label_filename):
                return str(super().save_label(image_id, label_filename, HEALTHY, label_info))
            if self.get_label_by_image_id(image_id, HEALTHY):
                self.remove_label(image_id, HEALTHY)
                self.refresh()
        return str(super().save_label(image_id, label_filename, label_tag, label_info))

    def datalist(self, full_path: bool = True) -> list[dict[str, Any]]:
        """Images and labels of the server, and those that are healthy here."""
        labeled: list[dict[str, Any]] = super().datalist(full_path)
        known = {item["image"] for item in labeled}
        for image_id in self._datastore.filter_by_tag(HEALTHY):
            item = {"image": self.get_image_uri(image_id), "label": self.get_label_uri(image_id, HEALTHY)}
            labeled += [item] if item["image"] not in known else []
        return labeled


def check_slices(files: Sequence[Path]) -> None:
    """Refuse files that are not the slices of one volume.

    Raises:
        BundleError: if slices are missing, doubled, or of different size or orientation.
    """
    from bundle.dicom.series import read_headers

    read_headers(files)


def header_meta(files: Sequence[Path]) -> dict[str, Any]:
    """What the headers of a series tell, as :class:`~bundle.transforms.LoadCased` has it in ``meta``."""
    from bundle.dicom.series import modality_in, read_headers

    return {"modality": modality_in(files[0]), "words": header_words(read_headers(files)[0])}


def is_empty(path: str) -> bool:
    """Whether a label marks nothing.

    Raises:
        BundleError: if it cannot be read.
    """
    try:
        if path.endswith(".bin"):  # of OHIF, one byte a voxel
            return not np.fromfile(path, dtype=np.uint8).any()
        return not LoadImage(image_only=True)(path).any()
    except Exception as error:
        raise BundleError(f"cannot read label '{path}': save it anew") from error


def _header(image: str, datastore: Datastore) -> dict[str, Any]:
    """What the datastore knows of an image from a DICOM header."""
    image_id = os.path.basename(image).removesuffix(".gz").removesuffix(".nii")
    return dict(datastore.get_image_info(image_id))


def _patient(image: str, datastore: Datastore) -> dict[str, str]:
    """A word for whose image it is, and of nothing else, where the datastore knows it from a DICOM header."""
    patient = str(_header(image, datastore).get("PatientID", ""))
    known = patient not in ("", "None", "UNK")  # the last one is MONAI Label's word for none
    return {"patient": hashlib.sha256(patient.encode()).hexdigest()} if known else {}
