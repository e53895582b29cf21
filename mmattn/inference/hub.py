"""Saving to the hub, and evaluation mode during a call: what the façades share."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator

import torch
from torch import nn


def push_folder(
    save: Callable[[str], None], repo_id: str, *, private: bool, token: str | None, commit_message: str | None
) -> str:
    """Upload what `save(folder)` writes to a hub repository, made when it is not there; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        message = commit_message or "Upload model with mmattn"
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(url)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients, and back in its own mode afterwards."""
    was_training = network.training
    if was_training:
        network.eval()
    try:
        # Not inference mode: what is encoded may be trained on.
        with torch.no_grad():
            yield
    finally:
        if was_training:
            network.train()
