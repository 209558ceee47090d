"""Loads a model as a case says and in the plain way, and compares the two bit for bit, also after what is done then.

The plain way: an empty model, one safetensors file, the same config, everything on the first device.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from checkpoints import empty, save_checkpoint
from comparisons import equal, relative_error
from drawing import DTYPES, Case, blocks_of
from families import FAMILIES, Family, inputs_on
from torch import nn

import bigload
from bigload import BnbQuantizationConfig, OffloadConfig, load_and_quantize_model

# What the CPU computes in float32 is held against a GPU's 16 bit products.
TOLERANCE = 0.05


class DifferenceError(AssertionError):
    """Something is not as it is in the plain way."""


@dataclass
class Loaded:
    """A model that was loaded as a case says, and the same one loaded in the plain way."""

    case: Case
    family: Family
    model: nn.Module
    reference: nn.Module
    device: torch.device
    devices: set[torch.device]
    dtype: torch.dtype
    folder: Path
    load_again: Callable[[], nn.Module]

    def inputs(self) -> dict[str, Any]:
        """New inputs on the device that computes."""
        return inputs_on(self.family, self.device, self.dtype)


@contextlib.contextmanager
def small_tensors_stream() -> Iterator[None]:
    """Let tensors of a few KB leave a device, and let no resident layer use a kernel that rounds its scales."""
    with (
        mock.patch("bigload.planning.units.RESIDENT_BYTES", 2000),
        mock.patch("bigload.quantization.cpu_forwards._PACKED_ROWS", 2**40),
    ):
        yield


def check(case: Case, devices: list[torch.device], folder: Path) -> str:
    """Load a model as the case says and compare it with the plain way.

    Args:
        folder: an empty one.

    Returns:
        "right", or "refused: " and the class of bigload's error.

    Raises:
        DifferenceError: a value differs.
        Exception: whatever is raised that is no error of bigload's.
    """
    with small_tensors_stream():
        family = FAMILIES[case.family]
        torch.manual_seed(case.seed)
        whole = _cast(family.build(), DTYPES[case.stored])
        plain = save_checkpoint(whole, folder / "plain")
        config = _config(case, family)
        try:
            options = _options(case, family, plain, config, devices, folder)
            plan = bigload.plan_device_map(empty(family.build), config, plain, **options)
            used = list(plan.execution_map.values())
            device = devices[0] if devices[0] in used or not used else used[0]
            load = partial(_load, case, family, whole, plain, config, device, folder, options)
            model = load().eval()
        except bigload.BigloadError as error:
            return f"refused: {type(error).__name__}\n{error}"
        if plan.in_fp32:  # the CPU computes these blocks, and quantizes nothing
            quantized = {*plan.layers, *plan.experts}
            config = dataclasses.replace(config, skip_modules=_plain_modules(family, quantized))
        reference = load_and_quantize_model(empty(family.build), config, plain, device_map={"": device}).eval()
        loaded = Loaded(case, family, model, reference, device, {*used}, plan.config.load_dtype, folder, load)
        compare_outputs(loaded, "forward")
        for act in case.acts:
            try:
                ACTS[act](loaded)
            except bigload.BigloadError as error:
                return f"refused at {act}: {type(error).__name__}\n{error}"
            compare_outputs(loaded, f"forward after {act}")
        return "right"


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what a checkpoint holds: not the tables of positions, which a model makes for itself in float32."""
    stored = model.state_dict(keep_vars=True)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and any(tensor is each for each in stored.values()):
            tensor.data = tensor.data.to(dtype)
    return model


def _config(case: Case, family: Family) -> BnbQuantizationConfig:
    skip = ["*"] if case.mode == "none" else family.skip
    mode = "nf4" if case.mode == "none" else case.mode
    return BnbQuantizationConfig.from_mode(mode, skip_modules=skip, torch_dtype=case.torch_dtype)


