"""What training adds to MONAI's engine: corrupted inputs, schedule, moving average, early stop."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from builders import random_maps
from ignite.engine import Engine, Events
from torch import nn

from bundle.checkpoint import load_checkpoint, save_checkpoint
from bundle.compute import Compute
from bundle.errors import BundleError
from bundle.networks.scores import largest_of_each
from bundle.tracking import Tracker
from bundle.training import (
    Calibration,
    HealthyMaps,
    MovingAverage,
    NoisyFeatures,
    TrainingState,
    learning_rate_schedule,
)


@pytest.fixture
def batch(features):
    return random_maps(features)


def test_noise_is_on_the_input_in_the_wanted_share_of_batches_and_never_on_the_target(detector, batch):
    prepare = NoisyFeatures(detector, probability=0.3, scale=0.1)
    noisy = 0
    for _ in range(300):
        features, target = prepare(batch, torch.device("cpu"))
        torch.testing.assert_close(target, batch[:, :152])
        noisy += not torch.equal(features, target)
    assert 60 < noisy < 120


def test_noise_is_in_proportion_to_the_deviation_of_a_channel(detector, batch):
    batch[:, :152] *= torch.linspace(1, 10, 152).view(1, -1, 1, 1)
    features, target = NoisyFeatures(detector, probability=1.0, scale=0.1)(batch, torch.device("cpu"))
    ratio = (features - target).std(dim=(0, 2, 3)) / target.std(dim=(2, 3)).mean(dim=0)
    assert float(ratio.mean()) == pytest.approx(0.1, rel=0.1)
    assert float(ratio.std()) < 0.03


def test_dropped_patches_lose_all_channels_of_the_input(detector, batch):
    features, target = NoisyFeatures(detector, 0.0, dropout=0.5)(batch.repeat(40, 1, 1, 1), "cpu")
    dropped = (features == 0).all(dim=1)
    assert torch.equal(dropped, (features == 0).any(dim=1))
    assert float(dropped.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert not (target == 0).any()


def test_the_validation_loss_is_that_of_pooled_residuals_of_foreground_patches(detector, batch):
    prepare = HealthyMaps(detector)
    detector.fit_before_training([batch], [batch])
    inputs, maps = prepare(batch, torch.device("cpu"))
    torch.testing.assert_close(inputs, detector.standardized(batch))
    whole = detector.negative_log_likelihood(detector.density(inputs), maps)
    spoiled = maps.clone()
    spoiled[:, -1, :, 0] = 0  # the left column is air, and wild
    spoiled[:, :152, :, 0] += 100
    far = detector.density(inputs).detach()
    assert whole.item() == pytest.approx(-detector.healthy_log_likelihood([batch]), abs=1e-3)
    pooling_reaches = detector.negative_log_likelihood(far, spoiled)
    air = maps.clone()
    air[:, -1, :, 0] = 0
    found = detector.patch_score.negative_log_likelihood(detector.density.residual_of(far, inputs))[..., 1:]
    torch.testing.assert_close(detector.negative_log_likelihood(far, air), found.mean())
    assert pooling_reaches.item() > whole.item()  # residuals are pooled, those of air too


@pytest.mark.parametrize(
    ("arguments", "name"), [({"probability": 2}, "noise_prob"), ({"dropout": 1.0}, "context_drop")]
)
def test_refuses_shares_out_of_range(detector, arguments, name):
    with pytest.raises(BundleError, match=name):
        NoisyFeatures(detector, **arguments)


def rates(name, steps=100):
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=0.01)
    schedule = learning_rate_schedule(optimizer, name, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_cosine_schedule_warms_up_and_falls_to_zero():
    found = rates("cosine")
    assert found[0] == pytest.approx(0.001)
    assert max(found) == pytest.approx(0.01) and found.index(max(found)) == 10
    assert found[10:] == sorted(found[10:], reverse=True)
    assert found[-1] < 1e-5


def test_the_constant_schedule_is_constant():
    assert set(rates("constant")) == {0.01}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(BundleError, match="did you mean 'cosine'"):
        rates("cosinus")


def averaged(momentum, steps):
    """Weights of a model that goes 1, 2, 3, ..., and their average."""
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, momentum)
    engine = Engine(lambda *_: nn.init.constant_(model.weight, engine.state.iteration))
    average.attach(engine)
    engine.run(range(steps))
    return float(average.ema_model.weight)


def test_the_moving_average_lags_behind_and_does_not_remember_the_start():
    assert averaged(1.0, 500) == 500
    assert averaged(0.01, 2000) == pytest.approx(2000 - 99, abs=2)  # a mean age of 1 / momentum - 1
    assert 5 < averaged(0.01, 10) < 10


def test_a_moving_average_that_starts_again_warms_up_again():
    model = nn.Linear(1, 1, bias=False)
    average = MovingAverage(model, 0.01)
    engine = Engine(lambda *_: nn.init.constant_(model.weight, engine.state.iteration))
    average.attach(engine)
    engine.run(range(5000))
    nn.init.constant_(model.weight, -1000.0)  # as from elsewhere
    average.restart(engine.state.iteration)
    assert float(average.ema_model.weight) == -1000
    engine.run(range(5000), max_epochs=2)
    assert float(average.ema_model.weight) == pytest.approx(10000 - 99, abs=2)


@pytest.mark.parametrize("momentum", [0.0, 1.5])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(BundleError, match="ema_momentum"):
        MovingAverage(nn.Linear(1, 1), momentum)


def trained_epochs(detector, path, losses, patience, val_interval=1, restart=False):
    """How many epochs a training takes whose healthy validation losses are ``losses``, and which one it keeps."""
    optimizer = torch.optim.AdamW(detector.density.parameters())
    validator = SimpleNamespace(state=SimpleNamespace(metrics={}, epoch=0))
    average = MovingAverage(detector.density, 1.0)
    engine = Engine(lambda *_: None)
    engine.network = detector.density

    @engine.on(Events.EPOCH_COMPLETED(every=val_interval))
    def validate():
        validator.state.epoch = engine.state.epoch
        validator.state.metrics = {"healthy_validation_loss": losses[engine.state.epoch - 1]}
        nn.init.constant_(detector.density.contexts[0].predict.bias, engine.state.epoch)
        average.ema_model.load_state_dict(detector.density.state_dict())

    schedule = learning_rate_schedule(optimizer, "constant", 1)
    epochs = {"max_epochs": len(losses), "val_interval": val_interval, "patience": patience, "restart": restart}
    TrainingState(path, detector, optimizer, schedule, average, validator, {}, **epochs).attach(engine)
    engine.run([0], max_epochs=len(losses))
    return engine.state.epoch, float(detector.density.contexts[0].predict.bias[0])


def test_a_training_that_was_over_when_it_was_interrupted_stays_over(detector, tmp_path):
    begin = deepcopy(detector.density.state_dict())
    assert trained_epochs(detector, tmp_path / "state.pt", [3.0, 1.0, 2.0, 2.0, 0.5, 0.4], 2) == (4, 2.0)
    detector.density.load_state_dict(begin)
    assert trained_epochs(detector, tmp_path / "state.pt", [0.1] * 6, 2)[1] == 2.0


def test_a_training_that_begins_with_other_weights_goes_on_from_no_state(detector, tmp_path, caplog):
    """As a federation gives them."""
    assert trained_epochs(detector, tmp_path / "state.pt", [3.0, 1.0, 2.0, 2.0, 0.5, 0.4], 2) == (4, 2.0)
    nn.init.constant_(detector.density.contexts[0].predict.bias, -7.0)
    assert trained_epochs(detector, tmp_path / "state.pt", [0.1] * 6, 2)[1] == 1.0
    assert "starting over" in caplog.text


def _empty(path):
    path.write_bytes(b"")


def _truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign(path):
    torch.save({"model": torch.zeros(1)}, path)


def _list(path):
    torch.save([1, 2], path)


def _pickle(path):
    torch.save({"fingerprint": Engine}, path)


def _other_shapes(path):
    state = torch.load(path, weights_only=True)
    torch.save(state | {"density": {key: torch.zeros(3, 2) for key in state["density"]}}, path)


@pytest.mark.parametrize("damage", [_empty, _truncated, _foreign, _list, _pickle, _other_shapes])
def test_a_damaged_state_is_one_line_and_restart_begins_anew(detector, tmp_path, damage):
    path = tmp_path / "training_state.pt"
    begin = deepcopy(detector.density.state_dict())
    trained_epochs(detector, path, [3.0, 2.0, 1.0], 0)
    damage(path)
    detector.density.load_state_dict(begin)
    with pytest.raises(BundleError, match=r"is damaged, or no state .*\): give --restart true") as refused:
        trained_epochs(detector, path, [3.0, 2.0, 1.0], 0)
    assert "\n" not in str(refused.value)
    detector.density.load_state_dict(begin)
    assert trained_epochs(detector, path, [3.0, 2.0, 2.5], 0, restart=True) == (3, 2.0)


def test_restart_does_not_go_on_from_a_whole_state(detector, tmp_path):
    begin = deepcopy(detector.density.state_dict())
    assert trained_epochs(detector, tmp_path / "state.pt", [0.1, 2.0, 2.0], 0)[1] == 1.0
    detector.density.load_state_dict(begin)
    assert trained_epochs(detector, tmp_path / "state.pt", [3.0, 2.0, 1.0], 0, restart=True)[1] == 3.0


@pytest.mark.parametrize(("patience", "epochs"), [(0, 7), (2, 5), (5, 7)])
def test_training_ends_when_the_loss_has_not_fallen_for_so_many_epochs_and_keeps_the_best(
    detector, tmp_path, patience, epochs
):
    losses = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 3.4]
    assert trained_epochs(detector, tmp_path / "state.pt", losses, patience) == (epochs, 3.0)


def test_patience_does_not_end_a_training_between_two_validations(detector, tmp_path):
    assert trained_epochs(detector, tmp_path / "state.pt", [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], 1, val_interval=3) == (
        6,
        6.0,
    )
    losses = [9.0, 8.0, 1.0, 6.0, 5.0, 2.0, 0.0, 0.0, 0.0]
    assert trained_epochs(detector, tmp_path / "other.pt", losses, 1, val_interval=3) == (6, 3.0)


@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        ({"val_interval": 0}, r"val_interval is 0: give 1 to max_epochs, which is 12"),
        ({"val_interval": 13}, r"val_interval is 13: give 1 to max_epochs"),
        ({"max_epochs": 0}, r"max_epochs is 0: give at least 1"),
        ({"patience": -1}, r"patience is -1: give a number of epochs"),
    ],
)
def test_epochs_out_of_range_are_refused_before_training(detector, tmp_path, epochs, message):
    with pytest.raises(BundleError, match=message):
        TrainingState(tmp_path / "state.pt", detector, None, None, None, None, {}, **epochs)


def test_a_loss_that_is_no_number_ends_training_with_the_remedy(detector, tmp_path):
    with pytest.raises(BundleError, match="lower learning_rate"):
        trained_epochs(detector, tmp_path / "state.pt", [1.0, float("nan")], 0)


def test_a_checkpoint_takes_16_bits_a_weight_and_gives_the_same_scores(detector, batch, tmp_path):
    detector.fit_before_training([batch], [batch])
    nn.init.normal_(detector.density.contexts[0].predict.weight, std=0.1)
    state = TrainingState(tmp_path / "state.pt", detector, None, None, None, None, {})
    state.best_density = detector.density.state_dict()
    state.take_best()  # rounds, before anything is fitted to what the prediction leaves
    detector.fit_after_training([batch])
    detector.calibrate([batch])
    before = detector.score_patches(batch)[0]
    save_checkpoint(detector, tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {stored[key].dtype for key in stored if key.startswith("density.contexts")} == {torch.float16}
    load_checkpoint(detector, tmp_path / "model.pt")
    assert torch.equal(detector.score_patches(batch)[0], before)


def calibrated(detector, path, patients, images):
    """A calibration with as many slices as there are numbers in ``patients``."""
    torch.manual_seed(0)
    maps = random_maps(detector.features, len(patients))
    healthy = SimpleNamespace(batches=lambda *_: [maps], patients=patients, volumes=[], data=[{}] * images, words=dict)
    log = Tracker("off", "training", {})
    Calibration(
        detector, healthy, healthy, Compute("cpu", "fp32"), path, log, image_false_positive_rate=0.2
    ).calibrate()
    return detector.image_score(*detector.score_patches(maps))


def test_a_patient_counts_once_for_the_threshold_of_images_by_the_worst_slice(detector, tmp_path):
    patients = [number for number in range(5) for _ in range(4)]
    scores = calibrated(detector, tmp_path / "model.pt", patients, 20)
    worst = largest_of_each(scores, patients).sort().values
    assert float(detector.image_threshold) == pytest.approx(float(worst[-1]), abs=1e-4)  # the 5th of 5, not 17th of 20


@pytest.mark.parametrize(
    ("patients", "images", "line"),
    [
        (list(range(24)), 24, "with 24 healthy validation images the true rate lies between 0.086 and 0.34 (90 %)"),
        (
            [number for number in range(5) for _ in range(4)],
            20,
            "with 20 healthy validation images of 5 patients, each of whom counts once, the true rate lies between "
            "0.01 and 0.45 (90 %)",
        ),
        ([0, 0, 1, 1], 2, "with 2 healthy validation images the true rate"),  # volumes
    ],
)
def test_calibration_says_between_what_rates_the_threshold_of_this_site_lies(
    detector, tmp_path, caplog, patients, images, line
):
    with caplog.at_level("INFO"):
        calibrated(detector, tmp_path / "model.pt", patients, images)
    said = [record.message for record in caplog.records if record.message.startswith("image threshold ")]
    assert len(said) == 1 and "wanted false positive rate 0.2; " + line in said[0]
