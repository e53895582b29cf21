"""What is left alone, with the reason, and the roles of layers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from mmattn import record_attention
from mmattn.errors import BackendError, RunError, UsageError
from mmattn.swap import swap_attention
from mmattn.swap.transformers import find, registration
from mmattn.swap.transformers.inputs import make_inputs

from .test_transformers import assert_same, everything
from .zoo_base import seeded
from .zoo_transformers import FAMILIES

SMALL = {
    "hidden_size": 36,
    "intermediate_size": 53,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "vocab_size": 101,
    "pad_token_id": 0,
}
T5 = {"d_model": 36, "d_kv": 7, "num_heads": 3, "d_ff": 53, "num_layers": 1, "vocab_size": 101}
ITSELF = "computes its attention itself, not through transformers' attention interface"


@seeded
def led():
    config = tf.LEDConfig(
        vocab_size=101,
        d_model=36,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=53,
        decoder_ffn_dim=53,
        attention_window=4,
    )
    return tf.LEDForConditionalGeneration(config)


@seeded
def bert_with_context():
    return tf.BertLMHeadModel(tf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True))


@seeded
def gpt2_with_context():
    config = tf.GPT2Config(n_embd=36, n_head=3, n_layer=1, vocab_size=101, add_cross_attention=True)
    return tf.GPT2LMHeadModel(config)


@seeded
def q_former():
    config = tf.Blip2QFormerConfig(**SMALL, encoder_hidden_size=24)
    return tf.Blip2QFormerModel(config)


@seeded
def idefics2():
    text = {**SMALL, "model_type": "mistral", "num_key_value_heads": 2, "head_dim": 10}
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 53}
    vision |= {"image_size": 24, "patch_size": 8}
    perceiver = {"hidden_size": 36, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 6}
    perceiver |= {"resampler_head_dim": 7, "num_key_value_heads": 2}
    config = tf.Idefics2Config(text_config=text, vision_config=vision, perceiver_config=perceiver)
    return tf.Idefics2ForConditionalGeneration(config)


def causal(name: str, **settings):
    config = getattr(tf, f"{name}Config")(**SMALL, **settings)
    return seeded(lambda: getattr(tf, f"{name}ForCausalLM")(config))()


def deepseek():
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 7, "qk_rope_head_dim": 4, "v_head_dim": 7}
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    return causal("DeepseekV3", num_key_value_heads=6, moe_intermediate_size=16, **sizes, **experts)


def gpt_oss():
    return causal("GptOss", num_key_value_heads=2, head_dim=10, num_local_experts=2, num_experts_per_tok=1)


def gpt2_eager():
    model = gpt2_with_context()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (led, f"LEDEncoderSelfAttention: {ITSELF}"),
        (lambda: causal("Gemma2", num_key_value_heads=2, head_dim=10), "Gemma2Attention: caps its scores at 50.0"),
        (gpt_oss, "GptOssAttention: attention sinks"),
        (deepseek, "DeepseekV3Attention: values of another head size than keys"),
        (
            gpt2_eager,
            "GPT2Attention: its code does something else when the implementation is not called eager",
        ),
    ],
    ids=["led", "gemma2", "gpt_oss", "deepseek", "gpt2"],
)
def test_models_that_must_be_left_alone_say_why(build, reason):
    model = build()
    before = everything(model)
    with pytest.raises(UsageError) as error:
        swap_attention(model)
    assert reason in str(error.value)
    assert "layers must be left alone: model." in str(error.value)
    assert_same(before, everything(model))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "paged|eager"])
@pytest.mark.parametrize("role", [None, "cross"])
def test_implementations_whose_masks_we_cannot_read(implementation, role):
    model = FAMILIES["marian"].build()
    model.config._attn_implementation_internal = implementation
    before = everything(model)
    with pytest.raises(UsageError) as error:
        swap_attention(model, role=role)
    assert (
        f"MarianAttention: masks are made for {implementation}, which mmattn cannot read; call "
        'model.set_attn_implementation("sdpa") first'
    ) in str(error.value)
    assert_same(before, everything(model))


def test_some_layers_are_left_alone_and_strict_raises():
    config = tf.LongT5Config(**T5, local_radius=3, encoder_attention_type="local")
    model = tf.LongT5ForConditionalGeneration(config).eval()
    with swap_attention(model) as swap:
        (refused,) = swap.report().refused
        assert refused.full_name == "model.encoder.block.0.layer.0.LocalSelfAttention"
        assert refused.refused == f"LongT5LocalAttention: {ITSELF}"
        assert swap.verify().is_ok
    before = everything(model)
    with pytest.raises(UsageError, match="1 of 3 layers must be left alone: model.encoder"):
        swap_attention(model, strict=True)
    assert_same(before, everything(model))


def test_torchs_own_attention_is_named():
    sizes = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = tf.SiglipVisionConfig(**sizes, num_attention_heads=3, image_size=24, patch_size=8)
    with swap_attention(tf.SiglipVisionModel(config)) as swap:
        (refused,) = swap.report().refused
    assert refused.refused == f"MultiheadAttention: {ITSELF}"


def test_a_role_that_a_model_does_not_have():
    with pytest.raises(UsageError, match="ViTModel has no cross attention in these parts"):
        swap_attention(FAMILIES["vit"].build(), role="cross")


def test_a_backend_that_cannot_serve_a_layer():
    with pytest.raises(BackendError, match="attention backend 'flex' cannot serve model.layers.*float64"):
        swap_attention(FAMILIES["vit"].build().double(), "flex")


def test_an_interface_that_is_not_as_expected(monkeypatch):
    monkeypatch.delattr(registration.AttentionMaskInterface, "_global_mapping")
    monkeypatch.delattr(registration.AttentionMaskInterface.__mro__[1], "_global_mapping")
    monkeypatch.setattr(registration, "__version__", "9.9.9")
    model = FAMILIES["vit"].build()
    with pytest.raises(UsageError) as error:
        swap_attention(model)
    assert str(error.value) == (
        "transformers 9.9.9: its attention interface is not built as in 5.24, to which mmattn can add a function; "
        "install transformers 5.24"
    )


@pytest.mark.parametrize(
    ("build", "roles"),
    [
        (bert_with_context, {"BertSelfAttention": "self", "BertCrossAttention": "cross"}),
        (gpt2_with_context, {"attn": "self", "crossattention": "cross"}),
        (lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**T5)), {"SelfAtt": "self", "EncDecAtt": "cross"}),
        (q_former, {"layer.0.attention.attention": "self", "crossattention": "cross"}),
        (idefics2, {"perceiver": "joint", "vision": "self", "text": "self"}),
    ],
)
def test_roles(build, roles):
    with swap_attention(build().eval()) as swap:
        assert swap.verify().is_ok
        seen = {(layer.role, f"{layer.name} {layer.old_class}") for layer in swap.layers}
    for piece, role in roles.items():
        assert {found for found, name in seen if piece in name} == {role}


def test_a_modules_own_flag_counts_more_than_its_name():
    module = nn.Linear(2, 2)
    assert [find.role_of(module, name) for name in ("layer.0.cross_attn", "cross_encoder.self_attn")] == [
        "cross",
        "self",
    ]
    module.is_cross_attention = False
    assert find.role_of(module, "layer.0.cross_attn") == "self"
    module.is_cross_attention = True
    assert find.role_of(module, "layer.0.attn") == "cross"


def test_layers_with_one_softmax_have_no_role_of_their_own():
    with swap_attention(idefics2().eval(), role="self") as swap:
        assert {layer.role for layer in swap.layers if not layer.chosen} == {"joint"}
    with swap_attention(idefics2().eval()) as swap:
        assert swap.report().notes == [
            'layers with one softmax over context and queries are "joint": neither self nor cross'
        ]


def test_models_that_do_not_take_their_probe_are_named_and_their_layers_verified():
    with swap_attention(idefics2().eval()) as swap:
        verification = swap.verify()
    assert verification.is_ok
    assert len(verification.layers) == len(swap.layers)
    (unprobed,) = verification.unprobed
    assert unprobed.startswith("model (it does not take the probe made from its config: ValueError: ")


def test_a_config_with_two_texts_is_no_obstacle():
    """MusicGen reads a text and writes sound tokens."""
    sizes = {"num_layers": 1, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4, "vocab_size": 50}
    codec = {"num_filters": 2, "hidden_size": 8, "codebook_size": 16, "codebook_dim": 8, "upsampling_ratios": [2, 2]}
    codec |= {"target_bandwidths": [0.5], "sampling_rate": 200, "norm_type": "weight_norm"}
    decoder = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "num_attention_heads": 4}
    config = tf.MusicgenConfig(
        text_encoder={"model_type": "t5", **sizes},
        audio_encoder={"model_type": "encodec", **codec},
        decoder={**decoder, "num_codebooks": 2, "max_position_embeddings": 32, "pad_token_id": 16, "bos_token_id": 16},
    )
    model = tf.MusicgenForConditionalGeneration(config).eval()
    with swap_attention(model) as swap:
        assert [layer.role for layer in swap.layers] == ["self", "self", "cross"]
        assert swap.verify().is_ok
    with (
        record_attention(model),
        pytest.raises(RunError, match=r"generate\(\) returned torch.float32 .* rather than rows"),
    ):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=3)


def test_windows_are_kept():
    model = causal("Mistral", num_key_value_heads=2, head_dim=10, sliding_window=4).eval()
    inputs = make_inputs(model)
    with torch.no_grad():
        stock = model(**inputs).logits
        with swap_attention(model) as swap:
            assert torch.allclose(model(**inputs).logits, stock, atol=1e-6)
            assert swap.layers[0].features == ["grouped heads", "causal"]
            assert swap.verify().is_ok


@pytest.mark.parametrize("key", FAMILIES)
def test_probes_are_made_from_the_config(key):
    model = FAMILIES[key].build()
    first, second = make_inputs(model), make_inputs(model)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in first:
            assert 0 < first[name][-1].sum() < first[name].shape[1]
    if "input_ids" in first:
        assert first["input_ids"].max() < 101


def test_code_is_read_through_decorators_and_parents():
    class Child(tf.models.t5.modeling_t5.T5Attention):
        pass

    for cls in (Child, tf.models.marian.modeling_marian.MarianAttention):
        assert find.code_of(cls).asks_interface
    assert not find.code_of(nn.Linear).asks_interface
    assert find.code_of(tf.models.gemma2.modeling_gemma2.Gemma2Attention).unsupported == {"softcap"}
