"""One MLflow run per command: parameters, metrics, tags and artifacts. Results never wait for it, or depend on it."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import ignite.distributed as idist
from ignite.engine import Engine, Events

from bundle import NAME
from bundle.errors import BundleError, check
from bundle.files import files_below
from bundle.locks import holds_lock
from bundle.mlflow_database import PREFIX, artifact_location, database_file, ready_database
from bundle.mlflow_model import save_model
from bundle.processes import has_ended, process_name
from bundle.provenance import NO_COMMIT, DataSet
from bundle.system_metrics import SystemMonitor

EXPERIMENT = "dinov3_spatial_ar"
MAX_PARAMETER_LENGTH = 500  # older MLflow servers refuse longer ones
AT_ONCE = 100  # parameters that MLflow takes
METRICS_AT_ONCE = 1000
DIGEST_LENGTH = 12  # MLflow shows it whole, and takes 36 characters
MAX_DESCRIPTION_LENGTH = 8000
PATIENCE = 10  # after a failure nothing is sent for so many times as long as it took
MODELS = "models"
RUN = "{run}"
# tags that MLflow shows in places of their own; mlflow.utils.mlflow_tags is slow to import
MLFLOW_RUN_NOTE = "mlflow.note.content"
MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE = "mlflow.source.name", "mlflow.source.type"
MLFLOW_GIT_COMMIT, MLFLOW_GIT_DIRTY = "mlflow.source.git.commit", "mlflow.source.git.dirty"
MLFLOW_DATASET_CONTEXT = "mlflow.data.context"
MLFLOW_MODEL_VERSIONS = "mlflow.modelVersions"
PROCESS, FOLDER = "bundle.process", "bundle.output_dir"  # tags by which a later command knows whose run it is

logger = logging.getLogger(__name__)


def database(folder: str | os.PathLike) -> str:
    """The URI of an MLflow database in ``folder``; its artifacts lie beside it."""
    return f"{PREFIX}{Path(folder).resolve()}/mlflow.db"


class Entry(NamedTuple):
    """Something that MLflow is to be told.

    Attributes:
        kind: in words, in the plural.
        send: to be called with an ``MlflowClient`` and the id of the run; twice does no harm. What takes long is an
            iterator, each step of which is a sign of life.
    """

    kind: str
    send: Callable[[Any, str], Iterable[None] | None]


class Tracker:
    """Opens an MLflow run of its own, tells it what the command finds, and closes it with the command.

    What is told waits in order until MLflow has it. If MLflow fails, or takes longer than ``timeout`` for one entry,
    the command goes on, and a warning says so; later entries try again, the sooner the faster the failure was. At the
    end a warning says what MLflow does not have. No error of MLflow ends a command.

    Nothing is written before the first use. ``MLFLOW_TRACKING_URI`` in the environment wins over ``uri``. The run ends
    as FINISHED by :meth:`finish`; a command that fails or is interrupted leaves FAILED; runs of commands that were
    killed are marked as KILLED by the next command.

    Args:
        uri: of the tracking server or database, for instance ``sqlite:////abs/mlflow.db``; ``off`` or None for none.
        command: what runs: training, evaluating, inferring.
        tags: plain texts.
        config: resolved items by id; those that are plain values become the parameters of the run.
        settings: of the model; parameters, too.
        config_dir: whose JSON files are kept with the run.
        output_dir: where the command writes.
        timeout: seconds that a server may take for one entry, such as a file; a database in a file has no limit. The
            variables of MLflow for HTTP requests win.
        data: what the command works on; MLflow lists it as the data set of the run.
        system_metrics: log the load of the machine, too, where ``psutil`` is installed.

    Raises:
        BundleError: if the timeout is not positive.
    """

    def __init__(
        self,
        uri: str | None,
        command: str,
        tags: Mapping[str, str],
        config: Mapping[str, Any] | None = None,
        config_dir: str | os.PathLike | None = None,
        settings: Mapping[str, Any] | None = None,
        output_dir: str | os.PathLike = ".",
        timeout: float = 5.0,
        data: DataSet | None = None,
        system_metrics: bool = False,
    ) -> None:
        check(timeout > 0, "tracking_timeout", timeout, "give seconds, such as 5; --tracking_uri off tracks nothing")
        is_off = uri in (None, "off") or idist.get_rank() > 0  # one run for all processes
        self.uri = None if is_off else os.environ.get("MLFLOW_TRACKING_URI") or uri
        self.run_name = f"{command} {time.strftime('%Y-%m-%d %H:%M:%S')} {uuid.uuid4().hex[:6]}"
        self.command = command
        self.tags = dict(tags)
        self.data = data
        self.monitor = SystemMonitor() if system_metrics and self.uri is not None else None
        self.config = {} if config is None else config
        self.settings = {} if settings is None else dict(settings)
        self.config_files = sorted(Path(config_dir).glob("*.json")) if config_dir else []
        self.output_dir = Path(output_dir).resolve()
        self.timeout = timeout
        self._client: Any = None
        self._run = ""  # id
        self._model: str | None = None  # id, once it is logged; metrics of that time on are its own, too
        self._given: set[str] = set()  # names of parameters
        self._paragraphs: deque[str] = deque()  # of the description
        self._pictures: list[str] = []  # for the same, with RUN for the id of the run
        self._begin = int(time.time() * 1000)
        self._is_open = False
        self._waiting: deque[Entry] = deque()
        self._refused: list[Entry] = []
        self._reason = ""  # of the last failure
        self._tries = 0
        self._not_before = -math.inf  # time of the next try
        self._sender: threading.Thread | None = None
        self._heartbeat = 0.0  # time of its last success
        self._outcome = ""  # of its last try

    def handler(self) -> EpochLogger:
        """What logs the epochs of an engine into this run."""
        return EpochLogger(self)

    @property
    def plain_values(self) -> dict[str, Any]:
        """The config and the settings, as far as they are plain values, by id."""
        return {key: value for key, value in sorted({**self.config, **self.settings}.items()) if _is_plain(value)}

    def start(self) -> None:
        """Open the run."""
        if self.uri is not None and not self._is_open:
            self._is_open = True
            sys.excepthook = _ending(self, sys.excepthook)
            if self.monitor is not None:
                self.monitor.start()
            if self.data is not None:
                self._tell(Entry("data sets", _input(self.data, self.command)))
                self.describe(f"Data: `{self.data.words}` ({self.data.counts})")
            self._send()

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Add parameters; the first value of a name stays."""
        if self.uri is None:
            return
        from mlflow.entities import Param  # slow to import, with all of MLflow

        new = {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in values.items() if key not in self._given}
        self._given |= new.keys()
        params = [Param(key, value) for key, value in new.items()]
        for start in range(0, len(params), AT_ONCE):
            self._tell(Entry("parameters", _call("log_batch", params=params[start : start + AT_ONCE])))
        self._send()

    def metrics(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Add numbers; what is no number is left out.

        Args:
            values: by name.
            step: such as the epoch.
        """
        if self.uri is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        numbers = {key: float(value) for key, value in values.items() if _is_number(value)}

        def send(client: Any, run: str) -> None:
            # by its metrics MLflow knows which data a model was tested on
            data = (self.data.name, _digest(self.data)) if self._model and self.data else (None, None)
            client.log_batch(run, [Metric(key, value, now, step, self._model, *data) for key, value in numbers.items()])

        if numbers:
            self._tell(Entry("metrics", send))
            self._send()

    def describe(self, text: str, pictures: Iterable[str] = ()) -> None:
        """Add a paragraph to the description that MLflow shows of the run; the latest comes first, pictures come last.

        Args:
            text: Markdown.
            pictures: paths of files of the run.
        """
        if self.uri is None:
            return
        self._paragraphs.appendleft(text)
        self._pictures += [f"![{path}](get-artifact?path={quote(path)}&run_uuid={RUN})" for path in pictures]
        whole = "\n\n".join([*self._paragraphs, *self._pictures])[:MAX_DESCRIPTION_LENGTH]

        def send(client: Any, run: str) -> None:
            client.set_tag(run, MLFLOW_RUN_NOTE, whole.replace(RUN, run))

        self._tell(Entry("descriptions", send))

    def log(self, metrics: Mapping[str, Any], files: Mapping[str, Iterable[str | os.PathLike]]) -> None:
        """Log numbers (None is left out) and files.

        Args:
            metrics: by name.
            files: paths by the folder of the run that they belong to.
        """
        if self.uri is None:
            return
        self.start()
        self.metrics(metrics)
        for folder, paths in files.items():
            for file in paths:
                self._tell(Entry("files", _call("log_artifact", str(file), folder)))
        self._send()

    def model(self, checkpoint: str | os.PathLike, register: str | None = None) -> None:
        """Log the trained model as one that MLflow loads and serves, see :mod:`bundle.mlflow_model`.

        Args:
            checkpoint: of the model; it stays there until the command ends.
            register: the name under which it becomes a new version in the registry of the server; None: it does not.
        """
        if self.uri is None:
            return
        self.start()
        import mlflow.pyfunc  # noqa: F401  # before the clock runs

        self._tell(Entry(MODELS, lambda client, run: self._log_model(client, run, checkpoint)))
        if register is not None:
            self._tell(Entry(MODELS, lambda client, run: self._register(client, run, register)))
        self._send()

    def finish(self) -> None:
        """Log the resolved config, as parameters and as a file, close the run, and warn of what is missing there."""
        if self.uri is None:
            return
        self.start()
        config = self.plain_values
        self.parameters({key.replace("::", "."): value for key, value in config.items()})
        self._tell(Entry("files", _call("log_text", json.dumps(config, indent=1), "configs/resolved_config.json")))
        self.log({}, {"configs": self.config_files})
        self._end("FINISHED")
        missing = Counter(entry.kind for entry in (*self._refused, *self._waiting))
        if missing:
            words = ", ".join(f"{count} of {kind}" for kind, count in missing.items())
            logger.warning(
                f"MLflow at '{self.uri}' does not have all of this command ({self._reason}): missing are {words}; "
                "results are not concerned"
            )

    def fail(self) -> None:
        """Close the run as FAILED, if it is open."""
        if self._is_open:
            self._end("FAILED")

    def _end(self, status: str) -> None:
        if self.monitor is not None:
            self.monitor.stop()
            self._take_samples()
        self._tell(Entry("ends of runs", _call("set_terminated", status)))
        self._not_before = -math.inf
        self._send()
        self._is_open = False

    def _tell(self, entry: Entry) -> None:
        if self.uri is not None:
            self._waiting.append(entry)

    def _send(self) -> None:
        """Try to send what waits, unless MLflow has just failed."""
        if self.uri is None or time.monotonic() < self._not_before:
            return
        self._take_samples()
        begin = time.monotonic()
        failure = self._try()
        while self._waiting and not failure:  # told after an earlier try had done its last entry
            failure = self._try()
        if failure:
            if not self._reason:
                logger.warning(f"MLflow at '{self.uri}' fails ({failure}): the command goes on, and tries again later")
            self._reason = failure
            self._not_before = time.monotonic() + max(1.0, PATIENCE * (time.monotonic() - begin))

    def _take_samples(self) -> None:
        """Let the load of the machine since the last time wait with everything else."""
        if self.monitor is None:
            return
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, sample.milliseconds, sample.step)
            for sample in self.monitor.take()
            for name, value in sample.values.items()
        ]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self._tell(Entry("metrics", _call("log_batch", metrics=metrics[start : start + METRICS_AT_ONCE])))

    def _try(self) -> str:
        """Send what waits; returns why that failed, or nothing."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(math.ceil(self.timeout)))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # we try again ourselves
        import mlflow.tracking  # noqa: F401  # before the clock runs

        for name in ("mlflow", "alembic", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # they show traces of what we tell in a line
        if str(self.uri).startswith(PREFIX):
            return self._send_all()
        return self._send_in_time()

    def _send_in_time(self) -> str:
        """:meth:`_send_all` by a thread that is left alone when an entry takes longer than it may."""

        def send() -> None:
            self._outcome = self._send_all()

        begin = time.monotonic()
        if self._sender is None or not self._sender.is_alive():
            self._sender = threading.Thread(target=send, daemon=True)
            self._sender.start()
        while self._sender.is_alive():
            left = max(begin, self._heartbeat) + self.timeout - time.monotonic()
            if left <= 0:
                return f"no answer in {self.timeout:g} s, which tracking_timeout sets"
            self._sender.join(left)
        return self._outcome

    def _send_all(self) -> str:
        """Send what waits, in order, and leave out what MLflow refuses; returns why it stopped, or nothing.

        Where files or models cannot be sent, numbers may: they go to another server.
        """
        failed: dict[str, str] = {}
        try:
            if not self._run:
                self._run = self._opened()
                self._heartbeat = time.monotonic()
            for entry in list(self._waiting):
                if entry.kind in failed:
                    continue
                try:
                    self._deliver(entry, bool(failed))
                except Exception as error:
                    if not _is_refusal(error):
                        failed[entry.kind] = _words(error)
                        if len(failed.keys() - {MODELS}) > 1:
                            break
                        continue
                    self._reason = _words(error)
                    self._refused.append(entry)
                self._waiting.remove(entry)
                self._heartbeat = time.monotonic()
        except Exception as error:
            return _words(error)
        return next(iter(failed.values()), "")

    def _deliver(self, entry: Entry, has_failed: bool) -> None:
        """Send an entry; twice after another one ``has_failed``, since that may have cost the connection."""
        try:
            for _ in entry.send(self._client, self._run) or ():
                self._heartbeat = time.monotonic()
        except Exception as error:
            if not has_failed or _is_refusal(error):
                raise
            self._deliver(entry, False)

    def _log_model(self, client: Any, run: str, checkpoint: str | os.PathLike) -> Iterator[None]:
        from mlflow.entities import LoggedModelOutput

        known = client.get_run(run)
        experiment = known.info.experiment_id
        params = {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in self.settings.items()}
        found = client.search_logged_models([experiment], f"source_run_id = '{run}'")  # of an earlier try
        model = found[0] if found else client.create_logged_model(experiment, NAME, run, self.tags, params)
        if known.outputs is None or not known.outputs.model_outputs:
            client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
        yield
        with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as name:
            folder, number = Path(name), model.model_id
            about = {"artifact_path": model.artifact_location, "run_id": run}
            save_model(folder, checkpoint, **about, model_uuid=number, model_id=number)
            yield
            for file in files_below(folder):
                inside = file.parent.as_posix()
                client.log_model_artifact(number, str(folder / file), None if inside == "." else inside)
                yield
        client.finalize_logged_model(model.model_id, "READY")
        self._model = model.model_id

    def _register(self, client: Any, run: str, name: str) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        if self._model is None:
            raise FileNotFoundError(f"no model to register: {self._reason}")
        model = client.get_logged_model(self._model)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        yield
        found = client.search_model_versions(f"run_id = '{run}'")  # of an earlier try
        version = found[0] if found else _new_version(client, name, model)
        yield
        told = json.dumps([{"name": name, "version": version.version}])
        client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: told})

    def _opened(self) -> str:
        """The id of the run, which is made unless an earlier try has made it."""
        from mlflow import MlflowClient
        from mlflow.entities import ViewType

        file = database_file(str(self.uri))
        if self._client is None:
            if file is not None:
                ready_database(file, EXPERIMENT)
            self._client = MlflowClient(self.uri)
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            number = experiment.experiment_id
        else:
            number = self._client.create_experiment(EXPERIMENT, artifact_location(file) if file else None)
        self._tries += 1
        if self._tries > 1:
            mine = f"attributes.run_name = '{self.run_name}'"
            for run in self._client.search_runs([number], mine, ViewType.ACTIVE_ONLY):
                return str(run.info.run_id)
        self._close_killed(number)
        whose = {"mlflow.user": "bundle", PROCESS: process_name(), FOLDER: str(self.output_dir)}
        tags = {**self.tags, **_source(self.command, self.tags.get("git_commit", NO_COMMIT)), **whose}
        return str(self._client.create_run(number, self._begin, tags, self.run_name).info.run_id)

    def _close_killed(self, experiment: str) -> None:
        """Mark runs as KILLED whose process has ended without a word."""
        ours = self.uri == database(self.output_dir) and holds_lock(self.output_dir)
        for run in self._client.search_runs([experiment], "attributes.status = 'RUNNING'"):
            tags = run.data.tags
            if has_ended(tags.get(PROCESS, "")) or (ours and tags.get(FOLDER) == str(self.output_dir)):
                self._client.set_terminated(run.info.run_id, "KILLED")


