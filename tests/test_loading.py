"""Plain modules, end to end: what is loaded computes what a dequantized reference computes."""

import contextlib
import copy
import gc
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes as bnb
import pytest
import torch
from checkpoints import empty, save, save_checkpoint
from comparisons import relative_error
from failures import raising
from models import GPT, Attended
from references import dequantized_reference
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    CheckpointError,
    ConfigError,
    QuantizationError,
    load_and_quantize_model,
    loading,
    save_quantized_model,
)
from bigload.quantization.formats import FourBit, Int8

# 4-bit layers may multiply in bfloat16 (CPUs with AVX512-BF16), int8 ones round the activations to int8: 0.1 to 0.3%
# of the output in these models. Quantizing the weights changes it by 3% and more in 4 bit.
TOLERANCE = 0.008

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")


def check_forward(full, model, mode, skip, x, torch_dtype=torch.float32):
    reference = dequantized_reference(full, mode, skip, torch_dtype)
    with torch.no_grad():
        error = relative_error(model(x.to(next(model.parameters()).device)), reference(x))
    assert error < TOLERANCE
    if mode != "int8":
        assert relative_error(full(x), reference(x)) > 3 * TOLERANCE, "a layer left unquantized would not show"
    quantized = {type(m).__name__ for m in model.modules()} & {"Linear4bit", "Linear8bitLt"}
    assert quantized == {"Linear8bitLt" if mode == "int8" else "Linear4bit"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_plain_gpt_computes_what_its_dequantized_reference_computes(tmp_path, device, mode, tied, shards):
    full = GPT(tied=tied).eval()
    folder = save_checkpoint(full, tmp_path, shards)
    model = load_and_quantize_model(empty(GPT, tied=tied).eval(), mode, folder, device_map=device)
    check_forward(full, model, mode, {"lm_head"}, torch.randint(0, 96, (2, 12)))
    assert (model.lm_head.weight is model.transformer["wte"].weight) == tied
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.wte.weight"])
def test_tied_head_loads_from_whichever_name_the_checkpoint_holds(tmp_path, kept):

    full = GPT(tied=True)
    state = full.state_dict()
    weight = state.pop("lm_head.weight")
    state.pop("transformer.wte.weight")
    save({**state, kept: weight}, tmp_path)
    model = load_and_quantize_model(empty(GPT, tied=True).eval(), "nf4", tmp_path, device_map="cpu")
    assert torch.equal(model.lm_head.weight, weight)
    assert model.lm_head.weight is model.transformer["wte"].weight
    check_forward(full.eval(), model, "nf4", {"lm_head"}, torch.randint(0, 96, (2, 12)))


def test_tied_parameters_ties_what_the_empty_model_has_untied(tmp_path):
    full = GPT(tied=True)
    save_checkpoint(full, tmp_path)
    pair = ("transformer.wte.weight", "lm_head.weight")
    model = load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map="cpu", tied_parameters=[pair])
    assert model.lm_head.weight is model.transformer["wte"].weight
    with pytest.raises(CheckpointError, match="tied_parameters=") as caught:
        load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map="cpu")
    assert caught.value.missing_keys == ["lm_head.weight"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shards", [1, 3])
def test_multihead_attention_keeps_its_projection_and_runs(tmp_path, device, mode, shards):
    full = Attended().eval()
    folder = save_checkpoint(full, tmp_path, shards)
    model = load_and_quantize_model(empty(Attended).eval(), mode, folder, device_map=device)
    assert isinstance(model.enter, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    assert type(model.attention.out_proj) is type(full.attention.out_proj)
    check_forward(full, model, mode, {"head"}, torch.randn(2, 5, 64))


@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_torchs_encoder_runs_without_the_fused_path_that_reads_its_weights(device, mode):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    full = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = full(x)
        config = BnbQuantizationConfig.from_mode(mode, torch_dtype="fp32")
        model = load_and_quantize_model(full, config, device_map=device)
        assert isinstance(model.layers[0].linear1, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
        # Its random weights lose some percent to 4 bit; int8 less than one.
        tolerance = 0.1 if mode == "nf4" else 0.01
        assert relative_error(model(x.to(device)), expected) < tolerance
        padded = torch.zeros(2, 5, dtype=torch.bool, device=device)
        padded[1, 3:] = True
        found = model(x.to(device), src_key_padding_mask=padded)
        assert relative_error(found[0], expected[0]) < tolerance
        assert found[1, :3].isfinite().all()


def test_torchs_encoder_of_which_nothing_is_quantized_keeps_its_fused_path():
    full = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    config = BnbQuantizationConfig.from_mode("int8", skip_modules=["*"])
    model = load_and_quantize_model(full, config, device_map="cpu")
    assert model.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == 1


def test_every_config_spelling_gives_the_same_model(tmp_path):
    from accelerate.utils import BnbQuantizationConfig as AccelerateConfig
    from transformers import BitsAndBytesConfig

    save_checkpoint(GPT(), tmp_path)
    accelerate_config = AccelerateConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp32")
    transformers_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ours = BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="fp32")
    configs = ["nf4", ours, ours.to_dict(), accelerate_config, vars(accelerate_config).copy()]
    configs += [transformers_config, transformers_config.to_dict()]
    models = [load_and_quantize_model(empty(GPT).eval(), config, tmp_path, device_map="cpu") for config in configs]
    first = models[0].state_dict()
    for model in models[1:]:
        state = model.state_dict()
        assert state.keys() == first.keys()
        assert all(torch.equal(state[name], first[name]) for name in first)
        assert model.transformer["h"][0].attn.c_attn.compute_dtype == torch.float32


def test_the_callers_config_map_and_lists_are_not_changed(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    config = BnbQuantizationConfig.from_mode("nf4", skip_modules=["wpe"], keep_in_fp32_modules=["ln_f"])
    device_map, max_memory = {"": "cpu"}, {"cpu": "1GiB"}
    before = copy.deepcopy((config, device_map, max_memory))
    load_and_quantize_model(empty(GPT).eval(), config, tmp_path, device_map=device_map, max_memory=max_memory)
    assert (config, device_map, max_memory) == before


def test_dtypes_follow_the_config_and_fp32_modules_stay_fp32(tmp_path):
    save_checkpoint(GPT(), tmp_path, dtype=torch.float16)
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16", keep_in_fp32_modules=["ln_f", "h.1.mlp"])
    model = load_and_quantize_model(empty(GPT).eval(), config, tmp_path, device_map="cpu")
    assert model.transformer["wte"].weight.dtype == torch.bfloat16
    assert model.transformer["h"][0].ln_1.weight.dtype == torch.bfloat16
    assert model.transformer["ln_f"].weight.dtype == torch.float32
    kept = model.transformer["h"][1].mlp["c_fc"]
    assert type(kept) is nn.Linear
    assert kept.weight.dtype == kept.bias.dtype == torch.float32
    by_mode = load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map="cpu")
    assert by_mode.lm_head.weight.dtype == torch.float16  # the checkpoint's own
    assert by_mode.transformer["h"][0].attn.c_attn.compute_dtype == torch.float16
    by_accelerates_rule = load_and_quantize_model(
        empty(GPT).eval(),
        BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bf16"),
        tmp_path,
        device_map="cpu",
    )
    assert by_accelerates_rule.lm_head.weight.dtype == torch.bfloat16


def test_skip_everything_is_the_unquantized_load(tmp_path):
    full = GPT()
    save_checkpoint(full, tmp_path)
    config = BnbQuantizationConfig.from_mode("int8", skip_modules=["*"])
    model = load_and_quantize_model(empty(GPT).eval(), config, tmp_path, device_map="cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), full.parameters(), strict=True))
    assert not model.is_loaded_in_8bit
    assert not model.is_loaded_in_4bit


def test_mode_hooks_and_attributes_of_a_replaced_layer_stay(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    model = empty(GPT).eval()
    calls = []
    layer = model.transformer["h"][0].attn.c_proj
    handle = layer.register_forward_hook(lambda module, args, out: calls.append(type(module).__name__))
    layer.tag = "kept"
    model = load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    new = model.transformer["h"][0].attn.c_proj
    assert new.tag == "kept"
    assert not any(module.training for module in model.modules())
    model(torch.zeros(1, 3, dtype=torch.long))
    handle.remove()
    model(torch.zeros(1, 3, dtype=torch.long))
    assert calls == ["Linear4bit"]


def test_backward_hooks_of_a_replaced_layer_stay_of_their_kind(tmp_path):
    """Both kinds are kept in one dict; a flag tells them apart, and those for all gradients get tuples of them."""
    save_checkpoint(GPT(), tmp_path)
    model = empty(GPT)
    seen = []
    layer = model.transformer["h"][0].attn.c_proj
    layer.register_full_backward_hook(lambda module, inputs, outputs: seen.append((type(module).__name__, outputs)))
    model = load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    new = model.transformer["h"][0].attn.c_proj
    new(torch.ones(1, 3, new.in_features, requires_grad=True)).sum().backward()
    ((name, outputs),) = seen
    assert (name, outputs[0].shape) == ("Linear4bit", (1, 3, new.out_features))
    with pytest.raises(RuntimeError, match="Cannot use both"):
        new.register_backward_hook(lambda *args: None)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_load_state_dict_hooks_of_a_replaced_layer_get_the_new_layer(tmp_path, mode):
    save_checkpoint(GPT(), tmp_path)
    model = empty(GPT).eval()
    seen = []
    layer = model.transformer["h"][0].attn.c_proj
    layer.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    del layer
    model = load_and_quantize_model(model, mode, tmp_path, device_map="cpu")
    seen.clear()  # the hook has run on a stand-in, to see what it renames
    model.load_state_dict({}, strict=False)
    assert seen == [model.transformer["h"][0].attn.c_proj]


def test_requires_grad_stays_for_kept_weights_and_is_off_for_quantized_layers(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    model = empty(GPT).eval()
    model.transformer["wpe"].weight.requires_grad_(False)
    model = load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert model.transformer["wte"].weight.requires_grad
    assert not model.transformer["wpe"].weight.requires_grad
    layer = model.transformer["h"][0].attn.c_attn
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_a_shared_layer_stays_one_layer(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = self.first
            self.norm = nn.LayerNorm(64)

    save_checkpoint(Twice(), tmp_path)
    model = load_and_quantize_model(empty(Twice).eval(), "nf4", tmp_path, device_map="cpu")
    assert isinstance(model.first, bnb.nn.Linear4bit)
    assert model.first is model.second


def test_a_model_that_is_one_linear_is_returned_as_its_quantized_layer(tmp_path):
    full = nn.Linear(64, 32)
    save_checkpoint(full, tmp_path)
    loaded = load_and_quantize_model(empty(nn.Linear, 64, 32), "int8", tmp_path, device_map="cpu")
    assert isinstance(loaded, bnb.nn.Linear8bitLt)
    assert loaded.is_loaded_in_8bit


def test_buffers_come_from_the_checkpoint_or_stay(tmp_path):
    class Buffered(nn.Module):
        def __init__(self, scale=0.0):
            super().__init__()
            self.body = nn.Linear(64, 64)
            self.norm = nn.LayerNorm(64)
            self.register_buffer("stored", torch.full((3,), scale))
            self.register_buffer("count", torch.tensor(7))
            self.register_buffer("table", torch.arange(4.0), persistent=False)

    full = Buffered(scale=2.0)
    save_checkpoint(full, tmp_path)
    config = BnbQuantizationConfig.from_mode("nf4", torch_dtype="bf16")
    model = load_and_quantize_model(empty(Buffered).eval(), config, tmp_path, device_map="cpu")
    assert torch.equal(model.stored, torch.full((3,), 2.0, dtype=torch.bfloat16))
    assert torch.equal(model.count, torch.tensor(7))
    assert torch.equal(model.table, torch.arange(4.0))  # computed by the model, in the dtype it chose


def test_int8_training_trains_its_16_bit_main_weights(tmp_path, device):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 32)
            self.head = nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.body(x).relu())

    save_checkpoint(Net(), tmp_path, dtype=torch.float16)
    config = BnbQuantizationConfig.from_mode("int8-training", llm_int8_threshold=0.0)
    model = load_and_quantize_model(empty(Net).eval(), config, tmp_path, device_map=device).train()
    assert isinstance(model.body, bnb.nn.Linear8bitLt)
    assert model.body.state.has_fp16_weights
    assert model.body.weight.dtype == torch.float16
    assert model.body.weight.requires_grad
    before = model.body.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, wanted = torch.randn(2, 8, 64, device=device).half(), torch.randn(2, 8, 4, device=device).half()
    losses = []
    for _ in range(8):
        loss = nn.functional.mse_loss(model(x).float(), wanted.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model.body.weight, before)


def test_int8_training_refuses_weights_that_float16_cannot_hold(tmp_path):
    full = GPT()
    with torch.no_grad():
        full.transformer["h"][0].attn.c_attn.weight[0, 0] = 1e5
    save_checkpoint(full, tmp_path)
    with pytest.raises(QuantizationError, match=r"h\.0\.attn\.c_attn\.weight.*float16"):
        load_and_quantize_model(empty(GPT).eval(), "int8-training", tmp_path, device_map="cpu")


def test_two_loads_at_once_in_threads_are_both_right(tmp_path, device, usual_threads):
    full = GPT()
    save_checkpoint(full, tmp_path)
    expected = load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map=device).state_dict()
    with ThreadPoolExecutor(4) as pool:
        loads = [
            pool.submit(lambda: load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map=device))
            for _ in range(8)
        ]
        states = [load.result().state_dict() for load in loads]
    assert all(torch.equal(state[name], expected[name]) for state in states for name in expected)


def test_int8_training_main_weights_of_a_float32_checkpoint_are_16_bit(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    model = load_and_quantize_model(empty(GPT).eval(), "int8-training", tmp_path, device_map="cpu")
    assert model.transformer["h"][0].attn.c_attn.weight.dtype == torch.float16


def test_load_inside_inference_mode_gives_a_model_that_can_be_trained_through(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    with torch.inference_mode():
        model = load_and_quantize_model(empty(GPT).eval(), "nf4-dq", tmp_path, device_map="cpu")
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.train()(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert model.transformer["wte"].weight.grad is not None


def test_logs_one_line_for_the_plan_and_one_for_the_load(tmp_path, logged):
    save_checkpoint(GPT(), tmp_path)
    with logged.at_level(logging.INFO, logger="bigload"):
        model = load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map="cpu")
    lines = [record.getMessage() for record in logged.records if record.levelno == logging.INFO]
    assert len(lines) == 2
    assert lines[1] == str(model.load_report)
    size = sum(tensor.nbytes for tensor in GPT().state_dict().values())
    assert model.load_report.bytes_read == size


def test_progress_bar_counts_all_bytes(tmp_path, capsys):
    save_checkpoint(GPT(), tmp_path)
    load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map="cpu", progress=True)
    assert "loading" in capsys.readouterr().err
    load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map="cpu", progress=False)
    assert capsys.readouterr().err == ""


def test_device_map_spellings_put_the_model_on_one_device(tmp_path, device):
    save_checkpoint(GPT(), tmp_path)
    place = 0 if device.type == "cuda" else "cpu"
    expected = 0 if device.type == "cuda" else torch.device("cpu")
    blocks = {"transformer.wte": place, "transformer.wpe": place, "transformer.h": place, "transformer.ln_f": place}
    maps = [place, str(device), device, {"": place}, {"": device}, {**blocks, "lm_head": str(device)}]
    for device_map in maps:
        model = load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map=device_map)
        assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {device}
        assert set(model.hf_device_map.values()) == {expected}
    assert model.hf_device_map == dict.fromkeys([*blocks, "lm_head"], expected)


@pytest.mark.parametrize("device_map", [None, "auto", "balanced", "balanced_low_0", "sequential"])
def test_default_place_is_the_gpu_or_where_there_is_none_the_cpu(tmp_path, device_map):
    save_checkpoint(GPT(), tmp_path)
    model = load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, device_map=device_map)
    expected = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
    assert model.hf_device_map == {"": expected}


