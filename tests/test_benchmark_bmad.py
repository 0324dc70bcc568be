"""The benchmark on a tiny set in BMAD's layout: what it measures, what it does not measure again, what it refuses.

Needs the extra dependency anomalib.
"""

import json
import os
import shutil
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from bundle.errors import BundleError
from bundle.networks.backbones import BACKBONES
from scripts.benchmarks.bmad import (
    benchmark,
    describe_set,
    family_of,
    find_sets,
    load_config,
    main,
    make_parser,
    make_recipe,
    read_set,
    run_cell,
    set_folders,
    suits,
)
from scripts.benchmarks.cells import last_words, measured
from scripts.benchmarks.common import METRICS
from scripts.benchmarks.figures import REFERENCE, label_points, picture_words
from scripts.benchmarks.report import differs_from_bmad, summarize, write_report

ROOT = Path(__file__).parents[1]
CONFIG = load_config(ROOT / "configs/benchmark.json")
PAPER = "paper's architecture on our features"
KNOBS = {"backbone": "efficientnet_lite0", "image_size": 64, "hidden_channels": 8, "max_epochs": 1, "device": "cpu"}
SPELLINGS = [(name, folder) for name, one in CONFIG["sets"].items() for folder in one["folders"]]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def tiny_set(folder, masks=True):
    """Healthy stripes with noise: 6 to learn from, 2 to validate; to test 2 healthy ones and 2 with a bright box."""
    random = np.random.default_rng(0)
    stripes = 80 + 40 * (np.arange(64) // 8 % 2)
    for place, count in {"train/good": 6, "valid/good/img": 2, "test/good/img": 2, "test/Ungood/img": 2}.items():
        (folder / place).mkdir(parents=True)
        for index in range(count):
            image, box = stripes + random.normal(0, 5, (64, 64)), np.zeros((64, 64), np.uint8)
            if "Ungood" in place:
                box[20:40, 24:48] = 255
                image[box > 0] = 230
                if masks:
                    (folder / "test/Ungood/label").mkdir(exist_ok=True)
                    Image.fromarray(box).save(folder / f"test/Ungood/label/{index}.png")
            Image.fromarray(image.astype(np.uint8)).save(folder / place / f"{index}.png")
    return folder


def arguments(data, out, *words):
    common = ["--data", str(data), "--out", str(out), "--knobs", json.dumps(KNOBS)]
    return make_parser().parse_args([*common, "--timed_images", "3", "--repeats", "2", "--batch_size", "2", *words])


def times_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    """One method of ours and one peer, on a folder that is named as BMAD's set of brains."""
    pytest.importorskip("anomalib", reason='pip install -e ".[benchmark]"')
    folder = tmp_path_factory.mktemp("bmad")
    tiny_set(folder / "data/Brain_AD/BraTS2021_slice")
    words = ["--methods", "ours", "PaDiM", "--protocols", "native", "--part", "all"]
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        results = benchmark(arguments(folder / "data", folder / "out", *words))
    finally:
        os.chdir(here)
    page = write_report(results, folder / "out")
    return folder, results, page


def test_a_page_without_times_has_none(measured_run, tmp_path):
    folder, _, timed = measured_run
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        words = ["--methods", "ours", "PaDiM", "--protocols", "native", "--part", "all", "--repeats", "0"]
        results = benchmark(arguments(folder / "data", folder / "out", *words))
    finally:
        os.chdir(here)
    page = write_report(results, tmp_path)
    assert "ms per image: not measured" in page and "runtime" in timed and "runtime" not in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["benchmark.json", "benchmark.md", "benchmark_bars.png"]


def test_both_methods_are_measured_alike(measured_run):
    _, results, page = measured_run
    assert results["failed"] == {}
    rows = {row["method"]: row for row in results["sets"]["Brain"]["rows"]}
    assert list(rows) == ["ours", "PaDiM"]
    for row in rows.values():
        accuracy = row["accuracy"]["native"]
        assert all(0 <= accuracy[metric][0] <= 1 for metric in accuracy)
        assert row["ms"] > 0
        assert 200 < row["peak_mb"][0] < 5000
    assert rows["ours"]["times_reference"] == 1
    padim_numbers = 16 * (100 + 100 * 100)  # at each of 4 x 4 positions a mean and an inverse covariance
    assert abs(rows["PaDiM"]["stored_mb"][0] - padim_numbers * 4 / 1e6) < 0.01
    assert "| ours | native size, mask `>0` |" in page
    assert "| PaDiM | native size, mask `>0` |" in page
    assert "python -m scripts.benchmarks.bmad" in page


def test_numbers_from_the_tables_of_all_images_are_those_of_the_bundle(measured_run):
    results = measured_run[1]
    for row in results["sets"]["Brain"]["rows"]:
        for metric in METRICS:
            assert row["accuracy"]["native"][metric][0] == pytest.approx(row["whole"]["native"][metric][0], abs=1e-4)


def test_the_page_says_how_sure_each_number_and_each_difference_is(measured_run):
    page = measured_run[2]
    assert "Reported on **all** test images, 2 healthy and 2 anomalous" in page
    assert "Ahead of **ours**, in points, on the same draws of test images:" in page
    (row,) = [line for line in page.splitlines() if line.startswith("| PaDiM | native") and "+" in line]
    assert row.count("[") == len(METRICS)


def test_page_numbers_and_figures_are_written(measured_run):
    out = measured_run[0] / "out"
    assert (out / "benchmark.md").read_text() == measured_run[2]
    assert json.loads((out / "benchmark.json").read_text())["sets"]["Brain"]["rows"]
    for name in ("benchmark_bars.png", "benchmark_runtime.png"):
        assert min(Image.open(out / name).size) > 200


def test_published_rows_stand_beside_the_measured_ones(measured_run):
    lines = measured_run[2].splitlines()
    published = next(index for index, line in enumerate(lines) if line.startswith("| PaDiM | published | 129 |"))
    assert lines[published].endswith("| 83.59 / 7.02 |")
    assert lines[published + 1].startswith("| PaDiM | **measured** |")
    assert any(line.startswith("| RD4AD | published | 117 | 97.85 / 52.98 |") for line in lines)
    assert any(line.startswith("| ours | **measured** |") for line in lines)
    assert "**These are not the images of BMAD's set**, which has 7500 / 83 / 3715" in measured_run[2]


def test_a_second_run_measures_nothing_again(measured_run):
    folder, results, _ = measured_run
    before = times_of(folder / "out/cells")
    words = ["--methods", "ours", "PaDiM", "--protocols", "native", "--part", "all"]
    again = benchmark(arguments(folder / "data", folder / "out", *words))
    assert times_of(folder / "out/cells") == before
    assert again["sets"]["Brain"]["times"] == results["sets"]["Brain"]["times"]


def test_a_further_protocol_scores_the_same_model(measured_run):
    folder = measured_run[0]
    cell = folder / "out/cells/Brain/PaDiM/seed-0"
    before = times_of(cell)
    data_set = read_set("Brain", folder / "data/Brain_AD/BraTS2021_slice")
    recipe = make_recipe(CONFIG, "PaDiM", data_set, 0, KNOBS)
    protocols = {name: CONFIG["protocols"][name] for name in ("native", "paper240_255")}
    result = run_cell(cell, recipe, protocols, data_set, folder / "out/feature_cache")
    assert set(result["protocols"]) == set(protocols)
    assert times_of(cell)[cell / "model.pt"] == before[cell / "model.pt"]
    protocol = json.loads((cell / "paper240_255/metrics.json").read_text())["protocol"]
    assert (protocol["size"], protocol["mask_rule"]) == (240, "==255")


@pytest.mark.parametrize(("name", "folder"), SPELLINGS)
def test_every_spelling_of_bmad_is_found(tmp_path, name, folder):
    for split in ("train", "test"):
        (tmp_path / "BMAD" / folder / split).mkdir(parents=True)
    found = tmp_path / "BMAD" / folder
    assert find_sets([tmp_path / "BMAD"], CONFIG, None) == {name: found}
    assert find_sets([tmp_path / "BMAD"], CONFIG, [name]) == {name: found}
    assert find_sets([found], CONFIG, None) == {name: found}


def test_sets_are_found_as_their_archives_unpack(tmp_path):
    places = {"Liver": "Liver_AD/Train/hist_DIY", "Brain": "brain_ad/BraTS2021_slice", "RESC": "Retina_RESC_AD/RESC"}
    for place in places.values():
        for split in ("train", "valid", "test"):
            (tmp_path / place / split / "good").mkdir(parents=True)
    assert find_sets([tmp_path], CONFIG, None) == {name: tmp_path / places[name] for name in ("Brain", "Liver", "RESC")}
    assert len(list(set_folders(tmp_path))) == 3


def test_a_set_may_be_where_we_are_or_behind_a_link(tmp_path, monkeypatch):
    tiny_set(tmp_path / "elsewhere")
    (tmp_path / "BMAD").mkdir()
    (tmp_path / "BMAD/Liver").symlink_to(tmp_path / "elsewhere")
    assert list(find_sets([tmp_path / "BMAD"], CONFIG, None)) == ["Liver"]
    monkeypatch.chdir(tiny_set(tmp_path / "Brain"))
    assert find_sets([Path()], CONFIG, None) == {"Brain": Path()}


def test_any_data_set_in_the_layout_is_taken_by_the_name_of_its_folder(tmp_path):
    folder = tiny_set(tmp_path / "my hospital")
    assert find_sets([folder], CONFIG, None) == {"my hospital": folder}
    found = read_set("my hospital", folder)
    assert found.counts == {"training": 6, "validation": 2, "test": 4}


def test_anomalous_validation_images_are_not_counted_as_used(tmp_path):
    folder = tiny_set(tmp_path / "set")
    shutil.copytree(folder / "test/Ungood", folder / "valid/Ungood")
    found = read_set("set", folder)
    assert found.counts == {"training": 6, "validation": 2, "test": 4}
    assert found.listed == {"training": 6, "validation": 4, "test": 4}


def test_a_set_is_bmads_if_all_its_images_are_there_anomalous_validation_images_too(tmp_path):
    folder = tiny_set(tmp_path / "Liver")
    config = {"sets": {"Liver": {"images": {"training": 6, "validation": 4, "test": 4}}}}
    assert differs_from_bmad(describe_set(read_set("Liver", folder), config))
    shutil.copytree(folder / "test/Ungood", folder / "valid/Ungood")
    assert not differs_from_bmad(describe_set(read_set("Liver", folder), config))


def test_without_bmad_the_download_is_said_in_one_line(tmp_path, monkeypatch):
    words = ["benchmark_bmad", "--data", str(tmp_path / "BMAD"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    message = str(ended.value)
    assert message.startswith("error: no Brain or Liver or RESC")
    assert "https://github.com/DorisBao/BMAD" in message
    assert str(tmp_path / "BMAD/Brain") in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def test_a_set_that_is_asked_for_must_be_there_and_others_may_be_missing(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "RESC" / split).mkdir(parents=True)
    assert list(find_sets([tmp_path], CONFIG, None)) == ["RESC"]
    assert "left out: Brain, Liver, OCT2017, Chest, Camelyon16" in capsys.readouterr().err
    with pytest.raises(BundleError, match="no Liver in .*: download it from"):
        find_sets([tmp_path], CONFIG, ["RESC", "Liver"])


def test_sets_that_are_asked_for_may_lie_in_several_places(tmp_path):
    for place in ("here/RESC", "there/Liver", "mine"):
        for split in ("train", "test"):
            (tmp_path / place / split).mkdir(parents=True)
    roots = [tmp_path / "here", tmp_path / "there"]
    assert list(find_sets(roots, CONFIG, ["Liver", "RESC"])) == ["RESC", "Liver"]
    assert list(find_sets([*roots, tmp_path / "mine"], CONFIG, None)) == ["RESC", "Liver", "mine"]


def test_two_folders_of_one_set_are_refused(tmp_path):
    for name in ("RESC", "RESC_AD"):
        for split in ("train", "test"):
            (tmp_path / name / split).mkdir(parents=True)
    with pytest.raises(BundleError, match="are both the set RESC"):
        find_sets([tmp_path], CONFIG, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "PatchCor"], "method 'PatchCor' is unknown: did you mean 'PatchCore'"),
        (["--sets", "Livr"], "set 'Livr' is unknown: did you mean 'Liver'"),
        (["--protocols", "paper_240"], "protocol 'paper_240' is unknown: did you mean 'paper240'"),
        (
            ["--knobs", json.dumps({**KNOBS, "max_epoch": 1}), "--methods", "ours"],
            "knob --max_epoch is unknown: did you mean 'max_epochs'",
        ),
        (["--part", "reports"], "part 'reports' is unknown: did you mean 'report'"),
        (["--config", "pyproject.toml"], "cannot read --config 'pyproject.toml'"),
    ],
)
def test_what_is_misspelled_is_refused_with_the_closest_name(tmp_path, words, message):
    with pytest.raises(BundleError, match=message):
        benchmark(arguments(tiny_set(tmp_path / "set"), tmp_path / "out", *words))


