"""QLoRA by several processes with FSDP2: each reads, quantizes and holds its share of the model alone.

torchrun --nproc_per_node 2 examples/qlora_fsdp2.py, with a GPU for each, or on the CPU. What else starts the processes
must set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does. The model is small and random, its
checkpoint is written here; give the folder or hub id of a real one instead.
"""

import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from bigload import init_empty_weights, load_and_quantize_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = LlamaConfig(vocab_size=128, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, **SIZES)
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def begin() -> torch.device:
    """Join the other processes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=5))
    return device


def main(folder: Path) -> None:
    """Train adapters, and save them."""
    device = begin()
    given = [str(folder)]
    dist.broadcast_object_list(given)  # all use the folder of the first
    folder = Path(given[0])
    if dist.get_rank() == 0:
        AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder / "checkpoint")
    dist.barrier()

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(CONFIG)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = load_and_quantize_model(
        model, "nf4-dq", folder / "checkpoint", mesh=mesh, adapters=lambda base: get_peft_model(base, LORA)
    )
    # The second is its name in older versions of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.enable_input_require_grads()

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = (torch.arange(4)[:, None] + torch.arange(16) + 8 * dist.get_rank()).to(device) % 100 + 3
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)  # of the adapters, in all processes
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)
        print(f"{dist.get_world_size()} ranks: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {len(state)} tensors saved")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(Path(made))
