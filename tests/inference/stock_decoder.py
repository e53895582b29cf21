"""A tiny stock encoder-decoder with random weights, the decoder state that lets our loops drive it, and `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from mmattn.inference.decode import Generated

VOCAB, EOS, PAD, BOS = 53, 2, 1, 3


def tiny_marian(seed: int = 0, eos_bias: float = 1.5) -> MarianMTModel:
    torch.manual_seed(seed)
    config = MarianConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        init_std=0.6,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        decoder_start_token_id=BOS,
        forced_eos_token_id=None,
        scale_embedding=False,
    )
    model = MarianMTModel(config).eval()
    model.final_logits_bias[0, EOS] = eos_bias
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS, decoder_start_token_id=BOS
    )
    return model


class StockState:
    """Runs the stock decoder on the whole text each time: slow, and nothing in it can be out of step."""

    def __init__(self, model: MarianMTModel, sources: torch.Tensor, texts_per_context: int = 1) -> None:
        self.model = model
        self.context = model.get_encoder()(sources).last_hidden_state
        self.ids = sources.new_zeros(len(sources) * texts_per_context, 0)
        self.rows_seen: list[int] = []

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.ids = torch.cat((self.ids, input_ids), dim=1)
        self.rows_seen.append(len(self.ids))
        assert len(self.ids) % len(self.context) == 0
        context = self.context.repeat_interleave(len(self.ids) // len(self.context), dim=0)
        output = self.model(encoder_outputs=(context,), decoder_input_ids=self.ids, use_cache=False)
        return output.logits[:, -1]

    def reorder(self, rows: torch.Tensor, *, unchanged: int = 0) -> None:
        before, after = len(self.ids) // len(self.context), len(rows) // len(self.context)
        homes = torch.arange(len(self.context)).repeat_interleave(after)
        assert torch.equal(rows // before, homes), "a row left its context"
        self.ids = self.ids[rows]

    def select_contexts(self, contexts: torch.Tensor) -> None:
        rows = torch.arange(len(self.ids)).view(len(self.context), -1)[contexts].flatten()
        self.ids, self.context = self.ids[rows], self.context[contexts]


def stock_generate(
    model: Any,
    sources: torch.Tensor,
    arguments: Mapping[str, Any],
    *,
    prompt: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> list[list[Generated]]:
    """What transformers' `generate` gives, as our results.

    Args:
        model: a stock encoder-decoder; its generation config names the special tokens.
        sources: `[S, Ls]`.
        arguments: generation arguments; 20 new tokens where they set no length.
        prompt: `[S, L]`, the start token first; None: the start token.
        mask: bool `[S, Ls]`, False at padding.
    """
    own = model.generation_config
    arguments = {"eos_token_id": own.eos_token_id, **arguments}
    if "max_length" not in arguments:
        arguments.setdefault("max_new_tokens", 20)
    eos = arguments["eos_token_id"]
    if eos is None:
        own.eos_token_id = None
    special = {"pad_token_id": own.pad_token_id, "decoder_start_token_id": own.decoder_start_token_id}
    with torch.no_grad():
        output = model.generate(
            sources,
            attention_mask=None if mask is None else mask.long(),
            decoder_input_ids=prompt,
            generation_config=GenerationConfig(**special, **arguments),
            return_dict_in_generate=True,
            output_scores=True,
        )
    start = 1 if prompt is None else prompt.shape[1]
    eos_ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    new = output.sequences[:, start:]
    if getattr(output, "sequences_scores", None) is not None:
        scores = output.sequences_scores.tolist()
    else:
        log_probs = torch.stack(output.scores, dim=1).log_softmax(dim=-1)
        steps = log_probs.gather(2, new[:, :, None])[:, :, 0]
        ends = torch.zeros_like(new, dtype=torch.bool)
        for token in eos_ids:
            ends |= new == token
        is_over = ends.cumsum(dim=1) - ends.long() > 0
        scores = steps.masked_fill(is_over, 0.0).sum(dim=1).tolist()
    texts = []
    for row, score in zip(new.tolist(), scores, strict=True):
        end = next((place + 1 for place, token in enumerate(row) if token in eos_ids), len(row))
        texts.append(Generated(row[:end], score))
    count = arguments.get("num_return_sequences", 1)
    return [texts[first : first + count] for first in range(0, len(texts), count)]


def assert_same(ours: list[list[Generated]], theirs: list[list[Generated]], *, tolerance: float = 1e-4) -> None:
    """The same tokens, and scores that differ by no more than the tolerance (relative, and absolute below 1)."""
    assert [[one.tokens for one in text] for text in ours] == [[one.tokens for one in text] for text in theirs]
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        assert one.score == pytest.approx(other.score, rel=tolerance, abs=tolerance)
