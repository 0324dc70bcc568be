"""Precision changes the speed, not what is found."""

import pytest
import torch
from builders import small_detector
from sklearn.metrics import roc_auc_score

from bundle.compute import Compute, fastest_precision
from bundle.errors import BundleError
from bundle.inferers import SliceBatchInferer, TrainingInferer
from bundle.networks import FeatureNetwork
from bundle.networks.detector import Detection

TINY_VIT = {"depth": 3, "embed_dim": 64, "num_heads": 2}


def trained_detector(backbone="dinov3_vits16"):
    """A detector that has learned a little, on smooth images with noise."""
    torch.manual_seed(0)
    vit = backbone.startswith("dinov3_vit")
    features = FeatureNetwork(backbone, "random" if vit else None, timm_kwargs=TINY_VIT if vit else None)
    detector = small_detector(features, 96, hidden_channels=16)
    with torch.no_grad():
        embeddings = detector.embed(images(64))
    values = embeddings.transpose(0, 1).flatten(1)
    detector.set_standardization(values.mean(1), values.std(1))
    target = detector.standardized(embeddings)
    detector.fit_before_training([embeddings], [embeddings])
    optimizer = torch.optim.AdamW(detector.density.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        detector.density.loss(detector.density(target), target).backward()
        optimizer.step()
    detector.fit_after_training([embeddings])
    detector.calibrate([embeddings])
    return detector


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic")
    return (smooth + 0.1 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


def found(precision):
    compute = Compute("cpu", precision)
    detector = compute.place(trained_detector())
    test, truth = images(8, seed=1), torch.zeros(8, 1, 96, 96)
    test[::2, :, 32:56, 32:56] = 1 - test[::2, :, 32:56, 32:56].round()
    truth[::2, :, 32:56, 32:56] = 1
    maps = SliceBatchInferer(batch_size=4, compute=compute)(test, detector)["map"]
    return maps, roc_auc_score(truth.flatten(), maps.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_keeps_maps_within_a_hundredth_and_auroc_within_a_thousandth(precision):
    (exact, exact_auroc), (reduced, auroc) = found("fp32"), found(precision)
    assert reduced.dtype == torch.float32
    assert (reduced - exact).norm() / exact.norm() < 1e-2
    assert abs(auroc - exact_auroc) < 1e-3
    assert not torch.equal(reduced, exact)


def test_a_placed_backbone_holds_its_weights_in_reduced_precision_and_the_density_does_not():
    detector = Compute("cpu", "bf16").place(trained_detector())
    products = (torch.nn.Conv2d, torch.nn.Linear)
    weights = [module.weight for module in detector.features.modules() if isinstance(module, products)]
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert {parameter.dtype for parameter in detector.density.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "bf16", "expected"), [("cuda", False, "fp16"), ("cpu", True, "bf16"), ("cpu", False, "fp32")]
)
def test_auto_is_what_the_device_does_fastest(device, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert fastest_precision(torch.device(device)) == expected


@pytest.mark.slow
def test_auto_is_never_a_precision_that_the_backbone_loses_too_much_by(features, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert Compute("cpu", features=features).precision == "fp32"
    assert Compute("cpu", features=trained_detector().features).precision == "bf16"
    Compute("cpu", "bf16", features=features)
    assert "bf16 changes the maps of this backbone" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "keeps"), [("dinov3_vits16", True), ("efficientnet_lite0", False)])
def test_backbones_lose_by_bf16_what_is_said_of_them(backbone, keeps):
    detector = trained_detector(backbone)
    exact = detector.embed(images(2))
    compute = Compute("cpu", "bf16")
    detector = compute.place(detector)
    with torch.inference_mode(), compute.autocast():
        reduced = detector.embed(images(2)).float()
    assert ((reduced - exact).norm() / exact.norm() < 1e-2) == keeps == detector.features.keeps_bf16


@pytest.mark.slow
def test_training_in_bf16_has_the_loss_curve_of_fp32(monkeypatch):
    def losses(precision):
        torch.manual_seed(0)
        density = trained_detector().density
        target = torch.randn(4, 64, 6, 6, generator=torch.Generator().manual_seed(3))
        inferer = TrainingInferer(Compute("cpu", precision))
        optimizer = torch.optim.AdamW(density.parameters(), lr=1e-3)
        curve = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(inferer(target, density), target)
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        return torch.tensor(curve)

    torch.testing.assert_close(losses("bf16"), losses("fp32"), atol=0, rtol=5e-3)


def test_a_map_that_is_not_finite_is_refused_with_the_remedy():
    class Overflowing(torch.nn.Module):
        def detect(self, image, raw=False):
            nothing = torch.full((1, 2, 2), torch.inf)
            return Detection(nothing[None], torch.zeros(1), nothing, torch.zeros(1))

    with pytest.raises(BundleError, match="not finite in fp16: give --precision bf16 or fp32"):
        SliceBatchInferer(compute=Compute("cpu", "fp16"))(torch.rand(1, 1, 4, 4), Overflowing())


@pytest.mark.parametrize(("options", "message"), [({"precision": "bf61"}, "'bf16'"), ({"device": "gpu"}, "cpu, cuda")])
def test_bad_settings_are_refused(options, message):
    with pytest.raises(BundleError, match=message):
        Compute(**options)


@pytest.mark.slow
def test_compiled_networks_give_the_same_maps():
    torch._dynamo.reset()
    image = images(2)
    expected = trained_detector()(image)
    compute = Compute("cpu", "fp32", compile=True)
    detector = compute.place(trained_detector())
    maps = SliceBatchInferer(compute=compute)(image, detector)["map"]
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)
