"""What the processes of a world find when each has a stage of a model."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from torch.distributed.pipelining import ScheduleGPipe
from world_loads import TOKENS, load, once

import bigload
from bigload.quantization import cpu_forwards

_SIZES = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT = {"vocab_size": 101, "n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 32}
_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
# One that scales its embeddings after them, and whose layers differ; one of which head and embedding are one.
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "gemma": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_SIZES, head_dim=16, sliding_window=4)),
    "gpt": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT)),
    "mixture": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_SIZES, **_MOE)),
}


def build(kind: str):
    torch.manual_seed(0)
    return MODELS[kind]().bfloat16().eval()


def empty(kind: str):
    with bigload.init_empty_weights():
        return build(kind).eval()


def pipelines(mesh, folder: Path, cells) -> dict:
    """Run each model, (kind, mode), in stages, with two micro-batches."""
    device = torch.device(mesh.device_type, 0 if mesh.device_type == "cpu" else torch.cuda.current_device())
    tokens, found = TOKENS.to(device), {}
    cpu_forwards._PACKED_ROWS = 2**40  # a kernel of the CPU that rounds scales, which `load` turns off too
    for kind, mode in cells:
        path = folder / kind
        once(mesh, lambda kind=kind, path=path: build(kind).save_pretrained(path))
        module = bigload.load_pipeline_stage(empty(kind), mode, path, mesh, progress=False)
        stage = module.pipeline_stage(input_ids=tokens[:1])
        with torch.no_grad():
            runs = [ScheduleGPipe(stage, n_microbatches=2).step(input_ids=tokens) for _ in range(2)]
        whole = load(kind, path, mode, mesh.device_type, model=empty(kind))
        with torch.no_grad():
            expected = torch.cat([whole(input_ids=row[None]).logits for row in tokens])
        found[f"{kind} {mode}"] = {
            "equal": [torch.equal(run, expected) for run in runs] if module.is_last else [run is None for run in runs],
            "blocks": list(module.blocks),
            "on meta": sum(parameter.is_meta for parameter in module.parameters()),
            "read": module.load_report.bytes_read,
            "read by one": whole.load_report.bytes_read,
            "held": sum(p.nbytes for p in module.parameters()),
            "whole": sum(p.nbytes for p in whole.parameters()),
        }
    return found
