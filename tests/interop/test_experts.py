"""Models of transformers with fused experts compute in 4 bit what they do with the dequantized values."""

import pytest
import torch
from experts import FAMILIES, family, pack

from bigload.model.experts import find_experts, unsupported_experts
from bigload.quantization.experts import has_quantized_experts

MODES = ("nf4", "nf4-dq", "fp4")


def tokens(device, batch=2, length=9):
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)


def close(found, expected, dtype):
    """Whether two logits are equal within the rounding of a dtype.

    Where that rounds coarsely, a token may be sent to another expert: most tokens tell.
    """
    difference = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return bool(difference.max() < 1e-5) if dtype == torch.float32 else bool(difference.median() < 2e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_experts_of_a_family_are_found_and_no_router(name):
    model = family(name)
    modules = dict(model.named_modules())
    found = find_experts(modules)
    assert unsupported_experts(modules) == {}
    weights = {f"{path}.{weight}" for path, experts in found.items() for weight in experts.weights}
    assert weights == {path for path, parameter in model.named_parameters() if parameter.dim() == 3}
    for path, experts in found.items():
        assert path.endswith("experts")
        for weight in experts.weights:
            assert modules[path].get_parameter(weight).shape == experts.plain_shape(weight)
        assert {*experts.weights, *experts.biases} == dict(modules[path].named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(name, mode, dtype, device):
    model = family(name, dtype, device)
    plain = pack(model, mode, dtype, blocksize=32)
    ids = tokens(device)
    with torch.no_grad():
        found, expected = model(ids).logits, plain(ids).logits
    assert not torch.equal(found, family(name, dtype, device)(ids).logits)  # something was quantized
    assert close(found, expected, dtype)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_is_that_of_the_dequantized_model(name, device):
    model = family(name, device=device)
    plain = pack(model)
    how = {"max_new_tokens": 8, "do_sample": False}
    ids = tokens(device)
    assert torch.equal(model.generate(ids, **how), plain.generate(ids, **how))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_pass_through_the_experts(name, device):
    """To what lies before them, and to the router."""
    model = family(name, device=device)
    plain = pack(model)
    grads = []
    for one in (model, plain):
        trained = [
            parameter
            for path, parameter in one.named_parameters()
            if "router" in path or "mlp.gate." in path or "embed_tokens" in path or "moe.gate" in path
        ]
        for parameter in trained:
            parameter.requires_grad_()
        one(tokens(device), labels=tokens(device)).loss.backward()
        grads.append([parameter.grad for parameter in trained])
    assert len(grads[0]) > 1
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_transformers_choice_of_an_implementation_does_not_undo_it(implementation, device):
    model = family("qwen3_moe", device=device)
    plain = pack(model)
    model.set_experts_implementation(implementation)
    assert all(map(has_quantized_experts, (layer.mlp.experts for layer in model.model.layers)))
    with torch.no_grad():
        assert close(model(tokens(device)).logits, plain(tokens(device)).logits, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_compiled_model_computes_the_same(name, device):
    model = family(name, device=device)
    pack(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(tokens(device)).logits
        found = torch.compile(model, backend="eager")(tokens(device)).logits
    assert close(
        found, expected, torch.float32
    )  # compiled, transformers gives GPUs another mask, and so another kernel
