"""One step of the three models' inference in their real sizes: eager, compiled, and replayed as a CUDA graph.

Random weights. Translator (OPUS-MT size) and BLIP (base size) in bfloat16: milliseconds a token of texts of a forced
length, the choice of tokens included. U-Net (Stable Diffusion 1.5 size) in float16, both halves of guidance for one
picture. Stock is transformers' or diffusers' own, in the same process; variants run in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel
from diffusion import SD15, SMALL, made, unet_step
from measure import Ceilings, Options, Status, measure_ceilings, median_and_spread, read_options, wait, wall_ms
from opus_mt import TINY, VOCAB, decoder_bytes, our_texts, random_opus_mt, stock_texts
from torch import nn
from transformers import BlipForConditionalGeneration
from vlm_inference import Place, fixed_length, pictures, save_random

from mmattn.inference.diffusion.context_once import context_projected_once
from mmattn.models.translator import CompiledDecoder, TranslatorNetwork, open_network
from mmattn.models.unet import CompiledUNet, UNet
from mmattn.nn import fuse

TABLE = "Compiled and graphed steps, ms"
SOURCE_LENGTH = 32
# Batch and beams, and whether compiled without a graph too, which compiles once more; most important first.
CELLS = [(1, 1, True), (8, 1, False), (32, 1, False), (1, 4, False)]
Run = Callable[[], Any]


class Steps:
    """A network whose `start` gives compiled steps."""

    def __init__(self, network: TranslatorNetwork, decoder: CompiledDecoder, beams: int) -> None:
        self.config, self.encode, self.project_context = network.config, network.encode, network.project_context
        self._decoder, self._beams = decoder, beams

    def start(self, contexts: Any, *, max_length: int) -> Any:
        """See `CompiledDecoder.start`."""
        return self._decoder.start(contexts, max_length=max_length, most_rows=self._beams)


def backend(options: Options) -> str:
    """Inductor, but where only the script is tried."""
    return "eager" if options.tiny else "inductor"


def first(name: str, run: Run, options: Options) -> Any:
    """Run once, where compilation and capture fall; its seconds are printed."""
    begin = time.perf_counter()
    found = run()
    wait(options.device)
    print(f"  {name}: first run {time.perf_counter() - begin:.1f} s", flush=True)
    return found


def add(what: str, runs: dict[str, Run], per: int, floor_ms: float, options: Options, **cells: str) -> None:
    """Time the variants, and a row of milliseconds a step; "eager" and "graphed" are among them."""
    with options.turn():
        times = wall_ms(runs, options.repeats + (0 if options.tiny else 2), options.device)
    found = {name: median_and_spread(times[name]) for name in runs}
    shown = {name: f"{middle / per:.3f} ±{spread:.0%}" for name, (middle, spread) in found.items()}
    graphed = found["graphed"][0]
    ratios = {
        "eager / graphed": f"{found['eager'][0] / graphed:.2f}",
        "stock / graphed": f"{found['stock'][0] / graphed:.2f}",
    }
    columns = {name: shown.get(name, "-") for name in ("stock", "eager", "compiled", "graphed")}
    options.add(TABLE, what=what, **columns, **ratios, **{"floor": f"{floor_ms:.3f}"}, **cells)


def translator_rows(options: Options, ceilings: Ceilings, status: Status) -> None:
    """Texts of a forced length from 32 source tokens."""
    device, new_tokens = torch.device(options.device), 4 if options.tiny else 64
    with tempfile.TemporaryDirectory() as name:
        random_opus_mt(**TINY if options.tiny else {}).save_pretrained(name)
        stock = transformers.MarianMTModel.from_pretrained(name, dtype=torch.bfloat16).to(device).eval()
        network = open_network(Path(name), dtype=torch.bfloat16, device=device)
    fuse(network)  # as Translator.from_pretrained does on a card
    graphed = CompiledDecoder(network, backend=backend(options))
    plain = CompiledDecoder(network, backend=backend(options), use_graphs=False)
    floor_ms = 1000 * decoder_bytes(network) / ceilings.bytes_per_s
    generator = torch.Generator().manual_seed(1)
    for batch, beams, with_plain in CELLS:
        what = f"translator, bfloat16, batch {batch}, {'greedy' if beams == 1 else f'{beams} beams'}"
        with status.row(what):
            sources = torch.randint(1, VOCAB - 1, (batch, SOURCE_LENGTH), generator=generator).to(device)
            networks: dict[str, Any] = {"eager": network, "graphed": Steps(network, graphed, beams)}
            if with_plain:
                networks["compiled"] = Steps(network, plain, beams)
            runs: dict[str, Run] = {
                key: lambda each=each, sources=sources, beams=beams: our_texts(each, sources, beams, new_tokens)[0]
                for key, each in networks.items()
            }
            runs["stock"] = lambda sources=sources, beams=beams: stock_texts(stock, sources, beams, new_tokens)[0]
            texts = {key: first(f"{what}, {key}", run, options) for key, run in runs.items()}
            same = sum(one == other for one, other in zip(texts["eager"], texts["graphed"], strict=True))
            add(what, runs, new_tokens, floor_ms, options, agree=f"{same} of {batch} texts with eager")


@torch.no_grad()
def unet_rows(options: Options, ceilings: Ceilings, status: Status) -> None:
    """One denoising step; the text's keys and values are there already, as in every step after the first."""
    config = SD15 | (SMALL if options.tiny else {})
    stock = made(UNet2DConditionModel, config, options).eval()
    ours = UNet.from_stock(stock)
    step = unet_step(stock)
    graphed = CompiledUNet(ours, backend=backend(options))
    plain = CompiledUNet(ours, backend=backend(options), use_graphs=False)

    def with_steps(steps: CompiledUNet) -> Run:
        def run() -> Any:
            with steps.installed():
                return step(ours)

        return run

    runs = {"stock": lambda: step(stock), "eager": lambda: step(ours)}
    runs |= {"graphed": with_steps(graphed), "compiled": with_steps(plain)}
    with context_projected_once(ours):
        found = {name: first(f"U-Net, {name}", run, options) for name, run in runs.items()}
    stock_out = found["stock"].double()
    apart = (found["graphed"].double() - stock_out).abs().max().item() / stock_out.abs().max().item()
    flops = 0.0 if options.tiny else _unet_flops(step, stock)
    floor_us, _ = ceilings.floor_us(2 * sum(each.nbytes for each in stock.parameters()), flops)
    agree = f"{apart:.1e} of the largest number from stock"
    dtype = str(stock.dtype).removeprefix("torch.")
    with context_projected_once(ours):
        add(f"SD 1.5 U-Net, {dtype}, 64 x 64, batch 2", runs, 1, floor_us / 1000, options, agree=agree)


