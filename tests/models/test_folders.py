"""Opening and saving folders: strictness, pickles, shards, hub ids; every refusal by its message."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from mmattn.errors import CheckpointError, ConfigError
from mmattn.models.vlm import VLMConfig, open_network, save_network
from mmattn.nn import CrossAttention, convert_kv_heads, fuse
from tests.models.tiny import pixels, tiny_config, tiny_network, tokens
from tests.parity.blip_stock import save_stock, stock_model

EMBEDDINGS = "text_decoder.bert.embeddings.word_embeddings.weight"
HEAD = "text_decoder.cls.predictions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock BLIP captioning folder."""
    return save_stock(stock_model("captioning"), tmp_path / "stock")


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("task", ["captioning", "question_answering", "matching"])
@torch.no_grad()
def test_our_own_architecture_comes_back_bit_equal(task, tmp_path):
    network = tiny_network(tiny_config(task, cross_attention_every=2, gated=True, tie_word_embeddings=False))
    save_network(network, tmp_path)
    again = open_network(tmp_path)
    assert not again.training
    assert again.config == network.config
    expected = network.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mmattn_vlm"
    if task == "captioning":
        assert torch.equal(again(pixels(2), tokens(4, 7)).logits, network(pixels(2), tokens(4, 7)).logits)


def test_an_opened_network_can_be_trained(tmp_path):
    save_network(tiny_network(tiny_config()), tmp_path)
    network = open_network(tmp_path).train()
    network(pixels(2), tokens(2, 7), labels=tokens(2, 7)).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_missing_extra_and_mis_shaped_tensors_are_listed_in_one_line(folder):
    def change(tensors):
        del tensors["vision_model.post_layernorm.bias"]
        tensors["text_decoder.surprise"] = torch.zeros(3)
        tensors[EMBEDDINGS] = torch.zeros(60, 33)

    _edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_network(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "1 missing: vision_model.post_layernorm.bias" in message
    assert "1 not known: text_decoder.surprise" in message
    assert f"1 of another shape: {EMBEDDINGS} is [60, 33], not [59, 33]" in message


def test_long_lists_are_counted(folder):
    _edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1" in name])
    with pytest.raises(CheckpointError, match=r"12 missing: .* and 6 more$"):
        open_network(folder)


def test_derivable_tensors_may_be_there(folder):
    def change(tensors):
        tensors["text_decoder.bert.embeddings.position_ids"] = torch.arange(29)[None]
        tensors[f"{HEAD}.decoder.weight"] = tensors[EMBEDDINGS].clone()
        tensors[f"{HEAD}.decoder.bias"] = tensors[f"{HEAD}.bias"].clone()

    before = open_network(folder).state_dict()
    _edit(folder, change)
    after = open_network(folder)
    assert after.config.text.tie_word_embeddings
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.state_dict().items())


def test_a_tied_tensor_may_stand_for_its_source(folder):
    before = open_network(folder).state_dict()
    _edit(folder, lambda tensors: tensors.update({f"{HEAD}.decoder.weight": tensors.pop(EMBEDDINGS)}))
    after = open_network(folder).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_tied_tensors_that_differ_are_kept_apart_as_stock_does(folder, caplog):
    def change(tensors):
        tensors[f"{HEAD}.decoder.weight"] = tensors[EMBEDDINGS] + 1
        tensors[f"{HEAD}.decoder.bias"] = tensors[f"{HEAD}.bias"].clone()

    _edit(folder, change)
    network = open_network(folder)
    assert "so they are not tied" in caplog.text
    assert torch.equal(network.decoder.head.weight, network.decoder.body.embedding.words.weight + 1)


