"""Scores beside the picture-blind baseline, caption likelihoods, and the showcase on scenes."""

import numpy as np
import pytest
import torch

from mmattn.config import load_config, load_recipe
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.data.scenes import SceneDataset
from mmattn.errors import UsageError
from mmattn.inference import showcase
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.inference.vlm_scores import (
    KindScore,
    PictureBlindBaseline,
    caption_likelihoods,
    hit_chance,
    kind_label,
    retrieval,
    score_texts,
    summary,
)
from tests.inference.tiny_models import pictures, save_own, save_stock


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> VisionLanguageModel:
    return VisionLanguageModel.from_pretrained(save_own(tmp_path_factory.mktemp("own")), device="cpu")


class _Source:
    """Noise pictures on which a model's own texts are true, but for one answer."""

    name = "own words"

    def __init__(self, vlm: VisionLanguageModel) -> None:
        images = [np.asarray(picture) for picture in pictures(5)]
        captions = vlm.caption(images)
        answers = vlm.ask(images, "what colour is the cat ?")
        answers[3] = "something else"
        self.stored = [
            ImageTextRecord(
                str(i),
                image,
                (
                    TextItem("not this"),
                    TextItem(captions[i].upper() + " "),
                    TextItem(answers[i], "what colour is the cat ?", "color"),
                ),
            )
            for i, image in enumerate(images)
        ]

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> ImageTextRecord:
        return self.stored[index]


def test_baseline_says_the_most_frequent_answer_to_the_question_or_to_its_kind():
    baseline = PictureBlindBaseline(
        [*[TextItem("red", "a?", "color")] * 2, TextItem("blue", "b?", "color"), TextItem("a cat")]
    )
    assert baseline.guess(TextItem("x", "b?", "color")) == "blue"
    assert baseline.guess(TextItem("x", "new?", "color")) == "red"
    assert baseline.guess(TextItem("x")) == "a cat"
    assert baseline.guess(TextItem("x", "new?", "unseen")) == ""


def test_scores_count_any_true_caption_and_every_answer(own):
    source = _Source(own)
    baseline = PictureBlindBaseline([TextItem("something else", "what colour is the cat ?", "color")])
    scores = score_texts(own, source, baseline, batch_size=2)
    assert scores == {"caption": KindScore(5, 0, 5), "color": KindScore(4, 1, 5)}
    assert score_texts(own, source, baseline, limit=3)["color"] == KindScore(3, 0, 3)
    flat = summary(scores, "test/")
    assert flat["test/answers"] == flat["test/color"] == 0.8
    assert flat["test/answers/blind"] == 0.2
    assert flat["test/caption"] == 1.0


def test_captions_begin_with_the_prompt_and_are_compared_without_it(own):
    source = _Source(own)
    prompt = "a picture of"
    whole = own.caption([record.image for record in source.stored], prompt)
    captions = [text.removeprefix(prompt) for text in whole]
    assert all(text.startswith(prompt) for text in whole)
    source.stored = [
        ImageTextRecord(record.id, record.image, (TextItem(caption),))
        for record, caption in zip(source.stored, captions, strict=True)
    ]
    baseline = PictureBlindBaseline([TextItem("something else")])
    assert score_texts(own, source, baseline, prompt=prompt) == {"caption": KindScore(5, 0, 5)}
    assert score_texts(own, source, baseline)["caption"].num_right < 5


def test_captions_of_scenes_are_counted_by_their_number_of_objects():
    records = SceneDataset("test", 40).records(range(40))
    assert {kind_label(record, record.texts[0]) for record in records} == {"caption_1", "caption_2"}
    assert {kind_label(record, record.texts[1]) for record in records} == {"count"}


