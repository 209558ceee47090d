"""accelerate's documentation example for a minGPT model runs with only the import changed."""

import accelerate
import accelerate.utils
import bitsandbytes as bnb
import pytest
import torch
from checkpoints import save_checkpoint, stored
from comparisons import relative_error
from models import GPT
from references import dequantized_reference

import bigload


@pytest.fixture
def weights_location(tmp_path):
    return save_checkpoint(GPT(tied=False), tmp_path, shards=2)


def example(library, init_empty_weights, weights_location, **fields):
    """The documentation's own calls, by keyword, from a sharded folder, onto device_map="auto"."""
    with init_empty_weights():
        empty_model = GPT()
    bnb_quantization_config = library.BnbQuantizationConfig(**fields)
    return bigload.load_and_quantize_model(
        empty_model,
        weights_location=weights_location,
        bnb_quantization_config=bnb_quantization_config,
        device_map="auto",
    )


@pytest.mark.parametrize("library", [bigload, accelerate.utils], ids=["ours", "accelerates"])
@pytest.mark.parametrize("init", [bigload.init_empty_weights, accelerate.init_empty_weights], ids=["our", "their"])
@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_8bit": True, "llm_int8_threshold": 6},
        {
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "nf4",
        },
    ],
    ids=["int8", "nf4-dq"],
)
def test_documented_example_runs_with_the_import_changed(weights_location, library, init, fields):
    model = example(library, init, weights_location, **fields).eval()
    layer = model.transformer["h"][0].attn.c_attn
    assert isinstance(layer, bnb.nn.Linear8bitLt if "load_in_8bit" in fields else bnb.nn.Linear4bit)
    assert model.is_loaded_in_8bit == ("load_in_8bit" in fields)
    assert model.is_loaded_in_4bit == ("load_in_4bit" in fields)
    dtype = torch.float16 if "load_in_8bit" in fields else torch.bfloat16  # accelerate's defaults
    assert model.lm_head.weight.dtype == dtype

    full = GPT()
    full.load_state_dict(stored(weights_location))
    tokens = torch.randint(0, 96, (2, 12))
    mode = "int8" if "load_in_8bit" in fields else "nf4-dq"
    reference = dequantized_reference(full.eval(), mode, {"lm_head"}, dtype)(tokens)
    with torch.no_grad():
        # The whole model runs in 16 bit here; bfloat16 rounds each step to 8 bits.
        assert relative_error(model(tokens.to(layer.weight.device)), reference) < 0.02


def test_positional_arguments_stand_where_accelerate_has_them():
    import inspect

    ours = list(inspect.signature(bigload.load_and_quantize_model).parameters)
    theirs = list(inspect.signature(accelerate.utils.load_and_quantize_model).parameters)
    assert ours[: len(theirs)] == theirs
