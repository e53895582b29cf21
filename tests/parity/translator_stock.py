"""Stock translation models with random weights, the reference of the translator's parity tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import M2M100Config, M2M100ForConditionalGeneration, MarianConfig, MarianMTModel

from mmattn.models.translator import TranslatorNetwork, open_network
from mmattn.models.translator.stock import weight_table
from mmattn.ops.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR
from tests.tolerance import check_within

transformers.logging.set_verbosity_error()

# No two sizes that could be swapped are equal, and the numbers of heads differ between the sides.
SIZES = {
    "d_model": 30,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 41,
    "max_position_embeddings": 53,
}
VOCAB, TARGET_VOCAB = 97, 89
NEVER = -20.0
MARIAN = {"eos_token_id": 0, "forced_eos_token_id": None, "scale_embedding": True, "activation_function": "swish"}


def marian_config(**overrides: Any) -> MarianConfig:
    """As OPUS-MT's, shrunken: one vocabulary, its last token the padding, which also starts the target."""
    values = {"vocab_size": VOCAB, "pad_token_id": VOCAB - 1, "decoder_start_token_id": VOCAB - 1}
    return MarianConfig(**values | SIZES | MARIAN | overrides)


def marian_config_of_two_vocabularies(**overrides: Any) -> MarianConfig:
    """A vocabulary for each side; the padding is a token of both, the width is odd."""
    own = {"decoder_vocab_size": TARGET_VOCAB, "share_encoder_decoder_embeddings": False}
    own |= {"d_model": 33, "encoder_attention_heads": 11, "decoder_attention_heads": 3, "activation_function": "relu"}
    return marian_config(**own, pad_token_id=TARGET_VOCAB - 1, decoder_start_token_id=TARGET_VOCAB - 1, **overrides)


def m2m100_config(**overrides: Any) -> M2M100Config:
    """As M2M100's and NLLB's, shrunken: `</s>` starts the target, the language's token follows."""
    values = {"vocab_size": VOCAB, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return M2M100Config(**values | SIZES | {"scale_embedding": True} | overrides)


CONFIGS = {
    "marian": marian_config,
    "marian, two vocabularies": marian_config_of_two_vocabularies,
    "m2m100": m2m100_config,
}
CLASSES = {MarianConfig: MarianMTModel, M2M100Config: M2M100ForConditionalGeneration}


def stock_model(kind: str, *, seed: int = 0, eos_bias: float = 0.0, **overrides: Any) -> nn.Module:
    """A stock model in evaluation mode, every weight random: biases, norms and the logits bias too.

    `eos_bias` is added to the score of the end token at every step, and the padding's is kept low: no trained model
    writes it. M2M100 has no bias to put that into: there the tokens' vectors get a part along the last norm's bias.
    """
    config = CONFIGS[kind](**overrides)
    model = CLASSES[type(config)](config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                is_norm = "norm" in name and name.endswith("weight")
                spread = _spread(name, parameter, norm_first=kind == "m2m100")
                noise = spread * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + noise if is_norm else noise)
        end = config.eos_token_id
        if isinstance(model, MarianMTModel):
            model.final_logits_bias.copy_(0.05 * torch.randn(model.final_logits_bias.shape, generator=generator))
            model.final_logits_bias[0, end] = eos_bias
            model.final_logits_bias[0, config.pad_token_id] = NEVER
        else:
            bias = model.model.decoder.layer_norm.bias
            for token, amount in ((end, eos_bias), (config.pad_token_id, NEVER)):
                model.model.shared.weight[token] += amount * bias / bias.square().sum()
        if not config.tie_word_embeddings and getattr(config, "share_encoder_decoder_embeddings", True):
            # Transformers 5 ties these no more; a trained model has equal ones all the same.
            for side in (model.model.encoder, model.model.decoder):
                side.embed_tokens.weight.copy_(model.model.shared.weight)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=end, pad_token_id=config.pad_token_id, decoder_start_token_id=config.decoder_start_token_id
    )
    return model


def _spread(name: str, parameter: Tensor, *, norm_first: bool) -> float:
    """Standard deviations at which neither decoder writes one token over and over, nor blows rounding up."""
    if parameter.dim() == 1:
        return 1.0 if name == "model.decoder.layer_norm.bias" else 0.05
    if "attn" in name:
        return 0.8 if norm_first else 0.4
    if ".fc" in name:
        return 0.8 if norm_first else 0.2
    return 0.3


