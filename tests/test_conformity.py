"""The bundle keeps the contract of MONAI's model zoo."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from builders import PREPROCESSING, small_detector
from monai.bundle import ConfigParser, ckpt_export, create_workflow, verify_metadata, verify_net_in_out

from bundle import __version__
from bundle.command_line import check_knobs
from bundle.errors import BundleError
from bundle.samples import make_sample_cohort
from bundle.training import save_checkpoint

ROOT = Path(__file__).parents[1]
SMALL = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample_cohort"
    return make_sample_cohort(folder, train_subjects=2, valid_subjects=2, test_subjects=2, slices_per_subject=3)


def test_metadata_follows_the_schema(tmp_path):
    shutil.copy(ROOT / "tests/data/metadata_schema.json", tmp_path / "schema.json")
    verify_metadata(meta_file="configs/metadata.json", filepath=str(tmp_path / "schema.json"))


def test_the_schema_refuses_metadata_without_network_format(tmp_path):
    shutil.copy(ROOT / "tests/data/metadata_schema.json", tmp_path / "schema.json")
    metadata = json.loads((ROOT / "configs/metadata.json").read_text())
    del metadata["network_data_format"]["inputs"]["image"]["dtype"]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(tmp_path / "schema.json"))


def test_metadata_has_the_version_of_the_package():
    metadata = json.loads((ROOT / "configs/metadata.json").read_text())
    assert metadata["version"] == __version__
    assert __version__ in metadata["changelog"]


def test_no_metadata_name_makes_a_box_detector_of_the_bundle():
    """MONAI Label takes a bundle with this word in its name for one."""
    assert "detection" not in json.loads((ROOT / "configs/metadata.json").read_text())["name"].lower()


@pytest.mark.parametrize("config", ["configs/train.json", "configs/inference.json"])
def test_the_network_takes_and_gives_what_metadata_say(config):
    verify_net_in_out(
        net_id="network_def", meta_file="configs/metadata.json", config_file=config, device="cpu", n=3, **SMALL
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_a_checkpoint_exports_to_torchscript(features, tmp_path):
    detector = small_detector(features, preprocessing=PREPROCESSING)
    save_checkpoint(detector, tmp_path / "model.pt")
    ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        **SMALL,
    )
    image = torch.rand(1, 1, 50, 70)
    extra = {"inference.json": ""}
    exported = torch.jit.load(str(tmp_path / "model.ts"), _extra_files=extra)
    torch.testing.assert_close(exported(image), detector(image))
    assert "preprocessing" in json.loads(extra["inference.json"])


WORKFLOWS = {
    "train": ("configs/train.json", "train"),
    "evaluate": (["configs/train.json", "configs/evaluate.json"], "infer"),
    "inference": ("configs/inference.json", "infer"),
    "paper": (["configs/train.json", "configs/paper.json"], "train"),
    "multi_gpu_train": (["configs/train.json", "configs/multi_gpu_train.json"], "train"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_config_has_the_properties_of_its_workflow(name, cohort, tmp_path, monkeypatch):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29876"}
    for key, value in alone.items() if name == "multi_gpu_train" else ():
        monkeypatch.setenv(key, value)
    files, kind = WORKFLOWS[name]
    workflow = create_workflow(
        config_file=files,
        workflow_type=kind,
        dataset_dir=str(cohort / "slices"),
        output_dir=str(tmp_path),
        **SMALL,
    )
    assert workflow.check_properties() == []
    workflow.finalize()


def test_overlays_hold_only_what_differs():
    base = ConfigParser.load_config_files("configs/train.json")
    base_values = ConfigParser(ConfigParser.load_config_files("configs/train.json"))
    base_values.parse()
    overlay = json.loads((ROOT / "configs/paper.json").read_text())
    same = {key for key, value in overlay.items() if base_values[key] == value}
    assert set(overlay) <= set(base)
    # the paper's recipe is spelled out in full, defaults of ours may move; nothing else may repeat a default
    assert same <= {"mode", "kernel_size", "learning_rate", "noise_probability", "noise_scale", "mask_rule"}


def test_every_shared_item_of_training_is_said_once():
    train = json.loads((ROOT / "configs/train.json").read_text())
    shared = json.loads((ROOT / "configs/inference.json").read_text())
    for key in train.keys() & shared.keys() - {"run", "tracker"}:  # what they run, and on which cases
        assert train[key] == f"%configs/inference.json::{key}"


def test_a_misspelt_knob_is_refused_and_a_nested_one_is_not():
    config = json.loads((ROOT / "configs/train.json").read_text())
    check_knobs({"train::trainer::max_epochs": 3, "config_file": "x", "tracking": "mlflow", "device": "cpu"}, config)
    with pytest.raises(BundleError, match="did you mean 'batch_size'"):
        check_knobs({"batchsize": 3}, config)


def test_nothing_is_read_from_the_network_or_written_on_import():
    code = [path.read_text() for path in (ROOT / "bundle").rglob("*.py")]
    assert not [
        line
        for text in code
        for line in text.splitlines()
        if re.match(r"import (mlflow|timm|itk)|from (mlflow|timm) ", line)
    ]
