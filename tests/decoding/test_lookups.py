"""Steps of a model whose embedding is off the GPU: its rows are looked up before each replay."""

import pytest
import torch
import transformers
from checkpoints import save_checkpoint
from models import llama
from torch import nn

from bigload import OffloadConfig, capture_decode, init_empty_weights, load_and_quantize_model
from bigload.decoding.lookups import is_lookup

STEPS = 9
HOW = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0, "cache_implementation": "static"}
HOW |= {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True, "max_cache_len": 24}
SIZES = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8))


MODELS = {"llama": llama, "mistral, whose window fills": mistral}


def loaded(build, tmp_path, device):
    torch.manual_seed(0)
    folder = save_checkpoint(build().bfloat16(), tmp_path)
    with init_empty_weights():
        model = build()
    away = "cpu" if device.type == "cuda" else "disk"
    places = {"": device, "model.embed_tokens": away}
    how = {"device_map": places, "offload_folder": tmp_path / "off", "offload": OffloadConfig()}
    return load_and_quantize_model(model, "nf4", folder, **how).eval()


def generated(model, device, add=0, **how):
    torch.manual_seed(3)
    out = model.generate(torch.arange(1, 11, device=device).view(2, 5) + add, **(HOW | {"do_sample": False} | how))
    return out.sequences, torch.stack([*out.logits])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_an_embedding_off_the_gpu(name, how, tmp_path, device, captures, warned, small_parts_stream):
    model = loaded(MODELS[name], tmp_path, device)
    assert is_lookup(model.model.embed_tokens)
    expected = [generated(model, device, add, **how) for add in (0, 9)]
    capture = capture_decode(model)
    for add, each in zip((0, 9), expected, strict=True):
        assert all(map(torch.equal, generated(model, device, add, **how), each))
    stats = capture.stats()
    assert (stats.reasons, warned()) == ((), [])
    assert stats.replayed >= 2 * (STEPS - 1) - 2 * stats.captures
    assert model.model.embed_tokens.forward.instead is None


@pytest.mark.cuda
def test_what_is_written_to_it_counts_in_the_next_step(tmp_path, captures, small_parts_stream):
    device = torch.device("cuda", 0)
    model = loaded(llama, tmp_path, device)
    capture = capture_decode(model)
    before = generated(model, device)[1]
    with torch.no_grad():
        model.model.embed_tokens.weight.data.mul_(1.5)
    found = generated(model, device)[1]
    capture.remove()
    assert not torch.equal(found, before)
    assert torch.equal(found, generated(model, device)[1])


class Twice(nn.Module):
    """Looks up what it has computed."""

    def __init__(self, model):
        super().__init__()
        self.embed = model.model.embed_tokens
        self.norm = model.model.norm  # which is on the device

    def step(self, ids):
        return self.embed((self.embed(ids).sum(-1) > 0).long())


def test_what_a_step_computes_cannot_be_looked_up(tmp_path, device, captures, warned, small_parts_stream):
    model = Twice(loaded(llama, tmp_path, device)).eval()
    ids = torch.arange(4, device=device)
    expected = model.step(ids)
    capture = capture_decode(model, step="step")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model.step(ids), expected)
    assert capture.stats().replayed == 0
    assert "is offloaded, and is given what the step computes" in warned()[-1]
