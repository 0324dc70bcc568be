"""PatchCore, PaDiM and nearest neighbors on the bundle's features: what is odd stands out, sizes are what they say.

Needs the extra dependency anomalib.
"""

import sys

import pytest
import torch
from builders import small_detector
from torch import nn
from torch.nn import functional as F

from bundle.checkpoint import load_checkpoint, save_checkpoint
from bundle.compute import Compute
from bundle.data.stream import CaseInProgress, Slice
from bundle.errors import BundleError
from bundle.networks import FeatureNetwork
from scripts.benchmarks.peer_detector import PeerDetector
from scripts.benchmarks.peers import NearestNeighborPeer, PadimPeer, PatchCorePeer

CHANNELS, SIDE, PATCH = 8, 128, 16


@pytest.fixture
def anomalib():
    return pytest.importorskip("anomalib", reason='pip install -e ".[benchmark]"')


@pytest.fixture
def toy_features():
    network = nn.Sequential(nn.Conv2d(3, CHANNELS, PATCH, PATCH), nn.BatchNorm2d(CHANNELS))
    network.patch_size = PATCH
    return network.requires_grad_(False).eval()


def healthy(count):
    generator = torch.Generator().manual_seed(count)
    pattern = torch.linspace(-1, 1, PATCH).repeat(SIDE // PATCH)
    return pattern + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)


def with_odd_patch(image, row, column):
    odd = image.clone()
    rows, columns = (slice(index * PATCH, (index + 1) * PATCH) for index in (row, column))
    odd[..., rows, columns] = odd[..., rows, columns].transpose(-1, -2) * torch.tensor([2.0, -2.0, 1.0])[:, None, None]
    return odd


BANKS = [PatchCorePeer, NearestNeighborPeer]
PEERS = [*BANKS, PadimPeer]


@pytest.mark.parametrize("peer_class", PEERS)
@pytest.mark.parametrize(("row", "column"), [(2, 5), (4, 3)])
def test_the_odd_patch_scores_highest(anomalib, toy_features, peer_class, row, column):
    peer = peer_class(toy_features)
    peer.fit(healthy(4).split(2))
    normal = healthy(3)
    images = torch.cat([normal, with_odd_patch(normal[:1], row, column)])
    maps, scores = peer.detect(images)
    assert maps.shape == (4, 1, SIDE, SIDE)
    assert scores.shape == (4,)
    assert scores.argmax() == 3
    assert scores[3] > 2 * scores[:3].max()
    y, x = divmod(int(maps[3].argmax()), SIDE)
    # PatchCore averages over 3x3 patches, so that its peak may lie in a neighbor
    assert abs(y - (row + 0.5) * PATCH) <= 1.5 * PATCH
    assert abs(x - (column + 0.5) * PATCH) <= 1.5 * PATCH
    assert maps[3].max() > 2 * maps[:3].max()


