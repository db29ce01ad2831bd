"""The feature cache: budgets, disk, several processes, the encoder's fingerprint, and training with it."""

import copy
import itertools
import multiprocessing
import os
import pickle
import resource
import threading
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import grpo_args, seg_bias, sft_args, tiny_headed_model, tiny_rows, tiny_segmenter
from cache_workers import content, equal, work
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from trl.trainer.grpo_config import GRPOConfig

from segrl import DenseLoss, SegGRPOConfig, SegGRPOTrainer, SegSFTConfig, SegSFTTrainer
from segrl.caching import EncoderFingerprint, FeatureCache, ImageKeys, content_key
from segrl.errors import SegRLError
from segrl.heads import LinearAdapter, MaskHead, SegInput, SegTokenProbe
from segrl.segmenters import ImageFeatures

BIG = 2**30


def block(size, value=0.0):
    """One tensor of `size` bytes."""
    return [torch.full((size // 4,), float(value))]


def values(cache, *keys):
    return [None if (found := cache.get(key)) is None else found[0][0].item() for key in keys]


def taken(cache, **settings):
    found = cache.get("a", **settings)
    assert found is not None
    return found


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def bytes_in(folder):
    total = 0
    for path in Path(folder).rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # it went while we looked
    return total


def entry_size(tmp_path, tensors):
    """Bytes of the file of one entry."""
    FeatureCache(0, tmp_path / "measured", BIG).put("a", tensors)
    return bytes_in(tmp_path / "measured")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8))


class TestContent:
    def test_copies_are_the_same_in_every_process(self):
        read = ImageKeys()
        assert read(picture(0)) == read(picture(0).copy()) == ImageKeys()(picture(0)) == content_key(picture(0))
        array = np.asarray(picture(0))
        assert content_key(array) == content_key(array.copy()) == content_key(torch.from_numpy(array.copy()))
        assert content_key(array[::2]) == content_key(array[::2].copy())
        half = torch.ones(3, dtype=torch.bfloat16)
        assert content_key(half, {"a": 1}) == content_key(half.clone(), {"a": 1})
        assert content_key("a", 1) == "4a63694e3e38ebd07fa94d789bac80f8"

    def test_other_content_is_another(self):
        plain = Image.new("RGB", (6, 4))
        touched = plain.copy()
        touched.putpixel((5, 3), (0, 0, 1))
        turned = plain.copy()
        turned.getexif()[0x0112] = 6  # processors turn it upright
        palette = [Image.new("P", (6, 4)) for _ in range(2)]
        palette[0].putpalette([255, 0, 0])
        palette[1].putpalette([0, 255, 0])
        others = [plain, touched, turned, Image.new("RGB", (4, 6)), Image.new("L", (6, 4)), *palette]
        others += [np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6, 3), np.int16), torch.zeros(3, 4, 6)]
        others += [torch.zeros(3, 4, 6).bfloat16(), "", b"", None, 0, False, [], {}, [[]], "1", 1]
        assert len({content_key(part) for part in others}) == len(others)
        groups = [("ab", "c"), ("a", "bc"), ("abc",), (["ab", "c"],), ("c", "ab"), (np.zeros(2), np.zeros(1))]
        assert len({content_key(*parts) for parts in [*groups, (np.zeros(3),)]}) == len(groups) + 1

    def test_what_is_not_known_is_never_the_same(self):
        read, path = ImageKeys(), object()
        assert read(path) == read(path)
        assert len({read(object()) for _ in range(50)}) == 50
        with pytest.raises(TypeError, match="object"):
            content_key(["a", path])
        with pytest.raises(TypeError, match="ndarray"):
            content_key(np.array([path]))

    def test_object_is_read_once(self, monkeypatch):
        read, image, calls = ImageKeys(), picture(0), []
        monkeypatch.setattr(image, "tobytes", lambda: calls.append(1) or b"x")
        assert read(image) == read(image)
        assert calls == [1]


