"""Weights stored quantized whose parts contradict each other or the model are refused by name; nothing is touched."""

import json

import pytest
import torch
from checkpoints import empty, save
from comparisons import assert_same_bits, identity_of
from references import FOUR_BIT, quantized_state, stored_by_bitsandbytes
from torch import nn

from bigload import CheckpointError, load_and_quantize_model

MODES = (*FOUR_BIT, "int8")
ABSENT = object()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(80, 48)
        self.norm = nn.LayerNorm(48)
        self.second = nn.Linear(48, 7)
        self.head = nn.Linear(7, 3)


class Lone(nn.Module):
    """One quantized layer: nothing else in the file tells how it was stored."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(80, 48)
        self.head = nn.Linear(48, 3)


def refused(folder, device, mode, damage, build=Layers, match=r"'first\.(weight|SCB)"):
    """Load what was damaged, which is refused by name, and then, into the same model, what was not."""
    state = quantized_state(build(), mode, device)
    damaged = dict(state)
    damage(damaged)
    model = empty(build)
    before = identity_of(model)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_and_quantize_model(model, None, save(damaged, folder / "damaged"), device_map=device)
    assert identity_of(model) == before
    good = load_and_quantize_model(model, None, save(state, folder / "good"), device_map=device, strict=True)
    assert_same_bits(good.state_dict(), state)
    return caught.value


def parts_of(mode, described=True):
    """Name the tensors of one weight."""
    if mode == "int8":
        return ["first.weight", "first.SCB"]
    names = ["absmax", "quant_map"] + (["nested_absmax", "nested_quant_map"] if mode.endswith("-dq") else [])
    names += [f"quant_state.bitsandbytes__{mode[:3]}"] if described else []
    return ["first.weight", *(f"first.weight.{name}" for name in names)]


EVERY_PART = [(mode, part) for mode in MODES for part in parts_of(mode)]
EVERY_TENSOR = [(mode, part) for mode in MODES for part in parts_of(mode, described=False)]


@pytest.mark.parametrize(("mode", "part"), EVERY_PART)
def test_each_missing_part_is_refused(tmp_path, device, mode, part):
    refused(tmp_path, device, mode, lambda state: state.pop(part))


@pytest.mark.parametrize(("mode", "part"), [case for case in EVERY_PART if case[0] != "int8"])
def test_each_missing_part_of_the_only_quantized_weight_is_refused(tmp_path, device, mode, part):
    refused(tmp_path, device, mode, lambda state: state.pop(part), Lone)


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_scales_without_a_weight_and_its_description_are_refused(tmp_path, device, mode):
    def damage(state):
        del state["first.weight"], state[parts_of(mode)[-1]]

    refused(tmp_path, device, mode, damage)


def shorter(tensor):
    return tensor[:-1]


def longer(tensor):
    return torch.cat([tensor, tensor[:1]])


def of_another_rank(tensor):
    return tensor.reshape(-1) if tensor.dim() > 1 else tensor.unsqueeze(0)


@pytest.mark.parametrize("change", [shorter, longer, of_another_rank])
@pytest.mark.parametrize(("mode", "part"), EVERY_TENSOR)
def test_each_part_of_the_wrong_shape_is_refused(tmp_path, device, mode, part, change):
    def damage(state):
        state[part] = change(state[part])

    refused(tmp_path, device, mode, damage)


def dtype_of(mode, part):
    if part.endswith("SCB") or part.endswith("quant_map") or "nested" in part:
        return torch.float32
    if part.endswith("absmax"):
        return torch.uint8 if mode.endswith("-dq") else torch.float32
    return torch.int8 if mode == "int8" else torch.uint8


OTHER_DTYPES = [
    (mode, part, dtype)
    for mode, part in EVERY_PART
    for dtype in (torch.float16, torch.float32, torch.uint8, torch.int8, torch.int64, torch.bool)
    # A floating weight beside an SCB is a plain one.
    if dtype != dtype_of(mode, part) and not (part == "first.weight" and mode == "int8" and dtype.is_floating_point)
]


@pytest.mark.parametrize(("mode", "part", "dtype"), OTHER_DTYPES, ids=str)
def test_each_part_of_the_wrong_dtype_is_refused(tmp_path, device, mode, part, dtype):
    def damage(state):
        assert state[part].dtype == dtype_of(mode, part)
        state[part] = state[part].to(dtype)

    refused(tmp_path, device, mode, damage)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn], ids=str)
def test_packed_bytes_in_a_dtype_that_bitsandbytes_packs_into_nowhere_are_refused(tmp_path, device, dtype):
    def damage(state):
        state["first.weight"] = state["first.weight"].view(dtype)

    refused(tmp_path, device, "nf4", damage, Lone)


def rewritten(state, change):
    """Change the bytes that describe a 4-bit weight."""
    (name,) = (name for name in state if name.startswith("first.weight.quant_state."))
    raw = change(bytes(state[name].numpy()))
    state[name] = torch.tensor(list(raw), dtype=torch.uint8)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x00", b"{", b"\xff\xfe{}", b"not JSON", b"[]", b"null", b"3", b'"nf4"', b"{}", b"[" * 200_000],
    ids=lambda raw: repr(raw[:8]),
)
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_description_that_is_no_json_object_is_refused(tmp_path, device, mode, raw):
    refused(tmp_path, device, mode, lambda state: rewritten(state, lambda _: raw))


def test_description_that_is_cut_is_refused(tmp_path, device):
    refused(tmp_path, device, "nf4-dq", lambda state: rewritten(state, lambda raw: raw[:-1]))


# Each is a lie about a weight of (48, 80), in blocks of 64.
LIES = {
    "shape": [
        *[ABSENT, None, 3840, "48x80", {"rows": 48}, ["48", "80"], [48.0, 80.0], [True, 3840], [-48, -80]],
        *[[], [3840], [48], [48, 81], [47, 80], [24, 80], [48, 80, 1], [48, 80, 0], [10**30, 10**30]],
    ],
    "blocksize": [ABSENT, None, 0, 1, 63, -64, 32, 128, 256, 4096, "64", 64.0, [64], True, 10**30],
    "dtype": [ABSENT, None, "", "float", "float64", "int8", "torch.bfloat16", "Tensor", 16, ["float32"], {}],
    "quant_type": [ABSENT, None, "", "nf", "int8", "NF4", ["nf4"], 4],
}
NESTED_LIES = {
    "nested_blocksize": [ABSENT, None, 0, 64, 128, 512, "256", [256]],
    "nested_dtype": [ABSENT, None, "float16", "bfloat16", "int8", ["float32"]],
    "nested_offset": [ABSENT, None, "0.5", [0.5], {}],
}


def told(state, key, lie):
    def change(raw):
        described = json.loads(raw)
        assert repr(described.pop(key)) != repr(lie)
        return json.dumps(described if lie is ABSENT else described | {key: lie}).encode()

    rewritten(state, change)


def lies(of):
    return [pytest.param(key, lie, id=f"{key}-{'absent' if lie is ABSENT else lie}") for key in of for lie in of[key]]


@pytest.mark.parametrize(("key", "lie"), lies(LIES))
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq"])
def test_description_that_lies_is_refused(tmp_path, device, mode, key, lie):
    refused(tmp_path, device, mode, lambda state: told(state, key, lie))


@pytest.mark.parametrize(("key", "lie"), lies(NESTED_LIES))
def test_description_that_lies_of_the_nested_scales_is_refused(tmp_path, device, key, lie):
    refused(tmp_path, device, "nf4-dq", lambda state: told(state, key, lie))


@pytest.mark.parametrize("mode", FOUR_BIT)
def test_description_of_another_type_than_its_name_is_refused_with_both(tmp_path, device, mode):
    other = {"nf4": "fp4", "fp4": "nf4"}[mode[:3]]
    error = refused(tmp_path, device, mode, lambda state: told(state, "quant_type", other))
    assert f"'{mode[:3]}'" in str(error)
    assert f"'{other}'" in str(error)


def test_shape_whose_bytes_do_not_divide_into_the_stored_dtype_is_refused(tmp_path, device):
    """9 values are 5 bytes, and no whole number of bfloat16."""

    def damage(state):
        state["first.weight"] = state["first.weight"].view(-1).view(torch.bfloat16).view(-1, 1)
        told(state, "shape", [3, 3])

    error = refused(tmp_path, device, "nf4", damage)
    assert "cannot be stored like this: 5 packed bytes do not divide into elements of torch.bfloat16" in str(error)


@pytest.mark.parametrize("mode", ["nf4", "fp4-dq"])
def test_weight_that_is_described_twice_is_refused(tmp_path, device, mode):
    def damage(state):
        name = parts_of(mode)[-1]
        other = {"nf4": "fp4", "fp4": "nf4"}[mode[:3]]
        told_other = dict(state)
        told(told_other, "quant_type", other)
        state[name.replace(mode[:3], other)] = told_other[name]

    refused(tmp_path, device, mode, damage)


def test_description_in_a_form_of_its_own_is_refused(tmp_path, device):
    def damage(state):
        state["first.weight.quant_state.bitsandbytes__nf5"] = state.pop(parts_of("nf4")[-1])

    refused(tmp_path, device, "nf4", damage)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("mode", "part"), [("nf4", "weight.absmax"), ("nf4-dq", "weight.nested_absmax"), ("int8", "SCB")]
)
def test_scales_that_are_not_finite_are_refused(tmp_path, device, mode, part, value):
    def damage(state):
        scales = state[f"first.{part}"]
        state[f"first.{part}"] = torch.cat([torch.tensor([value]), scales[1:]])

    refused(tmp_path, device, mode, damage)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_nested_offset_that_is_not_finite_is_refused(tmp_path, device, value):
    refused(tmp_path, device, "nf4-dq", lambda state: told(state, "nested_offset", value))


@pytest.mark.parametrize("layout", [1, 2, 3, 255])
def test_int8_rows_in_another_layout_are_refused(tmp_path, device, layout):
    def damage(state):
        state["first.weight_format"] = torch.tensor(layout, dtype=torch.uint8)

    refused(tmp_path, device, "int8", damage)


def test_int8_weight_beside_a_description_of_4_bits_is_refused(tmp_path, device):
    def damage(state):
        state |= stored_by_bitsandbytes("first.weight", torch.rand(48, 80), "int8")

    refused(tmp_path, device, "nf4", damage)


def model_class(name, make):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = make()
            self.second = nn.Linear(7, 5)

    Model.__name__ = name
    return Model


def integers():
    made = nn.Module()
    made.register_buffer("weight", torch.zeros(48, 80, dtype=torch.int8))
    return made


OTHER_MODELS = [
    model_class("wider", lambda: nn.Linear(96, 48, bias=False)),
    model_class("transposed", lambda: nn.Linear(48, 80, bias=False)),
    model_class("embedding", lambda: nn.Embedding(48, 80)),
    model_class("transposed embedding", lambda: nn.Embedding(80, 48)),
    model_class("norm", lambda: nn.LayerNorm(80, bias=False)),
    model_class("matrix norm", lambda: nn.LayerNorm((48, 80), bias=False)),
    model_class("convolution", lambda: nn.Conv1d(80, 48, 1, bias=False)),
    model_class("integers", integers),
]


@pytest.mark.parametrize("build", OTHER_MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_model_that_has_no_such_layer_for_a_quantized_weight_is_refused(tmp_path, device, mode, build):
    state = quantized_state(Layers(), mode, device, skip=("second", "head"))
    state = {name: tensor for name, tensor in state.items() if name != "first.bias"}
    state |= {"second.weight": torch.rand(5, 7), "second.bias": torch.rand(5)}
    model = empty(build)
    before = identity_of(model)
    with pytest.raises(CheckpointError, match=r"'first\.weight'"):
        load_and_quantize_model(model, None, save(state, tmp_path / "quantized"), device_map=device)
    assert identity_of(model) == before
    right = build().state_dict()
    good = load_and_quantize_model(model, "nf4", save(right, tmp_path / "right"), device_map=device, strict=True)
    assert torch.equal(good.second.bias.cpu(), right["second.bias"])


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_shape_that_differs_from_the_models_is_refused_with_both(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    state |= {k: v.cpu() for k, v in stored_by_bitsandbytes("first.weight", torch.rand(48, 96), mode).items()}
    model = empty(Layers)
    with pytest.raises(CheckpointError, match=r"'first\.weight'") as caught:
        load_and_quantize_model(model, None, save(state, tmp_path), device_map=device)
    assert caught.value.mismatched_shapes == {"first.weight": ((48, 96), (48, 80))}
    assert all(shape in str(caught.value) for shape in ("(48, 96)", "(48, 80)"))


@pytest.mark.parametrize("mode", MODES)
def test_quantized_layer_that_the_checkpoint_lacks_is_missing_by_name(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("second")}
    model = empty(Layers)
    with pytest.raises(CheckpointError, match="not found in") as caught:
        load_and_quantize_model(model, None, save(kept, tmp_path), device_map=device)
    assert caught.value.missing_keys == ["second.weight", "second.bias"]


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_file_that_is_cut_is_refused_and_the_whole_one_loads_after_it(tmp_path, device, mode):
    state = quantized_state(Layers(), mode, device)
    path = save(state, tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    model = empty(Layers)
    before = identity_of(model)
    for size in (len(whole) - 1, len(whole) // 2, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_and_quantize_model(model, None, tmp_path, device_map=device)
        assert identity_of(model) == before
    path.write_bytes(whole)
    assert_same_bits(load_and_quantize_model(model, None, tmp_path, device_map=device).state_dict(), state)
