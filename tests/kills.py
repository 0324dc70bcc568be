"""Commands that are killed at random moments, MLflow on, and run again: the end must be that of an undisturbed run.

``PYTHONPATH=. python tests/kills.py --kills 50 --out FOLDER`` does that so many times, and prints a line for each.
Commands run in copies of one process, which has imported everything: a kill costs no start.
"""

import argparse
import atexit
import importlib
import os
import random
import runpy
import shutil
import signal
import sqlite3
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN, INFER = "configs/train.json", "configs/inference.json"
QUICK = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 16, "max_epochs": 3, "patience": 0}
EXPORTS = ("onnx", "openvino", "torchscript")
IMPORTED = (
    *("highdicom", "monai.bundle", "mlflow.store.tracking.sqlalchemy_store", "openvino", "onnxruntime", "onnxscript"),
    *(
        "bundle.dicom.objects",
        "bundle.evaluation",
        "bundle.exports",
        "bundle.outputs",
        "bundle.report.copying",
        "bundle.training",
    ),
)
COMMANDS = ("training", "training", "evaluating", "inferring", "dicom", *EXPORTS)  # training is many stages


def forked(work):
    """The id of a process that does ``work``, a copy of this one."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def killed_in(work, after=0.0, once=None, limit=120.0):
    """Do ``work`` in a copy of this process, and kill that ``after`` so many seconds.

    Args:
        work: without arguments.
        after: seconds.
        once: what must be true before the time begins to count.
        limit: seconds to wait for that.

    Returns:
        Whether it was at work until then.
    """
    child = forked(work)
    deadline = time.monotonic() + limit
    while once is not None and not once() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def ended(child):
    """The exit status of a process, at its end."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def bundle_command(log, run_id, config, **knobs):
    """What does in this process what ``python -m monai.bundle run`` does in one of its own."""

    def work():
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(ROOT)
        words = [f"--{name}={value}" for name, value in knobs.items()]
        sys.argv = ["monai/bundle/__main__.py", "run", run_id, "--config_file", config, *words]
        status = 0
        try:
            runpy.run_module("monai.bundle", run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    return work


def command(name, place, output, log=None):
    """The command ``name`` of :data:`COMMANDS` on the data in ``place``, which writes into ``output``."""
    log = log or output.with_suffix(".log")
    data, model = place / "cohort/slices", place / "whole/training/model.pt"
    known = {"checkpoint": model, "device": "cpu", "output_dir": output}
    if name == "training":
        return bundle_command(log, name, TRAIN, dataset_dir=data, output_dir=output, device="cpu", **QUICK)
    if name == "evaluating":
        return bundle_command(log, name, f"['{TRAIN}','configs/evaluate.json']", dataset_dir=data, **known)
    if name == "inferring":
        return bundle_command(log, name, INFER, dataset_dir=data / "test", **known)
    if name == "dicom":
        return bundle_command(log, "inferring", INFER, dataset_dir=place / "dicom", write_dicom="true", **known)
    return bundle_command(log, "exporting", f"['{INFER}','configs/export.json']", formats=name, batch_size=1, **known)


def content(path):
    """What is in a file of results, as far as two runs must agree."""
    import nibabel as nib
    import numpy as np
    import torch
    from PIL import Image
    from pydicom import dcmread

    if path.name == "exports.csv":  # times
        return path.read_text().count("\n")
    if path.name.endswith("_report.html"):  # made at other times, in other places
        from bundle.report.copying import read_report

        record, pictures = read_report(path)
        return {name: record[name] for name in record.keys() - {"made", "settings", "facts"}}, pictures
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        return {key: (value.dtype, value.numpy().tobytes()) for key, value in state.items()}
    if path.suffix in (".png", ".tiff"):
        return np.asarray(Image.open(path)).tobytes()
    if path.name.endswith(".nii.gz"):
        return np.asanyarray(nib.load(path).dataobj).tobytes()
    if path.suffix == ".dcm":  # other identifiers, other times
        data = dcmread(path)
        return data.SOPClassUID, data.get("PixelData"), data.get("FloatPixelData"), len(data.dir())
    if path.suffix == ".ts":
        return torch.jit.load(path).state_dict().keys()
    return path.read_bytes().replace(b"\r", b"")


def differences(output, whole):
    """What sets the results in ``output`` apart from those of an undisturbed run, in words."""
    ours, theirs = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and not is_about_runs(path, folder)}
        for folder in (output, whole)
    )
    found = [f"{path} is in one of both" for path in ours ^ theirs]
    found += [f"{path} differs" for path in ours & theirs if content(output / path) != content(whole / path)]
    return [*found, *run_faults(output)]


