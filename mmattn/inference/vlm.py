"""Captions, answers and match scores in three lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from mmattn.data.images import PixelTransform
from mmattn.errors import UsageError
from mmattn.inference import folders
from mmattn.inference.decode import DecodeSettings
from mmattn.inference.hub import evaluating, push_folder
from mmattn.inference.moving import NetworkFacade, suit_products
from mmattn.inference.origins import opened_from, origin_of
from mmattn.inference.pictures import ImageInput, Pictures, join, open_images
from mmattn.inference.text_side import TextSide
from mmattn.inference.texts import Pairing, pair_texts
from mmattn.inference.traced_products import trace_products
from mmattn.maps.record import recorders_of
from mmattn.models.sources import find_folder
from mmattn.models.vlm import (
    CaptioningNetwork,
    CompiledDecoder,
    MatchingNetwork,
    QuestionAnsweringNetwork,
    VisionLanguageNetwork,
    open_network,
    save_network,
)
from mmattn.models.vlm.blip import is_blip

ItemT = TypeVar("ItemT")
Images = ImageInput | Sequence[ImageInput] | Pictures
Texts = str | Sequence[str] | Sequence[Sequence[str]]


class VisionLanguageModel(NetworkFacade[VisionLanguageNetwork]):
    """A vision-language network with its tokenizer and image processor.

    BLIP captioning, question answering and matching, and our own networks (which caption and answer). Results come in
    the order and shape of what was given: one picture, one result; a list, a list.

    Generation arguments have transformers' names (`num_beams`, `max_new_tokens`, `do_sample`, `temperature`,
    `bad_words_ids`, ...; all of `DecodeSettings`). The checkpoint's `generation_config.json` gives their defaults.

    Args:
        network: from `mmattn.models.vlm`. It is put into evaluation mode during a call, and back after it.
        tokenizer: turns texts into the network's tokens.
        processor: image processor that resizes to a square, rescales and normalises.
        generation_config: defaults of the generation arguments.

    Attributes:
        settings: defaults of the generation arguments.
        compiled: takes the steps of decoding where they are compiled; None: they are not.
    """

    records_attention = True

    def __init__(
        self,
        network: VisionLanguageNetwork,
        tokenizer: PreTrainedTokenizerBase,
        processor: BlipImageProcessorPil,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.processor = processor
        self.generation_config = dict(generation_config or {})
        # A BLIP folder's own end token is not the one that its decoder stops at; the network's config knows.
        special = {"eos_token_id": network.config.stop_token_id, "pad_token_id": network.config.pad_token_id}
        values = {**self.generation_config, **special}
        self.settings = DecodeSettings.from_generation_config(values, network.config.vocab_size)
        self._transform = PixelTransform.from_processor(processor)
        self._is_stock = is_blip(network.config)
        self._texts = TextSide(network, tokenizer, is_stock=self._is_stock)
        self.compiled: CompiledDecoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        compile: bool = False,
    ) -> VisionLanguageModel:
        """Open a BLIP checkpoint, or one of ours, for inference.

        Args:
            id_or_folder: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            token: hub token; None: the stored one.
            variant: infix of the weight files, such as `fp16`.
            dtype: of the weights; None: bfloat16 (or float16) on a CUDA device, else float32.
            device: None: the first accelerator, else the CPU.
            local_files_only: never go to the network.
            compile: decode in compiled steps, see `compile()`.

        Raises:
            CheckpointError: nothing there, a model of another kind, or files that do not fit together.
            UsageError: `compile` with a checkpoint that decodes nothing.
        """
        folder = find_folder(
            id_or_folder, revision=revision, token=token, variant=variant, local_files_only=local_files_only
        )
        device = folders.usable_device(device)
        dtype = folders.default_dtype(device) if dtype is None else dtype
        network = open_network(folder, variant=variant, dtype=dtype, device=device)
        opened_from(network, folder)
        tokenizer = folders.open_tokenizer(folder, is_stock=is_blip(network.config))
        processor = folders.open_image_processor(folder)
        suit_products(network)
        model = cls(network, tokenizer, processor, folders.read_generation_config(folder))
        if compile:
            model.compile()
        return model

    def compile(self, *, backend: str = "inductor") -> None:
        """Decode from now on in steps of static shape, compiled at first use and replayed as CUDA graphs on a CUDA
        device: once for each number of beams (times the questions on a picture, rounded up to a power of two), and
        again for single pictures. Images and questions are encoded as before, and results stay the same.

        What cannot be done in them is refused: autocast, hooks on attention. Weights that change in place are seen;
        after weights, dtype or device are replaced the step is compiled anew. `model.compiled = None` goes back.

        Args:
            backend: of torch.compile.

        Raises:
            UsageError: a network that decodes nothing (matching), or a device other than a CPU or a CUDA device.
        """
        compiled = CompiledDecoder(self.network, backend=backend)
        trace_products(self.network)
        self.compiled = compiled

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizer, image processor and generation settings; stock classes open a BLIP folder.

        Raises:
            CheckpointError: a network that is no longer what its config says, or a disk that refuses.
        """
        folder = Path(folder)
        save_network(self.network, folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        special = {"bos_token_id": self.network.config.bos_token_id}
        special |= {"eos_token_id": self.network.config.stop_token_id, "pad_token_id": self.network.config.pad_token_id}
        folders.write_generation_config(folder, {**self.generation_config, **special})

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Save to a hub repository, made when it is not there; returns its address."""
        return push_folder(self.save_pretrained, repo_id, private=private, token=token, commit_message=commit_message)

    def encode(self, images: Images, *, batch_size: int | None = None, progress: bool | None = None) -> Pictures:
        """Encode pictures once, for any number of captions, questions and texts.

        Args:
            images: a Pillow picture, a path, bytes or a uint8 array, or a list of these; sizes may differ.
            batch_size: pictures encoded at a time; 8 on a CPU, 32 elsewhere by default.
            progress: show a progress bar; None: for more than one batch, on a terminal.

        Raises:
            DataError: a picture that is missing, damaged or too large.
            UsageError: something that is no picture.
        """
        if isinstance(images, Pictures):
            return images
        opened, is_single = open_images(images)
        with evaluating(self.network):
            parts = [self._encode(batch) for batch in self._batches(opened, batch_size, progress, "Encoding")]
        return join(parts, is_single=is_single)

    def caption(
        self,
        images: Images,
        prompt: str | Sequence[str] | None = None,
        *,
        return_scores: bool = False,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **generation: Any,
    ) -> Any:
        """Describe pictures.

        Args:
            images: as in `encode`, or what `encode` returned.
            prompt: how the captions shall begin, one for all or one for each picture; it is part of the result.
            return_scores: give `(text, score)` instead of the text.
            generator: source of the draws with `do_sample=True`; torch's global one by default.
            batch_size: pictures worked on at a time.
            progress: show a progress bar; None: for more than one batch, on a terminal.
            **generation: generation arguments.

        Returns:
            A caption for one picture, a list for a list; each is itself a list with `num_return_sequences` above 1.

        Raises:
            UsageError: this checkpoint does not caption, or an unknown generation argument.
        """
        self._need(CaptioningNetwork, "caption")
        settings = self.settings.updated(**generation).for_vocabulary(self.network.config.vocab_size)

        def run(pictures: Pictures, prompts: list[list[str]]) -> list[list[Any]]:
            ids = [[self._texts.caption_prompt(prompt) for prompt in of_picture] for of_picture in prompts]
            generated = self._texts.continue_prompts(pictures, ids, settings, generator, self.compiled)
            self._texts.record(self, pictures, self._texts.joined(ids, generated))
            return self._texts.to_texts(generated, ids, with_scores=return_scores)

        return self._run(images, "" if prompt is None else prompt, "prompts", run, batch_size, progress)

    def ask(
        self,
        images: Images,
        questions: Texts,
        *,
        return_scores: bool = False,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **generation: Any,
    ) -> Any:
        """Answer questions about pictures; each picture is encoded once, however many questions there are.

        Args:
            images: as in `encode`, or what `encode` returned.
            questions: one for every picture; a list with one for each picture, or all on the only picture; or a list of
                lists with the questions on each picture.
            return_scores: give `(text, score)` instead of the text.
            generator: source of the draws with `do_sample=True`; torch's global one by default.
            batch_size: pictures worked on at a time.
            progress: show a progress bar; None: for more than one batch, on a terminal.
            **generation: generation arguments.

        Returns:
            Answers in the shape of the questions.

        Raises:
            UsageError: this checkpoint does not answer questions, questions that do not fit the pictures, or an unknown
                generation argument.
        """
        kinds = (QuestionAnsweringNetwork,) if self._is_stock else (QuestionAnsweringNetwork, CaptioningNetwork)
        self._need(kinds, "ask")
        settings = self.settings.updated(**generation).for_vocabulary(self.network.config.vocab_size)

        def run(pictures: Pictures, texts: list[list[str]]) -> list[list[Any]]:
            if isinstance(self.network, QuestionAnsweringNetwork):
                generated = self._texts.answer(pictures, texts, settings, generator, self.compiled)
                self._texts.record(self, pictures, self._texts.ids_of(texts))
            else:
                ids = [[self._texts.question_prompt(question) for question in of_picture] for of_picture in texts]
                generated = self._texts.continue_prompts(pictures, ids, settings, generator, self.compiled)
                self._texts.record(self, pictures, self._texts.joined(ids, generated))
            return self._texts.to_texts(generated, None, with_scores=return_scores)

        return self._run(images, questions, "questions", run, batch_size, progress)

    def match(
        self,
        images: Images,
        texts: Texts,
        *,
        return_cosine: bool = False,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> Any:
        """How well texts describe pictures.

        Args:
            images: as in `encode`, or what `encode` returned.
            texts: as the questions of `ask`.
            return_cosine: give `(probability, cosine)`, the second from the embeddings without cross-attention.
            batch_size: pictures worked on at a time.
            progress: show a progress bar; None: for more than one batch, on a terminal.

        Returns:
            Probabilities that text and picture belong together, in the shape of the texts.

        Raises:
            UsageError: this checkpoint does not match, or texts that do not fit the pictures.
        """
        self._need(MatchingNetwork, "match")

        def run(pictures: Pictures, texts: list[list[str]]) -> list[list[Any]]:
            self._texts.record(self, pictures, self._texts.ids_of(texts))
            return self._texts.match(pictures, texts, with_cosine=return_cosine)

        return self._run(images, texts, "texts", run, batch_size, progress)

    # Batches of pictures with their texts.

    def _run(
        self,
        images: Images,
        texts: Any,
        name: str,
        run: Callable[[Pictures, list[list[str]]], list[list[Any]]],
        batch_size: int | None,
        progress: bool | None,
    ) -> Any:
        """Call `run` on batch after batch of encoded pictures, each with its texts."""
        if isinstance(images, Pictures):
            self._check_encoded("pictures", images.contexts, images.origin)
            opened, is_single = None, images.is_single
        else:
            # Photographs by the thousand, all checked before the first is worked on: only maps are drawn on them whole.
            keep = None if recorders_of(self) else self._transform.fitted
            opened, is_single = open_images(images, keep=keep)
        count = len(images) if opened is None else len(opened)  # type: ignore[arg-type]
        pairing: Pairing = pair_texts(texts, count, is_single=is_single, name=name)
        results: list[list[Any]] = []
        with evaluating(self.network):
            for numbers in self._batches(range(count), batch_size, progress, name.capitalize()):
                if opened is None:
                    pictures = images.select(numbers, is_single=is_single)  # type: ignore[union-attr]
                else:
                    pictures = self._encode([opened[number] for number in numbers])
                results += run(pictures, [pairing.texts[number] for number in numbers])
        return pairing.restore(results)

    def _encode(self, images: list[Any]) -> Pictures:
        pixel_values = self._transform(images).to(self.device)
        features = self.network.encode_images(pixel_values)
        contexts = self.network.project_context(features)  # type: ignore[operator]
        return Pictures(features, contexts, tuple(images), origin=origin_of(self.network))

    def _batches(
        self, items: Sequence[ItemT], batch_size: int | None, progress: bool | None, label: str
    ) -> Iterator[list[ItemT]]:
        size = (8 if self.device.type == "cpu" else 32) if batch_size is None else batch_size
        if not isinstance(size, int) or size < 1:
            raise UsageError(f"batch_size is {size!r}; it must be a whole number of at least 1")
        # tqdm leaves a bar out by itself, with None, where there is no terminal.
        hidden = (None if len(items) > size else True) if progress is None else not progress
        with tqdm(total=len(items), desc=label, unit="picture", disable=hidden) as bar:
            for first in range(0, len(items), size):
                batch = list(items[first : first + size])
                yield batch
                bar.update(len(batch))

    def _need(self, kinds: type | tuple[type, ...], verb: str) -> None:
        if isinstance(self.network, kinds):
            return
        able = {CaptioningNetwork: "caption()", QuestionAnsweringNetwork: "ask()", MatchingNetwork: "match()"}
        can = able[type(self.network)]
        can += " and ask()" if isinstance(self.network, CaptioningNetwork) and not self._is_stock else ""
        example = {"caption": "image-captioning", "ask": "vqa", "match": "itm"}[verb]
        raise UsageError(
            f"this checkpoint ({type(self.network).__name__}) can {can}, not {verb}(): "
            f"open one for it, such as Salesforce/blip-{example}-base{'-coco' if verb == 'match' else ''}"
        )
