"""The load of the machine is in the run on request, and no fault of it concerns a command."""

import sys
import time
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from bundle import system_metrics
from bundle.system_metrics import SystemMonitor
from bundle.tracking import EXPERIMENT, Tracker, database


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.01")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def monitor_of(measure):
    """In the place of MLflow's."""
    return SimpleNamespace(collect_metrics=lambda: None, aggregate_metrics=measure, clear_metrics=lambda: None)


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_samples_are_in_the_run_in_their_order(tmp_path, monkeypatch):
    values = iter(range(1, 1_000_000))
    monkeypatch.setattr(system_metrics, "_monitors", lambda: [monitor_of(lambda: {"load": next(values)})])
    tracker = Tracker(database(tmp_path), "training", {}, system_metrics=True)
    tracker.start()
    wait_for(lambda: next(values) > 5)
    tracker.finish()
    client = MlflowClient(database(tmp_path))
    [run] = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    history = client.get_metric_history(run.info.run_id, "system/load")
    assert len(history) > 1
    assert [one.step for one in history] == list(range(len(history)))
    assert [one.value for one in history] == sorted(one.value for one in history)


def test_mlflows_own_monitors_measure():
    pytest.importorskip("psutil")
    monitor = SystemMonitor()
    monitor.start()
    samples = []
    wait_for(lambda: samples.extend(monitor.take()) or samples)
    monitor.stop()
    assert 0 <= samples[0].values["system/cpu_utilization_percentage"] <= 100


def test_a_package_that_is_missing_is_one_line(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("mlflow.system_metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psutil", None)
    SystemMonitor().start()
    assert "pip install psutil" in caplog.text
    assert len(caplog.records) == 1


def test_a_driver_that_fails_ends_the_samples_only(monkeypatch, caplog):
    monkeypatch.setattr(system_metrics, "_monitors", lambda: [monitor_of(lambda: 1 / 0)])
    monitor = SystemMonitor()
    monitor.start()
    wait_for(lambda: caplog.records)
    assert "system_metrics ends (ZeroDivisionError: division by zero)" in caplog.text
    assert not monitor.take()
