"""The console command: purposes made of the bundle's own configs, help without waiting, and a look at the machine."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment, error_line

import bundle.browse
import bundle.report.copying
from bundle.networks.backbones import BACKBONES
from bundle.networks.context import CONTEXTS
from bundle.networks.weights import AUTO
from scripts.launcher import console, doctor
from scripts.launcher.console import PURPOSES, main
from scripts.launcher.knobs_page import knob_lines

COMMAND = [sys.executable, "-c", "from scripts.launcher.console import main; main()"]


def dinov3_spatial_ar(*words, cwd, **variables):
    env = environment(PYTHONPATH=str(ROOT), **variables)
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("name", PURPOSES)
def test_a_purpose_is_a_command_of_configs_with_knobs_in_the_docs(name):
    purpose = PURPOSES[name]
    items = {}
    for config in purpose.configs:
        items |= json.loads((ROOT / "configs" / config).read_text())
    assert purpose.command in items
    for table in purpose.tables:
        lines = knob_lines(table)
        assert lines and all(line.name and line.kind and line.meaning for line in lines)
        assert not re.search(r"`|\]\(", "".join(line.meaning for line in lines))


@pytest.mark.parametrize("name", PURPOSES)
def test_help_names_every_knob_of_the_purpose_on_a_narrow_terminal(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for knob in knob_lines(PURPOSES[name].tables[0]):
        assert f"--{knob.name}" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("  --")) < 80
    assert "not a medical device" in re.sub(r"\s+", " ", text)


def test_help_imports_none_of_the_large_libraries():
    code = "import sys\ntry:\n    from scripts.launcher.console import main; main(['train', '--help'])\nfinally:\n    "
    code += "print([name for name in ('torch', 'monai', 'numpy', 'mlflow', 'bundle') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """What a real bash offers for the last word of a command line, in a folder with a file and a folder."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "model.pt").touch()
    (folder / "studies").mkdir()
    with (folder / "completion.sh").open("w") as script, contextlib.redirect_stdout(script):
        main(["completion", "bash"])

    def offered(*words):
        line = shlex.join(["dinov3_spatial_ar", *words])
        asked = f"source completion.sh; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_dinov3_spatial_ar; "
        asked += "printf '%s\\n' \"${COMPREPLY[@]}\""
        bash = subprocess.run(["bash", "-c", asked], cwd=folder, capture_output=True, text=True, check=True)
        return set(bash.stdout.split())

    return offered


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["e"], {"evaluate", "examine", "export"}),
        (["train", "--max_"], {"--max_epochs", "--max_voxels"}),
        (["infer", "studies", "--device", "cpu", "--worst"], {"--worst_slices"}),
        (["train", "--mode"], {"--mode"}),
        (["train", "--mode", ""], set(CONTEXTS)),
        (["train", "data", "--backbone", ""], {"auto", *BACKBONES}),
        (["train", "--standardize", ""], {"true", "false"}),
        (["infer", "--cut_plane", ""], {"axial", "coronal", "sagittal", "null"}),
        (["train", "--hidden_channels", ""], set()),
        (["infer", "--model", "m"], {"model.pt"}),
        (["infer", "-o", ""], {"studies"}),
        (["examine", "st"], {"studies"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
    ],
)
def test_bash_completes_purposes_knobs_choices_and_files(completed, words, offered):
    assert completed(*words) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_completion_of_every_knob(shell, capsys):
    main(["completion", shell])
    text = capsys.readouterr().out
    assert all(knob.name in text for purpose in PURPOSES.values() for knob in knob_lines(purpose.tables[0]))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def passed_on(monkeypatch, words):
    given = []
    monkeypatch.setattr(console, "run_bundle", given.extend)
    main(words)
    return given


