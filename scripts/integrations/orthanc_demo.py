"""The whole way through a clinical archive, on SYNTHETIC images.

    python -m scripts.integrations.orthanc_demo --checkpoint FILE

Starts an Orthanc, stores some of the sample cohort (C-STORE), examines each study by DICOMweb, stores the results, and
fetches what a viewer would fetch: series, metadata, rendered frames, objects. Of these it draws a picture.
"""

from __future__ import annotations

import argparse
import io
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
from dicomweb_client import DICOMwebClient
from matplotlib.figure import Figure
from PIL import Image
from pydicom import Dataset
from pydicom.uid import ParametricMapStorage

from bundle.errors import BundleError
from bundle.figures import COLORMAP
from bundle.files import whole_file
from bundle.results import OUTLINE
from bundle.samples.cohort import make_sample_cohort
from scripts.integrations.dicomweb import ROOT, connect
from scripts.integrations.orthanc import Orthanc, running
from scripts.samples.dicom import make_sample_dicom

PNG = ("image/png",)


@dataclass
class StoredSeries:
    """A series as a viewer learns of it.

    Args:
        study, uid: identifiers.
        modality, description: as QIDO-RS tells them.
        instances: metadata of its objects by WADO-RS, without pixels, in order of their numbers.
    """

    study: str
    uid: str
    modality: str
    description: str
    instances: list[dict] = field(default_factory=list)

    def frames(self) -> Iterator[tuple[str, int]]:
        """SOP instance and number, from 1, of every frame that Orthanc draws: it draws no floats."""
        for instance in self.instances:
            drawn = _value(instance, "Rows") and _value(instance, "SOPClassUID") != ParametricMapStorage
            count = int(_value(instance, "NumberOfFrames") or 1) if drawn else 0
            for number in range(1, count + 1):
                yield str(_value(instance, "SOPInstanceUID")), number


@dataclass(frozen=True)
class Grids:
    """The objects of a study on one grid [slices, rows, columns].

    Args:
        source: instances of the source series, in order of ``mask``.
        mask: of the SEG, bool.
        heat: of the Parametric Map, from 0 to 1; 0.5 is the threshold.
    """

    source: list[Dataset]
    mask: np.ndarray
    heat: np.ndarray


def fetch_series(client: DICOMwebClient, study: str) -> list[StoredSeries]:
    """What QIDO-RS and the metadata of WADO-RS tell of a study's series."""
    found = []
    for item in client.search_for_series(study, fields=["SeriesDescription"]):
        series = StoredSeries(
            study,
            str(_value(item, "SeriesInstanceUID")),
            str(_value(item, "Modality")),
            str(_value(item, "SeriesDescription") or ""),
        )
        metadata = client.retrieve_series_metadata(study, series.uid)
        series.instances = sorted(metadata, key=lambda one: int(_value(one, "InstanceNumber") or 0))
        found.append(series)
    return sorted(found, key=lambda series: int(_value(series.instances[0], "SeriesNumber") or 0))


def rendered(client: DICOMwebClient, series: StoredSeries, instance: str, frame: int = 1) -> np.ndarray:
    """A frame as the server draws it, [rows, columns] or [rows, columns, 3] uint8."""
    png = client.retrieve_instance_frames_rendered(series.study, series.uid, instance, [frame], media_types=PNG)
    return np.asarray(Image.open(io.BytesIO(png)))


def fetch_grids(client: DICOMwebClient, series: Sequence[StoredSeries]) -> Grids:
    """Source, SEG and Parametric Map of a study by WADO-RS, read by highdicom.

    Args:
        client: of the server.
        series: of :func:`fetch_series`.
    """
    source = client.retrieve_series(series[0].study, find(series, "MR").uid)
    grid = hd.get_volume_from_series(source)
    (mask_object,) = client.retrieve_series(series[0].study, find(series, "SEG").uid)
    (map_object,) = client.retrieve_series(series[0].study, find(series, "OT", "Anomaly map").uid)
    mask = hd.seg.Segmentation.from_dataset(mask_object).get_volume(combine_segments=True).match_geometry(grid)
    parametric = hd.Image.from_dataset(map_object).get_volume(apply_real_world_transform=True).match_geometry(grid)
    places = {tuple(np.round(image.ImagePositionPatient, 3)): image for image in source}
    positions = grid.map_indices_to_reference(np.array([[index, 0, 0] for index in range(grid.shape[0])]))
    ordered = [places[tuple(np.round(position, 3))] for position in positions]
    return Grids(ordered, mask.array > 0, parametric.array)


def find(series: Sequence[StoredSeries], modality: str, description: str = "") -> StoredSeries:
    """The series of ``modality`` whose description begins so.

    Raises:
        BundleError: if there is none.
    """
    for one in series:
        if one.modality == modality and one.description.startswith(description):
            return one
    raise BundleError(f"the study has no {modality} series '{description}': were the results stored?")


