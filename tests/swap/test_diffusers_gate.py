"""T-GATE: after a step cross-attention's outputs are reused and guidance is dropped; before it nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

import mmattn
from mmattn.errors import RunError, UsageError

from . import zoo_sd
from .diffusers_pieces import CROSS, TEXT, a_text, attentions, draw, run_tiny, run_unet, tiny_pipeline, tiny_unet
from .zoo import FAMILIES

STEPS = 4


@pytest.fixture
def pipe():
    return tiny_pipeline()


@pytest.fixture
def batches(pipe, monkeypatch):
    """Batch sizes of the U-Net's calls."""
    sizes = []
    forward = type(pipe.unet).forward

    def watched(unet, sample, *arguments, **named):
        sizes.append(sample.shape[0])
        return forward(unet, sample, *arguments, **named)

    monkeypatch.setattr(type(pipe.unet), "forward", watched)
    return sizes


def gated(pipe, swapped, **inputs):
    return run_tiny(pipe, steps=STEPS, callback_on_step_end=swapped.gate, **inputs)


@pytest.mark.parametrize("gate", [STEPS, STEPS + 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_gate_at_the_last_step_or_later_is_no_gate(pipe, batches, gate, batch):
    stock = run_tiny(pipe, steps=STEPS, batch=batch)
    with mmattn.swap_attention(pipe, gate=gate) as swapped:
        assert torch.equal(gated(pipe, swapped, batch=batch), stock)
        assert batches == 2 * STEPS * [2 * batch]
        assert "approximate" in str(swapped.report())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gate", [1, 2, 3])
def test_after_it_one_half_is_computed(pipe, batches, gate, batch):
    stock = run_tiny(pipe, steps=STEPS, batch=batch)
    batches.clear()
    with mmattn.swap_attention(pipe, gate=gate) as swapped:
        ours = gated(pipe, swapped, batch=batch)
        assert batches == gate * [2 * batch] + (STEPS - gate) * [batch]
        assert ours.isfinite().all()
        assert 0 < (ours - stock).abs().max() < 3 * stock.abs().max()
        assert torch.equal(gated(pipe, swapped, batch=batch), ours)
    assert torch.equal(run_tiny(pipe, steps=STEPS, batch=batch), stock)


def test_a_later_gate_is_nearer():
    pipe = FAMILIES["sd1_lora"].build()

    def run(**named):
        return zoo_sd.run_pipeline(pipe, steps=6, **named)

    stock, errors = run(), []
    for gate in (2, 4, 6):
        with mmattn.swap_attention(pipe, gate=gate) as swapped:
            errors.append((run(callback_on_step_end=swapped.gate) - stock).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] == 0


def test_layers_give_the_mean_of_both_halves_of_the_gates_step(pipe, monkeypatch):
    outputs: dict[str, list[torch.Tensor]] = {}
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        for name, attn in attentions(pipe.unet, "attn2").items():
            kept = outputs.setdefault(name, [])
            attn.register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        gated(pipe, swapped)
    assert len(outputs) == CROSS
    for steps in outputs.values():
        assert [output.shape[0] for output in steps] == [2, 2, 1, 1]
        mean = steps[1].mean(0, keepdim=True)
        assert torch.equal(steps[2], mean)
        assert torch.equal(steps[3], mean)
        assert not torch.equal(steps[0].mean(0, keepdim=True), mean)


def test_several_pictures_of_a_prompt(pipe, batches):
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        pictures = gated(pipe, swapped, batch=2, num_images_per_prompt=2)
        assert batches == [8, 8, 4, 4]
        assert pictures.shape[0] == 4


def test_without_guidance_outputs_are_reused_as_they_are(pipe, batches):
    stock = run_tiny(pipe, steps=STEPS, scale=1.0)
    batches.clear()
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        ours = gated(pipe, swapped, scale=1.0)
        assert batches == [1] * STEPS
        assert not torch.equal(ours, stock)
    with mmattn.swap_attention(pipe, gate=STEPS) as swapped:
        assert torch.equal(gated(pipe, swapped, scale=1.0), stock)


def test_without_the_callback_it_raises(pipe):
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        with pytest.raises(RunError, match=r"gate=2 has no effect: call the pipeline with callback_on_step_end"):
            run_tiny(pipe, steps=STEPS)
        assert gated(pipe, swapped).isfinite().all()


@pytest.mark.parametrize("broken_at", [0, 1, 2, 3])
def test_a_run_that_was_broken_off_leaves_nothing_for_the_next(pipe, broken_at):
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        expected = gated(pipe, swapped)
        step, calls = pipe.scheduler.step, []

        def failing(*arguments, **named):
            calls.append(1)
            if len(calls) > broken_at:
                raise KeyboardInterrupt
            return step(*arguments, **named)

        for _ in range(3):
            pipe.scheduler.step = failing
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                gated(pipe, swapped)
            pipe.scheduler.step = step
        assert torch.equal(gated(pipe, swapped), expected)
        assert torch.equal(gated(pipe, swapped), expected)


def test_another_batch_after_a_run_that_was_broken_off(pipe):
    stock = run_unet(pipe.unet, a_text(batch=5))
    with mmattn.swap_attention(pipe, gate=1) as swapped:
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *arguments, **named: (
            1 / 0 if swapped.gate._mark is not None else step(*arguments, **named)
        )
        with pytest.raises(ZeroDivisionError):
            gated(pipe, swapped)
        assert torch.equal(run_unet(pipe.unet, a_text(batch=5)), stock)


def test_verifying_does_not_disturb_it(pipe):
    with mmattn.swap_attention(pipe, gate=1) as swapped:
        expected = gated(pipe, swapped)
        assert swapped.verify().is_ok
        assert torch.equal(gated(pipe, swapped), expected)


def test_after_restoring_the_callback_says_that_it_has_nothing_to_reuse(pipe):
    swapped = mmattn.swap_attention(pipe, gate=2)
    gated(pipe, swapped)
    swapped.restore()
    with pytest.raises(RunError, match="the swap was restored"):
        gated(pipe, swapped)


def test_processors_that_were_replaced_are_noticed(pipe):
    swapped = mmattn.swap_attention(pipe, gate=2)
    pipe.enable_attention_slicing()
    with pytest.raises(RunError, match=r"something has replaced its processors \(see check"):
        gated(pipe, swapped)
    swapped.restore(force=True)


def test_it_goes_with_other_callbacks(pipe, batches):
    class Count(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012

        def __init__(self):
            self.steps = []

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            self.steps.append(step_index)
            return callback_kwargs

    count = Count()
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        run_tiny(pipe, steps=STEPS, callback_on_step_end=MultiPipelineCallbacks([swapped.gate, count]))
    assert count.steps == list(range(STEPS))
    assert batches == [2, 2, 1, 1]


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_other_schedulers(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    stock = run_tiny(pipe, steps=STEPS)
    with mmattn.swap_attention(pipe, gate=100) as swapped:
        assert torch.equal(gated(pipe, swapped), stock)
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        assert gated(pipe, swapped).isfinite().all()


def picture():
    return draw(1, 3, 64, 64).sigmoid()


KINDS = {
    "image to image": (StableDiffusionImg2ImgPipeline, {}, {"image": picture, "strength": 1.0}),
    "part of the steps": (StableDiffusionImg2ImgPipeline, {}, {"image": picture, "strength": 0.75}),
    "inpainting": (StableDiffusionInpaintPipeline, {}, {"image": picture, "strength": 1.0}),
    "inpainting U-Net": (StableDiffusionInpaintPipeline, {"in_channels": 9}, {"image": picture, "strength": 1.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pipelines_that_start_from_a_picture(kind):
    cls, changes, inputs = KINDS[kind]
    pipe = tiny_pipeline(cls, **changes)
    values = {name: value() if callable(value) else value for name, value in inputs.items()}
    if cls is StableDiffusionInpaintPipeline:
        values["mask_image"] = (draw(1, 1, 64, 64) > 0).float()

    def run(**named):
        return run_tiny(pipe, steps=STEPS, generator=torch.Generator().manual_seed(3), **values, **named)

    stock = run()
    with mmattn.swap_attention(pipe, gate=STEPS) as swapped:
        assert torch.equal(run(callback_on_step_end=swapped.gate), stock)
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        ours = run(callback_on_step_end=swapped.gate)
    assert ours.isfinite().all()
    assert not torch.equal(ours, stock)


def test_sdxl():
    pipe = FAMILIES["sdxl"].build()

    @torch.no_grad()
    def run(**named):
        texts = {name: draw(1, 7, 2 * TEXT, seed=1) for name in ("prompt_embeds", "negative_prompt_embeds")}
        pooled = {name: draw(1, 40, seed=2) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
        settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
        return pipe(**texts, **pooled, latents=draw(1, 4, 16, 12), height=128, width=96, **settings, **named).images

    stock = run()
    with mmattn.swap_attention(pipe, gate=STEPS) as swapped:
        assert torch.equal(run(callback_on_step_end=swapped.gate), stock)
    partial = run(denoising_end=0.5)
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        assert run(callback_on_step_end=swapped.gate).isfinite().all()
        assert torch.equal(run(callback_on_step_end=swapped.gate, denoising_end=0.5), partial)


def test_ip_adapters():
    family = FAMILIES["sd1_ip_adapter"]
    pipe = family.build()
    images = [draw(2, 1, 56, seed=4), draw(2, 1, 17, 52, seed=5)]

    def run(**named):
        return zoo_sd.run_pipeline(pipe, steps=3, ip_adapter_image_embeds=images, **named)

    stock = run()
    with mmattn.swap_attention(pipe, gate=3) as swapped:
        assert torch.equal(run(callback_on_step_end=swapped.gate), stock)
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        assert run(callback_on_step_end=swapped.gate).isfinite().all()


def test_the_gate_of_another_pipeline(pipe):
    other = tiny_pipeline()
    with mmattn.swap_attention(pipe, gate=2) as swapped, pytest.raises(UsageError, match="belongs to another pipeline"):
        run_tiny(other, steps=STEPS, callback_on_step_end=swapped.gate)


def test_a_copied_pipeline_has_no_gate_in_force(pipe):
    with mmattn.swap_attention(pipe, gate=2) as swapped:
        expected = gated(pipe, swapped)
        twin = copy.deepcopy(pipe)
        with mmattn.swap_attention(twin, gate=2) as again:
            assert torch.equal(gated(twin, again), expected)
        assert torch.equal(gated(pipe, swapped), expected)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (tiny_unet, {"gate": 2}, r"gate serves StableDiffusionPipeline, .*, not UNet2DConditionModel"),
        (FAMILIES["animatediff"].build, {"gate": 2}, "not AnimateDiffPipeline"),
        (tiny_pipeline, {"gate": 0}, "gate is 0: give the step, counted from 1"),
        (tiny_pipeline, {"gate": 2, "role": "self"}, "gate is about cross-attention, and none is to be swapped here"),
        (tiny_pipeline, {"gate": 2, "parts": ["vae"]}, "gate is about cross-attention"),
    ],
)
def test_where_it_cannot_serve(target, arguments, message):
    built = target()
    with pytest.raises(UsageError, match=message):
        mmattn.swap_attention(built, **arguments)