def test_the_paper_is_its_overlay_and_smaller_on_efficientnet(tmp_path):
    data_set = read_set("RESC", tiny_set(tmp_path / "RESC"))
    dinov3 = {"backbone": "dinov3_vits16", "weights": "random"}
    paper = make_recipe(CONFIG, f"{PAPER}, dilated", data_set, 0, dinov3)
    assert paper["configs"] == ["configs/paper.json"]
    assert paper["knobs"] == {**dinov3, "dilations": [4] * 5}
    small = make_recipe(CONFIG, f"{PAPER}, dilated", data_set, 0, {"backbone": "efficientnet_lite0"})
    assert small["configs"] == ["configs/paper.json"]
    assert (small["knobs"]["hidden_channels"], small["knobs"]["image_size"]) == (128, 320)


@pytest.mark.parametrize("network", ["standard", "dilated"])
def test_the_papers_network_with_our_score_differs_from_the_default_in_network_and_training_alone(tmp_path, network):
    data_set = read_set("Camelyon16", tiny_set(tmp_path / "Camelyon16"))
    ours = make_recipe(CONFIG, "ours", data_set, 0, {"backbone": "efficientnet_lite0"})
    paper = make_recipe(CONFIG, f"{PAPER}, {network}", data_set, 0, {"backbone": "efficientnet_lite0"})
    mixed = make_recipe(CONFIG, f"{PAPER}, {network}, our score", data_set, 0, {"backbone": "efficientnet_lite0"})
    assert mixed["configs"] == ours["configs"] == []
    assert mixed["knobs"]["per_position"] is ours["knobs"]["per_position"] is False
    added = mixed["knobs"].keys() - ours["knobs"].keys()
    assert not added & {"covariance", "score_scale", "residual_pooling", "image_score", "standardize"}
    of_both = {**json.loads((ROOT / "configs/paper.json").read_text())["+model"], **paper["knobs"]}
    for name in ("mode", "kernel_size", "dilations", "hidden_channels", "linear_components"):
        assert mixed["knobs"][name] == of_both[name]


