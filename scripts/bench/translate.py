"""Ours beside stock transformers and CTranslate2 on OPUS-MT's real size: tokens a second, for batches and beams.

    python scripts/bench/translate.py --threads 2 --json runs/translate.json

Random weights in the shape of Helsinki-NLP/opus-mt-en-de are saved to a temporary folder, opened by stock and by us,
and converted for CTranslate2, in float32 and in int8. Every translation has the same forced length, so that all do the
same work. The variants of a cell alternate in one process; a row is the ratio of medians. In float32 all must agree
token for token, up to hypotheses whose scores differ by rounding.
The reading floor is the time to read every weight that a step needs once, at the speed at which this machine reads.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ctranslate2
import torch
import transformers
from ctranslate2.converters.transformers import MarianMTLoader
from opus_mt import PAD, VOCAB, Texts, decoder_bytes, our_texts, random_opus_mt, stock_texts
from results import finish
from transformers import MarianMTModel

import mmattn
from mmattn.inference.linear import chosen_forms, copied_bytes, use_fast_products
from mmattn.inference.quantized import quantize_linears
from mmattn.models.translator import TranslatorNetwork, open_network

SOURCE_LENGTH = 32
CELLS = [(batch, beams) for beams in (1, 4) for batch in (1, 8, 32)]
PAUSE = 0.3  # seconds between variants: the threads of one library spin for a while after its last product
SAME_SCORE = 1e-4  # a hypothesis that differs must score as high, relative to its score


@dataclass
class Row:
    """One ratio: `value` times as many tokens a second as the peer; `goal` None is printed only."""

    name: str
    value: float
    goal: float | None
    peer_tokens_per_s: float
    ours_tokens_per_s: float
    spread: float
    note: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether the goal is reached."""
        return self.goal is None or self.value >= self.goal


class Marks:
    """What MarianMTLoader asks a tokenizer for."""

    eos_token, unk_token, pad_token = "1", "2", "<pad>"


def save_models(folder: Path) -> None:
    """The stock folder, and CTranslate2's of the same weights in float32 and int8."""
    model = random_opus_mt()
    model.save_pretrained(folder / "stock")
    with torch.no_grad():
        model.model.shared.weight[PAD] = 0  # CTranslate2 starts from a zero embedding, as OPUS-MT's padding row is
    model.save_pretrained(folder / "stock")
    for name in ("float32", "int8"):
        loader = MarianMTLoader()
        spec = loader.get_model_spec(model)
        loader.set_config(spec.config, model, Marks())
        loader.set_vocabulary(spec, [str(token + 1) for token in range(VOCAB - 1)])
        spec.validate()
        spec.optimize(quantization=None if name == "float32" else name)
        (folder / name).mkdir()
        spec.save(str(folder / name))


class Variants:
    """The translators, each as a function from sources `[B, L]` and beams to tokens `[B][T]` and scores."""

    def __init__(self, folder: Path, threads: int, new_tokens: int) -> None:
        self.new_tokens = new_tokens
        self.stock = MarianMTModel.from_pretrained(folder / "stock").eval()
        self.networks = {name: open_network(folder / "stock") for name in ("float32", "int8")}
        use_fast_products(self.networks["float32"])
        quantize_linears(self.networks["int8"])
        self.peers = {
            name: ctranslate2.Translator(
                str(folder / name), device="cpu", compute_type=name, inter_threads=1, intra_threads=threads
            )
            for name in ("float32", "int8")
        }

    def transformers(self, sources: torch.Tensor, beams: int) -> Texts:
        """Stock `generate`."""
        return stock_texts(self.stock, sources, beams, self.new_tokens)

    def ours(self, name: str) -> Callable[[torch.Tensor, int], Texts]:
        """Our decoding in float32 or int8."""
        network: TranslatorNetwork = self.networks[name]
        return lambda sources, beams: our_texts(network, sources, beams, self.new_tokens)

    def peer(self, name: str) -> Callable[[torch.Tensor, int], Texts]:
        """CTranslate2 in float32 or int8."""
        translator = self.peers[name]

        def run(sources: torch.Tensor, beams: int) -> Texts:
            rows = [[str(token + 1) for token in row] for row in sources.tolist()]
            found = translator.translate_batch(
                rows,
                beam_size=beams,
                min_decoding_length=self.new_tokens,
                max_decoding_length=self.new_tokens,
                return_scores=beams > 1,
            )
            tokens = [[int(token) - 1 for token in each.hypotheses[0]] for each in found]
            return tokens, [each.scores[0] for each in found] if beams > 1 else []

        return run


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, alternating, after one unmeasured turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def agreement(variants: Variants, sources: torch.Tensor, beams: int) -> str:
    """How many translations agree token for token with stock's, and how far the scores are apart."""
    theirs, their_scores = variants.transformers(sources, beams)
    parts = []
    for label, run in (("ours", variants.ours("float32")), ("CTranslate2", variants.peer("float32"))):
        tokens, scores = run(sources, beams)
        same = sum(row == other for row, other in zip(tokens, theirs, strict=True))
        text = f"{label} {same}/{len(theirs)} equal to stock"
        if beams > 1 and label == "ours":
            apart = max(abs(a - b) / abs(b) for a, b in zip(scores, their_scores, strict=True))
            text += f", scores within {apart:.0e}"
            if same < len(theirs) and apart > SAME_SCORE:
                text += " NOT THE SAME"
        parts.append(text)
    return "; ".join(parts)


