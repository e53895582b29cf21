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
from results import finish
from transformers import MarianConfig, MarianMTModel

import mmattn
from mmattn.inference.decode import DecodeSettings, decode
from mmattn.inference.linear import chosen_forms, copied_bytes, use_fast_products
from mmattn.inference.quantized import quantize_linears
from mmattn.models.translator import TranslatorNetwork, open_network

VOCAB, PAD, EOS = 58101, 58100, 0
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
    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=VOCAB,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_position_embeddings=512,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        forced_eos_token_id=None,
        init_std=0.05,
    )
    model = MarianMTModel(config).eval()
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

    def transformers(self, sources: torch.Tensor, beams: int) -> tuple[list[list[int]], list[float]]:
        """Stock `generate`."""
        out = self.stock.generate(
            input_ids=sources,
            attention_mask=torch.ones_like(sources),
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.new_tokens,
            num_beams=beams,
            do_sample=False,
            bad_words_ids=[[PAD]],
            return_dict_in_generate=True,
            output_scores=beams > 1,  # stock gives the hypotheses' scores only with them
        )
        scores = getattr(out, "sequences_scores", None)
        return out.sequences[:, 1:].tolist(), [] if scores is None else scores.tolist()

    def ours(self, name: str) -> Callable[[torch.Tensor, int], tuple[list[list[int]], list[float]]]:
        """Our decoding in float32 or int8."""
        network: TranslatorNetwork = self.networks[name]

        def run(sources: torch.Tensor, beams: int) -> tuple[list[list[int]], list[float]]:
            settings = DecodeSettings(
                max_new_tokens=self.new_tokens,
                min_new_tokens=self.new_tokens,
                num_beams=beams,
                bad_words_ids=[[PAD]],
                eos_token_id=EOS,
                pad_token_id=PAD,
            )
            with torch.no_grad():
                contexts = network.project_context(network.encode(sources))
            state = network.start(contexts, max_length=1 + self.new_tokens)
            found = decode(state, torch.full((len(sources), 1), PAD), settings, with_scores=beams > 1)
            return [texts[0].tokens for texts in found], [texts[0].score for texts in found]

        return run

    def peer(self, name: str) -> Callable[[torch.Tensor, int], tuple[list[list[int]], list[float]]]:
        """CTranslate2 in float32 or int8."""
        translator = self.peers[name]

        def run(sources: torch.Tensor, beams: int) -> tuple[list[list[int]], list[float]]:
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
    network = variants.networks["float32"]
    decoder = network.decoder
    skipped = [
        name for name, _ in decoder.named_parameters() if ".cross_attn.k_proj" in name or ".cross_attn.v_proj" in name
    ]
    used = sum(p.nbytes for name, p in decoder.named_parameters() if name not in skipped)
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