def _load(
    case: Case,
    family: Family,
    whole: nn.Module,
    plain: Path,
    config: BnbQuantizationConfig,
    device: torch.device,
    folder: Path,
    options: dict[str, Any],
) -> nn.Module:
    model, location, chosen = _source(case, family, whole, plain, config, device, folder)
    return load_and_quantize_model(model, chosen, location, **options)


def _options(
    case: Case, family: Family, plain: Path, config: BnbQuantizationConfig, devices: list[torch.device], folder: Path
) -> dict[str, Any]:
    """Where the case places the model, as a load and a plan take it."""
    budgets = {"max_memory": _budgets(case, family, plain, config, devices)} if case.budget else {}
    offload = OffloadConfig(execute=case.execute, slots=case.slots, reserve=0)
    return {"device_map": case.device_map, "offload_folder": folder / "offload", "offload": offload} | budgets


def _plain_modules(family: Family, quantized: Collection[str]) -> list[str]:
    """The modules with weights that a plan does not quantize."""
    modules = empty(family.build).named_modules()
    held = {"weight", "down_proj"}  # of a layer, or of fused experts
    return [path for path, module in modules if path not in quantized and not held.isdisjoint(module._parameters)]


def _source(
    case: Case,
    family: Family,
    whole: nn.Module,
    plain: Path,
    config: BnbQuantizationConfig,
    device: torch.device,
    folder: Path,
) -> tuple[nn.Module, Path | None, BnbQuantizationConfig | None]:
    """Write the weights as the case says. Returns a model to load into, where its weights are, and the config."""
    if case.source == "own":
        return copy.deepcopy(whole), None, config
    model = empty(family.build)
    if case.source == "safetensors":
        return model, plain, config
    where = folder / case.source
    if not where.exists():
        _WRITERS[case.source](case, family, whole, plain, config, device, where)
    return model, where, config if case.source in ("sharded", "pickled") else None


def _save_shards(case, family, whole, plain, config, device, where) -> None:
    save_checkpoint(whole, where, shards=3)


def _pickle(case, family, whole, plain, config, device, where) -> None:
    where.mkdir()
    torch.save(whole.state_dict(), where / "pytorch_model.bin")


def _save(case, family, whole, plain, config, device, where) -> None:
    made = load_and_quantize_model(empty(family.build), config, plain, device_map={"": device})
    bigload.save_quantized_model(made, where, max_shard_size="100KB")


def _convert(case, family, whole, plain, config, device, where) -> None:
    bigload.quantize_checkpoint(plain, where, config, model=empty(family.build), device=str(device))


def _save_with_transformers(case, family, whole, plain, config, device, where) -> None:
    import transformers

    dtype = dtype_of(family, plain, config)
    fields = {"bnb_4bit_quant_type": case.mode[:3], "bnb_4bit_use_double_quant": case.mode.endswith("dq")}
    fields |= {"load_in_4bit": True, "bnb_4bit_compute_dtype": dtype}
    theirs = transformers.BitsAndBytesConfig(
        **(fields if case.mode != "int8" else {"load_in_8bit": True}), llm_int8_skip_modules=family.skip
    )
    whole.config.save_pretrained(plain)
    made = type(whole).from_pretrained(plain, quantization_config=theirs, dtype=dtype, device_map={"": str(device)})
    made.save_pretrained(where)


_WRITERS = {
    "sharded": _save_shards,
    "pickled": _pickle,
    "saved": _save,
    "converted": _convert,
    "transformers": _save_with_transformers,
}


def _budgets(
    case: Case, family: Family, plain: Path, config: BnbQuantizationConfig, devices: list[torch.device]
) -> dict[Any, Any]:
    """Let each device hold its share of the model's bytes, and the CPU and the disk whatever is left."""
    plan = bigload.plan_device_map(empty(family.build), config, plain, device_map={"": devices[0]})
    total = sum(plan.device_bytes.values())
    budgets: dict[Any, Any] = {"cpu": "10GiB", "disk": "10GiB"}
    for device, share in zip(devices, case.budget, strict=True):
        kept = plan.accounts[0].reserve if device.type == "cuda" else 0
        budgets["cpu" if device.type == "cpu" else device.index] = int(share * total) + kept
    return budgets


