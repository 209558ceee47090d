"""What transformers quantized and saved is loaded as transformers itself reloads it, and trains and saves like that."""

import copy
import json

import pytest
import torch
from checkpoints import empty, empty_like
from comparisons import assert_same_bits, equal, outputs, state_of
from models import llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bigload import load_and_quantize_model

peft = pytest.importorskip("peft")

CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4 in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
_LLAMA = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
_T5 = {"vocab_size": 128, "d_model": 64, "d_ff": 128, "d_kv": 32, "num_layers": 1, "num_heads": 2}
BUILDS = {
    "llama": lambda: llama(False),
    "llama_tied": lambda: llama(True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=32, n_embd=64, n_layer=2, n_head=4)),
    # Its experts are plain parameters, stored one by one and merged, among attention that is quantized.
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_LLAMA, num_local_experts=2, num_experts_per_tok=2)),
    # Keeps `wo` plain, and in float32 under float16.
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
}


@pytest.fixture(params=CONFIGS)
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def saved_by_transformers(tmp_path_factory):
    """Quantizes and saves a model by transformers alone, each once. Returns the full model and the folder."""
    made = {}

    def save(name, mode, device, dtype=torch.bfloat16, shards="5GB", **fields):
        key = (name, mode, device, dtype, shards, str(fields))
        if key not in made:
            torch.manual_seed(0)
            full, folder = BUILDS[name]().to(dtype), tmp_path_factory.mktemp("saved")
            full.save_pretrained(folder / "full")
            quantization = BitsAndBytesConfig(**CONFIGS[mode], **({"bnb_4bit_compute_dtype": dtype} | fields))
            options = {"quantization_config": quantization, "device_map": {"": device}, "dtype": dtype}
            theirs = type(full).from_pretrained(folder / "full", **options)
            theirs.save_pretrained(folder / "quantized", max_shard_size=shards)
            made[key] = (full, folder / "quantized")
        return made[key]

    return save


def reloaded(full, folder, device):
    return type(full).from_pretrained(folder, device_map={"": device}).eval()


def loaded(full, folder, device, config=None, **options):
    return load_and_quantize_model(empty_like(full), config, folder, device_map=device, strict=True, **options)


def logits(model):
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1)).to(model.device)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    return outputs(model, **inputs)


def assert_is_as_reloaded(full, folder, device):
    theirs, ours = reloaded(full, folder, device), loaded(full, folder, device)
    assert_same_bits(state_of(ours), state_of(theirs))
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
    assert any(type(module).__module__.startswith("bitsandbytes") for module in ours.modules())
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", BUILDS)
def test_bits_and_logits_equal_transformers_own_reload(saved_by_transformers, device, name, mode):
    assert_is_as_reloaded(*saved_by_transformers(name, mode, device), device)


def test_plain_weights_keep_their_dtypes_where_more_bytes_are_kept_in_float32(saved_by_transformers, device, mode):
    """transformers keeps T5's `wo` in float32 under float16, which is most of the bytes of the file."""
    full, folder = saved_by_transformers("t5", mode, device, torch.float16)
    stored = load_file(folder / "model.safetensors")
    assert stored["encoder.block.0.layer.1.DenseReluDense.wo.weight"].dtype == torch.float32
    assert stored["shared.weight"].dtype == torch.float16
    assert_is_as_reloaded(full, folder, device)


def test_compute_dtype_and_threshold_are_those_that_transformers_saved(saved_by_transformers, device, mode):
    fields = {"bnb_4bit_compute_dtype": torch.float16, "llm_int8_threshold": 2.5}
    full, folder = saved_by_transformers("llama", mode, device, **fields)
    layer = loaded(full, folder, device).model.layers[0].mlp.up_proj
    if mode == "int8":
        assert layer.state.threshold == 2.5
    else:
        assert layer.compute_dtype == torch.float16


def test_weights_quantized_without_a_compute_dtype_compute_as_in_transformers(saved_by_transformers, device):
    full, folder = saved_by_transformers("llama", "nf4", device, bnb_4bit_compute_dtype=None)
    path = "model.layers.0.mlp.up_proj"
    theirs, ours = reloaded(full, folder, device), loaded(full, folder, device)
    assert ours.get_submodule(path).compute_dtype == theirs.get_submodule(path).compute_dtype == torch.float32


def test_modules_that_were_skipped_stay_plain_in_their_dtype(saved_by_transformers, device, mode):
    skipped = ["lm_head", "k_proj", "model.layers.1"]
    full, folder = saved_by_transformers("llama", mode, device, llm_int8_skip_modules=skipped)
    model = loaded(full, folder, device)
    linears = {path for path, module in full.named_modules() if type(module) is nn.Linear}
    plain = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {path for path in linears if path.endswith(("lm_head", "k_proj")) or "layers.1." in path}
    assert {model.get_submodule(path).weight.dtype for path in plain} == {torch.bfloat16}


