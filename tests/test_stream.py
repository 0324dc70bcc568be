"""Slices of several cases share batches; what the networks say comes back to its case."""

import threading
import time
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from monai.data import Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose

from bundle.compute import Compute
from bundle.data import EmbeddingDataset, EmbeddingStore, SliceBatches, keep_readable
from bundle.data.cases import add_keys
from bundle.data.stream import read_ahead
from bundle.errors import BundleError
from bundle.inferers import SliceBatchInferer, detect_slices


def case(name, slices, channels=1, size=(48, 40)):
    image = torch.rand(channels, *size, slices, generator=torch.Generator().manual_seed(slices))
    return {"name": name, "image": MetaTensor(image, affine=torch.eye(4)), "label": 0}


CASES = [case("a", 3), case("b", 1), case("c", 5, size=(64, 64)), case("d", 1, channels=3), case("e", 1)]


def test_batches_are_filled_across_cases(detector):
    batches = list(SliceBatches(Dataset(CASES), detector.resize, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2, 1]  # gray, gray, the gray rest, the color one
    assert {of.item["name"] for _, of in batches[0]} == {"a", "b"}
    assert all(one.image.shape[-2:] == (64, 64) for batch in batches for one in batch)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_an_evaluator_gives_every_case_what_it_gets_alone(batch_size, detector):
    found = {}
    evaluator = SupervisedEvaluator(
        device="cpu",
        val_data_loader=SliceBatches(Dataset(CASES), detector.resize, batch_size),
        network=detector,
        inferer=SliceBatchInferer(),
        iteration_update=detect_slices,
        decollate=False,
        postprocessing=lambda data: data | {"seen": True},
    )

    @evaluator.on(Events.ITERATION_COMPLETED)
    def note(engine):
        found.update({b["name"]: o for b, o in zip(engine.state.batch, engine.state.output, strict=True)})

    evaluator.run()
    assert set(found) == set("abcde")
    for one in CASES:
        alone = SliceBatchInferer()(one["image"][None], detector)
        together = found[one["name"]]
        assert together["seen"]
        assert together["label"] == 0
        torch.testing.assert_close(
            together["pred"]["map"].as_tensor(), alone["map"][0].as_tensor(), atol=1e-4, rtol=1e-4
        )
        for key in ("slice_scores", "slice_counts"):
            torch.testing.assert_close(together["pred"][key], alone[key][0], atol=1e-4, rtol=1e-4)
        assert together["pred"]["map"].shape[1:] == one["image"].shape[1:]


def test_reading_goes_on_while_the_caller_computes():
    started = threading.Event()

    def source():
        yield 0
        yield 1
        started.set()
        yield 2

    items = read_ahead(source(), 2)
    assert next(items) == 0
    assert started.wait(5)  # nobody has asked for item 2 yet
    assert list(items) == [1, 2]


def test_no_more_is_read_ahead_than_asked():
    read = []

    def source():
        for number in range(100):
            read.append(number)
            yield number

    items = read_ahead(source(), 2)
    next(items)
    time.sleep(0.1)
    assert len(read) <= 4


def test_an_error_while_reading_ahead_comes_out():
    def source():
        yield 0
        raise BundleError("bad file")

    items = read_ahead(source(), 2)
    assert next(items) == 0
    with pytest.raises(BundleError, match="bad file"):
        next(items)


def cached(detector, cases, folder, transform=lambda case: case):
    return EmbeddingDataset(cases, transform, detector, Compute("cpu", "fp32"), EmbeddingStore(folder, folder, {}), 4)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    found = []
    for one in CASES[:3]:
        path = tmp_path / "images" / one["name"]
        path.write_bytes(one["name"].encode())
        found.append({"name": one["name"], "image": str(path)})
    return found


def decoded(files, seen):
    def transform(item):
        seen.append(item["name"])
        return next(one for one in CASES if one["name"] == item["name"])

    return transform


def test_embeddings_are_those_of_the_detector_in_order(detector, files, tmp_path):
    dataset = cached(detector, files, tmp_path / "cache", decoded(files, []))
    assert len(dataset) == 9
    slices = [image for one in CASES[:3] for image in one["image"].as_tensor().unbind(-1)]
    for index, image in enumerate(slices):
        expected = detector.embed(image[None])[0]
        torch.testing.assert_close(dataset[index], expected, atol=5e-3, rtol=5e-3)
    batches = list(dataset.batches(batch_size=2))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1]
    torch.testing.assert_close(torch.cat(batches), torch.stack([dataset[i] for i in range(9)]))


def placed(name, indices, spacing=2.5):
    """What the transform of training gives of a volume: chosen slices of it."""
    affine = torch.diag(torch.tensor([1.0, 1.0, spacing, 1.0]))
    meta = {"slice_axis": 2}
    return [
        {"name": name, "image": MetaTensor(torch.rand(1, 48, 40), affine, meta | {"slice_index": index})}
        for index in indices
    ]


def test_volumes_are_known_by_the_places_of_their_slices_and_pictures_are_none(detector, files, tmp_path):
    items = {"a": placed("a", [2, 3, 5]), "b": case("b", 1), "c": placed("c", [0, 4])}
    dataset = cached(detector, files, tmp_path / "cache", lambda item: items[item["name"]])
    assert dataset.volumes == [([0, 1, 2], [5.0, 7.5, 12.5]), ([4, 5], [0.0, 10.0])]


