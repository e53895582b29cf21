"""Text-to-image batches: layout, values, purity, crops and mirroring, captions and their dropout, noise, caches."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from mmattn.data.buckets import usable_source
from mmattn.data.cached_inputs import cache_latents, cache_texts, pad_texts, text_entries
from mmattn.data.captions import all_captions
from mmattn.data.picture_fit import fit_picture
from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextRecord, TextItem
from mmattn.data.scenes import SceneDataset
from mmattn.data.source_facts import source_facts
from mmattn.data.text_to_image import NoiseConfig, NoiseShape, PictureConfig, TextToImageCollator
from mmattn.errors import ConfigError, DataError, UsageError
from tests.data.test_buckets import write_pictures

SCENES = SceneDataset("train", 300, seed=1)
GRADIENT = np.indices((37, 61)).transpose(1, 2, 0)
GRADIENT = np.concatenate([GRADIENT, GRADIENT[..., :1] * 0], axis=2).astype(np.uint8)  # red: row, green: column


class Pictures:
    """Equal pictures with given texts."""

    name = "pictures"

    def __init__(self, texts, image=GRADIENT):
        self.items, self.image = texts, image

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return ImageTextRecord(f"pictures/{index}", self.image, tuple(self.items[index]))


def tokenize(captions):
    """Characters, so that a batch can be read back."""
    length = max(1, *map(len, captions))
    ids = torch.tensor([[ord(letter) for letter in caption.ljust(length, "\0")] for caption in captions])
    return {"input_ids": ids, "attention_mask": ids > 0}


def words(row):
    return "".join(chr(number) for number in row.tolist() if number)


def collator(pictures=None, noise=None, **options):
    settings = {"seed": 5, "noise_shape": NoiseShape(), "tokenize": tokenize, **options}
    if "texts" in options:
        del settings["tokenize"]
    return TextToImageCollator(pictures or PictureConfig(resolution=32), noise or NoiseConfig(), **settings)


def test_the_batch():
    batch = collator(
        noise=NoiseConfig(offset_noise=0.1), noise_shape=NoiseShape(7, 4), has_posterior=True, has_time_ids=True
    )(SCENES, [(0, 3), (0, 5), (1, 3)])
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    length = batch["input_ids"].shape[1]
    assert shapes == {
        "pixels": ((3, 3, 32, 32), torch.float32),
        "noise": ((3, 7, 8, 8), torch.float32),
        "posterior": ((3, 7, 8, 8), torch.float32),
        "offset": ((3, 7, 1, 1), torch.float32),
        "timesteps": ((3,), torch.int64),
        "time_ids": ((3, 6), torch.float32),
        "input_ids": ((3, length), torch.int64),
        "attention_mask": ((3, length), torch.bool),
    }
    records = SCENES.records([3, 5, 3])
    expected = torch.from_numpy(np.stack([record.image for record in records])).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(batch["pixels"], expected)
    assert batch["pixels"].is_contiguous()
    assert [words(row) for row in batch["input_ids"]] == [record.texts[0].text for record in records]
    assert set(collator()(SCENES, [(0, 1)])) == {"pixels", "noise", "timesteps", "input_ids", "attention_mask"}


def test_a_row_depends_on_seed_epoch_and_example_only():
    options = {
        "pictures": PictureConfig(resolution=32, crop="random", flip=True),
        "noise": NoiseConfig(offset_noise=0.1),
        "caption_dropout": 0.3,
        "has_posterior": True,
        "has_time_ids": True,
    }
    source = Pictures([[TextItem(f"text {number}"), TextItem(f"other {number}")] for number in range(40)])
    draws = [(epoch, example) for epoch in (0, 7) for example in range(40)]
    batch = collator(**options)(source, draws)
    for row, draw in ((3, (0, 3)), (79, (7, 39))):
        alone = pickle.loads(pickle.dumps(collator(**options)))(source, [draw])
        for key in ("pixels", "noise", "posterior", "offset", "timesteps", "time_ids"):
            assert torch.equal(alone[key][0], batch[key][row])
        assert words(alone["input_ids"][0]) == words(batch["input_ids"][row])
    assert not torch.equal(batch["noise"][3], batch["noise"][43])
    assert not torch.equal(batch["noise"][3], batch["posterior"][3])
    other = collator(**options, **{"seed": 6})(source, draws)
    assert not torch.equal(other["noise"][3], batch["noise"][3])
    assert not torch.equal(other["timesteps"], batch["timesteps"])


def test_pictures_are_covered_and_cropped():
    fitted = fit_picture(GRADIENT, (37, 37))
    assert np.array_equal(fitted.pixels, GRADIENT[:, 12:49])
    assert fitted.time_ids() == (37, 61, 0, 12, 37, 37)
    mirrored = fit_picture(GRADIENT, (37, 37), place=(0.5, 0.0), mirrored=True)
    assert np.array_equal(mirrored.pixels, GRADIENT[:, ::-1][:, :37])
    assert mirrored.crop == (0, 0)
    small = fit_picture(GRADIENT, (13, 29), place=(0.999, 0.5))
    assert small.pixels.shape == (13, 29, 3)
    assert (small.original, small.crop) == ((37, 61), (5, 0))
    assert small.pixels[-1, :, 0].min() > 33
    assert fit_picture(GRADIENT, (101, 59)).pixels.shape == (101, 59, 3)


def test_random_crops_reach_both_ends_and_half_are_mirrored():
    config = PictureConfig(resolution=37, crop="random", flip=True)
    batch = collator(config, has_time_ids=True)(Pictures([[TextItem("x")]] * 600), [(0, index) for index in range(600)])
    lefts = batch["time_ids"][:, 3]
    assert (lefts.min(), lefts.max()) == (0, 24)
    is_mirrored = batch["pixels"][:, 1, 0, 0] > batch["pixels"][:, 1, 0, -1]
    assert float(is_mirrored.float().mean()) == pytest.approx(0.5, abs=0.08)
    for row in range(8):
        left = int(lefts[row])
        columns = range(60 - left, 23 - left, -1) if is_mirrored[row] else range(left, left + 37)
        found = ((batch["pixels"][row, 1, 0] + 1) * 127.5).round().int().tolist()
        assert found == list(columns)


def test_captions_are_drawn_alike_and_dropped_by_chance():
    texts = [TextItem("a"), TextItem("left", "where?", "relation"), TextItem(" b "), TextItem("c"), TextItem(" ")]
    source = Pictures([texts] * 2000, GRADIENT[:8, :8])
    batch = collator(PictureConfig(resolution=8), caption_dropout=0.2)(source, [(2, index) for index in range(2000)])
    counts = Counter(words(row) for row in batch["input_ids"])
    assert set(counts) == {"", "a", "b", "c"}
    assert counts[""] / 2000 == pytest.approx(0.2, abs=0.04)
    assert all(counts[letter] / 1600 == pytest.approx(1 / 3, abs=0.05) for letter in "abc")
    assert all_captions(source) == ["a", "b", "c"]
    every = collator(PictureConfig(resolution=8), caption_dropout=1.0)(source, [(0, 1), (0, 2)])
    assert [words(row) for row in every["input_ids"]] == ["", ""]


def test_noise_and_timesteps_are_distributed_as_said():
    draws = [(0, index) for index in range(300)] + [(3, index) for index in range(300)]
    batch = collator(noise=NoiseConfig(offset_noise=0.5))(Pictures([[TextItem("x")]] * 300), draws)
    assert float(batch["noise"].mean()) == pytest.approx(0, abs=0.01)
    assert float(batch["noise"].std()) == pytest.approx(1, abs=0.01)
    assert float(batch["offset"].std()) == pytest.approx(1, abs=0.1)  # its strength is the loss's affair
    shares = batch["timesteps"].double() / 1000
    assert (int(batch["timesteps"].min()), int(batch["timesteps"].max())) >= (0, 900)
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(shares.std()) == pytest.approx(12**-0.5, abs=0.03)
    config = NoiseConfig(timestep_sampling="logit_normal", timestep_mean=1, timestep_std=0.5)
    collate = collator(noise=config, num_train_timesteps=100_000)
    timesteps = collate(Pictures([[TextItem("x")]] * 300), draws)["timesteps"]
    normal = torch.logit((timesteps.double() + 0.5) / 100_000)
    assert float(normal.mean()) == pytest.approx(1, abs=0.1)
    assert float(normal.std()) == pytest.approx(0.5, abs=0.05)
    few = collator(num_train_timesteps=3)(Pictures([[TextItem("x")]] * 300), draws)["timesteps"]
    assert few.unique().tolist() == [0, 1, 2]


def test_missing_captions_are_named():
    source = Pictures([[TextItem("left", "where?", "relation")], [TextItem("  ")], [TextItem("x")]])
    with pytest.raises(DataError, match=r"^pictures/0: no caption, only answers to questions \(relation\); give every"):
        collator()(source, [(0, 0)])
    with pytest.raises(DataError, match="^pictures/1: no caption, an empty text; give every picture a caption"):
        usable_source(source, PictureConfig(resolution=32))[1]
    assert usable_source(source, PictureConfig(resolution=32))[2].id == "pictures/2"


def test_tiny_pictures_are_named():
    source = Pictures([[TextItem("x")]])
    with pytest.raises(
        DataError, match=r"^pictures/0: picture too small \(61 x 37 pixels\): .* 3\.5 times to 128 x 128"
    ):
        usable_source(source, PictureConfig(resolution=128))[0]
    with pytest.raises(
        DataError, match=r"its shorter side is below pictures\.min_side 40; leave it out, or lower that"
    ):
        usable_source(source, PictureConfig(resolution=8, min_side=40))[0]
    assert usable_source(source, PictureConfig(resolution=128, min_side=37))[0].id == "pictures/0"
    assert usable_source(SCENES, PictureConfig(resolution=64)).records([1, 2])[1].id == "scenes/train/2"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PictureConfig(resolution=0), "pictures.resolution must be 1 or more, not 0"),
        (lambda: PictureConfig(crop="left"), "pictures.crop must be one of center, random, not 'left'"),
        (lambda: PictureConfig(max_aspect=0.5), "pictures.max_aspect must be 1 or more, not 0.5"),
        (lambda: PictureConfig(resolution=100, buckets=True), "resolution 100 must be a multiple of pictures.step 64"),
        (lambda: PictureConfig(min_side=0), "pictures.min_side must be 1 or more, or null, not 0"),
        (lambda: NoiseConfig(timestep_sampling="cubic"), "must be one of uniform, logit_normal, not 'cubic'"),
        (lambda: NoiseConfig(timestep_std=0.0), "timestep_std positive, not 0.0 and 0.0"),
        (lambda: NoiseConfig(offset_noise=-0.1), "offset_noise must be 0 or more, not -0.1"),
    ],
)
def test_settings_that_cannot_be_used(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_parts_that_do_not_fit():
    with pytest.raises(UsageError, match="either tokenize or texts"):
        TextToImageCollator(PictureConfig(), NoiseConfig(), seed=0, noise_shape=NoiseShape())
    with pytest.raises(UsageError, match="caption_dropout must lie between 0 and 1, not 1.5"):
        collator(caption_dropout=1.5)
    with pytest.raises(UsageError, match=r"pictures\.buckets needs the sizes of the examples"):
        collator(PictureConfig(resolution=64, buckets=True))
    with pytest.raises(UsageError, match="crop=random cannot be had from cached latents: use center"):
        collator(PictureConfig(crop="random"), latents={})
    with pytest.raises(UsageError, match="pictures of 32 x 32 pixels: the model needs multiples of 5"):
        collator(noise_shape=NoiseShape(3, 5))(SCENES, [(0, 0)])
    sized = collator(PictureConfig(resolution=32, buckets=True, step=8), sizes=np.array([[32, 32], [24, 40], [24, 40]]))
    with pytest.raises(UsageError, match=r"several sizes cannot share a batch \(40 x 24, 32 x 32\): set Task\.groups"):
        sized(SCENES, [(0, 0), (0, 1)])
    assert sized(SCENES, [(0, 1), (0, 2)])["noise"].shape == (2, 3, 24, 40)
    with pytest.raises(UsageError, match="tokenize gives noise, which the batch holds already"):
        collator(tokenize=lambda captions: {"noise": torch.zeros(len(captions))})(SCENES, [(0, 0)])


def encode_texts(captions):
    """A vector a letter, and one a caption."""
    tokens = tokenize(captions)
    states = tokens["input_ids"][..., None] * torch.tensor([1.0, 2.0, 3.0])
    return text_entries(states, tokens["attention_mask"], states.sum(dim=1))


def test_cached_texts_give_what_the_encoder_gives(tmp_path):
    cache = cache_texts(SCENES, tmp_path, {"encoder": "letters"}, encode_texts)
    assert cache.keys == ["", *all_captions(SCENES)]
    options = {"caption_dropout": 0.5}
    draws = [(0, index) for index in range(9)]
    tokens, cached = collator(**options)(SCENES, draws), collator(texts=cache, **options)(SCENES, draws)
    assert torch.equal(cached["text_states"][..., 0].long(), tokens["input_ids"])
    assert torch.equal(cached["text_mask"], tokens["attention_mask"])
    assert torch.equal(cached["pooled"][:, 0].long(), tokens["input_ids"].sum(dim=1))
    assert not bool(cached["text_mask"].any(dim=1).all())  # a dropped caption has no letters
    assert torch.equal(cached["noise"], tokens["noise"])


def test_padding_is_kept_where_it_is_attended_to():
    states = torch.randn(2, 5, 3)
    assert set(pad_texts(text_entries(states))) == {"text_states"}
    assert torch.equal(pad_texts(text_entries(states))["text_states"], states)
    left = torch.tensor([[False, True, True, False, True], [True] * 5])
    batch = pad_texts(text_entries(states, left))
    assert torch.equal(batch["text_states"][0, :3], states[0, left[0]])
    assert batch["text_mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert pad_texts(text_entries(states[:1], torch.zeros(1, 5, dtype=torch.bool)))["text_mask"].tolist() == [[False]]


def encode_pictures(pixels):
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return torch.cat([mean, mean[:, :1]], dim=1), torch.full((len(mean), 4, *mean.shape[2:]), 0.25)


def test_cached_latents_carry_the_captions_of_their_own_record(tmp_path, caplog):
    spec = write_pictures(tmp_path, [(50, 70), (64, 40), (40, 64), (48, 48)])
    (tmp_path / "1.png").write_bytes(b"nothing")
    config = PictureConfig(resolution=32, flip=True)
    source = usable_source(open_image_text(spec), config)
    cache = cache_latents(source, config, tmp_path / "cache", source_facts(source), encode_pictures, batch_size=3)
    assert len(cache) == 8
    draws = [(epoch, example) for epoch in range(4) for example in range(4)]
    options = {"noise_shape": NoiseShape(4, 8), "has_time_ids": True}
    cached = collator(config, latents=cache, **options)(Pictures([]), draws)  # no picture is opened
    direct = collator(config, has_posterior=True, **options)(source, draws)
    assert "pixels" not in cached
    mean, std = encode_pictures(direct["pixels"])
    torch.testing.assert_close(cached["latent_mean"], mean)
    torch.testing.assert_close(cached["latent_std"], std)
    for key in ("input_ids", "posterior", "noise", "timesteps", "time_ids"):
        assert torch.equal(cached[key], direct[key])
    assert "picture 1" not in {words(row) for row in cached["input_ids"]}
    with pytest.raises(UsageError, match=r"latents have shape \(4, 4, 4\), and the noise has \(3, 4, 4\)"):
        collator(config, latents=cache, noise_shape=NoiseShape(3, 8))(source, draws)
    with pytest.raises(UsageError, match=r"pictures\.crop=random cannot be cached: use center"):
        cache_latents(source, PictureConfig(crop="random"), tmp_path, {}, encode_pictures)


def test_latents_of_buckets_are_made_size_by_size(tmp_path):
    seen = []

    def encode(pixels):
        seen.append(tuple(pixels.shape))
        return encode_pictures(pixels)

    sizes = np.array([[32, 32], [24, 40], [32, 32], [24, 40], [32, 32]])
    config = PictureConfig(resolution=32, buckets=True, step=8)
    cache = cache_latents(SceneDataset("train", 5), config, tmp_path, {}, encode, sizes=sizes, batch_size=3)
    assert seen == [(2, 3, 24, 40), (1, 3, 32, 32), (2, 3, 32, 32)]
    made = collator(config, latents=cache, sizes=sizes, noise_shape=NoiseShape(4, 8))
    assert made(SCENES, [(0, 1), (0, 3)])["latent_mean"].shape == (2, 4, 3, 5)


def test_a_changed_data_set_has_other_facts(tmp_path):
    spec = write_pictures(tmp_path, [(50, 70), (64, 40)])
    before = source_facts(open_image_text(spec))
    assert source_facts(open_image_text(spec)) == before
    write_pictures(tmp_path, [(50, 70), (64, 41)])
    pictures = source_facts(open_image_text(spec))
    write_pictures(tmp_path, [(50, 70), (64, 41)], ["picture 0", "another text"])
    fewer = source_facts(open_image_text(dataclasses.replace(spec, max_pixels=3000)))  # others have substitutes
    assert len({str(facts) for facts in (before, pictures, source_facts(open_image_text(spec)), fewer)}) == 4
    assert source_facts(SCENES) != source_facts(SceneDataset("train", 300, seed=2))
    texts = [[TextItem("a")], [TextItem("b")]]
    assert source_facts(Pictures(texts)) != source_facts(Pictures(texts, GRADIENT[::-1]))