def test_planned_bytes_are_the_bytes_in_memory(tmp_path):
    save_checkpoint(GPT(tied=True), tmp_path)
    for mode in MODES:
        model = load_and_quantize_model(empty(GPT, tied=True).eval(), mode, tmp_path, device_map="cpu")
        held = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, bnb.nn.Int8Params):
                held[weight.SCB.data_ptr()] = weight.SCB
            if isinstance(weight, bnb.nn.Params4bit):
                state = weight.quant_state
                parts = [state.absmax, state.code]
                parts += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
                held |= {part.data_ptr(): part for part in parts}
        assert model.load_report.nbytes == sum(tensor.nbytes for tensor in held.values())


def test_offload_that_is_no_config_of_it_is_refused(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    with pytest.raises(ConfigError, match="OffloadConfig"):
        load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, offload=object())


def test_error_says_what_was_loaded_how_and_where_to(tmp_path):
    save_checkpoint(GPT(width=128), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_and_quantize_model(empty(GPT).eval(), "nf4-dq", tmp_path, device_map="cpu")
    assert str(tmp_path) in str(caught.value)
    assert "nf4-dq" in str(caught.value)
    assert "device_map='cpu'" in str(caught.value)


def test_bad_tied_parameters_are_refused(tmp_path):
    save_checkpoint(GPT(), tmp_path)
    for bad in (5, "lm_head.weight", [5], [([], 2)], [("lm_head.weight",)]):
        with pytest.raises(ConfigError, match="tied_parameters"):
            load_and_quantize_model(empty(GPT).eval(), "nf4", tmp_path, tied_parameters=bad)
    with pytest.raises(ConfigError, match=r"lm_haed\.weight"):
        load_and_quantize_model(
            empty(GPT).eval(), "nf4", tmp_path, tied_parameters=[("transformer.wte.weight", "lm_haed.weight")]
        )


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_collector_of_cycles_rests_while_a_model_is_loaded_and_is_as_it_was_afterwards(tmp_path, enabled, fails):
    save_checkpoint(GPT(), tmp_path)
    seen = []

    def rename(key):
        seen.append(gc.isenabled())
        return f"other.{key}" if fails else key

    model = empty(GPT)
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(CheckpointError) if fails else contextlib.nullcontext():
            load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu", key_mapping=rename)
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()
    assert seen
    assert not any(seen)


# What is begun ahead


@pytest.fixture
def ahead(monkeypatch):
    """A GPU that only what is begun ahead hears of, and the kernels that it was to load."""
    found, gpu = [], torch.device("cuda:0")
    monkeypatch.setattr(loading, "named_devices", lambda device_map: [gpu])
    monkeypatch.setattr(loading, "pin_ahead", lambda device: None)
    monkeypatch.setattr(loading, "load_kernels", lambda *what: found.append(what))
    yield found
    assert all(device == gpu for *_, device in found)
    assert not [thread for thread in threading.enumerate() if thread.name == "bigload kernels"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("nf4", (FourBit("nf4", 64, False, torch.uint8), torch.bfloat16)),
        ("fp4-dq", (FourBit("fp4", 64, True, torch.uint8), torch.bfloat16)),
        ("int8", (Int8(), torch.bfloat16)),
        (BnbQuantizationConfig(load_in_4bit=True), (FourBit("fp4", 64, False, torch.uint8), torch.float16)),
        ("none", None),
        ("int8-training", None),
    ],
)
def test_kernels_of_the_mode_are_loaded_while_the_plan_is_made(tmp_path, ahead, config, expected):
    full = GPT()
    load_and_quantize_model(empty(GPT), config, save_checkpoint(full, tmp_path), device_map="cpu")
    assert [what[:2] for what in ahead] == ([] if expected is None else [expected])