def test_a_bounded_number_of_patches_comes_from_slices_at_equal_distances(detector, files, tmp_path):
    dataset = cached(detector, files, tmp_path / "cache", decoded(files, []))
    (batch,) = dataset.batches(patches=3 * 16 + 5)  # 16 patches a slice
    torch.testing.assert_close(batch, torch.stack([dataset[i] for i in (0, 3, 6)]))


def test_nothing_is_read_or_embedded_twice(detector, files, tmp_path):
    seen = []
    first = cached(detector, files[:2], tmp_path / "cache", decoded(files, seen))
    again = cached(detector, files, tmp_path / "cache", decoded(files, seen))
    assert seen == ["a", "b", "c"]
    assert torch.equal(first[0], again[0])


def test_an_interrupted_run_keeps_what_it_embedded(detector, files, tmp_path, monkeypatch):
    from bundle import store

    monkeypatch.setattr(store, "SHARD_BYTES", 1)
    seen = []

    def interrupted(item):
        if item["name"] == "c":
            raise KeyboardInterrupt
        return decoded(files, seen)(item)

    with pytest.raises(KeyboardInterrupt):
        cached(detector, files, tmp_path / "cache", interrupted)
    cached(detector, files, tmp_path / "cache", decoded(files, seen))
    assert seen[-1] == "c"
    assert seen.count("a") == 1


def test_a_case_that_has_its_key_is_not_hashed_again(detector, files, tmp_path, monkeypatch):
    add_keys(files)
    monkeypatch.setattr("bundle.files._file_digest", lambda *state: pytest.fail(f"hashed again: {state}"))
    dataset = cached(detector, files, tmp_path / "cache", decoded(files, []))
    assert dataset.keys == [case["key"] for case in files]


class Decoded:
    """A transform that reads what the file of a case says; it can travel to another process."""

    def __call__(self, item):
        try:
            slices = int(Path(item["image"]).read_text())
        except (OSError, ValueError) as error:
            raise BundleError(f"cannot read '{item['image']}'") from error
        return case(item["name"], slices)


FAULTS = {
    "vanished": Path.unlink,
    "cut": lambda path: path.write_text(""),
    "changed": lambda path: path.write_text("11"),
}


@pytest.fixture
def checked(tmp_path):
    """Three cases that were read once."""
    (tmp_path / "images").mkdir()
    cases = []
    for name, slices in (("a", 3), ("b", 1), ("c", 2)):
        (tmp_path / "images" / name).write_text(str(slices))
        cases.append({"name": name, "image": str(tmp_path / "images" / name)})
    return keep_readable(cases, Decoded())


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_goes_bad_after_the_check_is_named_counted_and_passed_over(
    checked, detector, caplog, fault, num_workers
):
    FAULTS[fault](Path(checked[1]["image"]))
    dataset = Dataset(checked, Compose([Decoded()]))
    batches = list(SliceBatches(dataset, detector.resize, 2, num_workers, on_error="skip"))
    assert [one.case.item["name"] for batch in batches for one in batch] == ["a", "a", "a", "c", "c"]
    assert f"skipped: {'' if fault == 'changed' else 'cannot read '}'{checked[1]['image']}'" in caplog.text
    assert "skipped 1 of 3 images that cannot be read any more" in caplog.text
    with pytest.raises(BundleError, match="images/b'") as caught:
        list(SliceBatches(dataset, detector.resize, 2, num_workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_bad_before_it_is_embedded_is_left_out_of_training(
    checked, detector, tmp_path, caplog, fault, num_workers
):
    add_keys(checked)
    bad = Path(checked[0]["image"])
    FAULTS[fault](bad)
    store = EmbeddingStore(tmp_path / "cache", tmp_path, {})
    given = (checked, Compose([Decoded()]), detector, Compute("cpu", "fp32"), store, 4, num_workers)
    with pytest.raises(BundleError, match="images/a'"):
        EmbeddingDataset(*given)
    dataset = EmbeddingDataset(*given, on_error="skip")
    assert [one["name"] for one in dataset.data] == ["b", "c"]
    assert len(dataset) == len(dataset.patients) == 3
    assert f"'{bad}'" in caplog.text and "skipped 1 of 3 images" in caplog.text
    assert checked[0]["key"] not in store  # nothing is kept of another content under this one's key


def test_what_vanishes_before_it_is_hashed_is_named_or_left_out(checked, detector, tmp_path, caplog):
    Path(checked[2]["image"]).unlink()
    given = (checked, Decoded(), detector, Compute("cpu", "fp32"), EmbeddingStore(tmp_path / "cache", tmp_path, {}))
    with pytest.raises(BundleError, match="no file at '.*images/c'"):
        EmbeddingDataset(*given)
    assert [one["name"] for one in EmbeddingDataset(*given, on_error="skip").data] == ["a", "b"]
    assert "skipped: no file at" in caplog.text


def test_moments_are_those_of_all_patches(detector, files, tmp_path):
    dataset = cached(detector, files, tmp_path / "cache", decoded(files, []))
    mean, deviation = dataset.channel_moments()
    patches = torch.cat(list(dataset.batches())).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, patches.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(deviation, patches.std(1, correction=0), atol=1e-4, rtol=1e-4)


def test_slices_know_their_patient_though_they_are_of_several_images(detector, files, tmp_path):
    cases = [files[0] | {"patient": "x"}, files[1], files[2] | {"patient": "x"}]
    patients = cached(detector, cases, tmp_path / "cache", decoded(files, [])).patients
    slices = [one["image"].shape[-1] for one in CASES[:3]]
    assert patients == [0] * slices[0] + [1] * slices[1] + [0] * slices[2]
