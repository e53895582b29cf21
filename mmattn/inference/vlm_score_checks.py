"""What would end an evaluation of a vision-language model, found before the training that it would end."""

from __future__ import annotations

from collections.abc import Iterator

from mmattn.data.counted import counted
from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextSource, read_texts
from mmattn.data.spec import DataConfig
from mmattn.errors import ConfigError
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.inference.vlm_scores import EvalConfig, can_answer

_READ_AT_ONCE = 1000


def require_scorable(vlm: VisionLanguageModel, data: DataConfig, settings: EvalConfig, prompt: str) -> None:
    """Find it: every split is opened, and its questions are measured.

    Raises:
        ConfigError: a question, or the captions' prompt, that leaves no room for what the model is to say.
        DataError: a split that is not there.
        UsageError: more beams than the model's vocabulary allows.
    """
    sources = [open_image_text(data, split) for split in settings.splits]
    decode = vlm.settings.updated(num_beams=settings.num_beams).for_vocabulary(vlm.network.config.vocab_size)
    most = vlm.network.config.text.max_positions
    for source in sources:
        for what, length in _starts(vlm, source, settings.limit, prompt):
            total = decode.total_length(length)
            if total > most:
                raise ConfigError(
                    f"{source.name} is to be scored, and {what} takes {counted(length, 'token')}, with those that the "
                    f"model may say {total:,}, more than its {most:,} positions: shorten it, or raise model.network."
                    "text.max_positions of a new model"
                )


def _starts(
    vlm: VisionLanguageModel, source: ImageTextSource, limit: int | None, prompt: str
) -> Iterator[tuple[str, int]]:
    """What captions and answers begin with, and of how many tokens it is: the longest question of each part."""
    caption = "the start of a caption", 1 + _num_tokens(vlm, [prompt])[0]
    if not can_answer(vlm):
        yield caption
        return
    count = len(source) if limit is None else min(limit, len(source))
    for first in range(0, count, _READ_AT_ONCE):
        texts = read_texts(source, range(first, min(first + _READ_AT_ONCE, count)))
        asked = {item.question for items in texts for item in items}
        if None in asked:
            yield caption
        questions = sorted(question for question in asked if question is not None)
        if questions:
            length, question = max(zip(_num_tokens(vlm, questions), questions, strict=True))
            shown = question if len(question) <= 60 else question[:60] + "..."
            yield f"the question {shown!r}", 2 + length


def _num_tokens(vlm: VisionLanguageModel, texts: list[str]) -> list[int]:
    return [len(ids) for ids in vlm.tokenizer(texts, add_special_tokens=False).input_ids]