def dtype_of(family: Family, plain: Path, config: BnbQuantizationConfig) -> torch.dtype:
    """Return the dtype of what is not quantized; T5 holds more in float32, whatever was asked."""
    return bigload.plan_device_map(empty(family.build), config, plain, device_map="cpu").config.load_dtype


def outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The floating-point tensors that a forward gives, by name."""
    with torch.no_grad():
        return tensors_in(model(**inputs))


def tensors_in(given: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors in what a forward gave."""
    if isinstance(given, torch.Tensor):
        return {"output": given}
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def compare_outputs(loaded: Loaded, when: str) -> None:
    """Run both models on the same inputs.

    Raises:
        DifferenceError: with what differs, and when.
    """
    found = outputs(loaded.model, loaded.inputs())
    expected = outputs(loaded.reference, loaded.inputs())
    compare(loaded.case, found, expected, when)


def compare(case: Case, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], when: str) -> None:
    """Compare tensors by name and bits, or within TOLERANCE where the CPU computed a part of them."""
    if found.keys() != expected.keys():
        raise DifferenceError(f"{when}: only one has {sorted(found.keys() ^ expected.keys())}")
    for name, value in expected.items():
        ours, theirs = found[name].detach().cpu(), value.detach().cpu()
        if case.is_cpu_computed and ours.is_floating_point() and ours.shape == theirs.shape:
            is_equal = relative_error(ours, theirs) < TOLERANCE
        else:
            is_equal = equal(ours, theirs)
        if not is_equal:
            raise DifferenceError(
                f"{when}: {name} is {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} {tuple(theirs.shape)}"
                + (f", {relative_error(ours, theirs):.2g} off" if ours.shape == theirs.shape else "")
            )


# What is done with a loaded model. Each raises DifferenceError where it is not as with the reference.


def _again(loaded: Loaded) -> None:
    for count in range(3):
        compare_outputs(loaded, f"forward {count + 2}")


def _state_dict(loaded: Loaded) -> None:
    compare_states(loaded.model, loaded.reference, loaded.case, "state_dict")


def compare_states(model: nn.Module, reference: nn.Module, case: Case, when: str) -> None:
    """Compare the state_dicts of two models by bits; where the CPU computes, what it holds is in float32."""
    if not case.is_cpu_computed:
        compare(case, dict(model.state_dict()), dict(reference.state_dict()), when)


def _save_and_load(loaded: Loaded) -> None:
    if not _is_quantized(loaded):
        return
    for name, model in (("ours", loaded.model), ("plain", loaded.reference)):
        bigload.save_quantized_model(model, loaded.folder / f"saved-{name}", max_shard_size="100KB")
    made = [
        load_and_quantize_model(
            empty(loaded.family.build), None, loaded.folder / f"saved-{name}", device_map={"": loaded.device}
        ).eval()
        for name in ("ours", "plain")
    ]
    compare_states(*made, loaded.case, "saved and loaded")
    both = [outputs(each, loaded.inputs()) for each in made]
    compare(loaded.case, *both, "forward of the saved")


def _is_quantized(loaded: Loaded) -> bool:
    return any(getattr(p, "quant_state", None) or type(p).__name__ == "Int8Params" for p in loaded.model.parameters())


def _remove(loaded: Loaded) -> None:
    if "offload" in vars(loaded.model):
        loaded.model.offload.remove()


def _dequantize(loaded: Loaded) -> None:
    if not _is_quantized(loaded) or "offload" in vars(loaded.model):
        return
    bigload.dequantize_model(loaded.model)
    bigload.dequantize_model(loaded.reference)
    _state_dict(loaded)