def is_about_runs(path, folder):
    """Whether a file is MLflow's, or of the cache, whose shards follow from how far a run came."""
    return path.relative_to(folder).parts[0] in ("mlruns", "mlflow.db", "feature_cache") and ".partial" not in str(path)


def run_faults(output):
    """What is wrong with the runs in MLflow: the last one must be finished, and none may seem to be at work."""
    if not (output / "mlflow.db").exists():
        return []
    with sqlite3.connect(output / "mlflow.db") as connection:
        states = [state for (state,) in connection.execute("select status from runs order by start_time")]
    return [] if states[-1] == "FINISHED" and "RUNNING" not in states else [f"MLflow's runs are {states}"]


def prepare(place):
    """Make data in ``place``."""

    def make():
        from bundle.samples import make_sample_cohort
        from scripts.samples.dicom import make_sample_dicom

        cohort = make_sample_cohort(
            place / "cohort", train_subjects=4, valid_subjects=2, test_subjects=2, slices_per_subject=4
        )
        make_sample_dicom(cohort, place / "all", split="test")
        shutil.copytree(min(path for path in (place / "all").rglob("sub-*") if path.is_dir()), place / "dicom")

    if ended(forked(make)):
        raise RuntimeError("no data")


def run_undisturbed(name, place):
    """Run a command to its end; returns the seconds that it takes."""
    output = place / "whole" / name
    output.mkdir(parents=True)
    begin = time.monotonic()
    if ended(forked(command(name, place, output))):
        raise RuntimeError(output.with_suffix(".log").read_text())
    return time.monotonic() - begin


def kill_once(number, name, place, moment, runs_before):
    """Kill a command at a moment of its time, run it again, and tell what differs, and what its last line was.

    Args:
        number: of the kill.
        name: of the command.
        place: see :func:`prepare`.
        moment: seconds.
        runs_before: begin in a folder with an MLflow database.
    """
    output = place / f"{number}-{name}"
    output.mkdir()
    database = place / "whole" / name / "mlflow.db"
    if runs_before and database.exists():
        shutil.copy(database, output / "mlflow.db")
    work = command(name, place, output)
    was_killed = killed_in(work, moment)
    log = output.with_suffix(".log")
    lines = (log.read_text().replace("\r", "\n").strip() if log.exists() else "").splitlines()
    status = ended(forked(work))
    found = (
        [f"exit status {status}: {log.read_text()[-500:]}"] if status else differences(output, place / "whole" / name)
    )
    if not found:
        shutil.rmtree(output)
    return was_killed, found, lines[-1][:70] if lines else ""


def main():
    """Kill as often as wanted; exit status 1 if any end differed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--commands", nargs="+", choices=COMMANDS, default=COMMANDS, help="training is always the first"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other kill begins")
    chosen = parser.parse_args()
    place = chosen.out.resolve()
    place.mkdir(parents=True)
    warm_up()
    begin = time.monotonic()
    prepare(place)
    seconds = {"training": run_undisturbed("training", place)}  # others take its model
    chance = random.Random(chosen.seed)
    done = killed = wrong = 0
    for number in range(chosen.kills):
        if time.monotonic() - begin > chosen.seconds:
            break
        name = chosen.commands[number % len(chosen.commands)]
        if name not in seconds:
            seconds[name] = run_undisturbed(name, place)
        moment = chance.uniform(0, seconds[name])
        was_killed, found, line = kill_once(number, name, place, moment, runs_before=chance.random() < 0.5)
        if not was_killed:
            seconds[name] = moment  # it takes less than that: the next kill comes earlier
        done, killed, wrong = done + 1, killed + was_killed, wrong + bool(found)
        print(f"{number} {name} {moment:.2f} s {was_killed} {found or 'as undisturbed'} [{line}]", flush=True)
    print(f"{done} runs, {killed} killed at work, {wrong} with another end")
    return int(wrong > 0)


def warm_up():
    """Import what commands import; nothing is computed, so that no threads are there to be lost by a fork."""
    import torch

    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
