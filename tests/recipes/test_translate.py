"""The translation recipe from a config to a folder that opens: from scratch on scenes, and stock models fine-tuned."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from mmattn.config import load_config, load_recipe
from mmattn.errors import ConfigError, DataError, UsageError
from mmattn.inference.translator import Translator
from mmattn.models.translator import open_network
from mmattn.training.metrics import read_metrics
from mmattn.training.selection import adapter_state
from tests.inference.tiny_translators import ENGLISH, GERMAN, save_stock_translator

recipe = load_recipe("translate")


def _debug_config(folder: Path, *overrides: str):
    """`translate/debug`, smaller still."""
    steps = ["training.max_steps=4", "training.eval_every=2", "training.save_every=2", "training.batch_tokens=300"]
    data = ["data.size=200", "data.eval_size=8", "evaluation.max_new_tokens=9"]
    return load_config(recipe.Config, "translate/debug", [f"training.output_dir={folder}", *steps, *data, *overrides])


def _files_config(folder: Path, kind: str, *overrides: str):
    """`translate/finetune-opus-mt` on five pairs and a tiny stock checkpoint with random weights in `base/`."""
    rows = [{"source": source, "target": target} for source, target in zip(ENGLISH, GERMAN, strict=True)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "files").mkdir()
    save_stock_translator(folder / "base", kind, files=folder / "files")
    steps = ["training.max_steps=3", "training.batch_tokens=60", "training.micro_batch_tokens=null"]
    steps += ["training.warmup_steps=0", "training.learning_rate=1e-2", "training.num_workers=0"]
    return load_config(
        recipe.Config,
        "translate/finetune-opus-mt",
        [
            *[f"data.path={folder / 'pairs.jsonl'}", "data.eval_fraction=0.4", f"training.output_dir={folder / 'run'}"],
            *[f"model.from_pretrained={folder / 'base'}", "evaluation.max_new_tokens=7", *steps, *overrides],
        ],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output folder of a short run on scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "run"
    recipe.train(_debug_config(folder))
    return folder


def test_debug_config_trains_and_evaluates(trained: Path, tmp_path: Path):
    lines = read_metrics(trained / "metrics.jsonl", kind="eval")
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["metrics"].keys() >= {"validation/exact", "validation/bleu", "validation/chrf"}
    assert "validation/alignment/f1" in lines[0]["metrics"]
    scores = recipe.evaluate(trained, _debug_config(trained), hypotheses=tmp_path / "said.jsonl")
    assert scores["validation/chrf"] == pytest.approx(lines[-1]["metrics"]["validation/chrf"], abs=20)
    assert scores["validation/memory/chrf"] > scores["validation/copy/chrf"] > 0
    assert scores["validation/tokens_per_s"] > scores["validation/sentences_per_s"] > 0
    assert scores["chrf/signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|")
    assert "tok:13a" in scores["bleu/signature"]
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == 8
    assert said[0].keys() == {"split", "id", "kind", "source", "reference", "hypothesis"}


def test_scores_of_the_model_in_8_bits(trained: Path, tmp_path: Path):
    exact, rounded = (
        recipe.evaluate(trained, _debug_config(trained, f"evaluation.quantize={kind}")) for kind in ("null", "int8")
    )
    assert rounded["validation/chrf"] == pytest.approx(exact["validation/chrf"], abs=20)
    with pytest.raises(UsageError, match="quantize='int4' is unknown"):
        recipe.evaluate(trained, _debug_config(trained, "evaluation.quantize=int4"))


@torch.no_grad()
def test_what_was_trained_opens_in_transformers(trained: Path):
    folder = trained / "final"
    stock = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(stock).__name__ == "MarianMTModel"
    texts = ["two green circles", "the small red square is left of the blue ring"]
    batch = tokenizer(texts, text_target=["zwei grüne Kreise", "das"], return_tensors="pt", padding=True)
    target = batch.pop("labels")
    expected = stock(**batch, decoder_input_ids=target).logits
    ours = open_network(folder)
    found = ours(batch.input_ids, target, source_mask=batch.attention_mask.bool()).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    translator = Translator.from_pretrained(folder, device="cpu")
    generated = stock.generate(**tokenizer(texts[1], return_tensors="pt"), max_new_tokens=9)
    assert translator.translate(texts[1], max_new_tokens=9) == tokenizer.decode(generated[0], skip_special_tokens=True)
    assert translator.settings.num_beams == 4


@torch.no_grad()
def test_what_was_trained_converts_to_ctranslate2(trained: Path, tmp_path: Path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    converter = ctranslate2.converters.TransformersConverter(str(trained / "final"))
    converter.convert(str(tmp_path / "converted"))
    engine = ctranslate2.Translator(str(tmp_path / "converted"), device="cpu", compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(trained / "final")
    source = tokenizer("the red square", return_tensors="pt").input_ids
    target = tokenizer(text_target="das rote Quadrat", return_tensors="pt").input_ids
    pieces = [tokenizer.convert_ids_to_tokens(ids[0, :-1].tolist()) for ids in (source, target)]
    found = engine.score_batch([[*pieces[0], "</s>"]], [pieces[1]])[0].log_probs
    network = open_network(trained / "final")
    pad = tokenizer.pad_token_id
    assert not network.decoder.words[pad].any()  # CTranslate2 starts from zeros, and has no entry for the padding
    logits = network(source, torch.cat([torch.tensor([[pad]]), target[:, :-1]], dim=1)).logits[0, :, :pad]
    expected = logits.log_softmax(dim=-1).gather(1, target[0, :, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)


def test_a_broken_run_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lines(folder: Path) -> list[dict]:
        return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(folder / "metrics.jsonl")]

    overrides = ["model.network.dropout_p=0.1", "training.ema_decay=0.9", "training.num_workers=1"]
    recipe.train(_debug_config(tmp_path / "whole", *overrides))
    steps = 0
    loss = recipe.TranslateTask.loss

    def breaks(self, model, batch):
        nonlocal steps
        steps += 1
        if steps == 4:
            raise ZeroDivisionError
        return loss(self, model, batch)

    monkeypatch.setattr(recipe.TranslateTask, "loss", breaks)
    with pytest.raises(ZeroDivisionError):
        recipe.train(_debug_config(tmp_path / "broken", *overrides))
    recipe.train(_debug_config(tmp_path / "broken", *overrides), resume=True)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    whole, broken = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_new_weights_are_a_function_of_the_seed(tmp_path: Path):
    def weights(*overrides: str) -> dict[str, torch.Tensor]:
        return recipe.TranslateTask(_debug_config(tmp_path / "run", *overrides)).model.state_dict()

    before = torch.get_rng_state()
    first, again, other = weights(), weights(), weights("training.seed=1")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_data_worker_that_is_not_forked_makes_the_same_batches(tmp_path: Path):
    task = recipe.TranslateTask(_debug_config(tmp_path / "run"))
    sent = pickle.loads(pickle.dumps(task))
    draws = [(0, 3), (0, 1), (1, 7)]
    ours, theirs = task.collate(draws), sent.collate(draws)
    assert ours.keys() == theirs.keys() == {"source_ids", "source_mask", "target_ids", "labels", "alignment"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert task.count(ours) == int((ours["target_ids"] != task.model.config.pad_token_id).sum()) + 3
    assert task.lengths[3].tolist() == [int(ours["source_mask"][0].sum()), int((ours["labels"][0] >= 0).sum())]
    alike = [draw for draw in draws if (task.lengths[draw[1]] == task.lengths[3]).all()]
    assert "source_mask" not in task.collate(alike)


def test_check_says_what_would_be_trained_and_writes_nothing(tmp_path: Path):
    lines = recipe.check(_debug_config(tmp_path / "run", "examples.max_target_length=15"))
    assert lines[0].startswith("scenes/train: 1")
    assert "too long, left out); vocabulary of 3" in lines[0]
    assert lines[1] == "scenes/validation: 8 pairs for scores (validation)"
    assert lines[-1].startswith("memory of training, float32, one process: about ")
    assert not (tmp_path / "run").exists()


def test_guided_alignment_learns_where_to_look(tmp_path: Path):
    overrides = ["training.max_steps=60", "training.eval_every=0", "training.save_every=0", "data.size=2000"]
    strong = ["examples.guided_alignment_weight=1", "training.batch_tokens=800"]
    result = recipe.train(_debug_config(tmp_path / "run", *overrides, *strong))
    losses = [line["alignment"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl", kind="train")]
    assert losses[-1] < 0.8 * losses[0]
    config = open_network(result.output_dir / "final").config
    assert (config.alignment_layer, config.alignment_heads) == (0, [0])  # the last layer but one, one head


def test_alignment_heads_that_are_named_are_taught(tmp_path: Path):
    named = ["model.alignment_layer=1", "model.alignment_heads=[1,3]"]
    task = recipe.TranslateTask(_debug_config(tmp_path / "run", *named))
    assert (task.model.config.alignment_layer, task.model.config.alignment_heads) == (1, [1, 3])
    plain = recipe.TranslateTask(_debug_config(tmp_path / "run", "examples.guided_alignment_weight=0"))
    assert (plain.model.config.alignment_layer, plain.model.config.alignment_heads) == (None, None)
    assert "alignment" not in plain.collate([(0, 0)])


def test_several_target_languages(tmp_path: Path):
    parts = "[{kind: scenes, size: 90, eval_size: 6}, {kind: scenes, size: 110, eval_size: 6, src_lang: de}]"
    overrides = ["data.kind=parts", f"data.parts={parts}", "training.eval_every=4"]
    whole = ["data.size=100000", "data.eval_size=1000"]  # as if they were not set
    result = recipe.train(_debug_config(tmp_path / "run", *overrides, *whole))
    assert result.metrics.keys() >= {"validation/chrf", "validation/en-de/chrf", "validation/de-en/exact"}
    translator = Translator.from_pretrained(tmp_path / "run" / "final", device="cpu")
    assert translator.languages == ("de", "en")
    assert isinstance(translator.translate("a circle", tgt_lang="de", max_new_tokens=5), str)


def test_cross_attention_only_leaves_every_other_tensor_as_it_was(tmp_path: Path):
    recipe.train(_files_config(tmp_path, "marian", "train_what=cross_attention"))
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    expected = {name for name in after if ".encoder_attn" in name}
    assert changed <= expected
    # A key bias moves no softmax, so its gradient is rounding; everything else has to have moved.
    assert {name for name in expected - changed if not name.endswith("k_proj.bias")} == set()


@pytest.mark.parametrize("kind", ["marian", "nllb"])
def test_lora_opens_on_the_stock_class_and_merged_alike(tmp_path: Path, kind: str):
    languages = ["data.src_lang=eng_Latn", "data.tgt_lang=deu_Latn"] if kind == "nllb" else []
    config = _files_config(tmp_path, kind, "train_what=lora", "lora.rank=2", *languages)
    task = recipe.TranslateTask(config)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    (tmp_path / "out").mkdir()
    task.save(task.model, tmp_path / "out")
    assert len(adapter_state(task.model)) == 2 * 4 * (2 + 2 * 3)  # A and B of q, k, v, out: 2 encoder, 3 decoder layers
    source, target = torch.tensor([[5, 7, 9, 0]]), torch.tensor([[8, 5, 6]])
    inputs = {"input_ids": source, "attention_mask": torch.ones_like(source), "decoder_input_ids": target}
    task.model.eval()
    with torch.no_grad():
        ours = task.model(source, target).logits
        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
        without = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()(**inputs).logits
        merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()(**inputs).logits
    assert (adapted - without).abs().max() > 0.1
    torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)


def test_lora_trains_the_adapters_and_nothing_else(tmp_path: Path):
    result = recipe.train(_files_config(tmp_path, "marian", "train_what=lora", "lora.targets=[up_proj,down_proj]"))
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".fc" in name and name.endswith("weight")}
    assert result.metrics.keys() >= {"validation/chrf"}
    saved = load_file(tmp_path / "run" / "final" / "adapter" / "adapter_model.safetensors")
    assert all(".fc1.lora_" in name or ".fc2.lora_" in name for name in saved)


def test_lora_on_the_table_of_tokens_is_refused(tmp_path: Path):
    config = _files_config(tmp_path, "marian", "train_what=lora", "lora.targets=[words]")
    with pytest.raises(ConfigError, match=r"lora.targets: decoder.embedding.words cannot hold an adapter"):
        recipe.TranslateTask(config)


@pytest.mark.parametrize("kind", ["marian", "two vocabularies", "m2m100"])
def test_all_of_a_stock_checkpoint_trains_and_keeps_its_settings(tmp_path: Path, kind: str):
    languages = ["data.src_lang=english", "data.tgt_lang=german", "data.language_codes={english: en, german: de}"]
    recipe.train(_files_config(tmp_path, kind, *(languages if kind == "m2m100" else [])))
    final = tmp_path / "run" / "final"
    assert json.loads((final / "generation_config.json").read_text())["no_repeat_ngram_size"] == 2
    stock, ours = AutoModelForSeq2SeqLM.from_pretrained(final).eval(), open_network(final)
    source, target = torch.tensor([[5, 7, 9, 0]]), torch.tensor([[8, 5, 6]])
    with torch.no_grad():
        expected = stock(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(ours(source, target).logits, expected, rtol=1e-4, atol=1e-4)
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(final / "model.safetensors")
    assert not torch.equal(before["model.encoder.layers.0.fc1.weight"], after["model.encoder.layers.0.fc1.weight"])


def test_key_value_heads_are_reduced_and_trained_further(trained: Path, tmp_path: Path, capfd):
    heads = [f"model.from_pretrained={trained}", "model.kv_heads.decoder=2"]
    recipe.train(_debug_config(tmp_path / "run", *heads))
    whole, reduced = (Translator.from_pretrained(path / "final", device="cpu") for path in (trained, tmp_path / "run"))
    assert "model of type" not in capfd.readouterr().err  # transformers does not know this form, and need not
    config = reduced.network.config
    assert (config.decoder_kv_heads, config.encoder_kv_heads) == (2, None)
    shapes = {name: tuple(tensor.shape) for name, tensor in reduced.network.state_dict().items()}
    for attention in ("self_attn", "cross_attn"):
        assert shapes[f"decoder.layers.1.{attention}.k_proj.weight"] == (16, 32)
    assert reduced.cache_bytes(7, 11).total * 2 == whole.cache_bytes(7, 11).total
    assert isinstance(reduced.translate("a red circle", max_new_tokens=5), str)


def test_key_value_heads_can_be_made_in_several_ways(trained: Path, tmp_path: Path):
    name = "decoder.layers.0.cross_attn.v_proj.weight"
    old = open_network(trained / "best").state_dict()[name].unflatten(0, (2, 2, 8))

    def converted(how: str) -> torch.Tensor:
        overrides = [f"model.from_pretrained={trained}", "model.kv_heads.decoder=2", f"model.kv_heads.how={how}"]
        network = recipe.TranslateTask(_debug_config(tmp_path / "run", *overrides)).model
        return network.state_dict()[name].unflatten(0, (2, 8))

    torch.testing.assert_close(converted("mean"), old.mean(dim=1))
    assert torch.equal(converted("first"), old[:, 0])
    assert not torch.isclose(converted("svd"), old.mean(dim=1), atol=1e-3).all()
    new = converted("random")
    assert torch.equal(new, converted("random"))
    assert not torch.isclose(new, old[:, 0], atol=1e-3).all()


def test_a_new_tokenizer_beside_a_checkpoint_is_said_not_to_be_made(trained: Path, tmp_path: Path, caplog):
    values = [f"model.from_pretrained={trained}", "model.max_vocab_size=300", "model.tokenizer=bpe"]
    task = recipe.TranslateTask(_debug_config(tmp_path / "run", *values))
    assert f"model.tokenizer, model.max_vocab_size: not used, {trained} is opened as it is" in caplog.text
    assert task.model.config.embed_dim == 32


def test_messages_of_wrong_configs(trained: Path, tmp_path: Path):
    def fails(error: type[Exception], message: str, *overrides: str) -> None:
        with pytest.raises(error, match=message):
            recipe.TranslateTask(_debug_config(tmp_path / "run", *overrides))

    fails(ConfigError, "train_what is 'lore': choose one of all, lora, cross_attention", "train_what=lore")
    fails(ConfigError, "label_smoothing must be at least 0 and below 1, not 1", "examples.label_smoothing=1")
    fails(ConfigError, "set examples.label_smoothing, which is for every", "model.network.label_smoothing=0.1")
    fails(ConfigError, "must not be negative, is -1", "examples.guided_alignment_weight=-1")
    fails(ConfigError, r"a new model's are model\.network\.decoder_kv_heads", "model.kv_heads.decoder=2")
    fails(ConfigError, "a new model has one vocabulary, leave it out", "model.network.target_vocab_size=50")
    opened = f"model.from_pretrained={trained}"
    fails(ConfigError, r"model.kv_heads: .*4 key/value heads, not divisible into 3", opened, "model.kv_heads.decoder=3")
    form = (
        r"^model\.network\.embed_dim is 64, but \S+ has 32: it is for a new model, and model.from_pretrained opens one"
    )
    fails(ConfigError, form, opened, "model.network.embed_dim=64")
    fails(ConfigError, r"^model\.revision: of model.from_pretrained, which is not set", "model.revision=main")
    fails(ConfigError, r"how='last' is unknown", opened, "model.kv_heads.encoder=1", "model.kv_heads.how=last")
    fails(ConfigError, r"alignment_layer 2: there are 2 decoder layers", "model.alignment_layer=2")
    fails(ConfigError, "evaluation.quantize is for `mmattn eval`", "evaluation.quantize=int8")
    long = ["examples.max_source_length=9", "examples.refuse_long=true"]
    fails(DataError, r"pairs are too long, such as scenes/train/", *long)


@pytest.mark.parametrize("key", ["training.mixed_precision", "data.tgt_lang"])  # Norwegian is "no"
def test_a_no_without_quotes_is_not_taken_for_text(tmp_path: Path, key: str):
    with pytest.raises(ConfigError, match=f"'{key}' is a text, and YAML takes .* put it in quotes"):
        _debug_config(tmp_path / "run", f"{key}=no")
    assert _debug_config(tmp_path / "run", f"{key}='no'")


def test_guided_alignment_needs_alignments(tmp_path: Path):
    config = _files_config(tmp_path, "marian", "examples.guided_alignment_weight=0.05")
    with pytest.raises(
        DataError, match=r"guided_alignment_weight=0.05 needs word alignments, and .*pairs.jsonl has none"
    ):
        recipe.TranslateTask(config)
