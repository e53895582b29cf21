"""A cache is complete or absent, exact, safe with several readers and builders, and goes on where it was cut short."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mmattn.data import tensor_cache
from mmattn.data.tensor_cache import INDEX, MANIFEST, TensorCache, cache_name
from mmattn.errors import DataError, RunError, UsageError

KEYS = ["", "a red circle", "ein größerer Kreis\nunten", *(f"key {number}" for number in range(20))]
MADE_BY = {"weights": "abc", "size": 32}


def make(key: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(key) * 31 + sum(map(ord, key)))
    length = len(key) % 7
    return {
        "states": torch.randn(length, 5, generator=generator).bfloat16(),
        "mean": torch.randn(2, 3, 1 + length, generator=generator),
        "half": torch.randn(3, generator=generator).half(),
        "count": torch.tensor(length),
        "mask": torch.rand(4, generator=generator) < 0.5,
        "facts": torch.tensor(list(key.encode()), dtype=torch.uint8),
    }


class Encoder:
    def __init__(self, fail_at: int | None = None) -> None:
        self.seen: list[str] = []
        self.fail_at = fail_at

    def __call__(self, keys):
        if self.fail_at is not None and len(self.seen) >= self.fail_at:
            raise KeyboardInterrupt
        self.seen += keys
        return [make(key) for key in keys]


def build(folder, encode, keys=None, made_by=None, batch_size=4):
    return TensorCache.open_or_build(folder, made_by or MADE_BY, keys or KEYS, encode, batch_size=batch_size)


def assert_same(cache, keys=KEYS):
    for key in keys:
        found, expected = cache[key], make(key)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            assert torch.equal(found[name], tensor)


def test_what_went_in_comes_out_and_is_made_once(tmp_path):
    encode = Encoder()
    cache = build(tmp_path, encode)
    assert encode.seen == KEYS
    assert_same(cache)
    assert (cache.keys, len(cache), "key 3" in cache, "key 99" in cache) == (KEYS, len(KEYS), True, False)
    assert cache.nbytes() == sum(tensor.nbytes for key in KEYS for tensor in make(key).values())
    again = build(tmp_path, Encoder(fail_at=0))
    assert_same(again)
    again["key 3"]["mean"].zero_()  # a reader's own copy
    assert_same(again)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [cache.path.name]


def test_another_fingerprint_or_other_keys_are_another_cache(tmp_path):
    first = build(tmp_path, Encoder())
    for keys, made_by in ((KEYS, {**MADE_BY, "size": 64}), (KEYS[:-1], MADE_BY)):
        encode = Encoder()
        assert build(tmp_path, encode, keys, made_by).path != first.path
        assert encode.seen == list(keys)
    assert cache_name({"a": 1, "b": 2}, KEYS) == cache_name({"b": 2, "a": 1}, KEYS)
    assert json.loads((first.path / MANIFEST).read_text())["fingerprint"] == MADE_BY


def test_a_key_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"^the cache .* holds nothing for 'a dog': it was built for other data$"):
        build(tmp_path, Encoder())["a dog"]


@pytest.mark.parametrize("is_torn", [False, True])
def test_a_build_that_was_cut_short_goes_on(tmp_path, is_torn):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Encoder(fail_at=12))
    (partial,) = tmp_path.glob(".building-*")
    assert not list(tmp_path.glob("[!.]*"))
    if is_torn:
        with open(partial / INDEX, "a") as file:  # a line that the kill tore, and tensors that have no line
            file.write('["key 9", {"mean": [1,')
        with open(partial / "mean.bin", "ab") as file:
            file.write(b"\0" * 13)
    encode = Encoder()
    assert_same(build(tmp_path, encode))
    assert encode.seen == KEYS[12:]
    assert not partial.exists()


def test_a_partial_build_of_nonsense_is_started_again(tmp_path):
    partial = tmp_path / f".building-{cache_name(MADE_BY, KEYS)}"
    partial.mkdir()
    (partial / "tensors.json").write_text("{")
    (partial / INDEX).write_text("nonsense\n")
    assert_same(build(tmp_path, Encoder()))


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_partial_build_that_has_lost_tensors_is_started_again(tmp_path, spoil):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Encoder(fail_at=12))
    (partial,) = tmp_path.glob(".building-*")
    spoil(partial / "mean.bin")  # to make room on a full disk, say
    encode = Encoder()
    assert_same(build(tmp_path, encode))
    assert encode.seen == KEYS


def test_a_full_disk_is_said_and_what_is_finished_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_cache, "_SYNC_SECONDS", 0.0)
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write the cache .*: the disk is full; what was finished is kept in \.bui"
    ):
        build(tmp_path, Encoder())
    monkeypatch.setattr(os, "fsync", real)
    encode = Encoder()
    assert_same(build(tmp_path, encode))
    assert 0 < len(encode.seen) < len(KEYS)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot write the cache .*: (Not a directory|File exists)"):
        build(tmp_path / "file", Encoder())


def test_what_encode_raises_stays_what_it_is(tmp_path):
    def broken(keys):
        raise FileNotFoundError("no such picture")

    with pytest.raises(FileNotFoundError, match="no such picture"):
        build(tmp_path, broken)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"mean": torch.ones(2)}], "encode gave 1 entries for 2 keys"),
        (
            [{"mean": torch.ones(2)}, {"mean": torch.ones(2, 2)}],
            r"entry of 'b' holds mean \(float32, 2 dim.* others hold",
        ),
        ([{"mean": torch.ones(2)}, {"std": torch.ones(2)}], "the entry of 'b' holds std"),
        ([{"mean": torch.ones(2, dtype=torch.complex64)}] * 2, "a tensor cache holds float32, .*, not complex64"),
        ([{}, {}], "not empty entries"),
    ],
)
def test_entries_that_do_not_fit(tmp_path, entries, message):
    with pytest.raises(UsageError, match=message):
        build(tmp_path, lambda keys: entries, ["a", "b"])


def test_keys_that_cannot_be_used(tmp_path):
    for keys in ([], ["a", "a"]):
        with pytest.raises(UsageError, match="at least one key, and each key once"):
            TensorCache.open_or_build(tmp_path, MADE_BY, keys, Encoder())


def test_damage_is_found_when_it_is_opened(tmp_path):
    path = build(tmp_path, Encoder()).path
    with open(path / "mean.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(
        DataError, match=r"is damaged \(mean\.bin has not the size .*\): delete it, and it is built again"
    ):
        build(tmp_path, Encoder())
    (path / "mean.bin").unlink()
    with pytest.raises(DataError, match=r"not a complete tensor cache: .*mean\.bin is missing"):
        build(tmp_path, Encoder())
    (path / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        build(tmp_path, Encoder())
    (path / MANIFEST).unlink()
    assert_same(build(tmp_path, Encoder()))


def test_workers_read_it_and_it_travels_as_its_path(tmp_path):
    cache = build(tmp_path, Encoder())
    cache["key 1"]  # mapped before the fork
    assert len(pickle.dumps(cache)) < 500
    assert_same(pickle.loads(pickle.dumps(cache)))
    loader = DataLoader(KEYS, batch_size=None, collate_fn=lambda key: cache[key]["mean"], num_workers=2)
    for key, mean in zip(KEYS, loader, strict=True):
        assert torch.equal(mean, make(key)["mean"])


def _build_and_report(folder, queue):
    encode = Encoder()
    cache = build(folder, encode, batch_size=1)
    queue.put((len(encode.seen), torch.equal(cache["key 7"]["mean"], make("key 7")["mean"])))


def test_of_several_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_build_and_report, args=(tmp_path, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    reports = sorted(queue.get() for _ in processes)
    assert reports == [(0, True), (0, True), (len(KEYS), True)]


def test_a_build_that_is_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_cache, "_SYNC_SECONDS", 0.0)

    def kill(keys):
        if "key 9" in keys:
            os._exit(9)  # nothing is flushed or closed
        return [make(key) for key in keys]

    process = multiprocessing.get_context("fork").Process(target=build, args=(tmp_path, kill))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    encode = Encoder()
    assert_same(build(tmp_path, encode))
    assert encode.seen == KEYS[12:]
