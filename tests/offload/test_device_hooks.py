"""Models whose parts compute on several devices; here the second is "meta", and what is moved is written down."""

import copy
import threading
from typing import NamedTuple

import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import assert_same_bits
from models import GPT, Blocks, llama
from streaming import hooks_of
from torch import nn
from transformers import BatchEncoding

from bigload import load_and_quantize_model
from bigload.errors import OffloadError
from bigload.hardware.nested_tensors import map_tensors, tensors_in
from bigload.offload.device_hooks import attach, detach

CPU, META = torch.device("cpu"), torch.device("meta")


class Cache:
    def __init__(self, tensor):
        self.tensor = tensor


class Point(NamedTuple):
    x: torch.Tensor
    y: int


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.given = None

    def forward(self, x, mask=None, cache=None, **others):
        self.given = (mask, cache, others)
        return self.fc(x)


class Stack(nn.Module):
    def __init__(self, count=6):
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(count))
        self.fails = False

    def forward(self, x, mask=None, **others):
        for part in self.parts:
            x = part(x, mask=mask, **others)
            if self.fails:
                raise ValueError("on the way")
        return {"x": x}


def stack(places="001122"):
    """Make a stack whose parts are on the CPU where their digit is even, and on meta where it is odd."""
    model = Stack(len(places))
    devices = {f"parts.{n}": META if int(place) % 2 else CPU for n, place in enumerate(places)}
    for path, device in devices.items():
        model.get_submodule(path).to(device)
    return model, devices


def test_activations_move_where_the_device_changes(moves):
    model, devices = stack("000111")
    attach(model, devices)
    out = model(torch.ones(2, 4))
    assert [(tuple(tensor.shape), device) for tensor, device in moves] == [((2, 4), META), ((2, 4), CPU)]
    assert out["x"].device == CPU  # where the input was


class WithTable(Stack):
    """Computes with a parameter of its own, before, between and after its parts."""

    def __init__(self, count=6):
        super().__init__(count)
        self.table = nn.Parameter(torch.ones(4, 4))
        self.last = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        x = x @ self.table
        for part in self.parts:
            x = part(x) + self.table[0]
        return {"x": self.last(x) @ self.table, "before": x}


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "in it"])
def test_a_parameter_beside_children_meets_what_they_return_on_its_device(moves, inside):
    model = WithTable(3)
    devices = {"table": CPU, "parts.0": CPU, "parts.1": META, "parts.2": CPU, "last.0": META, "last.1": META}
    for path in ("parts.1", "last"):
        model.get_submodule(path).to(META)
    if inside:
        model = nn.Sequential(nn.Linear(4, 4, device=META), model)
        devices = {"0": META} | {f"1.{path}": device for path, device in devices.items()}
    attach(model, devices)
    out = model(torch.ones(2, 4))
    assert out["x"].device == CPU
    assert [device for _, device in moves] == [META, CPU] * (3 if inside else 2)


def test_modules_without_parameters_of_their_own_leave_outputs_where_they_are(moves):
    model, devices = stack("010")
    model.register_buffer("table", torch.ones(1))
    attach(model, devices | {"table": CPU})
    assert not any(part._forward_hooks for part in model.parts)


def test_what_parts_share_moves_once_for_each_forward(moves):
    model, devices = stack("0101011")
    attach(model, devices)
    mask = torch.ones(3)
    for _ in range(2):
        moves.clear()
        model(torch.ones(2, 4), mask=mask)
        assert sum(tensor is mask for tensor, _ in moves) == 1
        assert all(part.given[0].device == device for part, device in zip(model.parts, devices.values(), strict=True))


def test_a_mask_that_is_changed_on_the_way_moves_again(moves):
    model, devices = stack("0101")
    attach(model, devices)
    mask = torch.ones(3)
    model.parts[2].register_forward_hook(lambda *given: (mask.add_(1), None)[1])
    model(torch.ones(2, 4), mask=mask)
    assert sum(tensor is mask for tensor, _ in moves) == 2


