"""How each peer loads: what it imports, which model it is given, and the one call that is timed. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import config_of, shards

if TYPE_CHECKING:
    from torch import nn

QUANTIZING = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")
MODES = (*QUANTIZING, "none", "stored")


@dataclass(frozen=True)
class Peer:
    """One way to load a checkpoint.

    Attributes:
        modules: what it imports, that of its own name included.
        modes: what it can do.
        load: the call that is timed, of model, folder, mode and device; gives what holds the weights.
        build: makes the empty model that `load` takes; None where the call makes its own, or gives tensors only.
        uses_transformers: it makes a model of transformers where the checkpoint is of one.
    """

    modules: tuple[str, ...]
    modes: tuple[str, ...]
    load: Callable[[Any, Path, str, str], Any]
    build: Callable[[Path], nn.Module] | None = None
    uses_transformers: bool = True

    @property
    def missing(self) -> str | None:
        """Name the first package that is not installed."""
        return next((name for name in self.modules if find_spec(name) is None), None)

    def modules_for(self, config: Mapping[str, Any]) -> list[str]:
        """List what is imported before a load: the class of the model too, which some would import within it."""
        kind = config.get("model_type")
        if not self.uses_transformers or kind is None:
            return list(self.modules)
        return [*self.modules, "transformers", f"transformers.models.{kind}.modeling_{kind}"]


def is_scaled(config: Mapping[str, Any]) -> bool:
    """Ask of a config.json whether its weights are in fp8 or mxfp4, to be loaded as something else."""
    return _method(config) in ("fp8", "mxfp4")


def modes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """List the modes that a checkpoint can be loaded in, by its config.json: of a quantized one, as it is stored."""
    if is_scaled(config):
        return MODES
    return ("stored",) if "quantization_config" in config else (*QUANTIZING, "none")


def _method(config: Mapping[str, Any]) -> str | None:
    method: str | None = config.get("quantization_config", {}).get("quant_method")
    return method


def can_load(name: str, mode: str, config: Mapping[str, Any], device: str) -> bool:
    """Ask whether a peer can do what is to be measured.

    Args:
        name: of the peer.
        mode: one of `MODES`.
        config: the checkpoint's config.json.
        device: "cpu" or "cuda:N".
    """
    if mode not in PEERS[name].modes or mode not in modes_of(config):
        return False
    if is_scaled(config) and (mode == "stored") != (name in TENSORS_ONLY):
        return False
    if is_scaled(config) and name == "transformers" and mode != "none":
        return False  # it refuses to quantize what others have
    if name == "instanttensor" and device == "cpu":
        return False
    if name == "transformers":
        return "model_type" in config  # it loads no modules but its own
    # Quantizing by accelerate needs a GPU, and weights of 16 bit.
    return name != "accelerate" or (not is_scaled(config) and (mode == "none" or device != "cpu"))


def _build(folder: Path) -> nn.Module:
    from .checkpoints import build

    return build(folder)


def _bigload(model: Any, folder: Path, mode: str, device: str) -> Any:
    from bigload import BnbQuantizationConfig, load_and_quantize_model

    config: Any = None if mode == "stored" else mode
    if mode == "none":
        config = BnbQuantizationConfig(
            load_in_4bit=True, skip_modules=["*"], torch_dtype="auto", bnb_4bit_compute_dtype="auto"
        )
    return load_and_quantize_model(model, config, folder, device_map=device, progress=False)


def _transformers(model: None, folder: Path, mode: str, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
    from transformers.utils.logging import disable_progress_bar

    from bigload import BnbQuantizationConfig

    disable_progress_bar()
    options: dict[str, Any] = {}
    stored = config_of(folder)
    if is_scaled(stored):
        cls = FineGrainedFP8Config if _method(stored) == "fp8" else Mxfp4Config
        options["quantization_config"] = cls(dequantize=True)
    if mode in QUANTIZING:
        config = BnbQuantizationConfig.from_mode(mode, bnb_4bit_compute_dtype="bf16")
        options["quantization_config"] = config.to_transformers()
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, dtype=torch.bfloat16, **options)


def _build_for_accelerate(folder: Path) -> nn.Module:
    """Build with accelerate's own `init_empty_weights`, as its users do."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    if "model_type" not in config_of(folder):
        return _build(folder)
    with init_empty_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return model


def _accelerate(model: Any, folder: Path, mode: str, device: str) -> Any:
    import torch
    from accelerate import load_checkpoint_and_dispatch
    from accelerate.utils import BnbQuantizationConfig, load_and_quantize_model

    if mode == "none":
        return load_checkpoint_and_dispatch(model, folder, device_map={"": device}, dtype=torch.bfloat16)
    options: dict[str, Any] = {"load_in_8bit": True, "torch_dtype": torch.bfloat16}
    if mode != "int8":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": mode[:3],
            "bnb_4bit_use_double_quant": mode.endswith("-dq"),
            "bnb_4bit_compute_dtype": "bf16",
        }
    index = torch.device(device).index  # it takes no other spelling of a GPU
    return load_and_quantize_model(
        model, BnbQuantizationConfig(**options), weights_location=folder, device_map={"": index}
    )


def _safetensors(model: None, folder: Path, mode: str, device: str) -> Any:
    from safetensors.torch import load_file

    return [load_file(file, device=device) for file in shards(folder)]


def _fastsafetensors(model: None, folder: Path, mode: str, device: str) -> Any:
    from fastsafetensors import fastsafe_open

    # Without GPUDirect Storage, which reads from the disk whatever the page cache holds.
    with fastsafe_open([str(file) for file in shards(folder)], device=device, nogds=True) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _instanttensor(model: None, folder: Path, mode: str, device: str) -> Any:
    from instanttensor import BackendPolicy, safe_open

    # Buffered: by default it reads past the page cache.
    files = [str(file) for file in shards(folder)]
    with safe_open(files, framework="pt", device=device, backend=BackendPolicy.BUFFERED) as opened:
        return dict(opened.tensors())


def _runai(model: None, folder: Path, mode: str, device: str) -> Any:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in shards(folder)])
        return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}


PEERS = {
    # bigload.loading: `import bigload` imports what a name needs when it is first used.
    "bigload": Peer(("torch", "bitsandbytes", "bigload", "bigload.loading"), MODES, _bigload, _build),
    "transformers": Peer(("torch", "bitsandbytes", "transformers"), MODES, _transformers),
    "accelerate": Peer(
        ("torch", "bitsandbytes", "accelerate"), (*QUANTIZING, "none"), _accelerate, _build_for_accelerate
    ),
    "safetensors": Peer(("torch", "safetensors"), ("none", "stored"), _safetensors, uses_transformers=False),
    "fastsafetensors": Peer(
        ("torch", "fastsafetensors"), ("none", "stored"), _fastsafetensors, uses_transformers=False
    ),
    "instanttensor": Peer(("torch", "instanttensor"), ("none", "stored"), _instanttensor, uses_transformers=False),
    "runai": Peer(("torch", "runai_model_streamer"), ("none", "stored"), _runai, uses_transformers=False),
}
# They give tensors as they are stored, and no model.
TENSORS_ONLY = [name for name, peer in PEERS.items() if not peer.uses_transformers]
