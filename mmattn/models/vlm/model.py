"""The three vision-language networks: captioning, question answering, image-text matching.

B pictures, n texts per picture, R = B * n rows (row i belongs to picture i // n), L tokens, Lk features of a picture,
C channels, V vocabulary. BLIP is arXiv 2201.12086.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from mmattn.errors import UsageError
from mmattn.models.decoding import DecoderState, LayerContexts
from mmattn.models.scoring import TextOutput, score_labels
from mmattn.models.vlm.config import VLMConfig
from mmattn.models.vlm.text import TextDecoder, TextLayers, init_text_weights
from mmattn.models.vlm.vision import ImageEncoder
from mmattn.nn import CrossAttention, GatedCrossAttention, TransformerLayer
from mmattn.ops.segments import Segments


class VisionLanguageNetwork(nn.Module):
    """What the three networks share: a config and an image encoder."""

    task = ""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        config.validate()
        if config.task != self.task:
            raise UsageError(f"{type(self).__name__} does {self.task}, the config says task: {config.task}")
        self.config = config
        self.image = ImageEncoder(config.image)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` to features `[B, Lk, C]`."""
        return self.image(pixel_values)

    def _features(self, pixel_values: Tensor | None, features: Tensor | None) -> Tensor:
        if pixel_values is not None and features is None:
            return self.encode_images(pixel_values)
        if features is not None and pixel_values is None:
            return features
        raise UsageError("pass either pixel_values or features, the output of encode_images()")


class CaptioningNetwork(VisionLanguageNetwork):
    """Image encoder and text decoder. A prompt, or a question, may come before the text."""

    task = "captioning"

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        self.decoder = TextDecoder(config.text, context_dim=config.image.embed_dim)
        init_text_weights(self, config.text.initializer_range)

    def project_context(self, features: Tensor, key_mask: Tensor | None = None) -> LayerContexts:
        """Image keys and values, once per picture, an entry per decoder layer (None: it has no cross-attention)."""
        return self.decoder.project_context(features, key_mask)

    def start(self, context: LayerContexts, *, rows_per_context: int = 1, max_length: int) -> DecoderState:
        """Begin decoding texts on projected pictures; see `DecoderState`."""
        return DecoderState(self.decoder, context, rows_per_context=rows_per_context, max_length=max_length)

    def forward(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
        segments: Segments | None = None,
    ) -> TextOutput:
        """Score texts, each under its picture.

        Args:
            pixel_values: `[B, 3, H, W]`, or None when `features` are given; both None: a text model without a picture.
            input_ids: `[R, L]`; the n texts of a picture share its keys and values.
            labels: `[R, L]`, aligned with `input_ids` (the shift by one is made here), -100 where nothing is scored.
            attention_mask: `[R, L]`, 1 or True at real tokens.
            features: `[B, Lk, C]` from `encode_images`.
            segments: the R texts that `input_ids [N]` holds one after the other, without padding and each without its
                last token, which has nothing to predict. `labels [N]` are then the tokens that follow: no shift.

        Raises:
            UsageError: shapes that do not agree, or an `attention_mask` with `segments`.
        """
        # Projected inside the layers: where those are sharded, their weights are whole only while they run.
        has_picture = pixel_values is not None or features is not None
        contexts = self._features(pixel_values, features) if has_picture else None
        hidden = self.decoder(input_ids, contexts, key_mask=_as_bool(attention_mask), segments=segments)
        return _text_output(self.decoder, hidden, labels, is_shifted=segments is not None)


@dataclass(frozen=True)
class QuestionStates:
    """Encoded questions: `hidden [R, L, C]`, and `key_mask` bool `[R, L]` where some are padded."""

    hidden: Tensor
    key_mask: Tensor | None = None

    def select(self, rows: Tensor) -> QuestionStates:
        """The questions of the given numbers, int64 `[R']`."""
        return QuestionStates(self.hidden[rows], None if self.key_mask is None else self.key_mask[rows])


class QuestionAnsweringNetwork(VisionLanguageNetwork):
    """BLIP for questions: a text encoder attends to the picture, the answer decoder to the encoder's states."""

    task = "question_answering"

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        self.question_encoder = TextLayers(config.text, context_dim=config.image.embed_dim, is_causal=False)
        self.decoder = TextDecoder(config.text, context_dim=config.text.embed_dim)
        init_text_weights(self, config.text.initializer_range)

    def project_context(self, features: Tensor, key_mask: Tensor | None = None) -> LayerContexts:
        """Image keys and values for the question encoder, once per picture, an entry per layer."""
        return self.question_encoder.project_context(features, key_mask)

    def encode_questions(
        self, context: LayerContexts | Tensor, question_ids: Tensor, attention_mask: Tensor | None = None
    ) -> QuestionStates:
        """Questions `[R, L]`, n on each of B pictures, to their states.

        Args:
            context: what `project_context` gave, or features `[B, Lk, C]`.
            question_ids: `[R, L]`.
            attention_mask: `[R, L]`, 1 or True at real tokens.
        """
        contexts = self.project_context(context) if isinstance(context, Tensor) else context
        key_mask = _as_bool(attention_mask)
        return QuestionStates(self.question_encoder(question_ids, contexts, key_mask=key_mask), key_mask)

    def start(self, questions: QuestionStates, *, rows_per_context: int = 1, max_length: int) -> DecoderState:
        """Begin decoding answers, `rows_per_context` rows per question; see `DecoderState`."""
        contexts = self.decoder.project_context(questions.hidden, questions.key_mask)
        return DecoderState(self.decoder, contexts, rows_per_context=rows_per_context, max_length=max_length)

    def forward(
        self,
        pixel_values: Tensor | None,
        question_ids: Tensor,
        input_ids: Tensor,
        *,
        question_mask: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
    ) -> TextOutput:
        """Score answers `input_ids [R, L]`, each to its question `[R, Lq]`; the rest as `CaptioningNetwork.forward`."""
        mask, features = _as_bool(question_mask), self._features(pixel_values, features)
        # Projected inside the layers, as in `CaptioningNetwork.forward`.
        questions = self.question_encoder(question_ids, features, key_mask=mask)
        hidden = self.decoder(input_ids, questions, context_mask=mask, key_mask=_as_bool(attention_mask))
        return _text_output(self.decoder, hidden, labels)


