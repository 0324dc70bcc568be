"""Exported files: the same results at every size, what travels with them, and what is refused."""

import csv
import json
import math
import shutil
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from builders import PREPROCESSING, small_detector
from monai.data import MetaTensor
from PIL import Image
from test_commands import EVALUATE, INFER, ROOT, succeed
from torch.nn import functional as F

from bundle import compute, exports
from bundle.checkpoint import save_checkpoint
from bundle.errors import BundleError
from bundle.exports import check_parity, export_all, resize_by_matrices
from bundle.files import file_sha256
from bundle.inferers import SliceBatchInferer
from bundle.networks import FeatureNetwork
from bundle.networks.backbones import BACKBONES
from bundle.networks.neighbors import PlacedSlices
from bundle.samples import make_sample_cohort

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
load_exported = partial(exports.load_exported, trust_program=True)
FORMATS = {"torchscript": "model.ts", "onnx": "model.onnx", "openvino": "model.xml"}
ALONE = {"OMP_NUM_THREADS": "1"}  # thread pools of three runtimes beside each other slow one another down
SIZES = [(1, 64, 64), (3, 40, 90), (2, 150, 71)]
TINY_VIT = {"embed_dim": 64, "depth": 3, "num_heads": 4}


@pytest.fixture(autouse=True)
def _one_thread(_deterministic):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Detector, folder and table of an EfficientNet-Lite0, calibrated, and of a tiny ViT, not calibrated."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lite = small_detector(FeatureNetwork("efficientnet_lite0"), preprocessing=PREPROCESSING).eval()
    with torch.no_grad():
        healthy = [lite.embed(torch.rand(4, 1, 64, 64))]
    lite.set_standardization(torch.randn(healthy[0].shape[1]), torch.rand(healthy[0].shape[1]) + 0.5)
    lite.fit_before_training(healthy, healthy)
    lite.fit_after_training(healthy)
    lite.calibrate(healthy, volumes=[PlacedSlices([0, 1], [0.0, 5.0]), PlacedSlices([2, 3], [0.0, 5.0])])
    tiny = FeatureNetwork("dinov3_vits16", "random", layers=(0, 2), timm_kwargs=TINY_VIT)
    found = {}
    for name, detector in {"efficientnet_lite0": lite, "dinov3_vits16": small_detector(tiny).eval()}.items():
        folder = tmp_path_factory.mktemp(name)
        configs = {"configs": [ROOT / "configs/inference.json"], "metadata": ROOT / "configs/metadata.json"}
        found[name] = detector, folder, export_all(detector, folder, batch_size=2, **configs)
    return found


@pytest.fixture(scope="module")
def lite(exported):
    return exported["efficientnet_lite0"]


def refusal(function, *args, **kwargs):
    """The message of the error; it must be one line."""
    with pytest.raises(BundleError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# the same results


@pytest.mark.parametrize("old", [(64, 64), (17, 301), (500, 333), (40, 64)])
@pytest.mark.parametrize("new", [(64, 64), (320, 48)])
def test_matrices_resize_as_torch_does_with_antialias(old, new):
    image = torch.rand(2, 3, *old)
    expected = F.interpolate(image, new, mode="bilinear", antialias=True)
    torch.testing.assert_close(resize_by_matrices(image, new), expected, rtol=0, atol=2e-5)


def test_matrices_leave_an_image_of_the_right_size_as_it_is():
    image = torch.rand(1, 1, 48, 80)
    assert torch.equal(resize_by_matrices(image, (48, 80)), image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("batch", "height", "width"), SIZES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "dinov3_vits16"])
def test_every_format_gives_the_results_of_the_checkpoint(exported, backbone, name, batch, height, width, channels):
    detector, folder, _ = exported[backbone]
    image = torch.rand(batch, channels, height, width)
    with torch.inference_mode():
        expected = detector.detect(image)
        found = load_exported(folder / FORMATS[name]).detect(image)
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.shape == ours.shape
        assert float((theirs - ours).abs().max() / ours.abs().max()) < 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_other_precisions_are_near(lite, name):
    detector, folder, _ = lite
    image = torch.rand(2, 1, 64, 64)
    half = load_exported(folder / FORMATS[name], precision="bf16")
    with torch.inference_mode(), half.compute.autocast():
        found = half.detect(image)
    with torch.inference_mode():
        expected = detector.detect(image).patch_map
    assert found.patch_map.dtype == torch.float32
    assert float((found.patch_map - expected).abs().max() / expected.abs().max()) < 0.1


