"""Twenty-three families of transformers: the same bits and logits as its own loader's, from shards of 200 KB."""

import architectures
import pytest
import torch
from comparisons import assert_same_bits, outputs
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.model.transformers_facts import empty_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One checkpoint of each family, written when it is first asked for."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            architectures.build(name).save_pretrained(folders[name], max_shard_size="200KB")
        return folders[name]

    return folder_of


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_state_and_output_equal_those_of_transformers_own_loader(saved, device, name, mode):
    model_class, _, _, skip = architectures.ARCHITECTURES[name]
    folder = saved(name)
    config = BnbQuantizationConfig.from_mode(mode, skip_modules=skip, bnb_4bit_compute_dtype="fp32")
    ours = load_and_quantize_model(empty_model(folder), config, folder, device_map=device)
    with architectures.plain_linears(name):
        theirs = model_class.from_pretrained(
            folder, quantization_config=config.to_transformers(), device_map={"": device}, dtype=torch.float32
        )
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    assert {name: b.dtype for name, b in ours.named_buffers()} == {n: b.dtype for n, b in theirs.named_buffers()}
    inputs = {key: tensor.to(device) for key, tensor in architectures.inputs(name).items()}
    assert torch.equal(outputs(ours, **inputs), outputs(theirs, **inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_dtypes_of_a_16_bit_load_are_those_of_transformers_own_loader(saved, name, dtype):
    model_class, _, _, skip = architectures.ARCHITECTURES[name]
    folder = saved(name)
    config = BnbQuantizationConfig.from_mode("int8", skip_modules=skip, torch_dtype=dtype)
    ours = load_and_quantize_model(empty_model(folder), config, folder, device_map="cpu")
    with architectures.plain_linears(name):
        theirs = model_class.from_pretrained(
            folder, quantization_config=config.to_transformers(), device_map={"": "cpu"}, dtype=dtype
        )
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    buffers = dict(theirs.named_buffers())
    for key, buffer in ours.named_buffers():
        assert buffer.dtype == buffers[key].dtype, key
        assert torch.equal(buffer, buffers[key]), key
    # The dtypes fit together: inputs in the model's own, as a user gives them.
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in architectures.inputs(name).items()
    }
    assert outputs(ours, **inputs).isfinite().all()


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_model_built_on_meta_gets_its_buffers_back(saved, name):
    model_class, config_class, fields, _ = architectures.ARCHITECTURES[name]
    folder = saved(name)
    with torch.device("meta"):
        model = model_class(config_class(**fields)).eval()
    model = load_and_quantize_model(model, "int8", folder, device_map="cpu")
    usual = load_and_quantize_model(empty_model(folder), "int8", folder, device_map="cpu")
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    inputs = architectures.inputs(name)
    assert torch.equal(outputs(model, **inputs), outputs(usual, **inputs))


def test_every_layer_of_a_familys_own_subclass_of_linear_is_quantized(saved):
    for name in architectures.SUBCLASSES:
        model = load_and_quantize_model(empty_model(saved(name)), "nf4", saved(name), device_map="cpu")
        left = [path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.is_floating_point()]
        assert left == ["lm_head"]


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_gradients_pass_through_a_falcon(saved, device, mode):
    """Its blocks add in place to what a layer gives, which must be no view of what bitsandbytes computed."""
    model = load_and_quantize_model(empty_model(saved("falcon")), mode, saved("falcon"), device_map=device)
    embedding = model.get_input_embeddings().weight.requires_grad_()
    inputs = {name: tensor.to(device) for name, tensor in architectures.inputs("falcon").items()}
    model(**inputs).logits.float().square().mean().backward()
    assert embedding.grad.isfinite().all()
    assert embedding.grad.any()


def test_table_of_the_default_skip_sets_in_the_docs_is_the_one_made_here():
    path = architectures.DOCUMENT
    assert path.read_text() == architectures.document(), "run: python tests/helpers/architectures.py"
