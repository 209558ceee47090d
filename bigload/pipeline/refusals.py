"""What other libraries would do wrong to fused experts in 4 bit, refused before they begin."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import QuantizationError
from ..quantization.experts import has_quantized_experts


def refuse_save(path: str) -> NoReturn:
    """Refuse `save_pretrained`, which asks a model's quantizer first.

    Raises:
        QuantizationError: always.
    """
    raise QuantizationError(
        f"save_pretrained cannot save fused experts in 4 bit, such as those of {path!r}, as transformers reads none: "
        "save the model with bigload.save_quantized_model(model, folder), or call bigload.dequantize_model(model) first"
    )


@functools.cache
def refuse_adapters_of_parameters() -> None:
    """From now on, refuse PEFT's `target_parameters` where they name packed weights of experts; called once.

    `target_modules` become such where PEFT knows that transformers 5 has fused what they named.

    It would add its products to packed bytes: an error in the first forward where these are integers, noise where they
    are stored as floats.
    """
    register_module_module_registration_hook(_refuse_adapter)


def _refuse_adapter(module: Any, name: str, child: Any) -> None:
    if child is None or not has_quantized_experts(child) or type(module).__name__ != "ParamWrapper":
        return
    adapted = vars(module).get("parameter_name", "")
    path = vars(child).get("loaded_as") or "the model"
    raise QuantizationError(
        f"{adapted!r} of {path!r} holds experts in 4 bit, which PEFT's target_parameters cannot adapt: name attention "
        "and the router alone, as in target_modules=['q_proj', 'v_proj'] (PEFT takes 'all-linear', gate_proj, up_proj "
        f"and down_proj for the experts too), or name {path!r} in skip_modules, so that these experts stay plain"
    )
