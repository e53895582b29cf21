"""The vision-language recipe from a config to a folder that opens: scenes from scratch, and a stock BLIP fine-tuned."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration

from mmattn.config import load_config, load_recipe
from mmattn.errors import ConfigError, DataError
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.training.selection import adapter_state
from tests.inference.tiny_models import pictures, save_stock

recipe = load_recipe("vlm")


def _blip_config(folder: Path, *overrides: str):
    """`vlm/finetune-blip` on five noise pictures and a tiny BLIP with random weights."""
    rows = []
    for number, picture in enumerate(pictures(5)):
        picture.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": ["a picture of red cat", "blue square"][number % 2]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_stock(folder / "blip", "captioning")
    return load_config(
        recipe.Config,
        "vlm/finetune-blip",
        [
            f"data.path={folder / 'captions.jsonl'}",
            "data.eval_fraction=0.4",
            f"model.from_pretrained={folder / 'blip'}",
            f"training.output_dir={folder / 'run'}",
            *["training.max_steps=3", "training.batch_size=2", "training.micro_batch_size=1", "training.num_workers=0"],
            *["training.eval_every=3", "training.warmup_steps=0", "training.learning_rate=1e-2"],
            *overrides,
        ],
    )


def test_debug_config_trains_and_evaluates(tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}", "training.max_steps=4", "training.eval_every=2"]
    config = load_config(recipe.Config, "vlm/debug", [*overrides, "data.eval_size=8", "examples.token_dropout=0.3"])
    result = recipe.train(config)
    assert result.step == 4
    assert len(result.losses) == 4
    assert "validation/answers" in result.metrics
    scores = recipe.evaluate(tmp_path / "run", config)
    assert scores.keys() >= {"validation/answers", "validation/answers/blind", "validation/relation_check"}
    vlm = VisionLanguageModel.from_pretrained(tmp_path / "run" / "final")
    assert isinstance(vlm.caption(pictures(1)[0], max_new_tokens=5), str)


def test_new_weights_are_a_function_of_the_seed():
    def weights(*overrides: str) -> dict[str, torch.Tensor]:
        return recipe.VLMTask(load_config(recipe.Config, "vlm/debug", overrides)).model.state_dict()

    before = torch.get_rng_state()
    first, again, other = weights(), weights(), weights("training.seed=1")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_check_says_what_would_be_trained_and_writes_nothing(tmp_path):
    overrides = [f"training.output_dir={tmp_path / 'run'}", "data.eval_size=1"]
    lines = recipe.check(load_config(recipe.Config, "vlm/debug", overrides))
    assert lines[0].startswith("scenes/train: 400 pictures; training all: 32,")
    assert lines[1] == "scenes/validation: 1 picture for scores"
    assert lines[-1].startswith("memory of training, float32, one process: about ")
    assert not (tmp_path / "run").exists()


def test_cross_attention_only_leaves_every_other_tensor_as_it_was(tmp_path):
    config = _blip_config(tmp_path)
    recipe.train(config)
    before = load_file(tmp_path / "blip" / "model.safetensors")
    after = load_file(tmp_path / "run" / "final" / "model.safetensors")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".crossattention." in name for name in changed)
    expected = {name for name in after if ".crossattention." in name}
    # A key bias moves no softmax, so its gradient is rounding; everything else has to have moved.
    assert {name for name in expected - changed if not name.endswith("key.bias")} == set()


def test_lora_opens_on_the_stock_class_and_merged_alike(tmp_path):
    config = _blip_config(tmp_path, "train_what=lora", "lora.rank=2")
    task = recipe.VLMTask(config)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    (tmp_path / "out").mkdir()
    task.save(task.model, tmp_path / "out")
    assert len(adapter_state(task.model)) == 2 * 2 * 8  # A and B, two layers, four projections of two attentions
    inputs = {"pixel_values": torch.randn(1, 3, 24, 24), "input_ids": torch.tensor([[5, 7, 9, 11]])}
    task.model.eval()
    with torch.no_grad():
        ours = task.model(**inputs).logits
        base = BlipForConditionalGeneration.from_pretrained(tmp_path / "blip").eval()
        without = base(**inputs).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()(**inputs).logits
        merged = BlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()(**inputs).logits
    assert (adapted - without).abs().max() > 0.1
    torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)


def test_lora_on_joined_weights_is_refused_before_training(tmp_path):
    config = _blip_config(tmp_path, "train_what=lora", "lora.targets=[q_proj]")
    with pytest.raises(ConfigError, match=r"lora.targets: image\.layers.*joined with others in the stock checkpoint"):
        recipe.VLMTask(config)


def test_all_of_blip_trains_and_opens_in_transformers(tmp_path):
    recipe.train(_blip_config(tmp_path, "train_what=all", "examples.prompt=a picture of"))
    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "run" / "final")
    before = load_file(tmp_path / "blip" / "model.safetensors")
    state = model.state_dict()
    assert not torch.equal(before["vision_model.post_layernorm.weight"], state["vision_model.post_layernorm.weight"])


def test_a_question_checkpoint_is_refused(tmp_path):
    config = _blip_config(tmp_path)
    config.model.from_pretrained = str(save_stock(tmp_path / "vqa", "question_answering"))
    with pytest.raises(
        ConfigError, match="this recipe trains captioning checkpoints, and that is one for question_answ"
    ):
        recipe.VLMTask(config)


def test_messages_of_wrong_configs(tmp_path):
    with pytest.raises(ConfigError, match="train_what is 'lore': choose one of all, lora, cross_attention"):
        load_config(recipe.Config, "vlm/debug", ["train_what=lore"])
    with pytest.raises(DataError, match=r"captions.jsonl"):
        recipe.VLMTask(load_config(recipe.Config, "vlm/finetune-blip", ["data.path=no/captions.jsonl"]))
