"""Scores of a vision-language model on pictures with known texts, beside a baseline that sees no picture."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Optional

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextRecord, ImageTextSource, TextItem, read_records, read_texts
from mmattn.data.spec import DataConfig
from mmattn.data.stream_rows import sample_numbers
from mmattn.errors import ConfigError, UsageError
from mmattn.inference.pictures import Pictures
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.models.vlm import CaptioningNetwork, QuestionAnsweringNetwork
from mmattn.models.vlm.blip import is_blip

_SAME_SCORE = 1e-5  # nats per token: what rounding can make of equal texts
_TEXT_SAMPLE = 20_000  # training records whose texts make a tokenizer and the baseline


@dataclass
class EvalConfig:
    """What is scored, during training and by `mmattn eval`.

    Args:
        splits: Splits of the data: "validation", "test", "train"; scenes also have "heldout". The metrics are called
            `split/kind`.
        limit: Pictures of each split at most; None takes all.
        num_beams: Beams of the decoding; 1 is greedy.
        retrieval: Also how high the true caption ranks among all captions of the split.
        best: The metric that chooses the best checkpoint, such as "validation/answers"; None keeps no best.
    """

    splits: list[str] = field(default_factory=lambda: ["validation"])
    limit: Optional[int] = 300  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    num_beams: int = 1
    retrieval: bool = False
    best: Optional[str] = None  # noqa: UP045

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"evaluation.limit must be at least 1 or null, not {self.limit}")


def sample_items(source: ImageTextSource) -> list[TextItem]:
    """The texts of a source, or of its first 20,000 records when it has more; of a streamed one from all over it."""
    first = range(min(len(source), _TEXT_SAMPLE))
    by_record = read_texts(source, sample_numbers(source, _TEXT_SAMPLE, first))
    return [item for items in by_record for item in items]


def kind_label(record: ImageTextRecord, item: TextItem) -> str:
    """The text's kind; captions of scenes by their number of objects: "caption_1", "caption_2"."""
    scene = record.extra.get("scene")
    return f"caption_{len(scene.objects)}" if scene is not None and item.question is None else item.kind


class PictureBlindBaseline:
    """The best constant guess: the training set's most frequent answer to the question, or else to its kind.

    Args:
        items: texts of the training split.
    """

    def __init__(self, items: Iterable[TextItem]) -> None:
        by_question: dict[tuple[str, str | None], Counter[str]] = defaultdict(Counter)
        by_kind: dict[str, Counter[str]] = defaultdict(Counter)
        for item in items:
            by_kind[item.kind][item.text] += 1
            by_question[item.kind, item.question][item.text] += 1
        self._by_question = {key: counts.most_common(1)[0][0] for key, counts in by_question.items()}
        self._by_kind = {key: counts.most_common(1)[0][0] for key, counts in by_kind.items()}

    def guess(self, item: TextItem) -> str:
        """What to say without looking."""
        return self._by_question.get((item.kind, item.question), self._by_kind.get(item.kind, ""))


@dataclass
class KindScore:
    """How often the model and the baseline say exactly what is right."""

    num_right: int = 0
    num_baseline_right: int = 0
    count: int = 0

    @property
    def accuracy(self) -> float:
        """Share of the texts that the model gets exactly right."""
        return self.num_right / self.count

    @property
    def baseline(self) -> float:
        """Share of the texts that the picture-blind baseline gets exactly right."""
        return self.num_baseline_right / self.count


def score_texts(
    vlm: VisionLanguageModel,
    source: ImageTextSource,
    baseline: PictureBlindBaseline,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    num_beams: int = 1,
    prompt: str = "",
) -> dict[str, KindScore]:
    """Caption and ask about every picture of a source, and compare exactly (case and outer spaces aside).

    Args:
        vlm: the model.
        source: pictures with their true texts.
        baseline: made from the training split.
        limit: use only the first so many pictures.
        batch_size: pictures at a time.
        num_beams: beams of the decoding.
        prompt: what the model has learned to begin captions with; it is not compared.

    Returns:
        A score for each kind of text; a picture with several captions counts once per kind, right when the caption
        given is any of its own.
    """
    count = len(source) if limit is None else min(limit, len(source))
    scores: dict[str, KindScore] = defaultdict(KindScore)
    for first in range(0, count, batch_size):
        records = read_records(source, range(first, min(first + batch_size, count)))
        pictures = vlm.encode([record.image for record in records], batch_size=batch_size, progress=False)
        _score_captions(vlm, pictures, records, baseline, scores, num_beams, prompt)
        _score_answers(vlm, pictures, records, baseline, scores, num_beams)
    return dict(scores)


