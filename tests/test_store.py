"""The feature cache: found by content and recipe, whole or not at all, never above its limit."""

import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from bundle import store as store_module
from bundle.data import EmbeddingStore
from bundle.errors import BundleError
from bundle.files import content_key

RECIPE = {"features": {"backbone": "b", "weights": "w"}, "image_size": 320}


def embeddings(seed=0, slices=2):
    return torch.randn(slices, 8, 4, 4, generator=torch.Generator().manual_seed(seed))


def filled(folder, keys="ab", recipe=RECIPE, **options):
    store = EmbeddingStore(folder, folder, recipe, **options)
    for seed, key in enumerate(keys):
        store.add(key, embeddings(seed))
        store.flush()
    return store


def test_an_entry_comes_back_in_a_later_run(tmp_path):
    filled(tmp_path)
    later = EmbeddingStore(tmp_path, tmp_path, RECIPE)
    assert "b" in later
    assert "c" not in later
    assert later.count("b") == 2
    torch.testing.assert_close(later.read("b", 1), embeddings(1)[1], atol=2e-3, rtol=1e-3)


def test_positions_of_slices_come_back_to_the_tenth_of_a_millimeter_and_more(tmp_path):
    store = filled(tmp_path, "a")
    store.add("b", embeddings(1), torch.tensor([1000.1, 1003.2]))
    store.flush()
    later = EmbeddingStore(tmp_path, tmp_path, RECIPE)
    assert later.positions("b") == pytest.approx([1000.1, 1003.2], abs=1e-3)
    assert all(math.isnan(position) for position in later.positions("a"))
    assert later.count("b") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"features": {"backbone": "b", "weights": "other"}},
        {"features": {"backbone": "other", "weights": "w"}},
        {"image_size": 448},
        {"precision": "bf16"},
    ],
)
def test_another_recipe_never_reads_a_stale_entry(change, tmp_path):
    filled(tmp_path)
    assert "a" not in EmbeddingStore(tmp_path, tmp_path, {**RECIPE, **change})


def test_another_precision_on_disk_is_another_recipe(tmp_path):
    filled(tmp_path)
    exact = filled(tmp_path, keys="c", stored="fp32")
    assert "a" not in exact
    assert torch.equal(exact.read("c", 0), embeddings(0)[0])


def test_the_folder_says_what_made_its_entries(tmp_path):
    store = filled(tmp_path)
    note = json.loads((store.folder / "recipe.json").read_text())
    assert note["features"] == RECIPE["features"]


def test_shards_are_plain_safetensors_in_half_precision(tmp_path):
    store = filled(tmp_path, keys="a")
    (shard,) = store.folder.glob("*.safetensors")
    assert load_file(shard)["a"].dtype == torch.float16


def test_a_key_is_the_content_not_the_name(tmp_path):
    (tmp_path / "one.png").write_bytes(b"pixels")
    shutil.copy(tmp_path / "one.png", tmp_path / "two.png")
    (tmp_path / "other.png").write_bytes(b"pixelz")
    assert content_key(tmp_path / "one.png") == content_key(tmp_path / "two.png")
    assert content_key(tmp_path / "one.png") != content_key(tmp_path / "other.png")


def test_the_key_of_a_folder_covers_all_its_files(tmp_path):
    (tmp_path / "1.dcm").write_bytes(b"a")
    before = content_key(tmp_path)
    (tmp_path / "2.dcm").write_bytes(b"b")
    assert content_key(tmp_path) != before


def test_what_an_interrupted_run_wrote_is_there_and_its_half_file_is_not_read(tmp_path):
    store = filled(tmp_path, keys="a")
    (shard,) = store.folder.glob("*.safetensors")
    (store.folder / "x.safetensors.1.partial").write_bytes(shard.read_bytes()[:50])
    later = EmbeddingStore(tmp_path, tmp_path, RECIPE)
    assert "a" in later