def test_conv1d_weights_are_those_stored_transposed_under_their_usual_names(saved_by_transformers, device, mode):
    full, folder = saved_by_transformers("gpt2", mode, device)
    name = "transformer.h.0.mlp.c_fc"
    layer, stored = loaded(full, folder, device).get_submodule(name), load_file(folder / "model.safetensors")
    assert tuple(full.get_submodule(name).weight.shape) == (64, 256)
    assert (layer.out_features, layer.in_features) == (256, 64)
    assert equal(layer.weight.data.cpu(), stored[f"{name}.weight"])
    shape = layer.weight.shape if mode == "int8" else layer.weight.quant_state.shape
    assert tuple(shape) == (256, 64)


def test_base_model_takes_the_weights_of_one_with_a_head(saved_by_transformers, device, mode):
    full, folder = saved_by_transformers("llama", mode, device)
    model = empty(LlamaModel, copy.deepcopy(full.config))
    model = load_and_quantize_model(model, None, folder, device_map=device)
    assert_same_bits(state_of(model), state_of(LlamaModel.from_pretrained(folder, device_map={"": device})))


def test_shards_of_transformers_are_loaded_as_it_reloads_them(saved_by_transformers, device, mode):
    full, folder = saved_by_transformers("llama", mode, device, shards="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_is_as_reloaded(full, folder, device)


def test_key_mapping_renames_what_transformers_saved(saved_by_transformers, tmp_path, device, mode):
    full, folder = saved_by_transformers("llama", mode, device)
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.layers", "old.blocks"): tensor for name, tensor in state.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    mapping = {r"^old\.blocks": "model.layers"}
    model = loaded(full, tmp_path / "renamed.safetensors", device, key_mapping=mapping)
    assert_same_bits(state_of(model), state_of(reloaded(full, folder, device)))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_saved_again_it_comes_back_with_the_same_bits_and_logits(saved_by_transformers, tmp_path, device, name, mode):
    full, folder = saved_by_transformers(name, mode, device)
    ours = loaded(full, folder, device)
    before = state_of(ours)
    expected = logits(ours)
    ours.save_pretrained(tmp_path)
    again = reloaded(full, tmp_path, device)
    assert_same_bits(state_of(again), before)
    assert torch.equal(logits(again), expected)
    assert_same_bits(state_of(loaded(full, tmp_path, device)), before)


def test_saved_config_says_what_transformers_own_says(saved_by_transformers, tmp_path, device, mode):
    full, folder = saved_by_transformers("llama", mode, device)
    loaded(full, folder, device).save_pretrained(tmp_path)
    theirs, ours = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path))
    used = {"quant_method", "load_in_4bit", "load_in_8bit"}
    used |= (
        {"llm_int8_threshold"} if mode == "int8" else {key for key in theirs["quantization_config"] if "4bit" in key}
    )
    assert len(used) > 3
    said = ours["quantization_config"]
    assert {key: said[key] for key in used} == {key: theirs["quantization_config"][key] for key in used}
    assert said["llm_int8_skip_modules"] == ["lm_head"]
    assert ours["dtype"] == theirs["dtype"] == "bfloat16"


def test_model_says_of_itself_what_transformers_own_does(saved_by_transformers, device, mode):
    full, folder = saved_by_transformers("llama", mode, device)
    theirs, ours = reloaded(full, folder, device), loaded(full, folder, device)
    assert ours.is_quantized is theirs.is_quantized is True
    assert ours.quantization_method == theirs.quantization_method
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert (ours.is_loaded_in_4bit, ours.is_loaded_in_8bit) == (mode != "int8", mode == "int8")


def trained(model):
    """Train LoRA adapters for three steps. Returns the losses."""
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(3)).to(model.device)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(input_ids=tokens).logits.float().flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_lora_trains_on_it_as_on_transformers_own_and_changes_nothing_else(saved_by_transformers, device, mode):
    full, folder = saved_by_transformers("llama", mode, device)
    ours = loaded(full, folder, device)
    before = state_of(ours)
    losses = trained(ours)
    assert losses[2] < losses[1] < losses[0]
    after = {name.replace("base_layer.", ""): tensor for name, tensor in state_of(ours).items()}
    adapters = {name: tensor for name, tensor in after.items() if "lora_" in name}
    assert sum("lora_B" in name and bool(tensor.any()) for name, tensor in adapters.items()) == 4
    assert_same_bits({name: tensor for name, tensor in after.items() if name not in adapters}, before)
    assert losses == pytest.approx(trained(reloaded(full, folder, device)), rel=1e-3)
