"""What a call of the translator says: its texts, and their languages as far as the model wants to be told them."""

from __future__ import annotations

from collections.abc import Sequence

from mmattn.data.languages import LanguageCodes
from mmattn.errors import UsageError
from mmattn.inference.sources import Plan, each_text, make_plan


def plan_call(
    texts: str | Sequence[str],
    codes: LanguageCodes,
    src_lang: str | Sequence[str] | None,
    tgt_lang: str | Sequence[str] | None,
    on_long: str,
    *,
    limit: int,
) -> Plan:
    """The plan of a call, whose arguments are those of `Translator.encode`; `limit` is the model's longest source.

    Raises:
        UsageError: as `make_plan`; an unknown `on_long`, a language that the model does not take, or none where it
            needs one.
    """
    if on_long not in ("split", "error"):
        raise UsageError(f"on_long={on_long!r} is unknown: use 'split' or 'error'")
    if codes.kind != "token" and src_lang is not None:
        raise UsageError("src_lang is given, but this model knows its source language: leave it out")
    plan = make_plan(texts, codes, src_lang, tgt_lang, limit=limit, may_split=on_long == "split")
    if codes.kind == "tag" and any(each.tgt_lang is None and not codes.has_tag(each.text) for each in plan.segments):
        raise UsageError(
            f"this model translates into {len(codes.known)} languages: give tgt_lang, one of "
            f"{', '.join(codes.known[:8])}{'...' if len(codes.known) > 8 else ''}"
        )
    return plan


def target_tokens(
    plan: Plan, codes: LanguageCodes, tgt_lang: str | Sequence[str] | None, forced: int | None
) -> list[int | None]:
    """The first token forced on each segment's translation, or None.

    Args:
        plan: the call's.
        codes: the model's languages.
        tgt_lang: given with texts that are encoded already; it comes before what was given then.
        forced: the token where no language asks for one.

    Raises:
        UsageError: a language that is part of the source text, an unknown one, or none where the model needs one.
    """
    if codes.kind != "token":
        if tgt_lang is not None:
            raise UsageError("tgt_lang belongs to encode() for this model: it is part of the source text")
        return [forced] * len(plan.segments)
    wanted: list[str | None] = [segment.tgt_lang for segment in plan.segments]
    for document, code in zip(plan.documents, each_text(tgt_lang, len(plan.documents), "tgt_lang"), strict=True):
        for number in document.segments if code is not None else ():
            wanted[number] = code
    if forced is None and any(code is None for code in wanted):
        raise UsageError(
            f"this model translates into {len(codes.known)} languages: give tgt_lang, such as "
            f"{', '.join(codes.known[:4])}"
        )
    return [forced if code is None else codes.target_token(code) for code in wanted]
