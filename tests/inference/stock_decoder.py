"""A tiny stock encoder-decoder with random weights, and the decoder state that lets our loops drive it."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, MarianConfig, MarianMTModel

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

    def reorder(self, rows: torch.Tensor) -> None:
        before, after = len(self.ids) // len(self.context), len(rows) // len(self.context)
        homes = torch.arange(len(self.context)).repeat_interleave(after)
        assert torch.equal(rows // before, homes), "a row left its context"
        self.ids = self.ids[rows]

    def select_contexts(self, contexts: torch.Tensor) -> None:
        rows = torch.arange(len(self.ids)).view(len(self.context), -1)[contexts].flatten()
        self.ids, self.context = self.ids[rows], self.context[contexts]
