"""Pictures and pages of benchmarks are what the numbers beside them give."""

import shutil

import pytest
from commands import ROOT
from PIL import Image

from scripts.benchmarks.redraw import KINDS, main, numbers, page_of

FILES = numbers([ROOT / "docs"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT / "docs").as_posix())
def test_a_page_says_what_the_numbers_beside_it_say(file):
    page = page_of(file)
    assert page is None if "version_0.5" in file.parts else page == file.with_suffix(".md").read_text()


def test_every_picture_beside_numbers_is_drawn_from_them_and_no_other_is_made(tmp_path, capsys):
    drawn = {file.parent / name for file in FILES for name in KINDS[file.stem].pictures}
    there = {path for folder in ("benchmark", "performance") for path in (ROOT / "docs" / folder).rglob("*.png")}
    assert there <= drawn
    for name in ("version_0.5", "peers_50"):
        shutil.copytree(ROOT / "docs/benchmark" / name, tmp_path / name, ignore=shutil.ignore_patterns("[ap]*"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    picture = tmp_path / "version_0.5/benchmark_bars.png"
    Image.new("RGB", (8, 8)).save(picture)
    main([str(tmp_path)])
    assert str(picture) in capsys.readouterr().out
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before.keys()
    assert Image.open(picture).size == Image.open(ROOT / "docs/benchmark" / picture.relative_to(tmp_path)).size
    assert all(path.read_bytes() == before[path] for path in before if path.suffix in (".md", ".json"))
