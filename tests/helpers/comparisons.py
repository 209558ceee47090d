"""Tensors, states and outputs compared, by their bits where nothing else is said."""

import torch


def equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare dtype, shape and bits, not values: a bfloat16 storage holds patterns that are NaN."""
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.detach().reshape(-1).view(torch.uint8), expected.detach().reshape(-1).view(torch.uint8))
    )


def assert_same_bits(found, expected):
    """Compare tensors by name, wherever they are, in any order."""
    assert found.keys() == expected.keys()
    different = [name for name in expected if not equal(found[name].cpu(), expected[name].cpu())]
    assert not different


def state_of(model):
    """Copy a model's state_dict; that of bitsandbytes' layers holds all that they know of a quantized weight."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def identity_of(model):
    """List all that an exchange of tensors or modules changes: which objects they are, where they lie, and as what."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(tensor), tensor.data_ptr(), tensor.device, tensor.dtype) for name, tensor in tensors],
        [id(module) for module in model.modules()],
        list(vars(model)),
    )


def outputs(model, *args, **kwargs):
    """Run a model without gradients. Returns the tensor that a plain model or one of transformers gives."""
    with torch.no_grad():
        found = model(*args, **kwargs)
    return next((getattr(found, name) for name in ("logits", "last_hidden_state") if hasattr(found, name)), found)


def send_outputs(pipe, model, *args):
    """Run a model, which another process has given to this one, and send it what it computes."""
    pipe.send(outputs(model, *args).float().numpy())


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().float().cpu(), expected.detach().float().cpu()
    return ((found - expected).norm() / expected.norm()).item()
