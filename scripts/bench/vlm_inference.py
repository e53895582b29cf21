"""Ours beside stock transformers on BLIP at its real size: decoding, whole captions, five questions on one picture.

    python scripts/bench/vlm_inference.py --threads 2 --json runs/vlm_inference.json

Random weights in BLIP base's shape are saved to a temporary folder and opened by both. The variants of a row alternate
in one process; a row is the ratio of medians. Stock gets its best form: batched, and its fastest attention that works.
Both must give the same tokens. The last rows count how often image keys and values are projected.
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
from unittest import mock

import numpy as np
import torch
import transformers
from PIL import Image
from results import finish
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    BlipProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import mmattn
from mmattn.inference.decode import decode
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.nn import CrossAttention
from mmattn.ops.observe import AttentionCall, observing

SPECIAL = {0: "[PAD]", 1: "[UNK]", 2: "[CLS]", 4: "[MASK]"}
QUESTIONS = [" ".join(f"word{number}" for number in range(first, first + 7)) for first in range(10, 60, 10)]
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Place:
    """Where both run, and in what dtype."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def open_ours(self, folder: Path) -> VisionLanguageModel:
        """Our model."""
        return VisionLanguageModel.from_pretrained(folder, device=self.device, dtype=self.dtype)

    def open_stock(self, model_class: Any, folder: Path) -> tuple[Any, str]:
        """The stock model with SDPA where it can, else eager."""
        for implementation in ("sdpa", "eager"):
            try:
                model = model_class.from_pretrained(folder, attn_implementation=implementation, dtype=self.dtype)
            except ValueError:
                continue
            return model.eval().to(self.device), implementation
        raise RuntimeError("stock BLIP opens with neither attention")

    def inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """What a processor made, moved there."""
        return {
            name: value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
            for name, value in made.items()
        }


CPU = Place()


@dataclass
class Row:
    """One comparison: `value` must reach `goal` (or equal it, for counts)."""

    name: str
    value: float
    goal: float
    stock_ms: float | None = None
    ours_ms: float | None = None
    stock_spread: float | None = None
    ours_spread: float | None = None
    same_tokens: bool = True
    exact: bool = False

    @property
    def is_ok(self) -> bool:
        """Whether the goal is reached, with equal tokens."""
        return self.same_tokens and (self.value == self.goal if self.exact else self.value >= self.goal)


def compare(
    name: str, goal: float, stock: Callable[[], Any], ours: Callable[[], Any], repeats: int, same: bool | None = None
) -> Row:
    """Time two callables in turn; their results are compared unless `same` is given."""
    first, second = stock(), ours()  # warm-up
    same = first == second if same is None else same
    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(repeats):
        for kind, call in (("stock", stock), ("ours", ours)):
            begin = time.perf_counter()
            call()
            times[kind].append((time.perf_counter() - begin) * 1000)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    spreads = {kind: (max(values) - min(values)) / medians[kind] for kind, values in times.items()}
    row = Row(name, medians["stock"] / medians["ours"], goal, medians["stock"], medians["ours"])
    row.stock_spread, row.ours_spread, row.same_tokens = spreads["stock"], spreads["ours"], same
    show(row)
    return row


def show(row: Row) -> None:
    """Print a row."""
    verdict = "ok" if row.is_ok else "short"
    if row.stock_ms is None or row.ours_ms is None:
        print(f"{row.name:<58} {'':>10} {'':>10} {row.value:>7.0f} {row.goal:>6.0f}  {verdict}", flush=True)
        return
    same = "" if row.same_tokens else "  (tokens differ)"
    spread = f"±{50 * (row.stock_spread or 0):.0f}/{50 * (row.ours_spread or 0):.0f} %"
    print(
        f"{row.name:<58} {row.stock_ms:>10.1f} {row.ours_ms:>10.1f} {row.value:>6.2f}x {row.goal:>5.2f}x  "
        f"{verdict}  {spread}{same}",
        flush=True,
    )