def test_nested_arguments_move_and_other_objects_stay(moves):
    model, devices = stack("01")
    attach(model, devices)
    cache, pair = Cache(torch.ones(1)), (torch.ones(2), [torch.ones(3)])
    model(torch.ones(2, 4), cache=cache, pair=pair, point=Point(torch.ones(1), 5), table={"a": torch.ones(1)}, n=3)
    _, given, others = model.parts[1].given
    assert given is cache
    assert cache.tensor.device == CPU
    assert [others["pair"][0].device, others["pair"][1][0].device] == [META, META]
    assert isinstance(others["pair"][1], list)
    assert isinstance(others["point"], Point)
    assert (others["point"].x.device, others["point"].y, others["table"]["a"].device, others["n"]) == (META, 5, META, 3)


@pytest.mark.parametrize("names", ["held", ["held", "more"]], ids=repr)
def test_what_a_module_says_is_left_alone_is(moves, names):
    model, devices = stack("01")
    model._skip_keys_device_placement = names
    attach(model, devices)
    model(torch.ones(2, 4), held=torch.ones(1), other=torch.ones(1))
    assert {name: value.device for name, value in model.parts[1].given[2].items()} == {"held": CPU, "other": META}


def test_nothing_is_kept_after_a_forward_that_ended_or_failed(moves):
    model, devices = stack("01")
    memo = attach(model, devices)._memo
    model(torch.ones(2, 4), mask=torch.ones(3))
    assert (memo.is_on, memo.moved) == (False, {})
    model.fails = True
    with pytest.raises(ValueError, match="on the way"):
        model(torch.ones(2, 4), mask=torch.ones(3))
    assert (memo.is_on, memo.moved) == (False, {})


def test_nothing_is_kept_of_a_forward_that_was_interrupted(moves):
    model, devices = stack("0101")
    memo = attach(model, devices)._memo
    handle = model.parts[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(2, 4), mask=torch.ones(3))
    handle.remove()
    for _ in range(3):
        model(torch.ones(2, 4), mask=torch.ones(3))
        assert not memo.moved


def interrupt(*given):
    raise KeyboardInterrupt


def test_what_was_moved_without_gradients_is_moved_anew_for_them(moves):
    model, devices = stack("0101")
    attach(model, devices)
    mask = torch.ones(3, requires_grad=True)
    model.parts[1].register_forward_hook(lambda *given: torch.set_grad_enabled(True) and None)
    try:
        with torch.no_grad():
            model(torch.ones(2, 4), mask=mask)
    finally:
        torch.set_grad_enabled(True)
    assert sum(tensor is mask for tensor, _ in moves) == 2


def test_caches_that_go_into_blocks_in_float32_keep_their_dtype(moves):
    class Held(nn.Module):
        _skip_keys_device_placement = "held"

        def forward(self, x, held, other):
            self.seen = held.dtype, other.dtype
            return x

    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Identity(), Held()])

        def forward(self, x):
            half = torch.ones(1, dtype=torch.bfloat16)
            return self.parts[1](self.parts[0](x), held=half, other=half)

    model = Holding()
    attach(model, {"parts.0": META, "parts.1": CPU}, ["parts.1"], torch.bfloat16)
    model(torch.ones(2, 4, dtype=torch.bfloat16))
    assert model.parts[1].seen == (torch.bfloat16, torch.float32)


def test_caches_in_outputs_stay_where_they_are(moves):
    class Giving(Stack):
        _skip_keys_device_placement = "held"

        def forward(self, x):
            return {"x": self.parts[1](self.parts[0](x)), "held": torch.ones(1, device=META)}

    model = Giving(2)
    model.parts[1].to(META)
    attach(model, {"parts.0": CPU, "parts.1": META})
    assert {name: value.device for name, value in model(torch.ones(2, 4)).items()} == {"x": CPU, "held": META}


def test_one_device_needs_no_hooks():
    model, devices = stack("0000")
    attach(model, devices)
    assert not hooks_of(model)