def _score_captions(
    vlm: VisionLanguageModel,
    pictures: Pictures,
    records: Sequence[ImageTextRecord],
    baseline: PictureBlindBaseline,
    scores: dict[str, KindScore],
    num_beams: int,
    prompt: str,
) -> None:
    with_caption = [i for i, record in enumerate(records) if any(item.question is None for item in record.texts)]
    if not with_caption or not isinstance(vlm.network, CaptioningNetwork):
        return
    captions = vlm.caption(
        pictures[with_caption], prompt or None, num_beams=num_beams, batch_size=len(with_caption), progress=False
    )
    given = _normal(str(vlm.tokenizer.decode(prompt_ids(vlm, prompt), skip_special_tokens=True)))
    for index, caption in zip(with_caption, captions, strict=True):
        record = records[index]
        kinds: dict[str, list[TextItem]] = defaultdict(list)
        for item in record.texts:
            if item.question is None:
                kinds[kind_label(record, item)].append(item)
        for kind, items in kinds.items():
            truths = {_normal(item.text) for item in items}
            _count(
                scores[kind],
                _normal(_normal(caption).removeprefix(given)) in truths,
                _normal(baseline.guess(items[0])) in truths,
            )


def _score_answers(
    vlm: VisionLanguageModel,
    pictures: Pictures,
    records: Sequence[ImageTextRecord],
    baseline: PictureBlindBaseline,
    scores: dict[str, KindScore],
    num_beams: int,
) -> None:
    asked = [[item for item in record.texts if item.question is not None] for record in records]
    if not any(asked) or not can_answer(vlm):
        return
    questions = [[item.question or "" for item in items] for items in asked]
    answers = vlm.ask(pictures, questions, num_beams=num_beams, batch_size=len(records), progress=False)
    for record, items, given in zip(records, asked, answers, strict=True):
        for item, answer in zip(items, given, strict=True):
            truth = _normal(item.text)
            score = scores[kind_label(record, item)]
            _count(score, _normal(answer) == truth, _normal(baseline.guess(item)) == truth)


def _count(score: KindScore, is_right: bool, is_baseline_right: bool) -> None:
    score.count += 1
    score.num_right += is_right
    score.num_baseline_right += is_baseline_right


def prompt_ids(vlm: VisionLanguageModel, prompt: str) -> list[int]:
    """The tokens of what stands before captions."""
    return list(vlm.tokenizer(prompt, add_special_tokens=False).input_ids) if prompt else []


def _normal(text: str) -> str:
    return text.strip().lower()


def summary(scores: dict[str, KindScore], prefix: str = "") -> dict[str, float]:
    """Accuracies and baselines as flat numbers: one per kind, and "answers" over all questions together."""
    flat: dict[str, float] = {}
    answers = [score for kind, score in scores.items() if not kind.startswith("caption")]
    groups = dict(sorted(scores.items()))
    if answers:
        total = KindScore(*(sum(getattr(s, f) for s in answers) for f in ("num_right", "num_baseline_right", "count")))
        groups["answers"] = total
    for kind, score in groups.items():
        flat[f"{prefix}{kind}"] = score.accuracy
        flat[f"{prefix}{kind}/blind"] = score.baseline
    return flat


def score_splits(
    vlm: VisionLanguageModel,
    data: DataConfig,
    settings: EvalConfig,
    baseline: PictureBlindBaseline,
    prompt: str = "",
) -> dict[str, float]:
    """Scores of every split of `settings`, named `split/kind`; `split/kind/blind` is the baseline's.

    Captions begin with `prompt`, which is not scored.
    """
    flat: dict[str, float] = {}
    for split in settings.splits:
        source = open_image_text(data, split)
        scores = score_texts(vlm, source, baseline, limit=settings.limit, num_beams=settings.num_beams, prompt=prompt)
        flat |= summary(scores, f"{split}/")
        if settings.retrieval:
            ranks = retrieval(vlm, source, limit=settings.limit, prompt=prompt)
            flat |= {f"{split}/{name}": value for name, value in ranks.items()}
    return flat


def can_answer(vlm: VisionLanguageModel) -> bool:
    """Whether `vlm.ask` works on this model: BLIP has a network of its own for it, ours answer and caption alike."""
    config = vlm.network.config
    return isinstance(vlm.network, QuestionAnsweringNetwork) or (
        config.sep_token_id is not None and not is_blip(config)
    )


