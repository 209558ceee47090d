"""A repository of the Hugging Face hub as a folder: from its cache, or downloaded into it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from ..optional import import_optional

_HUB_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[^@\s]+))?")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json")
_SAFETENSORS = ["*.safetensors", "*.json"]
_PICKLES = ["*.bin", "*.json"]


def is_hub_id(location: str) -> bool:
    """Whether a string has the form "org/name" or "org/name@revision"."""
    return _HUB_ID.fullmatch(location) is not None and not location.endswith(_FILES)


def hub_folder(location: str) -> Path:
    """Find a repository's folder of weights; download what the cache lacks, unless the hub is set to be offline.

    Args:
        location: "org/name" or "org/name@revision", a branch, a tag or a commit.

    Raises:
        CheckpointError: not in the cache and not to be had; says what to do.
    """
    hub = import_optional("huggingface_hub", "pip install huggingface_hub")
    match = _HUB_ID.fullmatch(location)
    assert match is not None
    repo, revision = match["id"], match["revision"]
    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_SAFETENSORS))
        if not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_PICKLES))
    except Exception as error:  # the hub's own errors, and whatever the network beneath it raises
        what = f"revision '{revision}' of '{repo}'" if revision else f"'{repo}'"
        raise CheckpointError(
            f"no file or folder '{location}' here, and {what} is neither in the hub's cache nor to be downloaded: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; check the name, or fetch it where "
            f"there is a network with: hf download {repo}" + (f" --revision {revision}" if revision else "")
        ) from error
    return folder