def test_methods_for_other_backbones_are_left_out():
    lite, vit = ({"backbone": name, "weights": "random"} for name in ("efficientnet_lite0", "dinov2_vits14"))
    peers = ["AnomalyDINO, masking", "Dinomaly", "INP-Former", "SuperADD"]
    assert [name for name in CONFIG["methods"] if not suits(CONFIG["methods"][name], lite)] == peers
    assert all(suits(method, vit) for method in CONFIG["methods"].values())


def test_knobs_of_the_user_win_over_those_of_the_method_and_these_over_the_set(tmp_path):
    data_set = read_set("RESC", tiny_set(tmp_path / "RESC"))
    given = {"backbone": "efficientnet_lite0"}

    def size(method, **knobs):
        return make_recipe(CONFIG, method, data_set, 0, {**given, **knobs})["knobs"]["image_size"]

    assert size("ours") == [224, 448]
    assert size("ours, causal") == [224, 448]
    assert size("ours, 448 pixels") == 448
    assert size("ours, 448 pixels", image_size=64) == 64


def test_a_method_that_is_like_another_has_its_knobs_and_its_own():
    dilated, pooled = (CONFIG["methods"][f"{PAPER}, dilated{words}"] for words in ("", ", pooled embeddings"))
    assert dilated["efficientnet"] == CONFIG["methods"][f"{PAPER}, standard"]["efficientnet"]
    assert dilated["configs"] == pooled["configs"] == ["configs/paper.json"]
    assert pooled["knobs"] == {"dilations": [4] * 5, "feature_pooling": 3}
    assert dilated["published"] == "the paper, dilated"
    assert "published" not in pooled


