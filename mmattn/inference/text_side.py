"""The text side of the vision-language façade: texts to tokens, decoding on encoded pictures, tokens to texts.

P pictures, Q texts on one of them. Prompts of a decoder call have equal length and pictures of a call equally many
texts, so texts are sorted into such groups here, and results are put back in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from mmattn.errors import UsageError
from mmattn.inference.decode import DecodeSettings, Generated, decode
from mmattn.inference.pictures import Pictures
from mmattn.inference.texts import MatchResult, Scored, groups_of_equal_count
from mmattn.maps.record import TextToRecord, recorders_of
from mmattn.models.decoding import DecoderState, LayerContexts
from mmattn.models.static_decoding import StaticState, bucket
from mmattn.models.vlm import (
    CaptioningNetwork,
    CompiledDecoder,
    MatchingNetwork,
    QuestionAnsweringNetwork,
    VisionLanguageNetwork,
)

ResultT = TypeVar("ResultT")


class TextSide:
    """Tokens in, tokens out, for one network and its tokenizer.

    Args:
        network: captioning, question answering or matching.
        tokenizer: the network's.
        is_stock: the network is a BLIP one, whose texts carry the tokenizer's own special tokens.
    """

    def __init__(self, network: VisionLanguageNetwork, tokenizer: PreTrainedTokenizerBase, *, is_stock: bool) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.is_stock = is_stock

    # Texts to tokens.

    def caption_prompt(self, prompt: str) -> list[int]:
        """Tokens that a caption starts with: `bos prompt`."""
        bos = self.network.config.bos_token_id
        return [bos, *self.tokenizer(prompt, add_special_tokens=False).input_ids] if prompt else [bos]

    def question_prompt(self, question: str) -> list[int]:
        """Tokens that an answer of our own captioning networks follows: `bos question sep`."""
        sep = self.network.config.sep_token_id
        if sep is None:
            raise UsageError("this checkpoint has no sep_token_id: it was not made to answer questions")
        ids = self.tokenizer(question, add_special_tokens=False).input_ids
        return [self.network.config.bos_token_id, *ids, sep]

    def _padded(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids `[R, L]` with the tokenizer's special tokens, and a mask where lengths differ."""
        ids = [self.tokenizer(text).input_ids for text in texts]
        length = max(map(len, ids))
        if min(map(len, ids)) == length:
            return self._tensor(ids), None
        pad = self.network.config.pad_token_id
        mask = [[True] * len(row) + [False] * (length - len(row)) for row in ids]
        return self._tensor([row + [pad] * (length - len(row)) for row in ids]), self._tensor(mask)

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=next(self.network.parameters()).device)

    # Decoding.

    def continue_prompts(
        self,
        pictures: Pictures,
        prompts: list[list[list[int]]],
        settings: DecodeSettings,
        generator: torch.Generator | None,
        compiled: CompiledDecoder | None = None,
    ) -> list[list[list[Generated]]]:
        """Continue prompts `[P][Q]` (token lists); results `[P][Q][num_return_sequences]`."""
        network = self.network
        assert isinstance(network, CaptioningNetwork)
        results: list[list[list[Generated]]] = [[[] for _ in of_picture] for of_picture in prompts]
        lengths = sorted({len(ids) for of_picture in prompts for ids in of_picture})
        for length in lengths:
            places = [[q for q, ids in enumerate(of_picture) if len(ids) == length] for of_picture in prompts]
            for count, chosen in groups_of_equal_count([len(of_picture) for of_picture in places]).items():
                spots = [(p, q) for p in chosen for q in places[p]]
                prompt = self._tensor([prompts[p][q] for p, q in spots])
                contexts = pictures.select(chosen).contexts
                total = settings.total_length(length)
                if compiled is None:
                    state = network.start(contexts, rows_per_context=count, max_length=total)
                else:
                    state = _compiled_state(compiled, contexts, count, total, settings)
                generated = _decoded(state, prompt, settings, count, generator)
                for (p, q), texts in zip(spots, generated, strict=True):
                    results[p][q] = texts
        return results

    def answer(
        self,
        pictures: Pictures,
        questions: list[list[str]],
        settings: DecodeSettings,
        generator: torch.Generator | None,
        compiled: CompiledDecoder | None = None,
    ) -> list[list[list[Generated]]]:
        """Answers of a question-answering network to questions `[P][Q]`."""
        network = self.network
        assert isinstance(network, QuestionAnsweringNetwork)

        def run(some: Pictures, flat: list[str]) -> list[list[Generated]]:
            states = network.encode_questions(some.contexts, *self._padded(flat))
            prompt = self._tensor([[network.config.bos_token_id]] * len(flat))
            total = settings.total_length(1)
            if compiled is None:
                state = network.start(states, max_length=total)
            else:
                contexts = network.decoder.project_context(states.hidden, states.key_mask)
                state = _compiled_state(compiled, contexts, 1, total, settings)
            return _decoded(state, prompt, settings, 1, generator)

        return _by_count(pictures, questions, run)

    def match(self, pictures: Pictures, texts: list[list[str]], *, with_cosine: bool) -> list[list[Any]]:
        """Match probabilities of texts `[P][Q]`, or pairs `MatchResult(probability, cosine)`."""
        network = self.network
        assert isinstance(network, MatchingNetwork)

        def run(some: Pictures, flat: list[str]) -> list[Any]:
            ids, mask = self._padded(flat)
            if not with_cosine:
                logits = network.match_logits(some.contexts, ids, mask)
                return logits.float().softmax(dim=-1)[:, 1].tolist()
            scores = network.match_scores(some.features, ids, mask, context=some.contexts)
            return list(map(MatchResult, scores.probability.tolist(), scores.cosine.tolist()))

        return _by_count(pictures, texts, run)

    # Tokens to texts.

    def to_texts(
        self, generated: list[list[list[Generated]]], prefixes: list[list[list[int]]] | None, *, with_scores: bool
    ) -> list[list[Any]]:
        """Texts `[P][Q]`: plain, `Scored`, or lists of these where several were returned for one prompt."""
        results: list[list[Any]] = []
        for p, of_picture in enumerate(generated):
            results.append([])
            for q, candidates in enumerate(of_picture):
                prefix = [] if prefixes is None else prefixes[p][q]
                texts = [self._decode([*prefix, *one.tokens]) for one in candidates]
                if with_scores:
                    texts = [Scored(text, one.score) for text, one in zip(texts, candidates, strict=True)]
                results[-1].append(texts if len(texts) > 1 else texts[0])
        return results

    def _decode(self, ids: list[int]) -> str:
        # Not every tokenizer knows the bos that the network starts with (BLIP's [DEC]) as a special token.
        special = {self.network.config.bos_token_id, self.network.config.stop_token_id}
        kept = [token for token in ids if token not in special]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()

    # Recording.

    def record(self, target: Any, pictures: Pictures, texts: list[list[tuple[list[int], int]]]) -> None:
        """Hand every text `[P][Q]`, tokens and how many of them were given, to the recorders of `target`."""
        recorders = recorders_of(target)
        if not recorders:
            return
        for p, of_picture in enumerate(texts):
            one = pictures.select([p])
            for ids, num_given in of_picture:
                text = self._to_record(one, ids, num_given)
                for recorder in recorders:
                    recorder.record(text, lambda one=one, ids=ids: self._read(one, ids))

    def ids_of(self, texts: list[list[str]]) -> list[list[tuple[list[int], int]]]:
        """Given texts as `record` wants them."""
        ids = [[self.tokenizer(text).input_ids for text in of_picture] for of_picture in texts]
        return [[(row, len(row)) for row in of_picture] for of_picture in ids]

    def joined(
        self, prompts: list[list[list[int]]], generated: list[list[list[Generated]]]
    ) -> list[list[tuple[list[int], int]]]:
        """Prompts with the best text that continues each, as `record` wants them."""
        stop = self.network.config.stop_token_id
        return [
            [
                (ids + [token for token in candidates[0].tokens if token != stop], len(ids))
                for ids, candidates in zip(of_prompts, of_texts, strict=True)
            ]
            for of_prompts, of_texts in zip(prompts, generated, strict=True)
        ]

    def _to_record(self, picture: Pictures, ids: list[int], num_given: int) -> TextToRecord:
        config = self.network.config
        special = {*self.tokenizer.all_special_ids, config.bos_token_id, config.stop_token_id, config.sep_token_id}
        pieces = [
            "" if token in special else str(self.tokenizer.decode([token])).strip().removeprefix("##").lower()
            for token in ids
        ]
        side = config.image.grid if config.image.kind == "conv" else config.image.image_size // config.image.patch_size
        num_extra = config.image.num_features - side * side
        return TextToRecord(pieces, num_given, picture.images[0], (side, side), num_extra)

    def _read(self, picture: Pictures, ids: list[int]) -> None:
        """Run the layers that attend to the picture over one text."""
        rows = self._tensor([ids])
        if isinstance(self.network, CaptioningNetwork):
            self.network.decoder(rows, picture.contexts)
        elif isinstance(self.network, QuestionAnsweringNetwork):
            self.network.encode_questions(picture.contexts, rows)
        elif isinstance(self.network, MatchingNetwork):
            self.network.match_logits(picture.contexts, rows)


