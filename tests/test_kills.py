"""A handful of kills at random moments; `tests/kills.py` does as many as one likes."""

import os
import subprocess
import sys

import pytest
from commands import ROOT, environment

KILLS = int(os.environ.get("KILLS", "8"))


@pytest.mark.slow
def test_commands_that_are_killed_and_run_again_end_as_if_they_had_not_been(tmp_path):
    words = [f"--kills={KILLS}", "--seed=17", f"--out={tmp_path / 'kills'}"]
    done = subprocess.run(
        [sys.executable, "tests/kills.py", *words],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{KILLS} runs" in done.stdout
