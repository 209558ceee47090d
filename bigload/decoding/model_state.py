"""What captured graphs rely on in a model: where its tensors are, and that none of its code was exchanged."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ..offload.leaves import without_torch_function

# What `generate` and users switch in a config, and the code of the model looks up in each forward.
_SWITCHES = ("_attn_implementation", "_experts_implementation")


class ModelState:
    """A model as it was when it was captured. To compare takes microseconds, in each step."""

    def __init__(self, model: nn.Module) -> None:
        modules = [*model.modules()]
        self._tables: list[dict[str, Any]] = []
        for module in modules:
            self._tables += [module._modules, module._parameters, module._buffers]
        self._hooks = [hooks for module in modules[1:] for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [vars(module) for module in modules[1:]]
        with without_torch_function():
            self._tensors = [
                tensor for table in self._tables for tensor in table.values() if isinstance(tensor, torch.Tensor)
            ]
        # Tensors that are attributes of modules, and those of quantized weights, which are no parameters.
        self._attributes: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            self._add_attributes(vars(module))
            self._add_attributes(getattr(vars(module).get("state"), "__dict__", {}), ("CB", "SCB"))  # of int8
            for parameter in module._parameters.values():
                quant_state = getattr(parameter, "quant_state", None)
                while quant_state is not None:
                    self._add_attributes(vars(quant_state))
                    quant_state = getattr(quant_state, "state2", None)
        self._tensors += [held[name] for held, name in self._attributes]
        configs = {id(config): config for module in modules if (config := vars(module).get("config")) is not None}
        self._configs = [*configs.values()]
        self._before = self._now()

    def _add_attributes(self, held: dict[str, Any], names: tuple[str, ...] = ()) -> None:
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and (not names or name in names):
                self._attributes.append((held, name))

    def _now(self) -> list[Any]:
        ids = [*map(id, chain.from_iterable(map(dict.values, self._tables)))]
        with torch._C.DisableTorchFunctionSubclass():
            pointers = [*map(torch.Tensor.data_ptr, self._tensors)]
        held = [id(each.get(name)) for each, name in self._attributes]
        forwards = [each.get("forward") for each in self._own]
        switches = [repr(getattr(config, name, None)) for config in self._configs for name in _SWITCHES]
        everywhere = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
        return [ids, pointers, held, forwards, switches, [*map(len, self._hooks)], [*map(len, everywhere)]]

    def is_same(self) -> bool:
        """Whether nothing has changed since that graphs rely on."""
        return self._now() == self._before
