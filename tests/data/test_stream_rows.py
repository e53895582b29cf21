"""Rows of shards of every kind: found by number, named by place, in bounded memory; refused when they are not whole."""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import resource
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmattn.data.stream_rows import StreamedRows, sample_numbers, stream_layout
from mmattn.data.stream_shards import find_shards
from mmattn.errors import DataError, RunError
from tests.data.shards import pair_rows, settings, write_csv, write_jsonl, write_parquet, write_tar

SIZES = (23, 5, 41, 17)
SIZE = sum(SIZES)
ROWS = pair_rows(0, SIZE)
STARTS = [sum(SIZES[:number]) for number in range(len(SIZES))]


def parts():
    return [ROWS[start : start + size] for start, size in zip(STARTS, SIZES, strict=True)]


@pytest.fixture(params=["parquet", "jsonl", "csv", "tsv", "tar"])
def kind(request):
    return request.param


def write(folder, kind):
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(parts()):
        path = folder / f"part-{number:03}.{kind}"
        if kind == "parquet":
            write_parquet(path, rows)
        elif kind == "jsonl":
            write_jsonl(path, rows, "\r\n" if number % 2 else "\n")
        elif kind == "tar":
            files = [{side: text.encode() for side, text in row.items()} for row in rows]
            keyed = [{f"{side}.txt": data for side, data in row.items()} for row in files]
            write_tar(path, [(f"{number}/{place:05}", row) for place, row in enumerate(keyed)])
        else:
            write_csv(path, rows)
    return folder


def plain(row):
    """A row of any kind as it was written."""
    return {
        name.removesuffix(".txt"): value.decode() if isinstance(value, bytes) else value for name, value in row.items()
    }


def test_every_row_is_found_by_its_number(tmp_path, kind):
    rows = StreamedRows(settings(tmp_path, write(tmp_path / "data", kind)))
    assert len(rows) == SIZE
    order = np.random.default_rng(3).permutation(SIZE).tolist()
    found = rows.rows(order)
    assert [plain(row) for _, row in found] == [ROWS[number] for number in order]
    bounds = rows.layout.bounds
    assert bounds[0] == 0
    assert bounds[-1] == SIZE
    assert (np.diff(bounds) > 0).all()
    assert set(STARTS) <= set(bounds.tolist())
    assert list(rows.layout.shards) == [f"part-{number:03}.{kind}" for number in range(4)]


def test_places_name_file_and_row(tmp_path, kind):
    rows = StreamedRows(settings(tmp_path, write(tmp_path / "data", kind)))
    (place, _), (last, _) = rows.rows([24, SIZE - 1])
    where = {"parquet": "row 2", "jsonl": "line 2", "csv": "line 3", "tsv": "line 3", "tar": "example 2 (1/00001)"}
    assert place == f"{tmp_path}/data/part-001.{kind} {where[kind]}"
    assert last.startswith(f"{tmp_path}/data/part-003.{kind} ")
    assert rows.shard_of(24).name == f"part-001.{kind}"


def _child_rows(rows, queue):
    queue.put([row for _, row in rows.rows([3, 40])])


def test_forked_and_pickled_readers_open_files_of_their_own(tmp_path, kind):
    rows = StreamedRows(settings(tmp_path, write(tmp_path / "data", kind)))
    expected = [row for _, row in rows.rows([3, 40])]
    assert [row for _, row in pickle.loads(pickle.dumps(rows)).rows([3, 40])] == expected
    queue = get_context("fork").SimpleQueue()
    child = get_context("fork").Process(target=_child_rows, args=(rows, queue))
    child.start()
    assert queue.get() == expected
    child.join(20)
    assert [row for _, row in rows.rows([3, 40])] == expected


def test_a_limit_takes_the_first_rows(tmp_path):
    rows = StreamedRows(settings(tmp_path, write(tmp_path / "data", "parquet")), limit=26)
    assert len(rows) == 26 == rows.layout.bounds[-1]
    with pytest.raises(IndexError, match="has 26 rows, no number 26"):
        rows.rows([26])


