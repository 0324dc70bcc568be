"""The bundle's commands as a user types them, and what tests ask of their output."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IS_CLONE = (ROOT / ".git").exists() and shutil.which("git") is not None  # of which git can list the files
TRAIN = "configs/train.json"
EVALUATE = "['configs/train.json','configs/evaluate.json']"
INFER = "configs/inference.json"
OF_THIS_MACHINE = ("MLFLOW_TRACKING_URI", "BACKBONE_WEIGHTS", "DINOV3_WEIGHTS")
QUICK = {"backbone": "efficientnet_lite0", "image_size": 176, "hidden_channels": 64, "max_epochs": 8, "device": "cpu"}


def command(run_id, config, launcher=(), words=(), **knobs):
    words = [*words, *(f"--{name}={value}" for name, value in knobs.items())]
    python = [sys.executable, *launcher, "-m", "monai.bundle", "run", run_id, "--config_file", config]
    return [*python, *words]


def environment(**extra):
    clean = {k: v for k, v in os.environ.items() if k not in OF_THIS_MACHINE}
    return {**clean, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **extra}


def run(run_id, config, cwd=ROOT, env=None, launcher=(), words=(), **knobs):
    return subprocess.run(
        command(run_id, config, launcher, words, **knobs),
        cwd=cwd,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def succeed(*args, **kwargs):
    done = run(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def error_line(done):
    """The one line that the command ends with."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-3000:]
    return lines[0]
