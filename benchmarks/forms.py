"""How synthetic checkpoints store their weights: in bfloat16, in fp8 by blocks, or in mxfp4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch

FORMS = ("bf16", "fp8", "mxfp4")
# Rows and columns of fp8 that share a scale, and values of mxfp4 that do.
_BLOCK, _MX_BLOCK = 128, 32
# Numbers of fp8 spread by 100 times this scale are weights spread by 0.02.
_SCALE = 2e-4
_DTYPES = {"bf16": "BF16", "fp8": "F8_E4M3", "scales": "F32", "nibbles": "U8", "exponents": "U8"}


class Entry(NamedTuple):
    """A stored tensor: what kind of values it has (a key of `_DTYPES`), and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """As safetensors calls it."""
        return _DTYPES[self.kind]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return prod(self.shape) * {"BF16": 2, "F32": 4}.get(self.dtype, 1)


def stored(name: str, shape: tuple[int, ...], form: str) -> Iterator[tuple[str, Entry]]:
    """Give what a checkpoint holds for a tensor: numbers and scales, where this form has them."""
    if form == "fp8" and _is_linear(name, shape):
        yield name, Entry("fp8", shape)
        yield f"{name}_scale_inv", Entry("scales", (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK)))
    elif form == "mxfp4" and len(shape) == 3:
        count, columns, rows = shape  # stored turned: what share a scale lie in a row
        yield f"{name}_blocks", Entry("nibbles", (count, rows, columns // _MX_BLOCK, _MX_BLOCK // 2))
        yield f"{name}_scales", Entry("exponents", (count, rows, columns // _MX_BLOCK))
    else:
        yield name, Entry("bf16", shape)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not any(part in name for part in ("embed_tokens", "lm_head", "mlp.gate."))


def quantization_config(form: str, names: Iterable[str]) -> dict[str, Any]:
    """Return what config.json says of a form, as the publishers of such models write it."""
    if form == "mxfp4":
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    gates = [name.removesuffix(".weight") for name in names if name.endswith("mlp.gate.weight")]
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": ["lm_head", *gates],
        "quant_method": "fp8",
        "weight_block_size": [_BLOCK, _BLOCK],
    }


def noise(kind: str) -> memoryview:
    """Draw 16 million values of a kind, to be repeated: drawing billions takes minutes. Returns their bytes."""
    count = 2**24
    if kind == "nibbles":
        values = torch.randint(256, (count,), dtype=torch.uint8)
    elif kind == "exponents":  # 2 ** -10 to 2 ** -4, times up to 6
        values = torch.randint(117, 124, (count,), dtype=torch.uint8)
    elif kind == "scales":
        values = (torch.rand(count) + 0.5).mul_(_SCALE)
    elif kind == "fp8":
        values = torch.randn(count).mul_(100).clamp_(-448, 448).to(torch.float8_e4m3fn)
    else:
        values = torch.randn(count).mul_(0.02).bfloat16()
    return memoryview(values.view(torch.uint8).numpy())  # type: ignore[arg-type]
