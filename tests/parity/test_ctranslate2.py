"""What we save converts to CTranslate2, which then gives our tokens."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmattn.inference.decode import DecodeSettings, decode
from mmattn.inference.translator import Translator
from mmattn.models.translator import save_network
from tests.inference.tiny_translators import ENGLISH, KINDS, LANGUAGES, save_stock_translator

ctranslate2 = pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed: pip install ctranslate2")
from ctranslate2.converters import TransformersConverter  # noqa: E402

MOST = 23


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Folders that `Translator.save_pretrained` wrote."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("stock")
        files = tmp_path_factory.mktemp("files")
        # CTranslate2 gives both sides the encoder's number of heads.
        save_stock_translator(folder, kind, files=files, encoder_attention_heads=3, decoder_attention_heads=3)
        found[kind] = tmp_path_factory.mktemp("saved")
        Translator.from_pretrained(folder, device="cpu").save_pretrained(found[kind])
    return found


def theirs(output: Path, translator: Translator, languages: dict[str, Any]) -> list[Any]:
    engine = ctranslate2.Translator(str(output), device="cpu", compute_type="float32", intra_threads=1)
    tokenizer, codes = translator.tokenizer, translator.codes
    rows = codes.source_ids(ENGLISH, languages.get("src_lang"), languages.get("tgt_lang"))
    vocabulary = {number: piece for piece, number in tokenizer.get_vocab().items()}
    sources = [[vocabulary[token] for token in row] for row in rows]
    arguments: dict[str, Any] = {"beam_size": 1, "max_decoding_length": MOST}
    if codes.kind == "token":
        token = tokenizer.convert_ids_to_tokens(codes.target_token(languages["tgt_lang"]))
        arguments["target_prefix"] = [[token]] * len(sources)
    return engine.translate_batch(sources, disable_unk=False, **arguments)


def ours(translator: Translator, languages: dict[str, Any]) -> list[Any]:
    network, codes = translator.network, translator.codes
    config = network.config
    found = []
    for row in codes.source_ids(ENGLISH, languages.get("src_lang"), languages.get("tgt_lang")):
        with torch.no_grad():
            contexts = network.project_context(network.encode(torch.tensor([row])))
        prompt = [config.decoder_start_token_id]
        if codes.kind == "token":
            prompt.append(codes.target_token(languages["tgt_lang"]))
        special = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        settings = DecodeSettings(**special, max_new_tokens=MOST)
        if codes.kind != "token":
            settings = settings.updated(bad_words_ids=[[config.pad_token_id]])  # their vocabulary lacks it
        state = network.start(contexts, max_length=settings.total_length(1))
        found.append(decode(state, torch.tensor([prompt]), settings, num_forced=len(prompt) - 1)[0][0])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_ours(saved, kind, tmp_path):
    translator, languages = Translator.from_pretrained(saved[kind], device="cpu"), LANGUAGES[kind]
    TransformersConverter(str(saved[kind])).convert(str(tmp_path / "converted"))
    expected = ours(translator, languages)
    found = theirs(tmp_path / "converted", translator, languages)
    check(translator, found, expected)
    assert len({tuple(other.tokens) for other in expected}) > 2


def check(translator: Translator, found: list[Any], expected: list[Any]) -> None:
    """Equal tokens. CTranslate2 names them by the source's vocabulary, and leaves the end token out."""
    numbers = translator.tokenizer.get_vocab()
    eos = translator.network.config.eos_token_id
    for one, other in zip(found, expected, strict=True):
        tokens = [token for token in other.tokens if token != eos]
        assert len(one.hypotheses[0]) == len(tokens)
        for name, token in zip(one.hypotheses[0], tokens, strict=True):
            assert numbers[name] == token if name in numbers else token not in numbers.values()


def test_a_network_from_scratch_converts_too(saved, tmp_path):
    """No stock config is at hand then; what is written has to say all that the converter asks for."""
    translator = Translator.from_pretrained(saved["marian"], device="cpu")
    translator.network.config.stock = {}
    save_network(translator.network, tmp_path / "scratch")
    translator.tokenizer.save_pretrained(tmp_path / "scratch")
    command = [shutil.which("ct2-transformers-converter", path=str(Path(sys.executable).parent))]
    command += ["--model", str(tmp_path / "scratch"), "--output_dir", str(tmp_path / "converted")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(translator, theirs(tmp_path / "converted", translator, {}), ours(translator, {}))
