"""Start a MONAI Label server on this bundle, for a folder of volumes or a DICOMweb server: see docs/monai_label.md."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests
from monai.bundle import ConfigParser

from bundle import NAME
from bundle.checkpoint import load_checkpoint, trained_settings
from bundle.command_line import given_texts, read_config, read_knobs
from bundle.errors import BundleError, OneLine
from bundle.files import FLAT_SUFFIXES, NIFTI_SUFFIXES, content_key, whole_file
from bundle.model import known_settings, make_detector, settings_in
from bundle.networks.weights import FOLDER_VARIABLES
from scripts.integrations.environments import default_base, environment

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
HOST = "127.0.0.1"
OURS = {"bundle_root", "dataset_dir", "output_dir", "checkpoint", "tracking_uri"}  # knobs that are not the user's here
SERVER = "local_server"  # the module of server.py in the app
STARTUP_SECONDS = 300
SHUTDOWN_SECONDS = 10


def assemble(apps: Path, checkpoint: Path | None, given: Mapping[str, str], verbose: bool = False) -> Path:
    """Write the app: MONAI Label's side as ``main.py``, a copy of this bundle in ``model/``, and the model.

    Inference follows the model, and so does training: its settings become those of ``configs/train.json``. What
    training has written there stays.

    Args:
        apps: the folder of the app.
        checkpoint: becomes ``models/model.pt``; None: the one that is there.
        given: knobs of the bundle, as a command line has them.
        verbose: log requests, which have names of images in them.

    Returns:
        The folder of the copy.

    Raises:
        BundleError: if a knob is unknown or of another type, the checkpoint is missing or does not fit, or another one
            was trained there.
    """
    copy = apps / "model" / NAME
    inference, training = ConfigParser(), ConfigParser()
    inference.read_config([str(ROOT / f"configs/{name}.json") for name in ("inference", "monai_label")])
    training.read_config(str(ROOT / "configs/train.json"))
    knobs = read_knobs(given, {**read_config(str(ROOT / "configs/train.json")), **inference.get(), "model": {}})
    for name in knobs.keys() & OURS:
        raise BundleError(f"knob {name} is set by this command: leave it out")
    if knobs.get("weights") not in (None, "random"):
        knobs["weights"] = os.path.abspath(knobs["weights"])
    knobs = {name.removeprefix("model::"): value for name, value in knobs.items()}
    settings = {name: knobs.pop(name) for name in knobs.keys() & known_settings().keys()}
    training["model"] = place_checkpoint(copy, checkpoint, settings, knobs.get("weights"))
    inference["model"] = settings
    for name, value in knobs.items():
        (inference if name.split("::")[0] in inference else training)[name] = value
    for part in ("bundle", "configs"):
        shutil.rmtree(copy / part, ignore_errors=True)
    shutil.copytree(ROOT / "bundle", copy / "bundle", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = ConfigParser(ConfigParser.load_config_file(ROOT / "configs/metadata.json"))
    metadata.update(inference.get().pop("_meta_"))
    (copy / "configs").mkdir()
    for name, content in (("inference", inference), ("train", training), ("metadata", metadata)):
        ConfigParser.export_config_file(content.get(), copy / f"configs/{name}.json", indent=4)
    shutil.copy(HERE / "app.py", apps / "main.py")  # the name that MONAI Label looks for
    shutil.copy(HERE / "server.py", apps / f"{SERVER}.py")
    for folder in ("logs", "cache", "sessions", "tmp"):
        (apps / folder).mkdir(exist_ok=True)
    (apps / "logging.json").write_text(json.dumps(logging_config("INFO" if verbose else "WARNING", apps / "logs")))
    return copy


def place_checkpoint(
    copy: Path, checkpoint: Path | None, given: Mapping[str, Any], weights: str | None
) -> dict[str, Any]:
    """Make ``checkpoint`` the model of the bundle in ``copy``, and see that it can be used with settings ``given``.

    Returns:
        The settings of the model, checked by the parts that they are for: nothing in them is an expression.

    Raises:
        BundleError: if it cannot, if there is none, or if it would replace a model that was trained there.
    """
    model = copy / "models" / "model.pt"
    if checkpoint is None and not model.is_file():
        raise BundleError(f"no model in '{copy}': give --checkpoint the model.pt of a training")
    source = model if checkpoint is None else checkpoint
    detector = make_detector(trained_settings(source, given), weights)
    load_checkpoint(detector, source)
    if checkpoint is not None:
        if model.is_file() and content_key(model) != content_key(checkpoint):
            raise BundleError(
                f"'{model}' is another model, maybe trained there: leave --checkpoint out to go on with it, or give "
                "another folder as --apps"
            )
        with whole_file(model) as partial:
            shutil.copyfile(checkpoint, partial)
    return dict(settings_in(detector.describe()))


def check_studies(studies: str, modality: str) -> str:
    """The absolute path or the URL of ``studies``.

    Raises:
        BundleError: if the folder is missing, or the server does not answer.
    """
    if not studies.startswith(("http://", "https://")):
        if not Path(studies).is_dir():
            raise BundleError(f"no folder at '{studies}': give --studies a folder of volumes or a DICOMweb URL")
        return os.path.abspath(studies)
    user, password = (os.environ.get(f"MONAI_LABEL_DICOMWEB_{word}") for word in ("USERNAME", "PASSWORD"))
    url = studies.rstrip("/")
    prefix = os.environ.get("MONAI_LABEL_QIDO_PREFIX")
    try:
        answer = requests.get(
            "/".join(filter(None, (url, prefix, "series"))),
            {"Modality": modality, "limit": "1"},
            headers={"Accept": "application/dicom+json"},
            auth=(user, password) if user and password else None,
            timeout=30,
        )
        answer.raise_for_status()
    except requests.RequestException as error:
        raise BundleError(
            f"no DICOMweb at '{url}' ({type(error).__name__}: {str(error)[:200]}): check the URL, and give user and "
            "password as MONAI_LABEL_DICOMWEB_USERNAME and _PASSWORD if it wants them"
        ) from error
    return url


def server_environment(
    apps: Path, python: Path, studies: str, port: int, modality: str, origins: Sequence[str]
) -> dict[str, str]:
    """What MONAI Label reads from the environment: everything that it writes stays in ``apps``."""
    variables = {
        # commands such as itkimage2segimage are called by name
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{apps / 'model' / NAME}{os.pathsep}{apps}",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "MPLBACKEND": "Agg",
        "TMPDIR": str(apps / "tmp"),
        "MONAI_LABEL_APP_DIR": str(apps),
        "MONAI_LABEL_STUDIES": studies,
        "MONAI_LABEL_SERVER_PORT": str(port),
        "MONAI_LABEL_SESSION_PATH": str(apps / "sessions"),
        "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(apps / "cache"),
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER": json.dumps({"Modality": modality}),
        "MONAI_LABEL_DATASTORE_FILE_EXT": json.dumps([f"*{suffix}" for suffix in (*NIFTI_SUFFIXES, *FLAT_SUFFIXES)]),
        "ALLOWED_ORIGINS": json.dumps([f"http://{host}:{port}" for host in (HOST, "localhost")] + list(origins)),
    }
    folders = {name: os.path.abspath(os.environ[name]) for name in FOLDER_VARIABLES if os.environ.get(name)}
    return {**os.environ, **variables, **folders}


def logging_config(level: str, folder: Path) -> dict[str, Any]:
    """A ``logging.config`` in which no handler shows less than ``level``, whatever level MONAI Label's loggers take."""
    file = {"class": "logging.handlers.RotatingFileHandler", "filename": str(folder / "app.log"), "maxBytes": 10**7}
    handlers: dict[str, dict[str, Any]] = {"console": {"class": "logging.StreamHandler"}, "file": file}
    for handler in handlers.values():
        handler |= {"level": level, "formatter": "line", "filters": ["one_line"]}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"one_line": {"()": f"{OneLine.__module__}.{OneLine.__name__}"}},
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": handlers,
        "root": {"level": level, "handlers": list(handlers)},
    }


