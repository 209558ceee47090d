"""What a path on the command line names: a folder, a file, or a repository of the hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import CheckpointError


def model_folder(options: argparse.Namespace, typed: str) -> Path:
    """Return a folder with config.json and weights; what is missing of a repository is downloaded.

    Raises:
        CheckpointError: there is none.
    """
    from ..checkpoint.hub import hub_folder, is_hub_id

    folder = Path(typed).expanduser()
    if not folder.exists() and is_hub_id(typed):
        folder = hub_folder(typed)
    return _noted(options, folder, typed, _config_in(folder, typed).parent)


def config_file(options: argparse.Namespace, typed: str) -> Path:
    """Return a config.json; of a repository that file alone is downloaded.

    Raises:
        CheckpointError: there is none.
    """
    from ..checkpoint.hub import hub_file, is_hub_id

    path = Path(typed).expanduser()
    if not path.exists() and is_hub_id(typed):
        found = hub_file(typed, "config.json")
        return _noted(options, found.parent, typed, found)
    return _noted(options, path, typed, path if path.is_file() else _config_in(path, typed))


def weights_location(options: argparse.Namespace, typed: str) -> str | Path:
    """Return what was typed, or the folder of a repository, of which what is missing is downloaded.

    Raises:
        CheckpointError: there is no such repository.
    """
    from ..checkpoint.hub import hub_folder, is_hub_id

    if is_hub_id(typed) and not Path(typed).expanduser().exists():
        folder = hub_folder(typed)
        return _noted(options, folder, typed, folder)
    note(options, typed)
    return typed


def note(options: argparse.Namespace, typed: str | None) -> None:
    """Remember a path that was typed, which messages show as it was."""
    if typed:
        _noted(options, Path(typed).expanduser(), typed, Path())


def _config_in(folder: Path, typed: str) -> Path:
    if (folder / "config.json").is_file():
        return folder / "config.json"
    there = "has no config.json" if folder.is_dir() else "is not there" if not folder.exists() else "is not a folder"
    if folder.is_file() and (folder.parent / "config.json").is_file():
        raise CheckpointError(f"'{typed}' {there}: name the folder that it is in, '{Path(typed).parent}'")
    more = "" if "/" in typed or folder.exists() else "; a repository of the hub is named with its owner, as org/name"
    raise CheckpointError(f"'{typed}' {there}: name a folder with a config.json, from which the model is built{more}")


def _noted(options: argparse.Namespace, path: Path, typed: str, found: Path) -> Path:
    """Remember how a path was typed, and return what was found there."""
    for full in (path.absolute(), path.resolve()):
        if str(full) != typed and full != Path(full.anchor):
            options.shown[str(full)] = typed.rstrip("/") or typed
    return found