def _gradients(loaded: Loaded) -> None:
    found = []
    for model in (loaded.model, loaded.reference):
        model.zero_grad()
        given = tensors_in(model(**loaded.inputs()))
        loss = sum(value.float().square().mean() for value in given.values() if value.requires_grad)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    if loaded.case.is_cpu_computed or len(loaded.devices) > 1:
        # They are added up in another order: what is nearly zero is all rounding, and 16 bit round coarsely.
        if found[0].keys() != found[1].keys():
            raise DifferenceError(f"gradients: only one has {sorted(found[0].keys() ^ found[1].keys())}")
        ours, theirs = (torch.cat([g.float().cpu().view(-1) for _, g in sorted(grads.items())]) for grads in found)
        if relative_error(ours, theirs) > (1e-3 if loaded.dtype.itemsize == 4 else 0.2):
            raise DifferenceError(f"gradients are {relative_error(ours, theirs):.2g} off")
        return
    compare(loaded.case, *found, "gradients")


def _lora(loaded: Loaded) -> None:
    from adapters import lora_losses

    if loaded.case.family not in ("llama", "llama_tied", "mistral", "qwen2", "qwen3") or loaded.case.is_cpu_computed:
        return
    tokens = loaded.inputs()["input_ids"]
    losses = [lora_losses(model, tokens, steps=2) for model in (loaded.model, loaded.reference)]
    if losses[0] != losses[1]:
        raise DifferenceError(f"losses of LoRA are {losses[0]}, expected {losses[1]}")
    loaded.model.eval(), loaded.reference.eval()


def _generate(loaded: Loaded) -> None:
    if not hasattr(loaded.model, "generate") or loaded.case.is_cpu_computed:
        return
    inputs = {name: value for name, value in loaded.inputs().items() if not name.startswith("decoder")}
    if len(inputs) < len(loaded.inputs()):
        inputs["decoder_start_token_id"] = 0
    tokens = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (loaded.model, loaded.reference)]
    compare(loaded.case, {"tokens": tokens[0]}, {"tokens": tokens[1]}, "generate")


def _threads(loaded: Loaded) -> None:
    expected, failed = outputs(loaded.reference, loaded.inputs()), list[BaseException]()

    def run() -> None:
        try:
            for _ in range(2):
                compare(loaded.case, outputs(loaded.model, loaded.inputs()), expected, "forward in a thread")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def _stream(loaded: Loaded) -> None:
    if loaded.device.type != "cuda":
        return
    stream = torch.cuda.Stream(loaded.device)
    stream.wait_stream(torch.cuda.current_stream(loaded.device))
    with torch.cuda.stream(stream):
        found = outputs(loaded.model, loaded.inputs())
    stream.synchronize()
    compare(loaded.case, found, outputs(loaded.reference, loaded.inputs()), "forward on another stream")


def _second(loaded: Loaded) -> None:
    second = loaded.load_again().eval()
    expected = outputs(loaded.reference, loaded.inputs())
    compare(loaded.case, outputs(second, loaded.inputs()), expected, "a second load")
    del second
    if loaded.device.type == "cuda":
        gc.collect()


def _copy_of_layer(loaded: Loaded) -> None:
    path = blocks_of(loaded.model)[-1]
    copies = [copy.deepcopy(model.get_submodule(path)) for model in (loaded.model, loaded.reference)]
    compare_states(copies[0], copies[1], loaded.case, f"a copy of {path}")


ACTS: dict[str, Callable[[Loaded], None]] = {
    "again": _again,
    "state_dict": _state_dict,
    "save": _save_and_load,
    "remove": _remove,
    "dequantize": _dequantize,
    "gradients": _gradients,
    "lora": _lora,
    "generate": _generate,
    "threads": _threads,
    "stream": _stream,
    "second": _second,
    "copy_of_layer": _copy_of_layer,
}