class TestMemory:
    def test_what_is_put_comes_back_exactly(self):
        cache = FeatureCache()
        tensors = [
            torch.randn(1, 3, 4),
            torch.randn(5).to(torch.bfloat16),
            torch.tensor(7, dtype=torch.int64),
            torch.zeros(0, 2),
            torch.tensor([True, False]),
        ]
        cache.put("a", tensors)
        found = cache.get("a")
        assert equal(found, tensors)
        assert cache.nbytes == sum(tensor.nbytes for tensor in tensors)
        assert cache.get("b") is None
        assert (cache.hits, cache.disk_hits, cache.misses) == (1, 0, 1)

    def test_least_recently_used_goes_first(self):
        cache = FeatureCache(1200)
        for number, key in enumerate("abc"):
            cache.put(key, block(400, number))
        assert cache.nbytes == 1200
        assert values(cache, "a") == [0]
        cache.put("d", block(400, 3))
        assert values(cache, "a", "b", "c", "d") == [0, None, 2, 3]
        cache.put("e", block(800, 4))
        assert values(cache, "a", "b", "c", "d", "e") == [None, None, None, 3, 4]

    def test_an_entry_over_the_budget_is_not_kept_and_drives_nothing_out(self):
        cache = FeatureCache(1000)
        cache.put("a", block(400))
        cache.put("b", block(1004))
        assert values(cache, "a", "b") == [0, None]

    def test_a_key_put_again_has_the_new_tensors_and_counts_once(self):
        cache = FeatureCache(1000)
        cache.put("a", block(400, 1))
        cache.put("a", block(800, 2))
        assert (values(cache, "a"), cache.nbytes) == ([2], 800)
        cache.put("a", block(1200, 3))
        assert (values(cache, "a"), cache.nbytes) == ([None], 0)

    def test_nothing_is_kept_when_it_is_off(self):
        cache = FeatureCache(0)
        cache.put("a", block(4))
        assert cache.get("a") is None
        assert cache.nbytes == 0

    def test_clear(self):
        cache = FeatureCache()
        cache.put("a", block(4))
        cache.clear()
        assert (cache.nbytes, cache.get("a")) == (0, None)

    def test_one_image_of_a_batch_does_not_keep_the_batch_alive(self):
        batch = torch.randn(50, 10, requires_grad=True) * 1
        cache = FeatureCache()
        cache.put("a", [batch[3:4], batch[4:5].T])
        first, second = taken(cache)
        assert not first.requires_grad
        assert torch.equal(first, batch[3:4].detach())
        assert torch.equal(second, batch[4:5].T.detach())
        assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 40
        assert cache.nbytes == 80

    def test_features_made_for_inference_can_be_trained_on(self):
        cache = FeatureCache()
        with torch.inference_mode():
            cache.put("a", [torch.ones(3)])
        weight = torch.ones(3, requires_grad=True)
        (found,) = taken(cache)
        (weight * found).sum().backward()
        assert weight.grad is not None

    def test_another_device(self):
        cache = FeatureCache()
        cache.put("a", block(8))
        (moved,) = taken(cache, device="meta")
        assert moved.device.type == "meta"
        (kept,) = taken(cache)
        assert kept.device.type == "meta"  # moved once, not at every request
        assert cache.nbytes == 8

    @given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 30)), max_size=40), st.integers(0, 60))
    def test_equals_a_plain_queue(self, requests, budget):
        """A request that misses puts `size` numbers; the reference keeps a list from the oldest to the newest use."""
        cache, queue = FeatureCache(budget * 4), OrderedDict()
        for key, size in requests:
            found = cache.get(key)
            assert (found is not None) == (key in queue)
            if found is None:
                cache.put(key, block(size * 4))
                if size <= budget:
                    queue[key] = size
            else:
                assert len(found[0]) == queue[key]
                queue.move_to_end(key)
            while sum(queue.values()) > budget:
                queue.popitem(last=False)
            assert cache.nbytes == 4 * sum(queue.values()) <= budget * 4

    @pytest.mark.parametrize("settings", [{"memory_bytes": -1}, {"folder": "x", "disk_bytes": -5}])
    def test_a_budget_below_zero(self, settings):
        with pytest.raises(SegRLError, match=r"(memory_bytes=-1|disk_bytes=-5): expected a number of bytes, 0 or more"):
            FeatureCache(**settings)

    def test_a_folder_without_budget(self):
        with pytest.raises(SegRLError, match=r"folder='x' with disk_bytes=0.*give it a budget"):
            FeatureCache(folder="x")

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
    def test_a_copy_has_the_settings_and_nothing_in_memory(self, again, tmp_path):
        cache = FeatureCache(10_000_000, tmp_path / "features", 20_000_000)
        cache.put("a", block(4_000_000))
        assert len(pickle.dumps(cache)) < 1000
        other = again(cache)
        assert (other.memory_bytes, other.folder, other.disk_bytes) == (10_000_000, tmp_path / "features", 20_000_000)
        assert (other.nbytes, other.hits, other.disk_hits, other.misses) == (0, 0, 0, 0)
        assert values(other, "a") == [0]
        assert other.disk_hits == 1


