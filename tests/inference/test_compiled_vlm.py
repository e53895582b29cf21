"""Compiled steps of captions and answers: the texts of the ordinary path, and no second compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import mmattn
from mmattn.errors import RunError, UsageError
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.models.vlm import CompiledDecoder, TextConfig, VLMConfig, build_network, save_network
from mmattn.ops.observe import observing
from tests.inference.tiny_models import WORDS, pictures, save_own, save_stock

QUESTIONS = ["what colour is the cat ?", "how many dogs ?", "is there a red circle left of the blue square ?"]
FORMS: dict[str, dict[str, Any]] = {
    "gated": {"gated": True, "cross_attention_every": 2, "positions": "rotary", "num_kv_heads": 1},
    "sparse": {"cross_attention_every": 2, "norm_first": False},
}


@pytest.fixture(autouse=True)
def no_recompilation():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {task: save_stock(root / task, task) for task in ("captioning", "question_answering", "matching")}
    found["own"] = save_own(root / "own")
    for name, form in FORMS.items():
        found[name] = save_form(save_own(root / name), form)
    return found


def save_form(folder: Path, form: dict[str, Any]) -> Path:
    """Another text decoder in the folder of our own network, its gates open."""
    config = VisionLanguageModel.from_pretrained(folder, device="cpu").network.config
    text = {name: getattr(config.text, name) for name in TextConfig.__dataclass_fields__}
    torch.manual_seed(1)
    changed = VLMConfig("captioning", config.image, TextConfig(**text | {"num_layers": 4} | form))
    network = build_network(changed).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    save_network(network, folder)
    return folder


class Pair:
    """A model in both ways, with what was compiled."""

    def __init__(
        self, folder: Path, *, backend: str = "eager", device: str = "cpu", idle_bytes: int | None = 2**24
    ) -> None:
        self.eager, self.ours = (
            VisionLanguageModel.from_pretrained(folder, device=device, dtype="float32") for _ in range(2)
        )
        self.counter = CompileCounterWithBackend(backend)
        self.ours.compile()
        self.ours.compiled = CompiledDecoder(self.ours.network, backend=self.counter, idle_bytes=idle_bytes)

    @property
    def num_compiled(self) -> int:
        return self.counter.frame_count

    def check(self, verb: str, *arguments: Any, seed: int | None = None, **asked: Any) -> list[Any]:
        """Texts must be equal, scores to rounding; returns ours, flat."""
        found = []
        for model in (self.eager, self.ours):
            generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)
            texts = getattr(model, verb)(*arguments, generator=generator, return_scores=True, **asked)
            found.append(flat(texts))
        expected, ours = found
        assert [one.text for one in ours] == [one.text for one in expected]
        assert [one.score for one in ours] == pytest.approx([one.score for one in expected], rel=1e-4, abs=1e-4)
        return ours


def flat(found: Any) -> list[Any]:
    return [one for each in found for one in flat(each)] if isinstance(found, list) else [found]


@pytest.fixture(scope="module")
def pairs(folders) -> dict[str, Pair]:
    return {kind: Pair(folder) for kind, folder in folders.items() if kind != "matching"}


@pytest.mark.parametrize("kind", ["captioning", "own", "gated", "sparse"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_over_numbers_of_pictures_prompts_and_lengths(pairs, kind, num_beams):
    pair = pairs[kind]
    before = pair.num_compiled
    texts = pair.check("caption", pictures(3), num_beams=num_beams, max_new_tokens=7)
    assert len({one.score for one in texts}) > 1
    for count in (2, 7):
        pair.check("caption", pictures(count), num_beams=num_beams, min_new_tokens=19)
    pair.check("caption", pictures(3), ["a cat", "a red picture of two", "a cat"], num_beams=num_beams)
    assert pair.num_compiled <= before + 2  # once, and once for the picture that stands alone with its prompt
    middle = pair.num_compiled
    pair.check("caption", pictures(1)[0], num_beams=num_beams)
    pair.check("caption", pictures(1)[0], "a picture", num_beams=num_beams, max_new_tokens=3)
    assert pair.num_compiled == max(middle, before + 2)


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True, "seed": 3, "top_k": 9},
        {"do_sample": True, "seed": 4, "num_return_sequences": 3, "temperature": 1.3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0},
        {"repetition_penalty": 1.5, "bad_words_ids": [[7], [8, 9]], "min_new_tokens": 5},
    ],
    ids=str,
)
def test_every_way_of_decoding(pairs, asked):
    pairs["captioning"].check("caption", pictures(3), **asked)


@pytest.mark.parametrize(("kind", "num_beams"), [("question_answering", 1), ("question_answering", 3), ("own", 2)])
def test_answers(pairs, kind, num_beams):
    """Several questions on a picture, of several lengths; as many on each picture or not."""
    pair = pairs[kind]
    image, *others = pictures(3)
    pair.check("ask", image, QUESTIONS, num_beams=num_beams, min_new_tokens=3)
    pair.check("ask", [image, *others], QUESTIONS[0], num_beams=num_beams)
    pair.check("ask", [image, *others], [QUESTIONS[:1], QUESTIONS, QUESTIONS[:2]], num_beams=num_beams)
    before = pair.num_compiled
    pair.check("ask", image, QUESTIONS[::-1], num_beams=num_beams, max_new_tokens=11)
    pair.check("ask", pair.ours.encode(others), [QUESTIONS[:1], QUESTIONS], num_beams=num_beams)
    assert pair.num_compiled == before


def test_questions_are_rounded_up(folders):
    """Three and four of one length on a picture share a compilation, five to eight another."""
    pair = Pair(folders["own"])
    image = pictures(1)[0]
    questions = [f"what colour is the {word} ?" for word in WORDS.split()[3:11]]
    for count in (4, 3):
        pair.check("ask", image, questions[:count], max_new_tokens=5)
        assert pair.num_compiled == 1
    for count in (8, 5):
        pair.check("ask", image, questions[:count], max_new_tokens=5)
        assert pair.num_compiled == 2


def test_weights_changed_in_place_and_replaced(folders):
    pair = Pair(folders["captioning"])
    before = pair.check("caption", pictures(3), min_new_tokens=5)
    for model in (pair.eager, pair.ours):
        with torch.no_grad():
            model.network.decoder.layers[0].ffn.up_proj.weight.mul_(-1)
    changed = pair.check("caption", pictures(3), min_new_tokens=5)
    assert pair.num_compiled == 1
    assert [one.score for one in changed] != [one.score for one in before]
    for model in (pair.eager, pair.ours):
        model.network.double()
    exact = [model.caption(pictures(3)) for model in (pair.eager, pair.ours)]
    assert exact[0] == exact[1]
    assert pair.num_compiled == 2


def test_maps_are_recorded_beside_compiled_steps(pairs):
    pair = pairs["captioning"]
    found = []
    for model in (pair.eager, pair.ours):
        with mmattn.record_attention(model) as maps:
            text = model.caption(pictures(1)[0], min_new_tokens=4)
        found.append((text, maps.heatmap(text.split()[0])))
    assert found[0][0] == found[1][0]


def test_what_is_refused(folders, pairs):
    message = "compiles the steps of decoding, and a MatchingNetwork decodes nothing: leave it out"
    with pytest.raises(UsageError, match=message):
        VisionLanguageModel.from_pretrained(folders["matching"], device="cpu", compile=True)
    ours = pairs["captioning"].ours
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="compile=True does not go with autoc"):
        ours.caption(pictures(1))
    pictures_encoded = ours.encode(pictures(1))
    with observing(print), pytest.raises(UsageError, match="recorded or steered in compiled steps: open the model"):
        ours.caption(pictures_encoded)
    with pytest.raises(UsageError, match="max_length 49 is more than this model's 48 positions"):
        ours.caption(pictures(1), max_new_tokens=48)


def test_a_machine_that_cannot_compile(folders):
    def backend(*_: Any) -> Any:
        raise ValueError("no compiler here\nand more lines")

    ours = VisionLanguageModel.from_pretrained(folders["captioning"], device="cpu")
    expected = ours.caption(pictures(2))
    ours.compile(backend=backend)  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"compile=True: the step cannot be compiled here: .*; leave compile out$"):
        ours.caption(pictures(2))
    ours.compiled = None
    assert ours.caption(pictures(2)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioning", "gated"])
def test_compiled_by_inductor(folders, kind):
    pair = Pair(folders[kind], backend="inductor")
    for count in (3, 2, 7):
        pair.check("caption", pictures(count), num_beams=3, min_new_tokens=9)
    assert pair.num_compiled == 1
