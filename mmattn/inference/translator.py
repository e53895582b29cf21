"""Translation in three lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mmattn.data.languages import LanguageCodes
from mmattn.errors import UsageError
from mmattn.inference import folders
from mmattn.inference.call_plan import plan_call, target_tokens
from mmattn.inference.decode import DecodeSettings
from mmattn.inference.hub import evaluating, push_folder
from mmattn.inference.moving import NetworkFacade, suit_products
from mmattn.inference.origins import opened_from, origin_of
from mmattn.inference.quantized import quantize_linears
from mmattn.inference.sources import (
    EncodedBatch,
    EncodedSources,
    Plan,
    encode_batch,
    token_batches,
    with_bar,
)
from mmattn.inference.traced_products import trace_products
from mmattn.inference.translation import MemoryUse, Piece, TargetSide, Translated, assemble, stream_document
from mmattn.inference.translation_maps import translation_recorder
from mmattn.inference.translator_checks import check_vocabulary, generation_defaults, special_tokens
from mmattn.models.sources import find_folder
from mmattn.models.translator import CompiledDecoder, TranslatorNetwork, family_of, open_network, save_network

Texts = str | Sequence[str]
QUANTIZATIONS = ("int8",)
_BATCH_TOKENS = {"cpu": 1024}
_BATCH_TOKENS_ELSEWHERE = 8192


class Translator(NetworkFacade[TranslatorNetwork]):
    """A translation network with its tokenizer: OPUS-MT (Marian), M2M100 and NLLB checkpoints, and our own.

    Generation arguments have transformers' names (`num_beams`, `length_penalty`, `max_new_tokens`, `do_sample`,
    `bad_words_ids`, ...; all of `DecodeSettings`). The checkpoint's `generation_config.json` gives their defaults;
    where it sets no length, a translation may be as long as the model has positions.

    Args:
        network: from `mmattn.models.translator`. It is put into evaluation mode during a call, and back after it.
        tokenizer: the network's.
        generation_config: defaults of the generation arguments.

    Attributes:
        settings: defaults of the generation arguments.
        start_id: the token that translations start from.
        peak_memory: `MemoryUse` of the batch that took most in the last call of `translate`; None before the first.
        compiled: takes the steps of decoding where they are compiled; None: they are not.

    Raises:
        CheckpointError: a tokenizer that does not fit the network.
    """

    records_attention = True

    def __init__(
        self,
        network: TranslatorNetwork,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.codes = LanguageCodes(tokenizer)
        self.generation_config = dict(generation_config or {})
        self.peak_memory: MemoryUse | None = None
        self.quantization: str | None = None
        self.compiled: CompiledDecoder | None = None
        config = network.config
        check_vocabulary(tokenizer, config)
        self.start_id, ends = special_tokens(self.generation_config, config)
        special = {"eos_token_id": ends, "pad_token_id": config.pad_token_id}
        settings = DecodeSettings.from_generation_config({**self.generation_config, **special}, config.output_size)
        if settings.max_length is None and settings.max_new_tokens is None:
            settings = settings.updated(max_length=config.max_positions)
        self.settings = settings

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        quantize: str | None = None,
        compile: bool = False,
    ) -> Translator:
        """Open a Marian (OPUS-MT), M2M100 or NLLB checkpoint, or one of ours, for inference.

        Args:
            id_or_folder: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            token: hub token; None: the stored one.
            variant: infix of the weight files, such as `fp16`.
            dtype: of the weights; None: bfloat16 (or float16) on a CUDA device, else float32.
            device: None: the first accelerator, else the CPU.
            local_files_only: never go to the network.
            quantize: "int8": weights of the products in 8 bits, their inputs quantised as they come; CPU only.
            compile: decode in steps of static shape, compiled at first use (for each number of beams, and again for
                single texts and for alignments) and replayed as CUDA graphs on a CUDA device. Results stay the same.

        Raises:
            CheckpointError: nothing there, a model of another kind, or files that do not fit together.
            UsageError: an unknown quantisation, one that the device cannot do, or one together with `compile`.
        """
        if quantize is not None and compile:
            raise UsageError(f"compile=True does not go with quantize={quantize!r}: leave one of them out")
        if quantize is not None and quantize not in QUANTIZATIONS:
            raise UsageError(f"quantize={quantize!r} is unknown: use {', '.join(map(repr, QUANTIZATIONS))} or None")
        folder = find_folder(
            id_or_folder, revision=revision, token=token, variant=variant, local_files_only=local_files_only
        )
        device = folders.usable_device(device)
        dtype = folders.default_dtype(device) if dtype is None else dtype
        network = open_network(folder, variant=variant, dtype=dtype, device=device)
        opened_from(network, folder)
        tokenizer = folders.open_tokenizer(
            folder, is_stock=True, has_stock_config=family_of(network.config) is not None
        )
        translator = cls(network, tokenizer, generation_defaults(folder, network.config))
        translator._prepare(quantize, compile=compile)
        return translator

    def _prepare(self, quantize: str | None, *, compile: bool) -> None:
        """Put the products into the form that suits the device."""
        if quantize is not None:
            quantize_linears(self.network)
            self.quantization = quantize
        else:
            suit_products(self.network)
        if compile:
            self.compile()

    def compile(self, *, backend: str = "inductor") -> None:
        """Decode from now on in steps of static shape, as `from_pretrained(..., compile=True)` does.

        Results stay the same. What cannot be done in them is refused: `quantize`, autocast, hooks on attention.
        Weights that change in place are seen; after weights, dtype or device are replaced the step is compiled anew.
        `translator.compiled = None` goes back.

        Args:
            backend: of torch.compile.

        Raises:
            UsageError: a quantised network, or a device other than a CPU or a CUDA device.
        """
        if self.quantization is not None:
            raise UsageError(f"compile() does not go with quantize={self.quantization!r}: open the translator without")
        trace_products(self.network)
        self.compiled = CompiledDecoder(self.network, backend=backend)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizer and generation settings; stock classes open a Marian or M2M100 folder.

        Raises:
            CheckpointError: a network that is no longer what its config says, or a disk that refuses.
            UsageError: a quantised network, whose weights are no longer the checkpoint's.
        """
        if self.quantization is not None:
            raise UsageError(f"this translator is quantised ({self.quantization}): open it without to save it")
        folder = Path(folder)
        save_network(self.network, folder)
        self.tokenizer.save_pretrained(folder)
        ends = self.settings.eos_token_id
        special = {
            "decoder_start_token_id": self.start_id,
            "eos_token_id": ends if isinstance(ends, int) or ends is None else list(ends),
            "pad_token_id": self.network.config.pad_token_id,
        }
        folders.write_generation_config(folder, {**self.generation_config, **special})

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Save to a hub repository, made when it is not there; returns its address."""
        return push_folder(self.save_pretrained, repo_id, private=private, token=token, commit_message=commit_message)

    @property
    def is_stock(self) -> bool:
        """Whether stock transformers opens what `save_pretrained` writes."""
        return family_of(self.network.config) is not None

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes for `src_lang` and `tgt_lang`; empty when the model translates one pair of languages."""
        return self.codes.known

    def encode(
        self,
        texts: Texts,
        *,
        src_lang: str | Sequence[str] | None = None,
        tgt_lang: str | Sequence[str] | None = None,
        on_long: str = "split",
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> EncodedSources:
        """Run the encoder once, for any number of translations. Arguments as in `translate`."""
        plan = plan_call(texts, self.codes, src_lang, tgt_lang, on_long, limit=self.network.config.max_positions)
        with evaluating(self.network):
            batches = list(self._encoded(plan, batch_tokens, progress, "Encoding"))
        return EncodedSources(plan, batches, origin_of(self.network))

    def translate(
        self,
        texts: Texts | EncodedSources,
        *,
        src_lang: str | Sequence[str] | None = None,
        tgt_lang: str | Sequence[str] | None = None,
        return_scores: bool = False,
        return_alignment: bool = False,
        on_long: str = "split",
        window: int | None = None,
        generator: torch.Generator | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        stream: bool = False,
        **generation: Any,
    ) -> Any:
        """Translate texts.

        Every line of a text is translated by itself and line breaks stay where they are; blank lines and empty texts
        stay empty. Texts may be of any number and length: they are sorted by length, batched by tokens, and come
        back in their order.

        Args:
            texts: one text or a list, or what `encode` returned.
            src_lang: their language, one code or one for each text, where the model has several (`languages`).
            tgt_lang: the language to translate into, likewise; it comes before a `forced_bos_token_id`.
            return_scores: give `Translated` objects with the score: log-probability of the tokens, with beams divided
                by `length ** length_penalty`; that of a text of several lines is their sum.
            return_alignment: give `Translated` objects with the word alignment, read from the cross-attention while
                decoding.
            on_long: a line of more tokens than the model takes is cut at its sentence ends ("split") or is an "error".
            window: let the decoder see only so many of the last tokens that it wrote, which bounds its memory; None:
                all of them.
            generator: source of the draws with `do_sample=True`; torch's global one by default.
            batch_tokens: source tokens worked on at a time; 1024 on a CPU, 8192 elsewhere by default.
            progress: show a progress bar; None: for more than one batch, on a terminal.
            stream: return an iterator over pieces of the translation of one text, as they are decoded.
            **generation: generation arguments.

        Returns:
            A translation for one text, a list for a list; each is itself a list with `num_return_sequences` above 1.

        Raises:
            UsageError: no such language, a line that is too long, or an unknown generation argument.
        """
        settings = self.settings.updated(**generation).for_vocabulary(self.network.config.output_size)
        if isinstance(texts, EncodedSources):
            if src_lang is not None or on_long != "split" or batch_tokens is not None:
                raise UsageError(
                    "src_lang, on_long and batch_tokens belong to encode(): these texts are encoded already"
                )
            for batch in texts.batches:
                self._check_encoded("sources", batch.contexts, texts.origin)
            plan, ready = texts.plan, texts
        else:
            limit = self.network.config.max_positions
            plan, ready = plan_call(texts, self.codes, src_lang, tgt_lang, on_long, limit=limit), None
        later = tgt_lang if ready is not None else None
        targets = target_tokens(plan, self.codes, later, settings.forced_bos_token_id)
        recorder = translation_recorder(self, window=window, stream=stream)
        if stream:
            if return_scores or return_alignment:
                raise UsageError("stream=True gives text only: leave return_scores and return_alignment out")
            if not plan.is_single:
                raise UsageError("stream=True takes one text, not a list")
            if batch_tokens is not None or progress:
                raise UsageError("stream=True gives tokens as they come: leave batch_tokens and progress out")
            return self._stream(plan, ready, targets, settings, generator, window)
        side = self._target_side(settings, window, return_alignment, return_scores)
        side.recorder = recorder
        pieces: dict[int, list[Piece]] = {}
        self.peak_memory = None
        with evaluating(self.network):
            label = "Translating"
            if ready is None:
                batches = self._encoded(plan, batch_tokens, progress, label)
            else:
                batches = with_bar(ready.batches, plan, progress, label, len(ready.batches))
            for batch in batches:
                found = side.decode(plan.segments, batch, targets, generator)
                pieces.update(zip(batch.numbers, found, strict=True))
                self._note_memory(side.memory)
        if recorder is not None:
            recorder.finish()
        count = settings.num_return_sequences
        results = assemble(plan, pieces, count, with_scores=return_scores, with_alignment=return_alignment)
        return results[0] if plan.is_single else results

    def cache_bytes(
        self,
        source_length: int,
        target_length: int,
        *,
        batch_size: int = 1,
        num_beams: int = 1,
        window: int | None = None,
    ) -> MemoryUse:
        """Bytes that decoding takes beside the weights: it grows with `target_length` and beams, the context does not.

        This is what the keys and values of the tokens take. Storage for targets starts at 32 tokens and doubles when
        full, up to the longest that may be asked for, so a run's peak may be up to twice its part. With `compile` sizes
        are rounded up to buckets, and the sources are held twice.

        Args:
            source_length: tokens of a source, Ls.
            target_length: tokens of a translation so far.
            batch_size: sources at a time.
            num_beams: beams, or samples, of a source.
            window: as in `translate`.
        """
        config = self.network.config
        kv_heads = config.decoder_kv_heads or config.decoder_heads
        head_dim = config.embed_dim // config.decoder_heads
        per_token = 2 * config.decoder_layers * kv_heads * head_dim * self.dtype.itemsize
        kept = target_length if window is None else min(target_length, 2 * window)
        return MemoryUse(batch_size * source_length * per_token, batch_size * num_beams * kept * per_token)

    # The parts of a call.

    def _encoded(
        self, plan: Plan, batch_tokens: int | None, progress: bool | None, label: str
    ) -> Iterator[EncodedBatch]:
        budget = _BATCH_TOKENS.get(self.device.type, _BATCH_TOKENS_ELSEWHERE) if batch_tokens is None else batch_tokens
        if budget < 1:
            raise UsageError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        batches = list(token_batches([len(segment.ids) for segment in plan.segments], budget))
        encoded = (encode_batch(self.network, plan.segments, numbers) for numbers in batches)
        return with_bar(encoded, plan, progress, label, len(batches))

    def _target_side(self, settings: DecodeSettings, window: int | None, *extras: bool) -> TargetSide:
        return TargetSide(self.network, self.codes, settings, self.start_id, window, *extras, compiled=self.compiled)

    def _note_memory(self, use: MemoryUse) -> None:
        if self.peak_memory is None or use.total > self.peak_memory.total:
            self.peak_memory = use

    def _stream(
        self,
        plan: Plan,
        ready: EncodedSources | None,
        targets: list[int | None],
        settings: DecodeSettings,
        generator: torch.Generator | None,
        window: int | None,
    ) -> Iterator[str]:
        side = self._target_side(settings, window)
        side.check_streaming()
        return stream_document(side, plan, ready, targets, generator)


__all__ = ["MemoryUse", "Translated", "Translator"]
