"""The diffusion recipe from a config to what opens: scenes from scratch, Stable Diffusion fine-tuned."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open

from mmattn.config import load_config, load_recipe
from mmattn.errors import ConfigError, UsageError
from mmattn.inference.text_to_image import TextToImage
from mmattn.training.metrics import read_metrics
from tests.inference.tiny_pipelines import stable_diffusion, stable_diffusion_xl

recipe = load_recipe("diffusion")
FEW = ["evaluation.limit=3", "evaluation.num_inference_steps=2", "evaluation.sample_columns=1"]
SHORT = ["training.max_steps=2", "training.batch_size=2", "training.num_workers=0", "training.eval_every=2"]
WORDS = ["a red circle", "a green star and so on", "blue square below"]


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six pictures of two shapes with captions."""
    folder, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    rows = []
    for number in range(6):
        size = ((40, 61), (67, 37))[number % 2]
        Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": WORDS[number % 3]})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _config(name: str, sd: Path, photos: Path, out: Path, *overrides: str):
    values = [
        f"model.from_pretrained={sd}",
        f"data.path={photos / 'captions.jsonl'}",
        f"training.output_dir={out}",
        "pictures.resolution=32",
        "pictures.step=8",
        "training.micro_batch_size=1",
        "training.save_every=0",
        "training.warmup_steps=0",
        "training.learning_rate=1e-2",
        "training.device=cpu",
    ]
    return load_config(recipe.Config, name, [*values, *FEW, *SHORT, *overrides])


def test_debug_config_trains_scores_and_draws(tmp_path):
    config = load_config(recipe.Config, "diffusion/debug", [f"training.output_dir={tmp_path / 'run'}", *FEW, *SHORT])
    result = recipe.train(config)
    assert len(result.losses) == 2
    assert {"validation/loss", "validation/1_object/guidance_5/both"} <= result.metrics.keys()
    assert Image.open(tmp_path / "run" / "samples" / "step-00000002-grid.png").width > 32
    scores = recipe.evaluate(tmp_path / "run", config)
    assert (
        scores["validation/2_object/guidance_5/relation"] == result.metrics["validation/2_object/guidance_5/relation"]
    )
    pictures = TextToImage.from_pretrained(tmp_path / "run" / "final").generate("a red circle", num_inference_steps=2)
    assert pictures[0].size == (32, 32)


def test_new_weights_are_a_function_of_the_seed():
    def weights(*overrides: str) -> dict[str, torch.Tensor]:
        return recipe.DiffusionTask(load_config(recipe.Config, "diffusion/debug", overrides)).model.state_dict()

    before = torch.get_rng_state()
    first, again, other = weights(), weights(), weights("training.seed=1")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_check_says_what_would_be_trained_and_writes_nothing(sd, photos, tmp_path):
    lines = recipe.check(_config("diffusion/finetune-sd-lora", sd, photos, tmp_path / "run", "pictures.buckets=false"))
    assert "training lora" in lines[0]
    assert "  caption: 'a red circle'" in lines
    assert lines[-1].startswith("memory of training, float32, one process: about ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_xl", [False, True])
def test_lora_file_opens_in_stock_diffusers(sd, photos, tmp_path, is_xl):
    if is_xl:
        sd = tmp_path / "xl"
        stable_diffusion_xl().save_pretrained(sd)
    config = _config("diffusion/finetune-sd-lora", sd, photos, tmp_path / "run", "training.max_steps=3")
    result = recipe.train(config)
    assert result.metrics["validation/loss"] > 0
    final = tmp_path / "run" / "final"
    assert [path.name for path in final.iterdir()] == ["pytorch_lora_weights.safetensors"]
    stock = (StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline).from_pretrained(sd)
    stock.set_progress_bar_config(disable=True)
    before = _picture(stock)
    stock.load_lora_weights(final)
    assert np.abs(_picture(stock) - before).max() > 1e-3
    scores = recipe.evaluate(tmp_path / "run", config)
    assert scores == pytest.approx({"validation/loss": result.metrics["validation/loss"]}, rel=1e-4)
    # On other data the model is still the run's.
    other = _config("diffusion/finetune-sd-lora", tmp_path / "nowhere", photos, tmp_path / "x", "train_what=all")
    assert recipe.evaluate(tmp_path / "run", other) == pytest.approx(scores, rel=1e-4)


