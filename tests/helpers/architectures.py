"""Small models of many transformers families, made from configs alone.

Run as a program it writes the table of default skip sets in docs/architectures.md.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers as tf
from torch import nn

_TEXT = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
_LLAMA = _TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = _TEXT | {"num_attention_heads": 4, "max_position_embeddings": 64}
_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 32, "patch_size": 8}
_T5 = {"vocab_size": 96, "d_model": 64, "d_ff": 128, "d_kv": 32, "num_layers": 2, "num_heads": 2}
_BART = {"vocab_size": 96, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
_BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64}
_WHISPER = {k: v for k, v in _BART.items() if k != "max_position_embeddings"}
_WHISPER |= {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
_WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}

# name: (model class, config class, config fields, the heads and other modules that an explicit skip list names)
ARCHITECTURES = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, _LLAMA | {"tie_word_embeddings": False}, ["lm_head"]),
    "llama_tied": (tf.LlamaForCausalLM, tf.LlamaConfig, _LLAMA | {"tie_word_embeddings": True}, ["lm_head"]),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, _LLAMA, ["lm_head"]),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, _LLAMA, ["lm_head"]),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, _LLAMA | {"head_dim": 16}, ["lm_head"]),
    "gemma2": (tf.Gemma2ForCausalLM, tf.Gemma2Config, _LLAMA | {"head_dim": 16}, ["lm_head"]),
    "phi3": (tf.Phi3ForCausalLM, tf.Phi3Config, _LLAMA | {"pad_token_id": 0}, ["lm_head"]),
    "gpt2": (
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {"vocab_size": 96, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4},
        ["lm_head"],
    ),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, _BERT, ["embed_out", "lm_head"]),
    "bloom": (
        tf.BloomForCausalLM,
        tf.BloomConfig,
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        ["lm_head"],
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        _BERT | {"ffn_dim": 128, "word_embed_proj_dim": 64},
        ["lm_head"],
    ),
    "falcon": (
        tf.FalconForCausalLM,
        tf.FalconConfig,
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        ["lm_head"],
    ),
    "mixtral": (
        tf.MixtralForCausalLM,
        tf.MixtralConfig,
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
        ["lm_head", "experts"],
    ),
    "qwen3_moe": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig, _LLAMA | _MOE, ["lm_head", "experts"]),
    "t5": (tf.T5ForConditionalGeneration, tf.T5Config, _T5, ["lm_head"]),
    "bart": (tf.BartForConditionalGeneration, tf.BartConfig, _BART, ["lm_head"]),
    "bert": (tf.BertModel, tf.BertConfig, _BERT, ["pooler"]),
    "roberta_classifier": (
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig,
        _BERT | {"num_labels": 3},
        ["classifier"],
    ),
    "vit": (tf.ViTForImageClassification, tf.ViTConfig, _VISION | {"num_labels": 3}, ["classifier"]),
    "clip_vision": (tf.CLIPVisionModel, tf.CLIPVisionConfig, _VISION, ["nothing_here"]),
    "whisper": (tf.WhisperForConditionalGeneration, tf.WhisperConfig, _WHISPER, ["proj_out"]),
    # Makes a table of positions in the dtype it is built in.
    "m2m_100": (tf.M2M100ForConditionalGeneration, tf.M2M100Config, _BART, ["lm_head"]),
    "mamba": (
        tf.MambaForCausalLM,
        tf.MambaConfig,
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        ["lm_head", "dt_proj", "x_proj", "out_proj"],
    ),
}


# The module and name of the subclass of nn.Linear that a family is made of.
SUBCLASSES = {"falcon": ("transformers.models.falcon.modeling_falcon", "FalconLinear")}


@contextmanager
def plain_linears(name: str) -> Iterator[None]:
    """Have a family made of nn.Linear, which is all that transformers quantizes in its newer versions."""
    module, attribute = SUBCLASSES.get(name, (None, None))
    if module is None:
        yield
        return
    room = importlib.import_module(module)
    own = getattr(room, attribute)
    setattr(room, attribute, nn.Linear)
    try:
        yield
    finally:
        setattr(room, attribute, own)


def build(name: str):
    """A model with random weights, in eval mode."""
    model_class, config_class, fields, _ = ARCHITECTURES[name]
    return model_class(config_class(**fields)).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Something the model can be run on."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (2, 10), generator=generator)
    if name in ("vit", "clip_vision"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": tokens}
    if name in ("t5", "bart", "m2m_100"):
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
_INTRODUCTION = """# What is quantized by default, family by family

If you pass the same list of modules to skip, bigload and transformers' own loader make the same bits for each of these
families (`tests/interop/test_architectures.py`). Without a list, each library follows its own rules. The table shows
the layers that only one of them quantizes. It is made by `python tests/helpers/architectures.py`.

Falcon is made of `FalconLinear`, a subclass of `nn.Linear` with the same arithmetic. bigload quantizes such subclasses,
as accelerate does and transformers 5.0 did. transformers from 5.17 on leaves them in 16 bit. The bits are those that
transformers makes if the model is built of `nn.Linear`.

| family | model | quantized by bigload only | by transformers only |
|---|---|---|---|
"""


def document() -> str:
    """The page that compares the two libraries' default skip sets, as text."""
    rows = []
    for name, (model_class, config_class, fields, _) in ARCHITECTURES.items():
        ours, theirs = _ours(model_class, config_class(**fields)), _theirs(model_class, config_class(**fields))
        cells = [
            ", ".join(f"`{path}`" for path in sorted(_shortened(only))) or "-"
            for only in (ours - theirs, theirs - ours)
        ]
        rows.append(f"| {name} | {model_class.__name__} | {cells[0]} | {cells[1]} |\n")
    return _INTRODUCTION + "".join(rows)


def _shortened(paths: set[str]) -> set[str]:
    return {".".join("N" if part.isdigit() else part for part in path.split(".")) for path in paths}


def _ours(model_class, config) -> set[str]:
    from bigload import BnbQuantizationConfig, init_empty_weights
    from bigload.model.quantizable import layers_to_quantize
    from bigload.model.tensors import tensors_of

    with init_empty_weights():
        model = model_class(config)
    quantization = BnbQuantizationConfig.from_mode("nf4").resolved(torch.bfloat16)
    return set(layers_to_quantize(model, quantization, tensors_of(model)))


def _theirs(model_class, config) -> set[str]:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    with torch.device("meta"):
        model = model_class(config)
    quantizer = Bnb4BitHfQuantizer(tf.BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=torch.bfloat16, device_map={"": "cpu"})
    return {path for path, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


if __name__ == "__main__":
    DOCUMENT.write_text(document())
