"""`mmattn translate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mmattn.cli.options import BeamsOption, CompileOption, JsonOption, SrcOption, TgtOption
from mmattn.errors import UsageError

if TYPE_CHECKING:
    from typing import BinaryIO

    from mmattn.inference.line_translation import ByteStream, LineTranslator

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A trained folder, or a hub id.")]
TextsArgument = Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="Texts; none: lines of stdin.")]
InputOption = Annotated[Path | None, typer.Option("--input", "-i", metavar="FILE", help="Translate its lines.")]
OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="A new file for the result.")]
TokensOption = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest translation.")]
AlignmentOption = Annotated[bool, typer.Option("--alignment", help="Add word alignments, as 0-0 1-2.")]
ScoresOption = Annotated[bool, typer.Option("--scores", help="Add log-probabilities.")]
QuantizeOption = Annotated[Literal["int8"] | None, typer.Option("--quantize", help="Faster on a CPU, not exact.")]
BadOption = Annotated[Literal["skip", "stop"], typer.Option("--on-bad", help="Leave bad lines empty, or stop.")]


def translate(
    model: ModelArgument,
    texts: TextsArgument = None,
    input_file: InputOption = None,
    output: OutputOption = None,
    src_lang: SrcOption = None,
    tgt_lang: TgtOption = None,
    num_beams: BeamsOption = None,
    max_new_tokens: TokensOption = None,
    alignment: AlignmentOption = False,
    scores: ScoresOption = False,
    quantize: QuantizeOption = None,
    compile: CompileOption = False,
    on_bad: BadOption = "skip",
    json_lines: JsonOption = False,
) -> None:
    """Translate texts, a file, or stdin, line by line."""
    _check_files(texts, input_file, output)

    from mmattn.cli.models import open_translator
    from mmattn.inference.line_translation import LineTranslator, OutputFormat

    translator = open_translator(model, quantize, compile=compile)
    for argument, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)):
        if code is not None:  # known before a line is read
            translator.codes.check(code, argument)
    written = OutputFormat(as_json=json_lines, with_scores=scores, with_alignment=alignment)
    arguments: dict[str, Any] = {"return_scores": scores, "return_alignment": alignment}
    lengths = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    arguments |= {name: value for name, value in lengths.items() if value is not None}
    if texts:
        found = translator.translate(texts, src_lang=src_lang, tgt_lang=tgt_lang, **arguments)
        _write([[written(text, one) for text, one in zip(texts, found, strict=True)]], output)
        return
    name = "stdin" if input_file is None else str(input_file)
    lines = LineTranslator(
        translator, name, written, say=_say, stops=on_bad == "stop", languages=(src_lang, tgt_lang), **arguments
    )
    _write(_translated(lines, input_file), output)
    summary = lines.summary()
    if summary is not None:
        _say(summary)


def _check_files(texts: list[str] | None, input_file: Path | None, output: Path | None) -> None:
    """What can be known before a model is opened."""
    from mmattn.inference.files import check_new_file

    if texts and input_file is not None:
        raise UsageError(f"--input {input_file}: texts are given as well; leave one of them out")
    if input_file is not None and not input_file.is_file():
        if input_file.exists() and not input_file.is_dir():
            raise UsageError(f"{input_file}: is a pipe or device, not a file: leave --input out and give it as stdin")
        raise UsageError(f"{input_file}: {'is a folder, not a file' if input_file.is_dir() else 'no such file'}")
    if output is not None:
        check_new_file(output)


def _translated(lines: LineTranslator, path: Path | None) -> Iterator[Iterator[str]]:
    """Chunk after chunk, with a bar on stderr for files."""
    from tqdm import tqdm

    from mmattn.inference.line_translation import count_lines, line_chunks

    if path is None:
        yield from map(lines, line_chunks(cast("ByteStream", sys.stdin.buffer)))
        return
    # tqdm leaves a bar out by itself, with None, where there is no terminal.
    with path.open("rb") as file, tqdm(total=count_lines(path), unit="line", disable=None) as bar:
        for chunk in line_chunks(file):
            yield lines(chunk)
            bar.update(len(chunk))


def _write(chunks: Any, output: Path | None) -> None:
    from mmattn.inference.files import new_file

    def write(file: BinaryIO) -> None:
        for chunk in chunks:
            for line in chunk:
                file.write(f"{line}\n".encode())
            file.flush()

    if output is None:
        write(sys.stdout.buffer)
    else:
        with new_file(output) as file:
            write(file)


def _say(message: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"mmattn: {message}", file=sys.stderr)
