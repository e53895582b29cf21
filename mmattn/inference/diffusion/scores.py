"""How good a text-to-image model is: on scenes what its pictures show, elsewhere denoising loss, FID, CLIP score."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmattn._optional import require
from mmattn.data.captions import captions_of, require_captions
from mmattn.data.picture_fit import fit_picture
from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextSource, TextItem, read_texts
from mmattn.data.scenes import SceneDataset
from mmattn.data.scenes.checker import Verdict, check_caption, parse_caption
from mmattn.data.spec import SPLITS, DataConfig
from mmattn.errors import ConfigError, RunError
from mmattn.inference.diffusion.checks import check_guidance, check_steps
from mmattn.inference.diffusion.data import DiffusionData
from mmattn.inference.diffusion.denoising import DenoisingLoss
from mmattn.inference.diffusion.picture_grid import picture_grid
from mmattn.inference.diffusion.schedulers import check_seeded, make_scheduler
from mmattn.inference.text_to_image import TextToImage

_DRAWN_AT_ONCE = 64


@dataclass
class EvalConfig:
    """What is scored, during training and by `mmattn eval`, and which pictures are drawn to be looked at.

    Args:
        splits: Splits of the data whose captions are drawn (scenes), or whose pictures are denoised: "validation",
            "test", "train"; scenes also have "heldout".
        limit: Captions of each kind (pictures, for the loss) at most.
        objects: scenes: captions with so many objects are scored, each number by itself.
        guidance_scales: Pictures are drawn and scored at each. Empty: at the scale that is the model's own.
        num_inference_steps: Denoising steps of a picture.
        scheduler: Name of another scheduler than the model's, such as "ddim" or "dpm++". None: the model's.
        loss: Denoising loss on the split's pictures, with the same noise every time.
        fid: Frechet Inception Distance of the drawn pictures to the split's (torchmetrics; downloads its network). It
            means something from some thousands of pictures on: raise `limit`.
        clip_score: CLIP model, hub id or folder, that compares the drawn pictures with their captions (torchmetrics).
            None: no such score.
        best: The metric that chooses the best checkpoint, such as "heldout/1_object/guidance_5/both" or
            "validation/loss"; None keeps none.
        sample_prompts: Drawn at each evaluation, always from the same seeds, into `samples/`. Empty: the first captions
            of the first split.
        sample_columns: Pictures of each prompt; 0 draws none.
    """

    splits: list[str] = field(default_factory=lambda: ["validation"])
    limit: int = 200
    objects: list[int] = field(default_factory=lambda: [1, 2])
    guidance_scales: list[float] = field(default_factory=list)
    num_inference_steps: int = 25
    scheduler: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    loss: bool = True
    fid: bool = False
    clip_score: Optional[str] = None  # noqa: UP045
    best: Optional[str] = None  # noqa: UP045
    sample_prompts: list[str] = field(default_factory=list)
    sample_columns: int = 4

    def __post_init__(self) -> None:
        unknown = [split for split in self.splits if split not in SPLITS]
        if unknown:
            raise ConfigError(f"evaluation.splits: unknown split {unknown[0]!r}: use {', '.join(SPLITS)}")
        if self.limit < 1 or self.num_inference_steps < 1 or self.sample_columns < 0:
            raise ConfigError(
                "evaluation.limit and num_inference_steps must be 1 or more and sample_columns 0 or more, not "
                f"{self.limit}, {self.num_inference_steps} and {self.sample_columns}"
            )
        if min(self.guidance_scales, default=0) < 0:
            raise ConfigError(f"evaluation.guidance_scales must be numbers of 0 or more, not {self.guidance_scales}")


def check_evaluation(model: TextToImage, config: EvalConfig) -> None:
    """Find what an evaluation would be refused for before the training that it ends.

    Raises:
        UsageError: a guidance scale, a number of steps or a scheduler that the model cannot use.
        OptionalPackageError: a package that a score needs is not installed.
    """
    _require_packages(config)
    scheduler = model.pipeline.scheduler
    if config.scheduler is not None:
        scheduler = make_scheduler(config.scheduler, scheduler)
    check_seeded(scheduler)
    check_steps(config.num_inference_steps, scheduler)
    for scale in _scales(model, config):
        check_guidance(scale, model.pipeline.unet, has_negative=False)


def require_scorable(data: DataConfig, config: EvalConfig) -> None:
    """Open what evaluations read: what cannot be had would end the training at the first of them.

    Raises:
        DataError: a split that is not there.
        RunError: a network for FID or the CLIP score that cannot be had.
    """
    for split in config.splits:
        open_image_text(data, split)
    if config.fid:
        _inception()
    if config.clip_score is not None:
        _require_clip(config.clip_score)


def _require_packages(config: EvalConfig) -> None:
    if config.fid or config.clip_score is not None:
        require("torchmetrics", "evaluation.fid and evaluation.clip_score")
    if config.fid:
        require("torch-fidelity", "evaluation.fid")  # torchmetrics has no Inception network of its own


def _scales(model: TextToImage, config: EvalConfig) -> list[float]:
    return config.guidance_scales or [model.guidance_scale]


def score_splits(model: TextToImage, data: DataConfig, config: EvalConfig) -> dict[str, float]:
    """What the pictures drawn for each split's captions show, for scenes; FID and CLIP score where asked for.

    Returns:
        For scenes, by `split/n_object/guidance_g/`: `count`, `color`, `shape`, `both` (colour and shape of every object
        together), `all` (sizes and relations too), and for more than one object `relation`.
    """
    _require_packages(config)
    scores: dict[str, float] = {}
    for split in config.splits:
        source = open_image_text(data, split)
        if isinstance(source, SceneDataset):
            for number in config.objects:
                captions, seeds = _scene_captions(source, number, config.limit)
                for scale in _scales(model, config) if captions else ():
                    pictures = draw(model, captions, seeds, scale, config)
                    name = f"{split}/{number}_object/guidance_{scale:g}"
                    scores |= {f"{name}/{key}": value for key, value in scene_scores(pictures, captions).items()}
        if config.fid or config.clip_score is not None:
            scores |= {f"{split}/{key}": value for key, value in _metric_scores(model, source, config).items()}
    return scores


def _scene_captions(source: SceneDataset, number: int, limit: int) -> tuple[list[str], list[int]]:
    """The first captions that name so many objects, and a seed for each: its place in the split."""
    captions, seeds = [], []
    for index, items in enumerate(source.texts(range(len(source)))):
        claim = parse_caption(items[0].text)
        if claim is not None and len(claim.objects) == number and len(captions) < limit:
            captions.append(items[0].text)
            seeds.append(index)
    return captions, seeds


def draw(
    model: TextToImage, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float, config: EvalConfig
) -> list[Image.Image]:
    """A picture for each prompt, from its seed, by the scheduler that the config names."""
    pipeline, own = model.pipeline, model.pipeline.scheduler
    if config.scheduler is not None:
        pipeline.scheduler = make_scheduler(config.scheduler, own)
    try:
        return model.generate(
            list(prompts),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=guidance_scale,
            seed=list(seeds),
            progress=False,
        )
    finally:
        pipeline.scheduler = own


def scene_scores(pictures: Sequence[Image.Image], captions: Sequence[str]) -> dict[str, float]:
    """Shares of the pictures that show what their captions say, as a checker reads it back from the pixels."""
    verdicts = [
        check_caption(np.asarray(picture), caption) for picture, caption in zip(pictures, captions, strict=True)
    ]
    parts: dict[str, Callable[[Verdict], bool]] = {
        "count": lambda verdict: verdict.count,
        "color": lambda verdict: verdict.colors,
        "shape": lambda verdict: verdict.outlines,
        "both": lambda verdict: verdict.shapes,
        "all": lambda verdict: verdict.is_right,
    }
    scores = {name: float(np.mean([part(verdict) for verdict in verdicts])) for name, part in parts.items()}
    relations = [verdict.relations for verdict in verdicts if verdict.relations is not None]
    return scores | ({"relation": float(np.mean(relations))} if relations else {})


@torch.no_grad()
def denoising_loss(
    network: nn.Module, loss: DenoisingLoss, data: DiffusionData, limit: int, *, batch_size: int
) -> float:
    """Mean loss over the first pictures of a split, each with the noise and the timestep that it always has."""
    device = next(network.parameters()).device
    total, size = 0.0, min(limit, len(data))
    groups = np.zeros(size, dtype=np.int64) if data.buckets is None else data.buckets.groups[:size]
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group).tolist()
        for start in range(0, len(members), batch_size):
            batch = data.batch([(0, index) for index in members[start : start + batch_size]])
            total += float(loss(network, {name: tensor.to(device) for name, tensor in batch.items()}).sum())
    return total / size


def _metric_scores(model: TextToImage, source: ImageTextSource, config: EvalConfig) -> dict[str, float]:
    """FID and CLIP score by torchmetrics, over the pictures drawn at the first guidance scale."""
    count = min(config.limit, len(source))
    captions = [require_captions(f"{source.name} {number}", texts)[0] for number, texts in _texts(source, count)]
    drawn = _pixels(draw(model, captions, range(count), _scales(model, config)[0], config))
    scores: dict[str, float] = {}
    if config.fid:
        scores["fid"] = _fid(drawn, source, count)
    if config.clip_score is not None:
        scores["clip_score"] = _clip_score(drawn, captions, config.clip_score)
    return scores


def _texts(source: ImageTextSource, count: int) -> Iterator[tuple[int, tuple[TextItem, ...]]]:
    return enumerate(read_texts(source, range(count)))


def _fid(drawn: Tensor, source: ImageTextSource, count: int) -> float:
    metric = _inception()
    for index in range(count):
        real = fit_picture(source[index].image, (drawn.shape[2], drawn.shape[3])).pixels
        metric.update(torch.from_numpy(real).permute(2, 0, 1)[None], real=True)
    metric.update(drawn, real=False)
    return float(metric.compute())


def _inception() -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance  # pyright: ignore[reportMissingImports]

    return _opened(lambda: FrechetInceptionDistance(), "evaluation.fid needs its Inception network")


def _require_clip(name: str) -> None:
    """Open what is small of a CLIP model."""
    from transformers import CLIPConfig, CLIPProcessor

    _opened(lambda: (CLIPConfig.from_pretrained(name), CLIPProcessor.from_pretrained(name)), _needs_clip(name))


def _needs_clip(name: str) -> str:
    return f"evaluation.clip_score={name} needs that CLIP model"


def _clip_score(drawn: Tensor, captions: list[str], name: str) -> float:
    from torchmetrics.multimodal import CLIPScore  # pyright: ignore[reportMissingImports]
    from transformers import CLIPModel, CLIPProcessor

    def parts() -> tuple[Any, Any]:  # torchmetrics itself knows some names only, and no folder
        model = CLIPModel.from_pretrained(name)
        for method in ("get_image_features", "get_text_features"):
            setattr(model, method, _Pooled(getattr(model, method)))
        return model, CLIPProcessor.from_pretrained(name)

    metric = _opened(lambda: CLIPScore(parts), _needs_clip(name))  # pyright: ignore[reportArgumentType]
    for start in range(0, len(captions), _DRAWN_AT_ONCE):
        part = slice(start, start + _DRAWN_AT_ONCE)
        metric.update(list(drawn[part]), captions[part])
    return float(metric.compute())


class _Pooled:
    """Features as the tensor that torchmetrics expects; transformers 5 hands out an object with more in it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        features = self.method(*arguments, **named)
        return features if isinstance(features, Tensor) else features.pooler_output


def _opened(make: Callable[[], Any], what: str) -> Any:
    try:
        return make()
    except Exception as error:  # whatever a download or a missing network package makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{what}, which cannot be had: {reason}; go online once, or leave it out") from error


def _pixels(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def sample_grid(model: TextToImage, prompts: Sequence[str], config: EvalConfig) -> Image.Image | None:
    """`sample_columns` pictures of each prompt, from seeds 0, 1, ..., a row a prompt; None where none are wanted."""
    columns = config.sample_columns
    if not prompts or not columns:
        return None
    rows = [prompt for prompt in prompts for _ in range(columns)]
    pictures = draw(model, rows, list(range(columns)) * len(prompts), _scales(model, config)[0], config)
    return picture_grid(pictures, rows, columns=columns)


def sample_prompts(config: EvalConfig, data: DataConfig, *, most: int = 6) -> list[str]:
    """The prompts of the pictures that are drawn to be looked at."""
    if config.sample_prompts or not config.splits:
        return list(config.sample_prompts)
    source = open_image_text(data, config.splits[0])
    found: dict[str, None] = {}
    for texts in read_texts(source, range(min(len(source), 10 * most))):
        found.update(dict.fromkeys(captions_of(texts)[:1]))
    return list(found)[:most]
