"""Weights at rest that others write to, cast or replace: the next forward computes with what they hold then."""

import copy
import io
import pickle

import pytest
import torch
from checkpoints import PLAIN, loaded, offloaded, save_checkpoint
from comparisons import assert_same_bits, equal, outputs, relative_error, state_of
from models import TOKENS, llama
from references import FOUR_BIT
from streaming import Own, engines_of, streamed
from torch import nn
from torch.nn.utils import prune

from bigload import OffloadError
from bigload.offload import at_rest
from bigload.offload.on_device.slot_pool import SlotPool

SHAPE = (64, 64)


def delta(weight, device):
    return torch.linspace(-1, 1, weight.numel()).view(weight.shape).to(device, weight.dtype)


def assigned(weight, value):
    weight.data = value


def added(weight, value):
    weight.data += value


def by_index(weight, value):
    weight.data[3:7] = value[3:7]


def by_optimizer(weight, value):
    weight.grad = value.to(weight.device)
    torch.optim.SGD([weight], lr=1.0, momentum=0.5).step()  # the same bits on every device
    weight.grad = None


def by_fused_optimizer(weight, value):
    weight.grad = value.to(weight.device)
    torch.optim.SGD([weight], lr=1.0, fused=True).step()
    weight.grad = None


WRITES = {
    "add_": lambda weight, value: weight.add_(value),
    "+= on data": added,
    "copy_ to data": lambda weight, value: weight.data.copy_(value),
    "copy_ to detached": lambda weight, value: weight.detach().copy_(value),
    "a view of data": lambda weight, value: weight.data.view(-1)[5:9].fill_(2),
    "an index": by_index,
    "another tensor as data": assigned,
    "a sum as data": lambda weight, value: assigned(weight, weight.data + value),
    "an initialisation": lambda weight, value: nn.init.constant_(weight, 0.01),
    "out=": lambda weight, value: torch.add(weight.data, 1, out=weight.data),
    "foreach": lambda weight, value: torch._foreach_mul_([weight.data], 0.5),
    "an optimizer": by_optimizer,
    "a fused optimizer": by_fused_optimizer,
    "a vector": lambda weight, value: nn.utils.vector_to_parameters(value.to(weight.device).view(-1), [weight]),
}


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("how", WRITES)
@torch.no_grad()
def test_what_is_written_to_a_weight_at_rest_is_computed_with(device, tmp_path, how, home):
    expected, model, engine = streamed(device, tmp_path, home)
    x = torch.randn(3, 64, device=device)
    assert equal(model(x), expected(x))
    for one in (expected, model):
        for index in (0, 1, 2):  # among them are those that are on the device already
            WRITES[how](one[index][1].weight, delta(one[index][1].weight, device))
    for _ in range(2):
        assert equal(model(x), expected(x))
    assert_same_bits(state_of(model), {name: tensor.cpu() for name, tensor in state_of(expected).items()})
    assert not any(tensor.is_cuda for tensor in model[0].state_dict().values() if tensor.dim() == 2)
    engine.remove()
    assert equal(model(x), expected(x))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_inference_mode_counts_too(device, tmp_path):
    expected, model, _ = streamed(device, tmp_path, "cpu")
    x = torch.randn(3, 64, device=device)
    with torch.inference_mode():
        model(x)
        for one in (expected, model):
            one[0][0].weight.data.mul_(2)
            one[2][0].weight.mul_(2)
        assert equal(model(x), expected(x))


@pytest.mark.parametrize("home", ["cpu", "disk"])
@torch.no_grad()
def test_what_a_state_dict_shares_is_the_weight_itself(device, tmp_path, home):
    expected, model, _ = streamed(device, tmp_path, home)
    x = torch.randn(3, 64, device=device)
    model(x)
    for one in (expected, model):
        state = one.state_dict()
        assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
        state["1.0.weight"].mul_(2)
    assert equal(model(x), expected(x))


