"""Teach a model of scenes a word by keys and values of its cross-attention and one new token.

    python scripts/accept/scenes_kv.py MODEL_RUN WORK_FOLDER

The word stands for a pair of colour and shape that the model's training never showed, the one it draws worst: 100
pictures of the pair with the word among 900 others. Prints one JSON line: accuracy on the word, on the pair's own words
and on pairs of training, before and after, and which tensors have changed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from mmattn.data.scenes import HELD_OUT_PAIRS, SceneDataset
from mmattn.data.scenes.checker import check_caption
from mmattn.data.scenes.layout import TRAINED_PAIRS
from mmattn.inference.diffusion.pipeline_folder import open_pipeline
from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.trained import trained_model
from mmattn.models.unet.kv_file import WEIGHTS_FILE, cross_attention_kv_names

GUIDANCE, STEPS = 2.0, 25
OF_PAIR, OTHERS = 100, 900
SCORED = 60  # pictures of the pair
WORD = "<new1>"

Pair = tuple[str, str]


def opened(base: Path) -> TextToImage:
    """The model in float32 on the CPU, where weights and predictions can be compared exactly."""
    return TextToImage.from_pretrained(base, dtype=torch.float32, device="cpu")


def accuracy(
    model: TextToImage, pairs: Sequence[Pair], each: int, first_seed: int = 1000, phrase: str | None = None
) -> float:
    """Share of pictures with the colour and shape of a pair, which captions name by `phrase` or else by its words."""
    sizes = [("small", "large")[seed % 2] for seed in range(each)]
    truths = [f"a {size} {color} {shape}" for color, shape in pairs for size in sizes]
    prompts = truths if phrase is None else [f"a {size} {phrase}" for _ in pairs for size in sizes]
    seeds = list(range(first_seed, first_seed + each)) * len(pairs)
    drawn = model.generate(
        prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seed=seeds, batch_size=50, progress=False
    )
    verdicts = [check_caption(np.asarray(picture), truth) for picture, truth in zip(drawn, truths, strict=True)]
    return float(np.mean([verdict.shapes for verdict in verdicts]))


def write_pictures(folder: Path, pair: Pair) -> Path:
    """Pictures and captions: one object of the pair, named by the word, and the training's own scenes."""
    folder.mkdir(parents=True)
    taught = SceneDataset("heldout", 40 * OF_PAIR, seed=7, max_objects=1)
    scenes = taught.scenes(range(len(taught)))
    chosen = [index for index, scene in enumerate(scenes) if scene.objects[0].pair == pair]
    records = taught.records(chosen[:OF_PAIR]) + SceneDataset("train", OTHERS, seed=7).records(range(OTHERS))
    own_words = " ".join(pair)
    rows = []
    for number, record in enumerate(records):
        Image.fromarray(record.image).save(folder / f"{number}.png")
        text = record.texts[0].text.replace(own_words, WORD)
        rows.append(json.dumps({"image": f"{number}.png", "text": text}))
    file = folder / "captions.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def train(base: Path, work: Path, pair: Pair) -> Path:
    """`mmattn train diffusion/finetune-sd-kv`; the folder with the files of keys, values and word."""
    captions = write_pictures(work / "pictures", pair)
    overrides = [
        f"model.from_pretrained={base}",
        "training.activation_checkpointing=false",
        f"data.path={captions}",
        f"new_token.token={WORD}",
        f"new_token.initializer={pair[1]}",
        "pictures.resolution=32",
        "pictures.flip=false",
        "loss.caption_dropout=0.1",
        "evaluation.sample_prompts=[]",
        f"training.output_dir={work / 'run'}",
        "training.max_steps=200",
        "training.batch_size=64",
        "training.micro_batch_size=null",
        "training.learning_rate=2e-3",
        "training.weight_decay=0",
        "training.warmup_steps=20",
        "training.schedule=cosine",
        "training.eval_every=0",
        "training.num_workers=0",
        "noise.timestep_sampling=logit_normal",
    ]
    mmattn = Path(sys.executable).with_name("mmattn")
    subprocess.run([mmattn, "train", "diffusion/finetune-sd-kv", *overrides], check=True)
    return work / "run" / "final"


def scores(base: Path, before: TextToImage, taught: TextToImage, file: Path, pair: Pair) -> dict[str, float]:
    """What has become better and worse."""
    only_word = opened(base)
    only_word.pipeline.load_textual_inversion(str(file), weight_name=f"{WORD}.safetensors", token=WORD)
    return {
        # Before, a model does not know the word: it is told what the word starts as, the shape without its colour.
        "word_before": accuracy(before, [pair], SCORED, phrase=pair[1]),
        "word_alone": accuracy(only_word, [pair], SCORED, phrase=WORD),
        "word_after": accuracy(taught, [pair], SCORED, phrase=WORD),
        "pair_before": accuracy(before, [pair], SCORED),
        "pair_after": accuracy(taught, [pair], SCORED),
        "old_before": accuracy(before, TRAINED_PAIRS, 8),
        "old_after": accuracy(taught, TRAINED_PAIRS, 8),
    }


def changes(model: TextToImage, taught: TextToImage, file: Path) -> dict[str, str | bool]:
    """Which tensors differ from those before, and what the file holds."""
    before, after = model.pipeline.unet.state_dict(), taught.pipeline.unet.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    named = set(cross_attention_kv_names(model.pipeline.unet))
    with safe_open(file, "pt") as opened:
        held = [name for name in opened.keys() if opened.get_slice(name).get_shape() != [0]]  # noqa: SIM118
    is_exact = changed == named and len(held) == len(named)
    return {
        "changed": f"{len(changed)} of {len(before)}",
        "named": str(len(named)),
        "held": str(len(held)),
        "is_exact": is_exact,
    }


@torch.no_grad()
def difference(base: Path, taught: TextToImage, file: Path) -> float:
    """Largest difference of predictions by a stock U-Net with the file opened by diffusers."""
    pipeline = open_pipeline(base, dtype=torch.float32, device="cpu")
    stock = UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval()
    pipeline.unet = stock
    stock.load_attn_procs(file, weight_name=WEIGHTS_FILE, _pipeline=pipeline)
    draws = torch.Generator().manual_seed(0)
    side = stock.config.sample_size
    noisy = torch.randn(3, stock.config.in_channels, side, side, generator=draws)
    text = torch.randn(3, 7, stock.config.cross_attention_dim, generator=draws)
    ours = taught.pipeline.unet
    return float((ours(noisy, 400, text).sample - stock(noisy, 400, text).sample).abs().max())


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="MODEL_RUN")
    parser.add_argument("work", type=Path, metavar="WORK_FOLDER")
    options = parser.parse_args()
    run, work = options.run, options.work
    shutil.rmtree(work, ignore_errors=True)
    base = trained_model(run)
    model = opened(base)
    by_pair = {pair: accuracy(model, [pair], 20, first_seed=0) for pair in sorted(HELD_OUT_PAIRS)}
    pair = min(by_pair, key=lambda pair: by_pair[pair])
    file = train(base, work, pair)
    taught = opened(base)
    taught.load_cross_attention_kv(file)
    figures = {
        "pair": " ".join(pair),
        **scores(base, model, taught, file, pair),
        **changes(model, taught, file / WEIGHTS_FILE),
        "difference": difference(base, taught, file),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
