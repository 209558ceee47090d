"""What the processes of a world find when they load, run and train models together."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers as tf
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy

import bigload
from bigload.distributed.shards import held_bytes
from bigload.quantization import cpu_forwards

# Rows that no blocksize divides, and numbers of them that no number of processes does.
_SIZES = {
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 130,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_MOE = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 16}
TOKENS = torch.arange(32).view(2, 16) * 7 % 90 + 1


def build(kind: str) -> nn.Module:
    """A model of transformers with random weights, the same in each process."""
    torch.manual_seed(0)
    if kind == "mixture":
        return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_SIZES | _MOE)).bfloat16().eval()
    if kind == "transposed":  # its Conv1D, and biases
        sizes = {"vocab_size": 101, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).bfloat16().eval()
    sizes = _SIZES | ({"hidden_size": 256, "vocab_size": 4000} if kind == "larger" else {})
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied")).bfloat16().eval()


def empty(kind: str) -> nn.Module:
    with bigload.init_empty_weights():
        return build(kind).eval()


def once(mesh, make) -> None:
    """Let the first process do something that the others wait for."""
    if dist.get_rank() == 0:
        make()
    dist.barrier()


def saved(mesh, folder: Path, kind: str, mode: str | None = None) -> Path:
    """Write a checkpoint, plain or quantized. Returns its folder."""
    path = folder / f"{kind}-{mode or 'plain'}"

    def write():
        if path.exists():
            return
        if mode is None:
            build(kind).save_pretrained(path)
        else:
            bigload.save_quantized_model(load(kind, folder / f"{kind}-plain", mode, mesh.device_type), path)

    once(mesh, write)
    return path


def load(kind: str, path: Path, mode, device_map=None, model=None, **given) -> nn.Module:
    # Resident layers use no kernel of the CPU that rounds their scales, which gathered ones cannot use.
    cpu_forwards._PACKED_ROWS = 2**40
    model = empty(kind) if model is None else model
    return bigload.load_and_quantize_model(model, mode, path, device_map, progress=False, **given)


def digests(model: nn.Module) -> dict[str, str]:
    """Return digests of the bits of all parameters, with what bitsandbytes holds beside them; gathered if sharded."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in shards:
        module.unshard()
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors = [parameter.data]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            assert tuple(state.shape)
        layer = model.get_submodule(name.rpartition(".")[0])
        if hasattr(layer, "state") and name.endswith("weight"):
            tensors.append(layer.state.SCB if parameter.SCB is None else parameter.SCB)
        digest = hashlib.sha256()
        for tensor in tensors:
            flat = tensor.detach().reshape(-1).clone().cpu()  # numpy forbids that its memory is freed
            digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            digest.update(bytes(flat.view(torch.uint8).numpy()))
        found[name] = digest.hexdigest()
    for module in shards:
        module.reshard()
    return found


def logits_of(model: nn.Module, device) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS.to(device)).logits


def loads(mesh, folder: Path, cells) -> dict:
    """Load each cell, (kind, mode, stored mode), sharded, as replicas and in one process, and compare them."""
    device = torch.device(mesh.device_type, 0 if mesh.device_type == "cpu" else torch.cuda.current_device())
    found = {"reads": reads(mesh, folder)}
    if mesh.size() == 2:
        found["options"] = takes_options(mesh, folder, device) | of_own_weights(mesh, device)
    else:
        found["options"] = in_two_dimensions(mesh, folder, device)
    for kind, mode, stored in cells:
        saved(mesh, folder, kind)
        path = saved(mesh, folder, kind, stored)
        asked = mode if stored is None else None
        whole = load(kind, path, asked, mesh.device_type) if dist.get_rank() == 0 else None
        expected: list = [None] * 4
        if whole is not None:
            logits = logits_of(whole, device).float().cpu()
            expected = [digests(whole), logits, whole.load_report.nbytes, whole.load_report.bytes_read]
        dist.broadcast_object_list(expected, device=device)
        bits, logits, nbytes, read = expected
        model = load(kind, path, asked, mesh=mesh)
        alike = {"weights": digests(model) == bits}
        alike["logits"] = torch.equal(logits_of(model, device).float().cpu(), logits)
        alike["weights afterwards"] = digests(model) == bits
        replica = load(kind, path, asked, mesh=mesh, replicate=True)
        alike["replicas"] = digests(replica) == bits
        alike["bytes of replicas"] = replica.load_report.nbytes == nbytes
        alike["logits of replicas"] = torch.equal(logits_of(replica, device).float().cpu(), logits)
        if stored is None and mode != "none":
            alike["what is saved"] = saves_alike(model, whole, folder / f"saved-{kind}-{mode}")
        one = {id(p): p for p in model.parameters()}.values()
        found[f"{kind} {mode} {stored}"] = {
            "alike": alike,
            "held": sum(map(held_bytes, one)),
            "planned": model.load_report.nbytes,
            "whole": nbytes,
            "read": model.load_report.bytes_read,
            "read by one": read,
            "read by replica": replica.load_report.bytes_read,
        }
    return found