@pytest.mark.parametrize("home", ["cpu", "disk"])
@torch.no_grad()
def test_what_is_written_while_it_is_on_the_device_comes_to_rest(device, tmp_path, home):
    expected, model, engine = streamed(device, tmp_path, home)
    with engine.materialize(model[1]):
        model[1][0].weight.mul_(2)
    expected[1][0].weight.mul_(2)
    x = torch.randn(3, 64, device=device)
    for _ in range(2):
        assert equal(model(x), expected(x))


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_casts_and_other_parameters_are_streamed(device, tmp_path, home, kind):
    expected, model, engine = streamed(device, tmp_path, home, torch.bfloat16, kind)
    x = torch.randn(3, 64, device=device, dtype=torch.bfloat16)
    assert equal(model(x), expected(x))
    for one in (expected, model):
        for parameter in one.parameters():
            parameter.data = parameter.data.to(torch.float32)
        one[0][0].weight = nn.Parameter(delta(one[0][0].weight, one[0][0].weight.device), requires_grad=False)
    wide = nn.Parameter(torch.randn(96, 64), requires_grad=False)
    narrow = nn.Parameter(torch.randn(64, 96), requires_grad=False)
    for one, place in ((expected, device), (model, "cpu")):
        for layer, weight in ((one[1][0], wide), (one[1][1], narrow)):
            layer.weight = nn.Parameter(weight.detach().to(place), requires_grad=False)
        one[1][0].bias = None
    for _ in range(2):
        assert equal(model(x.float()), expected(x.float()))
    resting = {tensor.data_ptr() for group in engine.groups for tensor in group.store.tensors.values()}
    assert all(layer.weight.data_ptr() in resting for pair in model for layer in pair)
    x = x.float().requires_grad_()
    (found,) = torch.autograd.grad(model(x).sum(), x)
    assert equal(found, torch.autograd.grad(expected(x).sum(), x)[0])
    engine.remove()
    assert equal(model(x), expected(x))


def test_weight_replaced_but_not_run_since_is_kept_by_remove(device, tmp_path):
    expected, model, engine = streamed(device, tmp_path, "disk")
    for one in (expected, model):
        one[3][0].weight = nn.Parameter(torch.ones(SHAPE, device=one[3][0].weight.device), requires_grad=False)
    engine.remove()
    x = torch.randn(3, 64, device=device)
    assert equal(model(x), expected(x))
    assert {parameter.device for parameter in model.parameters()} == {device}


def test_weight_without_values_is_refused_until_it_has_some(device, tmp_path):
    expected, model, _ = streamed(device, tmp_path, "cpu")
    x, own = torch.randn(3, 64, device=device), model[1][0].weight
    model[1][0].weight = nn.Parameter(torch.empty(SHAPE, device="meta"), requires_grad=False)
    with pytest.raises(OffloadError, match=r"'1\.0\.weight' was offloaded, and has been put on meta since: give it"):
        model(x)
    model[1][0].weight = own
    assert equal(model(x), expected(x))
    for one in (expected, model):
        one[1][0].weight.data = torch.ones(SHAPE, device=device)
    assert equal(model(x), expected(x))


def test_weight_tied_to_another_module_since_is_refused(device, tmp_path):
    _, model, _ = streamed(device, tmp_path, "cpu")
    model.other = nn.Linear(64, 64, device=device)
    model[0][0].weight = model.other.weight
    with pytest.raises(OffloadError, match="is offloaded as another module's"):
        model[0](torch.randn(3, 64, device=device))