def test_hooks_are_put_on_once_and_come_off(moves):
    model, devices = stack("01")
    attach(model, devices)
    handles = attach(model, devices)
    assert len(hooks_of(model.parts[0])) == 1
    handles.remove()
    assert not hooks_of(model)


def test_copies_of_a_model_are_hooked_for_themselves(moves):
    model, devices = stack("01")
    attach(model, devices)
    twin = copy.deepcopy(model)
    twin(torch.ones(2, 4), mask=torch.ones(3))
    assert len(moves) == 3
    assert twin.__dict__["_bigload_device_hooks"]._memo is not model.__dict__["_bigload_device_hooks"]._memo


def test_threads_do_not_share_what_they_moved(moves):
    model, devices = stack("0101")
    attach(model, devices)
    masks = [torch.ones(3) for _ in range(4)]
    threads = [threading.Thread(target=lambda m=mask: model(torch.ones(2, 4), mask=m)) for mask in masks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(sum(tensor is mask for tensor, _ in moves) == 1 for mask in masks)


def test_inference_tensors_have_no_version_and_are_not_kept(moves):
    model, devices = stack("0101")
    attach(model, devices)
    with torch.inference_mode():
        mask = torch.ones(3)
        model(torch.ones(2, 4), mask=mask)
    assert sum(tensor is mask for tensor, _ in moves) == 2


@pytest.mark.multi_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("build", [lambda: GPT(layers=4), lambda: llama(tied=False, num_hidden_layers=4)])
def test_model_on_two_gpus_gives_the_bits_and_gradients_of_one(build, tmp_path):
    folder, tokens = save_checkpoint(build().bfloat16(), tmp_path), torch.arange(12, device="cuda:0").view(2, 6)
    logits, gradients = [], []
    for options in ({"device_map": 0}, {"device_map": "balanced", "max_memory": {0: "1GiB", 1: "1GiB"}}):
        model = load_and_quantize_model(empty(build), "nf4", folder, **options).eval()
        made = model(tokens)
        logits.append(getattr(made, "logits", made))
        logits[-1].float().square().mean().backward()
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    assert len(set(model.hf_device_map.values())) == 2
    assert torch.equal(*(made.detach().cpu() for made in logits))
    assert len(gradients[0]) > 4
    assert_same_bits(*gradients)


@pytest.mark.multi_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_parameter_beside_children_that_are_on_the_other_gpu(mode, tmp_path):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4096, 512) / 64)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(512, 512)) for _ in range(4))

        def forward(self, x):
            x = x + self.table[:2]
            for block in self.blocks:
                x = x + block(x)
            return x @ self.table.t()

    folder = save_checkpoint(Tower(), tmp_path)
    whole = load_and_quantize_model(empty(Tower), mode, folder, device_map=0).eval()
    parted = load_and_quantize_model(empty(Tower), mode, folder, device_map={"table": 0, "blocks": 1}).eval()
    x = torch.randn(2, 512)
    with torch.no_grad():
        expected = whole(x.to("cuda:0")).cpu()
        for where in ("cuda:0", "cuda:1", "cpu"):
            found = parted(x.to(where))
            assert found.device == torch.device(where)
            assert torch.equal(found.cpu(), expected)


