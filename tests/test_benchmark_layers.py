"""The benchmark of layers: which half it looks at, and that its detector finds a box."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bundle.model import make_detector
from scripts.benchmarks.images import load_images
from scripts.benchmarks.layers import batches_of, draw_cases, embed, main, make_parser, read_choice


@pytest.fixture
def labeled_set(tmp_path):
    """Healthy stripes with noise in a dark frame; half of the images to test have a bright box."""
    random = np.random.default_rng(0)
    stripes = 80 + 40 * (np.arange(96) // 8 % 2)
    for place, count in {"train/good": 8, "valid/good/img": 3, "test/good/img": 6, "test/Ungood/img": 6}.items():
        (tmp_path / place).mkdir(parents=True)
        for index in range(count):
            image, box = stripes + random.normal(0, 5, (96, 96)), np.zeros((96, 96), np.uint8)
            if "Ungood" in place:
                (tmp_path / "test/Ungood/label").mkdir(exist_ok=True)
                box[40:64, 32:56] = 255
                image[box > 0] = 230
                Image.fromarray(box).save(tmp_path / f"test/Ungood/label/{index}.png")
            image[:16] = 0
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / place / f"{index}.png")
    return tmp_path


def test_the_halves_of_the_test_images_are_apart_and_together_all(labeled_set):
    names = {
        part: [case["name"] for case in draw_cases(labeled_set, 8, part)["test"]]
        for part in ("development", "report", "all")
    }
    assert sorted(names["development"] + names["report"]) == sorted(names["all"])
    assert names["development"]
    assert names["report"]


def test_layers_are_read_in_any_order():
    assert read_choice("6+4+6") == (4, 6)


def test_every_choice_has_a_row_and_the_detector_finds_the_box(labeled_set, monkeypatch, capsys):
    words = ["--data", str(labeled_set), "--backbone", "efficientnet_lite0", "--layers", "4", "2+4", "--part", "all"]
    knobs = '{"image_size": 96, "linear_components": 4}'
    monkeypatch.setattr(sys, "argv", ["layers", *words, "--knobs", knobs])
    main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[0] == ["layers", labeled_set.name]
    assert [row[0] for row in rows[2:]] == ["4", "2+4"]
    for row in rows[2:]:
        pixel_auroc, *_, image_auroc = map(float, row[1].split(" / "))
        assert pixel_auroc > 90
        assert image_auroc > 90


@pytest.mark.parametrize("knobs", ["{}", '{"blocks": "joined"}', '{"blocks": "normed"}'])
def test_the_embeddings_of_a_choice_are_those_of_a_network_that_taps_it(labeled_set, knobs):
    words = ["--data", str(labeled_set), "--backbone", "dinov2_vits14", "--weights", "random", "--layers", "1+3"]
    given = make_parser().parse_args([*words, "--knobs", f'{{"image_size": 56, {knobs[1:]}'.replace(", }", "}")])
    cases = draw_cases(labeled_set, 1, "all")["training"]
    detector = make_detector({**given.knobs, "backbone": given.backbone, "layers": [1, 3]}, "random")
    (found,) = batches_of(detector, [1, 3], embed(cases, [0, 1, 3], given))
    expected = detector.embed(load_images([cases[0]["image"]], "cpu")[..., 0])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_layer_that_the_backbone_lacks_is_said_in_one_line(labeled_set, monkeypatch):
    words = ["--data", str(labeled_set), "--backbone", "efficientnet_lite0", "--layers", "9"]
    monkeypatch.setattr(sys, "argv", ["layers", *words])
    with pytest.raises(SystemExit, match=r"error: layers \[9\] of efficientnet_lite0 must be one or more of 0 to 6"):
        main()