def test_no_kernel_is_loaded_ahead_for_weights_that_are_quantized_already_or_in_memory(tmp_path, ahead):
    model = load_and_quantize_model(GPT(), "nf4", device_map="cpu")
    save_quantized_model(model, tmp_path / "saved")
    load_and_quantize_model(empty(GPT), None, tmp_path / "saved", device_map="cpu")
    assert ahead == []


def test_kernels_that_cannot_be_loaded_ahead_are_no_matter(tmp_path, ahead, monkeypatch, logged):
    monkeypatch.setattr(loading, "load_kernels", raising(RuntimeError("no kernel image")))
    logged.set_level(logging.DEBUG, "bigload")
    full = GPT()
    model = load_and_quantize_model(empty(GPT), "nf4", save_checkpoint(full, tmp_path), device_map="cpu")
    assert model.is_loaded_in_4bit
    assert "loading kernels ahead failed: no kernel image" in logged.text


def test_a_load_that_fails_waits_for_the_kernels(tmp_path, ahead, monkeypatch):
    held = threading.Event()

    def slow(*what):
        assert held.wait(60)
        ahead.append(what)

    monkeypatch.setattr(loading, "load_kernels", slow)
    folder = save_checkpoint(GPT(), tmp_path)
    threading.Timer(0.2, held.set).start()
    with pytest.raises(CheckpointError):
        load_and_quantize_model(empty(Attended), "nf4", folder, device_map="cpu")
    assert len(ahead) == 1