VIT_DEPTHS = {"vits": 12, "vitb": 12, "vitl": 24, "vith": 32, "vitg": 40, "vit7b": 40, "rad_dino": 12}
DEPTHS = {**VIT_DEPTHS, "convnext": 4, "efficientnet": 7}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["ours, last stage only", "ours, three stages"])
def test_ablations_of_stages_know_every_backbone_and_reach_its_last_blocks(backbone, method):
    depth = next(depth for word, depth in DEPTHS.items() if word in backbone)
    layers = [layer % depth for layer in family_of(CONFIG["methods"][method], backbone)["knobs"]["layers"]]
    assert layers == sorted(set(layers))
    assert depth / 2 < max(layers) < depth


def compared(cells):
    """What the comparison says of cells that were not measured."""
    rows = {
        name: {
            metric: {
                "seeds": [one["protocols"]["native"][metric] for one in seeds],
                "interval": [0.4, 0.9] if seeds[0]["protocols"]["native"][metric] else None,
                "difference": None,
            }
            for metric in METRICS
        }
        for name, seeds in cells.items()
    }
    return {"native": {"images": {"healthy": 3, "anomalous": 4}, "rows": rows}}


@pytest.fixture
def without_times_and_tables(monkeypatch):
    monkeypatch.setattr("scripts.benchmarks.bmad.run_times", lambda *_: None)
    monkeypatch.setattr("scripts.benchmarks.bmad.compare_cells", lambda *_: {})


