"""What the documentation says exists: links, commands, knobs."""

import importlib.util
import re
import shlex

import pytest
from commands import ROOT

from bundle import __version__
from bundle.command_line import find_knob, read_config
from bundle.model import known_settings
from scripts.docs.knobs import PAGE, TABLES, filled, knobs_in, meanings, table

PAGES = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
LINKS = re.compile(r"\]\(([^)\s]+)\)")
OPTIONS = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
SCRIPTS = re.compile(r"python -m (scripts(?:\.\w+)+)")
OLD = "| `python -m scripts."  # rows of the changelog that tell an old name and its new one
MONAIS = {
    *("config_file", "meta_file", "args_file", "logging_file"),
    *("net_id", "filepath", "ckpt_file", "input_shape", "dynamic_batchsize"),
}


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page):
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    found = []
    for link in LINKS.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        if link.startswith(("http://", "https://")):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_a_heading(name):
    assert broken_links(ROOT / name) == []


def test_a_link_without_a_file_or_a_heading_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](#one-two) [b](#one) [c](page.md#one-two) [d](other.md)\n")
    assert broken_links(page) == ["#one", "other.md"]


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 150


@pytest.mark.parametrize("command", ["make train", "make test", 'pip install -e ".[test]"'])
def test_the_readme_has_the_commands_of_a_newcomer(command):
    assert command in text_of("README.md")


@pytest.mark.parametrize("name", NAMES)
def test_every_script_that_is_named_exists(name):
    lines = [line.split("|")[2] if line.strip().startswith(OLD) else line for line in text_of(name).splitlines()]
    missing = {module for module in SCRIPTS.findall("\n".join(lines)) if importlib.util.find_spec(module) is None}
    assert not missing


def commands_in(name):
    """The commands in a page's blocks of code, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", text_of(name), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [(name, words) for name in NAMES for words in commands_in(name) if "monai.bundle" in words]


def files_of(words):
    """The configs of a command of MONAI."""
    given = words[words.index("--config_file") + 1]
    return re.findall(r"configs/\w+\.json", given)


@pytest.mark.parametrize(("name", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[-1])
def test_every_knob_of_a_command_is_one_of_its_configs(name, words):
    config = read_config(files_of(words))
    own = {"precision"} if "trt_export" in words else set()
    for word in words[words.index("monai.bundle") :]:
        if word.startswith("--") and (knob := word[2:].partition("=")[0]) not in MONAIS | own:
            find_knob(knob, config)


@pytest.fixture(scope="module")
def options():
    """All knobs of all configs, and all options of all scripts."""
    files = [*(ROOT / "scripts").rglob("*.py"), ROOT / "tests/kills.py", ROOT / "tests/disks.py"]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    options_of_scripts = set(re.findall(r"\"--(\w+)\"", sources))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        knobs = {knob for made in TABLES.values() for knob in made()}
    return knobs | options_of_scripts | MONAIS | {"model"}


OF_MLFLOW = {"serve-artifacts", "backend-store-uri", "env-manager"}
OF_TORCHRUN = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts"}
OF_OTHERS = {"platform", "output", "local-dir", "check", "help"}  # monai-deploy, curl, hf, ruff, any script
ELSEWHERE = OF_MLFLOW | OF_TORCHRUN | OF_OTHERS


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_every_option_that_a_page_names_is_one_of_a_config_or_a_script(name, options):
    without_diagrams = re.sub(r"```\n.*?```", "", text_of(name), flags=re.S)
    assert set(OPTIONS.findall(without_diagrams)) - options - ELSEWHERE == set()


def test_the_page_of_knobs_is_what_the_configs_make_of_it():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "run python -m scripts.docs.knobs and write the meaning of new knobs"


@pytest.mark.parametrize("name", TABLES)
def test_every_knob_has_a_meaning(name):
    page = PAGE.read_text(encoding="utf-8").split(f"<!-- knobs: {name} -->\n\n")[1]
    written = meanings(page.split("\n\n")[0].splitlines())
    assert [knob for knob in TABLES[name]() if not written[knob]] == []


def test_a_new_knob_gets_a_row_and_what_was_written_stays():
    page = PAGE.read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `seed` |"))
    assert "| `seed` | a whole number | `0` |  |" in filled(page.replace(row + "\n", ""))
    assert row in filled(page.replace("| `seed` | a whole number | `0` |", "| `seed` | text | `9` |"))


def test_every_setting_and_every_plain_item_of_a_config_is_on_the_page():
    assert TABLES["model"]().keys() == known_settings().keys()
    assert {"mask_rule", "cache_dir", "device", "tracking_uri"} <= knobs_in("configs/train.json").keys()
    assert not {"network", "tracker", "training", "model_file"} & knobs_in("configs/inference.json").keys()


def test_the_table_names_types_and_paths_in_words():
    rows = table(knobs_in("configs/inference.json"), {"seed": "Of chance."})
    assert "| `seed` | a whole number | `0` | Of chance. |" in rows
    assert "| `checkpoint` | text | `output_dir/model.pt` |  |" in rows


def test_the_tree_has_every_module_of_the_bundle_once():
    tree = text_of("docs/architecture.md").split("```")[1].partition("configs/")[0]
    modules = [path.name for path in (ROOT / "bundle").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(re.findall(r"\w+\.py", tree)) == sorted(modules)


def test_the_citation_has_the_version_of_the_package():
    assert f"version: {__version__}\n" in text_of("CITATION.cff")
    assert f"## [{__version__}]" in text_of("CHANGELOG.md")
