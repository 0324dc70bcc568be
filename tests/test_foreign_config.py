"""A config of another hand: everything that would run is listed, and nothing runs."""

import json

import pytest

from bundle.errors import BundleError
from scripts.checks.foreign_config import CONFIGS, POWERFUL, examine, is_harmless, main


def written(folder, content, name="foreign.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_expressions_are_listed_wherever_they_stand(tmp_path):
    config = {"seed": 0, "run": ["$import os", "@seed"], "a": {"b": [{"_requires_": "$print(1)"}]}}
    found = [(one.item, one.kind, one.text) for one in examine([written(tmp_path, config)])]
    assert found == [("run::0", "expression", "$import os"), ("a::b::0::_requires_", "expression", "$print(1)")]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "run",
        "download_and_extract",
        "ConfigWorkflow",
        "monai.bundle.run",
        "monai.transforms.os.system",
        "monai.transforms.LoadImage",
        "site.addsitedir",
        "bundle.exports.load_exported",
        "monai.bundle.scripts.subprocess.run",
        "bundle.provenance.subprocess.run",
        "bundle.files.os.remove",
        "torch.load",
        "torch.jit.load",
        "torch.nn.modules.module.torch.load",
        ["os.system"],
    ],
)
def test_components_that_may_do_anything_are_listed(tmp_path, target):
    found = examine([written(tmp_path, {"a": {"_target_": target}})])
    assert [(one.item, one.kind) for one in found] == [("a", "component")]


@pytest.mark.parametrize("target", ["torch.optim.Adam", "Compose", "bundle.model.make_detector"])
def test_components_that_compute_are_not(target):
    assert is_harmless(target)


def test_of_the_components_of_this_bundle_only_the_powerful_are_listed():
    components = {one.text for file in CONFIGS.glob("*.json") for one in examine([file]) if one.kind == "component"}
    assert components == set(POWERFUL)


def test_items_of_files_that_are_not_given_are_listed(tmp_path):
    first = written(tmp_path, {"a": f"%{tmp_path}/other.json::a", "b": "%a", "c": f"%{CONFIGS}/train.json::seed"})
    other = written(tmp_path, {"a": 1}, "other.json")
    assert [one.kind for one in examine([first])] == ["item of another file"]
    assert not examine([first, other])


def test_yaml_is_read_as_data(tmp_path):
    assert [one.item for one in examine([written(tmp_path, "a: $b\n", "foreign.yaml")])] == ["a"]
    with pytest.raises(BundleError, match="is no config"):
        examine([written(tmp_path, f"a: !!python/object/apply:os.mkdir ['{tmp_path}/ran']\n", "foreign.yaml")])
    assert not (tmp_path / "ran").exists()


HARMLESS_LOGGING = (CONFIGS / "logging.conf").read_text()


@pytest.mark.parametrize(
    ("section", "line", "kind"),
    [
        ("handler_console", "class=os.system", "component"),
        ("handler_console", "class=FileHandler", "component"),
        ("handler_console", "class=logging.handlers.SocketHandler", "component"),
        ("handler_console", "CLASS=__import__('os').system", "component"),
        ("handler_console", "args=(print('ran'),)", "expression"),
        ("handler_console", "args=(sys.stderr,\n print('ran'))", "expression"),
        ("handler_console", "args=%(harmful)s", "expression"),
        ("handler_console", "kwargs={'stream': open('ran', 'w')}", "expression"),
        ("formatter_brief", "class=foreign.Formatter", "component"),
        ("formatter_brief", "defaults={'x': print('ran')}", "expression"),
        ("DEFAULT", "kwargs={'stream': open('ran', 'w')}", "expression"),
    ],
)
def test_what_a_file_of_logging_would_run_is_listed(tmp_path, section, line, kind):
    key, _, text = line.partition("=")
    sections = f"[DEFAULT]\n{HARMLESS_LOGGING}"  # in which a line for all sections has a place
    others = "\n".join(one for one in sections.splitlines() if not one.startswith(f"{key.lower()}="))
    file = written(tmp_path, others.replace(f"[{section}]", f"[{section}]\n{line}"), "logging.conf")
    assert (f"{section}::{key.lower()}", kind, text.replace("\n ", "\n")) in [one[1:] for one in examine([file])]


@pytest.mark.parametrize("line", ["class=logging.StreamHandler\nargs=( sys.stdout, )", "class=NullHandler\nkwargs={}"])
def test_a_file_of_logging_that_shows_lines_alone_is_harmless(tmp_path, line):
    assert not examine([CONFIGS / "logging.conf"])
    assert not examine([written(tmp_path, f"[handler_a]\n{line}\n[formatter_a]\nclass=Formatter\n", "any.conf")])


def test_the_file_of_logging_that_monai_takes_from_beside_a_config_is_examined(tmp_path):
    config = written(tmp_path, {"a": 1})
    logging = written(tmp_path, "[handler_a]\nclass=os.system\n", "logging.conf")
    assert [(one.file, one.item) for one in examine([config])] == [(logging, "handler_a::class")]
    assert len(examine([config, logging])) == 1


def test_a_file_of_logging_that_a_config_names_is_listed_unless_it_is_given(tmp_path):
    named = written(tmp_path, "", "other.conf")
    arguments = written(tmp_path, {"logging_file": str(named), "run": {"logging_file": str(CONFIGS / "logging.conf")}})
    assert [(one.item, one.kind) for one in examine([arguments])] == [("logging_file", "another file of logging")]
    assert not examine([arguments, named])


def test_factories_of_a_dictionary_of_logging_are_listed(tmp_path):
    handlers = {"handlers": {"a": {"()": "os.system", "command": "true"}}}
    assert [(one.item, one.text) for one in examine([written(tmp_path, handlers)])] == [("handlers::a", "os.system")]


@pytest.mark.parametrize(
    ("name", "content"), [("foreign.json", "{"), ("foreign.json", "[" * 100_000), ("logging.conf", "no section")]
)
def test_what_is_no_config_is_named(tmp_path, name, content, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(written(tmp_path, content, name))])
    assert ended.value.code == 2
    assert "is no config" in capsys.readouterr().err


def test_the_exit_code_says_whether_there_is_anything_to_read(tmp_path, capsys):
    assert main([str(written(tmp_path, {"a": 1}))]) == 0
    assert main([str(written(tmp_path, {"a": "$1\nnothing would run"}))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nothing would run" and lines[1].endswith("a: expression: $1\\nnothing would run")
