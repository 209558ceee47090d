"""README.md of a saved folder: the model card of the hub, with how the model was quantized and how it is loaded."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import BnbQuantizationConfig
from ..errors import listed

CARD_NAME = "README.md"
# A card with this line is replaced when its folder is; any other is its owner's.
MARK = "<!-- Written by bigload, which replaces this card with its folder. Remove this line to keep the card. -->"
# What a card takes over from that of the original.
_TAKEN_OVER = re.compile(r"license(_name|_link)?|language|pipeline_tag|datasets")
_FOLDER = 'folder = "."  # this folder, or its repository on the hub'
_SNAPSHOT = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/.*")


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        config: how the model was quantized.
        class_name: of the model.
        library: the library that the class comes from, "transformers" or "diffusers"; None for any other.
        is_read_by_library: whether `from_pretrained` of this library reads the folder.
        auto_class: the Auto class of transformers that loads a class made by code in the folder.
        quantized: the number of quantized layers and modules of experts.
        kept: paths of the layers that were left plain.
        source: the folder that the original was loaded from, as far as it is known.
    """

    config: BnbQuantizationConfig
    class_name: str
    library: str | None
    is_read_by_library: bool
    auto_class: str | None
    quantized: int
    kept: tuple[str, ...]
    source: Path | None

    def write(self, made: Path, target: Path) -> None:
        """Write the card, unless there is one that its owner has written.

        Args:
            made: the folder to write into.
            target: the folder that `made` will replace.

        Raises:
            OSError: the disk is full, for instance.
        """
        present = target / CARD_NAME
        if present.exists() and MARK not in present.read_text(encoding="utf-8", errors="replace"):
            return
        with (made / CARD_NAME).open("w", encoding="utf-8") as file:
            file.write(self._text())
            file.flush()
            os.fsync(file.fileno())

    def _text(self) -> str:
        said = self._metadata()
        # JSON is YAML, but for the braces around it.
        lines = [f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in said.items()]
        base = said.get("base_model")
        bases = [base] if isinstance(base, str) else base or []
        named = [f"[{name}](https://huggingface.co/{name})" for name in bases]
        of = listed(named) if named else f"A {self.class_name}"
        kept = f"{len(self.kept)} ({listed(self.kept)})" if self.kept else "0"
        facts = {
            "format": self.config.mode,
            **({"blocksize": self.config.bnb_4bit_blocksize} if self.config.load_in_4bit else {}),
            **({"computes in": _short(self.config.bnb_4bit_compute_dtype)} if self.config.load_in_4bit else {}),
            **({"threshold of outliers": self.config.llm_int8_threshold} if self.config.load_in_8bit else {}),
            "other weights": _short(self.config.torch_dtype),
            "layers quantized": self.quantized,
            "layers left plain": kept,
        }
        return "\n".join(
            [
                *(
                    "---",
                    *lines,
                    "---",
                    "",
                    MARK,
                    "",
                    f"# {', '.join(bases) or self.class_name} in {self.config.mode}",
                    "",
                ),
                f"{of}, quantized with bitsandbytes by bigload {__version__}.",
                *("", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in facts.items())),
                *(
                    "",
                    "## Loading",
                    "",
                    "With bigload, on GPUs, the CPU, or a GPU with the rest of the model streamed:",
                ),
                *("", "```python", *self._with_bigload(), "```", ""),
                *self._with_library(),
            ]
        )

    def _metadata(self) -> dict[str, Any]:
        original = _metadata_of(self.source)
        snapshot = None if self.source is None else _SNAPSHOT.fullmatch(f"{self.source.as_posix()}/")
        base = None if snapshot is None else snapshot["id"].replace("--", "/")
        if original.get("base_model_relation") == "quantized":  # and saved again
            base = original.get("base_model", base)
        bits = "4-bit" if self.config.load_in_4bit else "8-bit"
        return {
            **({} if base is None else {"base_model": base, "base_model_relation": "quantized"}),
            "library_name": self.library if self.is_read_by_library else "bigload",
            **{key: value for key, value in original.items() if _TAKEN_OVER.fullmatch(str(key))},
            "quantization": self.config.mode,
            "tags": ["bigload", "bitsandbytes", bits, self.config.mode],
        }

    def _with_bigload(self) -> list[str]:
        cls = f"{self.library}.{self.class_name}"
        build = {
            "transformers": [f"    model = {cls}(transformers.AutoConfig.from_pretrained(folder))"],
            "diffusers": [f"    model = {cls}.from_config({cls}.load_config(folder))"],
        }.get("" if self.library is None or self.auto_class else self.library)
        library = [f"import {self.library}"] if build else []
        return [
            *("import bigload", *library, "", _FOLDER, "with bigload.init_empty_weights():"),
            *(build or [f"    model = {self.class_name}(...)  # as it was built when it was saved"]),
            "model = bigload.load_and_quantize_model(model.eval(), None, folder)",
        ]

    def _with_library(self) -> list[str]:
        if not self.is_read_by_library or self.library is None:
            return []
        cls, options = f"{self.library}.{self.auto_class or self.class_name}", ""
        if self.library == "diffusers":
            options = f", torch_dtype=torch.{_short(self.config.torch_dtype)}"
        elif self.auto_class:
            options = ", trust_remote_code=True"
        return [
            *(f"With {self.library}, on a GPU:", "", "```python", f"import {self.library}"),
            *(["import torch"] if self.library == "diffusers" else []),
            *("", _FOLDER, f"model = {cls}.from_pretrained(folder{options})", "```", ""),
        ]


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _metadata_of(source: Path | None) -> dict[str, Any]:
    """Return the front matter of the original's card; nothing where there is none that can be read."""
    path = None if source is None else source / CARD_NAME
    if path is None or not path.is_file():
        return {}
    try:
        from huggingface_hub import metadata_load

        return metadata_load(path) or {}
    except Exception:  # of the hub's library, which may be missing, and of the library that reads its YAML
        return {}
