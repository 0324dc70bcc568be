"""The documentation site, built as ``make docs`` does, and what its pages say of files, messages and modules."""

import ast
import json
import re
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest
from commands import ROOT, environment

from bundle.evaluation import TEST_COLUMNS
from bundle.manifest import FIGURES, FILE, SCORES
from bundle.outputs import TABLES
from bundle.writers import WRITERS

LOADS = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src", "object": "data"}
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site as trees, by their path."""
    from bs4 import BeautifulSoup

    folder = tmp_path_factory.mktemp("site")
    words = [
        "--fail-on-warning",
        "--keep-going",
        "-q",
        "-c",
        "scripts/docs",
        "-d",
        folder / "trees",
        ".",
        folder / "html",
    ]
    command = [sys.executable, "-m", "sphinx", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    files = sorted((folder / "html").rglob("*.html"))
    return folder / "html", {file: BeautifulSoup(file.read_text(encoding="utf-8"), "html.parser") for file in files}


@pytest.mark.slow
def test_no_page_of_the_site_loads_anything_from_elsewhere(site):
    folder, pages = site
    loaded = {one[LOADS[one.name]] for tree in pages.values() for one in tree(LOADS) if one.get(LOADS[one.name])}
    assert loaded
    assert not {link for link in loaded if urlsplit(link).netloc}
    styles = "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.css"))
    assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\s]*", styles)


@pytest.mark.slow
def test_every_link_within_the_site_leads_to_a_page_and_a_place_in_it(site):
    _, pages = site
    places = {file: {one["id"] for one in tree(id=True)} for file, tree in pages.items()}
    broken = []
    for file, tree in pages.items():
        for link in (one["href"] for one in tree("a", href=True)):
            path, anchor = unquote(urlsplit(link).path), unquote(urlsplit(link).fragment)
            if urlsplit(link).scheme or link.endswith("#"):
                continue
            target = (file.parent / path).resolve() if path else file
            if not target.is_file() or (anchor and target in places and anchor not in places[target]):
                broken.append((file.name, link))
    assert broken == []


@pytest.mark.slow
def test_notebooks_are_shown_with_what_they_found_and_formulas_are_drawn_by_the_browser(site):
    folder, pages = site
    for notebook in NOTEBOOKS:
        assert len(pages[folder / f"docs/notebooks/{notebook.stem}.html"].select("div.cell_output img")) >= 3
    density = pages[folder / "docs/density.html"]
    assert len(density("math", display="block")) == page("density.md").count("\n$$\n") // 2
    assert "$$" not in density.get_text()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_kept_without_outputs(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_the_index_has_every_page_once():
    index = page("README.md").partition("\n# ")[0]
    linked = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", index, re.M)
    pages = [file.name for file in (ROOT / "docs").glob("*.md") if file.name != "README.md"]
    above = ["../README.md", "../CHANGELOG.md", "../CONTRIBUTING.md", "../SECURITY.md"]
    assert sorted(linked) == sorted([*pages, *above, *(f"notebooks/{file.name}" for file in NOTEBOOKS)])


def test_the_pages_from_docstrings_have_every_module_once():
    text = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs/api").glob("*.md"))
    files = (file.relative_to(ROOT) for file in (ROOT / "bundle").rglob("*.py") if file.name != "__init__.py")
    lines = [f"- [{'.'.join(file.with_suffix('').parts)}](../../{file.as_posix()})" for file in files]
    assert sorted(re.findall(r"^- .*$", text, re.M)) == sorted(lines)


def fields(heading):
    """The names in the first column of the table below a heading of the page of outputs."""
    section = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page("outputs.md"), re.M | re.S)[1]
    return [name for cell in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.file)
def test_the_page_of_outputs_has_every_column_of_a_table_of_inference(table):
    assert tuple(fields(table.file)) == table.columns


def test_the_page_of_outputs_has_every_column_of_the_test_scores():
    assert tuple(fields(SCORES)) == TEST_COLUMNS
    assert {*FIGURES, SCORES} < set(fields("Training and evaluation"))


def test_the_page_of_outputs_has_every_file_that_a_writer_may_leave():
    written = {suffix for writer in WRITERS for suffix in writer.suffixes}
    assert {name.removeprefix("NAME").removesuffix("/") for name in fields("Inference")} == written
    assert fields(FILE) == ["tables", "results"]


def test_the_page_of_outputs_has_every_file_and_key_of_a_training(trained):
    folder, _ = trained
    report = json.loads((folder / "metrics.json").read_text())
    assert fields("metrics.json") == list(report)
    assert fields("protocol") == list(report["protocol"])
    left = {file.name for file in folder.iterdir()}
    named = {name.removesuffix("/") for name in fields("Training and evaluation")}
    assert named - {"training_state.pt"} == left


def test_the_program_on_the_page_for_python_runs(trained):
    program = re.search(r"```python\n(.*?)```", page("api.md"), re.S)[1]
    made = {}
    exec(program.replace("output/model.pt", str(trained[0] / "model.pt")), made)
    assert made["mask"].shape == (1, 1, 240, 240) and made["anomalous"].shape == (1,)


def templates():
    """All texts in the code, with … in the place of values."""
    found = []
    for file in [*(ROOT / "bundle").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        getattr(part, "value", "") if isinstance(part, ast.Constant) else "…" for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_message_that_is_explained_is_one_of_the_code():
    known = templates()
    messages = re.findall(r"^\| `([^`]+)` \|", page("troubleshooting.md").partition("## Without")[0], re.M)
    assert len(messages) > 40
    assert [message for message in messages if not any(message in text for text in known)] == []
