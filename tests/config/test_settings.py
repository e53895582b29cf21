from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

import pytest

from mmattn.config import list_recipes, load_recipe, part_of, settings_of
from mmattn.config.schema import dataclass_in, field_types
from mmattn.config.settings import MISSING, about, field_texts
from mmattn.data import parallel_spec, spec, stream_spec
from mmattn.data.parallel_spec import ParallelConfig
from mmattn.data.picture_fit import CROPS, PictureConfig
from mmattn.data.spec import DataConfig
from mmattn.data.text_to_image import TIMESTEP_SAMPLINGS, NoiseConfig
from mmattn.data.translation_tokenizer import KINDS as TOKENIZERS
from mmattn.errors import ConfigError
from mmattn.inference import translator_scores, translator_setup, vlm_scores
from mmattn.inference.diffusion import scores, setup
from mmattn.inference.diffusion.denoising import PREDICTIONS
from mmattn.inference.diffusion.task import DiffusionConfig
from mmattn.inference.trained import TRAIN_WHAT, TrainChoice
from mmattn.models.translator import config as translator_config
from mmattn.models.vlm import config as vlm_config
from mmattn.nn.feed_forward import _PLAIN
from mmattn.nn.gated_activation import GATES
from mmattn.training import config as training_config
from mmattn.training.config import TrainingConfig


@dataclass
class Base:
    """What is shared.

    Args:
        seed: Of all draws; None draws
            anew, True never.
        limit: For trials.
    """

    seed: int | None = None
    limit: int = 3


@dataclass
class Inner(Base):
    """A part of `Nonesuch`,
    in two lines.

    And a second paragraph.

    Args:
        first, second: Both
            the same, such as {a: 1}.
        limit: Other words for it.

    Raises:
        ConfigError: never.
    """

    first: int = 1
    second: int = 2


@dataclass
class Bare:
    value: int = 0


@dataclass
class Outer:
    """All.

    Args:
        inner: Beside `bare`.
        maybe: Sometimes.
    """

    inner: Inner = field(default_factory=Inner)
    bare: Bare = field(default_factory=Bare)
    maybe: Bare | None = None
    names: list[str] = field(default_factory=list)


def test_texts_are_those_of_the_docstrings():
    assert about(Inner) == "A part of `Nonesuch`, in two lines. And a second paragraph."
    assert field_texts(Inner) == {
        "seed": "Of all draws; null draws anew, true never.",
        "first": "Both the same, such as {a: 1}.",
        "second": "Both the same, such as {a: 1}.",
        "limit": "Other words for it.",
    }
    assert about(Bare) == ""
    assert field_texts(Bare) == {}


def test_settings_come_in_order_with_value_and_default():
    found = list(settings_of(Outer(Inner(seed=5), maybe=Bare(7)), Outer()))
    assert [setting.key for setting in found] == [
        *["inner", "inner.seed", "inner.limit", "inner.first", "inner.second"],
        *["bare", "bare.value", "maybe", "maybe.value", "names"],
    ]
    by_key = {setting.key: setting for setting in found}
    assert by_key["inner"].text == f"{about(Inner)} Beside `bare`."
    assert by_key["inner"].is_section
    assert (by_key["inner.seed"].value, by_key["inner.seed"].default, by_key["inner.seed"].owner) == (5, None, Inner)
    assert (by_key["maybe"].text, by_key["maybe.value"].default) == ("Sometimes.", MISSING)
    assert by_key["names"].text == ""


