"""The translator in OPUS-MT's real size beside stock transformers: tokens a second, every text of a forced length."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from measure import Options, Status, median_and_spread, read_options, wall_ms
from opus_mt import TINY, VOCAB, Texts, decoder_bytes, our_texts, random_opus_mt, stock_texts

from mmattn.models.translator import open_network
from mmattn.nn import fuse

SOURCE_LENGTH = 32
Run = Callable[[], Texts]
CELLS = {  # beams and batch
    torch.bfloat16: [(1, 1), (4, 1), (1, 8), (4, 8), (1, 32), (4, 32)],
    torch.float32: [(1, 1), (4, 1), (1, 32), (4, 32)],
}


def row_of(dtype: torch.dtype, beams: int, batch: int, new_tokens: int, runs: dict[str, Run], options: Options) -> None:
    """One cell: both run once, then in turn."""
    theirs, mine = (run()[0] for run in runs.values())
    with options.turn():
        times = wall_ms(runs, options.repeats, options.device)
    same = sum(one == other for one, other in zip(theirs, mine, strict=True))
    (their_ms, their_spread), (our_ms, our_spread) = (median_and_spread(times[name]) for name in runs)
    tokens = batch * new_tokens
    options.add(
        "Translator (OPUS-MT size), tokens/s",
        dtype=str(dtype).removeprefix("torch."),
        beams=beams,
        batch=batch,
        stock=f"{1000 * tokens / their_ms:.0f} ±{their_spread:.0%}",
        mmattn=f"{1000 * tokens / our_ms:.0f} ±{our_spread:.0%}",
        ratio=f"{their_ms / our_ms:.2f}",
        **{"ms a step, mmattn": f"{our_ms / new_tokens:.2f}", "equal texts": f"{same} of {batch}"},
    )


def rows_in(dtype: torch.dtype, folder: Path, options: Options, status: Status) -> None:
    """Every cell in one dtype."""
    stock = transformers.MarianMTModel.from_pretrained(folder, dtype=dtype).to(options.device).eval()
    network = open_network(folder, dtype=dtype, device=torch.device(options.device))
    print(f"opened in {dtype}", flush=True)
    fuse(network)  # as Translator.from_pretrained does on a card
    new_tokens = 4 if options.tiny else 64
    generator = torch.Generator().manual_seed(1)
    for beams, batch in CELLS[dtype][::2] if options.tiny else CELLS[dtype]:
        sources = torch.randint(1, VOCAB - 1, (batch, SOURCE_LENGTH), generator=generator).to(options.device)
        runs: dict[str, Run] = {
            "stock": lambda sources=sources, beams=beams: stock_texts(stock, sources, beams, new_tokens),
            "ours": lambda sources=sources, beams=beams: our_texts(network, sources, beams, new_tokens),
        }
        with status.row(f"{dtype}, {beams} beams, batch {batch}"):
            row_of(dtype, beams, batch, new_tokens, runs, options)
    print(f"a step reads {decoder_bytes(network) / 1e6:.0f} MB of weights in {dtype}", flush=True)


def main() -> int:
    """Both dtypes."""
    options, status = read_options(__doc__), Status()
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        random_opus_mt(**TINY if options.tiny else {}).save_pretrained(name)
        for dtype in CELLS:
            rows_in(dtype, Path(name), options, status)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
