"""Translation models of OPUS-MT's and NLLB's size with random weights, decoded to a forced length by both."""

from __future__ import annotations

from typing import Any

import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, MarianConfig, MarianMTModel, PreTrainedModel

from mmattn.inference.decode import DecodeSettings, decode
from mmattn.models.translator import TranslatorNetwork

VOCAB, PAD, EOS = 58101, 58100, 0
TINY = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
Texts = tuple[list[list[int]], list[float]]
"""Tokens `[B][T]`, and with beams a score for each text."""


def random_opus_mt(**sizes: Any) -> MarianMTModel:
    """In the shape of Helsinki-NLP/opus-mt-en-de; `sizes` changes it."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 512,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 8,
        "decoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "max_position_embeddings": 512,
        "activation_function": "swish",
        "scale_embedding": True,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        "forced_eos_token_id": None,
        "init_std": 0.05,
    }
    return MarianMTModel(MarianConfig(**values | sizes)).eval()


def random_nllb(**sizes: Any) -> M2M100ForConditionalGeneration:
    """In the shape of facebook/nllb-200-distilled-600M; `sizes` changes it."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "vocab_size": 256206,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 1024,
        "scale_embedding": True,
        "init_std": 0.05,
    }
    return M2M100ForConditionalGeneration(M2M100Config(**values | sizes)).eval()


def stock_texts(
    model: PreTrainedModel, sources: torch.Tensor, beams: int, new_tokens: int, forced: int | None = None
) -> Texts:
    """Stock `generate` on sources `[B, L]`; `forced` is the first token of every text."""
    out = model.generate(
        input_ids=sources,
        attention_mask=torch.ones_like(sources),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_beams=beams,
        do_sample=False,
        forced_bos_token_id=forced,
        bad_words_ids=[[model.config.pad_token_id]],
        return_dict_in_generate=True,
        output_scores=beams > 1,  # stock gives the hypotheses' scores only with them
    )
    scores = getattr(out, "sequences_scores", None)
    return out.sequences[:, 1:].tolist(), [] if scores is None else scores.tolist()


def our_texts(
    network: TranslatorNetwork, sources: torch.Tensor, beams: int, new_tokens: int, forced: int | None = None
) -> Texts:
    """Our decoding of the same."""
    config = network.config
    settings = DecodeSettings(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        num_beams=beams,
        forced_bos_token_id=forced,
        bad_words_ids=[[config.pad_token_id]],
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    with torch.no_grad():
        contexts = network.project_context(network.encode(sources))
    state = network.start(contexts, max_length=1 + new_tokens)
    prompt = torch.full((len(sources), 1), config.decoder_start_token_id, device=sources.device)
    found = decode(state, prompt, settings, with_scores=beams > 1, stop_every=state.stop_every)
    return [texts[0].tokens for texts in found], [texts[0].score for texts in found]


def decoder_bytes(network: TranslatorNetwork) -> int:
    """Bytes of the weights that a decoding step needs; the context's keys and values are there already."""
    skipped = (".cross_attn.k_proj", ".cross_attn.v_proj")
    return sum(p.nbytes for name, p in network.decoder.named_parameters() if not any(part in name for part in skipped))