def test_a_damaged_shard_is_made_anew(tmp_path):
    store = filled(tmp_path, keys="a")
    (shard,) = store.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:50])
    later = EmbeddingStore(tmp_path, tmp_path, RECIPE)
    assert "a" not in later
    later.add("a", embeddings())
    later.flush()
    torch.testing.assert_close(later.read("a", 0), embeddings()[0], atol=2e-3, rtol=1e-3)


def test_many_entries_fill_one_shard_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 4 * embeddings().half().nbytes)
    store = EmbeddingStore(tmp_path, tmp_path, RECIPE)
    for number in range(10):
        store.add(str(number), embeddings(number))
    assert len(list(store.folder.glob("*.safetensors"))) == 2
    store.flush()
    assert len(list(store.folder.glob("*.safetensors"))) == 3
    assert all(str(number) in store for number in range(10))


def test_the_least_recently_used_entries_make_room(tmp_path):
    size = filled(tmp_path / "size", keys="a").total_bytes()
    old = filled(tmp_path / "cache", keys="ab", recipe={"old": True})
    for age, shard in enumerate(sorted(old.folder.glob("*.safetensors"), key=lambda path: "a" in load_file(path))):
        os.utime(shard, (1000 + age, 1000 + age))  # b was used before a
    store = EmbeddingStore(tmp_path / "cache", tmp_path, RECIPE, limit_gb=2.5 * size / 1e9)
    store.add("c", embeddings())
    store.flush()
    again = EmbeddingStore(tmp_path / "cache", tmp_path, {"old": True})
    assert ("a" in again, "b" in again) == (True, False)
    assert store.total_bytes() <= 2.5 * size


def test_entries_that_are_in_use_are_never_removed_and_the_limit_holds(tmp_path):
    size = filled(tmp_path / "size", keys="a").total_bytes()
    filled(tmp_path / "cache", keys="a")
    store = EmbeddingStore(tmp_path / "cache", tmp_path, RECIPE, limit_gb=1.5 * size / 1e9)
    store.use(["a"])
    store.add("b", embeddings())
    with pytest.raises(BundleError, match="cache_limit_gb"):
        store.flush()
    assert "a" in EmbeddingStore(tmp_path / "cache", tmp_path, RECIPE)
    assert store.total_bytes() <= 1.5 * size


@pytest.mark.parametrize("off", [None, "off"])
def test_turned_off_it_leaves_nothing(off, tmp_path):
    store = EmbeddingStore(off, tmp_path, RECIPE)
    store.add("a", embeddings())
    store.flush()
    torch.testing.assert_close(store.read("a", 0), embeddings()[0], atol=2e-3, rtol=1e-3)
    del store
    assert not list(tmp_path.iterdir())


def test_values_beyond_half_precision_are_refused(tmp_path):
    store = EmbeddingStore(tmp_path, tmp_path, RECIPE)
    with pytest.raises(BundleError, match="cache_precision fp32"):
        store.add("a", embeddings() * 1e6)


@pytest.mark.parametrize(("options", "message"), [({"limit_gb": 0}, "cache_limit_gb"), ({"stored": "fp61"}, "'fp16'")])
def test_bad_settings_are_refused(options, message, tmp_path):
    with pytest.raises(BundleError, match=message):
        EmbeddingStore(tmp_path, tmp_path, RECIPE, **options)


def test_it_says_what_it_takes(tmp_path):
    store = filled(tmp_path)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert store.total_bytes() == taken
    assert f"{taken / 1e9:.3g} GB of at most 20 GB" in store.describe()


@pytest.mark.parametrize("kept", [True, False])
def test_asking_for_an_entry_writes_nothing(kept, tmp_path):
    store = EmbeddingStore(tmp_path / "cache" if kept else "off", tmp_path / "output", RECIPE)
    assert "a" not in store
    assert not list(tmp_path.iterdir())
