"""What decoding takes beside the weights: context K/V beside stock's with 5 beams, and time per token as texts grow.

    python scripts/bench/translate_memory.py --threads 2 --json runs/translate_memory.json

Random weights in the shape of Helsinki-NLP/opus-mt-en-de, float32. The bytes are those of the tensors that both hold
after the first step: stock's cross-attention cache, and our contexts. Time per token: one sentence, greedily; the
median of the 16 steps that end at 512 tokens by the median of the 16 that end at 64, in the same text.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from opus_mt import PAD, VOCAB, random_opus_mt
from results import finish
from transformers import MarianMTModel
from transformers.cache_utils import EncoderDecoderCache

import mmattn
from mmattn.inference.linear import use_fast_products
from mmattn.inference.quantized import quantize_linears
from mmattn.models.translator import TranslatorNetwork, open_network

BATCH, BEAMS, SOURCE_LENGTH = 4, 5, 64
SHORT, LONG, STEPS = 64, 512, 16


@dataclass
class Row:
    """A ratio that must be small: `value` at most `goal`."""

    name: str
    value: float
    goal: float
    note: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the goal is reached."""
        return self.value <= self.goal


def stock_context_bytes(model: MarianMTModel, sources: torch.Tensor) -> int:
    """Bytes of the cross-attention cache that `generate` holds with beams."""
    found: list[EncoderDecoderCache] = []

    def keep(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        # Its name was past_key_values before transformers 5.24.
        if isinstance(cache := keywords.get("cache", keywords.get("past_key_values")), EncoderDecoderCache):
            found.append(cache)

    handle = model.model.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.generate(input_ids=sources, max_new_tokens=3, min_new_tokens=3, num_beams=BEAMS, do_sample=False)
    finally:
        handle.remove()
    layers = found[-1].cross_attention_cache.layers
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))


def our_context_bytes(network: TranslatorNetwork, sources: torch.Tensor) -> int:
    """Bytes of the contexts that decoding with beams holds."""
    contexts = network.project_context(network.encode(sources))
    state = network.start(contexts, max_length=8)
    state.logits(torch.full((BATCH, 1), PAD))
    state.reorder(torch.arange(BATCH).repeat_interleave(BEAMS))
    state.logits(torch.full((BATCH * BEAMS, 1), 7))
    return state.context_bytes


def growth(network: TranslatorNetwork, repeats: int) -> tuple[float, float]:
    """Seconds of a step at 64 and at 512 tokens: medians over repeats of medians over steps."""
    contexts = network.project_context(network.encode(torch.arange(1, 1 + SOURCE_LENGTH)[None]))
    short, long = [], []
    for _ in range(repeats):
        state = network.start(contexts, max_length=LONG)
        tokens, times = torch.full((1, 1), PAD), []
        for _ in range(LONG):
            start = time.perf_counter()
            tokens = state.logits(tokens).argmax(dim=-1)[:, None]
            times.append(time.perf_counter() - start)
        short.append(statistics.median(times[SHORT - STEPS : SHORT]))
        long.append(statistics.median(times[LONG - STEPS :]))
    return statistics.median(short), statistics.median(long)


@torch.inference_mode()
def main() -> int:
    """Measure and print; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    versions = {"mmattn": mmattn.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    facts = {"versions": versions, "processor": platform.processor(), "threads": arguments.threads}
    print(json.dumps(facts | {"repeats": arguments.repeats}))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_opus_mt()
        model.save_pretrained(folder)
        network, quantized = open_network(Path(folder)), open_network(Path(folder))
    sources = torch.randint(1, VOCAB - 1, (BATCH, SOURCE_LENGTH), generator=torch.Generator().manual_seed(1))
    stock, ours = stock_context_bytes(model, sources), our_context_bytes(network, sources)
    note = f"{ours / 2**20:.1f} of {stock / 2**20:.1f} MiB, {BATCH} sentences of {SOURCE_LENGTH} tokens"
    rows.append(Row(f"context K/V at {BEAMS} beams by stock's", ours / stock, 1 / BEAMS, note))
    del model
    use_fast_products(network)
    quantize_linears(quantized)
    for name, each in (("float32", network), ("int8", quantized)):
        short, long = growth(each, arguments.repeats)
        note = f"{long * 1e3:.2f} by {short * 1e3:.2f} ms"
        rows.append(Row(f"time per token at {LONG} by {SHORT} tokens, {name}", long / short, 1.15, note))
    for row in rows:
        print(f"{row.name:48}{row.value:8.3f}  at most {row.goal:g}  {'ok' if row.is_ok else 'short'}  {row.note}")
    return finish(rows, facts, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
