"""Which text each row of a diffusion model's batch is drawn from, and which of its tokens are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.maps.prompt_memory import Encoded, PromptMemory, as_tokenized, listed
from mmattn.maps.tokens import TextTokens, prompt_tokens, shifted_tokens
from mmattn.maps.wanted import Wanted


class Texts(NamedTuple):
    """The prompts of one generation.

    Attributes:
        prompts: None where only embeddings are known.
        second: the pipeline's `prompt_2`, where it is given.
        negatives: of guidance's other half; None: the empty text.
    """

    prompts: list[str] | None = None
    second: list[str] | None = None
    negatives: list[str] | None = None


class PictureText(NamedTuple):
    """The tokens of a picture's prompt.

    Attributes:
        prompt: None where only embeddings are known.
        second: of another text at the same places (SDXL's `prompt_2`).
        also: of the same text by a further encoder, at later places (SD 3's T5).
    """

    prompt: TextTokens | None = None
    second: TextTokens | None = None
    also: TextTokens | None = None

    def places(self, word: str) -> list[int]:
        """Positions of a word's tokens, everywhere."""
        known = [text for text in (self.prompt, self.also) if text is not None]
        return sorted({place for text in known for run in text.find(word) for place in run})


class DrawnTexts:
    """The texts of one recorder's pipeline.

    Args:
        model: the U-Net or transformer.
        wanted: what is recorded.
        pipeline: around it; None for a model by itself.
    """

    def __init__(self, model: nn.Module, wanted: Wanted, pipeline: Any) -> None:
        self._wanted, self._pipeline = wanted, pipeline
        self._kind = type(model).__name__
        self._memory = PromptMemory()
        self._noted = Texts()
        self._told: Texts | None = None

    def note(self, arguments: dict[str, Any], result: Any) -> None:
        """A pipeline has encoded prompts."""
        second, negatives = listed(arguments.get("prompt_2")), listed(arguments.get("negative_prompt"))
        self._noted = Texts(listed(arguments.get("prompt")), second, negatives)
        self._memory.note(arguments, result)

    def expect(self, texts: Texts) -> None:
        """A façade says what is drawn next."""
        self._told = texts

    def of_rows(self, text: Tensor | None, rows: range, count: int, *, is_guided: bool) -> list[PictureText]:
        """The texts of some rows.

        Args:
            text: `[B', Lk, C]`, where each of the B' serves equally many rows; None: not known.
            rows: those that are kept.
            count: rows of the batch.
            is_guided: the first half of the batch is guidance's.

        Raises:
            UsageError: other prompts than rows.
        """
        told, self._told = self._told, None
        noted, self._noted = self._noted, Texts()
        length = None if text is None else text.shape[1]
        if self._wanted.prompts is not None:
            prompts = listed(as_tokenized(self._pipeline, self._wanted.prompts))
            return self._spread(Texts(prompts, None, noted.negatives), rows, is_guided, length)
        if told is not None:
            return self._spread(told, rows, is_guided, length)
        found = [] if text is None else self._remembered(text, rows, count, is_guided)
        if found:
            return [
                PictureText() if each.text is None else self._tokens(each.text, each.others, length) for each in found
            ]
        if text is not None and self._memory.knows_width(text.shape[2]):
            return [PictureText()] * len(rows)  # such texts were encoded, and this is none of them
        return self._spread(noted, rows, is_guided, length)

    def _remembered(self, text: Tensor, rows: range, count: int, is_guided: bool) -> list[Encoded]:
        """What was encoded into the rows; nothing where that is not known of every one."""
        each = max(1, count // len(text))
        found: dict[tuple[int, bool], Encoded | None] = {}
        for row in rows:
            key = row // each, is_guided and row < count // 2
            if key not in found:
                found[key] = self._memory.find(text[key[0]].detach(), is_negative=key[1])
        encoded = [found[row // each, is_guided and row < count // 2] for row in rows]
        known = [one for one in encoded if one is not None]
        return known if len(known) == len(encoded) else []

    def _spread(self, texts: Texts, rows: range, is_guided: bool, length: int | None) -> list[PictureText]:
        """Prompts in their order, each for equally many of the rows."""
        prompts, count, guidance = texts.prompts, len(rows), self._wanted.guidance
        if prompts is None:
            return [PictureText()] * count
        negatives = texts.negatives or [""]
        is_both = guidance == "both" and is_guided and self._pipeline is not None and count % (2 * len(prompts)) == 0
        if (guidance == "unconditional" or is_both) and len(prompts) % len(negatives):
            raise UsageError(
                f"record_attention: {len(prompts)} prompts and {len(negatives)} negative prompts: give one negative "
                "prompt, or one for each prompt"
            )
        if guidance == "unconditional":
            prompts = negatives * (len(prompts) // len(negatives))
        elif is_both:
            prompts = negatives * (len(prompts) // len(negatives)) + prompts
        if count % len(prompts):
            raise UsageError(f"record_attention: {len(prompts)} prompts for {count} pictures: give one for each")
        each = count // len(prompts)
        seconds = texts.second if texts.second is not None and len(texts.second) == len(prompts) else prompts
        found = []
        for prompt, second in zip(prompts, seconds, strict=True):
            found += [self._tokens(prompt, (second,) if second != prompt else (), length)] * each
        return found

    def _tokens(self, prompt: str, others: tuple[str, ...], length: int | None) -> PictureText:
        names = ("tokenizer", "tokenizer_2", "tokenizer_3")
        tokenizers = [getattr(self._pipeline, name, None) for name in names]
        second, third = tokenizers[1:]
        if self._wanted.tokenizer is not None:
            return PictureText(self._cut(self._wanted.tokenizer, prompt, length))
        if self._kind.startswith("Flux"):  # CLIP's words are pooled
            own = others[0] if others else prompt
            return PictureText() if second is None else PictureText(self._cut(second, own, length))
        main = next((tokenizer for tokenizer in tokenizers[:2] if tokenizer is not None), None)
        if main is None:
            return PictureText()
        found = PictureText(self._cut(main, prompt, length))
        if self._kind.startswith("SD3"):
            begin = int(main.model_max_length)
            if third is None or getattr(self._pipeline, "text_encoder_3", None) is None or length is None:
                return found
            also = self._cut(third, others[1] if len(others) > 1 else prompt, length - begin)
            return found._replace(also=shifted_tokens(also, begin))
        is_other = bool(others) and others[0] != prompt and second is not None
        return found._replace(second=self._cut(second, others[0], length) if is_other else None)

    def _cut(self, tokenizer: Any, prompt: str, length: int | None) -> TextTokens:
        return prompt_tokens(self._pipeline, tokenizer, prompt, max_length=length)

    def kept(self, texts: Sequence[PictureText], length: int | None) -> list[list[int] | None]:
        """Positions to keep of each prompt; None: all. A word need not be in every prompt, but in one.

        Args:
            texts: of the pictures.
            length: tokens of the text, padding included, where that is known.

        Raises:
            UsageError: a word or a position that is not there.
        """
        tokens = self._wanted.tokens
        if tokens is None:
            return [None] * len(texts)
        words = [token for token in tokens if isinstance(token, str)]
        numbers = {token for token in tokens if isinstance(token, int)}
        if length is not None and any(number >= length for number in numbers):
            raise UsageError(
                f"record_attention: tokens has {max(numbers)}, but the text has {length} tokens, 0 to {length - 1}"
            )
        known = [text for text in texts if text.prompt is not None]
        if words and len(known) < len(texts):
            raise UsageError(
                f"record_attention: tokens={tokens} are words, but the prompt's words are not known, only its "
                "embeddings: name them with prompts=[...], or give positions"
            )
        for word in words:
            prompt = known[0].prompt
            if prompt is not None and not any(text.places(word) for text in known):
                prompt.positions(word)  # raises, and says which words are there
        return [sorted(numbers.union(*(text.places(word) for word in words))) for text in texts]
