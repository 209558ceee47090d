"""transformers' own classes: the same bits as its own loader makes, and the facts its classes state."""

from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import assert_same_bits, relative_error
from models import llama
from references import dequantized_reference
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DebertaConfig,
    DebertaModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.model.transformers_facts import empty_model
from bigload.model.twins import class_dtypes

MODES = ("nf4", "nf4-dq", "fp4", "int8")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_llama_computes_what_its_dequantized_reference_computes(tmp_path, device, mode, tied, shards):
    full = llama(tied).eval()
    save_checkpoint(full, tmp_path, shards)
    model = load_and_quantize_model(empty(llama, tied).eval(), mode, tmp_path, device_map=device)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokens = torch.randint(0, 128, (2, 12))
    reference = dequantized_reference(full, mode, {"lm_head"}, torch.float32)(tokens).logits
    with torch.no_grad():
        # As in test_loading: bfloat16 multiplication or int8 activations, a few layers deep.
        assert relative_error(model(tokens.to(device)).logits, reference) < 0.01
    if mode != "int8":
        assert relative_error(full(tokens).logits, reference) > 0.03


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_state_equals_that_of_transformers_own_loader(tmp_path, device, mode, tied):
    llama(tied).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    # transformers has no "auto" compute dtype, so it is said.
    config = BnbQuantizationConfig.from_mode(mode, skip_modules=["lm_head"], bnb_4bit_compute_dtype="bf16")
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config.to_transformers(), device_map={"": device}, dtype=torch.bfloat16
    )
    model = load_and_quantize_model(empty_model(tmp_path), config, tmp_path, device_map=device)
    assert_same_bits(model.state_dict(), expected.state_dict())
    tokens = torch.randint(0, 128, (1, 8), device=device)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)


def test_untied_by_accelerates_own_init_is_tied_by_the_class(tmp_path):
    import accelerate

    save_checkpoint(llama(True), tmp_path)
    with accelerate.init_empty_weights():
        model = llama(True)
    model = load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_gpt2_conv1d_layers_are_quantized_as_linears(tmp_path, device, mode):
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    full = GPT2LMHeadModel(config).eval()
    save_checkpoint(full, tmp_path)
    model = load_and_quantize_model(empty(GPT2LMHeadModel, config).eval(), mode, tmp_path, device_map=device)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    assert (layer.in_features, layer.out_features) == (64, 192)
    tokens = torch.randint(0, 96, (1, 9))
    with torch.no_grad():
        found, expected = model(tokens.to(device)).logits, full(tokens).logits
    # Random weights lose this much to 4 bit; a weight read the wrong way round would lose everything.
    assert relative_error(found, expected) < (0.25 if mode == "nf4" else 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_t5_wo_is_never_quantized_and_keeps_the_librarys_dtype(tmp_path, dtype):
    config = T5Config(vocab_size=96, d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2)
    save_checkpoint(T5ForConditionalGeneration(config), tmp_path)
    model = load_and_quantize_model(
        empty(T5ForConditionalGeneration, config).eval(),
        BnbQuantizationConfig.from_mode("nf4", torch_dtype=dtype),
        tmp_path,
        device_map="cpu",
    )
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert type(feed_forward.wo) is nn.Linear
    assert feed_forward.wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert isinstance(feed_forward.wi, bnb.nn.Linear4bit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_a_class_makes_in_fp32_stays_so_as_in_transformers_own_loader(tmp_path, dtype):
    """DeBERTa's relative positions have biases in fp32 whatever it is built in."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = DebertaConfig(num_attention_heads=4, relative_attention=True, pos_att_type=["c2p"], **sizes)
    DebertaModel(config).save_pretrained(tmp_path)
    quantization = BnbQuantizationConfig.from_mode("int8", skip_modules=["in_proj"], torch_dtype=dtype)
    model = load_and_quantize_model(empty_model(tmp_path), quantization, tmp_path, device_map="cpu")
    expected = DebertaModel.from_pretrained(
        tmp_path, quantization_config=quantization.to_transformers(), device_map={"": "cpu"}, dtype=dtype
    )
    found = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert found == {name: tensor.dtype for name, tensor in expected.state_dict().items()}
    assert {torch.float32, dtype} < set(found.values())


def test_loads_of_other_dtypes_at_once_in_threads_do_not_change_each_others_bits(tmp_path):
    """Telling a class's dtypes takes torch's default dtype, which all threads share."""
    llama(False).save_pretrained(tmp_path)

    def load(model, dtype):
        config = BnbQuantizationConfig.from_mode("nf4", torch_dtype=dtype)
        return load_and_quantize_model(model, config, tmp_path, device_map="cpu").state_dict()

    dtypes = [torch.bfloat16, torch.float32, torch.float16] * 4
    # Built here: transformers swaps torch.nn.init's functions meanwhile, and two threads at it leave them swapped.
    models = [empty(llama, False).eval() for _ in dtypes]
    expected = {dtype: load(empty(llama, False).eval(), dtype) for dtype in set(dtypes)}
    with ThreadPoolExecutor(4) as pool:
        states = list(pool.map(load, models, dtypes))
    for dtype, state in zip(dtypes, states, strict=True):
        for name, tensor in state.items():
            assert tensor.dtype == expected[dtype][name].dtype, name
            assert torch.equal(tensor, expected[dtype][name]), name


def test_empty_model_has_no_weights_but_its_buffers(tmp_path):
    llama(True).save_pretrained(tmp_path)
    model = empty_model(tmp_path)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == model.config.vocab_size


def test_generation_of_a_loaded_llama_equals_that_of_transformers_own(tmp_path, device):
    llama(False).save_pretrained(tmp_path)
    skip = ["lm_head"]
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization, device_map={"": device}, dtype=torch.float32
    )
    model = load_and_quantize_model(empty_model(tmp_path), quantization, tmp_path, device_map=device)
    tokens = torch.randint(0, 128, (1, 5), device=device)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(tokens, **options), expected.generate(tokens, **options))


def test_config_that_json_cannot_hold_does_not_matter(tmp_path):
    full = llama(False)
    save_checkpoint(full, tmp_path)
    model = empty(llama, False)
    model.config.note = object()
    load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


def test_dtypes_of_a_class_are_asked_again_when_its_config_has_changed():
    model = llama(False)
    before = class_dtypes(model, torch.bfloat16)
    assert class_dtypes(model, torch.bfloat16) == before
    assert set(class_dtypes(model, torch.float32).values()) == {torch.float32}
    model.config.num_hidden_layers = 1
    assert len(class_dtypes(model, torch.bfloat16)) < len(before)