@pytest.mark.parametrize("peer_class", PEERS)
def test_the_image_itself_decides_its_result(anomalib, toy_features, peer_class):
    peer = peer_class(toy_features)
    peer.fit([healthy(4)])
    images = with_odd_patch(healthy(3), 1, 1)
    for together, alone in zip(peer.detect(images), zip(*map(peer.detect, images.split(1)), strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_parts_of_a_batch_give_the_same(anomalib, toy_features):
    whole, parts = NearestNeighborPeer(toy_features), NearestNeighborPeer(toy_features, search_bytes=1)
    whole.fit([healthy(4)])
    parts.memory_bank = whole.memory_bank
    for expected, found in zip(whole.detect(healthy(3)), parts.detect(healthy(3)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_bank_holds_the_wanted_share_of_the_patches(anomalib, toy_features):
    patches = 4 * (SIDE // PATCH) ** 2
    coreset, every = PatchCorePeer(toy_features, coreset_ratio=0.25), NearestNeighborPeer(toy_features)
    for peer in (coreset, every):
        peer.fit([healthy(4)])
    assert coreset.stored_bytes == patches // 4 * CHANNELS * 4
    assert every.stored_bytes == patches * CHANNELS * 4


def test_padim_stores_means_inverse_covariances_and_the_chosen_channels(anomalib, toy_features):
    positions = (SIDE // PATCH) ** 2
    peer = PadimPeer(toy_features, num_features=5)
    peer.fit(healthy(4).split(3))
    assert peer.stored_bytes == positions * (5 + 5 * 5) * 4 + 5 * 8
    assert len(set(peer.stored["idx"].tolist())) == 5


def test_padim_takes_no_more_channels_than_there_are(anomalib, toy_features):
    assert PadimPeer(toy_features).model.n_features == CHANNELS


@pytest.mark.parametrize("peer_class", PEERS)
def test_what_is_stored_is_all_that_is_needed(anomalib, toy_features, peer_class):
    first, second = peer_class(toy_features), peer_class(toy_features)
    first.fit([healthy(4)])
    second.stored = {name: tensor.clone() for name, tensor in first.stored.items()}
    for expected, found in zip(first.detect(healthy(2)), second.detect(healthy(2)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("peer_class", BANKS)
def test_a_second_fit_replaces_the_first(anomalib, toy_features, peer_class):
    peer = peer_class(toy_features)
    peer.fit([healthy(4)])
    first = peer.stored_bytes
    peer.fit([healthy(2)])
    assert abs(peer.stored_bytes - first / 2) <= CHANNELS * 4


@pytest.mark.parametrize("peer_class", PEERS)
def test_fitting_leaves_the_features_as_they_are(anomalib, toy_features, peer_class):
    before = {key: value.clone() for key, value in toy_features.state_dict().items()}
    peer_class(toy_features).fit([healthy(2)])
    assert all(torch.equal(value, before[key]) for key, value in toy_features.state_dict().items())


@pytest.mark.parametrize("peer_class", PEERS)
def test_the_features_of_the_bundle_go_in(anomalib, features, peer_class):
    peer = peer_class(features)
    peer.fit([features.normalize(torch.rand(2, 1, 64, 96))])
    maps, scores = peer.detect(features.normalize(torch.rand(3, 1, 64, 96)))
    assert maps.shape == (3, 1, 64, 96)
    assert scores.shape == (3,)


def slices(count, generator):
    case = CaseInProgress({}, 0, count)
    return [Slice(image, case) for image in torch.rand(count, 1, 64, 64, generator=generator)]


@pytest.mark.parametrize("name", ["patchcore", "padim", "nearest_neighbor"])
def test_a_peer_takes_the_place_of_the_detector(anomalib, detector, tmp_path, name):
    generator = torch.Generator().manual_seed(0)
    peer = PeerDetector(name, detector, Compute("cpu", "fp32"))
    peer.fit([slices(3, generator), slices(2, generator)])
    peer.set_threshold([slices(4, generator)], 0.1)
    image = torch.rand(2, 1, 50, 70, generator=generator)
    found = peer.detect(image)
    assert found.anomaly_map.shape == (2, 1, 50, 70)
    assert found.patch_map.shape == (2, 64, 64)
    assert found.image_score.shape == (2,)
    assert 0 < peer.threshold < found.patch_map.max()

    save_checkpoint(peer, tmp_path / "model.pt")
    assert abs((tmp_path / "model.pt").stat().st_size - peer.peer.stored_bytes) < 8192
    again = PeerDetector(name, detector, Compute("cpu", "fp32"))
    load_checkpoint(again, tmp_path / "model.pt")
    for expected, loaded in zip(found, again.detect(image), strict=True):
        torch.testing.assert_close(loaded, expected)
    other = PeerDetector("padim", detector, Compute("cpu", "fp32"), {"num_features": 7})
    with pytest.raises(BundleError, match="was trained with peer"):
        load_checkpoint(other, tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["padim", "nearest_neighbor"])
def test_a_peer_on_standardized_features_does_not_see_the_scale_of_a_channel(anomalib, features, name):
    generator = torch.Generator().manual_seed(0)
    healthy, image = [slices(6, generator), slices(6, generator)], torch.rand(2, 1, 64, 64, generator=generator)
    found = []
    for scale in (1.0, 50.0):
        torch.manual_seed(0)
        detector = small_detector(features)
        embed_tiles = detector.embed_tiles
        detector.embed_tiles = lambda images, embed=embed_tiles, scale=scale: scale_first(embed(images), scale)
        peer = PeerDetector(name, detector, Compute("cpu", "fp32"), standardize=True)
        peer.fit(healthy)
        found.append(peer.detect(image).anomaly_map)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def scale_first(embeddings, scale):
    """The first half of the channels ``scale`` times as large, and moved."""
    first, second = embeddings.chunk(2, dim=1)
    return torch.cat([scale * first + 3, second], dim=1)


def test_the_standardization_of_a_peer_is_part_of_its_model(anomalib, features, tmp_path):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        PeerDetector("padim", small_detector(features), Compute("cpu", "fp32"), standardize=True) for _ in range(2)
    )
    first.fit([slices(6, generator)])
    save_checkpoint(first, tmp_path / "model.pt")
    load_checkpoint(second, tmp_path / "model.pt")
    image = torch.rand(2, 1, 64, 64, generator=generator)
    torch.testing.assert_close(second.detect(image).anomaly_map, first.detect(image).anomaly_map)
    plain = PeerDetector("padim", small_detector(features), Compute("cpu", "fp32"))
    with pytest.raises(BundleError, match="peer_standardize"):
        load_checkpoint(plain, tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["patchcore", "padim", "nearest_neighbor"])
def test_a_foreground_restricts_map_and_image_score(anomalib, features, name):
    generator = torch.Generator().manual_seed(0)
    peer = PeerDetector(name, small_detector(features), Compute("cpu", "fp32"), foreground=True)
    peer.fit([slices(6, generator)])
    image = torch.rand(2, 1, 64, 64, generator=generator)
    image[..., 32:] = 0  # air
    inside = peer.detect(image)
    peer.masks = False
    whole = peer.detect(image)
    assert (inside.patch_map[..., 32:] == 0).all()
    torch.testing.assert_close(inside.patch_map[..., :32], whole.patch_map[..., :32])
    highest = inside.patch_map.flatten(1).amax(1)
    assert ((0.5 * highest < inside.image_score) & (inside.image_score <= highest)).all()


def test_patchcore_on_its_own_strides_has_the_finest_grid_and_the_channels_of_all_stages(anomalib, detector):
    peer = PeerDetector("patchcore", detector, Compute("cpu", "fp32"), {"own_strides": True, "coreset_ratio": 0.5})
    peer.fit([slices(3, torch.Generator().manual_seed(0))])
    assert peer.peer.memory_bank.shape == (3 * 8 * 8 // 2, 152)  # 64 pixels at stride 8; 40 + 112 channels
    assert peer.detect(torch.rand(2, 1, 64, 64)).patch_map.shape == (2, 64, 64)


def test_own_strides_need_a_backbone_that_has_several(anomalib):
    tiny = FeatureNetwork("dinov3_vits16", "random", timm_kwargs={"embed_dim": 64, "depth": 3, "num_heads": 4})
    peer = PeerDetector("patchcore", small_detector(tiny), Compute("cpu", "fp32"), {"own_strides": True})
    with pytest.raises(BundleError, match="dinov3_vits16 has the same stride everywhere"):
        peer.fit([slices(2, torch.Generator().manual_seed(0))])


def test_maps_of_the_stages_are_what_the_features_are_joined_from(features):
    image = torch.rand(2, 3, 64, 64)
    fine, coarse = features.backbone.maps(image)
    assert (fine.shape, coarse.shape) == ((2, 40, 8, 8), (2, 112, 4, 4))
    joined = torch.cat([F.avg_pool2d(fine, 2), coarse], dim=1)
    torch.testing.assert_close(features(image), joined)
    details = F.pixel_shuffle(features.packed(image)[:, 152:], 2)
    torch.testing.assert_close(details, fine)  # what is looked at on its own grid, space to depth


def test_an_unknown_peer_or_argument_is_named(anomalib, detector):
    with pytest.raises(BundleError, match="did you mean 'patchcore'"):
        PeerDetector("patchcor", detector, Compute())
    with pytest.raises(BundleError, match=r"peer_arguments \{'ratio': 1\} do not fit padim"):
        PeerDetector("padim", detector, Compute(), {"ratio": 1})


@pytest.mark.parametrize("peer_class", PEERS)
def test_detecting_before_fitting_is_refused(anomalib, toy_features, peer_class):
    peer = peer_class(toy_features)
    with pytest.raises(BundleError, match="call fit"):
        peer.detect(healthy(1))
    with pytest.raises(BundleError, match="no healthy image"):
        peer.fit([])


@pytest.mark.parametrize("peer_class", PEERS)
def test_without_anomalib_the_remedy_is_said(monkeypatch, toy_features, peer_class):
    for name in [name for name in sys.modules if name.split(".")[0] == "anomalib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "anomalib", None)
    with pytest.raises(BundleError, match=r'pip install -e "\.\[benchmark\]"'):
        peer_class(toy_features)