def save_stock(model: nn.Module, folder: Path) -> Path:
    """Save with transformers, and give back the folder."""
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Trio:
    """The same weights three times.

    Attributes:
        ours: opened from the stock folder.
        stock: in float32.
        exact: stock in float64.
    """

    ours: TranslatorNetwork
    stock: Any
    exact: Any


def trio(folder: Path, kind: str, **arguments: Any) -> Trio:
    """A stock model, saved and opened."""
    stock = stock_model(kind, **arguments)
    return Trio(open_network(save_stock(stock, folder)), stock, copy.deepcopy(stock).double())


def sources(config: Any, *, rows: int = 5, length: int = 11, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Source ids `[rows, length]` and their mask; every second row is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size - 10, (rows, length), generator=generator)
    ids[:, -1] = config.eos_token_id
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(1, rows, 2):
        kept = 2 + 3 * row % (length - 2)
        mask[row, kept:] = False
        ids[row, kept - 1] = config.eos_token_id
    ids[~mask] = config.pad_token_id
    return ids, mask


def targets(config: Any, *, rows: int = 5, length: int = 7, seed: int = 2) -> Tensor:
    """Target ids `[rows, length]` without padding, the start token first."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, TARGET_VOCAB - 10, (rows, length), generator=generator)
    ids[:, 0] = config.decoder_start_token_id
    return ids


def check(ours: Tensor, stock: Tensor, exact: Tensor, what: str, *, backward: bool = False) -> None:
    """Hold ours to the tolerance rule, stock's float32 being the eager path."""
    factor = BACKWARD_FACTOR if backward else FORWARD_FACTOR
    check_within(ours.detach(), stock.detach(), exact.detach(), factor=factor, what=what)


def check_states_and_logits(models: Trio) -> None:
    """Encoder states, decoder states and logits of a padded batch; padding itself may hold anything."""
    config = models.stock.config
    ids, mask = sources(config)
    target = targets(config)
    with torch.no_grad():
        states = models.ours.encode(ids, mask)
        hidden = models.ours.decoder(target, models.ours.project_context(states, mask))
        logits = models.ours(ids, target, source_mask=mask).logits
        outputs = [
            model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target, output_hidden_states=True)
            for model in (models.stock, models.exact)
        ]
    check(states[mask], *[each.encoder_last_hidden_state[mask] for each in outputs], what="encoder states")
    check(hidden, *[each.decoder_hidden_states[-1] for each in outputs], what="decoder states")
    check(logits, *[each.logits for each in outputs], what="logits")


def stock_labels(config: Any) -> tuple[Tensor, Tensor]:
    """What the decoder reads, and the labels, with places that are not scored."""
    target = targets(config)
    labels = target.roll(-1, dims=1)
    labels[:, -1] = config.eos_token_id
    labels[1, 4:] = -100
    labels[3, 2:] = -100
    return target, labels


def check_gradients(models: Trio) -> None:
    """The mean loss and the gradient of every weight, by stock's names."""
    config = models.stock.config
    ids, mask = sources(config)
    target, labels = stock_labels(config)
    output = models.ours(ids, target, source_mask=mask, labels=labels)
    assert int(output.num_tokens) == int((labels != -100).sum())
    loss = output.loss_sum / output.num_tokens
    loss.backward()
    losses = []
    for model in (models.stock, models.exact):
        found = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target, labels=labels)
        found.loss.backward()
        losses.append(found.loss)
    check(loss[None], losses[0][None], losses[1][None], "loss")
    stock, exact = (dict(model.named_parameters()) for model in (models.stock, models.exact))
    compared = set()
    for weight in weight_table(models.ours.config).weights:
        if weight.stock not in stock:  # the logits bias is a buffer
            continue
        ours = models.ours.get_parameter(weight.ours[0])
        compared.add(weight.ours[0])
        check(ours.grad, stock[weight.stock].grad, exact[weight.stock].grad, f"grad of {weight.stock}", backward=True)
    assert compared == {name for name, _ in models.ours.named_parameters()}
