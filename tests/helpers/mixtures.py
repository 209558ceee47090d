"""Small mixtures of experts of many transformers families, whose fused experts are quantized to 4 bit."""

import torch
import transformers as tf

from bigload.quantization.layers import quantized_layers
from bigload.quantization.saved_experts import quantized_experts

_TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_ROUTED = {"moe_intermediate_size": 64, "num_experts_per_tok": 2, "head_dim": 16}
_DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 1}
_DEEPSEEK |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}

# name: (model class, config class, config fields)
MIXTURES = {
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": (tf.PhimoeForCausalLM, tf.PhimoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "qwen3_moe": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, _ROUTED | {"num_experts": 4}),
    "deepseek_v2": (
        tf.DeepseekV2ForCausalLM,
        tf.DeepseekV2Config,
        _DEEPSEEK | _LATENT | {"num_key_value_heads": 4, "head_dim": 16},
    ),
    "deepseek_v3": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        _DEEPSEEK | _LATENT | {"num_key_value_heads": 4},
    ),
    "glm4_moe": (tf.Glm4MoeForCausalLM, tf.Glm4MoeConfig, _DEEPSEEK | {"head_dim": 16}),
    "olmoe": (tf.OlmoeForCausalLM, tf.OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite_moe": (
        tf.GraniteMoeForCausalLM,
        tf.GraniteMoeConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "llama4": (
        tf.Llama4ForCausalLM,
        tf.Llama4TextConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 128},
    ),
    "ernie": (
        tf.Ernie4_5_MoeForCausalLM,
        tf.Ernie4_5_MoeConfig,
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_layer_start_index": 0},
    ),
    "hunyuan": (
        tf.HunYuanMoEV1ForCausalLM,
        tf.HunYuanMoEV1Config,
        {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    ),
}
TOKENS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def config(name: str, **fields):
    """The config of a family."""
    _, config_class, own = MIXTURES[name]
    return config_class(**(_TEXT | own | fields))


def mixture(name: str, **fields):
    """A model with random weights, in eval mode, in bfloat16."""
    torch.manual_seed(0)
    model = MIXTURES[name][0](config(name, **fields)).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "experts" in path:  # some classes leave them as they were allocated
                parameter.normal_(std=0.05)
    return model.bfloat16()


def weights_of_experts(model):
    """Name -> the 4-bit parameter, of all quantized experts of a model."""
    return {
        f"{path}.{name}": module._parameters[name]
        for path, module in quantized_experts(model).items()
        for name in module.quantized_experts.weights
    }


def unpacked(model):
    """Let the Linears compute in float32, where bitsandbytes has a kernel in bfloat16 for CPUs: not in train mode."""
    for layer in quantized_layers(model).values():
        layer.train()
    return model