def test_row_groups_are_read_once_and_few_are_kept(tmp_path):
    from mmattn.training.window_order import WindowOrder

    rows_of = pair_rows(0, 3001)
    write_parquet(tmp_path / "a.parquet", rows_of[:1501], 101)
    write_parquet(tmp_path / "b.parquet", rows_of[1501:], 101)
    rows = StreamedRows(settings(tmp_path, tmp_path / "*.parquet", window=300, blocks_at_once=4))
    order = WindowOrder(rows.layout.bounds, 300, 4, 5)
    most = 0
    for window in range(order.num_windows(0)):
        examples = order.examples(0, window)
        for start in range(0, len(examples), 16):
            batch = examples[start : start + 16].tolist()
            assert [row["source"] for _, row in rows.rows(batch, ["source"])] == [rows_of[i]["source"] for i in batch]
            most = max(most, len(rows.cache))
    assert rows.describe() == (
        f"{tmp_path}/*.parquet: 3,001 rows in 2 shards; each data worker keeps up to about 5 row groups in memory, of "
        "about 1 MiB"
    )
    assert 5 <= most <= 7  # 4 at least, else 600 rows at most
    assert rows.cache.reads == len(rows.layout.bounds) - 1


@pytest.mark.parametrize(("groups", "expected"), [([211] * 7, 4), ([101] * 7, 5), ([11] * 97, 54), ([11] * 7, 7)])
def test_what_stays_in_memory_is_foretold(tmp_path, groups, expected):
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("a", pa.string())])) as writer:
        for size in groups:
            writer.write_table(pa.table({"a": [str(number) for number in range(size)]}))
    rows = StreamedRows(settings(tmp_path, tmp_path / "a.parquet", window=300, blocks_at_once=4))
    assert f"keeps up to about {expected} row groups in memory" in rows.describe()
    for number in range(len(rows)):
        rows.rows([number])
    assert len(rows.cache) == expected
    few = StreamedRows(settings(tmp_path, tmp_path / "a.parquet", window=300, blocks_at_once=4), limit=groups[0])
    assert "keeps up to about 1 row groups in memory" in few.describe()


def test_few_files_are_open_at_once(tmp_path):
    for number in range(40):
        write_jsonl(tmp_path / f"{number:02}.jsonl", pair_rows(number, 1))
    rows = StreamedRows(settings(tmp_path, tmp_path / "*.jsonl"))
    before = len(os.listdir("/proc/self/fd"))
    rows.rows(range(40))
    rows.rows(range(40))
    assert len(os.listdir("/proc/self/fd")) - before <= 16  # 8 shards, each with its index


def _read_with_few_files(options, queue):
    allowed = len(os.listdir("/proc/self/fd")) + 23
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    try:
        queue.put([row for _, row in StreamedRows(options).rows(range(97))])
    except Exception as error:
        queue.put(error)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tar"])
def test_more_shards_than_files_may_be_open(tmp_path, kind):
    expected = pair_rows(0, 97)
    for number, row in enumerate(expected):
        path = tmp_path / f"{number:03}.{kind}"
        if kind == "tar":
            write_tar(path, [("x", {f"{side}.txt": text.encode() for side, text in row.items()})])
        else:
            (write_jsonl if kind == "jsonl" else write_csv)(path, [row])
    queue = get_context("fork").SimpleQueue()
    for blocks in (4, 97):
        options = settings(tmp_path, tmp_path / f"*.{kind}", window=97, blocks_at_once=blocks)
        child = get_context("fork").Process(target=_read_with_few_files, args=(options, queue))
        child.start()
        found = queue.get()
        child.join(20)
        if blocks == 4:
            assert [plain(row) for row in found] == expected
        else:
            assert isinstance(found, RunError)
            assert "Too many open files" in str(found)
            assert "allow more (ulimit -n)" in str(found)


