"""The report of an evaluation: thresholds are those of the checkpoint."""

import pytest
from ignite.engine import Engine

from bundle.errors import BundleError
from bundle.evaluation import EvaluationReport, check_rates
from bundle.metrics import AnomalyMetric


@pytest.fixture
def calibrated(detector):
    detector.false_positive_rate.fill_(0.01)
    detector.image_false_positive_rate.fill_(0.05)
    return detector


@pytest.mark.parametrize("rates", [(None, None), (0.01, None), (None, 0.05), (0.01, 0.05)])
def test_rates_of_the_checkpoint_are_accepted(calibrated, rates):
    check_rates(calibrated, *rates)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ((0.02, None), "^false_positive_rate is 0.02, but the checkpoint was trained with 0.01: train with it"),
        ((None, 0.1), "^image_false_positive_rate is 0.1, but the checkpoint was trained with 0.05: train with it"),
    ],
)
def test_other_rates_than_those_of_the_checkpoint_are_refused(calibrated, rates, message):
    with pytest.raises(BundleError, match=message):
        check_rates(calibrated, *rates)


def test_another_rate_is_refused_before_the_first_image_is_scored(calibrated, tmp_path):
    scored = []
    engine = Engine(lambda engine, batch: scored.append(batch))
    report = EvaluationReport(
        tmp_path, AnomalyMetric(0.0), calibrated, [], tmp_path, {}, None, image_false_positive_rate=0.5
    )
    report.attach(engine)
    with pytest.raises(BundleError, match="image_false_positive_rate is 0.5"):
        engine.run([0])
    assert scored == []