@pytest.mark.parametrize(
    ("words", "passed"),
    [
        (["train"], ["training", "--config_file", "['train.json']"]),
        (
            ["train", "a folder", "--config", "paper.json", "--max_epochs=3", "-o", "out"],
            [
                *("training", "--config_file", "['train.json', 'paper.json']", "--dataset_dir=a folder"),
                *("--output_dir=out", "--max_epochs=3"),
            ],
        ),
        (
            ["evaluate", "data", "--model", "m.pt"],
            [
                *("evaluating", "--config_file", "['train.json', 'evaluate.json']", "--dataset_dir=data"),
                "--checkpoint=m.pt",
            ],
        ),
        (
            [
                "examine",
                "a folder",
                "--device",
                "cpu",
                "-o",
                "out",
                "--model",
                "m.pt",
                "--series_description=(?i)flair",
            ],
            [
                *("inferring", "--config_file", "['inference.json', 'examine.json']", "--dataset_dir=a folder"),
                *("--output_dir=out", "--checkpoint=m.pt", "--device", "cpu", "--series_description=(?i)flair"),
            ],
        ),
        # data behind a knob go on as they stand, and the bundle says that they belong to none
        (
            ["infer", "--device", "cpu", "x"],
            ["inferring", "--config_file", "['inference.json']", "--device", "cpu", "x"],
        ),
        (
            ["export", "--formats", "onnx"],
            [
                *("exporting", "--config_file", "['inference.json', 'export.json']", "--formats", "onnx"),
            ],
        ),
    ],
)
def test_a_command_line_becomes_that_of_the_bundle(monkeypatch, words, passed):
    assert passed_on(monkeypatch, words) == ["run", *passed]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["examine", "-o", "out", "--model", "m"], "give FOLDER first"),
        (["examine", "study", "-o", "out"], "--model"),
        (["examine", "study", "--model", "m"], "--output_dir"),
        (["export", "data"], "'data' belongs to no knob"),
        (["tarin"], "invalid choice: 'tarin'"),
        (["doctor", "--device", "cpu"], "'--device' is unknown"),
        ([], "PURPOSE"),
    ],
)
def test_a_command_line_that_lacks_something_says_what(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_browse_shows_a_folder_and_takes_nothing_else(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bundle.browse, "browse", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(sys, "path", list(sys.path))
    main(["browse", "out", "--no_browser", "--port", "5001"])
    assert asked == [(Path("out"), False, 5001)]
    with pytest.raises(SystemExit):
        main(["browse", "out", "--device", "cpu"])
    assert "'--device' is unknown" in capsys.readouterr().err


def test_report_opens_a_copy_without_names(monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(bundle.report.copying, "reports_in", lambda places: [tmp_path / places[0]])
    monkeypatch.setattr(bundle.report.copying, "copy_report", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(bundle.report.copying, "show_reports", lambda *arguments: done.append(arguments))
    main(["report", "out", "-o", "copy.html", "--hide_names", "--limit_mb", "3", "--no_browser"])
    assert done == [(tmp_path / "out", Path("copy.html"), 3.0, True), (["copy.html"], False)]


def test_report_says_in_one_line_that_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="error: no report at '.*': give the output_dir"):
        main(["report", str(tmp_path)])


@pytest.mark.slow
def test_errors_come_without_what_monai_says_of_itself(tmp_path):
    done = dinov3_spatial_ar("infer", "images", "--model", "none.pt", cwd=tmp_path)
    assert error_line(done).startswith("error: no checkpoint at 'none.pt'")
    assert done.stdout + done.stderr == error_line(done) + "\n"


@pytest.mark.slow
def test_the_notice_on_configs_stays_where_the_user_gives_one(tmp_path):
    (tmp_path / "mine.json").write_text("{}")
    done = dinov3_spatial_ar("infer", "images", "--model", "none.pt", "--config", "mine.json", cwd=tmp_path)
    assert "Only proceed if this config is from a source you trust" in done.stderr


@pytest.mark.slow
def test_the_doctor_says_what_works_here(tmp_path):
    done = dinov3_spatial_ar("doctor", cwd=tmp_path, BACKBONE_WEIGHTS="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all that is needed works" in done.stdout
    for name in AUTO:
        assert f"weights   {name}: " in done.stdout
    assert re.search(r"trial     a picture gave its map in \d", done.stdout)
    assert not list(tmp_path.iterdir()) and not done.stderr


def test_the_doctor_names_weights_that_cannot_be_used(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("BACKBONE_WEIGHTS", str(tmp_path / "gone"))
    monkeypatch.setattr(doctor, "_trial", lambda root, backbone: doctor.Finding("trial", "made elsewhere"))
    assert doctor.doctor(ROOT) == 1
    text = capsys.readouterr().out
    assert "! weights   dinov3_vits16: BACKBONE_WEIGHTS is" in text and "which is no folder" in text
    assert "2 of" in text and "need a remedy" in text


def test_the_doctor_names_packages_of_other_versions(monkeypatch):
    versions = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.1" if name == "torch" else versions(name))
    finding, *_ = doctor._packages()
    assert not finding.is_well and "torch 0.1, needs" in finding.says
