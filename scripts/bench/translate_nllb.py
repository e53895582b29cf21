"""NLLB's real size beside stock transformers: encoder states, logits, greedy and beam-searched tokens, and time.

    python scripts/bench/translate_nllb.py --threads 2 --json runs/translate_nllb.json

Random weights in the shape of facebook/nllb-200-distilled-600M, float32, a language token forced; about 8 GB of memory.
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

import torch
import transformers
from opus_mt import TINY, our_texts, random_nllb, stock_texts
from results import finish
from transformers import M2M100ForConditionalGeneration

import mmattn
from mmattn.inference.linear import use_fast_products
from mmattn.models.translator import TranslatorNetwork, open_network

BATCH, SOURCE_LENGTH, NEW_TOKENS, SAME_SCORE = 2, 24, 24, 1e-4


@dataclass
class Row:
    """A figure, whether it is as it must be, and what was measured beside it."""

    name: str
    value: float
    goal: float | None
    is_ok: bool
    note: str = ""


def forward_rows(stock: M2M100ForConditionalGeneration, network: TranslatorNetwork, ids: torch.Tensor) -> list[Row]:
    """Largest differences of one forward pass, in the form in which the network was opened."""
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0
    target = ids.flip(1)
    ids = ids.masked_fill(mask == 0, stock.config.pad_token_id)
    theirs = stock(input_ids=ids, attention_mask=mask, decoder_input_ids=target)
    states = network.encode(ids, mask.bool())
    logits = network.decoder.logits(network.decoder(target, network.project_context(states, mask.bool())))
    kept = mask.bool()
    pairs = {
        "encoder states": (states[kept], theirs.encoder_last_hidden_state[kept]),
        "logits": (logits, theirs.logits),
    }
    rows = []
    for name, (ours, other) in pairs.items():
        apart = (ours - other).abs().max().item()
        rows.append(Row(name, apart, 0.0, apart == 0.0, "largest difference to stock"))
    return rows


def decoded_rows(
    stock: M2M100ForConditionalGeneration, network: TranslatorNetwork, ids: torch.Tensor, repeats: int
) -> list[Row]:
    """Tokens, scores and time, greedily and with beams."""
    forced = stock.config.vocab_size - 7
    rows = []
    for beams in (1, 4):
        runs = {
            "stock": lambda k=beams: stock_texts(stock, ids, k, NEW_TOKENS, forced),
            "ours": lambda k=beams: our_texts(network, ids, k, NEW_TOKENS, forced),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        found = {name: run() for name, run in runs.items()}
        for _ in range(repeats):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        (theirs, their_scores), (ours, scores) = found["stock"], found["ours"]
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        scores = scores if beams > 1 else []
        apart = max((abs(a - b) / abs(b) for a, b in zip(scores, their_scores, strict=True)), default=0.0)
        stock_ms, our_ms = (1e3 * statistics.median(times[name]) for name in ("stock", "ours"))
        note = f"{stock_ms:.0f} by {our_ms:.0f} ms; {same}/{len(theirs)} equal tokens, scores within {apart:.0e}"
        is_same = apart < SAME_SCORE and (beams > 1 or same == len(theirs))
        rows.append(
            Row(f"{beams} beam{'s' if beams > 1 else ''}, stock's time by ours", stock_ms / our_ms, None, is_same, note)
        )
    return rows


@torch.inference_mode()
def main() -> int:
    """Measure and print; exit code 1 where results are not stock's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the script")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    versions = {"mmattn": mmattn.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    facts = {"versions": versions, "processor": platform.processor(), "threads": arguments.threads}
    print(json.dumps(facts | {"repeats": arguments.repeats}))
    stock = random_nllb(
        **TINY | {"vocab_size": 97, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        if arguments.tiny
        else {}
    )
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        network = open_network(Path(folder))
    ids = torch.randint(
        4, stock.config.vocab_size - 9, (BATCH, SOURCE_LENGTH), generator=torch.Generator().manual_seed(1)
    )
    rows = forward_rows(stock, network, ids)
    use_fast_products(network)
    rows += decoded_rows(stock, network, ids, arguments.repeats)
    for row in rows:
        print(f"{row.name:36}{row.value:9.3g}  {'ok' if row.is_ok else 'NOT THE SAME'}  {row.note}")
    return finish(rows, facts, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