@torch.no_grad()
def test_likelihoods_are_those_of_each_text_alone(own):
    encoded = own.encode(pictures(3))
    texts = ["red cat", "a picture of blue square", "two"]
    together = caption_likelihoods(own, encoded, texts, chunk=2)
    config = own.network.config
    for row, text in enumerate(texts):
        ids = [config.bos_token_id, *own.tokenizer(text).input_ids, config.stop_token_id]
        tensor = torch.tensor([ids])
        for picture in range(3):
            features = encoded[picture].features
            output = own.network(None, tensor, labels=tensor, features=features)
            expected = -output.loss_sum / output.num_tokens
            torch.testing.assert_close(together[picture, row], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_likelihoods_after_a_prompt_are_of_what_follows_it(own):
    encoded, config = own.encode(pictures(1)), own.network.config
    prompt, text = own.tokenizer("a picture of").input_ids, own.tokenizer("red cat").input_ids
    ids = torch.tensor([[config.bos_token_id, *prompt, *text, config.stop_token_id]])
    labels = ids.clone()
    labels[:, : 1 + len(prompt)] = -100
    output = own.network(None, ids, labels=labels, features=encoded.features)
    found = caption_likelihoods(own, encoded, ["red cat", "two"], prompt="a picture of")
    torch.testing.assert_close(found[0, 0], -output.loss_sum / output.num_tokens, rtol=1e-4, atol=1e-4)
    assert retrieval(own, _Source(own), prompt="a picture of").keys() == retrieval(own, _Source(own)).keys()


def test_retrieval_finds_what_the_model_says(own):
    ranks = retrieval(own, _Source(own))
    assert 0 <= ranks["recall_at_1"] <= ranks["recall_at_5"] <= 1
    assert ranks["recall_at_5/blind"] == 1.0  # one caption is the first of every record


def test_retrieval_of_what_real_data_holds(own):
    source = _Source(own)
    long = ImageTextRecord("long", source.stored[2].image, (TextItem("red cat " * 100),))
    answer = ImageTextRecord("answer", source.stored[3].image, source.stored[3].texts[2:])
    source.stored = [*source.stored[:2], long, answer]
    ranks = retrieval(own, source)
    assert ranks["recall_at_1/blind"] == 0.5
    other = ImageTextRecord("other", source.stored[0].image, (TextItem("instead of the long one"),))
    source.texts = lambda numbers: [(long, *source.stored[1:])[number].texts for number in numbers]
    source.stored = [other, *source.stored[1:]]  # the first cannot be read: another stands in its place
    assert retrieval(own, source)["recall_at_5"] == 1.0
    source.stored = [answer]
    del source.texts
    assert retrieval(own, source) == {}


def test_a_blip_captioning_model_is_not_asked(tmp_path):
    vlm = VisionLanguageModel.from_pretrained(save_stock(tmp_path, "captioning"), device="cpu")
    record = ImageTextRecord(
        "0", np.asarray(pictures(1)[0]), (TextItem("cat"), TextItem("red", "what colour ?", "color"))
    )
    source = _Source.__new__(_Source)
    source.stored = [record]
    assert score_texts(vlm, source, PictureBlindBaseline([])).keys() == {"caption"}


def test_equal_scores_share_their_ranks():
    # Captions of unknown words only are the same text to a model: it must gain nothing by that.
    same = torch.zeros(13)
    assert hit_chance(same, 7, 1) == pytest.approx(1 / 13)
    assert hit_chance(same, 7, 5) == pytest.approx(5 / 13)
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0])
    assert [hit_chance(scores, 0, 1), hit_chance(scores, 1, 1), hit_chance(scores, 3, 3)] == [1.0, 0.0, 0.0]
    assert hit_chance(scores, 2, 2) == pytest.approx(0.5)
    assert hit_chance(torch.tensor([float("nan"), 1.0]), 0, 5) == 0.0


def test_likelihoods_need_a_captioning_model(tmp_path):
    vqa = VisionLanguageModel.from_pretrained(save_stock(tmp_path, "question_answering"), device="cpu")
    with pytest.raises(UsageError, match="QuestionAnsweringNetwork has no likelihood of a caption"):
        caption_likelihoods(vqa, vqa.encode(pictures(1)), ["cat"])


def test_showcase_writes_what_it_says(tmp_path, capsys):
    recipe = load_recipe("vlm")
    overrides = [f"training.output_dir={tmp_path}", "training.max_steps=2", "training.eval_every=0", "data.size=50"]
    config = load_config(recipe.Config, "vlm/debug", overrides)
    recipe.train(config)
    vlm = VisionLanguageModel.from_pretrained(tmp_path / "final", device="cpu")
    assert showcase.show(vlm, SceneDataset("test", 9), tmp_path / "show", count=2, trials=3) is False
    text = (tmp_path / "show" / "captions.txt").read_text()
    assert "scenes/test/0" in text
    assert "(true: " in text  # two steps teach nothing
    assert "over 3 other pictures the peak lay on the object in 0%" in text
    assert sorted(path.name for path in (tmp_path / "show").iterdir()) == ["0.png", "1.png", "captions.txt"]
    showcase.print_scores({"test/color": 0.5, "test/color/blind": 0.25})
    assert "test/color  50.0%  25.0%" in capsys.readouterr().out


def test_pointing_is_right_when_the_peak_cell_holds_pixels_of_the_object(monkeypatch):
    source = SceneDataset("test", 5)
    region = source.regions(0)[0]

    class Heatmap:
        def __init__(self, at: tuple[int, int]) -> None:
            self.values = np.zeros((8, 8))
            self.values[at[0] // 4, at[1] // 4] = 1.0

    class Maps:
        def __init__(self, at: tuple[int, int]) -> None:
            self.at = at

        def heatmap(self, word: str, **spot: int) -> Heatmap:
            assert word == region.words[2]
            return Heatmap(self.at)

    inside = tuple(np.argwhere(region.mask)[0])
    far = next(
        (row, column)
        for row in range(2, 32, 4)
        for column in range(2, 32, 4)
        if not region.mask[max(0, row - 4) : row + 5, max(0, column - 4) : column + 5].any()
    )
    assert showcase.points_right(Maps(inside), source, 0, (0, 0))
    assert not showcase.points_right(Maps(far), source, 0, (0, 0))
