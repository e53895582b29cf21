"""Scores of a translator on pairs with known translations, beside copying the source and a translation memory."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmattn._optional import require
from mmattn.data.parallel import open_parallel
from mmattn.data.parallel_spec import ParallelConfig
from mmattn.data.sentence_pairs import ParallelSource, SentencePair, read_pairs, spread
from mmattn.data.stream_rows import sample_numbers
from mmattn.data.translation_tokens import PairTokenizer
from mmattn.errors import ConfigError, UsageError
from mmattn.inference.alignment_scores import alignment_scores
from mmattn.inference.files import check_new_file, new_file
from mmattn.inference.line_translation import no_room
from mmattn.inference.nearest_sentence import TranslationMemory
from mmattn.inference.translator import Translator

_PAIR_SAMPLE = 40_000  # training pairs that make a tokenizer and the translation memory


@dataclass
class EvalConfig:
    """What is scored, during training and by `mmattn eval`.

    Args:
        splits: Splits of the data: "validation", "test", "train"; scenes also have "heldout". The metrics are called
            `split/exact`, `split/chrf`, ...
        limit: Pairs of each split at most, evenly spread; None takes all.
        num_beams: Beams of the decoding, 1 is greedy. None: as the model's generation settings say.
        max_new_tokens: Longest translation in tokens. None: as the model's generation settings say.
        batch_tokens: Source tokens translated at a time. None: 1024 on a CPU, 8192 elsewhere.
        quantize: For `mmattn eval`, not in training: "int8" scores with weights of 8 bits (CPU only). None: with the
            model's own.
        bleu_tokenize: sacreBLEU's tokenizer, such as "13a", "zh" or "flores200"; None for its default.
        best: The metric that chooses the best checkpoint, such as "validation/chrf"; None keeps no best.
    """

    splits: list[str] = field(default_factory=lambda: ["validation"])
    limit: int | None = 1000
    num_beams: int | None = 1
    max_new_tokens: int | None = None
    batch_tokens: int | None = None
    quantize: str | None = None
    bleu_tokenize: str | None = None
    best: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "num_beams", "max_new_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluation.{name} must be at least 1 or null, not {value}")

    @property
    def generation(self) -> dict[str, Any]:
        """The generation arguments that are set."""
        return {name: value for name in ("num_beams", "max_new_tokens") if (value := getattr(self, name)) is not None}


def require_scorable(translator: Translator, data: ParallelConfig, settings: EvalConfig) -> None:
    """Find what would end an evaluation, before the training that it would end.

    Raises:
        ConfigError: longer translations are asked for than the model has room for.
        DataError: a split that is not there.
        UsageError: no such tokenizer of BLEU, more beams than the model's vocabulary allows.
        OptionalPackageError: sacrebleu is not installed.
    """
    TextScores(settings.bleu_tokenize)
    config = translator.network.config
    longest = translator.settings.updated(**settings.generation).for_vocabulary(config.output_size).total_length(1)
    if longest > config.max_positions:
        raise ConfigError(
            f"translations of up to {longest:,} tokens are to be scored, their start counted, more than the model's "
            f"{config.max_positions:,} positions: set evaluation.max_new_tokens to {config.max_positions - 1} or less"
        )
    for split in settings.splits:
        open_parallel(data, split)


def sample_pairs(source: ParallelSource) -> list[SentencePair]:
    """The pairs of a source, or 40,000 evenly spread ones when it has more; of a streamed one runs of pairs."""
    return read_pairs(source, sample_numbers(source, _PAIR_SAMPLE, spread(len(source), _PAIR_SAMPLE)))


@dataclass(frozen=True)
class Translations:
    """Pairs as a model translates them.

    Attributes:
        pairs: what was translated.
        texts: a translation for each; empty where the model has no room for the source.
        num_tokens: tokens of the translations as the tokenizer spells them, end tokens counted.
        seconds: how long it took.
        num_too_long: pairs without room.
    """

    pairs: list[SentencePair]
    texts: list[str]
    num_tokens: int
    seconds: float
    num_too_long: int = 0


def translate_pairs(
    translator: Translator, pairs: Sequence[SentencePair], settings: EvalConfig, tokenizer: PairTokenizer
) -> Translations:
    """Translate the pairs' sources, each in its languages.

    Raises:
        DataError: a language that the model does not know.
    """
    limit = translator.network.config.max_positions
    lengths = [row.lengths[0] for row in tokenizer(pairs)]
    groups: dict[tuple[str | None, str | None], list[int]] = defaultdict(list)
    num_too_long = 0
    for place, pair in enumerate(map(tokenizer.with_codes, pairs)):
        if lengths[place] > limit and no_room(translator, pair.source, pair.src_lang, pair.tgt_lang):
            num_too_long += 1
        else:
            groups[pair.src_lang, pair.tgt_lang].append(place)
    texts = [""] * len(pairs)
    started = time.perf_counter()
    for (src_lang, tgt_lang), places in groups.items():
        found = translator.translate(
            [pairs[place].source for place in places],
            src_lang=src_lang,
            tgt_lang=tgt_lang,
            batch_tokens=settings.batch_tokens,
            progress=False,
            **settings.generation,
        )
        for place, text in zip(places, found, strict=True):
            texts[place] = text
    seconds = time.perf_counter() - started
    written = [dataclasses.replace(pair, target=text) for pair, text in zip(pairs, texts, strict=True)]
    num_tokens = sum(len(row.target) for row in tokenizer(written))
    return Translations(list(pairs), texts, num_tokens, seconds, num_too_long)


class TextScores:
    """Exact match, BLEU (arXiv 1804.08771) and chrF (W15-3049) of translations.

    Args:
        bleu_tokenize: see `EvalConfig`.

    Attributes:
        signatures: what sacreBLEU says of how it computed `bleu` and `chrf`; empty before the first score.

    Raises:
        UsageError: no such tokenizer of BLEU.
        OptionalPackageError: sacrebleu is not installed.
    """

    def __init__(self, bleu_tokenize: str | None = None) -> None:
        sacrebleu = require("sacrebleu", "scoring translations")
        known = sacrebleu.BLEU.TOKENIZERS
        if bleu_tokenize is not None and bleu_tokenize not in known:
            raise UsageError(f"evaluation.bleu_tokenize={bleu_tokenize!r} is unknown: use one of {', '.join(known)}")
        self._metrics = {"bleu": sacrebleu.BLEU(tokenize=bleu_tokenize), "chrf": sacrebleu.CHRF()}
        self.signatures: dict[str, str] = {}

    def __call__(self, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """`exact` (a share; outer spaces aside), `bleu` and `chrf` (0 to 100) of texts."""
        is_right = [_is_exact(text, reference) for text, reference in zip(texts, references, strict=True)]
        scores = {"exact": sum(is_right) / len(is_right)}
        for name, metric in self._metrics.items():
            scores[name] = metric.corpus_score(list(texts), [list(references)]).score
            self.signatures[f"{name}/signature"] = str(metric.get_signature())
        return scores


def by_languages(found: Translations, score: TextScores) -> dict[str, float]:
    """Scores over all pairs, and `SRC-TGT/score` where there are several pairs of languages."""
    flat = _scored(score, found.texts, found.pairs)
    groups = _grouped(found.pairs, lambda pair: f"{pair.src_lang}-{pair.tgt_lang}")
    for languages, places in groups.items() if len(groups) > 1 else ():
        scores = _scored(score, [found.texts[p] for p in places], [found.pairs[p] for p in places])
        flat |= {f"{languages}/{name}": value for name, value in scores.items()}
    return flat


def exact_by_kind(found: Translations) -> dict[str, float]:
    """`exact/KIND` where the pairs are of several kinds."""
    is_right = [_is_exact(text, pair.target) for text, pair in zip(found.texts, found.pairs, strict=True)]
    groups = _grouped(found.pairs, lambda pair: pair.kind)
    if len(groups) < 2:
        return {}
    return {f"exact/{kind}": sum(is_right[place] for place in places) / len(places) for kind, places in groups.items()}


def _is_exact(text: str, reference: str) -> bool:
    return text.strip() == reference.strip()


def _grouped(pairs: Sequence[SentencePair], key: Callable[[SentencePair], str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        groups[key(pair)].append(place)
    return dict(sorted(groups.items()))


def _scored(score: TextScores, texts: Sequence[str], pairs: Sequence[SentencePair]) -> dict[str, float]:
    return score(texts, [pair.target for pair in pairs])


def score_splits(
    translator: Translator, data: ParallelConfig, settings: EvalConfig
) -> tuple[dict[str, float], dict[str, Translations]]:
    """Scores of every split of `settings`, named `split/score`, and the translations.

    Word alignments are scored on the true translation, where the data has gold ones: `split/alignment/f1`. A source
    that the model has no room for counts as translated by nothing, and is counted in `split/too_long`.
    """
    score = TextScores(settings.bleu_tokenize)
    tokenizer = PairTokenizer(translator.tokenizer, language_codes=data.language_codes)
    flat: dict[str, float] = {}
    found: dict[str, Translations] = {}
    for split in settings.splits:
        source = open_parallel(data, split)
        pairs = read_pairs(source, spread(len(source), settings.limit).tolist())
        found[split] = translate_pairs(translator, pairs, settings, tokenizer)
        scores = by_languages(found[split], score) | alignment_scores(translator.network, tokenizer, pairs)
        if found[split].num_too_long:
            scores["too_long"] = float(found[split].num_too_long)
        flat |= {f"{split}/{name}": value for name, value in scores.items()}
    return flat, found


def full_report(
    translator: Translator, data: ParallelConfig, settings: EvalConfig, *, hypotheses: Path | None = None
) -> dict[str, Any]:
    """What `mmattn eval` prints: scores, speed, baselines, and how sacreBLEU computed.

    Args:
        translator: opened for inference.
        data: where the splits and the training pairs come from.
        settings: what is scored.
        hypotheses: a JSONL file for the translations beside their references, which must not exist.

    Returns:
        The scores of `score_splits`; `split/exact/KIND`; `split/tokens_per_s` and `split/sentences_per_s`; those of
        two baselines, `split/copy/...` (the source as it is) and `split/memory/...` (the translation of the training
        sentence that is nearest to the source); `bleu/signature` and `chrf/signature`.

    Raises:
        UsageError: `hypotheses` exists, or its folder does not.
    """
    if hypotheses is not None:
        check_new_file(hypotheses)
    score = TextScores(settings.bleu_tokenize)
    scores, found = score_splits(translator, data, settings)
    report: dict[str, Any] = dict(scores)
    memory = TranslationMemory(sample_pairs(open_parallel(data, "train")))
    for split, one in found.items():
        report |= {f"{split}/{name}": value for name, value in exact_by_kind(one).items()}
        report[f"{split}/tokens_per_s"] = one.num_tokens / one.seconds
        report[f"{split}/sentences_per_s"] = len(one.texts) / one.seconds
        baselines = {"copy": [pair.source for pair in one.pairs], "memory": memory.translate(one.pairs)}
        for name, texts in baselines.items():
            report |= {f"{split}/{name}/{key}": value for key, value in _scored(score, texts, one.pairs).items()}
    if hypotheses is not None:
        write_hypotheses(hypotheses, found)
    return report | score.signatures


def write_hypotheses(path: Path, found: Mapping[str, Translations]) -> None:
    """Write translations beside their references: a JSON object a line. The file is complete or not there.

    Raises:
        RunError: the disk refuses.
    """
    with new_file(path) as file:
        file.writelines(line.encode() for line in _hypothesis_lines(found))


def _hypothesis_lines(found: Mapping[str, Translations]) -> Iterable[str]:
    for split, one in found.items():
        for pair, text in zip(one.pairs, one.texts, strict=True):
            values = {"split": split, "id": pair.id, "kind": pair.kind, "source": pair.source}
            yield json.dumps({**values, "reference": pair.target, "hypothesis": text}, ensure_ascii=False) + "\n"
