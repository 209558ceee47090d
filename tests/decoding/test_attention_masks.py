"""Boolean masks of attention are made numbers once in a graph, where attention gives the same bits with them."""

import pytest
import torch
from comparisons import equal
from torch import nn
from torch.nn import functional

from bigload import capture_decode
from bigload.decoding.fused import attention_masks
from bigload.decoding.fused.attention_masks import AttentionMasks

ROOM = 12


class Net(nn.Module):
    """Attention of one token, twice with the same mask, which may be written to in between."""

    def __init__(self, is_written=False, is_counted=True):
        super().__init__()
        self.register_buffer("key", torch.randn(1, 2, ROOM, 16, generator=torch.Generator().manual_seed(0)).bfloat16())
        self.is_written, self.is_counted = is_written, is_counted

    def step(self, q, mask):
        mask = mask & True
        out = functional.scaled_dot_product_attention(q, self.key, self.key, mask)
        if self.is_written:
            (mask if self.is_counted else mask.data)[..., 0] = False
        return functional.scaled_dot_product_attention(out, self.key, self.key, attn_mask=mask[:, :], dropout_p=0.0)


def drawn(device):
    draw = torch.Generator().manual_seed(1)
    queries = [torch.randn(1, 2, 1, 16, generator=draw).to(device, torch.bfloat16) for _ in range(4)]
    return [(q, (torch.arange(ROOM) < 3 + step).view(1, 1, 1, ROOM).to(device)) for step, q in enumerate(queries)]


@pytest.fixture
def made(monkeypatch):
    """List the masks that are made numbers."""
    masks, own = [], attention_masks._numbers

    def counted(mask, query):
        masks.append(mask)
        return own(mask, query)

    monkeypatch.setattr(attention_masks, "_numbers", counted)
    return masks


def run(model, device):
    given = drawn(device)
    with torch.no_grad():
        expected = [model.step(*each) for each in given]
        with capture_decode(model.to(device).eval(), step="step") as capture:
            assert all(equal(model.step(*each), right) for each, right in zip(given, expected, strict=True))
            assert (capture.stats().replayed, capture.stats().captures) == (3, 1)


@pytest.mark.parametrize("is_written", [False, True])
def test_a_mask_is_made_numbers_once_as_long_as_it_is_the_same(is_written, device, captures, made):
    run(Net(is_written).to(device), device)
    assert len(made) == 2 * (1 + is_written)  # in the step that runs as before, too


def test_a_mask_that_is_written_to_without_torch_counting_it_stays(device, captures, made):
    run(Net(is_written=True, is_counted=False).to(device), device)
    assert len(made) == 1 + 1  # that of the first attention, which gives the same in both steps


def test_where_numbers_give_other_bits_the_mask_stays(device, captures, made, monkeypatch):
    compared = []
    monkeypatch.setattr(attention_masks, "has_bits_of", lambda *both: compared.append(both) or len(compared) == 1)
    run(Net().to(device), device)
    assert len(compared) == 2
    assert len(made) == 1 + 1  # in the graph, for the first, which is given in another way


def test_other_masks_and_modes_are_left_to_the_model(device, made):
    (q, mask), key = drawn(device)[0], Net().key.to(device)
    of = AttentionMasks(Net())
    with torch.no_grad(), of.noting():
        functional.scaled_dot_product_attention(q, key, key)
        functional.scaled_dot_product_attention(q, key, key, torch.zeros(1, 1, 1, ROOM, device=device).bfloat16())
        functional.scaled_dot_product_attention(query=q, key=key, value=key, attn_mask=mask)
        functional.scaled_dot_product_attention(q, key, key, mask, 0.0)
        with torch.inference_mode():  # where torch counts no writes
            functional.scaled_dot_product_attention(q, key, key, mask & True)
    assert not made


def test_modules_that_ask_for_modes_are_left_alone(device, made):
    (q, mask), key = drawn(device)[0], Net().key.to(device)
    with torch.no_grad(), AttentionMasks(nn.MultiheadAttention(4, 1)).noting():
        functional.scaled_dot_product_attention(q, key, key, mask)
    assert not made


def test_dropout_has_the_random_numbers_of_a_step_that_runs_as_before(device, made):
    (q, mask), key = drawn(device)[0], Net().key.to(device)
    torch.manual_seed(0)
    expected = functional.scaled_dot_product_attention(q, key, key, mask, dropout_p=0.5), torch.rand(2, device=device)
    torch.manual_seed(0)
    with torch.no_grad(), AttentionMasks(Net()).noting():
        found = functional.scaled_dot_product_attention(q, key, key, mask, dropout_p=0.5), torch.rand(2, device=device)
    assert all(map(equal, found, expected))
    assert not made
