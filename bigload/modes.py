"""The names of the quantization modes. Imports no torch, so that the command line can list them in no time."""

from difflib import get_close_matches
from typing import Any

# Mode -> the fields of `BnbQuantizationConfig` that it sets.
MODES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8-training": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    "none": {"load_in_4bit": True, "skip_modules": ["*"]},
}
# What others call them, and the letters do not tell.
_BY_OTHER_NAMES = (
    (("4", "4bit", "int4", "q4", "bnb", "bnb4bit", "loadin4bit", "bitsandbytes"), "nf4"),
    (("8", "8bit", "q8", "bnb8bit", "loadin8bit", "llmint8"), "int8"),
    (("16", "16bit", "fp16", "bf16", "float16", "bfloat16", "fp32", "float32", "32bit", "no", "off", "false"), "none"),
)


def nearest_mode(word: str) -> str | None:
    """Return the mode that a word may mean, if any."""
    plain = "".join(letter for letter in word.lower() if letter.isalnum())
    meant = next((mode for names, mode in _BY_OTHER_NAMES if plain in names), None)
    return meant or next(iter(get_close_matches(word.lower(), MODES, n=1, cutoff=0.5)), None)