def test_damaged_parquet_is_refused_by_name(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        StreamedRows(settings(tmp_path, path))


def test_a_row_group_that_is_damaged_stops_the_run(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS, 40)
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    rows = StreamedRows(settings(tmp_path, path))
    with pytest.raises(RunError, match=r"shard .*a\.parquet cannot be read any more \(row group 1: "):
        rows.rows([0])


def test_a_shard_that_is_deleted_cut_or_rewritten_stops_the_run(tmp_path, kind):
    folder = write(tmp_path / "data", kind)
    path = folder / f"part-001.{kind}"

    def opened():
        return StreamedRows(settings(tmp_path, folder))

    rows, whole = opened(), path.read_bytes()
    path.unlink()
    with pytest.raises(RunError, match=rf"shard .*part-001\.{kind} cannot be read any more \(No such file"):
        rows.rows([24])
    path.write_bytes(whole)
    rows = opened()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=rf"part-001\.{kind} has changed since this run started \({len(whole):,} bytes"):
        rows.rows([24, 25, 26, 27])


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
def test_a_shard_that_is_cut_while_it_is_open_stops_the_run(tmp_path, kind):
    random = np.random.default_rng(7)
    texts = ["".join(map(chr, random.integers(97, 123, 3001))) for _ in range(40)]
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        write_tar(path, [(str(number), {"txt": text.encode()}) for number, text in enumerate(texts)])
    else:
        (write_parquet if kind == "parquet" else write_jsonl)(path, [{"txt": text} for text in texts])
    rows = StreamedRows(settings(tmp_path, path))
    assert rows.rows([2])[0][1] == {"txt": texts[2]}
    os.truncate(path, 40_000)
    with pytest.raises(RunError, match=rf"a\.{kind} has changed since this run started \(1\d\d,\d+ bytes then, 40,000"):
        rows.rows([37])


def test_an_index_is_made_once_and_again_after_a_change(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", "jsonl")
    StreamedRows(settings(tmp_path, folder))
    kept = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert len(kept) == 4

    from mmattn.data import stream_lines

    def refuse(self, file):
        raise AssertionError("indexed again")

    with monkeypatch.context() as patch:
        patch.setattr(stream_lines.LineShard, "_write_index", refuse)
        assert len(StreamedRows(settings(tmp_path, folder))) == SIZE
    write_jsonl(folder / "part-001.jsonl", ROWS[:9])
    assert len(StreamedRows(settings(tmp_path, folder))) == SIZE - 5 + 9


def test_an_index_that_was_cut_short_leaves_nothing(tmp_path, monkeypatch):
    from mmattn.data import stream_lines

    folder = write(tmp_path / "data", "jsonl")

    def fail(self):
        yield 0, 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream_lines.LineShard, "_json_starts", fail)
        with pytest.raises(KeyboardInterrupt):
            StreamedRows(settings(tmp_path, folder))
    assert all(path.name.startswith(".") for path in (tmp_path / "index").iterdir())
    assert [row for _, row in StreamedRows(settings(tmp_path, folder)).rows([0, 30])] == [ROWS[0], ROWS[30]]


