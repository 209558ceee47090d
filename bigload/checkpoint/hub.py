"""Finds a repository of the Hugging Face hub in its cache, or downloads it."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError, import_optional, reason
from ..hardware.interrupts import immediate_interrupts

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
    repo, revision = _parts(location)
    try:
        with immediate_interrupts():
            folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=["*.safetensors", *_BESIDE]))
            if not any(folder.glob("*.safetensors")):
                folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=["*.bin", *_BESIDE]))
    except Exception as error:  # the hub's own errors, and all that the network library raises
        raise _not_there_error(location, "", error) from error
    return folder


def hub_file(location: str, name: str) -> Path:
    """Return one file of a repository in the hub's cache; download it alone, unless it is there.

    Args:
        location: as for `hub_folder`.
        name: of the file.

    Raises:
        CheckpointError, MissingDependencyError: as for `hub_folder`.
    """
    hub = import_optional("huggingface_hub", "pip install huggingface_hub")
    repo, revision = _parts(location)
    try:
        with immediate_interrupts():
            return Path(hub.hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # as above
        raise _not_there_error(location, name, error) from error


def _parts(location: str) -> tuple[str, str | None]:
    match = _HUB_ID.fullmatch(location)
    assert match is not None
    return match["id"], match["revision"]


def _not_there_error(location: str, file: str, error: Exception) -> CheckpointError:
    repo, revision = _parts(location)
    what = f"revision '{revision}' of '{repo}'" if revision else f"'{repo}'"
    what = f"{file} of {what}" if file else what
    return CheckpointError(
        f"no file or folder '{location}' here, and {what} is not in the hub's cache and cannot be downloaded: "
        f"{reason(error)}; check the name, or fetch it where there is a network with: hf download {repo}"
        + (f" {file}" if file else "")
        + (f" --revision {revision}" if revision else "")
    )