@pytest.mark.multi_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("source", ["own", "pickled"])
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "int8", "int8-training"])
def test_weights_that_come_from_memory_are_quantized_on_every_gpu(tmp_path, mode, source):
    full = GPT(layers=4).bfloat16()
    location = tmp_path / "pickled.bin"
    torch.save(full.state_dict(), location)
    states = []
    for device_map in ({"": 0}, {"": 1, "transformer.h.1": 0, "transformer.h.3": 0}, {"": 0, "transformer.h.2": 1}):
        model = empty(GPT, layers=4) if source == "pickled" else copy.deepcopy(full)
        model = load_and_quantize_model(model, mode, location if source == "pickled" else None, device_map=device_map)
        states.append({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    for state in states[1:]:
        assert_same_bits(state, states[0])


def test_what_nothing_floating_goes_into_gives_the_models_dtype(moves):
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4).to(torch.bfloat16).to(META))
    attach(model, {"0": CPU, "1": META}, ["0"], torch.bfloat16)
    assert model(torch.tensor([1, 2])).dtype == torch.bfloat16


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_only_looks_up_gives_the_models_dtype_whatever_goes_into_it(moves, wrapped):
    class Positions(nn.Embedding):  # as OPT's: their numbers are made of the mask, which is in float32
        def forward(self, mask):
            return super().forward((mask.cumsum(-1) - 1).long())

    table = Positions(4, 4)
    model = nn.Sequential(nn.Sequential(table) if wrapped else table, nn.Linear(4, 4).to(torch.bfloat16).to(META))
    attach(model, {"0": CPU, "1": META}, ["0"], torch.bfloat16)
    assert model[0](torch.ones(1, 3)).dtype == torch.bfloat16
    assert model(torch.ones(1, 3)).dtype == torch.bfloat16


def test_blocks_in_float32_take_and_give_what_the_others_compute_in(moves):
    model, devices = stack("10")
    model.parts[0].to(torch.bfloat16)
    attach(model, devices, ["parts.1"], torch.bfloat16)
    seen = []
    model.parts[1].fc.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    assert model(torch.ones(2, 4, dtype=torch.bfloat16))["x"].dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32)]


def test_containers_of_other_classes_keep_them(moves):
    from collections import OrderedDict, defaultdict

    from transformers.modeling_outputs import BaseModelOutput

    model, devices = stack("01")
    attach(model, devices)
    given = {
        "table": defaultdict(list, a=torch.ones(1)),
        "ordered": OrderedDict(a=torch.ones(1)),
        "output": BaseModelOutput(last_hidden_state=torch.ones(1)),
        "packed": nn.utils.rnn.pack_sequence([torch.ones(2)]),
    }
    model(torch.ones(2, 4), **given)
    found = model.parts[1].given[2]
    assert {name: type(value) for name, value in found.items()} == {n: type(value) for n, value in given.items()}
    assert found["table"]["a"].device == found["ordered"]["a"].device == META
    assert found["output"].last_hidden_state.device == META
    assert given["output"].last_hidden_state.device == CPU


class Rows(list):
    """A list with a name."""


class Pair(tuple):
    """A pair that is made of its two parts, and has a name."""

    def __new__(cls, first, second):
        return super().__new__(cls, (first, second))


def named(value):
    value.name = "of a user"
    return value


MADE = {
    "what max returns": lambda t: t.max(dim=0),
    "a list of a class": lambda t: named(Rows([t, 1])),
    "a tuple of a class": lambda t: named(Pair(t, (t, "text"))),
    "a named tuple": lambda t: Point(t, 5),
    "a batch of a tokenizer": lambda t: BatchEncoding({"input_ids": t, "rest": [t]}),
    "a packed sequence": lambda t: nn.utils.rnn.pack_padded_sequence(t, torch.tensor([1, 4]), enforce_sorted=False),
}


def parts_of(value):
    """List the tensors that must be where the others are: of a packed sequence all but its sizes."""
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [value.data, value.sorted_indices, value.unsorted_indices]
    return [*tensors_in(value)]


@pytest.mark.parametrize("make", MADE.values(), ids=[*MADE])
def test_tuples_and_lists_of_other_classes_come_and_go_with_their_tensors(moves, make):
    class Giving(Stack):
        def forward(self, x, given):
            self.parts[1](self.parts[0](x), given=given)
            return map_tensors(self.parts[1].given[2]["given"], lambda tensor: tensor.clone())

    model = Giving(2)
    model.parts[1].to(META)
    attach(model, {"parts.0": CPU, "parts.1": META})
    given = make(torch.ones(4, 2))
    back = model(torch.ones(2, 4), given)
    there = model.parts[1].given[2]["given"]
    assert type(there) is type(back) is type(given)
    assert {tensor.device for tensor in parts_of(there)} == {META}
    assert {tensor.device for tensor in parts_of(back)} == {tensor.device for tensor in parts_of(given)} == {CPU}
    assert [tensor.shape for tensor in parts_of(back)] == [tensor.shape for tensor in parts_of(given)]
    assert getattr(there, "name", "") == getattr(given, "name", "")
    assert [part for part in given if isinstance(part, int)] == [part for part in back if isinstance(part, int)]


