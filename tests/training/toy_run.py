"""The toy task as a command: `python -m tests.training.toy_run training.output_dir=DIR [--resume]`."""

from __future__ import annotations

import sys
from pathlib import Path

from mmattn.errors import MmattnError
from mmattn.training import train
from tests.training.toy import ToyTask, toy_config


def main() -> int:
    folder = next(Path(value) for key, _, value in (word.partition("=") for word in sys.argv) if value)
    config = toy_config(folder, max_steps=120, save_every=5, eval_every=20, ema_decay=0.9, micro_batch_size=4)
    try:
        train(ToyTask(), config, resume="--resume" in sys.argv)
    except MmattnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
