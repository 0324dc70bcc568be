"""The zip for MONAI's model zoo: what is in it, and what the checks of its contents find."""

import json
import shutil
import zipfile

import pytest
from commands import IS_CLONE, ROOT

from bundle import NAME, __version__
from bundle.errors import BundleError
from scripts.checks.model_zoo import LARGEST, MODEL, NEEDED, left_behind, main, pack, wrong_files, wrong_version

pytestmark = pytest.mark.skipif(not IS_CLONE, reason="git lists what is packed")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("dist"))


@pytest.fixture
def unpacked(archive, tmp_path):
    shutil.unpack_archive(archive, tmp_path)
    return tmp_path / NAME


def test_the_same_files_give_the_same_bytes(archive, tmp_path):
    assert pack(tmp_path).read_bytes() == archive.read_bytes()
    assert archive.name == f"{NAME}_v{__version__}.zip"


def test_the_zip_is_one_folder_with_what_a_user_needs(archive):
    names = zipfile.ZipFile(archive).namelist()
    assert {name.partition("/")[0] for name in names} == {NAME}
    assert {f"{NAME}/{name}" for name in (*NEEDED, "README.md", "bundle/model.py", "pyproject.toml")} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.split("/")[1] in ("tests", "output", "models")]


def test_of_the_configs_only_the_place_of_the_model_is_another(unpacked):
    for name in (ROOT / "configs").glob("*.json"):
        own, packed = json.loads(name.read_text()), json.loads((unpacked / "configs" / name.name).read_text())
        changed = {key for key in own if own[key] != packed[key]}
        assert changed == ({"checkpoint"} if name.name in ("inference.json", "train.json") else set())


def test_a_model_has_the_place_where_the_zoo_looks(tmp_path):
    (tmp_path / "trained.pt").write_bytes(b"weights")
    with zipfile.ZipFile(pack(tmp_path, tmp_path / "trained.pt")) as archive:
        assert archive.read(f"{NAME}/{MODEL}") == b"weights"
    with pytest.raises(BundleError, match="no model at .*none.pt': give --model"):
        pack(tmp_path, tmp_path / "none.pt")


def test_a_file_that_is_needed_is_missed(unpacked):
    assert wrong_files(unpacked) is None
    (unpacked / "LICENSE").unlink()
    assert wrong_files(unpacked) == "needed, and not there: LICENSE"


def test_a_large_file_must_be_named_as_one(unpacked):
    (unpacked / "models").mkdir()
    with (unpacked / MODEL).open("wb") as file:
        file.truncate(LARGEST + 1)
    assert wrong_files(unpacked) == f"larger than 25 MiB: {MODEL}; name them in large_files.yml"
    (unpacked / "large_files.yml").write_text(f"large_files: [{{path: {MODEL}, url: 'https://example.org/model.pt'}}]")
    assert wrong_files(unpacked) is None


def test_what_was_left_behind_is_named_and_a_model_is_not(archive, unpacked):
    (unpacked / "models").mkdir()
    (unpacked / MODEL).touch()
    assert left_behind(unpacked, archive) is None
    (unpacked / "output").mkdir()
    (unpacked / "output/mlflow.db").touch()
    assert left_behind(unpacked, archive) == "left behind: output/mlflow.db"


@pytest.mark.parametrize(
    ("changed", "words"), [({"version": "0.0.1"}, "the version is 0.0.1"), ({"changelog": {}}, "no entry for")]
)
def test_a_version_without_an_entry_is_found(changed, words):
    metadata = json.loads((ROOT / "configs/metadata.json").read_text())
    assert wrong_version(metadata) is None
    assert words in wrong_version(metadata | changed)


@pytest.mark.slow
def test_the_unpacked_zip_passes_the_checks_of_the_zoo(tmp_path, capsys):
    assert main(["-o", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "all checks passed" in told and "\n! " not in told
    for command in ("download", "verify_metadata", "verify_net_in_out", "ckpt_export"):
        assert f"  monai.bundle {command}" in told
