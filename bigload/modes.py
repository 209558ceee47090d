"""The names of the quantization modes. Imports nothing, so that the command line can list them without torch."""

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