def test_a_part():
    settings = list(settings_of(Outer(), Outer()))
    assert [setting.key for setting in part_of(settings, "bare")] == ["bare", "bare.value"]
    assert [setting.key for setting in part_of(settings, "inner.seed")] == ["inner.seed"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("seed", "unknown key 'seed'. Did you mean 'inner.seed'?"),
        ("iner.seed", "unknown key 'iner.seed'. Did you mean 'inner.seed'?"),
        ("inner.sed", "unknown key 'inner.sed'. Did you mean 'inner.seed'?"),
        ("inner.seed.x", "unknown key 'inner.seed.x'. Did you mean 'inner.seed'?"),
        ("zzz", "unknown key 'zzz'. Known keys: inner, bare, maybe, names, and what is in them"),
        ("", "unknown key ''. Known keys: inner"),
        ("value", "unknown key 'value'. Did you mean 'bare.value' or 'maybe.value'?"),
    ],
)
def test_no_such_part(key: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        part_of(list(settings_of(Outer(maybe=Bare()), Outer())), key)


def _schemas() -> list[type]:
    """Every dataclass that a config of a recipe is made of."""
    found = [load_recipe(recipe).Config for recipe in list_recipes()]
    for schema in found:
        found += [inner for kind in field_types(schema).values() if (inner := dataclass_in(kind)) not in (None, *found)]
    return found


@pytest.mark.parametrize("schema", _schemas(), ids=lambda schema: f"{schema.__module__}.{schema.__qualname__}")
def test_every_setting_is_described(schema: type):
    kinds, texts = field_types(schema), field_texts(schema)
    leaves = [name for name, kind in kinds.items() if dataclass_in(kind) is None]
    assert [name for name in leaves if not re.fullmatch(r"[A-Za-z0-9\"].{8,}[.?)]", texts.get(name, ""))] == []
    assert [name for name in texts if name not in kinds] == []
    assert about(schema).endswith(".")


SPLITS = ("validation", "test", "train", "heldout")
ACTIVATIONS = (*_PLAIN, *GATES)
VALUES = [
    (TrainingConfig, "schedule", training_config.SCHEDULES),
    (TrainingConfig, "mixed_precision", training_config.PRECISIONS),
    (TrainingConfig, "device", training_config.DEVICES),
    (TrainingConfig, "sharding", training_config.SHARDINGS),
    (TrainingConfig, "trackers", training_config.TRACKERS),
    (TrainChoice, "train_what", TRAIN_WHAT),
    (DiffusionConfig, "train_what", setup.TRAIN_WHAT),
    (DataConfig, "kind", spec.KINDS),
    (ParallelConfig, "kind", (*parallel_spec.KINDS, "parts")),
    (PictureConfig, "crop", CROPS),
    (NoiseConfig, "timestep_sampling", TIMESTEP_SAMPLINGS),
    (setup.ScheduleConfig, "prediction_type", PREDICTIONS),
    (scores.EvalConfig, "splits", spec.SPLITS),
    (vlm_scores.EvalConfig, "splits", spec.SPLITS),
    (translator_scores.EvalConfig, "splits", parallel_spec.SPLITS),
    (translator_setup.ModelConfig, "tokenizer", TOKENIZERS),
    (translator_setup.KVHeadsConfig, "how", ("mean", "first", "random", "svd")),
    (translator_config.TranslatorConfig, "positions", translator_config.POSITIONS),
    (translator_config.TranslatorConfig, "activation", ACTIVATIONS),
    (vlm_config.VLMConfig, "task", vlm_config.TASKS),
    (vlm_config.ImageEncoderConfig, "kind", vlm_config.IMAGE_ENCODERS),
    (vlm_config.ImageEncoderConfig, "activation", ACTIVATIONS),
    (vlm_config.TextConfig, "positions", vlm_config.POSITIONS),
    (vlm_config.TextConfig, "activation", ACTIVATIONS),
]


@pytest.mark.parametrize(("schema", "name", "values"), VALUES)
def test_every_permitted_value_is_named(schema: type, name: str, values: tuple[str, ...]):
    text = field_texts(schema)[name]
    assert [value for value in values if f'"{value}"' not in text] == []


def test_settings_of_streams_name_what_they_are_for():
    texts = field_texts(stream_spec.StreamSettings)
    names = [item.name for item in dataclasses.fields(stream_spec.StreamSettings)]
    assert [name for name in names if not texts[name].startswith("streaming: ")] == ["streaming"]