def test_a_packed_sequence_goes_through_a_recurrent_layer_on_another_device(moves):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True)

        def forward(self, x, lengths):
            return self.lstm(nn.utils.rnn.pack_padded_sequence(self.fc(x), lengths, batch_first=True))[0]

    model = Reader()
    model.lstm.to(META)
    attach(model, {"fc": CPU, "lstm": META})
    out = model(torch.ones(2, 4, 4), torch.tensor([4, 2]))
    assert (out.data.device, out.data.shape, out.batch_sizes.tolist()) == (CPU, (6, 3), [2, 2, 1, 1])


class Masked(nn.Module):
    """A part that is given what all parts share, by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, mask=None):
        return torch.relu(self.layer(x)) * mask


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Masked() for _ in range(4))

    def forward(self, x, mask):
        for part in self.parts:
            x = part(x, mask=mask)
        return {"x": x + 1}


def devices_of_graphs(model, *given):
    """Compile a model and run it twice. Returns the output and the devices that each graph has to do with."""
    graphs = []

    def backend(graph, examples):
        values = [*examples, *(node.meta.get("example_value") for node in graph.graph.nodes)]
        graphs.append({value.device for value in values if isinstance(value, torch.Tensor)})
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(*given)
        out = compiled(*given)
    return out["x"], graphs


def test_each_graph_of_a_compiled_model_is_on_one_device(moves):
    model = Parts().eval()
    model.parts[2:].to(META)
    attach(model, {f"parts.{index}": META if index > 1 else CPU for index in range(4)})
    out, graphs = devices_of_graphs(model, torch.randn(2, 64), torch.ones(2, 64))
    assert out.device == CPU
    assert {CPU} in graphs
    assert {META} in graphs
    assert {CPU, META} not in graphs


@pytest.mark.multi_gpu
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_compiled_model_on_two_gpus_gives_what_it_gives(mode):
    device_map = {"": 0, "parts.2": 1, "parts.3": 1}
    model = load_and_quantize_model(Parts().bfloat16(), mode, device_map=device_map).eval()
    given = torch.randn(2, 64, dtype=torch.bfloat16), torch.ones(2, 64, dtype=torch.bfloat16)
    given = [tensor.to("cuda:0") for tensor in given]
    with torch.no_grad():
        expected = model(*given)["x"]
        out, graphs = devices_of_graphs(model, *given)
        assert torch.equal(out, expected)
        assert all(len({device for device in each if device.type == "cuda"}) < 2 for each in graphs)
        torch._dynamo.reset()
        whole = torch.compile(model)(*given)["x"]
    torch.testing.assert_close(whole, expected, rtol=0.05, atol=0.05)  # inductor rounds less often than bf16 does


def test_children_of_a_module_without_a_forward_get_their_inputs_where_they_are(moves):
    """Its parent calls them, so hooks on the module itself would never run."""
    model = Blocks()
    model.layers[1].to(META)
    devices = {"embed": CPU, "layers.0": CPU, "layers.1": META, "head": CPU}
    attach(model, devices, ["layers.1"], torch.float32)
    assert model(torch.zeros(2, 3, dtype=torch.int64)).device == CPU
    assert [device for _, device in moves][:1] == [META]
    assert not model.layers[1]._forward_pre_hooks


def test_model_on_several_devices_is_not_moved_but_may_be_cast_and_copied(moves):
    model, devices = stack("01")
    attach(model, devices)
    for move in (lambda: model.to("meta"), lambda: model.to_empty(device="cpu")):
        with pytest.raises(OffloadError, match="is on 'cpu', 'meta' and cannot be moved to"):
            move()
    assert {name[:7]: p.device for name, p in model.named_parameters()} == {"parts.0": CPU, "parts.1": META}
    assert {p.dtype for p in model.half().parameters()} == {torch.float16}
    copied = copy.deepcopy(model)
    with pytest.raises(OffloadError, match="cannot be moved"):
        copied.to("meta")
    detach(copied)
    assert {p.device for p in copied.to("meta").parameters()} == {META}
    assert {p.device for p in model.parameters()} == {CPU, META}


@pytest.mark.cuda
@pytest.mark.multi_gpu
def test_model_on_two_gpus_is_not_moved_and_both_remedies_work(tmp_path):
    folder = save_checkpoint(GPT(), tmp_path, dtype=torch.bfloat16)
    maps = {"": 0, "transformer.h.1": 1}
    model, x = load_and_quantize_model(empty(GPT), "nf4", folder, device_map=maps).eval(), torch.arange(6).view(1, 6)
    with torch.no_grad():
        expected = model(x.cuda())
        with pytest.raises(OffloadError, match="cannot be moved to cuda:0"):
            model.to("cuda:0")
        assert torch.equal(model(x.to("cuda:1")).to(0), expected)  # its inputs are moved
        one = load_and_quantize_model(empty(GPT), "nf4", folder, device_map={"": 1}).eval()
        assert torch.equal(one(x.cuda()).to(0), expected)


def test_a_tensor_that_is_given_twice_is_moved_once(moves):
    """nn.MultiheadAttention computes faster, and to other bits, where query, key and value are one tensor."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

        def forward(self, x):
            x = self.enter(x)
            return self.attention(x, x, x)[0]

    model = Attending()
    model.attention.to(META)
    attach(model, {"enter": CPU, "attention": META})
    seen = []
    model.attention.register_forward_pre_hook(lambda _, given: seen.append(given))
    model(torch.ones(2, 3, 8))
    assert [device for _, device in moves].count(META) == 1
    query, key, value = seen[0]
    assert query is key is value