def _picture(pipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipeline(WORDS[0], num_inference_steps=2, generator=generator, output_type="np").images[0]


def test_keys_and_values_with_a_new_token(sd, photos, tmp_path):
    captions = (photos / "captions.jsonl").read_text().replace("circle", "<new1> circle")
    (photos / "subject.jsonl").write_text(captions)
    overrides = [f"data.path={photos / 'subject.jsonl'}", "new_token.initializer=circle"]
    overrides += ["evaluation.sample_prompts=[a red <new1> circle]", "training.max_steps=3"]
    # A split for scores need not have the token.
    overrides += [f"data.eval_path={photos / 'captions.jsonl'}", "evaluation.splits=[validation]"]
    recipe.train(_config("diffusion/finetune-sd-kv", sd, photos, tmp_path / "run", *overrides))
    final = tmp_path / "run" / "final"
    assert sorted(path.name for path in final.iterdir()) == [
        "<new1>.safetensors",
        "pytorch_custom_diffusion_weights.safetensors",
    ]
    stock = StableDiffusionPipeline.from_pretrained(sd)
    stock.set_progress_bar_config(disable=True)
    before = _picture(stock)
    start = stock.text_encoder.get_input_embeddings().weight[stock.tokenizer.convert_tokens_to_ids("▁circle")].clone()
    stock.unet.load_attn_procs(final, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=stock)
    assert np.abs(_picture(stock) - before).max() > 1e-3
    with safe_open(final / "<new1>.safetensors", "pt") as file:
        learned = file.get_tensor("<new1>")
    assert (learned.flatten() - start).abs().max() > 1e-3
    stock.load_textual_inversion(final, weight_name="<new1>.safetensors", token="<new1>")


def test_all_of_stable_diffusion_is_saved_as_a_stock_folder(sd, photos, tmp_path):
    config = _config(
        "diffusion/finetune-sd-lora", sd, photos, tmp_path / "run", "train_what=all", "cache.latents=false"
    )
    recipe.train(config)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    old = StableDiffusionPipeline.from_pretrained(sd)
    assert type(stock.unet).__module__.startswith("diffusers.")
    changed = [
        name for name, weight in stock.unet.state_dict().items() if not torch.equal(weight, old.unet.state_dict()[name])
    ]
    assert len(changed) > 100
    assert all(torch.equal(stock.vae.state_dict()[name], weight) for name, weight in old.vae.state_dict().items())


def test_cached_latents_and_texts_change_nothing(sd, photos, tmp_path):
    def losses(name: str, *overrides: str) -> list[float]:
        config = _config("diffusion/finetune-sd-lora", sd, photos, tmp_path / name, "training.eval_every=0", *overrides)
        return recipe.train(config).losses

    assert losses("cached") == pytest.approx(losses("encoded", "cache.latents=false"), rel=1e-5)


def test_buckets_group_pictures_of_one_shape(sd, photos, tmp_path):
    config = _config("diffusion/finetune-sd-lora", sd, photos, tmp_path / "run", "training.batch_size=1")
    task = recipe.DiffusionTask(config)
    assert task.groups is not None
    assert len(set(task.groups.tolist())) == 2
    assert "2 buckets" in task.describe()


def test_a_killed_run_equals_an_unbroken_one(tmp_path):
    def run(name: str, *overrides: str, resume: bool = False):
        values = [f"training.output_dir={tmp_path / name}", "training.save_every=2", "training.eval_every=0"]
        values += ["training.batch_size=3", "noise.offset_noise=0.1", "loss.min_snr_gamma=5"]
        return recipe.train(load_config(recipe.Config, "diffusion/debug", [*values, *overrides]), resume=resume)

    run("whole", "training.max_steps=4")
    run("broken", "training.max_steps=4")
    (tmp_path / "broken" / "checkpoints" / "step-00000004" / "manifest.json").unlink()
    run("broken", "training.max_steps=4", resume=True)
    losses = [
        [(line["step"], line["loss"]) for line in read_metrics(tmp_path / name / "metrics.jsonl", kind="train")]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]
    first, second = (
        (tmp_path / name / "final" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
        for name in ("whole", "broken")
    )
    assert first == second


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.scheduler=nonsense"], "scheduler 'nonsense' is unknown"),
        (["evaluation.guidance_scales=[0.5]"], "guidance_scale"),
        (["evaluation.num_inference_steps=2000"], "2000"),
    ],
)
def test_an_evaluation_that_must_fail_is_found_before_training(overrides, message, tmp_path):
    settings = [f"training.output_dir={tmp_path / 'run'}", *overrides]
    with pytest.raises(UsageError, match=message):
        recipe.train(load_config(recipe.Config, "diffusion/debug", settings))
    assert not (tmp_path / "run").exists()


