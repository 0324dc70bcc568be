"""Peers on the blocks of a ViT: they see its tokens, find what is odd, and need nothing but what they stored.

Needs the extra dependency anomalib.
"""

import pytest
import torch
from builders import small_detector
from torch.nn import functional as F

from bundle.compute import Compute
from bundle.errors import BundleError
from bundle.networks import FeatureNetwork
from bundle.networks.weights import load_backbone
from scripts.benchmarks.dino_peers import BlockTokens, DinomalyPeer, InpFormerPeer, SuperAddPeer
from scripts.benchmarks.peers import NearestNeighborPeer, PeerFeatures

LAYERS = [2, 3, 4, 5, 6, 7, 8, 9]
SMALL = {"embed_dim": 384, "depth": 10, "num_heads": 6}  # the narrowest that anomalib knows
SIDE = 64


@pytest.fixture(scope="module", autouse=True)
def anomalib():
    return pytest.importorskip("anomalib", reason='pip install -e ".[benchmark]"')


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    features = FeatureNetwork("dinov3_vits16", "random", layers=LAYERS, timm_kwargs=SMALL)
    return PeerFeatures(small_detector(features, SIDE), Compute("cpu", "fp32"))


def healthy(count):
    generator = torch.Generator().manual_seed(count)
    pattern = torch.linspace(-1, 1, 16).repeat(SIDE // 16)
    return pattern + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)


def with_odd_patch(images):
    odd = images.clone()
    odd[..., 16:32, 32:48] = 2 * odd[..., 16:32, 32:48].transpose(-1, -2) - 1
    return odd


def quick(peer_class, features):
    options = {} if peer_class is SuperAddPeer else {"steps": 6, "batch_size": 2}
    return peer_class(features, **options)


PEERS = [DinomalyPeer, InpFormerPeer, SuperAddPeer]


@pytest.mark.slow
@pytest.mark.parametrize("peer_class", PEERS)
def test_what_is_odd_scores_higher_and_what_is_stored_is_all_that_is_needed(vit, peer_class):
    torch.manual_seed(0)
    peer, again = quick(peer_class, vit), quick(peer_class, vit)
    with pytest.raises(BundleError, match="call fit"):
        peer.detect(healthy(1))
    peer.fit(healthy(6).split(3))
    images = torch.cat([healthy(2), with_odd_patch(healthy(2))])
    maps, scores = peer.detect(images)
    assert maps.shape == (4, 1, SIDE, SIDE)
    assert scores.shape == (4,)
    assert scores[2:].min() > scores[:2].max()
    again.stored = {name: tensor.clone() for name, tensor in peer.stored.items()}
    for expected, found in zip((maps, scores), again.detect(images), strict=True):
        torch.testing.assert_close(found, expected)
    assert peer.stored_bytes > 0
    assert peer.score(maps).shape == (4,)


@pytest.mark.parametrize("backbone", ["dinov3_vits16", "dinov2_vits14_reg"])
def test_tokens_are_those_of_timm_before_the_final_norm(backbone):
    network, _, _ = load_backbone(backbone, "random", None, SMALL)
    features = FeatureNetwork(backbone, "random", layers=[2, 7], timm_kwargs=SMALL)
    tokens = BlockTokens(PeerFeatures(small_detector(features, 4 * features.patch_size), Compute("cpu", "fp32")))
    images = torch.rand(2, 3, 4 * features.patch_size, 4 * features.patch_size)
    found = tokens(images)
    with torch.no_grad():
        expected = network.eval().forward_intermediates(
            images, [2, 7], return_prefix_tokens=True, norm=False, output_fmt="NLC", intermediates_only=True
        )
    assert list(found) == ["blocks.2", "blocks.7"]
    assert (tokens.num_register_tokens, tokens.width) == (4, 384)
    for ours, (patches, prefix) in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, torch.cat([prefix, patches], dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("peer_class", PEERS)
def test_a_backbone_without_tokens_is_refused(features, peer_class):
    with pytest.raises(BundleError, match="backbone efficientnet_lite0 has no tokens: take a ViT"):
        peer_class(PeerFeatures(small_detector(features), Compute("cpu", "fp32")))


@pytest.mark.parametrize("peer_class", [DinomalyPeer, InpFormerPeer])
def test_other_blocks_than_eight_are_refused(peer_class):
    features = FeatureNetwork("dinov3_vits16", "random", layers=[1, 2], timm_kwargs={**SMALL, "depth": 3})
    with pytest.raises(BundleError, match=r"reconstructs 8 blocks .*, not 2 with 384: give --layers"):
        peer_class(PeerFeatures(small_detector(features), Compute("cpu", "fp32")))


def test_images_that_are_not_square_are_refused_where_the_method_needs_squares():
    features = FeatureNetwork("dinov3_vits16", "random", layers=LAYERS, timm_kwargs=SMALL)
    oblong = PeerFeatures(small_detector(features, [64, 96]), Compute("cpu", "fp32"))
    for peer_class in (InpFormerPeer, SuperAddPeer):
        with pytest.raises(BundleError, match="takes square images"):
            peer_class(oblong)


class Blob(torch.nn.Module):
    """Features with a first principal component that is large in the middle: a foreground that masking finds."""

    patch_size = 16

    def __init__(self, contrast):
        super().__init__()
        self.contrast = contrast

    def forward(self, images):
        patches = F.avg_pool2d(images, 16)
        middle = torch.zeros_like(patches[:, :1])
        middle[..., 3:9, 3:9] = self.contrast
        return torch.cat([patches, middle], dim=1)


def test_masking_stores_no_background_and_gives_it_no_distance():
    peer, whole = NearestNeighborPeer(Blob(60.0), masking=True), NearestNeighborPeer(Blob(60.0))
    images = torch.rand(4, 3, 192, 192)
    for one in (peer, whole):
        one.fit([images])
    assert (len(peer.memory_bank), len(whole.memory_bank)) == (4 * 8 * 8, 4 * 12 * 12)
    corner = peer.detect(torch.rand(2, 3, 192, 192))[0][..., -1, -1]
    assert torch.allclose(corner, torch.zeros(2, 1), atol=1e-4)


def test_masking_that_finds_no_foreground_is_said():
    with pytest.raises(BundleError, match="masking is true, but finds no foreground"):
        NearestNeighborPeer(Blob(0.0), masking=True).fit([torch.rand(2, 3, 192, 192)])