def test_what_the_last_layer_returns_meets_the_labels(moves):
    class Labelled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x, labels):
            logits = self.head(self.body(x))
            return logits, nn.functional.cross_entropy(logits, labels)

    model = Labelled()
    model.head.to(META)
    attach(model, {"body": CPU, "head": META}, entries={"": CPU})
    logits, loss = model(torch.ones(2, 8), labels=torch.tensor([0, 1]))
    assert (logits.device, loss.device) == (CPU, CPU)


def test_embeddings_that_are_added_meet_where_the_first_one_is(moves):
    """Whisper's convolutions and positions, GPT-2's tokens and positions."""

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.positions = nn.Embedding(9, 8), nn.Embedding(9, 8)
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            x = self.words(x) + self.positions(x)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    devices = {"inner.words": CPU, "inner.positions": META, "inner.blocks.0": CPU, "inner.blocks.1": META}
    devices |= {"inner.norm": META, "head": META}
    model = nn.Module()
    model.inner, model.head = Embedding(), nn.Linear(8, 3)
    model.forward = lambda x: model.head(model.inner(x))
    for path, device in devices.items():
        model.get_submodule(path).to(device)
    attach(model, devices, entries={"": CPU})
    assert model(torch.tensor([[1, 2]])).device == CPU
    # The indices and what is looked up; then the second block's input, and the output: nothing between block and head.
    assert [device for _, device in moves] == [META, CPU, META, CPU]


def test_what_a_layer_around_a_layer_adds_to_is_where_the_layer_is(moves):
    """As PEFT does with an adapted head: its output must not have moved already."""

    class Around(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.more = layer, nn.Linear(8, 3).to(META)

        def forward(self, x):
            return self.layer(x) + self.more(x.to(META))

    model = nn.Sequential()
    model.body, model.head = nn.Linear(8, 8), nn.Linear(8, 3).to(META)
    attach(model, {"body": CPU, "head": META}, entries={"": CPU})
    model.head = Around(model.head)
    assert model(torch.ones(2, 8)).device == CPU
