"""What a config says about data that is read from shards while training: part of the `data:` section of each recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmattn.errors import ConfigError


@dataclass(kw_only=True)
class StreamSettings:
    """Data larger than memory, in shards: Parquet, JSON lines, CSV, TSV or webdataset tars.

    Args:
        streaming: For data larger than memory: read examples from their shards while training, in an order of its own
            (docs/data.md). Else the whole table is opened.
        shards: streaming: files, globs, folders or ranges such as part-{000..127}.tar, where one `path` is not enough.
        window: streaming: examples that are shuffled together.
        blocks_at_once: streaming: how many places of the data a window mixes; of Parquet, so many row groups stay in
            memory, or more where they are small.
        index_folder: streaming: where indexes and token counts of shards are kept, for every run. None: mmattn/shards
            in $XDG_CACHE_HOME or ~/.cache.
    """

    streaming: bool = False
    shards: list[str] = field(default_factory=list)
    window: int = 10_000
    blocks_at_once: int = 16
    index_folder: str | None = None

    def check_streaming(self, kind: str, kinds: Sequence[str], useless: Sequence[str]) -> None:
        """Raise `ConfigError` for settings that do not go together.

        Args:
            kind: Of the data.
            kinds: Those that can be streamed.
            useless: Settings that change nothing with streaming.
        """
        names = [item.name for item in dataclasses.fields(StreamSettings) if item.name != "streaming"]
        if not self.streaming:
            given = [name for name in names if self._is_given(name)]
            if given:
                raise ConfigError(f"data.{given[0]} is for data.streaming=true: set that, or leave {given[0]} out")
            return
        if kind not in kinds:
            advice = " (download it, and give its files as kind files)" if kind == "hub" else ""
            raise ConfigError(f"data.streaming is for kind {' and '.join(kinds)}, not {kind}{advice}")
        if bool(self.shards) == (getattr(self, "path", None) is not None):
            raise ConfigError("data.streaming needs data.path or data.shards: set one of them")
        if self.blocks_at_once < 1 or self.window < self.blocks_at_once:
            raise ConfigError(
                f"data.window {self.window} examples from data.blocks_at_once {self.blocks_at_once} places: both must "
                "be 1 or more, and window the larger"
            )
        given = [name for name in useless if self._is_given(name)]
        if given:
            default = self._default(given[0])
            raise ConfigError(
                f"data.{given[0]} changes nothing with data.streaming=true: leave it out, or at {default}"
            )

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != self._default(name)

    def _default(self, name: str) -> object:
        item = next(item for item in dataclasses.fields(self) if item.name == name)
        return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()

    @property
    def shard_paths(self) -> list[str]:
        """What is to be streamed, as it was written."""
        path = getattr(self, "path", None)
        return list(self.shards) or ([] if path is None else [path])