def cell(method, seed, pixel=0.9, image=0.8):
    values = {"pixel_auroc": pixel, "pixel_ap": pixel, "aupro": pixel, "image_auroc": image, "image_ap": image}
    recipe = {"method": method, "seed": seed, "configs": [], "knobs": {"max_epochs": 1}}
    numbers = {"peak_mb": 500.0, "stored_mb": 2.0, "seconds": 3.0, "model": "bundle, backbone, weights"}
    return {"recipe": recipe, "protocols": {"native": values}, **numbers}


def test_seeds_become_mean_and_deviation():
    cells = [cell("PaDiM", 0, pixel=0.5), cell("PaDiM", 1, pixel=0.7)]
    times = {"seconds": {"ours": [0.02, 0.04, 0.03], "PaDiM": [0.04, 0.08, 0.09]}}
    row = summarize("PaDiM", cells, {"times": times, "compared": compared({"PaDiM": cells})}, "ours")
    assert row["accuracy"]["native"]["pixel_ap"] == pytest.approx([0.6, 0.1414], abs=1e-4)
    assert (row["ms"], row["times_reference"]) == pytest.approx((80, 2))


def test_a_set_with_image_labels_only_has_dashes_for_pixels(tmp_path):
    cells = {name: [cell(name, seed, pixel=None) for seed in (0, 1)] for name in ("ours", "PaDiM")}
    seconds = {"ours": [0.02], "PaDiM": [0.03]}
    times = {"seconds": seconds, "images": 2, "threads": 1, "recipe": {"batch_size": 2, "repeats": 1}}
    data = {"title": "RSNA", "data": "Chest", "synthetic": False, "expected": None, "cells": cells, "times": times}
    data["compared"] = compared(cells)
    results = {
        "command": "python -m scripts.benchmarks.bmad",
        "date": "2026-01-01",
        "commit": "abc",
        "machine": "a machine",
        "protocols": {"native": {"evaluation_size": None, "mask_rule": ">0"}},
        "reference": "ours",
        "part": "all",
        "draws": 1000,
        "patient_pattern": None,
        "published": CONFIG["published"],
        "methods": {name: CONFIG["methods"][name] for name in cells},
        "sets": {"Chest": {**data, "images": {"training": 1, "validation": 1, "test": 1}}},
        "failed": {"Chest, PatchCore, seed 0": "no weights"},
    }
    page = write_report(results, tmp_path)
    image = "80.00 ± 0.00 [40.0, 90.0]"
    assert f"| ours | native size, mask `>0` | - | - | - | {image} | {image} | 20 | 1 |" in page
    assert "Beside the published numbers" not in page
    assert "- Chest, PatchCore, seed 0: no weights" in page
    assert (tmp_path / "benchmark_bars.png").is_file()


def test_a_point_in_a_crowd_has_no_name_rather_than_one_that_covers_others():
    figure = Figure(figsize=(5, 4))
    panel = figure.subplots()
    panel.set(xlim=(0, 10), ylim=(0, 10))
    figure.draw_without_rendering()
    crowd = [(2 + index / 100, 5.0, f"one of many {index}", "black") for index in range(30)]
    label_points(figure, panel, [*crowd, (7.0, 2.0, "alone", "black")])
    boxes = [text.get_window_extent(FigureCanvasAgg(figure).get_renderer()) for text in panel.texts]
    assert "alone" in [text.get_text() for text in panel.texts]
    assert 1 < len(boxes) < 31
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])


