"""The benchmark for a graphics card, prepared to the last step on machines without one."""

import json
import subprocess
import sys
import time

import pytest
import torch
from absent import HEAVY, without
from commands import ROOT, environment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bundle.errors import BundleError
from bundle.networks import FeatureNetwork
from scripts.benchmarks.common import read
from scripts.benchmarks.contenders import CosineBank, PatchCoreBank, paper_detector
from scripts.benchmarks.gpu import TINY, Bench, Cell, Scale, fix_positions, make_plan, report, run_plan
from scripts.benchmarks.peers import NearestNeighborPeer, PatchCorePeer

NUMBERS = {
    "peak": ("flop_per_s",),
    "parity": ("embeddings", "map"),
    "speed": ("ms",),
    "training": ("slices_per_s", "reading_share"),
    "processes": ("alone_ms", "ms", "sum"),
}
ON_A_CARD_ONLY = {"this bundle CUDA graph", "this bundle TensorRT"}


def results_of(cells, left=lambda: 100.0, save=lambda results: None):
    results = {}
    run_plan(cells, Bench("cpu", TINY), left, results, save)
    return results


def test_what_matters_most_is_measured_first_and_what_may_break_a_card_last():
    plan = make_plan(Scale())
    names = [(cell.kind, cell.name, cell.model) for cell in plan]
    assert names[:4] == [
        ("peak", "fp32", ""),
        ("peak", "bf16", ""),
        ("peak", "fp16", ""),
        (*names[3][:2], "dinov3_vits16"),
    ]
    assert {cell.batch for cell in plan if cell.kind == "speed"} == {1, 16, 64}
    kinds = [cell.kind for cell in plan]
    assert kinds.index("parity") < kinds.index("speed") < kinds.index("training") < kinds.index("processes")
    assert [cell.model for cell in plan if cell.kind == "speed"][:30] == ["dinov3_vits16"] * 30
    last = [cell.name for cell in plan[kinds.index("processes") + 1 :]]
    assert list(dict.fromkeys(last)) == ["this bundle CUDA graph", "this bundle compiled", "this bundle TensorRT"]
    assert len({cell.words() for cell in plan}) == len(plan)


def test_a_cell_for_which_the_time_does_not_suffice_is_named_and_a_shorter_one_runs():
    cells = [
        Cell("speed", name, lambda bench: {"ms": 1.0}, reserve=reserve)
        for name, reserve in (("long", 90), ("short", 5))
    ]
    results = results_of(cells, left=lambda: 30.0)
    assert results["not_reached"] == ["speed, long"]
    assert [cell["name"] for cell in results["cells"]] == ["short"]


def test_a_cell_that_fails_loses_no_other_and_everything_is_saved_at_once():
    def fails(bench):
        raise RuntimeError("out of memory\nand more")

    def is_absent(bench):
        raise BundleError("needs a card")

    saved = []
    cells = [
        Cell("speed", "first", lambda bench: {"ms": 1.0}),
        Cell("speed", "second", fails),
        Cell("speed", "third", is_absent),
        Cell("speed", "fourth", lambda bench: {"ms": 2.0}),
    ]
    results = results_of(cells, save=lambda results: saved.append(json.dumps(results)))
    assert [len(json.loads(one)["cells"]) for one in saved] == [1, 2, 3, 4, 4]
    assert results["cells"][1]["failed"] == "RuntimeError: out of memory"
    assert results["cells"][2]["unavailable"] == "needs a card"
    assert results["cells"][3]["ms"] == 2.0


def test_a_cell_that_takes_longer_than_is_left_is_stopped():
    started = time.monotonic()
    (cell,) = results_of([Cell("speed", "endless", lambda bench: time.sleep(60), reserve=0)], left=lambda: 0.2)["cells"]
    assert time.monotonic() - started < 10
    assert cell["failed"].startswith("OutOfTimeError")


