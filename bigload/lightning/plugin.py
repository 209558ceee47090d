"""`BitsandbytesPrecision`: quantizes the models of Lightning's Fabric and Trainer."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ..config import FLOATS, BnbQuantizationConfig
from ..errors import ConfigError, import_optional, listed
from ..model.empty import default_dtype_set_to
from ..model.view import ModelView
from .building import linears_to_quantize
from .converting import convert, has_quantized, loaded_dtype, require_linears

logger = logging.getLogger(__name__)

_INSTALL = "pip install 'bigload[lightning]'"
# Trainer takes only plugins of this class, Fabric those of its base class. Lightning's own BitsandbytesPrecision is no
# base of ours: both refuse its instances on anything but CUDA.
_Precision: Any = import_optional("lightning.pytorch.plugins.precision", _INSTALL).Precision
_OfFabric: Any = import_optional("lightning.fabric.plugins.precision", _INSTALL).Precision
_apply_to_collection: Any = import_optional("lightning_utilities", _INSTALL).apply_to_collection


class BitsandbytesPrecision(_Precision):  # type: ignore[misc]
    """A precision plugin for Lightning's Fabric and Trainer that quantizes Linear layers, on the CPU and on GPUs.

    It has the arguments, modes and methods of Lightning's own class. A model that is quantized already, and one that
    `load_and_quantize_model` loaded, is left as it is. Build a large model under
    `fabric.init_module(empty_init=True)`: its Linear layers then take memory only in their quantized form.

    Args:
        mode: "nf4", "nf4-dq", "fp4", "fp4-dq", "int8" or "int8-training".
        dtype: what layers compute in, inputs are cast to, and all other weights are stored in: torch.float16,
            torch.bfloat16 or torch.float32. By default that of a model which bigload loaded, else float16 for int8 and
            bfloat16 for 4 bit (float16 on GPUs without it).
        ignore_modules: names of modules whose Linear layers are not quantized, from the root of the model: "head" is
            `head` and `head.proj`, but neither `head2` nor `model.head`.

    Raises:
        ConfigError: there is no such mode or dtype, or `ignore_modules` is no list of names.

    Examples:
        >>> import torch
        >>> from bigload.lightning import BitsandbytesPrecision
        >>> from lightning.fabric import Fabric
        >>> def build():
        ...     return torch.nn.ModuleDict({"body": torch.nn.Linear(64, 64), "head": torch.nn.Linear(64, 8)})
        >>> torch.save(build().state_dict(), "net.ckpt")
        >>> plugin = BitsandbytesPrecision("nf4-dq", ignore_modules={"head"})
        >>> fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
        >>> with fabric.init_module(empty_init=True):
        ...     model = build()
        >>> model = fabric.setup(model)
        >>> fabric.load_raw("net.ckpt", model)  # quantized as it is loaded
        >>> type(model.module["body"]).__name__, type(model.module["head"]).__name__
        ('Linear4bit', 'Linear')
        >>> plugin.config.mode
        'nf4-dq'
    """

    def __init__(
        self, mode: str, dtype: torch.dtype | None = None, ignore_modules: Collection[str] | None = None
    ) -> None:
        super().__init__()
        names = () if ignore_modules is None else ignore_modules
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"ignore_modules must be a set of names, such as {{'head'}}, but it is {names!r}")
        BnbQuantizationConfig.from_mode(mode)  # refuses an unknown one
        if dtype is not None and dtype not in FLOATS.values():
            raise ConfigError(f"dtype must be one of {', '.join(map(str, FLOATS.values()))}, or None, but is {dtype!r}")
        self.mode = mode
        self.dtype = _default_dtype(mode) if dtype is None else dtype
        self._takes_dtype = dtype is None  # until the first model is set up
        self.ignore_modules = set(names)
        self._kept_in_place: list[nn.Module] = []

    @property
    def config(self) -> BnbQuantizationConfig:
        """The quantization as `load_and_quantize_model` takes it."""
        return BnbQuantizationConfig.from_mode(
            self.mode, torch_dtype=self.dtype, bnb_4bit_compute_dtype=self.dtype, skip_modules=[]
        )

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Quantize a model's Linear layers in place, and cast its other weights to `dtype`.

        Args:
            module: a model that is quantized, or was loaded by bigload, is not changed. Layers that were built empty
                and have no values yet are quantized when these are loaded.

        Returns:
            The same module.

        Raises:
            ConfigError: it has no Linear layers.
            QuantizationError: it has PEFT's adapters, or values that the format cannot represent.
            CheckpointError: it was given a state_dict that is quantized in another way.

        Examples:
            >>> import torch
            >>> from bigload.lightning import BitsandbytesPrecision
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
            >>> type(BitsandbytesPrecision("nf4").convert_module(model)[0]).__name__
            'Linear4bit'
        """
        if has_quantized(module):
            self._fit_to(module)
            self._keep_offloaded(module)
            return module
        require_linears(module)
        self._warn_of_unknown_names(module)
        with torch.inference_mode(False), torch.no_grad():
            convert(module, self.config, self.ignore_modules, _device_of(module))
        self._takes_dtype = False
        return module

    def _fit_to(self, module: nn.Module) -> None:
        """Cast inputs to the dtype of a model that is quantized already, if none was asked for."""
        dtype = loaded_dtype(module)
        if dtype is None or dtype == self.dtype:
            return
        if self._takes_dtype:
            self.dtype, self._takes_dtype = dtype, False
        else:
            logger.warning("the model was loaded in %s, but the plugin casts its inputs to %s", dtype, self.dtype)

    def _keep_offloaded(self, module: nn.Module) -> None:
        """Let a LightningModule with offloaded weights stay where it is when Trainer moves it to the CPU at its end."""
        if vars(module).get("_trainer") is not None and any("offload" in vars(inner) for inner in module.modules()):
            vars(module)["cpu"] = functools.partial(_stays, module)
            self._kept_in_place.append(module)

    def teardown(self) -> None:
        """Called when a Trainer has ended."""
        for module in self._kept_in_place:
            vars(module).pop("cpu", None)
        self._kept_in_place.clear()
        super().teardown()

    def _warn_of_unknown_names(self, module: nn.Module) -> None:
        known = ModelView(module).modules
        unknown = sorted(name for name in self.ignore_modules if name not in known)
        if not unknown:
            return
        ends = {path.rpartition(".")[2]: path for path in known}
        meant = [ends.get(name) or next(iter(get_close_matches(name, known, 1, 0.8)), None) for name in unknown]
        hint = listed(path for path in meant if path)
        logger.warning(
            "ignore_modules names %s, which the model does not have%s",
            listed(unknown),
            f": did you mean {hint}?" if hint else "",
        )

    def module_init_context(self) -> AbstractContextManager[None]:
        """Build modules in `dtype`; Linear layers without memory for their weights, where these are loaded later."""
        return self._building()

    @contextmanager
    def _building(self) -> Iterator[None]:
        with default_dtype_set_to(self.dtype), linears_to_quantize():
            yield

    def tensor_init_context(self) -> AbstractContextManager[None]:
        """Create tensors in `dtype`."""
        return default_dtype_set_to(self.dtype)

    def forward_context(self) -> AbstractContextManager[None]:
        """Create tensors in `dtype`, as the code of a forward or a step does."""
        return default_dtype_set_to(self.dtype)

    def convert_input(self, data: Any) -> Any:
        """Cast the floating-point tensors in a collection to `dtype`."""
        return _cast(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Cast the floating-point tensors in a collection to torch's default dtype."""
        return _cast(data, torch.get_default_dtype())

    # The methods around a backward and a step that Trainer's class has call hooks of the LightningModule: those of
    # Fabric's class serve a loop of Fabric, which passes no such module. `wraps` shows Fabric its own methods:
    # otherwise it would refuse `loss.backward()`.

    @functools.wraps(_OfFabric.pre_backward)
    def pre_backward(self, tensor: Any, module: Any) -> Any:  # noqa: D102
        return _class_for(module).pre_backward(self, tensor, module)

    @functools.wraps(_OfFabric.backward)
    def backward(self, tensor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return _class_for(model).backward(self, tensor, model, *args, **kwargs)

    @functools.wraps(_OfFabric.post_backward)
    def post_backward(self, tensor: Any, module: Any) -> Any:  # noqa: D102
        return _class_for(module).post_backward(self, tensor, module)

    @functools.wraps(_OfFabric.optimizer_step)
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:  # noqa: D102
        return _class_for(kwargs.get("model")).optimizer_step(self, optimizer, **kwargs)


def _class_for(module: Any) -> Any:
    """Return the base class whose methods serve a module: Trainer's for one that a Trainer runs."""
    return _Precision if module is not None and vars(module).get("_trainer") is not None else _OfFabric


def _stays(module: nn.Module) -> nn.Module:
    return module


def _default_dtype(mode: str) -> torch.dtype:
    if mode.startswith("int8"):
        return torch.float16
    has_no_bfloat16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
    return torch.float16 if has_no_bfloat16 else torch.bfloat16


def _device_of(module: Any) -> torch.device | None:
    """Return the device that Trainer or Fabric will move a LightningModule to; None for any other module."""
    trainer, fabric = vars(module).get("_trainer"), vars(module).get("_fabric")
    if trainer is not None:
        return trainer.strategy.root_device  # type: ignore[no-any-return]
    return None if fabric is None else fabric.device


def _cast(data: Any, dtype: torch.dtype) -> Any:
    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return _apply_to_collection(data, function=cast, dtype=torch.Tensor)
