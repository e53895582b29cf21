"""Which prompt each row of a U-Net's text belongs to, and its tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmattn.errors import UsageError
from mmattn.maps.prompt_memory import MOST_TEXTS, Encoded, PromptMemory
from mmattn.maps.tokens import TextTokens, prompt_tokens


class SteeredPrompts:
    """The prompts that a pipeline has encoded, as tokens.

    Args:
        pipeline: of diffusers, or a `PixelPipeline`.

    Raises:
        UsageError: it has no tokenizer, or two that do not cut texts alike.
    """

    def __init__(self, pipeline: Any) -> None:
        found = (getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        self._tokenizers = [tokenizer for tokenizer in found if tokenizer is not None]
        if self._tokenizers and not hasattr(pipeline, "encode_prompt"):
            raise UsageError(
                f"steer_attention: {type(pipeline).__name__} has no encode_prompt, so that its prompts are not seen: a "
                "modular pipeline encodes them in blocks of its own; steer a StableDiffusionPipeline or its kin"
            )
        if not self._tokenizers:
            raise UsageError(
                f"steer_attention: {type(pipeline).__name__} has no tokenizer, so that words cannot be found in its "
                "prompts; open the whole pipeline"
            )
        self._pipeline = pipeline
        self._memory = PromptMemory()
        self._tokens: dict[tuple[str, int], TextTokens] = {}

    def note(self, arguments: dict[str, Any], result: Any) -> None:
        """Remember what `encode_prompt` made of its arguments."""
        self._memory.note(arguments, result)

    def prompts_of(self, text: Tensor, *, is_guided: bool) -> list[TextTokens | None]:
        """The prompt of each row of a text `[B, Lk, C]`; None for guidance's other half.

        Raises:
            UsageError: a row that was not made of a prompt here, or of two prompts for two text encoders.
        """
        found: list[TextTokens | None] = []
        for number, row in enumerate(text.detach()):
            is_first_half = is_guided and number < len(text) // 2
            encoded = self._memory.find(row, is_negative=is_first_half)
            if encoded is None or (not encoded.is_prompt and is_guided and not is_first_half):
                raise UsageError(
                    "steer_attention: the U-Net got a text that the pipeline did not encode within the block, so that "
                    "its words are not known; give prompts, not embeddings, and encode them within the block, which "
                    f"remembers the last {MOST_TEXTS} or fewer"
                )
            is_other_half = not encoded.is_prompt or (encoded.is_negative and is_first_half)
            found.append(None if is_other_half else self._tokens_of(encoded, encoded.text or "", len(row)))
        return found

    def _tokens_of(self, encoded: Encoded, prompt: str, length: int) -> TextTokens:
        """The prompt's tokens; a row has room for `length` of them."""
        if encoded.others:
            other = next(other for other in encoded.others if other != prompt)
            raise UsageError(
                f"steer_attention: prompt and prompt_2 differ, {prompt!r} and {other!r}, so that a token stands "
                "for two words; give one prompt"
            )
        key = prompt, length
        if key not in self._tokens:
            if len(self._tokens) >= MOST_TEXTS:
                self._tokens.clear()
            self._tokens[key] = self._cut(*key)
        return self._tokens[key]

    def _cut(self, prompt: str, length: int) -> TextTokens:
        limit = min(length, *(int(tokenizer.model_max_length) for tokenizer in self._tokenizers))
        cuts = [prompt_tokens(self._pipeline, each, prompt, max_length=limit) for each in self._tokenizers]
        if any(cut.pieces != cuts[0].pieces for cut in cuts):
            raise UsageError(
                f"steer_attention: the pipeline's tokenizers cut {prompt!r} differently, so that a token stands "
                "for two words"
            )
        return cuts[0]
