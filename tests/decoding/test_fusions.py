"""All fusions together: what they leave alone."""

import pytest
import torch
from comparisons import equal
from models import llama
from torch import nn

from bigload.decoding.fused.fusions import Fusions


def by_method(block, backend):
    block.compile(backend=backend)
    return block


def by_forward(block, backend):
    block.forward = torch.compile(block.forward, backend=backend)
    return block


def by_function(block, backend):
    return torch.compile(block, backend=backend)


@pytest.mark.parametrize("compiled", [by_method, by_forward, by_function])
def test_a_model_with_compiled_blocks_is_compiled_no_second_time(compiled, device):
    """Code that is compiled around other functions is other code, whose numbers may be rounded elsewhere."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = llama().to(device, torch.bfloat16).eval()
    model.model.layers = nn.ModuleList([compiled(block, backend) for block in model.model.layers])
    tokens = torch.arange(3, 4, device=device).view(1, 1)
    with torch.no_grad():
        expected, count = model(tokens, use_cache=False).logits, len(graphs)
        assert count
        fusions = Fusions(model)
        with fusions.noting():
            assert equal(model(tokens, use_cache=False).logits, expected)
        with fusions.captured():
            assert equal(model(tokens, use_cache=False).logits, expected)
    assert len(graphs) == count