def _unet_flops(step: Callable[[Any], Any], unet: nn.Module) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step(unet)
    return float(counter.get_total_flops())


def vlm_rows(options: Options, ceilings: Ceilings, status: Status) -> None:
    """Captions of a forced length on a picture that is encoded already."""
    place, tokens = Place(options.device, torch.bfloat16), 4 if options.tiny else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random(BlipForConditionalGeneration, folder, "tiny" if options.tiny else "base")
        stock, _ = place.open_stock(BlipForConditionalGeneration, folder)
        ours, compiled = (place.open_ours(folder) for _ in range(2))
    compiled.compile(backend=backend(options))
    text = stock.config.text_config
    skipped = (".cross_attn.k_proj", ".cross_attn.v_proj")
    weights = [p for name, p in ours.network.decoder.named_parameters() if not any(part in name for part in skipped)]
    floor_ms = 1000 * sum(each.nbytes for each in weights) / ceilings.bytes_per_s
    for beams in (1, 3):
        what = f"BLIP caption, bfloat16, {'greedy' if beams == 1 else f'{beams} beams'}"
        with status.row(what):
            images = ours.encode(pictures(1))
            arguments = {"num_beams": beams, **fixed_length(tokens)}
            features = images.features
            prompt = torch.tensor([[text.bos_token_id]], device=ours.device)

            def theirs(
                prompt: Any = prompt, features: Any = features, arguments: dict[str, int] = arguments
            ) -> torch.Tensor:
                with torch.no_grad():
                    return stock.text_decoder.generate(
                        input_ids=prompt,
                        eos_token_id=text.sep_token_id,
                        pad_token_id=text.pad_token_id,
                        encoder_hidden_states=features,
                        encoder_attention_mask=prompt.new_ones(features.shape[:2]),
                        **arguments,
                    )

            runs: dict[str, Run] = {
                "stock": theirs,
                "eager": lambda images=images, arguments=arguments: ours.caption(images, **arguments),
                "graphed": lambda images=images, arguments=arguments: compiled.caption(images, **arguments),
            }
            found = {key: first(f"{what}, {key}", run, options) for key, run in runs.items()}
            same = "yes" if found["eager"] == found["graphed"] else "no (near ties of random weights)"
            add(what, runs, tokens, floor_ms, options, agree=f"same text as eager: {same}")


MODELS = {"translator": translator_rows, "unet": unet_rows, "vlm": vlm_rows}


def main() -> int:
    """The three models, the translator first; one that fails costs its own rows only."""
    options, status = read_options(__doc__, list(MODELS)), Status()
    transformers.logging.set_verbosity_error()
    with options.turn():
        ceilings = measure_ceilings(options)
    for name in MODELS if options.only is None else [options.only]:
        with status.row(name):
            MODELS[name](options, ceilings, status)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print("failed" if status.code else "done", flush=True)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
