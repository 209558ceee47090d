"""Tensors, states and outputs compared, by their bits where nothing else is said."""

import torch


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bits, not values: a bfloat16 storage holds patterns that are NaN."""
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.detach().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    )


def assert_same_bits(found, expected):
    """Compare two state dicts; bitsandbytes' own writes all that it knows of a quantized weight."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not equal(found[name].cpu(), expected[name].cpu())]
    assert not different


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return ((found - expected).norm() / expected.norm()).item()
