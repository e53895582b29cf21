"""A translator ready to be trained: opened or new, with its tokenizer, its training pairs, and its LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmattn.data.sentence_pairs import ParallelSource, SentencePair
from mmattn.data.stream_pairs import StreamedPairs
from mmattn.data.translation_collate import TranslationCollator
from mmattn.data.translation_tokenizer import train_marian_tokenizer
from mmattn.data.translation_tokens import PairTokenizer, drop_too_long, token_lengths
from mmattn.errors import ConfigError, DataError, UsageError
from mmattn.inference import folders, trained
from mmattn.inference.streamed_pairs import streamed_training
from mmattn.inference.translator import Translator
from mmattn.inference.translator_checks import generation_defaults
from mmattn.models.sources import find_folder
from mmattn.models.translator import (
    TranslatorConfig,
    TranslatorNetwork,
    cross_attention_parameters,
    family_of,
    open_network,
)
from mmattn.models.translator.stock import weight_table
from mmattn.nn.kv_heads import KVHeadSource, convert_kv_heads
from mmattn.training.selection import LoRAConfig, lora_config, merged_copy

_NEW_MODEL_BEAMS = 4  # what OPUS-MT's checkpoints decode with


@dataclass
class KVHeadsConfig:
    """Fewer key/value heads for a checkpoint, before it is trained further (arXiv 2305.13245).

    Args:
        encoder: Key/value heads of every attention of the encoder, a divisor of its heads. None: as they are.
        decoder: The same of the decoder, self- and cross-attention. Only these are cached while translating.
        how: What a head is made from: the "mean" of the heads that it replaces, the "first" of them, "random", or by
            "svd" what is nearest to them (queries and outputs change as well).
    """

    encoder: int | None = None
    decoder: int | None = None
    how: str = "mean"


@dataclass
class ModelConfig:
    """The model: a checkpoint to start from, or the form of a new one.

    Args:
        from_pretrained: Hub id, a model's folder or a training run's. None makes a new model; beside
            it, `network` may not contradict the checkpoint, which has a tokenizer of its own.
        revision: Branch, tag or commit on the hub.
        kv_heads: Only beside `from_pretrained`.
        alignment_layer: The decoder layer whose cross-attention says which source word a target word comes from, and
            that guided alignment teaches, counted from 0. None: what the checkpoint or `network` has.
        alignment_heads: The heads of that layer that say it, counted from 0. None: as for the layer.
        tokenizer: Of a new model, trained on its texts: "word" for small closed vocabularies, "bpe" or "unigram" for
            natural text.
        max_vocab_size: Of a new model: upper bound of that tokenizer's vocabulary, for both sides together.
        byte_fallback: Of a new model: whether that tokenizer spells unknown characters in bytes ("bpe" and "unigram").
        languages: Of a new model: target languages, as the tokenizer shall call them; empty for those of the training
            pairs. Several make tokens such as >>de<< that start the source.
        network: Only for a new model.
    """

    from_pretrained: str | None = None
    revision: str | None = None
    kv_heads: KVHeadsConfig = field(default_factory=KVHeadsConfig)
    alignment_layer: int | None = None
    alignment_heads: list[int] | None = None
    tokenizer: str = "unigram"
    max_vocab_size: int = 8000
    byte_fallback: bool = True
    languages: list[str] = field(default_factory=list)
    network: TranslatorConfig = field(default_factory=TranslatorConfig)


@dataclass
class ExampleConfig:
    """How sentence pairs become training examples, and what is asked of them.

    Args:
        max_source_length: Tokens of a source at most, special tokens included. None: as many as the model has
            positions.
        max_target_length: The same of a target.
        refuse_long: Whether longer pairs are an error; else they are left out and counted.
        label_smoothing: Part of the probability that the loss spreads over all tokens, for new models and checkpoints
            alike; 0.1 is usual.
        guided_alignment_weight: Weight of the loss that teaches the cross-attention the data's word alignments
            (arXiv 1909.02074, where it is 0.05); 0 for none.
        score_language: Whether the language token that starts an M2M100 or NLLB target is learned too; it is given when
            translating.
        packing: Whether batches have no padding, all sentences one after the other: true, false, or "auto", which packs
            but for guided alignment, which reads padded batches. The loss is the same but for rounding.
    """

    max_source_length: int | None = None
    max_target_length: int | None = None
    refuse_long: bool = False
    label_smoothing: float = 0.0
    guided_alignment_weight: float = 0.0
    score_language: bool = False
    packing: bool | str = "auto"

    def __post_init__(self) -> None:
        if self.packing not in (True, False, "auto"):
            raise ConfigError(f"examples.packing must be true, false or auto, not {self.packing!r}")
        if self.packing is True and self.guided_alignment_weight:
            raise ConfigError(
                "examples.packing=true: guided alignment reads padded batches: set packing to auto or false, or "
                "guided_alignment_weight to 0"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"examples.label_smoothing must be at least 0 and below 1, not {self.label_smoothing}")
        if self.guided_alignment_weight < 0:
            raise ConfigError(
                f"examples.guided_alignment_weight must not be negative, is {self.guided_alignment_weight}"
            )

    @property
    def is_packed(self) -> bool:
        """Whether batches are packed."""
        return not self.guided_alignment_weight if self.packing == "auto" else bool(self.packing)


def make_translator(
    config: ModelConfig, examples: ExampleConfig, pairs: Sequence[SentencePair], language_codes: Mapping[str, str]
) -> Translator:
    """Open the checkpoint that is to be trained, or make a new model.

    Args:
        config: The model.
        examples: What the losses shall be.
        pairs: Of the training split; a new model's tokenizer is made from them.
        language_codes: What the tokenizer calls a language, where the pairs call it otherwise.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ConfigError: settings that do not fit together.
    """
    trained.require_source(config, ["revision"])
    if config.from_pretrained is not None:
        trained.warn_of_unused(config, ("tokenizer", "max_vocab_size", "byte_fallback", "languages"))
        translator = _open_translator(config.from_pretrained, config.revision)
        trained.check_form(config.network, translator.network.config, config.from_pretrained)
        _reduce_kv_heads(translator.network, config.kv_heads)
    elif (config.kv_heads.encoder, config.kv_heads.decoder) != (None, None):
        raise ConfigError(
            "model.kv_heads reduces those of model.from_pretrained: a new model's are model.network.decoder_kv_heads"
        )
    else:
        translator = _new_translator(config, pairs, language_codes)
    _set_losses(translator.network.config, config, examples)
    _keep_zero_start(translator.network)
    return translator


def _open_translator(name: str, revision: str | None) -> Translator:
    """As `Translator.from_pretrained`, in float32 and without what is done there for inference."""
    folder = find_folder(trained.model_source(name), revision=revision)
    network = open_network(folder)
    tokenizer = folders.open_tokenizer(folder, is_stock=True, has_stock_config=family_of(network.config) is not None)
    return Translator(network, tokenizer, generation_defaults(folder, network.config))


def _new_translator(config: ModelConfig, pairs: Sequence[SentencePair], codes: Mapping[str, str]) -> Translator:
    form = config.network
    if form.target_vocab_size is not None:
        raise ConfigError("model.network.target_vocab_size: a new model has one vocabulary, leave it out")
    if form.label_smoothing:
        raise ConfigError("model.network.label_smoothing: set examples.label_smoothing, which is for every model")
    sources, targets = (
        sorted({codes.get(name, name) for pair in pairs if (name := getattr(pair, side)) is not None})
        for side in ("src_lang", "tgt_lang")
    )
    languages = config.languages or targets
    tokenizer = train_marian_tokenizer(
        (text for pair in pairs for text in (pair.source, pair.target)),
        config.tokenizer,
        config.max_vocab_size,
        languages=languages if len(languages) > 1 else (),
        byte_fallback=config.byte_fallback,
        source_lang=sources[0] if len(sources) == 1 else None,
        target_lang=languages[0] if len(languages) == 1 else None,
    )
    pad, eos = cast(int, tokenizer.pad_token_id), cast(int, tokenizer.eos_token_id)
    special = {"pad_token_id": pad, "eos_token_id": eos, "decoder_start_token_id": pad}
    size = max(tokenizer.get_vocab().values()) + 1
    network = TranslatorNetwork(dataclasses.replace(form, vocab_size=size, **special))
    generation = {  # as OPUS-MT's; the padding starts the decoder and is never written
        "bad_words_ids": [[pad]],
        "bos_token_id": eos,
        "forced_eos_token_id": eos,
        "max_length": form.max_positions,
        "num_beams": _NEW_MODEL_BEAMS,
        "renormalize_logits": True,
    }
    return Translator(network, tokenizer, generation)


def _reduce_kv_heads(network: TranslatorNetwork, heads: KVHeadsConfig) -> None:
    for side in ("encoder", "decoder"):
        number = getattr(heads, side)
        if number is None:
            continue
        try:
            convert_kv_heads(getattr(network, side), number, how=cast(KVHeadSource, heads.how))
        except UsageError as error:
            raise ConfigError(f"model.kv_heads: {error}") from error
        setattr(network.config, f"{side}_kv_heads", number)


def _set_losses(network: TranslatorConfig, model: ModelConfig, examples: ExampleConfig) -> None:
    """Label smoothing, and the layer and heads of alignments: those that are taught are those that are read."""
    network.label_smoothing = examples.label_smoothing
    for name in ("alignment_layer", "alignment_heads"):
        if getattr(model, name) is not None:
            setattr(network, name, getattr(model, name))
    if examples.guided_alignment_weight:
        network.alignment_layer = network.chosen_alignment_layer
        # One head, as in the paper: the others stay free to look elsewhere.
        network.alignment_heads = network.alignment_heads or [0]
    network.validate()


def _keep_zero_start(network: TranslatorNetwork) -> None:
    """Hold the vector that a Marian decoder starts from, the padding's, at zero: CTranslate2 takes it for granted.

    The embedding gives it no gradient, but the vocabulary head that shares the table does.
    """
    config = network.config
    if config.decoder_start_token_id == config.pad_token_id and not network.decoder.words[config.pad_token_id].any():
        network.decoder.head.fixed_token = config.pad_token_id


@dataclass(frozen=True)
class TrainingPairs:
    """What a translator is trained on.

    Attributes:
        source: the pairs that it has room for.
        lengths: int [N, 2], tokens of both sides; None for streamed pairs that are not measured.
        num_left_out: pairs that are too long; of streamed pairs all that are left out.
        num_aligned: pairs with word alignments.
        collate: makes batches of them.
    """

    source: ParallelSource
    lengths: Any
    num_left_out: int
    num_aligned: int
    collate: TranslationCollator


def training_pairs(
    translator: Translator,
    source: ParallelSource,
    examples: ExampleConfig,
    language_codes: Mapping[str, str],
    *,
    by_tokens: bool = True,
) -> TrainingPairs:
    """Measure a source for a translator, and leave out what is too long.

    Args:
        translator: what is trained.
        source: the pairs; streamed ones are measured only where it is needed.
        examples: how they become examples.
        language_codes: what the tokenizer calls a language, where the pairs call it otherwise.
        by_tokens: whether batches are made by tokens.

    Raises:
        DataError: pairs that are too long where they are refused, languages that do not fit, or no alignments though
            they are to be learned.
    """
    config = translator.network.config
    tokenizer = PairTokenizer(translator.tokenizer, language_codes=language_codes)
    asked = {name: getattr(examples, name) for name in ("max_source_length", "max_target_length")}
    limits: Any = {
        name: config.max_positions if length is None else min(length, config.max_positions)
        for name, length in asked.items()
    }
    is_guided = examples.guided_alignment_weight > 0
    if isinstance(source, StreamedPairs):
        streamed = streamed_training(source, tokenizer, by_tokens=by_tokens, refuse=examples.refuse_long, **limits)
        kept, lengths, num_left_out, num_aligned = streamed
    else:
        measured = token_lengths(source, tokenizer)
        num_aligned = measured.num_aligned
        kept, lengths, num_left_out = drop_too_long(source, measured, **limits, refuse=examples.refuse_long)
    if is_guided and not num_aligned:
        raise DataError(
            f"examples.guided_alignment_weight={examples.guided_alignment_weight} needs word alignments, and "
            f"{source.name} has none: name their column (data.columns.alignment), or set the weight to 0"
        )
    collate = TranslationCollator(
        tokenizer,
        **limits,
        decoder_start_id=config.decoder_start_token_id,
        pad_id=config.pad_token_id,
        with_alignment=is_guided,
        score_language=examples.score_language,
        packed=examples.is_packed,
    )
    return TrainingPairs(kept, lengths, num_left_out, num_aligned, collate)


def preview_pairs(pairs: TrainingPairs, count: int = 3) -> list[str]:
    """The first pairs and their lengths, a line each."""
    lines = []
    for number in range(min(count, len(pairs.source))):
        pair = pairs.source[number]
        source, target = pairs.collate.pair_tokenizer([pair])[0].lengths
        lines.append(f"{pair.id}: {pair.source!r} -> {pair.target!r} ({source} and {target} tokens)")
    return lines


def choose_trained(network: TranslatorNetwork, what: str, lora: LoRAConfig) -> None:
    """Freeze what is not to be trained.

    Args:
        network: the network, changed in place.
        what: one of `trained.TRAIN_WHAT`.
        lora: used for "lora".

    Raises:
        ConfigError: nothing is left to train.
    """
    trained.choose_trained(
        network,
        what,
        lora,
        cross_attention=cross_attention_parameters(network),
        stock_names=_adaptable_names(network),
        refusal="cannot hold an adapter: name Linears, such as q_proj, v_proj, up_proj, down_proj",
    )


def save_trained(translator: Translator, folder: Path) -> None:
    """Save a trained model; one with LoRA merged, with the adapter beside it in `adapter/` (PEFT's format)."""
    network = translator.network
    if lora_config(network) is None:
        translator.save_pretrained(folder)
        return
    merged = Translator(merged_copy(network), translator.tokenizer, translator.generation_config)
    merged.save_pretrained(folder)
    trained.save_adapter(network, folder / "adapter", _adaptable_names(network))


def _adaptable_names(network: TranslatorNetwork) -> dict[str, str]:
    """Our module names to those of the checkpoint's own format, the table of tokens left out: both sides read it."""
    if family_of(network.config) is None:
        names = {name: name for name, _ in network.named_modules()}
    else:
        names = trained.stock_module_names(weight_table(network.config))
    return {ours: stock for ours, stock in names.items() if not ours.endswith("embedding.words")}
