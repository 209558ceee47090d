"""`BnbQuantizationConfig`, read from any of its forms."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError, import_optional, listed
from .notation import MODES, FieldsAsHtml, nearest_mode

logger = logging.getLogger(__name__)

# The dtypes that weights are quantized from and layers compute in, by torch's names.
FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SHORT_NAMES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STORAGES = {"uint8": torch.uint8, "int8": torch.int8, **FLOATS, "float64": torch.float64}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# transformers' names of the fields, where they differ.
_TRANSFORMERS_NAMES = {"skip_modules": "llm_int8_skip_modules"}
# Fields of a transformers dict that add nothing to `load_in_*`.
_TRANSFORMERS_EXTRAS = {"quant_method", "_load_in_4bit", "_load_in_8bit"}


@dataclass
class BnbQuantizationConfig(FieldsAsHtml):
    """How a model is quantized.

    The first nine fields have the names, order, defaults and checks of accelerate's class. The others are those of
    transformers, except for the blocksize, which is bitsandbytes'.

    Args:
        load_in_8bit: quantize to int8 with one scale for each row (LLM.int8(), arXiv 2208.07339).
        llm_int8_threshold: input features with values above it, the outliers, are multiplied in 16 bit; 0: none are.
        load_in_4bit: quantize to 4 bit with one scale for each block (QLoRA, arXiv 2305.14314).
        bnb_4bit_quant_type: "nf4" or "fp4".
        bnb_4bit_use_double_quant: quantize the blocks' scales too.
        bnb_4bit_compute_dtype: the dtype that 4-bit layers compute in: a torch.dtype, "fp32", "fp16", "bf16", or "auto"
            for `torch_dtype`.
        torch_dtype: the dtype that weights are cast to before they are quantized, and of the weights that are not;
            "auto" is the dominant floating dtype of the checkpoint; None is fp16 for int8, the compute dtype for 4 bit.
        skip_modules: layers not to quantize, instead of the default, the output head. "h.1" matches `h.1` and
            `model.h.1.attn`, but not `h.10`; a star matches any characters, so ["*"] quantizes nothing.
        keep_in_fp32_modules: modules kept in fp32 and not quantized.
        llm_int8_enable_fp32_cpu_offload: blocks that the device map puts on the CPU beside a GPU are kept in fp32 and
            computed there.
        llm_int8_has_fp16_weight: keep trainable 16-bit main weights, which each forward quantizes to int8.
        bnb_4bit_quant_storage: the dtype that packed 4-bit weights are stored in.
        bnb_4bit_blocksize: the number of weights that share a scale.
        experts_modules: modules of your own, named as in `skip_modules`, whose 3-D weights are quantized to 4 bit as
            those of transformers' experts: their parameters and forward must be the same.

    Raises:
        ConfigError: a field has the wrong type or an unknown value, or not exactly one of 4 and 8 bit is chosen.

    Examples:
        >>> from bigload import BnbQuantizationConfig
        >>> config = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", torch_dtype="bf16")
        >>> config.mode, config.load_dtype
        ('nf4', torch.bfloat16)
    """

    load_in_8bit: bool = False
    llm_int8_threshold: float = 6.0
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str = "fp16"
    torch_dtype: torch.dtype | str | None = None
    skip_modules: list[str] | None = None
    keep_in_fp32_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_quant_storage: torch.dtype | str = torch.uint8
    bnb_4bit_blocksize: int = 64
    experts_modules: list[str] | None = None

    def __post_init__(self) -> None:
        for name in (
            "load_in_8bit",
            "load_in_4bit",
            "bnb_4bit_use_double_quant",
            "llm_int8_enable_fp32_cpu_offload",
            "llm_int8_has_fp16_weight",
        ):
            self._check(name, lambda value: isinstance(value, bool), "True or False")
        self._check_mode()
        self._check("llm_int8_threshold", _is_threshold, "a number, 0 or more")
        self._check("bnb_4bit_quant_type", lambda value: value in ("nf4", "fp4"), "'nf4' or 'fp4'")
        self._check("bnb_4bit_blocksize", lambda v: v in BLOCKSIZES and isinstance(v, int), f"one of {BLOCKSIZES}")
        for name in ("skip_modules", "keep_in_fp32_modules", "experts_modules"):
            self._check(name, _is_names, "a list of strings or None")
        self.bnb_4bit_compute_dtype = _dtype("bnb_4bit_compute_dtype", self.bnb_4bit_compute_dtype)
        if self.torch_dtype is None:
            self.torch_dtype = torch.float16 if self.load_in_8bit else self.bnb_4bit_compute_dtype
        self.torch_dtype = _dtype("torch_dtype", self.torch_dtype)
        storage = self.bnb_4bit_quant_storage
        known = STORAGES.get(storage) if isinstance(storage, str) else storage
        _require(known in STORAGES.values(), "bnb_4bit_quant_storage", f"one of {tuple(STORAGES)}", storage)
        self.bnb_4bit_quant_storage = known  # type: ignore[assignment]

    def _check(self, name: str, is_good: Callable[[Any], bool], expected: str) -> None:
        _require(is_good(getattr(self, name)), name, expected, getattr(self, name))

    def _check_mode(self) -> None:
        if self.load_in_4bit == self.load_in_8bit:
            found = "both are True" if self.load_in_4bit else "neither is True"
            raise ConfigError(f"exactly one of load_in_4bit and load_in_8bit must be True, but {found}")
        if self.llm_int8_has_fp16_weight and not self.load_in_8bit:
            raise ConfigError(
                "llm_int8_has_fp16_weight=True needs load_in_8bit=True: 4-bit has no main weights to train"
            )

    @property
    def mode(self) -> str:
        """The mode's short name, as `from_mode` takes it; "none" if every layer is skipped."""
        if "*" in (self.skip_modules or ()):
            return "none"
        if self.load_in_8bit:
            return "int8-training" if self.llm_int8_has_fp16_weight else "int8"
        return self.bnb_4bit_quant_type + ("-dq" if self.bnb_4bit_use_double_quant else "")

    def resolved(self, checkpoint_dtype: torch.dtype) -> BnbQuantizationConfig:
        """Copy the config, with each "auto" replaced; `torch_dtype` becomes the checkpoint's dominant dtype.

        Examples:
            >>> import bigload, torch
            >>> bigload.BnbQuantizationConfig.from_mode("nf4").resolved(torch.bfloat16).bnb_4bit_compute_dtype
            torch.bfloat16
        """
        torch_dtype = checkpoint_dtype if self.torch_dtype == "auto" else self.torch_dtype
        compute_dtype = torch_dtype if self.bnb_4bit_compute_dtype == "auto" else self.bnb_4bit_compute_dtype
        return dataclasses.replace(self, torch_dtype=torch_dtype, bnb_4bit_compute_dtype=compute_dtype)  # type: ignore[arg-type]

    @property
    def load_dtype(self) -> torch.dtype:
        """The `torch_dtype` of a resolved config, which weights are cast to when they are loaded."""
        assert isinstance(self.torch_dtype, torch.dtype), "resolved() was not called"
        return self.torch_dtype

    @classmethod
    def from_mode(cls, mode: str, **fields: Any) -> BnbQuantizationConfig:
        """Make the config of a mode; dtypes are those of the checkpoint unless they are given.

        Args:
            mode: "nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training", or "none", which quantizes nothing.
            **fields: any other fields of the class.

        Raises:
            ConfigError: there is no such mode or field.

        Examples:
            >>> import bigload
            >>> bigload.BnbQuantizationConfig.from_mode("nf4-dq", skip_modules=["lm_head", "router"])
            BnbQuantizationConfig.from_mode('nf4-dq', skip_modules=['lm_head', 'router'])
        """
        if not isinstance(mode, str) or mode not in MODES:
            near = nearest_mode(str(mode))
            hint = f" (did you mean '{near}'?)" if near else ""
            raise ConfigError(f"unknown quantization mode {mode!r}{hint}; choose one of {', '.join(MODES)}")
        return cls._build({"torch_dtype": "auto", "bnb_4bit_compute_dtype": "auto", **MODES[mode], **fields})

    def __repr__(self) -> str:
        usual = vars(type(self).from_mode(self.mode))
        changed = [f"{name}={value!r}" for name, value in vars(self).items() if value != usual[name]]
        return f"{type(self).__name__}.from_mode({', '.join([repr(self.mode), *changed])})"

    @classmethod
    def from_accelerate(cls, config: Any) -> BnbQuantizationConfig:
        """Copy accelerate's `BnbQuantizationConfig`.

        Examples:
            >>> from accelerate.utils import BnbQuantizationConfig as OfAccelerate
            >>> from bigload import BnbQuantizationConfig
            >>> BnbQuantizationConfig.from_accelerate(OfAccelerate(load_in_8bit=True)).mode
            'int8'
        """
        return cls._build({name: getattr(config, name) for name in _ACCELERATE_FIELDS})

    @classmethod
    def from_transformers(cls, config: Any, torch_dtype: torch.dtype | str = "auto") -> BnbQuantizationConfig:
        """Copy transformers' `BitsAndBytesConfig`, which has no field for the dtype of the other weights.

        Its default compute dtype, float32, is kept, with one warning: nothing tells it from a float32 that was meant.

        Args:
            config: the `BitsAndBytesConfig`, or its dict.
            torch_dtype: the `dtype` of `from_pretrained`; "auto" is that of the checkpoint.

        Examples:
            >>> from bigload import BnbQuantizationConfig
            >>> from transformers import BitsAndBytesConfig
            >>> BnbQuantizationConfig.from_transformers(BitsAndBytesConfig(load_in_8bit=True)).mode
            'int8'
        """
        given = dict(config) if isinstance(config, Mapping) else config.to_dict()
        for name in ("load_in_4bit", "load_in_8bit"):  # properties of the class, so not in its vars()
            given.setdefault(name, given.get(f"_{name}", False))
        ours = {name: given.pop(_TRANSFORMERS_NAMES.get(name, name), _UNSET) for name in _FIELDS}
        unknown = [name for name in given if name not in _TRANSFORMERS_EXTRAS]
        if unknown:
            logger.warning("these fields of the transformers config have no effect: %s", listed(unknown))
        ours = {name: value for name, value in ours.items() if value is not _UNSET}
        if isinstance(ours.get("skip_modules"), list):
            ours["skip_modules"] = [_unanchored(name) for name in ours["skip_modules"]]
        # transformers' default; accelerate's compute dtype is fp16
        for name, usual in (("bnb_4bit_compute_dtype", torch.float32), ("bnb_4bit_quant_storage", torch.uint8)):
            ours[name] = usual if ours.get(name) is None else ours[name]
        made = cls._build({**ours, "torch_dtype": torch_dtype})
        if made.load_in_4bit and made.bnb_4bit_compute_dtype == torch.float32:
            warn_of_float32()
        return made

    def to_transformers(self) -> Any:
        """Make the `BitsAndBytesConfig` with the same meaning.

        transformers has no fields for torch_dtype, keep_in_fp32_modules, experts_modules and the blocksize, which are
        left out, and no compute dtype "auto", which becomes its default, float32.

        Raises:
            MissingDependencyError: transformers is not installed.

        Examples:
            >>> import bigload
            >>> bigload.BnbQuantizationConfig.from_mode("nf4").to_transformers().bnb_4bit_quant_type
            'nf4'
        """
        return self._of_library("transformers")

    def to_diffusers(self) -> Any:
        """Make diffusers' `BitsAndBytesConfig` with the same meaning; it has the fields of transformers'.

        Raises:
            MissingDependencyError: diffusers is not installed.

        Examples:
            >>> import bigload
            >>> bigload.BnbQuantizationConfig.from_mode("int8").to_diffusers().load_in_8bit
            True
        """
        return self._of_library("diffusers")

    def _of_library(self, name: str) -> Any:
        fields = self.to_dict()
        compute_dtype = fields["bnb_4bit_compute_dtype"]
        return import_optional(name, f"pip install {name}").BitsAndBytesConfig(
            load_in_8bit=self.load_in_8bit,
            load_in_4bit=self.load_in_4bit,
            llm_int8_threshold=float(self.llm_int8_threshold),
            llm_int8_skip_modules=fields["skip_modules"],
            llm_int8_enable_fp32_cpu_offload=self.llm_int8_enable_fp32_cpu_offload,
            llm_int8_has_fp16_weight=self.llm_int8_has_fp16_weight,
            bnb_4bit_compute_dtype=None if compute_dtype == "auto" else compute_dtype,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.bnb_4bit_use_double_quant,
            bnb_4bit_quant_storage=fields["bnb_4bit_quant_storage"],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values for JSON; dtypes are torch's names, such as "float16".

        Examples:
            >>> import bigload
            >>> bigload.BnbQuantizationConfig(load_in_8bit=True).to_dict()["torch_dtype"]
            'float16'
        """
        fields = dataclasses.asdict(self)
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> BnbQuantizationConfig:
        """Make a config from a dict with the fields of bigload, accelerate or transformers.

        Raises:
            ConfigError: a field that none of them has.

        Examples:
            >>> import bigload
            >>> bigload.BnbQuantizationConfig.from_dict({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}).mode
            'nf4'
        """
        if _TRANSFORMERS_EXTRAS & fields.keys() or "llm_int8_skip_modules" in fields:
            return cls.from_transformers(fields)
        return cls._build({name: value for name, value in fields.items() if name != "target_dtype"})

    @classmethod
    def _build(cls, fields: Mapping[str, Any]) -> BnbQuantizationConfig:
        unknown = [name for name in fields if name not in _FIELDS]
        if unknown:
            raise ConfigError(f"unknown config field {listed(unknown)}; the fields are {', '.join(_FIELDS)}")
        # The lists are copied, so that the caller's and the config's do not change each other.
        copied: dict[str, Any] = {name: list(v) if isinstance(v, list) else v for name, v in fields.items()}
        return cls(**copied)


_UNSET = object()
_FIELDS = tuple(field.name for field in dataclasses.fields(BnbQuantizationConfig))
_ACCELERATE_FIELDS = _FIELDS[:9]


def as_config(given: Any) -> BnbQuantizationConfig:
    """Make a checked copy of a config in any form; the caller's is not changed.

    Args:
        given: a config of bigload or accelerate, transformers' `BitsAndBytesConfig`, a dict of any of them, or the name
            of a mode.

    Raises:
        ConfigError: it is none of these, or has an invalid field.
    """
    if isinstance(given, BnbQuantizationConfig):
        return BnbQuantizationConfig._build({name: getattr(given, name) for name in _FIELDS})
    if isinstance(given, str):
        return BnbQuantizationConfig.from_mode(given)
    if isinstance(given, Mapping):
        return BnbQuantizationConfig.from_dict(given)
    # By name, since checking with isinstance would import both libraries.
    classes = {cls.__name__ for cls in type(given).__mro__}
    if "BitsAndBytesConfig" in classes:
        return BnbQuantizationConfig.from_transformers(given)
    if "BnbQuantizationConfig" in classes and all(hasattr(given, name) for name in _ACCELERATE_FIELDS):
        return BnbQuantizationConfig.from_accelerate(given)
    if given is None:
        raise ConfigError(
            "bnb_quantization_config is None, which needs a checkpoint that is quantized already, and there is none: "
            f"give a config or one of {', '.join(MODES)}"
        )
    raise ConfigError(
        f"bnb_quantization_config is a {type(given).__name__}; expected a BnbQuantizationConfig (bigload's or "
        f"accelerate's), a BitsAndBytesConfig, a dict, or one of {', '.join(MODES)}"
    )


@functools.cache  # once in a process for each remedy
def warn_of_float32(remedy: str = "set bnb_4bit_compute_dtype=torch.bfloat16, or name a mode such as 'nf4'") -> None:
    """Warn that 4-bit layers will compute in float32, which few who leave out the compute dtype have meant."""
    logger.warning(
        "4-bit layers will compute in float32, the default of BitsAndBytesConfig, for which bitsandbytes has only slow "
        "kernels: %s. If float32 is meant, BnbQuantizationConfig(bnb_4bit_compute_dtype='fp32', ...) says so without "
        "this warning",
        remedy,
    )


def _unanchored(name: Any) -> Any:
    """Return the path of a skip entry that was anchored for transformers, such as `^model\\.proj$`."""
    is_anchored = isinstance(name, str) and name.startswith("^") and name.endswith("$")
    return name[1:-1].replace("\\", "") if is_anchored else name


def _is_threshold(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _require(good: bool, name: str, expected: str, found: Any) -> None:
    if not good:
        raise ConfigError(f"{name} must be {expected}, but it is {found!r}")


def _dtype(name: str, given: Any) -> torch.dtype | str:
    if given == "auto":
        return "auto"
    dtype = (FLOATS | _SHORT_NAMES).get(given, given) if isinstance(given, str) else given
    _require(dtype in FLOATS.values(), name, "a 16 or 32 bit floating dtype, 'fp32', 'fp16', 'bf16' or 'auto'", given)
    return dtype