def test_a_name_covers_no_error_bar():
    figure = Figure(figsize=(5, 4))
    panel = figure.subplots()
    panel.set(xlim=(0, 10), ylim=(0, 10))
    figure.draw_without_rendering()
    points = [(3.0, 5.0, "beside a bar", "black"), (4.0, 8.0, "tall", "black")]
    label_points(figure, panel, points, [0.0, 4.0])
    [box] = [
        text.get_window_extent(FigureCanvasAgg(figure).get_renderer())
        for text in panel.texts
        if text.get_text() == "beside a bar"
    ]
    low, high = panel.transData.transform([(4.0, 4.0), (4.0, 9.9)])
    assert not box.overlaps(Bbox([low, high]))


def test_the_words_above_a_picture_have_lines_of_about_one_length():
    results = json.loads((ROOT / "docs/benchmark/peers/benchmark.json").read_text())
    lines = picture_words(results, "native", 60).splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 60
    assert len(lines[-1]) > 20


def test_the_reference_keeps_its_name_in_a_crowd():
    figure = Figure(figsize=(5, 4))
    panel = figure.subplots()
    panel.set(xlim=(0, 10), ylim=(0, 10))
    figure.draw_without_rendering()
    crowd = [(4 + index % 6 / 8, 4.6 + index // 6 / 6, f"one of many {index}", "black") for index in range(36)]
    label_points(figure, panel, [*crowd, (4.4, 5.1, "ours", REFERENCE)])
    assert "ours" in [text.get_text() for text in panel.texts]


def test_a_failing_command_says_why(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(BundleError, match="no such knob .*all of it is in"):
        measured(["sh", "-c", "echo start; echo 'error: no such knob' >&2; echo end; exit 1"], log)
    log.write_text("")
    assert last_words(log) == "it ended without a word"


def test_what_fails_does_not_stop_the_rest(tmp_path, monkeypatch, without_times_and_tables):
    def fail(folder, recipe, *_):
        if recipe["seed"] == 0:
            raise BundleError("out of memory")
        return {**cell("ours", 1), "recipe": recipe}

    monkeypatch.setattr("scripts.benchmarks.bmad.run_cell", fail)
    data = tiny_set(tmp_path / "set")
    words = ["--methods", "ours", "--seeds", "0", "1", "--protocols", "native"]
    results = benchmark(arguments(data, tmp_path / "out", *words))
    assert results["failed"] == {"set, ours, seed 0": "out of memory"}
    assert len(results["sets"]["set"]["cells"]["ours"]) == 1


def test_a_method_may_ask_for_fewer_seeds(tmp_path, monkeypatch, without_times_and_tables):
    monkeypatch.setattr(
        "scripts.benchmarks.bmad.run_cell", lambda folder, recipe, *_: {**cell("", recipe["seed"]), "recipe": recipe}
    )
    data = tiny_set(tmp_path / "set")
    words = ["--methods", "ours", "nearest neighbor", "--seeds", "4", "5", "6", "--protocols", "native"]
    cells = benchmark(arguments(data, tmp_path / "out", *words))["sets"]["set"]["cells"]
    assert {name: [one["recipe"]["seed"] for one in found] for name, found in cells.items()} == {
        "ours": [4, 5, 6],
        "nearest neighbor": [4],
    }


def test_several_cells_run_at_once_and_come_back_in_order(tmp_path, monkeypatch, without_times_and_tables):
    both_run = Barrier(2)

    def together(folder, recipe, *_):
        both_run.wait(timeout=30)
        return {**cell("ours", recipe["seed"]), "recipe": recipe}

    monkeypatch.setattr("scripts.benchmarks.bmad.run_cell", together)
    data = tiny_set(tmp_path / "set")
    words = ["--methods", "ours", "--seeds", "2", "0", "1", "3", "--protocols", "native", "--jobs", "2"]
    results = benchmark(arguments(data, tmp_path / "out", *words))
    assert [one["recipe"]["seed"] for one in results["sets"]["set"]["cells"]["ours"]] == [2, 0, 1, 3]
