"""What the tests of swapping in diffusers share: tiny models, inputs, and pictures of everything a swap may touch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention
from peft import LoraConfig
from torch import Tensor, nn

import mmattn.swap.diffusers.dispatcher  # noqa: F401  (with it diffusers has made its own registrations)
from mmattn.ops.tolerance import deviation
from mmattn.swap.attend import computing_reference

from . import zoo_sd
from .zoo_base import liven, quiet, seeded

torch.set_num_threads(1)  # small tensors, and the tests run side by side
AttentionProcessorRegistry._register()

TEXT = zoo_sd.TEXT
TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
LAYERS = 8  # of the tiny U-Net, half of them cross-attention
CROSS = LAYERS // 2
TOKENS = 7


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    return seeded(lambda: liven(UNet2DConditionModel(**TINY | changes), louder=1.5))()


def tiny_pipeline(cls: Any = StableDiffusionPipeline, **changes: Any) -> Any:
    return seeded(lambda: quiet(cls(**zoo_sd.parts(tiny_unet(**changes)))))()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_text(seed: int = 1, batch: int = 2, tokens: int = TOKENS) -> Tensor:
    return draw(batch, tokens, TEXT, seed=seed)


@torch.no_grad()
def run_unet(unet: Any, text: Tensor | None = None, **inputs: Any) -> Tensor:
    """One step; without a text, on one made anew."""
    text = a_text() if text is None else text
    return unet(draw(text.shape[0], 4, 8, 8).to(text.dtype), torch.tensor(10), text, **inputs).sample


@torch.no_grad()
def run_tiny(pipe: Any, *, steps: int = 4, batch: int = 1, scale: float = 5.0, **inputs: Any) -> Tensor:
    """Latents of a Stable Diffusion pipeline of any kind, from embeddings."""
    texts = {"prompt_embeds": a_text(1, batch), "negative_prompt_embeds": a_text(2, batch)}
    settings = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "latent"}
    if "image" not in inputs:
        inputs = {"latents": draw(batch * inputs.get("num_images_per_prompt", 1), 4, 8, 8)} | inputs
    return pipe(**texts, **settings, **inputs).images


def check_by_the_rule(ours: Tensor, stock: Tensor, run: Callable[[], Tensor]) -> None:
    """Hold the output of a swapped model, and stock's, to the tolerance rule; `run` runs it, swapped."""
    with computing_reference("eager"):
        eager = run()
    with computing_reference("float64"):
        reference = run()
    found = deviation(ours, eager, reference)
    assert found.is_within, found
    assert (ours - stock).abs().max() <= 2 * found.bound


def attentions(model: nn.Module, ending: str = "") -> dict[str, Attention]:
    """The attention modules whose name ends so; "attn2" for cross-attention."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, Attention) and name.endswith(ending)}


def keys_of(unet) -> list[nn.Linear]:
    return [attn.to_k for attn in attentions(unet, "attn2").values()]


def lora(*targets: str, **settings: Any) -> LoraConfig:
    """An adapter whose weights are random, not zero."""
    values = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": list(targets)}
    return LoraConfig(**values | settings)


def add_lora(unet: Any, *targets: str, name: str = "default", **settings: Any) -> None:
    config = lora(*(targets or ("to_k", "to_v")), **settings)
    seeded(lambda: unet.add_adapter(config, adapter_name=name))()


def hits(swapped: Any) -> int:
    """Projections of a text that were not computed again."""
    return sum(getattr(cache, "hits", 0) for cache in swapped._plan.caches)


def misses(swapped: Any) -> int:
    return sum(getattr(cache, "misses", 0) for cache in swapped._plan.caches)


class Picture:
    """Every attribute of every module of a pipeline or model, of its processors, and of diffusers' registries; two
    pictures are the same if all these objects are, by identity."""

    def __init__(self, target: Any) -> None:
        self.things: dict[str, Any] = {}
        models = {"model": target} if isinstance(target, nn.Module) else target.components
        for part, model in models.items():
            for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
                self.add(f"{part}.{name}", vars(module))
                processor = getattr(module, "processor", None)
                if processor is not None:
                    self.things[f"{part}.{name}.processor"] = processor
                    self.add(f"{part}.{name}.processor", vars(processor))
        self.add("", registries())

    def add(self, path: str, values: dict[Any, Any]) -> None:
        for name, value in values.items():
            self.things[f"{path}/{name}"] = value
            if isinstance(value, dict):
                self.add(f"{path}/{name}", value)

    def differences(self, other: Picture) -> list[str]:
        names = [*self.things, *(name for name in other.things if name not in self.things)]
        none = object()
        return [name for name in names if not self._is_same(self.things.get(name, none), other.things.get(name, none))]

    @staticmethod
    def _is_same(one: Any, other: Any) -> bool:
        if isinstance(one, (dict, list, set, int, float, str)) or one is None:
            return type(one) is type(other) and one == other
        return one is other


def registries() -> dict[str, Any]:
    """Copies of what belongs to the whole process."""
    registry, enum = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName
    return {
        "backends": dict(registry._backends),
        "constraints": dict(registry._constraints),
        "supported": dict(registry._supported_arg_names),
        "parallel": set(registry._supports_context_parallel),
        "active": str(registry._active_backend),
        "members": dict(enum._member_map_),
        "values": dict(enum._value2member_map_),
        "names": list(enum._member_names_),
        "skipping": dict(AttentionProcessorRegistry._registry),
    }


def forget() -> None:
    """Let dropped handles go."""
    gc.collect()