def test_nothing_to_score_is_said(sd, photos, tmp_path):
    config = _config("diffusion/finetune-sd-lora", sd, photos, tmp_path / "run", "evaluation.splits=[]")
    recipe.train(config)
    with pytest.raises(UsageError, match="nothing to score: evaluation.splits is empty"):
        recipe.evaluate(tmp_path / "run", config)
    # A run's own config that cannot be read is said, not passed over for another.
    own = sorted((tmp_path / "run").glob("checkpoints/step-*/config.yaml"))[-1]
    own.write_text("recipe: diffusion\ndata: 3\n")
    with pytest.raises(ConfigError, match="'data' is a section"):
        recipe.evaluate(tmp_path / "run", config)


def test_a_trained_text_encoder_is_saved_and_what_it_does_not_use_stays(tmp_path):
    config = load_config(recipe.Config, "diffusion/debug", [f"training.output_dir={tmp_path / 'run'}"])
    encoder = recipe.DiffusionTask(config).model.text_encoder
    assert encoder is not None
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_workers_get_no_model():
    task = recipe.DiffusionTask(load_config(recipe.Config, "diffusion/debug"))
    size = sum(parameter.nbytes for parameter in task.model.text_encoder.parameters())
    sent = pickle.dumps(task)
    assert len(sent) < size / 2
    draws = [(0, 3), (1, 5)]
    batch, again = task.collate(draws), pickle.loads(sent).collate(draws)
    assert all(torch.equal(batch[name], again[name]) for name in batch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train_what=lora"], "train_what=lora needs a model to start from"),
        (["train_what=some"], "choose one of all, lora, cross_attention_kv"),
        (["pictures.resolution=34", "model.from_pretrained=x"], "model.unet: for a new model"),
        (["model.unet.attention=[true]"], "model.unet.attention has 1 entries and block_out_channels 2"),
        (["model.image_size=30", "pictures.resolution=30"], "model.image_size 30 must be a multiple of 8"),
        (["model.schedule.prediction_type=x"], "prediction_type 'x' is unknown"),
        (["model.schedule.beta_schedule=x"], "beta_schedule 'x' is unknown"),
        (
            ["model.schedule.zero_terminal_snr=true", "model.schedule.prediction_type=epsilon"],
            "needs prediction_type v",
        ),
        (["new_token.token=<new1>"], "new_token.token is for train_what=cross_attention_kv"),
        (["evaluation.splits=[nothing]"], "unknown split 'nothing'"),
        (["evaluation.guidance_scales=[-1]"], "guidance_scales must be numbers of 0 or more"),
        (["loss.min_snr_gamma=-5"], "loss.min_snr_gamma must be positive or null, not -5"),
        (["loss.caption_dropout=2"], "loss.caption_dropout must lie between 0 and 1"),
        (["pictures.resolution=64"], "pictures.resolution 64 is what is trained on, and model.image_size 32"),
        (["model.image_size=64", "model.from_pretrained=x"], "model.image_size, model.pixel_unshuffle, "),
        (["model.schedule.prediction_type=epsilon", "model.from_pretrained=x"], "model.schedule: for a new model"),
    ],
)
def test_bad_settings_are_refused_in_one_line(overrides, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        recipe.train(
            load_config(recipe.Config, "diffusion/debug", [f"training.output_dir={tmp_path / 'run'}", *overrides])
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
