"""The façade: equal to stock BLIP, results in the caller's shape, errors that say what to do."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from transformers import BlipProcessor

from mmattn.errors import CheckpointError, DataError, UsageError
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.maps.record import record_attention
from tests.inference.tiny_models import STOCK, pictures, save_own, save_stock

TASKS = ("captioning", "question_answering", "matching")
QUESTIONS = ["what colour is the cat ?", "how many dogs ?", "is there a red circle left of the blue square ?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {task: save_stock(root / task, task) for task in TASKS} | {"own": save_own(root / "own")}


@pytest.fixture(scope="module")
def models(folders):
    return {name: VisionLanguageModel.from_pretrained(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def stock(folders):
    return {task: STOCK[task].from_pretrained(folders[task]).eval() for task in TASKS}


@pytest.fixture(scope="module")
def processor(folders):
    return BlipProcessor.from_pretrained(folders["captioning"])


GENERATION = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": 2.0, "max_new_tokens": 9},
    {"min_new_tokens": 5, "no_repeat_ngram_size": 2},
]


@pytest.mark.parametrize("generation", GENERATION, ids=str)
@pytest.mark.parametrize("prompt", [None, "a picture of"])
def test_captions_equal_stock_one_at_a_time(models, stock, processor, prompt, generation):
    images = pictures(4)
    expected = []
    for image in images:
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        tokens = stock["captioning"].generate(**inputs, **generation)
        expected.append(_plain(processor, tokens[0]))
    assert models["captioning"].caption(images, prompt=prompt, **generation) == expected
    assert len(set(expected)) > 1, "the test says nothing when all captions are equal"


@pytest.mark.parametrize("generation", GENERATION, ids=str)
def test_answers_equal_stock_one_at_a_time(models, stock, processor, generation):
    images = pictures(3)
    expected = []
    for image in images:
        answers = []
        for question in QUESTIONS:
            inputs = processor(images=image, text=question, return_tensors="pt")
            tokens = stock["question_answering"].generate(**inputs, **generation)
            answers.append(_plain(processor, tokens[0]))
        expected.append(answers)
    model = models["question_answering"]
    encoded = model.encode(images)
    assert model.ask(encoded, [QUESTIONS] * 3, **generation) == expected
    assert model.ask(images, QUESTIONS, **generation) == [expected[i][i] for i in range(3)]
    assert model.ask(encoded[1], QUESTIONS, **generation) == expected[1]
    assert model.ask(encoded[2], QUESTIONS[0], **generation) == expected[2][0]
    assert len({answer for answers in expected for answer in answers}) > 1


def test_match_equals_stock(models, stock, processor):
    images, texts = pictures(3), ["a red circle", "two dogs", "a picture of the blue square"]
    for image, text in zip(images, texts, strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            logits = stock["matching"](**inputs).itm_score
            cosine = stock["matching"](**inputs, use_itm_head=False).itm_score
        result = models["matching"].match(image, text, return_cosine=True)
        assert result.probability == pytest.approx(logits.softmax(-1)[0, 1].item(), abs=1e-5)
        assert result.cosine == pytest.approx(cosine.item(), abs=1e-5)
    pairs = models["matching"].match(images, texts)
    crossed = models["matching"].match(models["matching"].encode(images), [texts] * 3)
    assert pairs == pytest.approx([crossed[i][i] for i in range(3)], abs=1e-6)


def _plain(processor, tokens) -> str:
    return processor.decode(tokens[tokens != 5], skip_special_tokens=True).strip()


@pytest.mark.parametrize("task", TASKS)
def test_saved_folder_opens_in_stock_with_equal_tensors(models, stock, processor, task, tmp_path):
    models[task].save_pretrained(tmp_path)
    opened = STOCK[task].from_pretrained(tmp_path)
    for name, tensor in stock[task].state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
    image = pictures(1)[0]
    again = BlipProcessor.from_pretrained(tmp_path)(images=image, text="a red cats", return_tensors="pt")
    before = processor(images=image, text="a red cats", return_tensors="pt")
    assert torch.equal(again["pixel_values"], before["pixel_values"])
    assert torch.equal(again["input_ids"], before["input_ids"])
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 3


def test_own_folder_round_trip(models, tmp_path):
    image = pictures(1)[0]
    models["own"].save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path, device="cpu")
    assert again.caption(image, num_beams=3) == models["own"].caption(image, num_beams=3)


def test_own_answers_do_not_depend_on_company(models):
    model, images = models["own"], pictures(3)
    one_by_one = [[model.ask(image, question) for question in QUESTIONS] for image in images]
    assert model.ask(images, [QUESTIONS] * 3) == one_by_one
    assert model.ask(images, [QUESTIONS] * 3, num_beams=1, batch_size=2) == one_by_one
    ragged = [QUESTIONS[:1], QUESTIONS, QUESTIONS[1:]]
    assert model.ask(images, ragged) == [one_by_one[0][:1], one_by_one[1], one_by_one[2][1:]]


def test_shapes_of_results(models):
    model, images = models["own"], pictures(2)
    assert isinstance(model.caption(images[0]), str)
    assert [type(text) for text in model.caption(images)] == [str, str]
    assert [type(text) for text in model.caption(images[:1])] == [str]
    assert len(model.caption(images[0], num_beams=3, num_return_sequences=2)) == 2
    scored = model.caption(images, return_scores=True)
    assert [type(one.score) for one in scored] == [float, float]
    assert model.ask(images, QUESTIONS[0]) == model.ask(images, [QUESTIONS[0]] * 2)
    assert len(model.ask(images[:1], QUESTIONS)) == 3


def test_kinds_of_pictures(models, tmp_path):
    model, image = models["own"], pictures(1)[0]
    file = tmp_path / "picture.png"
    image.save(file)
    expected = model.caption(image)
    assert model.caption(file) == model.caption(str(file)) == model.caption(file.read_bytes()) == expected
    assert model.caption(np.asarray(image)) == expected
    assert model.caption(np.stack([np.asarray(image)] * 2)) == [expected] * 2
    grey = image.convert("L")
    assert model.caption(np.asarray(grey)) == model.caption(grey)


def test_pictures_are_encoded_once(models, monkeypatch):
    model, images = models["question_answering"], pictures(3)
    calls = []
    encode, project = model.network.encode_images, model.network.project_context
    monkeypatch.setattr(model.network, "encode_images", lambda x: calls.append(("encode", len(x))) or encode(x))
    monkeypatch.setattr(model.network, "project_context", lambda x: calls.append(("project", len(x))) or project(x))
    model.ask(images, [QUESTIONS] * 3, num_beams=3)
    assert calls == [("encode", 3), ("project", 3)]
    encoded = model.encode(images)
    calls.clear()
    model.ask(encoded, QUESTIONS[0])
    model.ask(encoded[:2], [QUESTIONS, QUESTIONS[:1]])
    assert calls == []


def test_only_what_the_network_sees_of_pictures_stays_in_memory(models, monkeypatch):
    model, images = models["own"], pictures(3)
    sizes, encode = [], model._encode
    monkeypatch.setattr(model, "_encode", lambda some: sizes.extend(image.size for image in some) or encode(some))
    captions = model.caption(images, batch_size=2)
    assert sizes == [(16, 16)] * 3
    assert model.ask(images[0], QUESTIONS) == model.ask(model.encode(images[0]), QUESTIONS)
    sizes.clear()
    assert model.caption(model.encode(images)) == captions
    with record_attention(model) as maps:
        assert model.caption(images) == captions
    assert sizes == [image.size for image in images] * 2  # maps are drawn on whole pictures
    assert maps.heatmap().image.size == images[0].size


def test_pictures_hold_what_they_say(models):
    encoded = models["captioning"].encode(pictures(3), batch_size=2)
    per_picture = 10 * 20 + 2 * 2 * 10 * 16  # features, then keys and values of two layers
    assert encoded.nbytes == 3 * per_picture * 4
    assert (len(encoded), len(encoded[1:]), len(encoded[[0, 2]]), len(encoded[-1])) == (3, 2, 2, 1)
    assert torch.equal(encoded[-1].features[0], encoded.features[2])
    assert torch.equal(encoded[1:].contexts[1].key[0], encoded.contexts[1].key[1])
    assert encoded[np.int64(1)].is_single
    with pytest.raises(UsageError, match="not by True"):
        encoded[[True, False, True]]


def test_pictures_of_another_model_are_refused(models):
    encoded = models["captioning"].encode(pictures(2))
    for name in ("own", "question_answering"):
        with pytest.raises(UsageError, match="these pictures were encoded by another model"):
            models[name].ask(encoded[1:], QUESTIONS[0])
    assert models["captioning"].caption(copy.deepcopy(encoded)) == models["captioning"].caption(pictures(2))


def test_generation_config_gives_the_defaults(folders, tmp_path):
    folder = save_stock(tmp_path / "with-file", "captioning")
    settings = {"num_beams": 3, "max_new_tokens": 4, "eos_token_id": 4, "forced_bos_token_id": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = VisionLanguageModel.from_pretrained(folder, device="cpu")
    image = pictures(1)[0]
    plain = VisionLanguageModel.from_pretrained(folders["captioning"], device="cpu")
    assert model.caption(image) == plain.caption(image, num_beams=3, max_new_tokens=4, forced_bos_token_id=9)
    assert model.settings.eos_ids == (3,), "BLIP stops at sep, whatever the file says"
    model.save_pretrained(tmp_path / "saved")
    assert VisionLanguageModel.from_pretrained(tmp_path / "saved", device="cpu").settings.num_beams == 3


def test_sampling_follows_its_generator(models):
    model, image = models["own"], pictures(1)[0]
    draws = [
        model.caption(image, do_sample=True, num_return_sequences=5, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_training_network_goes_on_training(models):
    model = models["own"]
    expected = model.caption(pictures(2))
    model.network.train()
    try:
        assert model.caption(pictures(2)) == expected
        assert model.network.training
    finally:
        model.network.eval()


def test_what_a_checkpoint_cannot_do(models):
    image = pictures(1)[0]
    for name, verb, message in [
        ("captioning", "ask", r"CaptioningNetwork\) can caption\(\), not ask\(\).*blip-vqa-base"),
        ("question_answering", "caption", r"can ask\(\), not caption\(\).*blip-image-captioning-base"),
        ("matching", "ask", r"can match\(\), not ask\(\)"),
        ("own", "match", r"can caption\(\) and ask\(\), not match\(\).*blip-itm-base-coco"),
    ]:
        with pytest.raises(UsageError, match=message):
            getattr(models[name], verb)(image, "a cat")


@pytest.mark.parametrize(
    ("images", "questions", "message"),
    [
        (pictures(3), QUESTIONS[:2], "2 questions for 3 pictures: give one, one for each picture, or a list of lists"),
        (pictures(3), [QUESTIONS] * 2, "2 lists of questions for 3 pictures"),
        (pictures(1), [], "questions must be a text, a list of texts"),
        (pictures(1), 7, "questions must be a text"),
        (pictures(2), ["what ?", ["how ?"]], "questions mixes texts and other things"),
        ([], "what ?", "no pictures were given"),
        ("https://example.org/cat.png", "what ?", "is a URL"),
        ([3], "what ?", "picture 0 is a int: give a Pillow picture"),
        (pictures(1), "what \ud83d?", "one of the questions holds half of a surrogate pair"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_use_is_named(models, images, questions, message):
    with pytest.raises(UsageError, match=message):
        models["own"].ask(images, questions)


def test_wrong_sizes_of_batches_and_lists_of_prompts_are_named(models):
    for size in (0, 1.5):
        with pytest.raises(UsageError, match=f"batch_size is {size}; it must be a whole number of at least 1"):
            models["own"].caption(pictures(1), batch_size=size)
    with pytest.raises(UsageError, match="prompts must be a text"):
        models["own"].caption(pictures(2), [])


def test_wrong_files_are_named(models, folders, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(DataError, match="text.png: not a picture"):
        models["own"].caption(text)
    with pytest.raises(UsageError, match="unknown generation argument 'beams'"):
        models["own"].caption(pictures(1), beams=3)
    with pytest.raises(UsageError, match="max_length 101 is more than this model's 48 positions"):
        models["own"].caption(pictures(1), max_new_tokens=100)
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((folders["own"] / name).read_bytes())
    with pytest.raises(CheckpointError, match="no tokenizer"):
        VisionLanguageModel.from_pretrained(broken, device="cpu")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be opened"):
        VisionLanguageModel.from_pretrained(broken, device="cpu")
    (broken / "tokenizer.json").write_bytes((folders["own"] / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="no image processor"):
        VisionLanguageModel.from_pretrained(broken, device="cpu")


def test_push_to_hub_uploads_the_folder(models, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            seen["repo"] = (repo_id, private, exist_ok)
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            from pathlib import Path

            seen["files"] = sorted(file.name for file in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert models["own"].push_to_hub("me/model", private=True, token="t") == "https://huggingface.co/me/model"
    assert seen["repo"] == ("me/model", True, True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(seen["files"])