def test_the_table_says_speed_size_and_difference_of_each(lite):
    _, folder, rows = lite
    table = list(csv.DictReader((folder / "exports.csv").open()))
    assert [row["format"] for row in table] == ["pytorch", *FORMATS]
    assert all(float(row["milliseconds_per_image"]) > 0 for row in table)
    for row in table[1:]:
        written = [folder / row["file"], *folder.glob("*.bin" if row["format"] == "openvino" else "none")]
        assert float(row["megabytes"]) * 1e6 == pytest.approx(sum(file.stat().st_size for file in written))
        assert float(row["max_difference"]) < 1e-4
    assert all(name in exports.table(rows) for name in ("pytorch", *FORMATS))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_pools_the_slices_of_a_volume_as_the_checkpoint_does(lite, name):
    detector, folder, _ = lite
    affine = torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0]))
    volume = MetaTensor(torch.rand(1, 1, 64, 64, 3), affine=affine, meta={"slice_axis": 2})
    expected = SliceBatchInferer()(volume, detector)
    found = SliceBatchInferer()(volume, load_exported(folder / FORMATS[name]))
    for key in ("map", "slice_scores"):
        torch.testing.assert_close(found[key], expected[key], atol=1e-3, rtol=1e-3)
    alone = detector.detect(volume.as_tensor()[..., 1]).anomaly_map
    assert float((found["map"].as_tensor()[..., 1] - alone).abs().max()) > 0.01


def test_random_weights_are_named_in_the_table(exported):
    assert "RANDOM WEIGHTS" in exports.table(exported["dinov3_vits16"][2])
    assert "RANDOM WEIGHTS" in (exported["dinov3_vits16"][1] / "exports.csv").read_text()


def test_nothing_but_the_files_is_left(lite):
    names = {path.name for path in lite[1].iterdir()}
    assert names == {*FORMATS.values(), "model.bin", "exports.csv"}


# what travels


@pytest.mark.parametrize("name", FORMATS)
def test_identity_threshold_and_resize_are_those_of_the_checkpoint(lite, name):
    detector, folder, _ = lite
    found = load_exported(folder / FORMATS[name], given=PREPROCESSING)
    assert found.describe() == detector.describe()
    assert math.isfinite(float(found.threshold))
    assert float(found.threshold) == float(detector.threshold)
    image = torch.rand(1, 1, 90, 50)
    assert torch.equal(found.resize(image), detector.resize(image))
    torch.testing.assert_close(found(image), detector(image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_an_infinite_threshold_travels(exported, name):
    assert float(load_exported(exported["dinov3_vits16"][1] / FORMATS[name]).threshold) == math.inf


def test_torchscript_holds_the_configs_as_of_ckpt_export(lite):
    extra = {"inference.json": "", "metadata.json": ""}
    torch.jit.load(str(lite[1] / "model.ts"), _extra_files=extra)
    assert "preprocessing" in json.loads(extra["inference.json"])
    assert "network_data_format" in json.loads(extra["metadata.json"])


def test_all_in_torchscript_lies_under_the_name_of_its_file_where_monai_deploy_looks(lite):
    with zipfile.ZipFile(lite[1] / "model.ts") as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"model"}
    assert "model/extra/inference.json" in names


@pytest.mark.parametrize("file", ["model.onnx", "model.xml"])
def test_no_path_of_this_machine_travels(lite, file):
    assert b"site-packages" not in (lite[1] / file).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_runs_in_the_precision_that_its_backbone_bears(exported, name, monkeypatch):
    monkeypatch.setattr(compute, "fastest_precision", lambda device: "bf16")
    for backbone, (_, folder, _) in exported.items():
        found = load_exported(folder / FORMATS[name], precision="auto").compute.precision
        assert (found == "bf16") == BACKBONES[backbone].keeps_bf16


# what is refused


@pytest.mark.parametrize("name", FORMATS)
def test_other_preprocessing_is_refused(lite, name):
    message = refusal(load_exported, lite[1] / FORMATS[name], given={"slice_plane": "coronal"})
    assert "slice_plane 'acquired', not 'coronal'" in message


def test_raw_scores_and_odd_channels_are_refused(lite):
    found = load_exported(lite[1] / "model.onnx")
    assert "use the checkpoint" in refusal(found.detect, torch.rand(1, 1, 64, 64), raw=True)
    assert "1 or 3 channels" in refusal(found.detect, torch.rand(1, 2, 64, 64))


@pytest.mark.parametrize("name", [*FORMATS.values(), "model.pt", "model"])
def test_a_missing_file_or_unknown_suffix_is_named(tmp_path, name):
    message = refusal(load_exported, tmp_path / name)
    assert str(tmp_path / name) in message
    assert ("must end in" in message) == (name not in FORMATS.values())


@pytest.mark.parametrize("name", FORMATS.values())
def test_a_damaged_file_is_refused(lite, tmp_path, name):
    for file in lite[1].glob("model.*"):
        shutil.copy(file, tmp_path)
    damaged = tmp_path / name.replace(".xml", ".bin")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert f"'{tmp_path / name}' is no exported detector" in refusal(load_exported, tmp_path / name)


@pytest.mark.slow
def test_a_file_of_another_make_is_refused(tmp_path):
    other = torch.nn.Conv2d(1, 1, 1).eval()
    torch.jit.save(torch.jit.script(other), str(tmp_path / "other.ts"))
    torch.onnx.export(other, (torch.rand(1, 1, 4, 4),), str(tmp_path / "other.onnx"), dynamo=True, verbose=False)
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.Core().read_model(tmp_path / "other.onnx"), tmp_path / "other.xml")
    for suffix in ("ts", "onnx", "xml"):
        assert "is no exported detector of this bundle" in refusal(load_exported, tmp_path / f"other.{suffix}")