def floor_tokens_per_s(variants: Variants, rows: int) -> float:
    """Tokens a second if a step did nothing but read the decoder's weights once."""
    used = decoder_bytes(variants.networks["float32"])
    block = torch.ones(2**26)
    speeds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum()
        speeds.append(block.nbytes / (time.perf_counter() - start))
    return rows / (used / max(speeds))


def run_cells(variants: Variants, cells: list[tuple[int, int]], repeats: int) -> list[Row]:
    """All rows, printed as they come."""
    print(f"{'':34}{'peer tok/s':>11}{'ours tok/s':>11}{'ratio':>8}{'goal':>7}")
    rows = []
    generator = torch.Generator().manual_seed(1)
    for batch, beams in cells:
        sources = torch.randint(1, VOCAB - 1, (batch, SOURCE_LENGTH), generator=generator)
        runs = {
            "transformers": lambda s=sources, k=beams: variants.transformers(s, k),
            "float32": lambda s=sources, k=beams: variants.ours("float32")(s, k),
            "CTranslate2 float32": lambda s=sources, k=beams: variants.peer("float32")(s, k),
            "int8": lambda s=sources, k=beams: variants.ours("int8")(s, k),
            "CTranslate2 int8": lambda s=sources, k=beams: variants.peer("int8")(s, k),
        }
        times = measure(runs, repeats)
        tokens = batch * variants.new_tokens
        medians = {name: statistics.median(spent) for name, spent in times.items()}
        spread = {name: (max(spent) - min(spent)) / 2 / medians[name] for name, spent in times.items()}
        floor = floor_tokens_per_s(variants, batch)
        note = f"floor {floor:.0f} tok/s; {agreement(variants, sources, beams)}"
        for peer, ours, goal in (
            ("transformers", "float32", 1.6),
            ("CTranslate2 float32", "float32", 1.0 if beams == 4 else None),
            ("CTranslate2 int8", "int8", 1.0 if batch == 1 else None),
        ):
            row = Row(
                f"batch {batch}, {beams} beam{'s' if beams > 1 else ''}, {peer}",
                medians[peer] / medians[ours],
                goal,
                tokens / medians[peer],
                tokens / medians[ours],
                max(spread[peer], spread[ours]),
                note if peer == "transformers" else "",
            )
            rows.append(row)
            wanted = "" if goal is None else f"{goal:.1f}x"
            verdict = ("ok" if row.is_ok else "short") if goal else ("" if row.value >= 1 else "below the peer")
            print(
                f"{row.name:34}{row.peer_tokens_per_s:11.0f}{row.ours_tokens_per_s:11.0f}{row.value:7.2f}x{wanted:>7}"
                f"  {verdict:6} ±{row.spread:.0%} {row.note}",
                flush=True,
            )
    return rows


def main() -> int:
    """Measure and print; exit code 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="forced length of a translation")
    parser.add_argument("--cells", help="only these, such as 1x4,8x1 (batch x beams)")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    versions = {
        "mmattn": mmattn.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "ctranslate2": ctranslate2.__version__,
    }
    facts = {"versions": versions, "processor": platform.processor(), "threads": arguments.threads}
    print(json.dumps(facts | {"tokens": arguments.tokens, "repeats": arguments.repeats}))
    cells = CELLS
    if arguments.cells:
        cells = [(int(batch), int(beams)) for batch, beams in (cell.split("x") for cell in arguments.cells.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        variants = Variants(Path(folder), arguments.threads, arguments.tokens)
        rows = run_cells(variants, cells, arguments.repeats)
    network = variants.networks["float32"]
    print(f"forms of the products: {chosen_forms()}; copies of weights {copied_bytes(network) / 2**20:.0f} MiB")
    return finish(rows, facts, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