def takes_options(mesh, folder: Path, device) -> dict[str, bool]:
    """Load with options of fully_shard; whether each computes as one process."""
    path = saved(mesh, folder, "mixture")
    whole = logits_of(load("mixture", path, "nf4-dq", mesh.device_type), device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"kept": {"reshard_after_forward": False}, "mixed": {"mp_policy": policy}}
    options["on the host"] = {"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")}
    found = {}
    for name, given in options.items():
        model = load("mixture", path, "nf4-dq", mesh=mesh, fsdp_options=given)
        if name == "on the host":
            found["at rest on the host"] = {p.device.type for p in model.parameters()} == {"cpu"}
        found[name] = all(torch.equal(logits_of(model, device), whole) for _ in range(2))
    # Packed bytes that are gathered as bfloat16 must stay as they are where they are NaNs of no usual form.
    stored = bigload.BnbQuantizationConfig.from_mode("nf4-dq", bnb_4bit_quant_storage="bfloat16")
    model = load("mixture", path, stored, mesh=mesh, fsdp_options=options["mixed"])
    found["stored as bfloat16"] = all(torch.equal(logits_of(model, device), whole) for _ in range(2))
    return found


def in_two_dimensions(mesh, folder: Path, device) -> dict[str, bool]:
    """Load with a copy of the model on each half of the processes."""
    path = saved(mesh, folder, "plain")
    mesh = init_device_mesh(mesh.device_type, (2, mesh.size() // 2), mesh_dim_names=("replicate", "shard"))
    whole = load("plain", path, "nf4-dq", mesh.device_type)
    model = load("plain", path, "nf4-dq", mesh=mesh, adapters=lambda m: tuned(m, "plain"))
    replica = load("plain", path, "nf4-dq", mesh=mesh, replicate=True)
    found = {"replicas": digests(replica) == digests(whole)}
    losses = losses_of(model, device, 3)
    torch.manual_seed(1)
    found["losses"] = losses == losses_of(tuned_alone(whole, "plain"), device, 3)
    with bigload.init_empty_weights():
        headed = tf.LlamaForSequenceClassification(tf.LlamaConfig(**_SIZES))
    torch.manual_seed(dist.get_rank())  # each process makes another head
    new = {"mesh": mesh, "initialize_missing": ["score"], "progress": False}
    heads: list = [None] * dist.get_world_size()
    made = bigload.load_and_quantize_model(headed, "nf4", path, **new).score.weight.full_tensor()
    dist.all_gather_object(heads, made.flatten().tolist())
    found["one head"] = all(head == heads[0] for head in heads)
    half = whole.load_report.bytes_read / 2
    found["half is read"] = abs(model.load_report.bytes_read - half) < 0.01 * half
    return found


def of_own_weights(mesh, device) -> dict[str, bool]:
    """Quantize models that are in memory, each process its share of its own copy; then ones that differ."""
    whole = bigload.load_and_quantize_model(build("plain").to(device), "nf4-dq", device_map=mesh.device_type)
    model = bigload.load_and_quantize_model(build("plain").to(device), "nf4-dq", mesh=mesh)
    found = {"own weights": torch.equal(logits_of(model.eval(), device), logits_of(whole.eval(), device))}
    other = build("plain").to(device)
    if dist.get_rank() == 1:
        for parameter in other.parameters():
            parameter.data.mul_(2)
    try:
        bigload.load_and_quantize_model(other, "nf4-dq", mesh=mesh)
    except bigload.DistributedError as error:
        found["other weights are refused"] = "weights of the model" in str(error) and error.ranks == [1]
    return found


def saves_alike(model, whole, folder: Path) -> bool:
    """Save a sharded model by all processes, and a whole one by the first; whether all files have the same bytes."""
    for name in ("joint", "alone"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    bigload.save_quantized_model(model, folder / "joint" / "model", max_shard_size="20KB")
    if dist.get_rank():
        return True
    bigload.save_quantized_model(whole, folder / "alone" / "model", max_shard_size="20KB")
    files = [
        {path.name: path.read_bytes() for path in (folder / name / "model").iterdir()} for name in ("joint", "alone")
    ]
    assert len([name for name in files[0] if name.endswith(".safetensors")]) > 2
    different = [name for name in files[1] if files[0].get(name) != files[1][name]]
    assert not different, [files[n][name] for name in different for n in (0, 1)]
    return files[0].keys() == files[1].keys()


def read_bytes() -> int:
    """Return how many bytes this process has read from files."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def reads(mesh, folder: Path) -> dict:
    """Count what is really read from the file, in a load after another one."""
    path = saved(mesh, folder, "larger")
    found = []
    for _ in range(2):
        before = read_bytes()
        model = load("larger", path, "nf4", mesh=mesh)
        found.append(read_bytes() - before)
    file = (path / "model.safetensors").stat().st_size
    return {"read": found[-1], "file": file, "reported": model.load_report.bytes_read}


def tuned(model, kind: str, **given):
    torch.manual_seed(1 + dist.get_rank())  # all get the adapters of the first
    return tuned_alone(model, kind, **given)


def tuned_alone(model, kind: str, **given):
    import peft

    targets = ["q_proj", "v_proj"] if kind == "mixture" else "all-linear"
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **given))


def checkpointed(model, other, folder: Path, device) -> bool:
    """Write what is trained by torch's distributed checkpoint, and read it into another model."""
    options = StateDictOptions(ignore_frozen_params=True)
    dcp.save(get_model_state_dict(model, options=options), checkpoint_id=folder / "dcp")
    for name, parameter in other.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.requires_grad_(True)
            parameter.detach().zero_()
    assert not torch.equal(logits_of(other, device), logits_of(model, device))
    state = get_model_state_dict(other, options=options)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(other, state, options=StateDictOptions(strict=False))
    return torch.equal(logits_of(other, device), logits_of(model, device))


def by_ddp(mesh, folder: Path, device) -> dict:
    """Train adapters on replicas by torch's DistributedDataParallel."""
    path = saved(mesh, folder, "mixture")
    replica = tuned(load("mixture", path, "nf4", mesh=mesh, replicate=True), "mixture")
    losses = losses_of(torch.nn.parallel.DistributedDataParallel(replica), device, 4)
    whole = load("mixture", path, "nf4", mesh.device_type)
    torch.manual_seed(1)
    return {"sharded": losses, "losses": losses_of(tuned_alone(whole, "mixture"), device, 4), "off": 0}


def losses_of(model, device, steps: int = 10, tokens=TOKENS) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens.to(device), labels=tokens.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def trains(mesh, folder: Path, cells) -> dict:
    """Train adapters in each cell, (kind, mode, checkpointing, modules_to_save), sharded and in one process."""
    import peft

    device = torch.device(mesh.device_type, 0 if mesh.device_type == "cpu" else torch.cuda.current_device())
    found = {}
    for kind, mode, checkpointing, kept in cells:
        path = saved(mesh, folder, kind)
        given = {"modules_to_save": kept} if kept else {}
        model = load(kind, path, mode, mesh=mesh, adapters=lambda m, kind=kind, given=given: tuned(m, kind, **given))
        one = {"losses": None, "counted": [model.get_nb_trainable_parameters(), model.num_parameters()]}
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        losses = losses_of(model, device)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(model, options=options)
        if dist.get_rank() == 0:
            whole = tuned(load(kind, path, mode, mesh.device_type), kind, **given)
            one["counted by one"] = [whole.get_nb_trainable_parameters(), whole.num_parameters()]
            one["losses"] = losses_of(whole, device)
            model.save_pretrained(folder / "adapter", state_dict=state)
            again = peft.PeftModel.from_pretrained(load(kind, path, mode, mesh.device_type), folder / "adapter")
            trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
            read = dict(again.named_parameters())
            one["off"] = max((read[name].cpu() - p.detach().cpu()).abs().max().item() for name, p in trained.items())
        dist.barrier()
        if kept:  # the same adapters again, read by all
            read = partial(peft.PeftModel.from_pretrained, model_id=folder / "adapter")
            more = load(kind, path, mode, mesh=mesh, adapters=read)
            one["same again"] = torch.equal(logits_of(more.eval(), device), logits_of(model.eval(), device))
            one["same by checkpoint"] = checkpointed(model, more, folder, device)
        found[f"{kind} {mode} {checkpointing} {kept}"] = {"sharded": losses, **one}
    return {**found, "replicas by DDP": by_ddp(mesh, folder, device)}
