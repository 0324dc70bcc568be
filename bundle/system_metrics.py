"""The load of this machine, by MLflow's own monitors."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

SECONDS = 10.0  # between two samples, unless MLflow's variable says otherwise

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """What was measured at a time.

    Attributes:
        milliseconds: since 1970.
        step: number of the sample, from 0.
        values: by MLflow's names.
    """

    milliseconds: int
    step: int
    values: dict[str, float]


class SystemMonitor:
    """Samples processors, memory, disk, network, and NVIDIA GPUs where ``nvidia-ml-py`` is installed.

    A thread of its own does so, every ten seconds, or as ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` says. It sends
    nothing: who wants samples takes them. Whatever fails is one warning, and the end of sampling.
    """

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._ended = threading.Event()

    def start(self) -> None:
        """Begin to sample."""
        try:
            from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

            monitors = _monitors()
        except ImportError as error:
            logger.warning(f"system_metrics needs a package that is missing ({error}): pip install psutil")
            return
        seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SECONDS
        threading.Thread(target=self._run, args=(monitors, seconds), daemon=True).start()

    def take(self) -> list[Sample]:
        """The samples since the last time."""
        taken, self._samples = self._samples, []
        return taken

    def stop(self) -> None:
        """End; no thread is waited for."""
        self._ended.set()

    def _run(self, monitors: list[Any], seconds: float) -> None:
        step = 0
        try:
            while not self._ended.is_set():
                values: dict[str, float] = {}
                for monitor in monitors:
                    monitor.collect_metrics()
                    values |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
                named = {f"system/{name}": float(value) for name, value in values.items()}
                self._samples.append(Sample(int(time.time() * 1000), step, named))
                step += 1
                self._ended.wait(seconds)
        except Exception as error:  # whatever a driver may do
            logger.warning(f"system_metrics ends ({type(error).__name__}: {error}): the command goes on")


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with suppress(Exception):  # no card, or no package for it
        monitors.append(GPUMonitor())
    return monitors
