"""Ctrl-C at any place of a replay, and hundreds of tokens: what is left is as it was."""

import gc

import pytest
import torch
import transformers
from models import llama

from bigload import capture_decode
from bigload.decoding.cache_state import CacheState
from bigload.decoding.masks import MaskPlace
from bigload.decoding.steps import CapturedStep

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096}
HOW = {"do_sample": False, "pad_token_id": 0, "cache_implementation": "static", "disable_compile": True}


def generated(model, count, **how):
    tokens = torch.arange(1, 11, device=model.device).view(2, 5)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # so that there is a mask to be put in place
    how |= {"max_new_tokens": count, "min_new_tokens": count, "attention_mask": mask}
    return model.generate(tokens, **HOW, **how)


class Interrupted:
    """Does what it stands for, and is then interrupted, once."""

    def __init__(self, own):
        self.own, self.calls = own, 0

    def __call__(self, *args, **kwargs):
        out = self.own(*args, **kwargs)
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return out


PLACES = {
    "inputs": (CapturedStep, "_fill"),
    "masks": (MaskPlace, "fill"),
    "what is compared": (CapturedStep, "finds_all_in_place"),
    "counts": (CacheState, "advance"),
    "the next prompt": (CapturedStep, "lend_to"),
    "the run": (CapturedStep, "replay"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("window", [None, 8])
def test_ctrl_c_anywhere_in_a_step_leaves_all_usable(place, window, device, captures, monkeypatch):
    torch.manual_seed(0)
    kind = {} if window is None else {"sliding_window": window}
    family = "Llama" if window is None else "Mistral"
    config = getattr(transformers, f"{family}Config")(**SIZES, **kind)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(device).eval()
    expected = generated(model, 14)
    capture = capture_decode(model)
    generated(model, 14)
    owner, name = PLACES[place]
    own = getattr(owner, name)
    interrupted = Interrupted(own)
    monkeypatch.setattr(owner, name, lambda *args: interrupted(*args))
    try:
        for _ in range(4):
            generated(model, 14)
    except KeyboardInterrupt:
        monkeypatch.setattr(owner, name, own)
    else:
        assert interrupted.calls < 3, "it was not interrupted"
    for _ in range(2):
        assert torch.equal(generated(model, 14), expected)
    capture.remove()
    assert torch.equal(generated(model, 14), expected)


def held(device):
    gc.collect()
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    return tensors, torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def test_hundreds_of_tokens_leave_memory_as_it_was(device, captures):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(device).eval()
    capture = capture_decode(model)
    generated(model, 8, max_cache_len=2048)
    before = held(device)
    generated(model, 500, max_cache_len=2048)
    assert all(now <= then for now, then in zip(held(device), before, strict=True))
    assert (capture.stats().captures, capture.stats().graphs, capture.stats().uncaptured) == (1, 1, 1)
    capture.release()
    assert held(device)[0] < before[0]


def test_out_of_memory_as_it_captures_leaves_steps_as_they_are_and_other_batches_captured(
    device, captures, monkeypatch
):
    model = llama().to(device).eval()
    expected = [generated(model, 9), generated(model, 9, num_return_sequences=2, num_beams=2)]
    capture = capture_decode(model)
    graphs = capture._steps._graphs
    own = graphs.capture

    def full(step):
        monkeypatch.setattr(graphs, "capture", own, raising=False)
        own(lambda: None)[0].reset()
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr(graphs, "capture", full, raising=False)
    for _ in range(2):
        assert torch.equal(generated(model, 9), expected[0])
    assert capture.stats().captures == 0
    assert torch.equal(generated(model, 9, num_return_sequences=2, num_beams=2), expected[1])
    assert capture.stats().captures == 1
    assert capture.stats().reasons == ("there was no memory for it on the device",)