def test_parameters_at_rest_are_pickled_and_copied_as_any_other(device, tmp_path):
    expected, model, _ = streamed(device, tmp_path, "disk")
    own = model[0][0].weight
    for made in (copy.deepcopy(own), pickle.loads(pickle.dumps(own)), copy.deepcopy(own.data)):
        assert type(made) is (nn.Parameter if made is not own.data and isinstance(made, nn.Parameter) else torch.Tensor)
        assert equal(made, expected[0][0].weight.cpu())
        assert made.data_ptr() != own.data_ptr()
    file = io.BytesIO()
    torch.save(model[0].state_dict(keep_vars=True), file)
    assert b"bigload" not in file.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda own: nn.Parameter(own, requires_grad=False),
        lambda own: nn.Parameter(own.data, requires_grad=False),
        lambda own: nn.Parameter(own * 1, requires_grad=False),
        lambda own: type(own)(own.data.clone(), requires_grad=False),
        lambda own: own.__class__(own.detach()).requires_grad_(False),
    ],
    ids=["of it", "of its data", "of what was computed", "of its class", "of its class, by detach"],
)
def test_parameter_that_is_made_of_one_at_rest_is_a_usual_one(device, tmp_path, make):
    expected, model, engine = streamed(device, tmp_path, "cpu")
    own, x = model[0][0].weight, torch.randn(3, 64, device=device)
    made = make(own)
    assert (type(made), made.requires_grad, vars(made)) == (nn.Parameter, False, {})
    assert type(copy.deepcopy(made)) is nn.Parameter
    assert own.requires_grad_(False) is own
    for one, parameter in ((model, made), (expected, make(expected[0][0].weight))):
        one[3][1].weight = parameter
        one[3][1].weight.data += 1
    assert equal(model(x), expected(x))
    engine.remove()
    assert equal(model(x), expected(x))
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def by_norm(layer):
    nn.utils.weight_norm(layer)
    return lambda: nn.utils.remove_weight_norm(layer)


