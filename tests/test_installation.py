"""``pip install .`` gives one package that is a bundle of its own, and leaves the names of others alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from builders import PREPROCESSING, small_detector
from commands import ROOT, environment, error_line
from monai.bundle import ConfigParser
from PIL import Image

from bundle import __version__
from bundle.checkpoint import save_checkpoint
from scripts.launcher.bundle_command import copy_configs, main, with_configs


def pip(*words):
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "docs").mkdir()
    for name in ("knobs.md", "backbones.md"):
        shutil.copy(ROOT / "docs" / name, source / "docs")
    for name in ("bundle", "configs", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", target, source)
    (file,) = target.iterdir()
    return file


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Runs ``python -m dinov3_spatial_ar`` of an installed copy, from an empty folder with two pictures."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    pip("install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    (folder / "images").mkdir()
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 256, (48, 48), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")

    def run(*words, program=(sys.executable, "-m", "dinov3_spatial_ar")):
        command = [*map(str, program), *map(str, words)]
        env = environment(PYTHONPATH=str(site), PYTHONDONTWRITEBYTECODE="1")
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)

    return run, folder, site


def modules(folder):
    return {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")}


@pytest.mark.slow
def test_the_wheel_holds_the_whole_bundle_in_one_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {
        "dinov3_spatial_ar",
        f"dinov3_spatial_ar-{__version__}.dist-info",
    }
    others = {f"configs/{file.name}" for file in (ROOT / "configs").iterdir() if file.is_file()} | {
        "docs/knobs.md",
        "docs/backbones.md",
    }
    assert {f"dinov3_spatial_ar/{name}" for name in modules("bundle") | others} <= names


@pytest.mark.slow
def test_an_installed_copy_infers_from_any_folder(installed, features):
    run, folder, site = installed
    before = sorted(site.rglob("*"))
    save_checkpoint(small_detector(features, preprocessing=PREPROCESSING), folder / "model.pt")
    knobs = {"image_size": 64, "hidden_channels": 8, "backbone": "efficientnet_lite0", "device": "cpu"}
    words = [f"--{name}={value}" for name, value in knobs.items()]
    done = run(
        *("run", "inferring", "--config_file", "inference.json"),
        *("--dataset_dir", "images", "--checkpoint", "model.pt", *words),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"a_map.tiff", "b_map.tiff", "scores.csv"} <= set(os.listdir(folder / "output"))
    assert sorted(site.rglob("*")) == before  # nothing is written where packages are


@pytest.mark.slow
def test_the_console_command_of_an_installed_copy_examines_a_folder(installed, features):
    run, folder, site = installed
    save_checkpoint(small_detector(features, preprocessing=PREPROCESSING), folder / "model.pt")
    done = run(
        "examine", "images", "-o", "examined", "--model", "model.pt", program=[site / "bin" / "dinov3_spatial_ar"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"a_map.tiff", "b_map.tiff", "scores.csv"} <= set(os.listdir(folder / "examined"))
    assert "mlflow.db" not in os.listdir(folder / "examined")


@pytest.mark.slow
def test_an_installed_copy_resolves_what_its_configs_take_from_each_other(installed):
    run, *_ = installed
    done = run("run", "training", "--config_file", "['train.json','paper.json']", "--learning_rat", "0.1")
    assert error_line(done).startswith("error: knob --learning_rat is unknown: did you mean 'learning_rate'?")


def test_names_of_configs_become_paths_alone_and_in_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = copy_configs(ROOT / "configs", tmp_path / "copy")
    (tmp_path / "mine.json").write_text("{}")
    root = f"--bundle_root={ROOT}"
    train, paper = configs / "train.json", configs / "paper.json"
    assert with_configs(["run", "--config_file", "train.json", "--seed", "1"], configs) == [
        *("run", "--config_file", str(train), "--seed", "1", root)
    ]
    assert with_configs(["run", "--config_file=['configs/train.json','paper.json','mine.json']"], configs) == [
        *("run", f"--config_file=['{train}', '{paper}', 'mine.json']", root)
    ]
    assert with_configs(["run", "--bundle_root=.", "--config_file=train.json"], configs) == [
        *("run", "--bundle_root=.", f"--config_file={train}")
    ]
    assert with_configs(["download", "--name", "train.json"], configs) == ["download", "--name", "train.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config_file=train.json", "--args_file", "none.json"], "error: no file at 'none.json': check --args_file"),
        (["--config_file", "['train.json','gone.json']"], "error: no file at 'gone.json': check --config_file"),
    ],
)
def test_a_missing_file_of_the_command_line_is_one_line(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["dinov3_spatial_ar"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        main(["run", "training", *words])
    assert caught.value.code == message


def test_copied_configs_put_data_and_results_into_the_working_folder(tmp_path, monkeypatch):
    configs = copy_configs(ROOT / "configs", tmp_path)
    monkeypatch.chdir(tmp_path)
    parser = ConfigParser(ConfigParser.load_config_file(configs / "train.json") | {"bundle_root": "/elsewhere"})
    folders = {name: Path(parser.get_parsed_content(name)) for name in ("dataset_dir", "output_dir", "cohort_dir")}
    assert folders == {
        "dataset_dir": Path("sample_cohort/slices"),
        "output_dir": Path("output"),
        "cohort_dir": Path("sample_cohort"),
    }
