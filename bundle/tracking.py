"""One MLflow run per command: parameters, metrics, tags and artifacts."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist

EXPERIMENT = "dinov3_spatial_ar"
MAX_PARAMETER_LENGTH = 500  # older MLflow servers refuse longer ones


def database(folder: str | os.PathLike) -> str:
    """The URI of an MLflow database in ``folder``; its artifacts lie beside it."""
    return f"sqlite:///{Path(folder).resolve()}/mlflow.db"


class Tracker:
    """Opens an MLflow run of its own, gives MONAI's handlers that write into it, and closes it with the command.

    Nothing is written before the first use. ``MLFLOW_TRACKING_URI`` in the environment
    wins over ``uri``. The run ends as FINISHED by :meth:`finish`; a command that fails or is interrupted leaves FAILED.

    Args:
        uri: of the tracking server or database, for instance ``sqlite:////abs/mlflow.db``; ``off`` or None for none.
        command: what runs: training, evaluating, inferring.
        tags: plain texts.
        config: resolved items by id; those that are plain values become the parameters of the run.
        settings: of the model; parameters, too.
        config_dir: whose JSON files are kept with the run.
    """

    def __init__(
        self,
        uri: str | None,
        command: str,
        tags: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
        config_dir: str | os.PathLike | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.uri = None if uri == "off" or idist.get_rank() > 0 else uri  # one run for all processes
        self.run_name = f"{command} {time.strftime('%Y-%m-%d %H:%M:%S')} {uuid.uuid4().hex[:6]}"
        self.tags = dict(tags)
        self.config = {} if config is None else config
        self.settings = {} if settings is None else dict(settings)
        self.config_files = sorted(Path(config_dir).glob("*.json")) if config_dir else []
        self._main: Any = None  # a MONAI MLFlowHandler, whose run is open

    def handler(self, **options: Any) -> Any:
        """A MONAI ``MLFlowHandler`` that logs epochs of an engine into this run, or one that does nothing.

        Args:
            options: of ``MLFlowHandler``.
        """
        if self.uri is None:
            return _Silent()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine
        from monai.handlers import MLFlowHandler  # slow to import, with all of MLflow

        if self.uri.startswith("sqlite:///") and not os.environ.get("MLFLOW_TRACKING_URI"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        return MLFlowHandler(
            self.uri, iteration_log=False, experiment_name=EXPERIMENT, run_name=self.run_name, **options
        )

    @property
    def _run(self) -> Any:
        if self._main is None and self.uri is not None:
            self._main = self.handler()
            self._main._set_experiment()
            self._main.cur_run = self._main.client.create_run(
                self._main.experiment.experiment_id, run_name=self.run_name, tags={**self.tags, "mlflow.user": "bundle"}
            )
            sys.excepthook = _ending(self, sys.excepthook)
        return self._main

    def start(self) -> None:
        """Open the run."""
        _ = self._run

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Add tags."""
        if run := self._run:
            for key, value in tags.items():
                run.client.set_tag(run.cur_run.info.run_id, key, str(value))

    def log(self, metrics: Mapping[str, Any], files: Mapping[str, Iterable[str | os.PathLike]]) -> None:
        """Log numbers (None is left out) and files.

        Args:
            metrics: by name.
            files: paths by the folder of the run that they belong to.
        """
        if run := self._run:
            run._log_metrics({key: value for key, value in metrics.items() if isinstance(value, (int, float))})
            for folder, paths in files.items():
                for file in paths:
                    run.client.log_artifact(run.cur_run.info.run_id, str(file), folder)

    def finish(self) -> None:
        """Log the resolved config, as parameters and as a file, and close the run."""
        if run := self._run:
            config = {key: value for key, value in sorted({**self.config, **self.settings}.items()) if _is_plain(value)}
            parameters = {key.replace("::", "."): str(value)[:MAX_PARAMETER_LENGTH] for key, value in config.items()}
            run._delete_exist_param_in_dict(parameters)
            for start in range(0, len(parameters), 100):  # MLflow takes 100 at once
                run._log_params(dict(list(parameters.items())[start : start + 100]))
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "resolved_config.json"
                file.write_text(json.dumps(config, indent=1))
                run.client.log_artifact(run.cur_run.info.run_id, str(file), "configs")
            self.log({}, {"configs": self.config_files})
            run.close()

    def fail(self) -> None:
        """Close the run as FAILED."""
        if self._main is not None and self._main.cur_run is not None:
            self._main.run_finish_status = "FAILED"
            self._main.close()


def epoch_logger(tracker: Tracker) -> Any:
    """The handler by which an engine logs the metrics of its epochs into the run of ``tracker``."""
    return tracker.handler()


def _ending(tracker: Tracker, show: Any) -> Any:
    """An exception hook that closes the run before the error is shown."""

    def hook(*error: Any) -> None:
        tracker.fail()
        show(*error)

    return hook


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


class _Silent:
    """A handler of no engine's events."""

    def attach(self, engine: Any) -> None:
        """Do nothing."""