def draw(client: DICOMwebClient, series: Sequence[StoredSeries], caption: str) -> Figure:
    """The hottest slice: what the server renders, and what it keeps."""
    grids = fetch_grids(client, series)
    index = int(grids.heat.max((1, 2)).argmax())
    source = grids.source[index]
    overlay = find(series, "OT", "Anomaly overlay")
    at = next(one for one in overlay.instances if _position(one) == _rounded(source.ImagePositionPatient))
    plain = rendered(client, find(series, "MR"), source.SOPInstanceUID)
    fused = rendered(client, overlay, str(_value(at, "SOPInstanceUID")))

    down, right = map(float, source.PixelSpacing)
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    axes = figure.subplots(1, 4)
    axes[0].imshow(plain, cmap="gray", vmin=0, vmax=255)
    axes[1].imshow(plain, cmap="gray", vmin=0, vmax=255)
    if grids.mask[index].any():
        axes[1].contour(grids.mask[index], levels=[0.5], colors="cyan", linewidths=1)
    shown = axes[2].imshow(grids.heat[index], cmap=COLORMAP, vmin=0, vmax=1)
    axes[3].imshow(fused)
    for axis, name in zip(
        axes, ("MR, /rendered", "DICOM SEG, as an outline", "Parametric Map", "overlay series, /rendered"), strict=True
    ):
        axis.set(xticks=[], yticks=[], aspect=down / right)
        axis.set_title(name, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, location="bottom", fraction=0.03, aspect=60)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "0.25", "0.5: threshold", "0.75", "1"])
    bar.ax.axvline(0.5, color=np.array(OUTLINE) / 255)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("Parametric Map", fontsize=7)
    place = f"slice {int(source.InstanceNumber)} of {len(grids.source)}"
    figure.suptitle(f"{caption}, {place}", fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` to ``path``, at once."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format=path.suffix[1:] or "png")


def examine(server: Orthanc, study: str, checkpoint: Path, knobs: Sequence[str]) -> None:
    """Run ``scripts.integrations.dicomweb`` on a study, as a person would.

    Raises:
        BundleError: with its last line, if it fails.
    """
    command = [sys.executable, "-m", "scripts.integrations.dicomweb", "--url", server.dicomweb_url, "--study", study]
    words = ["--checkpoint", str(checkpoint), "--store", "true", *knobs]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BundleError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))


def show(server: Orthanc, client: DICOMwebClient, study: str, figure_file: Path | None) -> None:
    """Fetch what a viewer would fetch, print what came, and draw it to ``figure_file``."""
    series = fetch_series(client, study)
    patient = str(_value(series[0].instances[0], "PatientID"))
    print(f"study of {patient}")
    for one in series:
        sizes = {rendered(client, one, instance, frame).shape[:2] for instance, frame in one.frames()}
        frames = sum(1 for _ in one.frames())
        what = f"{frames} frames rendered, {sizes.pop()[::-1]}" if frames else "no frames to render"
        print(f"  {one.modality:4} {one.description:45} {len(one.instances):3} objects, {what}")
    if figure_file is not None:
        words = f"SYNTHETIC sample cohort, {patient}: fetched from Orthanc by DICOMweb"
        save(draw(client, series, words), figure_file)
        print(f"picture in {figure_file}")


def _value(item: dict, keyword: str) -> Any:
    """The first value of an attribute in DICOM JSON, None if it has none."""
    tag = DICOMwebClient.lookup_tag(keyword)
    return next(iter(item.get(tag, {}).get("Value", [])), None)


def _position(item: dict) -> tuple[float, ...]:
    return _rounded(item[DICOMwebClient.lookup_tag("ImagePositionPatient")]["Value"])


def _rounded(position: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 3) for value in position)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command; all others are knobs of ``configs/inference.json``."""
    parser = argparse.ArgumentParser(
        description="Store, examine and view SYNTHETIC studies in a real archive on this machine.",
        epilog="Further --NAME=VALUE are knobs of configs/inference.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model.pt of a training on volumes")
    parser.add_argument("--cohort", type=Path, default=ROOT / "sample_cohort", help="is made if it is missing")
    parser.add_argument("--subjects", type=int, default=2, help="how many of its test subjects (default: 2)")
    parser.add_argument("--picture", type=Path, help="where a picture of the first study goes (PNG)")
    parser.add_argument("--storage", type=Path, help="folder of the archive (default: temporary, removed at the end)")
    return parser


def main() -> None:
    """The whole way."""
    arguments, knobs = make_parser().parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that Orthanc ends too
    try:
        if not (arguments.cohort / "cohort.json").is_file():
            make_sample_cohort(arguments.cohort)
        with tempfile.TemporaryDirectory(prefix="orthanc-demo-") as workspace, running(arguments.storage) as server:
            series = make_sample_dicom(arguments.cohort, Path(workspace, "dicom"), split="test") / "test"
            for folder in sorted(series.iterdir())[: arguments.subjects]:
                server.store(folder)
            client = connect(server.dicomweb_url)
            studies = sorted(client.search_for_studies(), key=lambda item: str(_value(item, "PatientID")))
            print(f"Orthanc at {server.dicomweb_url} holds {len(studies)} studies")
            for number, item in enumerate(studies):
                study = str(_value(item, "StudyInstanceUID"))
                examine(server, study, arguments.checkpoint.resolve(), knobs)
                show(server, client, study, arguments.picture if number == 0 else None)
    except BundleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
