"""What `save_quantized_model` writes of a model of transformers is read by its own loader and by ours, bit for bit."""

import json

import pytest
import torch
import transformers
from architectures import build, inputs, plain_linears
from checkpoints import contents, empty_like, save_checkpoint
from comparisons import assert_same_bits, outputs
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    ConfigError,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    quantize_checkpoint,
    save_quantized_model,
)
from bigload.model import transformers_facts
from bigload.quantization.layers import quantized_layers

MODES = ("nf4", "nf4-dq", "fp4", "int8")
ARCHITECTURES = ("llama", "llama_tied", "gpt2", "t5", "bert", "mixtral", "falcon")


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def loaded(name, mode, folder, **fields):
    torch.manual_seed(0)
    full = build(name).eval()
    save_checkpoint(full, folder)
    return load_and_quantize_model(
        empty_like(full), BnbQuantizationConfig.from_mode(mode, **fields), folder, device_map="cpu"
    ).eval(), full


def test_bigload_and_transformers_both_read_it(tmp_path, name, mode):
    """Saved before it ran and after it, the files are the same, so one reading shows both.

    transformers reads no experts in 4 bit, which are therefore left out.
    """
    skipped = {"skip_modules": ["experts", "lm_head"]} if name == "mixtral" else {}
    model, full = loaded(name, mode, tmp_path / "source", **skipped)
    save_quantized_model(model, tmp_path / "fresh", "50KB")
    outputs(model, **inputs(name))  # on a CPU with AVX512-BF16 bitsandbytes' own layers would be packed now
    save_quantized_model(model, tmp_path / "saved", "50KB")
    assert contents(tmp_path / "saved") == contents(tmp_path / "fresh")
    with plain_linears(name):
        theirs = type(full).from_pretrained(tmp_path / "saved", device_map="cpu").eval()
    ours = load_and_quantize_model(empty_like(full), None, tmp_path / "saved", device_map="cpu", strict=True).eval()
    expected = model.state_dict()
    assert_same_bits(ours.state_dict(), expected)
    assert_same_bits(theirs.state_dict(), expected)
    assert quantized_layers(theirs).keys() == quantized_layers(model).keys() == quantized_layers(ours).keys()
    assert torch.equal(outputs(ours, **inputs(name)), outputs(model, **inputs(name)))
    assert torch.equal(outputs(theirs, **inputs(name)), outputs(model, **inputs(name)))


def test_saving_warns_of_layers_that_transformers_does_not_make(tmp_path, warned):
    model, full = loaded("falcon", "nf4", tmp_path / "source")
    save_quantized_model(model, tmp_path / "saved")
    quantize_checkpoint(tmp_path / "source", tmp_path / "converted", "nf4", model=empty_like(full))
    assert len(warned()) == 2
    assert all("FalconForCausalLM" in message and "'FalconLinear'" in message for message in warned())
    with pytest.raises(RuntimeError):
        type(full).from_pretrained(tmp_path / "saved", device_map="cpu")
    for folder in ("saved", "converted"):  # the remedy
        again = load_and_quantize_model(empty_like(full), None, tmp_path / folder, device_map="cpu")
        assert_same_bits(again.state_dict(), model.state_dict())


def test_saving_says_nothing_where_transformers_makes_all_layers(tmp_path, warned):
    for name in ("llama", "gpt2"):
        model, _ = loaded(name, "nf4", tmp_path / name)
        save_quantized_model(model, tmp_path / f"{name}_saved")
    assert not warned()


