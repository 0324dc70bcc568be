"""The application: study -> series -> volume -> model.ts -> DICOM objects."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from holoscan.conditions import CountCondition
from monai.deploy import operators as sdk
from monai.deploy.core import AppContext, Application, IOType, parse_args
from monai.deploy.core.arg_parser import set_up_logging
from operators import FOUND, IMAGE, OURS, SELECTED, STUDIES, ResultWriter, SeriesSelector, StudyLoader, VolumeReader

from bundle.errors import BundleError, log_single_lines, user_error

CONFIG = Path(__file__).with_name("app.yaml")
MODEL_HASH = Path(__file__).with_name("model.sha256")
SETTINGS = ("selections", "worst_slices", "segment_unlike")


class AnomalyApplication(Application):
    """Anomaly maps of the series of a study that the rules in ``app.yaml`` choose.

    Args:
        context: input, output and model.
        config: the content of ``app.yaml``.
    """

    def __init__(self, context: AppContext, config: dict[str, Any]) -> None:
        self.context = context
        self.settings = config
        super().__init__()

    def compose(self) -> None:
        """Connect the operators."""
        settings = self.settings
        loader = StudyLoader(self, CountCondition(self, 1), name="loader", input_folder=Path(self.context.input_path))
        rules = json.dumps({"selections": settings["selections"]})
        selector = SeriesSelector(self, name="selector", context=self.context, rules=rules)
        reader = VolumeReader(self, name="reader")
        inference = sdk.MonaiBundleInferenceOperator(
            self,
            name="inference",
            app_context=self.context,
            input_mapping=[sdk.IOMapping(IMAGE, Any, IOType.IN_MEMORY)],
            output_mapping=[sdk.IOMapping(name, Any, IOType.IN_MEMORY) for name in FOUND],
        )
        writer = ResultWriter(
            self,
            name="writer",
            context=self.context,
            worst_slices=settings["worst_slices"],
            segment_unlike=settings["segment_unlike"],
        )
        self.add_flow(loader, selector, {(STUDIES, STUDIES)})
        self.add_flow(selector, reader, {(SELECTED, SELECTED)})
        self.add_flow(reader, inference, {(IMAGE, IMAGE)})
        self.add_flow(selector, writer, {(SELECTED, SELECTED)})
        self.add_flow(inference, writer, {(name, name) for name in FOUND})


def read_config(path: Path) -> dict[str, Any]:
    """The content of ``app.yaml``.

    Raises:
        BundleError: if it is missing or no YAML, or a setting is missing or wrong.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BundleError(f"cannot read the configuration '{path}' ({str(error).splitlines()[0]}): mend it") from error
    for name in SETTINGS:
        if not isinstance(config, dict) or config.get(name) in (None, []):
            raise BundleError(f"'{path}' has no '{name}': add it, as in the app.yaml of the application")
    if not isinstance(config["worst_slices"], int) or config["worst_slices"] < 1:
        raise BundleError(f"worst_slices in '{path}' is {config['worst_slices']}: give at least 1")
    if not isinstance(config["segment_unlike"], bool):
        raise BundleError(f"segment_unlike in '{path}' is {config['segment_unlike']}: give true or false")
    return config


class _Private(logging.Filter):
    """What libraries log and warn of may be of a patient, such as an odd name: for ``--log-level DEBUG`` alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` may be shown."""
        return record.name.startswith(OURS) or logging.getLogger().level <= logging.DEBUG


def check_model(model: Path, vouched: Path = MODEL_HASH) -> None:
    """Refuse a model that this application was not made with: TorchScript is a program, and can do anything.

    Args:
        model: that is about to be loaded.
        vouched: a file that begins with its SHA-256 (hex).

    Raises:
        BundleError: if the hash is another one, or not known.
    """
    with model.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not vouched.is_file() or vouched.read_text().split()[:1] != [found]:
        raise BundleError(
            f"'{model}' is not the model that this application was made with, and TorchScript is a program, which can "
            f"read and write any file: make both anew, or write its SHA-256 into '{vouched}' if you know who made it"
        )


def start(argv: list[str]) -> int:
    """Run the application with the arguments of a command line; what is wrong with them or the study is said in a line.

    Returns:
        The exit status.
    """
    try:
        run(argv)
    except Exception as error:
        known = user_error(error)
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr)
        return 1
    return 0


def run(argv: list[str]) -> None:
    """Run the application with the arguments of a command line.

    Raises:
        BundleError: if the study cannot be examined.
    """
    arguments = parse_args(argv)
    set_up_logging(arguments.log_level)
    logging.captureWarnings(True)
    log_single_lines()
    for handler in logging.getLogger().handlers:
        handler.addFilter(_Private())
    context = AppContext({name: value for name, value in vars(arguments).items() if value})
    if not Path(context.input_path).is_dir():
        raise BundleError(f"no folder at '{context.input_path}': give that of a study with --input")
    if not context.models:
        raise BundleError(f"no model at '{context.model_path}': give --model model.ts")
    for _, model in context.models.items():
        check_model(Path(model.path))
    config = read_config(Path(os.environ.get("HOLOSCAN_CONFIG_PATH") or CONFIG))
    AnomalyApplication(context, config).run()