class OffTheCard(TorchDispatchMode):
    """Notes what a pass does elsewhere than on the card, or asks of it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        tensors = [one for one in [*args, given] if isinstance(one, torch.Tensor)]
        if any(one.device.type != "cuda" for one in tensors) or "_local_scalar" in str(function):
            self.found.append(str(function))
        return given


@pytest.mark.parametrize(("fixed", "clean"), [(True, True), (False, False)])
def test_a_pass_with_fixed_positions_stays_on_the_card_so_that_a_graph_can_hold_it(fixed, clean):
    """With tensors that only claim to be on a card."""
    features = FeatureNetwork("dinov3_vits16", "random", timm_kwargs=TINY.timm_kwargs)
    detector = paper_detector(features, TINY.image_size)
    if fixed:
        fix_positions(detector)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in detector.modules():
            for name, one in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                claimed = torch.empty(one.shape, dtype=one.dtype, device="cuda")
                where = module._parameters if name in module._parameters else module._buffers
                where[name] = (
                    torch.nn.Parameter(claimed, requires_grad=False) if where is module._parameters else claimed
                )
        images = torch.empty(2, 1, 32, 32, device="cuda")
        with OffTheCard() as pass_:
            found = detector.detect(images)
    assert found.anomaly_map.device.type == "cuda"
    assert (pass_.found == []) == clean


class GivenFeatures(torch.nn.Module):
    """Features that are the images themselves."""

    patch_size = 1

    def __init__(self):
        super().__init__()
        self.register_buffer("device_of", torch.zeros(1))

    def forward(self, images):
        return images


@pytest.mark.parametrize("parts", [1, 7])
def test_banks_in_plain_torch_find_what_those_of_anomalib_find(parts, monkeypatch):
    torch.manual_seed(0)
    healthy, images = torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24)
    monkeypatch.setattr("scripts.benchmarks.contenders.DISTANCES", 2 * 576 * 1152 // parts)
    peer = PatchCorePeer(GivenFeatures(), coreset_ratio=0.25)
    peer.fit([healthy])
    _, scores = PatchCoreBank(peer.memory_bank)(images)
    torch.testing.assert_close(scores, peer.detect(images)[1])
    peer = NearestNeighborPeer(GivenFeatures(), patch_size=1)
    peer.fit([healthy])
    patch_map, scores = CosineBank(peer.memory_bank)(images)
    torch.testing.assert_close(scores, peer.detect(images)[1].flatten(), atol=1e-6, rtol=1e-4)
    assert patch_map.shape == (2, 24, 24)


def test_the_page_without_a_card_says_not_measured_and_what_would_be():
    page = (ROOT / "docs/performance/gpu.md").read_text(encoding="utf-8")
    results = read(ROOT / "docs/performance/gpu.json")
    assert page == report(results)
    if results["machine"]["card"] is None:
        assert "**Not measured: no graphics card was at hand.**" in page
        assert results["cells"] == []


@pytest.mark.slow
def test_every_kind_of_cell_gives_numbers_on_the_cpu(tmp_path):
    """Where little more is installed than torch and timm."""
    words = [f"--out={tmp_path}", "--device=cpu", "--tiny"]
    program = without(HEAVY | {"pydantic"}, f"from scripts.benchmarks.gpu import main\nmain({words})")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = read(tmp_path / "gpu.json")
    plan = make_plan(TINY)
    assert [(cell["kind"], cell["name"]) for cell in results["cells"]] == [(cell.kind, cell.name) for cell in plan]
    for cell in results["cells"]:
        if cell["name"] in ON_A_CARD_ONLY:
            assert "unavailable" in cell
        else:
            assert all(cell[name] >= 0 for name in NUMBERS[cell["kind"]]), cell
    assert results["not_reached"] == []
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert page == report(results)
    compiled = next(cell for cell in results["cells"] if cell["name"] == "this bundle compiled")
    assert f"| this bundle compiled | {compiled['ms']:.3g} (" in page
    assert compiled["difference"] < 1e-3


@pytest.mark.slow
def test_without_a_card_the_command_says_what_to_give():
    done = subprocess.run(
        [sys.executable, "-m", "scripts.benchmarks.gpu", "--device=cuda:0"],
        cwd=ROOT,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "there is no graphics card here: --device cpu --tiny shows that everything runs"
    )
