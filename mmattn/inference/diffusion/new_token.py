"""A new word for a text encoder: one more row of its input embeddings, trained while all others stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmattn.errors import ConfigError


class NewTokenEmbedding(nn.Module):
    """Input embeddings in which one token has a vector of its own.

    Args:
        embeddings: the text encoder's.
        token_id: of the new token; may lie beyond the table.
        vector: where the new token starts, `[C]`.
    """

    def __init__(self, embeddings: nn.Embedding, token_id: int, vector: Tensor) -> None:
        super().__init__()
        self.embeddings, self.token_id = embeddings, token_id
        self.vector = nn.Parameter(vector.detach().clone())

    def forward(self, input_ids: Tensor) -> Tensor:
        """Token numbers `[B, L]` to vectors `[B, L, C]`."""
        is_new = input_ids == self.token_id
        known = self.embeddings(input_ids.masked_fill(is_new, 0))
        return torch.where(is_new[..., None], self.vector.to(known.dtype), known)


def add_new_token(
    encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str, initializer: str
) -> NewTokenEmbedding:
    """Teach tokenizer and text encoder a token, in place; only its vector is left to train in the encoder.

    Args:
        encoder: any transformers text encoder.
        tokenizer: its tokenizer.
        token: as captions and prompts write it, such as `<new1>`.
        initializer: a word of one token that is closest in meaning.

    Raises:
        ConfigError: the token is known already, or the initializer is not one token.
    """
    pieces = tokenizer(initializer, add_special_tokens=False)["input_ids"]
    if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f"new_token.initializer {initializer!r} is not one token of this text encoder's: choose a common short word"
        )
    if tokenizer.add_tokens([token]) != 1:
        raise ConfigError(f"new_token.token {token!r} is a token of this text encoder already: choose another")
    table = encoder.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise ConfigError(f"new_token: the text encoder's input embeddings are a {type(table).__name__}, not a table")
    encoder.requires_grad_(False)
    added = NewTokenEmbedding(table, len(tokenizer) - 1, table.weight[pieces[0]])
    encoder.set_input_embeddings(added)
    return added
