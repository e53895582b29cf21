"""How a translator's tokenizer is told the languages: OPUS-MT's `>>deu<<`, M2M100's `de`, NLLB's `deu_Latn`."""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from mmattn.errors import UsageError

_NLLB_CODE = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_MARIAN_CODE = re.compile(r">>(.+)<<")
# The source language is a state of the tokenizer, and threads may share one.
_SWITCHING = threading.Lock()


class LanguageCodes:
    """The languages of one tokenizer.

    Three kinds: "none" (one pair of languages, nothing to say), "tag" (a tag before the source text names the target,
    as in OPUS-MT's multilingual checkpoints) and "token" (a token before the source names its language, and the first
    target token names the target's: M2M100, NLLB).

    Args:
        tokenizer: a translator's tokenizer.

    Attributes:
        tokenizer: the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer: Any = tokenizer

    @cached_property
    def kind(self) -> str:
        """ "none", "tag" or "token"."""
        if hasattr(self.tokenizer, "src_lang"):
            return "token"
        return "tag" if self.known else "none"

    @cached_property
    def known(self) -> tuple[str, ...]:
        """Codes of the languages, sorted; empty for a tokenizer of one pair."""
        tokenizer = self.tokenizer
        if hasattr(tokenizer, "lang_code_to_token"):
            return tuple(sorted(tokenizer.lang_code_to_token))
        if hasattr(tokenizer, "src_lang"):
            added = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
            return tuple(sorted(code for code in added if _NLLB_CODE.fullmatch(code)))
        tags = getattr(tokenizer, "supported_language_codes", None) or ()
        return tuple(sorted(match[1] for tag in tags if (match := _MARIAN_CODE.fullmatch(tag))))

    def check(self, code: str, argument: str) -> str:
        """The code, when it is known.

        Raises:
            UsageError: an unknown code; the message names the nearest.
        """
        if code in self.known:
            return code
        if not self.known:
            raise UsageError(f"{argument}={code!r}: this model translates one pair of languages, leave {argument} out")
        if not isinstance(code, str):
            raise UsageError(f"{argument}={code!r} is no language code: give a str such as {self.known[0]!r}")
        near = difflib.get_close_matches(code, self.known, n=3, cutoff=0.5)
        near += [known for known in self.known if known not in near and known.startswith(code[:2])][: 3 - len(near)]
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UsageError(
            f"{argument}={code!r} is no language of this model{hint} ({len(self.known)} codes, such as "
            f"{', '.join(self.known[:3])})"
        )

    def target_token(self, code: str) -> int:
        """The id of the token that a target text in this language starts with ("token" only)."""
        tokenizer = self.tokenizer
        self.check(code, "tgt_lang")
        token = tokenizer.lang_code_to_token[code] if hasattr(tokenizer, "lang_code_to_token") else code
        return int(tokenizer.convert_tokens_to_ids(token))

    @cached_property
    def tokens(self) -> frozenset[str]:
        """What stands for a language among the tokens, of a source or of a target text."""
        if self.kind == "tag":
            return frozenset(f">>{code}<<" for code in self.known)
        return frozenset(getattr(self.tokenizer, "lang_code_to_token", {}).values() or self.known)

    def source_ids(self, texts: Sequence[str], src_lang: str | None = None, tgt_lang: str | None = None) -> list[Any]:
        """Token ids of source texts in one language, for one target language.

        Args:
            texts: the texts.
            src_lang: their language ("token" only); None: the tokenizer's own.
            tgt_lang: the language to translate into ("tag" only; elsewhere the first target token says it). A text
                that names its target by itself keeps it.

        Raises:
            UsageError: an unknown code.
        """
        tokenizer = self.tokenizer
        if not texts:
            return []
        if self.kind == "token":
            with _SWITCHING:
                own = tokenizer.src_lang
                if src_lang is not None:
                    tokenizer.src_lang = self.check(src_lang, "src_lang")
                try:
                    return list(tokenizer(list(texts)).input_ids)
                finally:
                    tokenizer.src_lang = own
        if self.kind == "tag" and tgt_lang is not None:
            tag = f">>{self.check(tgt_lang, 'tgt_lang')}<< "
            texts = [text if self.has_tag(text) else tag + text for text in texts]
        return list(tokenizer(list(texts)).input_ids)

    def has_tag(self, text: str) -> bool:
        """Whether a source text names its target by itself, as `>>deu<< ...`."""
        match = re.match(r">>([^<]+)<<", text)
        return match is not None and match[1] in self.known
