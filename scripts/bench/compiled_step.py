"""Time per token of one text with compiled steps, beside our ordinary steps and stock transformers.

    python scripts/bench/compiled_step.py --threads 2 --json runs/compiled_step.json
    python scripts/bench/compiled_step.py --device cuda --dtype bfloat16

Random weights in the shape of Helsinki-NLP/opus-mt-en-de, a forced number of tokens, greedily and with 4 beams. The
variants alternate in one process after the compilation, whose time is printed beside; a row is the ratio of medians.
All must agree in float32, token for token.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "gpu"))

from measure import median_and_spread, wall_ms  # noqa: E402
from opus_mt import TINY, VOCAB, our_texts, random_opus_mt, stock_texts  # noqa: E402
from results import finish  # noqa: E402
from transformers import MarianMTModel  # noqa: E402

import mmattn  # noqa: E402
from mmattn.inference.linear import use_fast_products  # noqa: E402
from mmattn.inference.traced_products import trace_products  # noqa: E402
from mmattn.models.translator import CompiledDecoder, TranslatorNetwork, open_network  # noqa: E402
from mmattn.nn import fuse  # noqa: E402

SOURCE_LENGTH = 32


@dataclass
class Row:
    """Compiled steps beside a peer: `value` times as fast; it is only shown."""

    name: str
    value: float
    peer_ms_per_token: float
    compiled_ms_per_token: float
    spread: float
    note: str
    is_ok: bool = True


class CompiledNetwork:
    """A network whose `start` gives compiled steps."""

    def __init__(self, network: TranslatorNetwork, beams: int) -> None:
        self.config, self.encode, self.project_context = network.config, network.encode, network.project_context
        self._decoder, self._beams = CompiledDecoder(network), beams

    def start(self, contexts: Any, *, max_length: int) -> Any:
        """See `CompiledDecoder.start`."""
        return self._decoder.start(contexts, max_length=max_length, most_rows=self._beams)


class Variants:
    """Stock, ours, and ours compiled, with equal weights."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        self.stock = MarianMTModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.ordinary, self.compiled = (open_network(folder, dtype=dtype, device=device) for _ in range(2))
        # As Translator.from_pretrained does.
        for network in (self.ordinary, self.compiled):
            if device.type == "cpu":
                use_fast_products(network)
            else:
                fuse(network)
        trace_products(self.compiled)

    def runs(self, sources: torch.Tensor, beams: int) -> dict[str, Any]:
        """Each as a function that gives tokens."""
        compiled: Any = CompiledNetwork(self.compiled, beams)
        return {
            "transformers": lambda: stock_texts(self.stock, sources, beams, self.new_tokens)[0],
            "ordinary steps": lambda: our_texts(self.ordinary, sources, beams, self.new_tokens)[0],
            "compiled steps": lambda: our_texts(compiled, sources, beams, self.new_tokens)[0],
        }


def cell(variants: Variants, sources: torch.Tensor, beams: int, repeats: int) -> list[Row]:
    """Compiled steps beside both others."""
    device = sources.device.type
    runs = variants.runs(sources, beams)
    begin = time.perf_counter()
    found = {"compiled steps": runs["compiled steps"]()}
    first_s = time.perf_counter() - begin
    found |= {name: run() for name, run in runs.items() if name not in found}
    times = wall_ms(runs, repeats, device)
    ours, our_spread = median_and_spread(times["compiled steps"])
    rows = []
    for name in ("transformers", "ordinary steps"):
        theirs, spread = median_and_spread(times[name])
        same = "equal tokens" if found[name] == found["compiled steps"] else "OTHER TOKENS"
        note = f"{same}; the first text took {first_s:.1f} s"
        tokens = variants.new_tokens
        row = Row(f"1 x {beams}, {name}", theirs / ours, theirs / tokens, ours / tokens, max(spread, our_spread), note)
        rows.append(row)
        print(
            f"{row.name:24}{row.peer_ms_per_token:9.2f} ms{row.compiled_ms_per_token:9.2f} ms compiled"
            f"{row.value:7.2f}x ±{row.spread:.0%}  {row.note}",
            flush=True,
        )
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="forced length of a translation")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    device = torch.device(arguments.device)
    name = platform.processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    versions = {each.__name__: each.__version__ for each in (mmattn, torch, transformers)}
    facts = {"versions": versions, "processor": name, "threads": arguments.threads, "dtype": arguments.dtype}
    print(json.dumps(facts | {"tokens": arguments.tokens, "repeats": arguments.repeats}))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_opus_mt(**TINY if arguments.tiny else {}).save_pretrained(folder)
        variants = Variants(Path(folder), device, getattr(torch, arguments.dtype), arguments.tokens)
        sources = torch.randint(1, VOCAB - 1, (1, SOURCE_LENGTH), generator=torch.Generator().manual_seed(1))
        for beams in (1, 4):
            rows += cell(variants, sources.to(device), beams, arguments.repeats)
    return finish(rows, facts, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