@dataclass(frozen=True)
class MatchScores:
    """How well each text fits its picture: `probability [R]` from the matching head, `cosine [R]` of the embeddings."""

    probability: Tensor
    cosine: Tensor


class MatchingNetwork(VisionLanguageNetwork):
    """BLIP for image-text matching: a head on the text encoder that sees the picture, and a cosine without."""

    task = "matching"

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        self.text_encoder = TextLayers(config.text, context_dim=config.image.embed_dim, is_causal=False)
        self.image_proj = nn.Linear(config.image.embed_dim, config.image_text_dim)
        self.text_proj = nn.Linear(config.text.embed_dim, config.image_text_dim)
        self.match_head = nn.Linear(config.text.embed_dim, 2)
        init_text_weights(self, config.text.initializer_range)

    def project_context(self, features: Tensor, key_mask: Tensor | None = None) -> LayerContexts:
        """Image keys and values for the text encoder, once per picture, an entry per layer."""
        return self.text_encoder.project_context(features, key_mask)

    def embed_images(self, features: Tensor) -> Tensor:
        """Features `[B, Lk, C]` to unit vectors `[B, E]`, read off the first feature."""
        return F.normalize(self.image_proj(features[:, 0]), dim=-1)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Texts `[R, L]` to unit vectors `[R, E]`, no picture seen."""
        hidden = self.text_encoder(input_ids, key_mask=_as_bool(attention_mask))
        return F.normalize(self.text_proj(hidden[:, 0]), dim=-1)

    def match_logits(
        self, context: LayerContexts | Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The matching head's `[R, 2]` (no match, match) for texts `[R, L]` under projected pictures or features."""
        hidden = self.text_encoder(input_ids, context, key_mask=_as_bool(attention_mask))
        return self.match_head(hidden[:, 0])

    def match_scores(
        self,
        features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        context: LayerContexts | None = None,
    ) -> MatchScores:
        """Both scores of each text with its picture.

        Args:
            features: `[B, Lk, C]` from `encode_images`.
            input_ids: `[R, L]`, n texts per picture.
            attention_mask: `[R, L]`, 1 or True at real tokens.
            context: `project_context(features)` where the caller has it already.
        """
        logits = self.match_logits(features if context is None else context, input_ids, attention_mask)
        images = self.embed_images(features).repeat_interleave(input_ids.shape[0] // features.shape[0], dim=0)
        cosine = (images * self.embed_texts(input_ids, attention_mask)).sum(-1)
        return MatchScores(logits.softmax(-1)[:, 1], cosine)

    def forward(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The matching head's logits `[R, 2]`."""
        return self.match_logits(self._features(pixel_values, features), input_ids, attention_mask)


NETWORKS: dict[str, type[VisionLanguageNetwork]] = {
    network.task: network for network in (CaptioningNetwork, QuestionAnsweringNetwork, MatchingNetwork)
}


def build_network(config: VLMConfig) -> VisionLanguageNetwork:
    """A network of `config.task` with fresh weights, drawn from torch's global generator.

    Raises:
        ConfigError: a config whose parts do not fit together.
    """
    config.validate()
    return NETWORKS[config.task](config)


def cross_attention_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every cross-attention sub-layer by name, with their norms, and whole gated blocks."""
    prefixes: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, CrossAttention | GatedCrossAttention):
            prefixes.append(f"{name}.")
        elif isinstance(module, TransformerLayer):
            prefixes.append(f"{name}.cross_attn_norm.")
    return {name: parameter for name, parameter in network.named_parameters() if name.startswith(tuple(prefixes))}


def _as_bool(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()


def _text_output(
    decoder: TextDecoder, hidden: Tensor, labels: Tensor | None, *, is_shifted: bool = False
) -> TextOutput:
    if labels is None:
        return TextOutput(decoder.logits(hidden))
    if labels.shape != hidden.shape[:-1]:
        raise UsageError(f"labels has shape {list(labels.shape)}, the texts {list(hidden.shape[:-1])}: they must agree")
    if not is_shifted:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    words, smoothing = decoder.body.embedding.words.weight, decoder.config.label_smoothing
    return score_labels(hidden, labels, decoder.head, words, label_smoothing=smoothing)
