"""Known holes of dependencies fail; a database that cannot be reached does not."""

import json

import pytest

from scripts.checks.dependencies import main

CLEAN = {"name": "numpy", "version": "2.4", "vulns": []}
BAD = {"name": "pillow", "version": "13.0", "vulns": [{"id": "CVE-1", "fix_versions": ["13.1"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture
def audit(tmp_path):
    """Runs the check with a program that prints what pip-audit would, with its exit code."""

    def run(output, code=0):
        program = tmp_path / "pip-audit"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n")
        program.chmod(0o755)
        return main(["--audit", str(program), "--packages", str(tmp_path)])

    return run


def test_a_known_hole_fails_with_its_cure(audit, capsys):
    assert audit(json.dumps({"dependencies": [CLEAN, BAD, UNKNOWN]}), 1) == 1
    assert capsys.readouterr().out.splitlines() == [
        "pillow 13.0: CVE-1, cured in 13.1",
        "1 known holes in 2 dependencies that were looked up",
    ]


def test_without_a_hole_it_passes(audit, capsys):
    assert audit(json.dumps({"dependencies": [CLEAN]})) == 0
    assert "0 known holes in 1 dependencies" in capsys.readouterr().out


@pytest.mark.parametrize("output", ["", json.dumps({"dependencies": [UNKNOWN]})])
def test_what_nobody_could_look_up_passes_and_is_said_in_one_line(audit, capsys, output):
    assert audit(output, 1) == 0
    assert capsys.readouterr().out.splitlines() == [
        "dependencies are not audited: the database of known holes cannot be reached"
    ]


def test_a_program_that_is_missing_is_no_hole(tmp_path):
    assert main(["--audit", str(tmp_path / "none"), "--packages", str(tmp_path)]) == 0
