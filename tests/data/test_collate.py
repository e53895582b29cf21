"""Batches: layout, what is scored, which texts are drawn, and that nothing but (seed, epoch, example) decides."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from mmattn.data.collate import ImageTextCollator
from mmattn.data.images import PixelTransform, RandomView
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.data.scenes import SceneDataset
from mmattn.data.tokenizer import item_texts, train_tokenizer
from mmattn.errors import UsageError

DATA = SceneDataset("train", 101, seed=1)
TOKENIZER = train_tokenizer([text for items in DATA.texts(range(101)) for text in item_texts(items)], "word")
BOS, SEP, EOS = TOKENIZER.bos_token_id, TOKENIZER.sep_token_id, TOKENIZER.eos_token_id


def _collator(texts_per_image=3, max_length=32, seed=5, **options) -> ImageTextCollator:
    return ImageTextCollator(PixelTransform(32), TOKENIZER, texts_per_image, max_length, seed, **options)


def _words(ids) -> str:
    return TOKENIZER.decode([token for token in ids if token >= 0])


def test_shapes_and_kinds():
    batch = _collator()(DATA, [(0, 3), (0, 7)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["pixel_values"].dtype == torch.float32
    length = batch["input_ids"].shape[1]
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].shape == (6, length)
        assert batch[key].dtype == torch.int64
    assert int(batch["attention_mask"].sum(dim=1).max()) == length


def test_a_batch_depends_on_seed_epoch_and_example_only():
    collator = _collator(view=RandomView(0.5))
    batch = collator(DATA, [(0, 3), (1, 3), (0, 9)])
    alone = _collator(view=RandomView(0.5))(DATA, [(0, 9)])
    length = alone["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][6:, :length], alone["input_ids"])
    assert torch.equal(batch["pixel_values"][2], alone["pixel_values"][0])
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    assert not torch.equal(batch["input_ids"][:3], batch["input_ids"][3:6])
    assert not torch.equal(_collator(seed=6)(DATA, [(0, 9)])["input_ids"], alone["input_ids"])


def test_answers_are_laid_out_after_the_question_and_scored_alone():
    ids, unscored = _collator().lay_out(TextItem("left of", "where is the red circle?", "relation"))
    assert (ids[0], ids[unscored - 1], ids[-1]) == (BOS, SEP, EOS)
    assert _words(ids[1 : unscored - 1]) == "where is the red circle?"
    assert _words(ids[unscored:-1]) == "left of"
    assert _collator().prompt_ids("where is the red circle?") == ids[:unscored]
    batch = _collator().pad([(ids, unscored), ([BOS, EOS], 1)])
    assert batch["labels"][0].tolist() == [-100] * unscored + ids[unscored:]
    assert batch["input_ids"][1].tolist() == [BOS, EOS] + [TOKENIZER.pad_token_id] * (len(ids) - 2)
    assert batch["labels"][1].tolist() == [-100, EOS] + [-100] * (len(ids) - 2)
    assert batch["attention_mask"][1].tolist() == [1, 1] + [0] * (len(ids) - 2)


def test_captions_follow_a_prompt_that_is_not_scored():
    ids, unscored = _collator(prompt="there is").lay_out(TextItem("a red circle"))
    assert _words(ids[1:unscored]) == "there is"
    assert _words(ids[unscored:-1]) == "a red circle"
    assert _collator(prompt="there is").prompt_ids() == ids[:unscored]
    assert _collator().prompt_ids() == [BOS]


def test_what_is_too_long_is_cut_and_then_has_no_end():
    collator = _collator(max_length=8)
    ids, unscored = collator.lay_out(TextItem("a small red circle left of a large blue square"))
    assert len(ids) == 8
    assert ids[-1] != EOS
    ids, unscored = collator.lay_out(TextItem("left of", "where is the red circle relative to the blue square?"))
    assert _words(ids[1 : unscored - 1]) == "where is the"
    assert _words(ids[unscored:]) == "left of[EOS]"
    ids, unscored = collator.lay_out(TextItem("a small red circle left of", "where is the red circle?"))
    assert len(ids) == 8
    assert _words(ids[unscored:]) == "a small red circle"


def test_texts_are_drawn_without_repeats_and_by_weight():
    record = ImageTextRecord(
        "x",
        np.zeros((2, 2, 3), dtype=np.uint8),
        tuple(TextItem(str(number), kind=kind) for number, kind in enumerate("aabbbc")),
    )
    drawn = _collator(6).draw_texts(record, np.random.default_rng(0))
    assert sorted(item.text for item in drawn) == list("012345")
    assert len(_collator(9).draw_texts(record, np.random.default_rng(0))) == 9
    collator = _collator(1, kind_weights={"a": 3.0, "b": 2.0, "c": 0.0})
    counts = Counter(collator.draw_texts(record, np.random.default_rng(seed))[0].kind for seed in range(3000))
    assert set(counts) == {"a", "b"}
    assert counts["a"] / 3000 == pytest.approx(0.5, abs=0.04)


def test_token_dropout_hides_scored_inputs_and_keeps_labels():
    draws = [(0, example) for example in range(40)]
    plain, dropped = _collator()(DATA, draws), _collator(token_dropout=0.4)(DATA, draws)
    assert torch.equal(plain["labels"], dropped["labels"])
    changed = plain["input_ids"] != dropped["input_ids"]
    scored = plain["labels"] != -100
    assert not bool((changed & ~scored).any())
    assert set(dropped["input_ids"][changed].tolist()) == {TOKENIZER.unk_token_id}
    assert float(changed.sum() / scored.sum()) == pytest.approx(0.4, abs=0.05)
    alone = _collator(token_dropout=0.4)(DATA, [(0, 31)])["input_ids"]
    assert torch.equal(dropped["input_ids"][93:96, : alone.shape[1]], alone)


def test_special_tokens_of_another_model_may_be_given():
    ids, _ = _collator(bos_id=11, sep_id=12, eos_id=13).lay_out(TextItem("red", "what color?"))
    assert (ids[0], ids[-1]) == (11, 13)
    assert 12 in ids


def test_wrong_use_is_refused():
    record = ImageTextRecord("x", np.zeros((2, 2, 3), dtype=np.uint8), (TextItem("a"),))
    with pytest.raises(UsageError, match="record x has nothing that kind_weights lets through, only: caption"):
        _collator(kind_weights={"caption": 0.0}).draw_texts(record, np.random.default_rng(0))
    with pytest.raises(UsageError, match="need texts_per_image >= 1 and max_length >= 4, not 0 and 32"):
        _collator(0)
    with pytest.raises(UsageError, match="token_dropout must be at least 0 and below 1, not 1"):
        _collator(token_dropout=1.0)
    bare = train_tokenizer(["a"], "word")
    bare.sep_token = None
    with pytest.raises(UsageError, match="the tokenizer has no sep token: pass sep_id"):
        ImageTextCollator(PixelTransform(32), bare)
