"""What the errors of this wing ask for is done, and the model runs on. tests/test_remedies.py lists them."""

import copy
import os

import pytest
import torch
from checkpoints import empty, save_checkpoint
from models import TOKENS, Net, llama
from torch import nn
from torch.nn.utils import prune

from bigload import ConfigError, dequantize_model, load_and_quantize_model
from bigload.errors import OffloadError, QuantizationError
from bigload.offload import weight_cache
from bigload.offload.leaves import Leaf, streamed_tensors_of
from bigload.quantization.bnb import library

PLAIN = {"load_in_4bit": True, "skip_modules": ["*"], "torch_dtype": "fp32"}


class Tower(Net):
    def __init__(self):
        super().__init__(
            blocks=nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(3)), norm=nn.LayerNorm(64)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.norm(x)


@pytest.fixture
def stored(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(Tower(), tmp_path / "stored")


@pytest.fixture
def loaded(stored, tmp_path, device, small_parts_stream):
    """Return a function that loads the model, with its blocks off the device or, if `away` is None, on it."""

    def load(config="nf4", away="disk", model=None, folder="off", **fields):
        device_map = {"": device} if away is None else {"": device, "blocks": away}
        model = empty(Tower) if model is None else model
        options = {"device_map": device_map, "offload_folder": tmp_path / folder, **fields}
        return load_and_quantize_model(model, config, stored, **options).eval()

    return load


@pytest.fixture
def x(device):
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(device)


def test_state_dict_is_loaded_into_weights_that_were_in_files(loaded, x):
    model, wanted = loaded(PLAIN), Tower().to(x.device)
    with pytest.raises(OffloadError, match=r"call model\.offload\.remove\(\) first, then load the state_dict"):
        model.load_state_dict(wanted.state_dict())
    model.offload.remove()
    model.load_state_dict(wanted.state_dict())
    assert torch.equal(model(x), wanted(x))


@torch.no_grad()
def test_weight_on_meta_is_given_values(loaded, x):
    model = loaded(PLAIN)
    weight = model.blocks[1][0].weight
    kept = copy.deepcopy(model.blocks[1][0]).weight
    model(x)
    model.blocks[1][0].weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    with pytest.raises(OffloadError, match="has been put on meta since: give it values"):
        model(x)
    model.blocks[1][0].weight = kept
    assert torch.equal(model(x), loaded(PLAIN, away=None)(x))


@pytest.mark.parametrize("how", ["changed", "truncated"])
@torch.no_grad()
def test_model_whose_files_changed_is_loaded_again(how, loaded, x, stored):
    model, file = loaded(PLAIN), stored / "model.safetensors"
    content = file.read_bytes()
    if how == "changed":
        (stored / "new").write_bytes(content)
        (stored / "new").replace(file)
    else:
        os.truncate(file, len(content) // 4)
    with pytest.raises(OffloadError, match="since the model was loaded; load the model again"):
        model(x)
    file.write_bytes(content)
    assert torch.equal(loaded(PLAIN)(x), loaded(PLAIN, away=None)(x))


@pytest.mark.parametrize("remedy", ["freeze it", "keep it on the device"])
def test_weight_that_would_be_trained_is_frozen_or_kept(remedy, loaded, x):
    model = loaded(PLAIN).requires_grad_()
    with pytest.raises(OffloadError, match=r"freeze it \(weight\.requires_grad_\(False\)\) or keep it on the device"):
        model(x).sum().backward()
    if remedy == "freeze it":
        for block in model.blocks:
            block[0].weight.requires_grad_(False)
    else:
        model = loaded(PLAIN, away=None).requires_grad_()
    model(x).square().sum().backward()
    assert model.norm.weight.grad.abs().sum() > 0
    assert (model.blocks[0][0].weight.grad is None) == (remedy == "freeze it")


def test_backward_after_remove_is_right_once_forward_has_run_again(loaded, x):
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t() * 2 + self.bias

    def build():
        model = Tower()
        for block in model.blocks:
            block[0] = Own(64, 64)
        return model

    model = loaded(PLAIN, model=empty(build)).requires_grad_(False)
    given = x.clone().requires_grad_()
    out = model(given).square().sum()
    model.offload.remove()
    with pytest.raises(OffloadError, match=r"remove\(\) has freed: run forward again"):
        out.backward()
    model(given).square().sum().backward()
    assert given.grad.abs().sum() > 0


@pytest.mark.parametrize("remedy", ["remove", "build again"])
def test_offloaded_model_is_loaded_again(remedy, loaded, x):
    model = loaded(PLAIN)
    with pytest.raises(ConfigError, match=r"call model\.offload\.remove\(\) first, or build it again"):
        loaded(PLAIN, model=model)
    if remedy == "remove":
        model.offload.remove()
    else:
        model = empty(Tower)
    with torch.no_grad():
        assert torch.equal(loaded(PLAIN, model=model)(x), loaded(PLAIN, away=None)(x))


@torch.no_grad()
def test_copy_is_made_of_the_state_dict_of_a_part_or_after_remove(loaded, x):
    model = loaded(PLAIN)
    expected = model(x)
    with pytest.raises(OffloadError, match=r"save its state_dict, or call .* first \(a part of it can be copied"):
        copy.deepcopy(model)
    assert torch.equal(copy.deepcopy(model.blocks[0])(x), model.blocks[0](x))
    other = Tower().to(x.device)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)
    model.offload.remove()
    assert torch.equal(copy.deepcopy(model)(x), expected)


@torch.no_grad()
def test_weight_is_pruned_after_remove(loaded, x):
    model, wanted = loaded(PLAIN), loaded(PLAIN, away=None)

    def cut(each):
        prune.l1_unstructured(each.blocks[0][0], "weight", amount=0.5)

    pruned = loaded(PLAIN)
    cut(pruned)
    with pytest.raises(OffloadError, match=r"call model\.offload\.remove\(\) before a weight is parametrized, pruned"):
        pruned(x)
    model.offload.remove()
    cut(model)
    cut(wanted)
    assert torch.equal(model(x), wanted(x))


@torch.no_grad()
def test_model_is_cast_after_remove(loaded, x):
    model = loaded(PLAIN)
    with pytest.raises(OffloadError, match=r"call model\.offload\.remove\(\) first, then change the model"):
        model.to(torch.bfloat16)
    model.offload.remove()
    wanted = loaded(PLAIN, away=None).to(torch.bfloat16)
    assert torch.equal(model.to(torch.bfloat16)(x.bfloat16()), wanted(x.bfloat16()))


@pytest.mark.parametrize("remedy", ["remove", "keep it on its device"])
def test_head_is_resized_after_remove_or_where_it_is_kept(remedy, tmp_path, device, small_parts_stream):
    folder = save_checkpoint(llama(), tmp_path / "stored")
    options = {"offload_folder": tmp_path / "off"}
    where = {"": device, "lm_head": "disk"}
    model = load_and_quantize_model(empty(llama), "nf4", folder, device_map=where, **options)
    with pytest.raises(OffloadError, match=r"remove\(\) first, or load it with a device_map that keeps it on its"):
        model.resize_token_embeddings(model.lm_head.out_features + 8)
    if remedy == "remove":
        model.offload.remove()
    else:
        model = load_and_quantize_model(empty(llama), "nf4", folder, device_map=device)
    rows = model.lm_head.out_features
    model.resize_token_embeddings(rows + 8)
    assert model(TOKENS.to(device)).logits.shape[-1] == rows + 8


@torch.no_grad()
def test_remove_is_called_outside_of_what_uses_the_weights(loaded, x):
    model = loaded(PLAIN)
    expected = model(x)
    with (
        model.offload.materialize(model.blocks[0]),
        pytest.raises(OffloadError, match=r"call remove\(\) outside of forward and of materialize\(\)"),
    ):
        model.offload.remove()
    model.offload.remove()
    assert torch.equal(model(x), expected)


def test_folder_of_ones_own_is_written(loaded, x, monkeypatch):
    loaded()
    read = weight_cache.read_header

    def refused(path):
        if "off2" in str(path):
            return read(path)
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(weight_cache, "read_header", refused)
    with pytest.raises(OffloadError, match="name an offload_folder of your own"):
        loaded()
    with torch.no_grad():
        assert loaded(folder="off2")(x).isfinite().all()


@pytest.mark.parametrize("remedy", ["remove", "load the unquantized checkpoint"])
def test_offloaded_model_is_dequantized_after_remove(remedy, loaded, x):
    model = loaded()
    with pytest.raises(QuantizationError, match=r"call model\.offload\.remove\(\) first, or load the unquantized"):
        dequantize_model(model)
    if remedy == "remove":
        model.offload.remove()
        model = dequantize_model(model)
    else:
        model = loaded(PLAIN)
    assert type(model.blocks[0][0]) is nn.Linear
    assert model(x).isfinite().all()


def test_layers_of_bitsandbytes_are_streamed_once_they_are_quantized(device):
    """They come from elsewhere, in an engine of one's own."""
    four, eight = library().nn.Linear4bit(64, 64), library().nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    for layer, words in ((four, "load it again"), (eight, "move the model to its device first")):
        with pytest.raises(OffloadError, match=words):
            streamed_tensors_of(Leaf("0", layer))
        assert streamed_tensors_of(Leaf("0", layer.to(device)))
