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
from bundle.checkpoint import save_checkpoint
from bundle.command_line import read_config
from bundle.model import make_detector
from bundle.samples import make_sample_cohort

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


NESTED = {f"model::{name}": value for name, value in SMALL.items()}  # as MONAI's own commands take settings


def test_the_network_of_training_takes_and_gives_what_metadata_say():
    verify_net_in_out(
        net_id="network_def",
        meta_file="configs/metadata.json",
        config_file="configs/train.json",
        device="cpu",
        n=3,
        **NESTED,
    )


def test_the_network_of_inference_follows_the_checkpoint_and_the_metadata(tmp_path):
    save_checkpoint(make_detector(SMALL), tmp_path / "model.pt")
    verify_net_in_out(
        net_id="network_def",
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        device="cpu",
        n=3,
        checkpoint=str(tmp_path / "model.pt"),
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
        checkpoint=str(tmp_path / "model.pt"),
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
    save_checkpoint(make_detector(SMALL), tmp_path / "model.pt")
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
    base = read_config("configs/train.json")
    overlay = json.loads((ROOT / "configs/paper.json").read_text())
    flat = overlay | {f"model::{name}": value for name, value in overlay.pop("+model").items()}
    parser = ConfigParser(base)
    same = {name for name, value in flat.items() if parser[name] == value}
    # the paper's recipe is spelled out in full, defaults of ours may move; nothing else may repeat a default
    assert same <= {"learning_rate", "noise_probability", "noise_scale", "mask_rule", "model::image_score"}


def test_every_shared_item_of_training_is_said_once():
    train = json.loads((ROOT / "configs/train.json").read_text())
    shared = json.loads((ROOT / "configs/inference.json").read_text())
    # what they run, on which cases, and where the settings of the model come from
    for key in train.keys() & shared.keys() - {"run", "tracker", "model", "settings", "initialize"}:
        assert train[key] == f"%configs/inference.json::{key}"
    # one by one, since MONAI runs each step of the list by itself
    steps = [f"%configs/inference.json::initialize::{step}" for step in range(len(shared["initialize"]))]
    assert train["initialize"][:-1] == steps


def test_nothing_is_read_from_the_network_or_written_on_import():
    code = [path.read_text() for path in (ROOT / "bundle").rglob("*.py")]
    assert not [
        line
        for text in code
        for line in text.splitlines()
        if re.match(r"import (mlflow|timm|itk)|from (mlflow|timm) ", line)
    ]
