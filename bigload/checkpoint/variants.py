"""Variants of weights, such as "fp16", in files beside the plain ones: diffusers and transformers name them so.

A variant stands before the suffix, before the number of a shard or after it, or in the name of an index:
"model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.fp16.safetensors",
"model.safetensors.index.fp16.json".
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_NAME = re.compile(r"(?P<stem>.+)\.(safetensors|bin|pt|pth)(\.index(?P<variant>\.[^.]+)?\.json)?")


def without_variants(names: Iterable[str]) -> set[str]:
    """Leave out the files of variants whose plain weights are there too, in any format.

    Args:
        names: the names of all files in a folder.
    """
    stems = {name: _stem(name) for name in names}
    plain = set(stems.values())
    return {name for name, stem in stems.items() if stem is None or stem.rpartition(".")[0] not in plain}


def _stem(name: str) -> str | None:
    """Return a name of weights without its number and suffix, "model.fp16"; None for other files."""
    match = _NAME.fullmatch(_SHARD.sub("", name))
    # "pytorch_model.bin" and "model.safetensors" are one model's.
    return None if match is None else (match["stem"] + (match["variant"] or "")).removeprefix("pytorch_")