# files as data, and as programs


class Writes(torch.nn.Module):
    """A program that makes a file when it is loaded."""

    def __init__(self, path):
        super().__init__()
        self.path: str = str(path)
        self.kept = torch.zeros(1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        self.kept = torch.from_file(self.path, True, 16, dtype=torch.uint8).fill_(65)


def hostile_program(folder, passport):
    """A TorchScript file that says of itself what ``passport`` does, and makes a file when it is loaded."""
    torch.jit.save(
        torch.jit.script(Writes(folder / "made")), folder / "model.ts", _extra_files={"passport.json": passport}
    )
    return folder / "model.ts"


def passport_of(file):
    with zipfile.ZipFile(file) as archive:
        return archive.read("model/extra/passport.json").decode()


def test_a_program_is_not_loaded_without_consent(lite, tmp_path):
    file = hostile_program(tmp_path, passport_of(lite[1] / "model.ts"))
    message = refusal(exports.load_exported, file)
    assert "is a program" in message and "ONNX or OpenVINO" in message and "--trust_program true" in message
    assert not (tmp_path / "made").exists()
    torch.jit.load(file)
    assert (tmp_path / "made").exists()


def test_a_passport_is_checked_before_its_program_is_loaded(lite, tmp_path):
    passport = json.loads(passport_of(lite[1] / "model.ts"))
    entries = {**json.loads(passport["identity"]), "mode": "$print(1)"}
    for wrong in ({"identity": json.dumps(entries)}, {"threshold": "nan"}, {"slice_pooling": '{"length": NaN}'}):
        message = refusal(load_exported, hostile_program(tmp_path, json.dumps(passport | wrong)))
        assert "is no exported detector" in message
    assert "no passport" in refusal(load_exported, hostile_program(tmp_path, "x" * 2**21))
    assert not (tmp_path / "made").exists()


def test_a_program_whose_hash_is_given_runs_and_no_other(lite):
    file = lite[1] / "model.ts"
    digest = file_sha256(file)
    assert exports.load_exported(file, exported_sha256=digest.upper()).threshold == lite[0].threshold
    assert "exported_sha256 is '00'" in refusal(exports.load_exported, file, exported_sha256="00")


def test_a_hash_is_checked_of_every_format(lite):
    assert "exported_sha256" in refusal(load_exported, lite[1] / "model.onnx", exported_sha256="0" * 64)


@pytest.fixture
def graph(lite):
    onnx = pytest.importorskip("onnx")
    return onnx.load(lite[1] / "model.onnx")


@pytest.mark.parametrize(
    "entries",
    [{"mode": "$print(1)"}, {"mode": "nonsense"}, {"weights": "a\nerror: forged"}, {"unknown": 1}, {"tiles": -5}],
)
def test_an_identity_in_a_graph_is_checked(graph, tmp_path, entries):
    for one in graph.metadata_props:
        if one.key == "identity":
            one.value = json.dumps({**json.loads(one.value), **entries})
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    assert next(iter(entries)) in refusal(load_exported, tmp_path / "model.onnx")


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_threshold_in_a_graph_is_a_number(graph, tmp_path, value):
    for one in graph.metadata_props:
        if one.key == "threshold":
            one.value = value
    (tmp_path / "model.onnx").write_bytes(graph.SerializeToString())
    assert f"its threshold is {value}" in refusal(load_exported, tmp_path / "model.onnx")


@pytest.mark.parametrize("place", ["../outside.bin", "{}/outside.bin", "link.bin"])
def test_weights_of_a_graph_lie_in_its_folder(graph, tmp_path, place):
    """onnxruntime sees to it."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = max(graph.graph.initializer, key=lambda one: len(one.raw_data))
    (tmp_path / "outside.bin").write_bytes(weights.raw_data)
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    weights.ClearField("raw_data")
    weights.data_location = weights.EXTERNAL
    weights.external_data.add(key="location", value=place.format(tmp_path))
    (folder / "model.onnx").write_bytes(graph.SerializeToString())
    assert "xternal data" in refusal(load_exported, folder / "model.onnx")


def test_a_missing_package_is_named(lite, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert 'pip install -e ".[export]"' in refusal(load_exported, lite[1] / "model.onnx")


def test_a_misspelled_format_is_refused(detector, tmp_path):
    assert "did you mean 'openvino'" in refusal(export_all, detector, tmp_path, "openvin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_differs_leaves_no_file_and_keeps_an_older_one(lite, detector, tmp_path, monkeypatch, name):
    def wrong(detector, path, *_):
        for file in lite[1].glob("model.*"):
            shutil.copy(file, path.parent)

    monkeypatch.setattr(exports, f"export_{name}", wrong)
    (tmp_path / FORMATS[name]).write_text("older")
    assert f"{name} differs from the checkpoint" in refusal(export_all, detector, tmp_path, name, 2)
    assert [path.name for path in tmp_path.iterdir()] == [FORMATS[name]]
    assert (tmp_path / FORMATS[name]).read_text() == "older"


def test_an_interrupted_export_leaves_no_file(detector, tmp_path, monkeypatch):
    def half(scripted, stream, *_):
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "save_net_with_metadata", half)
    with pytest.raises(KeyboardInterrupt):
        export_all(detector, tmp_path, "torchscript", 1)
    assert not list(tmp_path.iterdir())


def test_parity_refuses_another_detector_and_what_is_not_a_number(lite, features):
    other = small_detector(features).eval()
    found = load_exported(lite[1] / "model.ts")
    assert "differs" in refusal(check_parity, other, found, "torchscript")
    with torch.no_grad():
        other.patch_score.healthy_mean.fill_(torch.nan)
    assert "differs by nan" in refusal(check_parity, other, found).replace("from the checkpoint ", "")


# the commands


@pytest.fixture(scope="module")
def commanded(lite, tmp_path_factory):
    """The export command on a checkpoint, a cohort to run on, and the knobs of the detector."""
    folder = tmp_path_factory.mktemp("commanded")
    cohort = make_sample_cohort(
        folder / "sample_cohort", train_subjects=2, valid_subjects=2, test_subjects=2, slices_per_subject=3
    )
    save_checkpoint(lite[0], folder / "model.pt")
    knobs = {"device": "cpu"}
    config = "['configs/inference.json','configs/export.json']"
    done = succeed("exporting", config, env=ALONE, output_dir=folder, checkpoint=folder / "model.pt", **knobs)
    return folder, cohort, knobs, done


def maps(folder):
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.rglob("*_map.tiff")}


def test_one_command_makes_every_format_and_the_table(commanded):
    folder, _, _, done = commanded
    assert {*FORMATS.values(), "model.bin", "exports.csv"} <= {path.name for path in folder.iterdir()}
    assert all(name in done.stdout for name in ("pytorch", *FORMATS))


def test_inference_with_a_file_gives_the_maps_of_the_checkpoint_and_needs_no_weights(commanded, tmp_path):
    folder, cohort, knobs, _ = commanded
    data = {"dataset_dir": cohort / "slices/test/Ungood/img", "precision": "fp32", "tracking_uri": "off"}
    succeed("inferring", INFER, env=ALONE, output_dir=tmp_path / "own", checkpoint=folder / "model.pt", **data, **knobs)
    config = "['configs/inference.json','configs/exported.json']"
    file = folder / "model.onnx"
    succeed(
        "inferring",
        config,
        env=ALONE,
        output_dir=tmp_path / "onnx",
        exported=file,
        device="cpu",
        **data,
    )
    expected, found = maps(tmp_path / "own"), maps(tmp_path / "onnx")
    assert expected.keys() == found.keys() != set()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-3 * np.abs(values).max())


def test_evaluation_runs_on_a_file(commanded, tmp_path):
    folder, cohort, _, _ = commanded
    config = EVALUATE.replace("]", ",'configs/exported.json']")
    data = {"dataset_dir": cohort / "slices", "tracking_uri": "off", "device": "cpu"}
    succeed("evaluating", config, env=ALONE, output_dir=tmp_path, exported=folder / "model.xml", **data)
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["pixel_auroc"] <= 1
