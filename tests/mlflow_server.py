"""A real MLflow server on this machine that can die, come back, stop answering and lose its disk."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

from mlflow import MlflowClient

from bundle.tracking import EXPERIMENT

ALONE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight more processes
    "OMP_NUM_THREADS": "1",
}
SECONDS = 120  # to start in, on a busy machine
END_WITH_US = 'cat; kill -s KILL -- "-$0"'  # as soon as nobody holds the other end of its input


class Server:
    """Keeps runs and files in a folder while it is away. It ends with the process of the tests, however that ends."""

    def __init__(self, folder):
        self.folder = folder
        self.files = folder / "files"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "mlflow.db"
        self.process = self.watcher = None

    @property
    def client(self):
        return MlflowClient(self.uri)

    def start(self):
        """Wait until it answers; nothing if it runs."""
        if self.process is not None:
            return self
        options = {
            "backend-store-uri": f"sqlite:///{self.database}",
            "artifacts-destination": self.files.as_uri(),
            "host": "127.0.0.1",
            "port": self.port,
            "workers": 1,
        }
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--serve-artifacts",
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            env={key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | ALONE,
            stdout=(self.folder / "log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.watcher = subprocess.Popen(["sh", "-c", END_WITH_US, str(self.process.pid)], stdin=subprocess.PIPE)
        end = time.monotonic() + SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise RuntimeError((self.folder / "log").read_text()[-3000:])
            time.sleep(0.1)
        return self

    def _answers(self):
        with suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=1).status == 200
        return False

    def kill(self):
        """End all of its processes at once, without a word; nothing if it does not run."""
        if self.process is not None:
            self.watcher.stdin.close()
            self.watcher.wait()
            self.process.wait()
            self.process = None

    @contextmanager
    def silent(self):
        """It takes requests and answers none."""
        os.killpg(self.process.pid, signal.SIGSTOP)
        yield
        os.killpg(self.process.pid, signal.SIGCONT)

    @contextmanager
    def without_disk(self):
        """It has no place for files."""
        self.files.mkdir(exist_ok=True)
        kept = self.files.rename(self.folder / "kept")
        self.files.touch()
        yield
        self.files.unlink()
        kept.rename(self.files)

    def ask(self, count):
        """A number from its database, whether it runs or not."""
        with sqlite3.connect(self.database) as connection:
            return connection.execute(count).fetchone()[0]

    def runs(self, name):
        """Those of this name."""
        experiment = self.client.get_experiment_by_name(EXPERIMENT).experiment_id
        return list(self.client.search_runs([experiment], f"attributes.run_name = '{name}'"))

    def losses(self, run):
        """Steps and values."""
        return sorted((one.step, one.value) for one in self.client.get_metric_history(run.info.run_id, "train_loss"))

    def artifacts(self, run, folder=None):
        """Their paths in the run."""
        found = self.client.list_artifacts(run.info.run_id, folder)
        return sorted(path for one in found for path in (self.artifacts(run, one.path) if one.is_dir else [one.path]))