def test_an_index_that_is_deleted_during_a_run(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    rows = StreamedRows(settings(tmp_path, path))
    (index,) = (tmp_path / "index").iterdir()
    index.unlink()
    assert rows.rows([40])[0][1] == ROWS[40]
    assert index.exists()
    for shard in rows.shards:
        shard.close()
    index.unlink()
    write_jsonl(path, ROWS[:9])
    with pytest.raises(RunError, match=r"a\.jsonl has changed since this run started"):
        rows.rows([40])
    assert not index.exists()


def test_an_index_that_is_damaged_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    StreamedRows(settings(tmp_path, path))
    (index,) = (tmp_path / "index").iterdir()
    index.write_bytes(b"")
    with pytest.raises(RunError, match=rf"cannot read {index}: .*; delete it, and it is made again"):
        StreamedRows(settings(tmp_path, path))


def test_pickled_rows_hold_no_index(tmp_path):
    rows = StreamedRows(settings(tmp_path, write_jsonl(tmp_path / "a.jsonl", pair_rows(0, 5003))))
    expected = rows.rows([4999])
    pickled = pickle.dumps(rows)
    assert len(pickled) < 20_000
    assert pickle.loads(pickled).rows([4999]) == expected


def test_an_index_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    options = settings(tmp_path, write(tmp_path / "data", "jsonl"), index_folder=str(tmp_path / "file"))
    with pytest.raises(RunError, match=r"cannot write .*/file/.*or set data\.index_folder to another folder"):
        StreamedRows(options)


def test_fingerprints_are_of_the_content_wherever_it_lies(tmp_path, kind):
    one = StreamedRows(settings(tmp_path, write(tmp_path / "one", kind))).layout
    other = StreamedRows(settings(tmp_path, write(tmp_path / "other", kind))).layout
    assert one.shards == other.shards
    assert one.fingerprint() == other.fingerprint()
    changed = pair_rows(7, SIZES[1])
    if kind == "jsonl":
        write_jsonl(tmp_path / "other/part-001.jsonl", changed, "\r\n")
        third = StreamedRows(settings(tmp_path, tmp_path / "other")).layout
        assert [name for name in one.shards if one.shards[name] != third.shards[name]] == ["part-001.jsonl"]


def test_shards_are_found(tmp_path):
    folder = write(tmp_path / "data", "jsonl")
    (folder / "notes.md").write_text("x")
    (folder / ".hidden").mkdir()
    write_jsonl(folder / ".hidden" / "x.jsonl", ROWS)
    names = [f"part-{number:03}.jsonl" for number in range(4)]
    assert [path.name for path in find_shards([str(folder)])] == names
    assert [path.name for path in find_shards([f"{folder}/part-00[13].jsonl"])] == [names[1], names[3]]
    assert [path.name for path in find_shards([f"{folder}/part-{{001..002}}.jsonl"])] == names[1:3]
    assert [path.name for path in find_shards([f"{folder}/{names[2]}", f"{folder}/{names[0]}"])] == [names[2], names[0]]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["data/part-000.jsonl", "data/part-*.jsonl"], r"part-000\.jsonl is named twice in data\.shards"),
        (["data/part-000.jsonl", "other.parquet"], r"shards of several kinds \(\.jsonl, \.parquet\)"),
        (["data/part-{0..9}.jsonl"], r"part-0\.jsonl: no such file"),
        (["data/part-{9..0}.jsonl"], r"the range \{9\.\.0\} is empty"),
        (["nothing*.jsonl"], r"nothing\*\.jsonl: no such file; set data\.path or data\.shards"),
        (["table.json"], r"table\.json: shards of kind '\.json' cannot be streamed: .*JSON lines"),
        (["lines.jsonl.gz"], r"lines\.jsonl\.gz is compressed, .*: decompress it, or write it as Parquet"),
        (["empty_folder"], r"empty_folder holds no shards: files that end in \.parquet"),
        (["zero.jsonl"], r"zero\.jsonl is empty: 0 bytes"),
        (["blank.jsonl"], r"blank\.jsonl is empty: no rows in 1 shards"),
        (["s3://bucket/part.parquet"], r"s3://bucket/part\.parquet is an address, .*: download them first"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch, entries, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data", "jsonl")
    write_parquet(tmp_path / "other.parquet", ROWS)
    (tmp_path / "table.json").write_text("[]")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "zero.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=message):
        StreamedRows(settings(tmp_path, *entries))


def test_empty_shards_between_others(tmp_path):
    write_parquet(tmp_path / "0.parquet", ROWS[:3])
    pq.write_table(pa.Table.from_pylist(ROWS[:1]).slice(0, 0), tmp_path / "1.parquet")
    write_parquet(tmp_path / "2.parquet", ROWS[3:5])
    rows = StreamedRows(settings(tmp_path, tmp_path / "*.parquet"))
    assert [row for _, row in rows.rows(range(5))] == ROWS[:5]
    assert (np.diff(rows.layout.bounds) > 0).all()


def test_a_sample_comes_in_runs_from_all_over(tmp_path):
    rows = StreamedRows(settings(tmp_path, write_jsonl(tmp_path / "a.jsonl", pair_rows(0, 5003))))

    class Source:
        streamed_rows = rows

        def __len__(self):
            return len(rows)

    numbers = sample_numbers(Source(), 640, ())
    assert 500 < len(numbers) <= 640
    assert numbers[0] == 0
    assert numbers[-1] == 5002
    assert sum(later - earlier > 1 for earlier, later in itertools.pairwise(numbers)) == 63
    assert sample_numbers(Source(), 9999, ()) == list(range(5003))
    assert sample_numbers([1, 2], 5, [1]) == [1]
    assert stream_layout([1]) is None
