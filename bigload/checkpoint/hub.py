"""Finds a repository of the Hugging Face hub in its cache, or downloads it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, import_optional

_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^@\s]+))?")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json")
# What belongs to weights: configs, tokenizers, the card that says under which licence they are.
_BESIDE = ["*.json", "*.txt", "*.model", "*.jinja", "*.spm", "*.tiktoken", "README.md"]


def is_hub_id(location: str) -> bool:
    """Whether a string has the form "org/name" or "org/name@revision"."""
    return _HUB_ID.fullmatch(location) is not None and not location.endswith(_FILES)


def hub_folder(location: str) -> Path:
    """Return a repository's folder in the hub's cache; download what is missing, unless the hub is set to offline.

    Args:
        location: "org/name" or "org/name@revision", where a revision is a branch, a tag or a commit.

    Raises:
        CheckpointError: it is not in the cache and cannot be downloaded.
        MissingDependencyError: huggingface_hub is not installed.
    """
    hub = import_optional("huggingface_hub", "pip install huggingface_hub")
    match = _HUB_ID.fullmatch(location)
    assert match is not None
    repo, revision = match["id"], match["revision"]
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=["*.safetensors", *_BESIDE]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=["*.bin", *_BESIDE]))
    except Exception as error:  # the hub's own errors, and all that the network library raises
        what = f"revision '{revision}' of '{repo}'" if revision else f"'{repo}'"
        raise CheckpointError(
            f"no file or folder '{location}' here, and {what} is not in the hub's cache and cannot be downloaded: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; check the name, or fetch it where "
            f"there is a network with: hf download {repo}" + (f" --revision {revision}" if revision else "")
        ) from error
    return folder
