"""Shards of every kind, for tests of streaming."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmattn.data.stream_spec import StreamSettings

Rows = Sequence[dict[str, Any]]


def settings(tmp_path: Path, *shards: str | Path, **options: Any) -> StreamSettings:
    """Streaming of these shards, with a folder of their own for indexes."""
    values = {"streaming": True, "shards": [str(shard) for shard in shards], "index_folder": str(tmp_path / "index")}
    return StreamSettings(**{**values, "window": 40, "blocks_at_once": 4, **options})


def write_parquet(path: Path, rows: Rows, row_group: int = 7) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group)
    return path


def write_jsonl(path: Path, rows: Rows, end: str = "\n") -> Path:
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    return path


def write_csv(path: Path, rows: Rows) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_tar(path: Path, examples: Sequence[tuple[str, dict[str, bytes]]]) -> Path:
    """Examples as (key, files by ending)."""
    with tarfile.open(path, "w") as tar:
        for key, files in examples:
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def png(number: int, side: int = 11) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, 2 * number % 256, 200)).save(stream, "PNG")
    return stream.getvalue()


def pair_rows(first: int, count: int) -> list[dict[str, str]]:
    """Pairs that name their number."""
    return [
        {"source": f"the number {number} stands here", "target": f"die Zahl {number} steht hier"}
        for number in range(first, first + count)
    ]