def save_random(model_class: type, folder: Path, size: str) -> BlipProcessor:
    """A stock folder with random weights, tokenizer and image processor."""
    torch.manual_seed(0)
    text, vision = {}, {}
    if size == "tiny":
        text = {**TINY, "vocab_size": 301, "encoder_hidden_size": 32, "bos_token_id": 300, "sep_token_id": 3}
        vision = {**TINY, "image_size": 48, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=vision)
    model = model_class(config)
    with torch.no_grad():
        # At the usual spread every text repeats one word, and equal tokens would prove nothing.
        for name, parameter in model.named_parameters():
            if "word_embeddings" in name or "crossattention" in name:
                parameter.mul_(3)
    model.save_pretrained(folder)
    words = [f"word{number}" for number in range(config.text_config.vocab_size)]
    for place, word in {**SPECIAL, config.text_config.sep_token_id: "[SEP]"}.items():
        words[place] = word
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    side = config.vision_config.image_size
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), tokenizer)
    processor.save_pretrained(folder)
    return processor


def pictures(count: int) -> list[Image.Image]:
    """Noise in the size of a photograph."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(count)]


def fixed_length(tokens: int) -> dict[str, int]:
    """Generation arguments that make every text equally long."""
    return {"min_new_tokens": tokens, "max_new_tokens": tokens}


def caption_rows(size: str, repeats: int, tokens: int, place: Place = CPU) -> tuple[list[Row], dict[str, Any]]:
    """Decoding apart from the image encoder, and whole captions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = save_random(BlipForConditionalGeneration, folder, size)
        stock, implementation = place.open_stock(BlipForConditionalGeneration, folder)
        ours = place.open_ours(folder)
    rows = [decoding_row(stock, ours, beams, goal, repeats, tokens) for beams, goal in ((1, 1.2), (3, 1.5))]
    for batch, beams in ((1, 1), (4, 1), (1, 3)):
        images = pictures(batch)
        arguments = {"num_beams": beams, **fixed_length(tokens)}

        def whole(images: list[Image.Image] = images, arguments: dict[str, int] = arguments) -> list[str]:
            inputs = place.inputs(processor(images=images, return_tensors="pt"))
            generated = stock.generate(**inputs, **arguments)
            bos = stock.config.text_config.bos_token_id
            return [processor.decode(row[row != bos], skip_special_tokens=True) for row in generated]

        def mine(images: list[Image.Image] = images, arguments: dict[str, int] = arguments) -> list[str]:
            return ours.caption(images, **arguments)

        kind = "greedy" if beams == 1 else f"{beams} beams"
        rows.append(compare(f"whole captions, {kind}, batch {batch}", 1.0, whole, mine, max(2, repeats // 2)))
    rows.append(
        count_row(
            "captions, 3 beams: image K/V products / layers",
            ours,
            lambda: ours.caption(pictures(1), num_beams=3, **fixed_length(3)),
        )
    )
    with observed_backends() as backends:
        ours.caption(pictures(1), **fixed_length(3))
    return rows, {"stock_attention": implementation, "our_backends": sorted(backends)}


def decoding_row(stock: Any, ours: VisionLanguageModel, beams: int, goal: float, repeats: int, tokens: int) -> Row:
    """Image features in, tokens out."""
    network = ours.network
    pixel_values = ours.processor(pictures(1), return_tensors="pt")["pixel_values"].to(ours.device, ours.dtype)
    with torch.no_grad():
        features = network.encode_images(pixel_values)
    text = stock.config.text_config
    prompt = torch.tensor([[text.bos_token_id]], device=ours.device)
    arguments = {"num_beams": beams, **fixed_length(tokens)}
    settings = ours.settings.updated(**arguments)

    def theirs() -> list[int]:
        with torch.no_grad():
            generated = stock.text_decoder.generate(
                input_ids=prompt,
                eos_token_id=text.sep_token_id,
                pad_token_id=text.pad_token_id,
                encoder_hidden_states=features,
                encoder_attention_mask=prompt.new_ones(features.shape[:2]),
                **arguments,
            )
        return generated[0, 1:].tolist()

    def mine() -> list[int]:
        with torch.no_grad():
            contexts = network.project_context(features)
            state = network.start(contexts, max_length=1 + tokens)
            return decode(state, prompt, settings)[0][0].tokens

    kind = "greedy" if beams == 1 else f"{beams} beams"
    return compare(f"decoding {tokens} tokens on image features, {kind}", goal, theirs, mine, repeats)


def question_rows(size: str, repeats: int, tokens: int, place: Place = CPU) -> list[Row]:
    """Five questions on one picture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = save_random(BlipForQuestionAnswering, folder, size)
        stock, _ = place.open_stock(BlipForQuestionAnswering, folder)
        ours = place.open_ours(folder)
    image, arguments = pictures(1)[0], fixed_length(tokens)

    def decoded(generated: torch.Tensor) -> list[str]:
        bos = stock.config.text_config.bos_token_id
        return [processor.decode(row[row != bos], skip_special_tokens=True) for row in generated]

    def encoder_per_question() -> list[str]:
        inputs = place.inputs(processor(images=[image] * len(QUESTIONS), text=QUESTIONS, return_tensors="pt"))
        return decoded(stock.generate(**inputs, **arguments))

    def features_by_hand() -> list[str]:
        inputs = place.inputs(processor(images=image, text=QUESTIONS, return_tensors="pt"))
        text = stock.config.text_config
        with torch.no_grad():
            features = stock.vision_model(inputs["pixel_values"])[0].expand(len(QUESTIONS), -1, -1)
            states = stock.text_encoder(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                encoder_hidden_states=features,
                encoder_attention_mask=inputs["input_ids"].new_ones(features.shape[:2]),
            )[0]
            generated = stock.text_decoder.generate(
                input_ids=inputs["input_ids"].new_full((len(QUESTIONS), 1), text.bos_token_id),
                eos_token_id=text.sep_token_id,
                pad_token_id=text.pad_token_id,
                encoder_hidden_states=states,
                encoder_attention_mask=inputs["input_ids"].new_ones(states.shape[:2]),
                **arguments,
            )
        return decoded(generated)

    def mine() -> list[str]:
        return ours.ask(image, QUESTIONS, **arguments)

    repeats = max(2, repeats // 2)
    name = f"5 questions on a picture, {tokens} tokens: stock, "
    rows = [
        compare(name + "encoder each", 2.0, encoder_per_question, mine, repeats),
        compare(name + "features reused", 1.2, features_by_hand, mine, repeats),
    ]
    rows.append(count_row("5 questions: image K/V products / layers", ours, mine))
    return rows


def count_row(name: str, ours: VisionLanguageModel, run: Callable[[], Any]) -> Row:
    """How often a picture's features are projected to a layer's keys and values: once when nothing is repeated."""
    side = ours.network.config.image.num_features
    body = getattr(ours.network, "question_encoder", None) or ours.network.decoder.body
    layers = [module for module in body.modules() if isinstance(module, CrossAttention)]
    rows: list[int] = []
    project = CrossAttention._project

    def counted(layer: CrossAttention, context: torch.Tensor, key_mask: torch.Tensor | None) -> Any:
        if layer in layers:
            rows.append(context.shape[0] * context.shape[1])
        return project(layer, context, key_mask)

    with mock.patch.object(CrossAttention, "_project", counted):
        run()
    row = Row(name, sum(rows) / side / len(layers) * 1.0, 1.0, exact=True)
    show(row)
    return row


class observed_backends:  # noqa: N801 (used as a context manager)
    """The names of the attention backends used within the block."""

    def __enter__(self) -> set[str]:
        self.names: set[str] = set()
        self.block = observing(self._note)
        self.block.__enter__()
        return self.names

    def __exit__(self, *error: object) -> None:
        self.block.__exit__(None, None, None)

    def _note(self, call: AttentionCall) -> None:
        self.names.add(f"{call.role}: {call.backend}")


def main() -> int:
    """Print the table; exit code 1 when a row is short."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="tiny only shows that the script runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=20, help="new tokens of a caption")
    parser.add_argument("--answer-tokens", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print(f"BLIP {arguments.size}, float32, {torch.get_num_threads()} threads, medians of {arguments.repeats}")
    print(f"{'':<58} {'stock ms':>10} {'ours ms':>10} {'ratio':>7} {'goal':>6}")
    rows, facts = caption_rows(arguments.size, arguments.repeats, arguments.tokens)
    rows += question_rows(arguments.size, arguments.repeats, arguments.answer_tokens)
    facts |= {
        "versions": {
            "mmattn": mmattn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "size": arguments.size,
    }
    print(json.dumps(facts))
    return finish(rows, facts, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