@contextmanager
def running(command: Sequence[str], folder: Path, variables: dict[str, str]) -> Iterator[subprocess.Popen]:
    """A process in ``folder``; it and all that it has started end with the context."""
    process = subprocess.Popen(command, cwd=folder, env=variables, start_new_session=True)
    try:
        yield process
    finally:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def serve(options: argparse.Namespace, given: Mapping[str, str]) -> int:
    """Run the server until it ends or is interrupted; its exit code."""
    studies = check_studies(options.studies, options.modality)
    port = free_port(options.port)
    with ExitStack() as stack:
        if options.apps is None:
            apps = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="monai_label-")))
        else:
            apps = options.apps.absolute()
            apps.mkdir(parents=True, exist_ok=True)
        copy = assemble(apps, options.checkpoint, given, options.verbose)
        python = environment(HERE / "requirements.txt", options.environments, "monai_label")
        # as MONAI Label's own start does, which lists all settings before it can be told to be quiet
        command = [str(python), "-m", "uvicorn", f"{SERVER}:app", "--host", HOST, "--port", str(port)]
        command += ["--no-access-log", "--log-config", str(apps / "logging.json")]
        variables = server_environment(apps, python, studies, port, options.modality, options.allow_origin)
        server = stack.enter_context(running(command, copy, variables))
        url = f"http://{HOST}:{port}"
        if not _answers(server, f"{url}/info/"):
            raise BundleError("MONAI Label has not started: its own words are above, --verbose gives more")
        kept = f"it is kept in '{apps}'" if options.apps else "it vanishes with the server, unless --apps says where to"
        print(f"MONAI Label serves the model '{NAME}' at {url} (this machine only). A model that is trained: {kept}.")
        print("Ctrl-C ends it.", flush=True)
        return server.wait()


def free_port(port: int) -> int:
    """``port``, or one that is free for 0.

    Raises:
        BundleError: if it is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise BundleError(f"port {port} cannot be used ({error}): give another --port, 0 for any") from error
        return int(probe.getsockname()[1])


def _answers(server: subprocess.Popen, url: str) -> bool:
    end = time.monotonic() + STARTUP_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            if requests.get(url, timeout=10).ok:
                return True
        except requests.RequestException:
            pass
        time.sleep(0.3)
    return False


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.integrations.monai_label",
        epilog="Further --NAME=VALUE are knobs of configs/inference.json and configs/train.json.",
        allow_abbrev=False,
        description="Start a MONAI Label server on this bundle, for this machine.",
    )
    add = parser.add_argument
    add("--studies", required=True, help="folder of volumes (NIfTI) or pictures, or the URL of a DICOMweb server")
    add("--checkpoint", type=Path, help="model.pt of a training; may be left out if --apps has a model")
    add("--apps", type=Path, help="folder to keep models, cache and logs in (default: a temporary one)")
    add(
        "--environments",
        type=Path,
        default=default_base(),
        help="where MONAI Label is installed (default: %(default)s)",
    )
    add("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    add("--modality", default="MR", help="of the series that a DICOMweb server is asked for (default: %(default)s)")
    add("--allow_origin", action="append", default=[], metavar="URL", help="of a web viewer that may ask; repeatable")
    add("--verbose", action="store_true", help="log requests, with the names of images")
    return parser


def main() -> None:
    """Serve until Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        options, more = make_parser().parse_known_args()
        sys.exit(serve(options, given_texts(more)))
    except BundleError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