class Suffixes(nn.Module):
    """Two layers that are skipped, whose names the names of others begin or end with."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 64)
        self.sub_proj = nn.Linear(64, 64)
        self.proj_up = nn.Linear(64, 64)

    def forward(self, x):
        return self.proj_up(self.sub_proj(self.proj(x)))


class SuffixesConfig(transformers.PretrainedConfig):
    model_type = "suffixes"


class SuffixesModel(transformers.PreTrainedModel):
    config_class = SuffixesConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = Suffixes()
        self.post_init()

    def forward(self, x):
        return self.body(x)


def test_skipped_layer_whose_name_is_part_of_others_names(tmp_path, mode):
    torch.manual_seed(0)
    full = SuffixesModel(SuffixesConfig()).eval()
    save_checkpoint(full, tmp_path / "source")
    config = BnbQuantizationConfig.from_mode(mode, skip_modules=["body.proj"])
    model = load_and_quantize_model(empty_like(full), config, tmp_path / "source", device_map="cpu").eval()
    assert quantized_layers(model).keys() == {"body.sub_proj", "body.proj_up"}
    save_quantized_model(model, tmp_path / "saved")
    theirs = SuffixesModel.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert quantized_layers(theirs).keys() == quantized_layers(model).keys()
    assert_same_bits(theirs.state_dict(), model.state_dict())


def test_config_of_the_model_in_memory_is_left_alone(tmp_path):
    model, _ = loaded("llama", "nf4", tmp_path / "source")
    before = model.config.to_dict()
    save_quantized_model(model, tmp_path / "saved")
    assert model.config.to_dict() == before
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["quantization_config"]["quant_method"] == "bitsandbytes"
    assert written["quantization_config"]["llm_int8_skip_modules"] == ["lm_head"]
    assert (tmp_path / "saved" / "generation_config.json").is_file()


def test_head_that_is_untied_in_a_model_that_ties_is_refused(tmp_path):
    """It would be tied again when it is loaded."""
    model, _ = loaded("llama_tied", "nf4", tmp_path / "source")
    model.lm_head.weight = nn.Parameter(torch.randn(96, 64), requires_grad=False)
    with pytest.raises(QuantizationError, match="tie_word_embeddings to False"):
        save_quantized_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.config.tie_word_embeddings = False  # the remedy
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(transformers_facts.empty_model(tmp_path / "saved"), None, tmp_path / "saved")
    assert torch.equal(again.lm_head.weight.cpu(), model.lm_head.weight.cpu())
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def test_generation_config_that_transformers_refuses_is_an_error_of_ours(tmp_path):
    model, _ = loaded("llama", "nf4", tmp_path / "source")
    model.generation_config.temperature = 0.5
    with pytest.raises(ConfigError, match="temperature"):
        save_quantized_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_model_that_transformers_quantized_is_saved_and_comes_back(tmp_path, name, mode):
    torch.manual_seed(0)
    full = build(name).eval()
    full.save_pretrained(tmp_path / "source")
    config = BnbQuantizationConfig.from_mode(mode, bnb_4bit_compute_dtype="fp32").to_transformers()
    with plain_linears(name):
        theirs = type(full).from_pretrained(tmp_path / "source", quantization_config=config, device_map="cpu")
    save_quantized_model(theirs, tmp_path / "saved")
    ours = load_and_quantize_model(empty_like(full), None, tmp_path / "saved", device_map="cpu")
    assert_same_bits(ours.state_dict(), theirs.state_dict())


def test_dequantized_model_is_one_of_transformers_again(tmp_path, name, mode):
    """Its weights are those that the quantized layers compute with; saved by the library, it is loaded by it."""
    model, full = loaded(name, mode, tmp_path / "source")
    quantized = outputs(model, **inputs(name))
    plain = dequantize_model(model)
    assert plain is model
    assert not quantized_layers(plain)
    assert plain.state_dict().keys() == full.state_dict().keys()
    assert [tuple(t.shape) for t in plain.state_dict().values()] == [tuple(t.shape) for t in full.state_dict().values()]
    # int8 multiplies rounded activations too; the 4-bit kernel of CPUs with AVX512-BF16 computes in bfloat16.
    error = (outputs(plain, **inputs(name)) - quantized).norm() / quantized.norm()
    assert error < (0.03 if mode == "int8" else 0.01)
    assert not getattr(plain, "is_quantized", False)
    assert not hasattr(plain.config, "quantization_config")
    plain.save_pretrained(tmp_path / "plain")
    again = type(full).from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(outputs(again, **inputs(name)), outputs(plain, **inputs(name)))