def by_mask(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    return lambda: prune.remove(layer, "weight")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("change", [by_norm, by_mask])
@torch.no_grad()
def test_weight_that_is_computed_of_others_is_refused_until_it_is_a_parameter_again(device, tmp_path, change):
    expected, model, _ = streamed(torch.device("cpu"), tmp_path, "cpu")
    x = torch.randn(3, 64)
    model(x)
    undo, undo_expected = (change(one[1][0]) for one in (model, expected))
    with pytest.raises(OffloadError, match=r"call model\.offload\.remove\(\) before a weight is parametrized"):
        model(x)
    undo()
    undo_expected()
    assert equal(model(x), expected(x))


@torch.no_grad()
def test_what_changes_no_value_copies_nothing_again(device, tmp_path):
    _, model, engine = streamed(device, tmp_path, "cpu", slots=4)
    model(torch.randn(3, 64, device=device))
    before = engine.stats().fetches
    model.requires_grad_(True).requires_grad_(False)
    model.state_dict()
    model(torch.randn(3, 64, device=device))
    assert engine.stats().fetches == before


def test_weight_at_rest_and_tensors_of_the_device_that_computes_meet(moves):
    """PEFT merges what adapters on a GPU give into a weight at rest, or computes their norm."""
    finished = []
    pool = SlotPool([], torch.device("cpu"), 1, lambda slot: None)
    pool.copier.device, pool.copier.finish = torch.device("meta"), lambda: finished.append(True)
    own = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    at_rest.keep_writes(own, pool)
    there = torch.ones(4, 4, device="meta")
    own.data += there
    own.data[1:3] -= there[1:3]
    kept = own.data.clone()
    kept += there
    assert [where.type for _, where in moves] == ["cpu"] * 3
    assert len(finished) == 4  # a slice is written to, and put back
    assert {own.device, kept.device} == {torch.device("cpu")}
    assert own.tolist() == [[1.0] * 4] * 4  # from meta come zeros
    assert (own + there).is_meta
    assert (own.data.float() @ there).is_meta
    assert nn.functional.linear(there, own).is_meta
    assert own.tolist() == [[1.0] * 4] * 4
    at_rest.stop_keeping_writes([own])
    assert type(own) is nn.Parameter
    assert "_home" not in vars(own)


MODES = [PLAIN, "nf4", "nf4-dq", "int8"]
AWAY = ["model.embed_tokens", "model.layers.0", "lm_head"]


@pytest.fixture
def twins(tmp_path, device, small_parts_stream):
    """Return a function that loads the same Llama whole, and with parts of it offloaded."""

    def made(mode, home):
        torch.manual_seed(5)
        folder = save_checkpoint(llama().bfloat16(), tmp_path / "source")
        whole = loaded(folder, device, mode, llama)
        return whole, offloaded(llama, folder, device, AWAY, tmp_path / "cache", mode, home)

    return made


def assert_same(found, expected, mode, device):
    if device.type == "cuda" and mode in FOUR_BIT:
        # The CPU dequantizes what rests there; it rounds as a GPU does, except for a few values.
        assert relative_error(found, expected) < 0.05
    else:
        assert equal(found, expected)


@pytest.mark.parametrize("home", ["cpu", "disk"])
@pytest.mark.parametrize("options", [{}, {"safe_merge": True}], ids=["", "safe"])
@pytest.mark.parametrize("mode", MODES, ids=["plain", "nf4", "nf4-dq", "int8"])
@pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning")
def test_adapters_are_merged_as_into_the_whole_model(twins, device, mode, home, options):
    peft = pytest.importorskip("peft")
    if device.type == "cpu" and home == "cpu":
        home = "disk"  # the CPU streams from files alone
    tokens, found = TOKENS.to(device), []
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    for model in twins(mode, home):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        before = outputs(adapted, tokens)
        merged = adapted.merge_and_unload(**options)
        after = outputs(merged, tokens)
        assert relative_error(after, before) < (0.2 if mode in FOUR_BIT else 0.05)  # rounded once more
        assert equal(outputs(merged, tokens), after)
        found.append((before, after))
    assert_same(found[1][0], found[0][0], mode, device)
    assert_same(found[1][1], found[0][1], mode, device)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_prepared_for_training_it_trains_as_the_whole_model(twins, device, mode):
    peft = pytest.importorskip("peft")
    losses = []
    for model in twins(mode, None):
        prepared = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert model.lm_head.weight.dtype == torch.float32
        torch.manual_seed(2)
        adapted = peft.get_peft_model(prepared, peft.LoraConfig(r=4, target_modules="all-linear"))
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            loss = adapted(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_cast_weights_stay_at_rest_when_the_model_is_moved(twins, device):
    _, model = twins("nf4", None)
    model.lm_head.weight.data = model.lm_head.weight.data.float()
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.float()
    expected = model.lm_head.weight.data.clone()
    outputs(model.model.float(), TOKENS.to(device))
    with pytest.raises(OffloadError, match=r"cast to torch\.bfloat16"):
        model.lm_head.bfloat16()
    model.lm_head.float()
    model.to(device)
    assert_same_bits({"head": model.state_dict()["lm_head.weight"]}, {"head": expected})
    assert len(engines_of(model)) == 1


@pytest.mark.parametrize("mode", MODES, ids=["plain", "nf4", "nf4-dq", "int8"])
def test_state_dict_holds_tensors_of_torch_on_the_cpu(twins, device, mode):
    whole, model = twins(mode, None)
    state = model.state_dict()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert state["model.embed_tokens.weight"].device == torch.device("cpu")
    assert_same_bits(state_of(model), {name: tensor.to(state[name].device) for name, tensor in state_of(whole).items()})


@torch.no_grad()
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_packed_values_are_written_too(twins, device, mode):
    tokens, found = TOKENS.to(device), []
    for model in twins(mode, "disk"):
        outputs(model, tokens)
        model.model.layers[0].mlp.down_proj.weight.data[:8] = 0
        found.append([outputs(model, tokens) for _ in range(2)])
    assert equal(found[0][0], found[1][0])
    assert equal(found[0][1], found[1][1])


@torch.no_grad()
def test_group_of_which_all_was_written_is_copied_once_more(device, tmp_path):
    _, model, engine = streamed(device, tmp_path, "cpu")
    x = torch.randn(3, 64, device=device)
    for _ in range(3):
        model(x)
    engine.pool.copier.finish()
    for parameter in model.parameters():
        parameter.mul_(2)
    before = engine.stats().fetches
    model(x)
    # Each layer of a group was written to. A group that was copied ahead since is copied again.
    assert engine.stats().fetches - before <= 2 * len(engine.groups)
