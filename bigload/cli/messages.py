"""Messages of the library in the words of the command line: options instead of Python's arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping

# In this order: whole clauses, then single arguments.
_WORDS = (
    (r"pass overwrite=True \(--overwrite\)", "pass --overwrite"),
    (r"overwrite=True replaces", "--overwrite replaces"),
    (r"pass None for the checkpoint's own config", "leave --quant out for the checkpoint's own"),
    (r"not as the config says \(.*?\)", "not as --quant says"),
    (r"give a config or one of", "choose --quant from"),
    (r"bnb_quantization_config is None, which needs", "no --quant needs"),
    (r"pass an empty one as model=", "without one, call quantize_checkpoint(..., model=...) in Python"),
    (r"; weights_location must be a \.safetensors", "; expected a .safetensors"),
    (r"weights_location is '': say where the weights are", "the path is empty: say where the weights are"),
    (
        r"if you trust that code, .*",
        "such a model can be loaded in Python only, by those who trust that code",
    ),
    (r" \(or, as a whole device_map, .*?\)", ""),
    (r"OffloadConfig: reserve", "--reserve"),
    (r"OffloadConfig: expert_cache", "expert_cache"),
    (r"expert_cache=('[^']*'|[\d.]+)", r"--expert-cache \1"),
    (r"max_memory holds ('[^']*'); expected bytes as an int, or a string such as '10GiB'",
     r"\1 is not a size; write bytes, or a unit as in 10GiB"),
    (r"max_memory holds", "a size is"),
    (r"device_map\[('[^']*')\]", r"--device-map, \1"),
    (r"execute='cpu'", "execution on the CPU"),
    (r"\bname an offload_folder\b", "pass --offload-folder"),
    (r"\ban? (offload_folder|device_map)\b", r"\1"),
)  # fmt: skip
_OPTIONS = ("offload_folder", "max_memory", "device_map", "max_shard_size", "skip_modules", "expert_cache")
_PYTHON = re.compile(
    r"\b(?!PYTHON)[a-z_]+=[\[({'\"TFN]|\b\w+\.\w+\(|\w+\(\.\.\.\)|"
    r"\b(load_and_quantize_model|quantize_checkpoint|quantizable|key_mapping|tied_parameters|initialize_missing"
    r"|experts_modules|keep_in_fp32_modules|BnbQuantizationConfig)\b"
)


def for_the_shell(text: str, shown: Mapping[str, str]) -> str:
    """Return a message as the command line says it, in one line.

    Args:
        text: the message of the library.
        shown: path -> how it was typed.
    """
    text = " ".join(text.split("\n"))
    for path, typed in sorted(shown.items(), key=lambda pair: -len(pair[0])):
        text = re.sub(rf"{re.escape(path)}(?![\w.-])", typed.replace("\\", r"\\"), text)
    for words, said in _WORDS:
        text = re.sub(words, said, text)
    for name in _OPTIONS:
        text = re.sub(rf"(?<![\w-]){name}\b", f"--{name.replace('_', '-')}", text)
    if _PYTHON.search(text) and "in Python" not in text:
        text += " (the command line has no option for this: it is an argument in Python)"
    return text
