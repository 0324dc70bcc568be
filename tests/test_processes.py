"""Processes are told from each other, and the ended from those at work."""

import os
import subprocess
import sys

from bundle.processes import has_ended, process_name


def test_this_process_has_not_ended():
    assert has_ended(process_name()) is False


def test_a_process_that_was_killed_has_ended():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = process_name(process.pid)
    assert not has_ended(name)
    process.kill()
    process.wait()
    assert has_ended(name)


def test_a_later_process_with_the_same_number_is_another_one():
    machine, pid, begin = process_name().split("-")
    assert has_ended(f"{machine}-{pid}-{int(begin) - 1}")


def test_nothing_is_known_of_processes_of_other_machines_and_of_other_texts():
    assert has_ended(process_name(2**22 + 1).replace(process_name()[:8], "00000000")) is None
    assert has_ended("") is None


def test_a_process_of_another_user_is_alive(monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert has_ended(process_name()) is False