def test_a_pickle_of_tensors_is_announced(folder, caplog):
    expected = open_network(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        network = open_network(folder)
    assert "pytorch_model.bin is a pickle, not safetensors" in caplog.text
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


class _Code:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


@pytest.mark.parametrize("how", ["torch", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(folder, how, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    if how == "torch":
        torch.save({"weight": _Code()}, "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": _Code()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: this pickle holds more than tensors .* refused"):
        open_network(folder)
    assert not (folder / "code-was-run").exists()


def test_a_pickle_of_something_else_is_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a table of tensors by name"):
        open_network(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\xff" * 64, "model.safetensors: damaged, not readable as safetensors"),
        ("config.json", b"{", "config.json: damaged, not readable as JSON"),
        ("config.json", b"[]", "a JSON object was expected, not list"),
        ("config.json", b'{"model_type": "marian"}', "model_type marian is not a vision-language model"),
        ("config.json", b'{"model_type": "blip"}', "no class is not supported, only BlipForConditionalGeneration"),
        ("config.json", b'{"model_type": "mmattn_vlm", "tsak": 1}', "no such field: tsak"),
        (
            "config.json",
            b'{"model_type": "mmattn_vlm", "text": {"embed_dim": "wide"}}',
            "text.embed_dim is 'wide', it must be int",
        ),
    ],
)
def test_damaged_files_are_named(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_network(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_truncated_pickle_is_named(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    content = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        open_network(folder)


def _edit_config(folder: Path, part: str, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config[part].update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_config", {"hidden_act": "quick_gelu"}, "hidden_act quick_gelu is not supported"),
        ("vision_config", {"image_size": [35, 42]}, r"image_size \[35, 42\] is not square"),
        ("text_config", {"sep_token_id": None}, "text sep_token_id is None, one token id is needed"),
        ("text_config", {"vocab_size": "many"}, "not a BLIP config"),
    ],
)
def test_options_that_these_networks_lack_are_refused(folder, part, values, message):
    _edit_config(folder, part, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_network(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_are_read_through_their_index(folder, form):
    expected = open_network(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if form == "safetensors" else "pytorch_model"
    shards = [f"{stem}-0000{part}-of-00002.{form}" for part in (1, 2)]
    weight_map = {name: shards[index % 2] for index, name in enumerate(tensors)}
    for shard in shards:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        if form == "safetensors":
            save_file(part, folder / shard)
        else:
            torch.save(part, folder / shard)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in open_network(folder).state_dict().items())
    (folder / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"names files that are missing: {shards[1]}"):
        open_network(folder)


def test_a_variant_is_opened_by_name(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights, looked for model\.safetensors"):
        open_network(folder)
    open_network(folder, variant="fp16")


def test_places_that_hold_nothing_get_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="no such folder: ./nowhere"):
        open_network("./nowhere")
    with pytest.raises(CheckpointError, match="no such folder: a/b/c"):
        open_network("a/b/c")
    with pytest.raises(CheckpointError, match="someone/something at revision v9: neither a folder nor found in the"):
        open_network("someone/something", revision="v9", local_files_only=True)
    with pytest.raises(CheckpointError, match="not a valid name!: neither a folder nor found"):
        open_network("not a valid name!", local_files_only=True)
    with pytest.raises(CheckpointError, match=r"no config\.json, so this is not a model folder"):
        open_network(tmp_path)


def test_a_hub_id_is_opened_from_the_cache(tmp_path, monkeypatch):
    stock = stock_model("captioning")
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/models--someone--something"
    save_stock(stock, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    network = open_network("someone/something", local_files_only=True)
    assert torch.equal(network.decoder.body.embedding.words.weight, stock.get_input_embeddings().weight)
    assert open_network("someone/something", revision=commit, local_files_only=True).config == network.config


def _as_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_one_form_of_the_weights_is_downloaded(folder, tmp_path, monkeypatch, sharded):
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    if sharded:
        _as_shards(folder)
    snapshot, asked = tmp_path / "c0ffee", []

    def download(repo_id, name, *, revision, token, local_files_only):
        assert (repo_id, revision, token, local_files_only) == ("someone/something", "c0ffee", "secret", False)
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        asked.append(name)
        return str(shutil.copy(folder / name, snapshot / name))

    def small_files(repo_id, *, revision, allow_patterns, token, local_files_only):
        assert revision == "main"
        snapshot.mkdir()
        for path in folder.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr("mmattn.models.sources.hf_hub_download", download)
    monkeypatch.setattr("mmattn.models.sources.snapshot_download", small_files)
    open_network("someone/something", revision="main", token="secret")
    shards = ["model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors"]
    assert asked == (shards if sharded else ["model.safetensors"])


def test_a_hub_that_cannot_be_reached_is_said(tmp_path, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise LocalEntryNotFoundError("cannot connect")

    monkeypatch.setattr("mmattn.models.sources.hf_hub_download", unreachable)
    monkeypatch.setattr("mmattn.models.sources.snapshot_download", lambda *_args, **_kwargs: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"on the hub \(or the hub cannot be reached\)"):
        open_network("someone/something")


@torch.no_grad()
def test_a_fused_network_decodes_and_saves_as_before(tmp_path):
    network, bos = tiny_network(tiny_config()), tokens(2, 3)
    save_network(network, tmp_path / "before")

    def first_logits():
        return network.start(network.project_context(network.encode_images(pixels(2))), max_length=5).logits(bos)

    expected = first_logits()
    fuse(network)
    torch.testing.assert_close(first_logits(), expected)
    save_network(network, tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_dtypes_are_said_by_name(folder):
    assert open_network(folder, dtype="bfloat16").image.norm.weight.dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype 'float31' is unknown"):
        open_network(folder, dtype="float31")


def test_a_network_with_adapters_is_not_saved(tmp_path):
    network = tiny_network(tiny_config())
    network.decoder.body.layers[0].ffn.up_proj = nn.Sequential(network.decoder.body.layers[0].ffn.up_proj)
    with pytest.raises(CheckpointError, match=r"merge or remove adapters first: 2 not in the format: .*up_proj\.0\."):
        save_network(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converted_heads_are_saved_when_the_config_says_so(tmp_path):
    network = tiny_network(tiny_config())
    convert_kv_heads(network.decoder, 1)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is \[11, 33\], its config says \[33, 33\]"):
        save_network(network, tmp_path)
    network.config.text.num_kv_heads = 1
    save_network(network, tmp_path)
    again = open_network(tmp_path)
    assert {m.num_kv_heads for m in again.decoder.modules() if isinstance(m, CrossAttention)} == {1}


def test_a_full_disk_is_one_clear_line_and_leaves_the_old_files(tmp_path, monkeypatch):
    network = tiny_network(tiny_config())
    save_network(network, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmattn.models.checkpoints.save_file", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        save_network(network, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_config_dicts_come_back():
    config = tiny_config(cross_attention_every=2, gated=True)
    assert VLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
