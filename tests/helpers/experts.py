"""Fused experts, packed by bitsandbytes itself, and the same experts with the values that they dequantize to."""

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import torch
from torch import nn

from bigload import BnbQuantizationConfig
from bigload.model.experts import find_experts
from bigload.quantization.bnb import dequantize_4bit
from bigload.quantization.experts import experts_parameter, quantized_attributes
from bigload.quantization.formats import FourBit
from bigload.quantization.packed_experts import PackedExperts, Places, cache_layout
from bigload.quantization.quantized_weight import QuantizedWeight


def packed(values, mode="nf4", blocksize=64, storage=torch.uint8):
    """Return the `Params4bit` of (E, out_features, in_features), quantized as one tensor."""
    config = BnbQuantizationConfig.from_mode(mode, bnb_4bit_blocksize=blocksize, bnb_4bit_quant_storage=storage)
    data, state = bnb.functional.quantize_4bit(
        values.reshape(-1, values.shape[-1]),
        blocksize=blocksize,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_storage=storage,
    )
    state.shape = values.shape
    return experts_parameter(QuantizedWeight(data, quant_state=state), config)


def pack(model, mode="nf4", compute_dtype=torch.float32, **how):
    """Quantize the experts of a model in place.

    Returns:
        A copy of the model, made before, whose experts have the values that the packed ones dequantize to.
    """
    plain = copy.deepcopy(model)
    modules = dict(model.named_modules())
    found = find_experts(modules, how.get("blocksize", 64))
    assert found
    for path, experts in found.items():
        module, twin = modules[path], plain.get_submodule(path)
        for name in experts.weights:
            values = module._parameters[name].data
            values = values.mT.contiguous() if experts.is_transposed else values
            assert values.shape == experts.packed_shape(name)
            parameter = module._parameters[name] = packed(values, mode, **how)
            values = dequantize_4bit(parameter.data, parameter.quant_state, twin._parameters[name].dtype)
            values = values.mT.contiguous() if experts.is_transposed else values
            assert values.shape == experts.plain_shape(name)
            twin._parameters[name] = nn.Parameter(values, requires_grad=False)
        for name, value in quantized_attributes(module, experts, compute_dtype, path).items():
            setattr(module, name, value)
    return plain


def made(kind="qwen3", experts=6, hidden=128, intermediate=64, dtype=torch.float32, device="cpu", seed=0, scale=0.2):
    """Return an experts module of transformers with random values, as the only child of a module."""
    from transformers.models.gpt_oss import modeling_gpt_oss
    from transformers.models.nemotron_h import modeling_nemotron_h
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    fields = {"num_experts": experts, "num_local_experts": experts, "n_routed_experts": experts}
    fields |= {"hidden_size": hidden, "intermediate_size": intermediate, "moe_intermediate_size": intermediate}
    fields |= {"hidden_act": "silu", "mlp_hidden_act": "relu2", "swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    fields |= {"moe_latent_size": None, "_experts_implementation": "eager"}
    cls = {
        "qwen3": modeling_qwen3_moe.Qwen3MoeExperts,
        "gpt_oss": modeling_gpt_oss.GptOssExperts,  # transposed, with biases, gates and ups in turns
        "nemotron": modeling_nemotron_h.NemotronHExperts,  # without a gate
    }[kind]
    module = cls(SimpleNamespace(**fields))
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return nn.ModuleDict({"experts": module}).to(device, dtype).requires_grad_(False)


def in_places(weight, wanted, slots):
    """Return a packed weight of which only some experts are in memory, in no order; all else there is 0xFF."""
    state, (number, *_) = weight.state, weight.shape
    fmt = FourBit(state.quant_type, state.blocksize, bool(state.nested), torch.uint8)
    layout = cache_layout({"w": (fmt, weight.shape)}, slots)
    held = layout.views(torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8, device=weight.data.device))
    for part, tensor in QuantizedWeight(weight.data, quant_state=state).parts.items():
        if part not in ("weight", "absmax"):
            held[f"w.{part}"].copy_(tensor)
    found = dict(zip(wanted, torch.randperm(slots, generator=torch.Generator().manual_seed(2)).tolist(), strict=False))
    for expert, slot in found.items():
        held["w"][slot] = weight.data.view(number, -1)[expert]
        held["w.absmax"][slot] = weight.scales.view(number, -1)[expert]
        held["table"][expert] = slot
    return PackedExperts.cached("w", state, held, Places(found, held["table"]))


def routed(tokens, top_k, module, dtype=torch.float32, seed=1, device="cpu"):
    """Return tokens, the numbers of their experts, and the weights of these; the last expert gets no token."""
    generator = torch.Generator().manual_seed(seed)
    experts = module.quantized_experts
    x = torch.randn(tokens, experts.hidden_size, generator=generator)
    ids = [torch.randperm(experts.num_experts - 1, generator=generator)[:top_k] for _ in range(tokens)]
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.stack(ids) if ids else torch.empty(0, top_k, dtype=torch.int64)
    return x.to(device, dtype), ids.to(device), weights.to(device, dtype)


_TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16}
_MOE = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_LATENT |= {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
_LATENT |= {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}

# name: (model class, config class, fields of the config)
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _MOE | {"num_experts": 6}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _MOE | {"num_experts": 6}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _MOE | _LATENT | {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _MOE | _LATENT),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _MOE | {"n_routed_experts": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 2}),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    ),
    "hunyuan": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", {"num_experts": 6, "moe_topk": 2}),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 0},
    ),
}


def family(name, dtype=torch.float32, device="cpu", seed=0):
    """Return a small model of a family, with random weights, in eval mode."""
    import transformers

    model_class, config_class, fields = FAMILIES[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**_TEXT | fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if parameter.dim() == 3 or "bias" in path:  # some of them are not initialised
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.to(device, dtype).requires_grad_(False)