class TestDisk:
    def test_another_process_or_a_later_run_finds_the_entry_exactly(self, tmp_path):
        tensors = [
            torch.randn(2, 3).T,
            torch.randn(5).to(torch.float16),
            torch.randn(1, 1).to(torch.bfloat16),
            torch.tensor(3.5, dtype=torch.float64),
            torch.zeros(0, 2),
            torch.tensor([True, False]),
        ]
        FeatureCache(0, tmp_path, BIG).put("any key: /..\\ \0", [*tensors, tensors[0]])
        cache = FeatureCache(BIG, str(tmp_path), BIG)
        assert equal(cache.get("any key: /..\\ \0"), [*tensors, tensors[0]])
        assert (cache.hits, cache.disk_hits, cache.misses) == (0, 1, 0)
        assert equal(cache.get("any key: /..\\ \0"), [*tensors, tensors[0]])
        assert (cache.hits, cache.disk_hits, cache.misses) == (1, 1, 0)  # a file that was read is kept in memory

    def test_what_falls_out_of_memory_is_on_disk(self, tmp_path):
        cache = FeatureCache(1000, tmp_path, BIG)
        for number, key in enumerate("abc"):
            cache.put(key, block(800, number))
        assert values(cache, "a", "b", "c") == [0, 1, 2]
        assert (cache.hits, cache.disk_hits) == (0, 3)
        assert cache.nbytes == 800

    def test_files_are_safetensors_and_nothing_else_is_left(self, tmp_path):
        cache = FeatureCache(BIG, tmp_path, BIG)
        cache.put("a", block(400, 2.0))
        cache.put("a", block(400, 3.0))
        (path,) = [path for path in files(tmp_path) if path.stat().st_size]
        assert torch.equal(load_file(path)["0"], block(400, 3.0)[0])

    def test_the_oldest_access_goes_first(self, tmp_path):
        size = entry_size(tmp_path, block(4000))
        folder = tmp_path / "features"
        cache = FeatureCache(0, folder, 3 * size)
        for number, key in enumerate("abc"):
            cache.put(key, block(4000, number))
        assert values(cache, "a") == [0]
        cache.put("d", block(4000, 3))
        assert bytes_in(folder) == 3 * size
        assert values(cache, "a", "b", "c", "d") == [0, None, 2, 3]
        cache.put("a", block(4000, 5))  # the same key does not count twice
        assert values(cache, "a", "c", "d") == [5, 2, 3]

    def test_a_smaller_budget_than_before(self, tmp_path):
        size = entry_size(tmp_path, block(4000))
        for number in range(5):
            FeatureCache(0, tmp_path / "features", BIG).put(str(number), block(4000, number))
        FeatureCache(0, tmp_path / "features", 2 * size).put("new", block(4000, 9))
        assert values(FeatureCache(0, tmp_path / "features", BIG), "3", "4", "new") == [None, 4, 9]

    def test_an_entry_over_the_budget_is_not_written_and_drives_nothing_out(self, tmp_path):
        cache = FeatureCache(0, tmp_path, 5000)
        cache.put("a", block(4000, 1))
        cache.put("b", block(8000))
        assert values(cache, "a", "b") == [1, None]

    def test_files_of_others_are_left_alone(self, tmp_path):
        save_file({"weight": torch.zeros(10_000)}, tmp_path / "model.safetensors")
        (tmp_path / "notes.tmp").write_text("mine")
        cache = FeatureCache(0, tmp_path, 5000)
        for key in "abc":
            cache.put(key, block(4000))
        assert (tmp_path / "model.safetensors").exists()
        assert (tmp_path / "notes.tmp").exists()

    def test_what_a_killed_process_left_half_written_is_removed(self, tmp_path):
        cache = FeatureCache(0, tmp_path, BIG)
        cache.put("a", block(4000))
        (path,) = [path for path in files(tmp_path) if path.stat().st_size]
        left = path.with_name(path.name + ".tmp")
        left.write_bytes(path.read_bytes()[:100])
        assert values(cache, "a") == [0]
        cache.put("b", block(4000))
        assert not left.exists()

    @pytest.mark.slow
    def test_a_file_is_whole_as_soon_as_it_has_its_name(self, tmp_path):
        tensors, seen, done = [torch.zeros(2**23)], set(), threading.Event()
        size = entry_size(tmp_path, tensors)
        folder = tmp_path / "features"

        def watch():
            while not done.is_set():
                for path in folder.glob("*.safetensors"):
                    with suppress(FileNotFoundError):
                        seen.add(path.stat().st_size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        cache = FeatureCache(0, folder, BIG)
        for key in "abcdef":
            cache.put(key, tensors)
        done.set()
        watcher.join()
        assert seen == {size}

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.data())
    def test_a_damaged_file_is_a_miss_and_is_removed(self, tmp_path, data):
        expected = [torch.arange(30.0).reshape(1, 5, 6), torch.ones(7).to(torch.bfloat16)]
        FeatureCache(0, tmp_path, BIG).put("a", expected)
        (path,) = [path for path in files(tmp_path) if path.stat().st_size]
        whole = path.read_bytes()
        kind = data.draw(st.sampled_from(["cut", "changed", "longer", "other"]))
        if kind == "other":
            damaged = data.draw(st.binary(max_size=300))
        elif kind == "longer":
            damaged = whole + data.draw(st.binary(min_size=1, max_size=9))
        else:
            place = data.draw(st.integers(0, len(whole) - 1))
            change = bytes([whole[place] ^ data.draw(st.integers(1, 255))])
            damaged = whole[:place] if kind == "cut" else whole[:place] + change + whole[place + 1 :]
        path.write_bytes(damaged)
        cache = FeatureCache(BIG, tmp_path, BIG)
        found = cache.get("a")
        if found is None:
            assert not path.exists()
            assert (cache.disk_hits, cache.misses, cache.nbytes) == (0, 1, 0)
            cache.put("a", expected)
            assert equal(FeatureCache(0, tmp_path, BIG).get("a"), expected)
        else:  # a change that means nothing, such as a space in the file's header
            assert equal(found, expected)

    def test_a_deleted_file_is_a_miss_and_a_deleted_folder_comes_back(self, tmp_path):
        folder = tmp_path / "deep" / "features"
        cache = FeatureCache(0, folder, BIG)
        cache.put("a", block(400))
        for path in files(folder):
            path.unlink()
        assert values(cache, "a") == [None]
        folder.rmdir()
        assert values(cache, "a") == [None]
        cache.put("a", block(400, 2))
        assert values(cache, "a") == [2]

    def test_a_folder_that_cannot_be_written_warns_once_and_memory_goes_on(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        cache = FeatureCache(BIG, tmp_path / "file" / "features", BIG)
        with pytest.warns(UserWarning, match=r"cannot write .*features.*feature_cache_dir.*go on without"):
            cache.put("a", block(400, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache.put("b", block(400, 2))
            assert values(cache, "a", "b", "c") == [1, 2, None]

    def test_a_full_disk_warns_once_and_what_is_there_can_still_be_read(self, tmp_path):
        cache = FeatureCache(0, tmp_path, BIG)
        cache.put("a", block(400, 1))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a write past it fails as on a full disk
        try:
            with pytest.warns(UserWarning, match=r"cannot write"):
                cache.put("b", block(40_000, 2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        cache.put("c", block(400, 3))
        assert values(cache, "a", "b", "c") == [1, None, None]
        assert len([path for path in files(tmp_path) if path.stat().st_size]) == 1

    @pytest.mark.long
    def test_several_processes_share_a_folder(self, tmp_path):
        """Three processes read and write 24 entries where 6 fit, while this one deletes, damages and measures."""
        budget = 6 * entry_size(tmp_path, content(7))
        folder, context = tmp_path / "features", multiprocessing.get_context("spawn")
        results: Any = context.Queue()
        workers = [context.Process(target=work, args=(n, str(folder), budget, 300, results)) for n in range(3)]
        largest, done = 0, threading.Event()

        def disturb():
            nonlocal largest
            for turn in itertools.count():
                if done.wait(0.005):
                    return
                largest = max(largest, bytes_in(folder))
                entries = [path for path in files(folder) if path.name.endswith(".safetensors")]
                if entries and turn % 3 == 0:
                    entries[turn % len(entries)].unlink(missing_ok=True)
                elif entries and turn % 3 == 1:
                    with suppress(FileNotFoundError):
                        os.truncate(entries[turn % len(entries)], 500)

        for worker in workers:
            worker.start()
        watcher = threading.Thread(target=disturb)
        watcher.start()
        reports = [results.get(timeout=200) for _ in workers]
        done.set()
        watcher.join()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        assert [wrong for wrong, *_ in reports] == [[]] * 3
        assert all(disk_hits > 0 for *_, disk_hits, _ in reports)
        assert 0 < largest < 2 * budget  # what is listed while it changes may be counted twice
        assert bytes_in(folder) <= budget
        assert not [path for path in files(folder) if path.name.endswith(".tmp")]


class TestFingerprint:
    def test_the_same_encoder_has_the_same_fingerprint_in_every_run(self):
        first, second = tiny_segmenter(), tiny_segmenter()
        expected = EncoderFingerprint()(first)
        assert expected is not None
        second.freeze(encoder=False)
        assert EncoderFingerprint()(second) == expected
        second.requires_grad_(False)
        assert EncoderFingerprint()(second) == expected
        again = type(first)(first.config)
        again.load_state_dict(first.state_dict())
        assert EncoderFingerprint()(again) == expected
        assert EncoderFingerprint()(copy.deepcopy(first)) == expected

    def test_what_trains_is_left_as_it_was(self):
        segmenter = tiny_segmenter()
        segmenter.sam.sam_mask_decoder.conv_s0.requires_grad_(False)
        before = [parameter.requires_grad for parameter in segmenter.parameters()]
        assert True in before
        EncoderFingerprint()(segmenter)
        assert [parameter.requires_grad for parameter in segmenter.parameters()] == before

    @pytest.mark.parametrize("change", ["load", "in place", "swap", "dtype", "buffer"])
    def test_other_weights_are_noticed(self, change):
        segmenter, fingerprint = tiny_segmenter(), EncoderFingerprint()
        before = fingerprint(segmenter)
        assert fingerprint(segmenter) == before
        weight = segmenter.sam.image_encoder.neck.convs[0].conv.weight
        if change == "load":
            segmenter.load_state_dict(tiny_segmenter(seed=1).state_dict())
        elif change == "in place":
            with torch.no_grad():
                weight.view(-1)[5] += 0.25
        elif change == "swap":
            weight.data = weight.data + 1
        elif change == "dtype":
            segmenter.to(torch.bfloat16)
        else:
            segmenter.pixel_mean[0] = 0.0
        after = fingerprint(segmenter)
        assert after not in (None, before)
        assert EncoderFingerprint()(segmenter) == after

    def test_an_engine_that_moves_weights(self):
        """Place and version say nothing then: other storage is no change, until other weights are loaded."""
        segmenter, fingerprint = tiny_segmenter(), EncoderFingerprint()
        fingerprint.hold()
        expected = fingerprint(segmenter)
        for parameter in segmenter.parameters():
            parameter.data = parameter.data.clone() + 1
        assert fingerprint(segmenter) == expected == EncoderFingerprint()(tiny_segmenter())
        fingerprint.forget()
        assert fingerprint(segmenter) not in (None, expected)

    def test_reading_weights_leaves_their_storage_to_its_owner(self):
        """FSDP2 frees gathered weights by resizing their storage, which a view of numpy forbids."""
        segmenter = tiny_segmenter()
        EncoderFingerprint()(segmenter)
        for parameter in segmenter.parameters():
            parameter.untyped_storage().resize_(0)

    def test_weights_that_come_back_have_their_old_fingerprint(self):
        segmenter, fingerprint = tiny_segmenter(), EncoderFingerprint()
        before = fingerprint(segmenter)
        segmenter.load_state_dict(tiny_segmenter(seed=1).state_dict())
        assert fingerprint(segmenter) != before
        segmenter.load_state_dict(tiny_segmenter().state_dict())
        assert fingerprint(segmenter) == before

    def test_the_decoder_does_not_matter(self):
        segmenter, fingerprint = tiny_segmenter(), EncoderFingerprint()
        before = fingerprint(segmenter)
        with torch.no_grad():
            for parameter in segmenter.sam.sam_mask_decoder.transformer.parameters():
                parameter.add_(1)
        assert fingerprint(segmenter) == before == EncoderFingerprint()(segmenter)

    def test_another_architecture_or_segmenter(self):
        class Other(type(tiny_segmenter())):
            pass

        segmenter = tiny_segmenter()
        other = Other(segmenter.config)
        other.load_state_dict(segmenter.state_dict())
        found = [EncoderFingerprint()(s) for s in (segmenter, other, tiny_segmenter(window_spec=(4, 4, 4, 2)))]
        assert len({*found}) == 3
        fingerprint = EncoderFingerprint()
        assert [fingerprint(s) for s in (segmenter, other)] == found[:2]

    def test_it_is_computed_once(self):
        """Changes through `.data` are invisible, so the old value shows that nothing was read again."""
        segmenter, fingerprint = tiny_segmenter(), EncoderFingerprint()
        before = fingerprint(segmenter)
        segmenter.sam.image_encoder.neck.convs[0].conv.weight.data.add_(1)
        assert fingerprint(segmenter) == before

    def test_weights_that_are_elsewhere_have_none(self):
        segmenter = tiny_segmenter()
        weight: Any = segmenter.sam.image_encoder.neck.convs[0].conv.weight
        weight.ds_id = 3  # how DeepSpeed marks a parameter that is partitioned
        assert EncoderFingerprint()(segmenter) is None


def train(kind, folder, *, epochs=2, texts=None, model=None, **settings):
    """Train on two images for some epochs; the trainer."""
    headed, processor = tiny_headed_model() if model is None else model
    rows = tiny_rows(2, processor, completions=kind == "sft")
    common: Any = {
        "train_dataset": rows,
        "processing_class": processor,
        "dense_losses": [DenseLoss("dice_ce")],
    }
    if kind == "sft":
        args = sft_args(folder, max_steps=epochs, per_device_train_batch_size=2, seed=3, **settings)
        trainer: Any = SegSFTTrainer(headed, args, **common)
    else:
        args = grpo_args(folder, max_steps=2 * epochs, generation_kwargs=seg_bias(processor, 8.0), seed=3, **settings)
        trainer = SegGRPOTrainer(headed, "dual_granularity_mask", args, **common)
    trainer.train()
    return trainer


class TestTraining:
    def test_settings(self):
        for kind in (SegGRPOConfig, SegSFTConfig):
            assert kind.feature_cache_memory == 2**30
            assert kind.feature_cache_dir is None
            assert kind.feature_cache_disk == 16 * 2**30

    @pytest.mark.long
    @pytest.mark.parametrize("kind", ["sft", "grpo"])
    def test_every_image_of_the_data_set_is_encoded_once(self, kind, tmp_path):
        trainer = train(kind, tmp_path, epochs=3)
        head = trainer.mask_head
        assert head.encoded_images == 2
        assert head.cache.misses == 2
        assert head.cache.hits == 4
        assert 0 < head.cache.nbytes <= head.cache.memory_bytes == 2**30
        assert head.cache.folder is None

    @pytest.mark.long
    @pytest.mark.parametrize("kind", ["sft", "grpo"])
    def test_without_memory_every_step_encodes_its_images_once(self, kind, tmp_path):
        trainer = train(kind, tmp_path, epochs=3, feature_cache_memory=0)
        assert trainer.mask_head.encoded_images == 6

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["sft", "grpo"])
    def test_the_cache_changes_nothing_that_is_learned(self, kind, tmp_path):
        with_cache = train(kind, tmp_path / "with", epochs=3)
        without = train(kind, tmp_path / "without", epochs=3, feature_cache_memory=0)
        for (name, first), second in zip(with_cache.model.named_parameters(), without.model.parameters(), strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4, msg=name)

    @pytest.mark.long
    @pytest.mark.parametrize(("first", "second"), [("sft", "grpo"), ("grpo", "sft"), ("sft", "sft")])
    def test_a_second_run_reads_what_the_first_encoded(self, first, second, tmp_path):
        disk: Any = {"feature_cache_dir": str(tmp_path / "features"), "feature_cache_memory": 0}
        assert train(first, tmp_path / "first", **disk).mask_head.encoded_images == 2
        trainer = train(second, tmp_path / "second", **disk)
        assert trainer.mask_head.encoded_images == 0
        assert trainer.mask_head.cache.disk_hits == 4
        assert bytes_in(tmp_path / "features") <= trainer.mask_head.cache.disk_bytes == 16 * 2**30

    @pytest.mark.slow
    def test_a_resumed_run_reads_what_the_first_encoded(self, tmp_path):
        disk: Any = {"feature_cache_dir": str(tmp_path / "features"), "save_strategy": "steps", "save_steps": 2}
        train("sft", tmp_path / "run", epochs=2, **disk)
        headed, processor = tiny_headed_model()
        trainer = SegSFTTrainer(
            headed,
            sft_args(tmp_path / "run", max_steps=4, per_device_train_batch_size=2, seed=3, **disk),
            train_dataset=tiny_rows(2, processor),
            processing_class=processor,
            dense_losses=[DenseLoss("dice_ce")],
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert trainer.state.global_step == 4
        assert headed.mask_head.encoded_images == 0

    @pytest.mark.long
    def test_another_encoder_in_the_same_folder_encodes_anew(self, tmp_path):
        disk: Any = {"feature_cache_dir": str(tmp_path / "features")}
        train("sft", tmp_path / "first", **disk)
        model, processor = tiny_headed_model()
        model.mask_head.segmenter.load_state_dict(tiny_segmenter(seed=1).state_dict())
        assert train("sft", tmp_path / "second", model=(model, processor), **disk).mask_head.encoded_images == 2

    def test_an_encoder_that_trains_is_not_cached(self, tmp_path):
        model = tiny_headed_model(freeze_encoder=False)
        trainer = train("sft", tmp_path / "run", model=model, feature_cache_dir=str(tmp_path / "features"))
        assert trainer.mask_head.encoded_images == 4
        assert not (tmp_path / "features").exists()
        assert trainer.mask_head.cache.nbytes == 0

    @pytest.mark.long
    def test_the_next_trainer_of_a_model_keeps_its_features_if_the_settings_are_the_same(self, tmp_path):
        model = tiny_headed_model()
        train("sft", tmp_path / "sft", model=model)
        assert train("grpo", tmp_path / "grpo", model=model).mask_head.encoded_images == 2
        trainer = train("grpo", tmp_path / "small", model=model, feature_cache_memory=1000)
        assert trainer.mask_head.cache.memory_bytes == 1000
        assert trainer.mask_head.encoded_images == 2 + 4

    @pytest.mark.long
    def test_bfloat16(self, tmp_path):
        """Autocast makes other features than full precision, and both lie in one folder."""
        disk: Any = {"feature_cache_dir": str(tmp_path / "features")}
        assert train("sft", tmp_path / "half", bf16=True, **disk).mask_head.encoded_images == 2
        assert train("sft", tmp_path / "full", **disk).mask_head.encoded_images == 2
        assert train("grpo", tmp_path / "again", bf16=True, **disk).mask_head.encoded_images == 0

    @pytest.mark.slow
    def test_worker_processes_of_the_data_loader(self, tmp_path):
        trainer = train("sft", tmp_path, epochs=3, dataloader_num_workers=1)
        assert trainer.mask_head.encoded_images == 2

    def test_trls_own_settings_object(self, tmp_path):
        model, processor = tiny_headed_model()
        args = grpo_args(tmp_path, GRPOConfig, max_steps=1, generation_kwargs=seg_bias(processor, 8.0))
        trainer = SegGRPOTrainer(
            model,
            "dual_granularity_mask",
            args,
            train_dataset=tiny_rows(2, processor, completions=False),
            processing_class=processor,
        )
        assert trainer.mask_head is not None
        assert trainer.mask_head.cache is not None
        assert trainer.mask_head.cache.memory_bytes == 2**30

    def test_a_wrong_budget_stops_before_training(self, tmp_path):
        with pytest.raises(SegRLError, match=r"memory_bytes=-1: expected a number of bytes"):
            train("sft", tmp_path, feature_cache_memory=-1)


class Noisy(nn.Module):
    """An encoder of one's own that drops features at random while it trains, and normalises with running statistics."""

    image_size = mask_size = 8
    prompt_dim = 4

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.decoder = nn.Linear(4, 1)

    def preprocess(self, image):
        return torch.ones(3, 8, 8)

    def encode(self, images):
        return ImageFeatures((self.encoder(images),))

    def decode(self, features, prompts, index):
        return (features.tensors[0][index] * prompts.sum(1)[:, :, None, None]).sum(1)

    def decode_boxes(self, features, boxes, index):
        return features.tensors[0][index].sum(1)

    def freeze(self, *, encoder):
        self.encoder.requires_grad_(not encoder)
        self.decoder.requires_grad_(True)


def test_a_frozen_encoder_of_ones_own_does_not_drop_out():
    head = MaskHead(SegTokenProbe(3), LinearAdapter(8, 4), Noisy(), cache=FeatureCache())
    head.train()
    image = torch.randn(3, 8, 8)
    (features,) = head.features([SegInput(image, key="a")])[0].tensors
    assert torch.equal(features, head.segmenter.encoder.eval()(image[None]))
    head.segmenter.encoder.train()
    head.features([SegInput(image * 2, key="b")])
    assert all(module.training for module in head.segmenter.modules())
    assert not head.segmenter.encoder[1].running_mean.any()
    head.features([SegInput(image, key="a")])
    assert head.encoded_images == 2