def retrieval(
    vlm: VisionLanguageModel,
    source: ImageTextSource,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    prompt: str = "",
) -> dict[str, float]:
    """How high the true caption ranks among all captions of the set, by how much more likely the picture makes it.

    A caption's score is its log-likelihood per token under the picture, less that under a blank (mid-grey) picture: a
    caption that is likely anyway says nothing about a picture. Captions with equal scores share their ranks, as if put
    in a random order, so that a model that cannot tell them apart gains nothing.

    Args:
        vlm: a captioning model.
        source: pictures; the first caption of each counts. One without captions is left out, and so is one that cannot
            be read, in whose place another picture comes.
        limit: use only the first so many pictures.
        batch_size: pictures at a time.
        prompt: what the model has learned to begin captions with; it is not scored.

    Returns:
        `recall_at_1`, `recall_at_5` (share of pictures) and, as `/blind`, what a random order gives; nothing where no
        picture has a caption.
    """
    count = len(source) if limit is None else min(limit, len(source))
    firsts = enumerate(map(_first_caption, read_texts(source, range(count))))
    captions = {number: caption for number, caption in firsts if caption is not None}
    texts, numbers = sorted(set(captions.values())), list(captions)
    if not texts:
        return {}
    hits, num_scored = {1: 0.0, 5: 0.0}, 0
    blank = np.full((32, 32, 3), 128, dtype=np.uint8)
    unconditional = caption_likelihoods(vlm, vlm.encode([blank], progress=False), texts, prompt=prompt)
    for first in range(0, len(numbers), batch_size):
        batch = numbers[first : first + batch_size]
        read = zip(read_records(source, batch), [captions[number] for number in batch], strict=True)
        pairs = [(record.image, truth) for record, truth in read if _first_caption(record.texts) == truth]
        if not pairs:
            continue
        pictures = vlm.encode([image for image, _ in pairs], progress=False)
        scores = caption_likelihoods(vlm, pictures, texts, prompt=prompt) - unconditional
        num_scored += len(pairs)
        for row, (_, truth) in zip(scores, pairs, strict=True):
            for k in hits:
                hits[k] += hit_chance(row, texts.index(truth), k)
    flat: dict[str, float] = {}
    for k, number in hits.items():
        flat[f"recall_at_{k}"] = number / max(1, num_scored)
        flat[f"recall_at_{k}/blind"] = min(1.0, k / len(texts))
    return flat


def _first_caption(items: Iterable[TextItem]) -> str | None:
    return next((item.text for item in items if item.question is None), None)


def hit_chance(scores: torch.Tensor, truth: int, k: int) -> float:
    """Chance that entry `truth` is among the k highest of `scores` [T], equal scores in random order."""
    if not scores[truth].isfinite():
        return 0.0
    gap = scores - scores[truth]
    is_equal = gap.abs() <= _SAME_SCORE
    higher, equal = int((gap > _SAME_SCORE).sum()), int(is_equal.sum())
    return min(1.0, max(0, k - higher) / equal)


@torch.inference_mode()
def caption_likelihoods(
    vlm: VisionLanguageModel, pictures: Pictures, texts: Sequence[str], *, chunk: int = 64, prompt: str = ""
) -> torch.Tensor:
    """Mean log-likelihood per token of every text under every picture, float32 `[P, T]`; pictures are not copied.

    Of a text that is longer than the model has positions, its start is scored; `prompt` stands before each and is not.
    """
    network = vlm.network
    if not isinstance(network, CaptioningNetwork):
        raise UsageError(f"{type(network).__name__} has no likelihood of a caption: use a captioning checkpoint")
    config, parts, given = network.config, [], prompt_ids(vlm, prompt)
    for first in range(0, len(texts), chunk):
        rows = [
            [
                config.bos_token_id,
                *given,
                *vlm.tokenizer(text, add_special_tokens=False).input_ids,
                config.stop_token_id,
            ]
            for text in texts[first : first + chunk]
        ]
        rows = [row[: config.text.max_positions] for row in rows]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=config.pad_token_id)
        ids = ids.to(vlm.device).repeat(len(pictures), 1)
        lengths = torch.tensor([len(row) for row in rows], device=vlm.device).repeat(len(pictures))
        logits = network.decoder.logits(network.decoder(ids, pictures.contexts))[:, :-1]
        logs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        places = torch.arange(1, ids.shape[1], device=vlm.device)
        is_scored = (places < lengths[:, None]) & (places > len(given))
        means = logs.masked_fill(~is_scored, 0.0).sum(1) / (lengths - 1 - len(given))
        parts.append(means.reshape(len(pictures), len(rows)).cpu())
    return torch.cat(parts, dim=1)