def _compiled_state(
    compiled: CompiledDecoder, contexts: LayerContexts, count: int, total: int, settings: DecodeSettings
) -> StaticState:
    # Numbers of texts are rounded up: each number of rows is a compilation.
    most = bucket(count) * max(settings.num_beams, settings.num_return_sequences)
    return compiled.start(contexts, rows_per_context=count, most_rows=most, max_length=total)


def _decoded(
    state: DecoderState, prompt: torch.Tensor, settings: DecodeSettings, count: int, generator: torch.Generator | None
) -> list[list[Generated]]:
    stop_every = 1 if settings.do_sample else state.stop_every
    return decode(state, prompt, settings, texts_per_context=count, generator=generator, stop_every=stop_every)


def _by_count(
    pictures: Pictures, texts: list[list[str]], run: Callable[[Pictures, list[str]], list[ResultT]]
) -> list[list[ResultT]]:
    """Call `run` on pictures that have equally many texts, with those texts flat; results by picture and text."""
    results: list[list[ResultT]] = [[] for _ in texts]
    for count, chosen in groups_of_equal_count([len(of_picture) for of_picture in texts]).items():
        flat = run(pictures.select(chosen), [text for p in chosen for text in texts[p]])
        for place, p in enumerate(chosen):
            results[p] = flat[place * count : (place + 1) * count]
    return results
