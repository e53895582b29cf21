"""What is loaded when, in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "diffusers", "accelerate", "datasets", "numpy", "PIL")
OPTIONAL = ("peft", "sacrebleu", "sentencepiece", "sacremoses", "matplotlib", "tensorboard", "triton", "wandb")


def _loaded(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('LOADED', *sorted(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import mmattn",
        "import mmattn; dir(mmattn); mmattn.errors",
        "from mmattn.cli.main import main; main(['--help'])",
        "from mmattn.cli.main import main; main(['train', '--help'])",
        "from mmattn.cli.main import main; main(['ls'])",
        "from mmattn.cli.main import main; main(['cp', 'no/such', 'x.yaml'])",
    ],
)
def test_light(code: str):
    assert _loaded(code).isdisjoint([*HEAVY, *OPTIONAL])


@pytest.mark.parametrize("code", ["import mmattn.config", "import mmattn.cli.recipe_main"])
def test_configs_load_no_torch(code: str):
    assert _loaded(code).isdisjoint(["torch", "transformers", "diffusers", "datasets", "accelerate", *OPTIONAL])


def test_attention_loads_torch_alone():
    """torch itself brings triton where it is installed."""
    loaded = _loaded("import mmattn, mmattn.nn; mmattn.attention; mmattn.backends; mmattn.use_backend")
    assert "torch" in loaded
    others = {"transformers", "diffusers", "datasets", "accelerate", *OPTIONAL} - {"triton"}
    assert loaded.isdisjoint(others)


def test_inference_loads_no_optional_package():
    loaded = _loaded("import mmattn; mmattn.VisionLanguageModel; mmattn.record_attention")
    assert loaded.isdisjoint(["diffusers", "peft", "sacrebleu", "matplotlib", "wandb"])


def test_training_a_translator_loads_nothing_that_only_pictures_need():
    """Every process of a run waits for what it loads."""
    code = "from mmattn.config import load_recipe; load_recipe('translate')"
    code += (
        "\nimport sys; assert 'transformers' in sys.modules\nassert 'transformers.modeling_utils' not in sys.modules"
    )
    assert _loaded(code).isdisjoint(["diffusers", "peft", "sacrebleu", "matplotlib", "wandb"])


def test_every_public_name_exists():
    code = "import mmattn\nfor name in mmattn.__all__: getattr(mmattn, name)"
    assert "mmattn" in _loaded(code)


def test_an_unknown_name_is_an_attribute_error():
    import mmattn

    with pytest.raises(AttributeError, match="module 'mmattn' has no attribute 'atention'"):
        mmattn.atention  # noqa: B018