class EpochLogger:
    """A handler by which an engine logs the metrics of its epochs into the run of ``tracker``.

    Args:
        tracker: of the command.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def attach(self, engine: Engine) -> None:
        """Register with the engine, if anything is tracked."""
        if self.tracker.uri is not None:
            engine.add_event_handler(Events.STARTED, self.note_length)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.note_metrics)

    def note_length(self, engine: Engine) -> None:
        """Log how long the engine is to run."""
        self.tracker.start()
        self.tracker.parameters({name: getattr(engine.state, name) for name in ("max_epochs", "epoch_length")})

    def note_metrics(self, engine: Engine) -> None:
        """Log the numbers of the epoch."""
        self.tracker.metrics(epoch_numbers(engine), engine.state.epoch)


def epoch_numbers(engine: Engine) -> dict[str, Any]:
    """The metrics of the epoch, and the learning rate at its end."""
    optimizer = getattr(engine, "optimizer", None)  # that of a trainer
    rate = {} if optimizer is None else {"learning_rate": optimizer.param_groups[0]["lr"]}
    return {**engine.state.metrics, **rate}


def epoch_logger(tracker: Tracker) -> EpochLogger:
    """The handler by which an engine logs the metrics of its epochs into the run of ``tracker``."""
    return tracker.handler()


def _call(method: str, *arguments: Any, **options: Any) -> Callable[[Any, str], None]:
    """A call of a method of an ``MlflowClient`` with the id of a run."""

    def send(client: Any, run: str) -> None:
        getattr(client, method)(run, *arguments, **options)

    return send


def _input(data: DataSet, command: str) -> Callable[[Any, str], Any]:
    """A call that lists ``data`` as the input of a run, with the command as what it was used for."""

    def send(client: Any, run: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source, sizes = json.dumps({"uri": str(Path(data.directory).resolve())}), json.dumps(data.sizes)
        described = Dataset(data.name, _digest(data), "local", source, profile=sizes)
        client.log_inputs(run, [DatasetInput(described, [InputTag(MLFLOW_DATASET_CONTEXT, command)])])

    return send


def _new_version(client: Any, name: str, model: Any) -> Any:
    """A version ``name`` of a logged model; by ``models:/ID`` MLflow would look for it on the server of all others."""
    place, run = model.artifact_location, model.source_run_id
    return client.create_model_version(name, place, run, await_creation_for=0, model_id=model.model_id)


def _digest(data: DataSet) -> str:
    return data.fingerprint[:DIGEST_LENGTH]


def _source(command: str, commit: str) -> dict[str, str]:
    """The tags that MLflow shows as the source of a run, with its commit where there is one."""
    tags = {MLFLOW_SOURCE_NAME: f"{NAME} {command}", MLFLOW_SOURCE_TYPE: "LOCAL"}
    if commit != NO_COMMIT:
        known, _, changes = commit.partition("+")
        tags |= {MLFLOW_GIT_COMMIT: known, MLFLOW_GIT_DIRTY: str(bool(changes))}
    return tags


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow will never take the entry, whenever it is sent; other errors are those of the way to it."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429)
    if isinstance(error, BundleError):
        return True
    return isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError, RequestException))


def _words(error: Exception) -> str:
    """An error in a line that is not too long."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _ending(tracker: Tracker, show: Any) -> Any:
    """An exception hook that closes the run before the error is shown."""

    def hook(*error: Any) -> None:
        tracker.fail()
        show(*error)

    return hook


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))
