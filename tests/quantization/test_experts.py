"""Fused experts in 4 bit compute what experts with their dequantized values do, in every way and with gradients."""

import contextlib
import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from comparisons import assert_same_bits
from experts import made, pack, packed, routed

from bigload import QuantizationError
from bigload.quantization import expert_launches as launches
from bigload.quantization.bnb import dequantize_4bit
from bigload.quantization.expert_linears import Routing, _steps, expert_limits, most_scratch_bytes
from bigload.quantization.packed_experts import PackedExperts
from bigload.quantization.saved_experts import quantized_experts, require_whole_experts, saving_attributes

MODES = ("nf4", "nf4-dq", "fp4")
KINDS = ("qwen3", "gpt_oss", "nemotron")
# hidden and intermediate sizes: whole blocks in a row, and blocks that run over the ends of rows.
SIZES = ((128, 64), (48, 96))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def difference(found, expected):
    """Return the relative difference of two tensors."""
    expected = expected.float()
    return ((found.float() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def exact(plain):
    """Return experts in fp32 with the same values."""
    return copy.deepcopy(plain).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(5, 64, 128), (7, 48, 96), (3, 6, 32)], ids=str)
def test_each_expert_has_the_values_that_bitsandbytes_gives_it(shape, mode, storage, dtype, device):
    values = torch.randn(shape, device=device, dtype=dtype)
    weight = packed(values, mode, blocksize=32, storage=storage)
    view = PackedExperts.of(weight)
    whole = dequantize_4bit(weight.data, weight.quant_state, dtype)
    assert view.shape == shape
    for expert in range(shape[0]):
        found = view.dequantize(expert, dtype)
        assert torch.equal(found, whole[expert])
        if not weight.quant_state.nested:  # the offset of the scales' scales is the tensor's
            data, state = bnb.functional.quantize_4bit(values[expert], blocksize=32, quant_type=mode)
            assert torch.equal(found, dequantize_4bit(data, state, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_dequantized_experts(kind, size, mode, dtype, device):
    model = made(kind, 6, *size, dtype=dtype, device=device)
    plain = pack(model, mode, dtype, blocksize=32)
    for tokens, top_k in ((1, 2), (3, 5), (40, 3), (300, 2)):
        x, ids, weights = routed(tokens, top_k, model.experts, dtype, device=device)
        found = model.experts(x, ids, weights)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        expected = exact(plain).experts(x.float(), ids, weights.float())
        assert difference(found, expected) < TOLERANCE[dtype], (tokens, top_k)


def test_no_tokens_give_no_output(device):
    model = made(device=device)
    pack(model)
    assert model.experts(*routed(0, 2, model.experts, device=device)).shape == (0, 128)


@pytest.mark.parametrize("tokens", [2, 9, 150, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_no_expert_has_add_nothing(kind, tokens, device):
    """As expert parallelism gives them to the experts of other ranks, with any weight; -1 is others' number for it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = made(kind, 6, dtype=dtype, device=device)
    plain = pack(model, compute_dtype=dtype)
    x, ids, weights = routed(tokens, 3, model.experts, dtype, device=device)
    ids[::2, 1], ids[1, 0], ids[0] = 6, -1, torch.tensor([7, -3, 99])
    absent = (ids > 5) | (ids < 0)
    expected = exact(plain).experts(x.float(), ids.masked_fill(absent, 5), weights.float().masked_fill(absent, 0))
    for grad in (False, True):
        found = model.experts(x.clone().requires_grad_(grad), ids, weights)
        assert not found[0].any()
        assert difference(found, expected) < TOLERANCE[dtype]
    given = x.clone().requires_grad_()
    model.experts(given, ids, weights).square().sum().backward()
    assert given.grad.isfinite().all()
    assert not given.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dequantized_experts(kind, mode, tokens, dtype, device):
    """Those of the tokens and of the routing's weights; the experts get none."""
    scale = 0.2 if dtype == torch.float32 else 0.1  # too small for GPT-OSS to cut values off, where gradients jump
    model = made(kind, dtype=dtype, device=device, scale=scale)
    plain = exact(pack(model, mode, dtype))
    x, ids, weights = routed(tokens, 2, model.experts, dtype, device=device)
    grads = []
    for module, cast in ((model, dtype), (plain, torch.float32)):
        given = [tensor.detach().clone().to(cast).requires_grad_() for tensor in (x, weights)]
        (module.experts(given[0], ids, given[1]) * torch.arange(128, device=device)).sum().backward()
        grads.append([tensor.grad for tensor in given])
    for found, expected in zip(*grads, strict=True):
        assert difference(found, expected) < 3 * TOLERANCE[dtype]  # sums of terms that cancel out
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_the_differences_of_outputs():
    model = made(experts=3, hidden=32, intermediate=32)
    pack(model, blocksize=32)
    x, ids, weights = routed(4, 2, model.experts, torch.float64)
    given = x.requires_grad_(), weights.requires_grad_()
    how = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3}  # computed in float32
    assert torch.autograd.gradcheck(lambda x, weights: model.experts(x, ids, weights), given, **how)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = made(dtype=dtype, device=device)
    pack(model, compute_dtype=dtype)
    x, ids, weights = routed(300, 2, model.experts, dtype, device=device)
    grads = []
    for checkpointed in (False, True):
        given = x.clone().requires_grad_()
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(model.experts, given, ids, weights, use_reentrant=reentrant)
        else:
            out = model.experts(given, ids, weights)
        out.square().sum().backward()
        grads.append(given.grad)
    assert torch.equal(*grads)


def test_inputs_of_another_dtype_are_cast_and_the_output_is_cast_back(device):
    model = made(dtype=torch.bfloat16, device=device)
    pack(model, compute_dtype=torch.bfloat16)
    x, ids, weights = routed(5, 2, model.experts, device=device)
    found = model.experts(x, ids, weights)
    assert found.dtype == torch.float32
    expected = model.experts(x.bfloat16(), ids, weights).float()
    assert difference(found, expected) < TOLERANCE[torch.bfloat16]
    with torch.autocast(device.type, torch.bfloat16):
        assert difference(model.experts(x, ids, weights), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("wants_gradients", [False, True])
@pytest.mark.parametrize("tokens", [2, 9])
def test_what_an_activation_makes_in_float32_is_cast_back(tokens, wants_gradients, device):
    """As autocast does on a GPU, of "gelu_new" for one. Kernels take two values of 16 bit at a time."""

    class Power(torch.nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.float().pow(3).to(self.dtype)

    model = made("nemotron", dtype=torch.bfloat16, device=device)
    pack(model, compute_dtype=torch.bfloat16)
    x, ids, weights = routed(tokens, 2, model.experts, torch.bfloat16, device=device)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model.experts.act_fn = Power(dtype)
        given = x.clone().requires_grad_(wants_gradients)
        out = model.experts(given, ids, weights)
        found.append([out, *(torch.autograd.grad(out.sum(), given) if wants_gradients else ())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_biases_in_float32_are_added_in_the_dtype_of_the_computation(device):
    """As PEFT's prepare_model_for_kbit_training leaves them."""
    model = made("gpt_oss", dtype=torch.bfloat16, device=device)
    pack(model, compute_dtype=torch.bfloat16)
    x, ids, weights = routed(5, 2, model.experts, torch.bfloat16, device=device)
    expected = model.experts(x, ids, weights)
    for name in model.experts.quantized_experts.biases:
        model.experts._parameters[name].data = model.experts._parameters[name].data.float()
    found = model.experts(x, ids, weights)
    assert found.dtype == torch.bfloat16
    assert difference(found, expected) < TOLERANCE[torch.bfloat16]


def test_a_bias_that_is_trained_gets_its_gradient(device):
    model = made("gpt_oss", device=device)
    plain = pack(model)
    x, ids, weights = routed(9, 2, model.experts, device=device)
    grads = []
    for one in (model, plain):
        one.experts.down_proj_bias.requires_grad_()
        one.experts(x, ids, weights).square().sum().backward()
        grads.append(one.experts.down_proj_bias.grad)
    assert difference(*grads) < TOLERANCE[torch.float32]


def test_an_input_of_integers_is_refused_by_the_name_of_the_experts(device):
    model = made(device=device)
    pack(model)
    x, ids, weights = routed(3, 2, model.experts, device=device)
    with pytest.raises(QuantizationError, match=r"'experts' is quantized .* got torch\.uint8"):
        model.experts(x.byte(), ids, weights)


def test_arguments_may_be_given_by_name(device):
    model = made("gpt_oss", device=device)
    pack(model)
    x, ids, weights = routed(3, 2, model.experts, device=device)
    found = model.experts(x, routing_weights=weights, router_indices=ids)
    assert torch.equal(found, model.experts(x, ids, weights))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_with_their_own_weights(how, device):
    model = made("nemotron", device=device)
    pack(model, "nf4-dq")
    given = routed(3, 2, model.experts, device=device)
    expected = model.experts(*given)
    copied = how(model.experts)
    copied._parameters = dict(copied._parameters)  # which copy.copy shares
    assert copied.forward.args[0] is copied
    model.experts.up_proj = packed(torch.zeros(6, 64, 128, device=device))
    assert not torch.equal(model.experts(*given), expected)
    assert torch.equal(copied(*given), expected)


def test_a_copy_of_plain_experts_of_the_same_class_is_as_before():
    model = made()
    pack(model)
    plain = made().experts
    given = routed(3, 2, model.experts)
    assert torch.equal(copy.copy(plain)(*given), plain(*given))
    assert torch.equal(pickle.loads(pickle.dumps(plain)).gate_up_proj, plain.gate_up_proj)


def test_replicas_are_refused():
    model = made()
    pack(model)
    with pytest.raises(QuantizationError, match=r"'experts' is quantized, and torch\.nn\.DataParallel cannot"):
        model.experts._replicate_for_data_parallel()


def test_an_input_on_another_device_is_refused():
    model = made()
    pack(model)
    x, ids, weights = routed(3, 2, model.experts)
    with pytest.raises(QuantizationError, match="'experts' is quantized and on cpu, but its input is on meta"):
        model.experts(x.to("meta"), ids, weights)


def test_compiled_code_calls_them(device):
    model = made(device=device)
    pack(model)
    given = routed(3, 2, model.experts, device=device)
    expected = model.experts(*given)
    compiled = torch.compile(lambda x, ids, weights: model.experts(2 * x, ids, weights) + 1, backend="eager")
    assert torch.equal(compiled(given[0] / 2, *given[1:]), expected + 1)


def test_pairs_are_sorted_by_expert_and_choice():
    ids = torch.tensor([[2, 0], [5, 2], [0, 9]])
    routing = Routing.of(ids, 3, False)
    assert routing.order.tolist() == [1, 4, 0, 3, 2, 5]
    assert routing.ends.tolist() == [2, 2, 4]
    assert routing.tokens.tolist() == [0, 2, 0, 1, 1, 2]
    assert routing.experts.tolist() == [0, 0, 2, 2, 2, 2]
    y = torch.arange(6.0).unsqueeze(-1)
    assert torch.equal(routing.gather(y[:3]), y[[0, 2, 0, 1, 1, 2]])
    assert routing.combine(y, torch.tensor([[1.0, 2.0]] * 3)).tolist() == [[2.0], [6.0], [1.0]]


@pytest.mark.parametrize(
    ("features", "limit", "expected"), [(192, 10**9, [192]), (192, 64, [64] * 3), (160, 1, [64, 64, 32])]
)
def test_steps_cover_the_features_within_the_limit(features, limit, expected, monkeypatch):
    monkeypatch.setattr(expert_limits, "scratch_bytes", limit)
    steps = _steps(features, 1, 64)
    assert [step.stop - step.start for step in steps] == expected
    assert steps[0].start == 0
    assert steps[-1].stop == features


def test_the_memory_of_dequantized_experts_is_that_of_the_largest_weight_up_to_the_limit():
    shapes = [(128, 1536, 2048), (128, 2048, 768)]
    assert most_scratch_bytes(shapes[1:], torch.bfloat16) == 384 * 2**20 == expert_limits.scratch_bytes
    assert most_scratch_bytes(shapes, torch.bfloat16) == expert_limits.scratch_bytes
    assert most_scratch_bytes([(2, 64, 32), (2, 8, 8)], torch.float32) == 2 * 64 * 32 * 4
    assert most_scratch_bytes([], torch.float32) == 0


def test_kernels_that_do_not_run_are_not_used_and_a_warning_says_so_once(monkeypatch, logged):
    def broken(ids, num_experts):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **how: torch.empty(*shape))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launches, "kernels", lambda: object())
    monkeypatch.setattr(launches, "route", broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    device = torch.device("cuda", 7)
    assert not launches.runs_kernels(device)
    assert not launches.runs_kernels(device)
    (record,) = logged.records
    assert "do not run on cuda:7" in record.getMessage()
    assert "no C compiler" in record.getMessage()
    launches.runs_kernels.__wrapped__.cache_clear()


def cast_as_bytes(kind, old, new):
    model = made(kind)
    pack(model, storage=old)
    return model.to(new)


@pytest.mark.parametrize(("old", "new"), [(torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16)], ids=str)
def test_packed_bytes_that_were_cast_as_values_are_refused(old, new):
    model = cast_as_bytes("qwen3", old, new)
    with pytest.raises(QuantizationError, match=rf"'gate_up_proj' of 'experts': .* {old}, were cast to {new}"):
        model.experts(*routed(3, 2, model.experts))
    with pytest.raises(QuantizationError, match=rf"'experts.gate_up_proj', 'experts.down_proj': .* were cast to {new}"):
        require_whole_experts(quantized_experts(model))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes_stored_as_integers_are_left_alone_by_casts(kind):
    model = cast_as_bytes(kind, torch.uint8, torch.float16)
    twin = made(kind)
    pack(twin)
    given = routed(3, 2, model.experts)
    assert difference(model.experts(*given), twin.experts(*given)) < 1e-3  # biases were cast


def test_a_weight_that_was_replaced_is_named():
    model = made()
    pack(model)
    given = routed(3, 2, model.experts)
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(6, 128, 64))
    with pytest.raises(QuantizationError, match=r"'down_proj' of 'experts': quantized when .*: load the model again"):
        model.experts(*given)
    again = made()
    pack(again)
    assert again.experts(*given).isfinite().all()


def with_state(kind, mode, seed, **how):
    """Return experts in 4 bit that save and load their state."""
    model = made(kind, seed=seed)
    pack(model, mode, **how)
    for name, value in saving_attributes(model.experts).items():
        setattr(model.experts, name, value)
    return model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_others_is_loaded_with_its_scales(kind, mode, strict, assign):
    model, other = with_state(kind, mode, 0), with_state(kind, mode, 7)
    given = routed(5, 2, model.experts)
    expected = other.experts(*given)
    assert not torch.equal(model.experts(*given), expected)
    saved = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    found = model.load_state_dict(saved, strict=strict, assign=assign)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(model.experts(*given), expected)
    assert_same_bits(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {key: t for key, t in state.items() if "up_proj." not in key},
            "the state_dict lacks the scales",
        ),
        (lambda state: {key: t for key, t in state.items() if not key.endswith("up_proj")}, "lacks its packed bytes"),
        (lambda state: {key: t for key, t in state.items() if "quant_state" not in key}, "cannot be read"),
        (lambda state: with_state("qwen3", "fp4", 7).state_dict(), "the state_dict holds .*'fp4'.* where .*'nf4'"),
        (lambda state: with_state("qwen3", "nf4-dq", 7).state_dict(), "the state_dict holds .* where .* is needed"),
        (lambda state: with_state("qwen3", "nf4", 7, blocksize=128).state_dict(), "the state_dict holds .* where"),
        (lambda state: made().state_dict(), "lacks the scales of its packed bytes"),
    ],
)
def test_a_state_that_cannot_be_loaded_is_refused_and_changes_no_packed_weight(change, message, strict):
    model = with_state("qwen3", "nf4", 0)
    given = routed(5, 2, model.experts)
    state = change(with_state("qwen3", "nf4", 0).state_dict())
    expected = model.experts(*given)
    with pytest.raises(RuntimeError, match=rf"'experts.gate_up_proj' is in 4 bit, and .*{message}"):
        model.load_state_dict(state, strict=strict)
    assert torch.equal(model.experts(*given), expected)


def test_a_state_without_experts_leaves_them_and_says_that_they_are_missing():
    model = with_state("gpt_oss", "nf4", 0)
    given = routed(5, 2, model.experts)
    expected = model.experts(*given)
    found = model.load_state_dict({}, strict=False)
    assert found.missing_keys == [*dict(model.named_parameters())]
    assert torch.equal(model.experts(*given), expected)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj"):
        model.load_state_dict({})


def test_a_copy_saves_and_loads_its_own_weights():
    model = with_state("nemotron", "nf4", 0)
    copied = copy.copy(model.experts)
    copied._parameters = {name: copy.deepcopy(weight) for name, weight in copied._parameters.items()}
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = with_state("nemotron", "nf4", 7).experts
    copied.load_state_dict(other.state_dict())
    assert_same_bits(model.state_dict(), before)
    assert_same_bits(copied.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("number", "named"),
    [(2, ()), (3, ("extra",)), (1, ("top_k_index",)), (3, ("top_k_index",)), (2, ("weights",)), (4, ())],
)
def test_arguments_that_the_own_forward_does_not_take_are_refused(number, named):
    model = made()
    plain = pack(model)
    given = routed(3, 2, model.experts)
    args = [*given, given[0]][:number]
    for one in (plain.experts, model.experts):
        with pytest.raises(TypeError):
            one(*args, **dict.fromkeys(named, given[1]))
    with pytest.raises(TypeError, match=rf"'experts' take \(hidden_states, top_k_index, .*got {number} by position"):
        model.experts(*args, **dict.fromkeys(named, given[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, ids, weights: (x, ids, weights[:, :1]),
        lambda x, ids, weights: (x, ids, weights.repeat(1, 3)),  # of all experts
        lambda x, ids, weights: (x, ids[:2], weights[:2]),
        lambda x, ids, weights: (x[:2], ids, weights),
        lambda x, ids, weights: (x[None], ids, weights),
        lambda x, ids, weights: (x, ids[:, 0], weights[:, 0]),
    ],
)
def test_tokens_and_routing_that_do_not_fit_together_are_refused(change, device):
    model = made(device=device)
    pack(model)
    given = change(*routed(3, 2, model.experts, device=device))
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
    with pytest.raises(QuantizationError, match=r"'experts' holds .* of shapes \(T, 128\), .*but got ") as caught:
        model.experts(*given)
    assert str(caught.value).endswith(shapes)
