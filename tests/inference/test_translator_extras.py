"""The translation façade beside its texts: scores, alignments, memory, settings, saving, what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.translator import Translator
from tests.data.tiny_tokenizers import tiny_opus
from tests.inference.tiny_translators import (
    ENGLISH,
    GERMAN,
    KINDS,
    LANGUAGES,
    POSITIONS,
    set_generation,
    stock_translate,
)


def _teacher_forced(translator, text, **arguments):
    """A scored translation, its source, what the decoder read for it, and the log-probabilities of a full pass."""
    network, seen = translator.network, []
    hook = network.decoder.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    scored = translator.translate(text, return_scores=True, num_beams=1, **arguments)
    hook.remove()
    read = torch.cat(seen, dim=1)
    plan = translator.encode(text, **{k: v for k, v in arguments.items() if k in ("src_lang", "tgt_lang")}).plan
    source = torch.tensor([plan.segments[0].ids])
    with torch.no_grad():
        log_probs = network(source, read).logits[0].log_softmax(dim=-1)
    return scored, source, read, log_probs


@pytest.mark.parametrize("kind", ["marian", "tags", "m2m100"])
def test_a_greedy_score_is_the_log_probability_of_its_tokens(translators, kind):
    # Processors change the scores, so none is used but for the forced language token.
    free = {"no_repeat_ngram_size": 0, "max_new_tokens": 11, "min_new_tokens": 0}
    scored, _, read, log_probs = _teacher_forced(translators[kind], ENGLISH[0], **LANGUAGES[kind], **free)
    tokens = read[0, 1:].tolist()
    given = 1 if kind == "m2m100" else 0  # the language's token is no choice
    known = sum(log_probs[place, token].item() for place, token in enumerate(tokens) if place >= given)
    last = log_probs[-1].max().item()
    assert scored.score == pytest.approx(known + last, rel=1e-4, abs=1e-4)
    assert scored.text == translators[kind].translate(ENGLISH[0], **LANGUAGES[kind], **free)
    assert scored.alignment is None


def test_scores_of_beams_are_stocks_and_add_up_over_lines(translators, translator_folders):
    translator, model = (
        translators["marian"],
        AutoModelForSeq2SeqLM.from_pretrained(translator_folders["marian"]).eval(),
    )
    tokenizer = AutoTokenizer.from_pretrained(translator_folders["marian"])
    arguments = {"num_beams": 4, "length_penalty": 0.7, "max_new_tokens": 13, "num_return_sequences": 2}
    found = translator.translate(ENGLISH[:3], return_scores=True, **arguments)
    for text, candidates in zip(ENGLISH, found, strict=False):
        inputs = tokenizer(text, return_tensors="pt")
        kept = {"return_dict_in_generate": True, "output_scores": True}
        expected = model.generate(**inputs, **arguments, **kept).sequences_scores.tolist()
        assert [one.score for one in candidates] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    document = translator.translate("\n\n".join(ENGLISH[:3]), return_scores=True, **arguments)
    for rank in range(2):
        assert document[rank].score == pytest.approx(sum(candidates[rank].score for candidates in found))


def test_empty_texts_have_what_is_asked_for(translators):
    empty = translators["marian"].translate(["", ENGLISH[0]], return_scores=True, return_alignment=True)[0]
    assert (empty.text, empty.score) == ("", 0.0)
    assert (empty.alignment.source, empty.alignment.target, empty.alignment.pairs()) == ([], [], [])
    assert translators["marian"].translate("", return_alignment=True).score is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_opens_in_transformers_and_translates_the_same(translators, translator_folders, kind, tmp_path):
    translators[kind].save_pretrained(tmp_path)
    assert translators[kind].is_stock
    folders = (translator_folders[kind], tmp_path)
    before, after = (AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in folders)
    expected = before.state_dict()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    tokenizer, reopened = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    assert type(reopened) is type(tokenizer)
    for text in ENGLISH:
        assert reopened(text).input_ids == tokenizer(text).input_ids
        assert stock_translate(after, reopened, text) == stock_translate(before, tokenizer, text)
    again = Translator.from_pretrained(tmp_path, device="cpu")
    languages = LANGUAGES[kind]
    assert again.translate(ENGLISH, **languages) == translators[kind].translate(ENGLISH, **languages)
    assert again.settings == translators[kind].settings


def test_our_own_form_comes_back(translators, tmp_path):
    translators["own"].save_pretrained(tmp_path)
    again = Translator.from_pretrained(tmp_path, device="cpu")
    assert again.translate(ENGLISH, num_beams=2) == translators["own"].translate(ENGLISH, num_beams=2)


def test_an_int8_translator_is_for_use_only(translator_folders, translators, tmp_path):
    quantised = Translator.from_pretrained(translator_folders["marian"], device="cpu", quantize="int8")
    assert quantised.quantization == "int8"
    assert [type(text) for text in quantised.translate(ENGLISH, max_new_tokens=7)] == [str] * 5
    with pytest.raises(UsageError, match=r"this translator is quantised \(int8\): open it without to save it"):
        quantised.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="quantize='int4' is unknown: use 'int8' or None"):
        Translator.from_pretrained(translator_folders["marian"], quantize="int4")


SETTINGS = {"num_beams": 3, "length_penalty": 0.5, "max_length": 17, "bad_words_ids": [[5], [7]], "min_length": 4}


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_the_translator_folders_generation_settings_are_the_defaults(translator_folders, translators, place, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(translator_folders["marian"], folder)
    if place == "generation_config.json":
        set_generation(folder, **SETTINGS)
    else:  # as older translator_folders have them
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | SETTINGS | {"repetition_penalty": 1.3}))
    translator = Translator.from_pretrained(folder, device="cpu")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [stock_translate(model, tokenizer, text, max_length=17)[0] for text in ENGLISH]
    assert translator.translate(ENGLISH) == expected
    assert (translator.settings.num_beams, translator.settings.max_length) == (3, 17)
    translator.save_pretrained(tmp_path / "saved")
    assert Translator.from_pretrained(tmp_path / "saved", device="cpu").settings == translator.settings
    overridden = translator.translate(ENGLISH, num_beams=1, max_new_tokens=5, min_length=0)
    values = {"num_beams": 1, "max_new_tokens": 5, "min_length": 0, "max_length": None}
    assert overridden == [stock_translate(model, tokenizer, text, **values)[0] for text in ENGLISH]
    assert translator.translate(ENGLISH) == expected, "arguments count for their call only"


def test_without_a_length_a_translation_may_fill_the_positions(translators):
    assert translators["marian"].settings.max_length == POSITIONS


def test_a_forced_first_token_may_be_given_for_a_call(translator_folders, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(translator_folders["marian"], folder)
    set_generation(folder, forced_bos_token_id=11)
    translator = Translator.from_pretrained(folder, device="cpu")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for arguments in ({}, {"forced_bos_token_id": 23}, {"forced_bos_token_id": 23, "num_beams": 3}):
        expected = [stock_translate(model, tokenizer, text, **arguments)[0] for text in ENGLISH]
        assert translator.translate(ENGLISH, **arguments) == expected


def test_what_a_file_sets_and_cannot_be_done_is_said(translator_folders, tmp_path):
    shutil.copytree(translator_folders["marian"], tmp_path / "folder")
    set_generation(tmp_path / "folder", penalty_alpha=0.6)
    with pytest.warns(UserWarning, match=r"generation_config\.json sets penalty_alpha, not supported and left out"):
        Translator.from_pretrained(tmp_path / "folder", device="cpu")


def test_sampling_follows_its_generator(translators):
    draws = [
        translators["nllb"].translate(
            ENGLISH,
            **LANGUAGES["nllb"],
            do_sample=True,
            num_return_sequences=3,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("kind", "texts", "arguments", "message"),
    [
        ("marian", ENGLISH, {"tgt_lang": "de"}, "tgt_lang='de': this model translates one pair of languages, leave"),
        ("marian", ENGLISH, {"src_lang": "en"}, "src_lang is given, but this model knows its source language"),
        ("tags", ENGLISH, {"src_lang": "en", "tgt_lang": "deu"}, "src_lang is given, but this model knows its source"),
        ("tags", ENGLISH, {"tgt_lang": "de"}, "tgt_lang='de' is no language of this model; nearest: deu"),
        ("m2m100", ENGLISH, {"tgt_lang": "ger"}, "tgt_lang='ger' is no language of this model"),
        ("nllb", ENGLISH, {"tgt_lang": "de"}, "tgt_lang='de' is no language of this model; nearest: deu_Latn"),
        ("nllb", ENGLISH, {"src_lang": "en", "tgt_lang": "deu_Latn"}, "src_lang='en' is no language .* eng_Latn"),
        ("nllb", ENGLISH, {}, "this model translates into 3 languages: give tgt_lang, such as deu_Latn, eng_Latn"),
        ("nllb", ENGLISH, {"tgt_lang": ["deu_Latn"] * 4}, "4 tgt_lang for 5 texts: give one, or one for each text"),
        ("nllb", ENGLISH, {"tgt_lang": 3}, "tgt_lang is a int: give one code, or one for each text"),
        ("nllb", ENGLISH[:1], {"tgt_lang": [3]}, "tgt_lang=3 is no language code: give a str such as 'deu_Latn'"),
        ("marian", 3, {}, "texts is a int: give a str or a list of them"),
        ("marian", None, {}, "texts is a NoneType: give a str"),
        ("marian", ["a", "b\ud83d"], {}, "text 2 of 2 holds half of a surrogate pair"),
        ("marian", b"bytes", {}, "texts is a bytes: give a str"),
        ("marian", {"a": 1}, {}, "texts is a dict: give a str"),
        ("marian", ["a cat", 3], {}, "text 2 of 2 is a int, not a str"),
        ("marian", ENGLISH, {"num_beem": 3}, "unknown generation argument 'num_beem'; did you mean 'num_beams'"),
        ("marian", ENGLISH, {"temperature": 0.5}, "temperature has no effect without do_sample=True"),
        ("marian", ENGLISH, {"max_new_tokens": 60}, "max_length 61 is more than this model's 53 positions"),
        ("marian", ENGLISH, {"batch_tokens": 0}, "batch_tokens is 0; it must be at least 1"),
        ("marian", ENGLISH, {"batch_tokens": -3}, "batch_tokens is -3; it must be at least 1"),
    ],
)
def test_wrong_use_is_named(translators, kind, texts, arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        translators[kind].translate(texts, **arguments)
    assert "\n" not in str(caught.value)


def test_files_that_are_not_of_one_model_are_named(translator_folders, translators, tmp_path):
    network, tokenizer = translators["marian"].network, translators["marian"].tokenizer
    for name in ("longer", "other"):
        (tmp_path / name).mkdir()
    longer = tiny_opus(ENGLISH, GERMAN, tmp_path / "longer", tags=["deu", "fra", "spa"])
    with pytest.raises(CheckpointError, match=r"the tokenizer's vocabulary has \d+ entries, the weights \d+: they are"):
        Translator(network, longer)
    other = tiny_opus(ENGLISH[:2], GERMAN[:2], tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"the tokenizer's pad_token_id is \d+, the weights' config says \d+"):
        Translator(network, other)
    two = translators["two vocabularies"].tokenizer
    target = dict(two.target_encoder)
    two.target_encoder["surprise"] = 10_000
    try:
        with pytest.raises(CheckpointError, match="the tokenizer's target vocabulary has 10001 entries, the weights"):
            Translator(translators["two vocabularies"].network, two)
    finally:
        two.target_encoder = target
    Translator(network, tokenizer)


@pytest.mark.parametrize(
    ("gone", "written", "message"),
    [
        ("vocab.json", None, "no tokenizer"),
        ("source.spm", None, "the tokenizer cannot be opened"),
        (None, ("vocab.json", "{}"), "the tokenizer cannot be opened"),
        (None, ("generation_config.json", "{"), r"generation_config\.json: not JSON"),
        (None, ("generation_config.json", "[]"), "must hold a JSON object"),
        ("config.json", None, r"no config\.json, so this is not a model folder"),
        ("model.safetensors", None, r"no weights, looked for model\.safetensors"),
    ],
)
def test_damaged_folders_are_named(translator_folders, gone, written, message, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(translator_folders["marian"], folder)
    if gone is not None:
        (folder / gone).unlink()
    if written is not None:
        (folder / written[0]).write_text(written[1])
    with pytest.raises(CheckpointError, match=message) as caught:
        Translator.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_the_progress_bar_is_shown_when_asked_for(translators, capsys):
    translator = translators["marian"]
    translator.translate(ENGLISH, max_new_tokens=3, batch_tokens=1, progress=False)
    assert "Translating" not in capsys.readouterr().err
    translator.translate(ENGLISH, max_new_tokens=3, progress=True)
    assert "Translating: 100%" in capsys.readouterr().err
    encoded = translator.encode(ENGLISH, progress=True)
    assert "Encoding: 100%" in capsys.readouterr().err
    translator.translate(encoded, max_new_tokens=3, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_push_to_hub_uploads_the_folder(translators, monkeypatch):
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

            seen["files"] = {file.name for file in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert translators["marian"].push_to_hub("me/model", private=True, token="t") == "https://huggingface.co/me/model"
    assert (seen["token"], seen["repo"]) == ("t", ("me/model", True, True))
    assert {"config.json", "model.safetensors", "source.spm", "vocab.json", "generation_config.json"} <= seen["files"]
