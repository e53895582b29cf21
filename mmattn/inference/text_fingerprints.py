"""What a text encoder is, as a hash: embeddings kept on disk are good for one and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmattn.inference.weight_hash import add_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")


def encoders_fingerprint(
    encoders: Sequence[PreTrainedModel], tokenizers: Sequence[PreTrainedTokenizerBase], settings: dict[str, Any]
) -> str:
    """SHA-256 of the configs, weights and tokenizers, in hexadecimal.

    Equal wherever the files lie and on whatever device the weights are; another with other values or another dtype.

    Args:
        encoders: every text encoder that has a part in the embedding.
        tokenizers: theirs.
        settings: whatever else has a say, as JSON values.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for encoder in encoders:
        # A model of diffusers, such as a VAE, has its config as a dictionary.
        values = dict(encoder.config) if isinstance(encoder.config, Mapping) else encoder.config.to_dict()
        config = {name: value for name, value in values.items() if name not in _VOLATILE}
        digest.update(type(encoder).__name__.encode())
        digest.update(json.dumps(config, sort_keys=True, default=str).encode())
        add_weights(digest, encoder)
    for tokenizer in tokenizers:
        digest.update(_tokenizer_text(tokenizer).encode())
    return digest.hexdigest()


def _tokenizer_text(tokenizer: PreTrainedTokenizerBase) -> str:
    values: dict[str, Any] = {
        "special": tokenizer.special_tokens_map,
        "added": {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()},
        "truncation_side": tokenizer.truncation_side,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        values |= {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        files = json.loads(backend.to_str())
        # The last call's padding and truncation stay in there.
        values["files"] = {name: value for name, value in files.items() if name not in ("padding", "truncation")}
    return json.dumps(values, sort_keys=True, default=str)
