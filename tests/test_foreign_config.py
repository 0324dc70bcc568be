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


@pytest.mark.parametrize("content", ["{", "[" * 100_000])
def test_what_is_no_config_is_named(tmp_path, content, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(written(tmp_path, content))])
    assert ended.value.code == 2
    assert "is no config" in capsys.readouterr().err


def test_the_exit_code_says_whether_there_is_anything_to_read(tmp_path, capsys):
    assert main([str(written(tmp_path, {"a": 1}))]) == 0
    assert main([str(written(tmp_path, {"a": "$1\nnothing would run"}))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nothing would run" and lines[1].endswith("a: expression: $1\\nnothing would run")
