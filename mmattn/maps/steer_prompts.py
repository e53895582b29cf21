"""Which prompt each row of a U-Net's text belongs to: prompts are remembered as a pipeline encodes them.

Pipelines hand their U-Net embeddings only, and may batch, repeat or reorder them in any way. A row is known again by
its contents, exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.maps.tokens import TextTokens, text_tokens


class _Encoded(NamedTuple):
    states: Tensor  # [L, C]; of the real tokens only, where padding is masked
    prompt: str | None  # None: known to be a negative prompt's only
    may_be_negative: bool


class PromptMemory:
    """The prompts that a pipeline has encoded.

    Args:
        pipeline: of diffusers, or a `PixelPipeline`.

    Raises:
        UsageError: it has no tokenizer, or two that do not cut texts alike.
    """

    def __init__(self, pipeline: Any) -> None:
        found = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        self._tokenizers = [tokenizer for tokenizer in found if tokenizer is not None]
        if not self._tokenizers or not hasattr(pipeline, "encode_prompt"):
            raise UsageError(
                f"steer_attention: {type(pipeline).__name__} has no tokenizer, so that words cannot be found in its "
                "prompts; open the whole pipeline"
            )
        self._encoded: list[_Encoded] = []
        self._tokens: dict[tuple[str, int], TextTokens] = {}

    def __len__(self) -> int:
        return len(self._encoded)

    def note(self, arguments: dict[str, Any], result: Any) -> None:
        """Remember what `encode_prompt` made of its arguments.

        Raises:
            UsageError: two different prompts for SDXL's two text encoders.
        """
        prompt = arguments.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        for name in ("prompt_2", "prompt_3"):
            second = arguments.get(name)
            if second is not None and second != prompt:
                raise UsageError(
                    f"steer_attention: prompt and {name} differ, so that a token stands for two words; give one prompt"
                )
        if isinstance(result, tuple):
            if prompts:  # else the caller's own embeddings, or those of an earlier call
                repeats = len(result[0]) // len(prompts)
                rows = zip(result[0].detach()[::repeats], prompts, strict=True)
                self._encoded += [_Encoded(row, text, False) for row, text in rows]
            if len(result) > 1 and result[1] is not None:
                self._encoded += [_Encoded(row, None, True) for row in result[1].detach()]
        else:  # ours encodes prompts and negative prompts alike
            for number, (states, text) in enumerate(zip(result.states, prompts or (), strict=True)):
                length = len(states) if result.key_mask is None else int(result.key_mask[number].sum())
                self._encoded.append(_Encoded(states[:length], text, True))

    def prompts_of(self, text: Tensor, *, is_guided: bool) -> list[TextTokens | None]:
        """The prompt of each row of a text `[B, Lk, C]`; None for guidance's other half.

        Raises:
            UsageError: a row that was not made of a prompt here.
        """
        found: list[TextTokens | None] = []
        for number, row in enumerate(text.detach()):
            is_first_half = is_guided and number < len(text) // 2
            encoded = self._find(row, is_first_half)
            if encoded is None or (encoded.prompt is None and is_guided and not is_first_half):
                raise UsageError(
                    "steer_attention: the U-Net got a text that the pipeline did not encode within the block, so that "
                    "its words are not known; give prompts, not embeddings, and encode them within the block"
                )
            is_negative = encoded.prompt is None or (encoded.may_be_negative and is_first_half)
            found.append(None if is_negative else self._cut(encoded.prompt or "", len(row)))
        return found

    def _find(self, row: Tensor, is_first_half: bool) -> _Encoded | None:
        """What a row is, newest first; of a prompt that was also a negative one, the one that is meant."""
        same = [
            encoded
            for encoded in reversed(self._encoded)
            if len(encoded.states) <= len(row) and torch.equal(encoded.states.to(row), row[: len(encoded.states)])
        ]
        meant = [each for each in same if (each.may_be_negative if is_first_half else each.prompt is not None)]
        return next(iter(meant or same), None)

    def _cut(self, prompt: str, length: int) -> TextTokens:
        """The prompt's tokens; a row has room for `length` of them."""
        if (prompt, length) not in self._tokens:
            limit = min(length, *(int(tokenizer.model_max_length) for tokenizer in self._tokenizers))
            cuts = [text_tokens(tokenizer, prompt, max_length=limit) for tokenizer in self._tokenizers]
            if any(cut.pieces != cuts[0].pieces for cut in cuts):
                raise UsageError(
                    f"steer_attention: the pipeline's tokenizers cut {prompt!r} differently, so that a token stands "
                    "for two words"
                )
            self._tokens[prompt, length] = cuts[0]
        return self._tokens[prompt, length]
