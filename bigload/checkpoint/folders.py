"""Writes folders of checkpoints atomically: the folder is complete, or not there."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError, ConfigError, listed, reason
from .checkpoint import NOT_WEIGHTS
from .record import RECORD_NAME

logger = logging.getLogger(__name__)

# Suffixes of files of weights and of their indexes, also those of a variant ("model.safetensors.index.fp16.json").
WEIGHTS = re.compile(r".*\.(safetensors|index(\.[^.]+)?\.json|bin|pt|pth|gguf|h5|msgpack)", re.DOTALL)
# Names of files that belong to a tokenizer or a processor, of all classes of transformers.
TOKENIZERS = re.compile(
    r"(?!\.)(.*tokenizer.*|(.*[-_])?vocab([-_.].*)?\.(json|txt|bpe)|(special_tokens_map|added_tokens|chat_template"
    r"|encoder|emoji|normalizer|byte_maps|word_shape|word_pronunciation|tekken)\.json|merges\.txt|dict\.txt|bpe\.codes"
    r"|.*\.(model|spm|tiktoken|jinja)|([a-z_]*_)?(pre)?processor_config\.json"
    r"|(tokenization|processing|[a-z]+_processing|feature_extraction)_\w+\.py)"
)


@contextmanager
def new_folder(target: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Write a folder under a temporary name beside it, and rename it when the block is done.

    Args:
        target: the folder's path; if the block fails, what is there stays unchanged.
        overwrite: whether a checkpoint that is there may be replaced.

    Yields:
        The temporary folder, to write into.

    Raises:
        CheckpointError: something is there that may not be replaced, or the folder cannot be written.
    """
    target = checked_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"'{target}' cannot be written: {reason(error)}") from error
    try:
        made.chmod(0o777 & ~_umask())  # as any new folder: mkdtemp gives access to the owner only
        yield made
        put_in_place(made, checked_target(target, overwrite=overwrite))  # something may be there by now
    except OSError as error:
        raise CheckpointError(
            f"'{target}' cannot be written: {reason(error)}; nothing there has been changed"
        ) from error
    finally:
        remove_folder(made)


def remove_folder(path: Path) -> None:
    """Delete a folder with all that is in it; a warning where the system refuses. Ctrl-C does not stop it halfway."""
    try:
        shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    if os.path.lexists(path):
        logger.warning("'%s' could not be deleted; it is not needed any more: delete it", path)


def checked_target(given: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """Return the real path of a folder to write, after checking what is there.

    Raises:
        CheckpointError: something is there that may not, or cannot, be replaced.
        ConfigError: not a path.
    """
    if not given or not isinstance(given, (str, os.PathLike)):
        raise ConfigError(f"the folder to write is {given!r}; expected a path")
    target = Path(os.path.realpath(Path(given).expanduser()))
    try:
        _require_replaceable(target, overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"'{target}' cannot be read: {reason(error)}") from error
    return target


def _require_replaceable(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"'{target}' is a file: name a folder")
    if os.path.ismount(target) or target == Path(os.path.realpath(Path.cwd())) or target in Path.cwd().parents:
        raise CheckpointError(f"'{target}' cannot be replaced as a whole: name a folder inside it")
    held = sorted(target.iterdir())
    if held and not overwrite:
        raise CheckpointError(
            f"'{target}' is not empty: name another folder, or pass overwrite=True (--overwrite) to replace it"
        )
    inner = [path.name for path in held if path.is_dir()]
    if inner or (held and not any(WEIGHTS.fullmatch(path.name) for path in held)):
        raise CheckpointError(
            f"'{target}' holds {listed(inner or [path.name for path in held])}, which no checkpoint has: "
            "overwrite=True replaces checkpoints only; name another folder"
        )


def copy_the_rest(
    source: Path, made: Path, only: re.Pattern[str] | None = None, but: Container[str] = (RECORD_NAME,)
) -> None:
    """Copy a checkpoint's other files, such as the tokenizer's, unless `made` has files of these names.

    Args:
        source: the checkpoint's folder.
        made: where to copy to.
        only: what the names have to match.
        but: names that are left out.
    """
    for path in sorted(source.iterdir()):
        is_weights = WEIGHTS.fullmatch(path.name) is not None and not NOT_WEIGHTS.fullmatch(path.name)
        is_wanted = path.name not in but and (only is None or only.fullmatch(path.name))
        if path.is_file() and is_wanted and not is_weights and not (made / path.name).exists():
            if _leads_out(path):
                logger.warning(
                    "'%s' is a link out of its folder and is not copied; put the file itself there if it is to be", path
                )
                continue
            partial = made / f"{path.name}.partial"  # so that the file is complete or not there
            shutil.copyfile(path, partial)
            _sync(partial)
            partial.rename(made / path.name)


def _leads_out(path: Path) -> bool:
    """Whether a file is a link to one elsewhere, which who publishes a copy of the folder may not mean to publish.

    Folders of the hub's cache, snapshots/REVISION, hold links into blobs beside them.
    """
    real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    return path.is_symlink() and folder not in real.parents and blobs not in real.parents


def put_in_place(made: Path, target: Path) -> None:
    """Rename a finished folder to `target`, on the same file system.

    It replaces a checkpoint that is there, but keeps that one's other files.

    Raises:
        OSError: the file system refuses; then what was there is unchanged.
    """
    is_there = target.exists()
    if is_there:
        copy_the_rest(target, made)
    _sync(made)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)) if is_there else None
    try:
        if aside is not None:
            target.rename(aside)  # onto an empty folder
        made.rename(target)
        _sync(target.parent)
    except BaseException:
        if not made.exists():
            target.rename(made)
        if aside is not None and not target.exists():
            aside.rename(target)
        raise
    finally:
        if aside is not None:
            remove_folder(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)  # the only way to read it is to set it
    os.umask(mask)
    return mask
