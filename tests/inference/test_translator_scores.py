"""Scores of translations beside their baselines, and of word alignments against gold ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmattn.data.parallel_spec import ParallelConfig
from mmattn.data.sentence_pairs import SentencePair, spread
from mmattn.data.translation_tokens import PairTokenizer
from mmattn.errors import DataError, UsageError
from mmattn.inference import alignment_scores as alignments
from mmattn.inference.alignment_choice import rank_alignment_heads
from mmattn.inference.nearest_sentence import NearestSentence, TranslationMemory
from mmattn.inference.translator_scores import (
    EvalConfig,
    TextScores,
    Translations,
    by_languages,
    exact_by_kind,
    full_report,
    score_splits,
    translate_pairs,
)
from tests.inference.tiny_translators import ENGLISH, GERMAN

PAIRS = [SentencePair(str(n), *texts) for n, texts in enumerate(zip(ENGLISH, GERMAN, strict=True))]


def _translations(pairs: list[SentencePair], texts: list[str]) -> Translations:
    return Translations(pairs, texts, num_tokens=7, seconds=1.0)


def test_text_scores_are_sacrebleus_with_their_signatures():
    score = TextScores()
    assert score([*GERMAN[:2], "es", *GERMAN[3:]], GERMAN)["exact"] == 0.8
    perfect = score([f" {text} " for text in GERMAN], GERMAN)
    assert perfect["exact"] == 1
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["chrf"] == pytest.approx(100)
    sacrebleu = pytest.importorskip("sacrebleu")
    found = score(ENGLISH, GERMAN)
    assert found["chrf"] == sacrebleu.corpus_chrf(ENGLISH, [GERMAN]).score
    assert found["bleu"] == sacrebleu.corpus_bleu(ENGLISH, [GERMAN]).score
    assert set(score.signatures) == {"bleu/signature", "chrf/signature"}
    assert score.signatures["bleu/signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_another_tokenizer_of_bleu_stands_in_the_signature():
    score = TextScores("char")
    score(ENGLISH, GERMAN)
    assert "|tok:char|" in score.signatures["bleu/signature"]
    with pytest.raises(UsageError, match="bleu_tokenize='14a' is unknown: use one of .*13a"):
        TextScores("14a")


def test_scores_by_kind_and_by_languages():
    pairs = [
        dataclasses.replace(pair, kind="ab"[n % 2], src_lang="en", tgt_lang="de" if n < 3 else "fr")
        for n, pair in enumerate(PAIRS)
    ]
    found = _translations(pairs, [*GERMAN[:3], "non", "non"])
    assert exact_by_kind(found) == {"exact/a": 2 / 3, "exact/b": 1 / 2}
    scores = by_languages(found, TextScores())
    assert scores["exact"] == 0.6
    assert (scores["en-de/exact"], scores["en-fr/exact"]) == (1, 0)
    alike = _translations(PAIRS, GERMAN)
    assert exact_by_kind(alike) == {}
    assert by_languages(alike, TextScores()).keys() == {"exact", "bleu", "chrf"}


@pytest.mark.parametrize(
    ("kind", "languages", "codes"),
    [
        ("marian", (None, None), {}),
        ("tags", (None, "french"), {"french": "fra"}),
        ("nllb", ("en", "de"), {"en": "eng_Latn", "de": "deu_Latn"}),
    ],
)
def test_pairs_are_translated_in_their_languages(translators, kind, languages, codes):
    translator = translators[kind]
    src_lang, tgt_lang = languages
    pairs = [dataclasses.replace(pair, src_lang=src_lang, tgt_lang=tgt_lang) for pair in PAIRS]
    tokenizer = PairTokenizer(translator.tokenizer, language_codes=codes)
    found = translate_pairs(translator, pairs, EvalConfig(num_beams=2, max_new_tokens=8), tokenizer)
    given = {"src_lang": codes.get(src_lang), "tgt_lang": codes.get(tgt_lang)}
    assert found.texts == translator.translate(ENGLISH, num_beams=2, max_new_tokens=8, **given)
    assert len(PAIRS) <= found.num_tokens <= 20 * len(PAIRS)  # random weights spell what no tokenizer would
    assert found.seconds > 0


def test_a_text_that_names_its_language_keeps_it(translators):
    translator = translators["tags"]
    tokenizer = PairTokenizer(translator.tokenizer)
    pairs = [
        SentencePair("0", ">>deu<< One cat.", "Eine Katze.", None, "fra"),
        SentencePair("1", "One cat.", "Un chat.", None, "fra"),
    ]
    found = translate_pairs(translator, pairs, EvalConfig(max_new_tokens=6), tokenizer).texts
    assert found[0] == translator.translate("One cat.", tgt_lang="deu", num_beams=1, max_new_tokens=6)
    assert found[1] == translator.translate("One cat.", tgt_lang="fra", num_beams=1, max_new_tokens=6)
    with pytest.raises(DataError, match=r"^2: .*'klingon' is no language"):
        translate_pairs(translator, [SentencePair("2", "a", "b", None, "klingon")], EvalConfig(), tokenizer)


def _aligned_file(folder: Path) -> ParallelConfig:
    rows = [
        {"source": source, "target": target, "links": "0-0", "sort": "ab"[n % 2]}
        for n, (source, target) in enumerate(zip(ENGLISH, GERMAN, strict=True))
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"alignment": "links", "kind": "sort"}
    spec = ParallelConfig(kind="files", path=str(folder / "pairs.jsonl"), eval_fraction=0.4)
    spec.columns = dataclasses.replace(spec.columns, **columns)
    return spec


def test_the_report_of_mmattn_eval(translators, tmp_path: Path):
    spec, settings = _aligned_file(tmp_path), EvalConfig(splits=["validation"], max_new_tokens=6)
    plain, found = score_splits(translators["marian"], spec, settings)
    report = full_report(translators["marian"], spec, settings, hypotheses=tmp_path / "said.jsonl")
    assert plain.items() <= report.items()
    assert plain.keys() == {
        f"validation/{name}"
        for name in ("exact", "bleu", "chrf", "alignment/precision", "alignment/recall", "alignment/f1")
    }
    assert report["validation/copy/chrf"] == TextScores()(*_copied(found["validation"]))["chrf"]
    assert report["validation/memory/exact"] == 0
    assert report["validation/tokens_per_s"] > 0
    assert isinstance(report["chrf/signature"], str)
    lines = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["hypothesis"] for line in lines] == found["validation"].texts
    assert [line["reference"] for line in lines] == [pair.target for pair in found["validation"].pairs]
    with pytest.raises(UsageError, match=r"said.jsonl: exists already; nothing was written"):
        full_report(translators["marian"], spec, settings, hypotheses=tmp_path / "said.jsonl")


def _copied(found: Translations) -> tuple[list[str], list[str]]:
    return [pair.source for pair in found.pairs], [pair.target for pair in found.pairs]


def test_the_limit_spreads_over_the_data(translators):
    parts = [{"kind": "scenes", "eval_size": 30}, {"kind": "scenes", "eval_size": 30, "seed": 3}]
    spec = ParallelConfig(kind="parts", parts=[ParallelConfig(**part) for part in parts])
    found = score_splits(translators["marian"], spec, EvalConfig(limit=5, max_new_tokens=3))
    first, second = (ParallelConfig(**part) for part in parts)
    scores, found = found
    assert len(found["validation"].pairs) == 5
    assert scores["validation/too_long"] == sum(len(pair.source) > 90 for pair in found["validation"].pairs) > 0
    numbers = [int(pair.id.rpartition("/")[2]) for pair in found["validation"].pairs]
    assert numbers == [0, 15, 0, 14, 29]
    assert (first.seed, second.seed) == (0, 3)
    assert spread(3, None).tolist() == spread(3, 7).tolist() == [0, 1, 2]


# Alignments.


def test_links_by_hand(translators):
    """Word 1 of the source has two tokens, word 0 of the target two: added up there, averaged here."""
    tokenizer = PairTokenizer(translators["marian"].tokenizer)
    pair = SentencePair("0", ENGLISH[1], GERMAN[1], alignment=((0, 0),))
    row = tokenizer([pair])[0]
    sources = tokenizer.word_places(pair.source, len(row.text), is_target=False)
    targets = tokenizer.word_places(pair.target, len(row.target) - 1, is_target=True)
    long = max(range(len(sources)), key=lambda word: len(sources[word]))
    assert len(sources[long]) > 1
    weights = np.zeros((len(row.target), len(row.source)), dtype=np.float32)
    weights[:, sources[0].start] = 0.4
    weights[:, list(sources[long])] = 0.5 / len(sources[long])  # each token less than 0.4, together more
    weights[:, len(row.source) - 1] = 9  # what the end token gets is no word's
    weights[targets[2].start, sources[1].start] = 30
    found = alignments._links(pair, row, weights, tokenizer)
    assert found == {(1 if word == 2 else long, word) for word in range(len(targets))}


@pytest.mark.parametrize("kind", ["marian", "nllb"])
def test_alignment_scores_count_links(translators, kind: str, monkeypatch: pytest.MonkeyPatch):
    translator = translators[kind]
    tokenizer = PairTokenizer(translator.tokenizer)
    languages = ("eng_Latn", "deu_Latn") if kind == "nllb" else (None, None)
    plain = [SentencePair("0", "Two dogs run", "Zwei Hunde laufen", *languages)]
    aligned = [dataclasses.replace(pair, alignment=((0, 0), (1, 1), (2, 1), (2, 2))) for pair in plain]
    with torch.no_grad():
        scores = alignments.alignment_scores(translator.network, tokenizer, aligned)
    links: set[tuple[int, int]] = set()
    real = alignments._links
    monkeypatch.setattr(alignments, "_links", lambda *args: links.update(real(*args)) or real(*args))
    assert alignments.alignment_scores(translator.network, tokenizer, [*aligned, *plain]) == scores
    right = len(links & set(aligned[0].alignment or ()))
    assert len(links) == 3
    assert scores == {
        "alignment/precision": right / 3,
        "alignment/recall": right / 4,
        "alignment/f1": 2 * right / 7,
    }
    assert alignments.alignment_scores(translator.network, tokenizer, plain) == {}


@pytest.mark.parametrize("kind", ["marian", "nllb"])
@torch.no_grad()
def test_attention_is_read_as_it_is_while_translating(translators, kind):
    network, tokenizer = translators[kind].network, PairTokenizer(translators[kind].tokenizer)
    languages = ("eng_Latn", "deu_Latn") if kind == "nllb" else (None, None)
    pair = SentencePair("0", ENGLISH[1], GERMAN[1], *languages)
    row = tokenizer([pair])[0]
    read = alignments._read_weights(network, tokenizer, [pair], [network.alignment_reader()])[0][0]
    state = network.start(
        network.project_context(network.encode(torch.tensor([row.source]))), max_length=53, reads_alignment=True
    )
    for token in [network.config.decoder_start_token_id, *row.prefix, *row.target[:-1]]:
        state.logits(torch.tensor([[token]]))
    np.testing.assert_allclose(read, torch.cat(state.steps).numpy(), rtol=1e-4, atol=1e-6)


def test_pairs_without_room_are_counted(translators):
    translator = translators["marian"]
    tokenizer = PairTokenizer(translator.tokenizer)
    short = SentencePair("0", "One cat", "Eine Katze", alignment=((0, 0), (1, 1)))
    long = SentencePair("1", " ".join(ENGLISH * 3), "Eine Katze", alignment=((0, 0),))
    scores = alignments.alignment_scores(translator.network, tokenizer, [long, short])
    assert scores["alignment/left_out"] == 1
    assert "alignment/left_out" not in alignments.alignment_scores(translator.network, tokenizer, [short])


# The translation memory.


def test_nearest_sentence_is_the_cosine_of_ngram_vectors():
    texts = ["the red circle", "a green square", "two blue rings", "the red ring", "x"]
    finder = NearestSentence(texts)
    assert finder.find(texts) == [0, 1, 2, 3, 4]
    assert finder.find(["a green squares", "the red circles", "blue ringed"]) == [1, 0, 2]
    assert finder.find([]) == []
    assert finder.find(["äöü€"]) == [0]  # nothing in common: the first


def test_translation_memory_looks_up_each_pair_of_languages():
    pairs = [
        SentencePair("0", "a red circle", "ein roter Kreis", "en", "de"),
        SentencePair("1", "a red circle", "un cercle rouge", "en", "fr"),
        SentencePair("2", "two blue rings", "zwei blaue Ringe", "en", "de"),
    ]
    asked = [
        SentencePair("a", "two red rings", "", "en", "de"),
        SentencePair("b", "two red rings", "", "en", "fr"),
        SentencePair("c", "two red rings", "", "en", "es"),
    ]
    assert TranslationMemory(pairs).translate(asked) == ["zwei blaue Ringe", "un cercle rouge", ""]


def test_the_best_head_is_named(translators):
    translator = translators["marian"]
    network, tokenizer = translator.network, PairTokenizer(translator.tokenizer)
    links = ((0, 0), (1, 1), (2, 1), (2, 2))
    aligned = [dataclasses.replace(pair, alignment=links) for pair in PAIRS]
    config = network.config
    ranking = rank_alignment_heads(network, tokenizer, aligned)
    assert (config.alignment_layer, config.alignment_heads) == (None, None)
    assert len(ranking) == config.decoder_layers * (config.decoder_heads + 1)
    assert {each.layer for each in ranking} == set(range(config.decoder_layers))
    assert [each.f1 for each in ranking] == sorted((each.f1 for each in ranking), reverse=True)
    assert ranking[0].f1 > ranking[-1].f1
    assert rank_alignment_heads(network, tokenizer, PAIRS) == []
    try:
        config.alignment_layer, config.alignment_heads = ranking[0].layer, ranking[0].heads
        assert alignments.alignment_scores(network, tokenizer, aligned)["alignment/f1"] == ranking[0].f1
    finally:
        config.alignment_layer = config.alignment_heads = None
