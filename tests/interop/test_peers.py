"""What users of accelerate and transformers stumble over when they load on one device, and do not here.

Each test first states, where a CPU can show it, what the peer does with the same thing.
"""

import copy
import cProfile
import json

import accelerate
import accelerate.utils.bnb
import bitsandbytes as bnb
import pytest
import torch
from accelerate.utils.bnb import get_keys_to_not_convert, get_quantized_model_device_map, replace_with_bnb_layers
from architectures import build, inputs
from checkpoints import empty, save_checkpoint
from comparisons import outputs, relative_error
from models import GPT, Attended, llama
from references import dequantized_reference
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from bigload import (
    BnbQuantizationConfig,
    CheckpointError,
    PlacementError,
    QuantizationError,
    load_and_quantize_model,
    plan_device_map,
)


def accelerates(**fields):
    """accelerate's own config."""
    return accelerate.utils.BnbQuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **fields)


def config(mode="nf4", **fields):
    return BnbQuantizationConfig.from_mode(mode, **fields)


def quantized(model):
    """The paths of the layers that are bitsandbytes' own."""
    layers = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {path for path, module in model.named_modules() if isinstance(module, layers)}


def linears(model):
    return {path for path, module in model.named_modules() if type(module) is nn.Linear}


def load_as_transformers(model_class, folder, mode="nf4", **fields):
    mode = {"load_in_8bit": True} if mode == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": mode}
    quantization = BitsAndBytesConfig(**mode, **fields)
    return model_class.from_pretrained(
        folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()


@pytest.fixture
def weights_location(tmp_path):
    return save_checkpoint(GPT(), tmp_path / "gpt")


def test_model_loads_and_runs_on_a_cpu_alone(weights_location):
    # accelerate: 4 bit on the CPU is refused, whatever the map.
    with pytest.raises(ValueError, match="dispatched on the CPU"):
        accelerate.utils.load_and_quantize_model(empty(GPT), accelerates(), weights_location, device_map={"": "cpu"})
    tokens = torch.randint(0, 96, (2, 12))
    for mode in ("nf4", "int8"):
        model = load_and_quantize_model(empty(GPT), mode, weights_location, device_map={"": "cpu"}).eval()
        assert len(quantized(model)) == 8
        full = GPT().eval()
        load_and_quantize_model(full, config(mode, skip_modules=["*"]), weights_location, device_map="cpu")
        reference = dequantized_reference(full, mode, {"lm_head"}, torch.float32)(tokens)
        with torch.no_grad():
            assert relative_error(model(tokens), reference) < 0.01


def test_missing_keys_are_all_reported_before_the_model_is_touched(tmp_path):
    gone = {f"transformer.h.{i}.{part}.c_proj.bias" for i in (0, 1) for part in ("attn", "mlp")}
    kept = {name: tensor for name, tensor in GPT().state_dict().items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # accelerate: says nothing; the tensors stay on meta until something runs.
    model = empty(GPT)
    accelerate.load_checkpoint_in_model(model, tmp_path, device_map={"": "cpu"})
    assert {name for name, parameter in model.named_parameters() if parameter.is_meta} == gone
    with pytest.raises(CheckpointError) as caught:
        load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map="cpu")
    assert set(caught.value.missing_keys) == gone
    assert all(name in str(caught.value) for name in gone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keep_in_fp32_modules_are_fp32_under_every_dtype(weights_location, dtype):
    # accelerate: obeys the list under float16 only.
    model, options = empty(GPT), {"dtype": dtype, "keep_in_fp32_modules": ["ln_f"]}
    accelerate.load_checkpoint_in_model(model, weights_location, device_map={"": "cpu"}, **options)
    assert (model.transformer["ln_f"].weight.dtype == torch.float32) == (dtype == torch.float16)
    ours = config(torch_dtype=dtype, keep_in_fp32_modules=["ln_f", "c_fc"])
    model = load_and_quantize_model(empty(GPT), ours, weights_location, device_map="cpu")
    assert model.transformer["ln_f"].weight.dtype == torch.float32
    assert model.transformer["h"][0].mlp["c_fc"].weight.dtype == torch.float32
    assert model.transformer["h"][0].ln_1.weight.dtype == dtype
    assert not any("c_fc" in path for path in quantized(model))


class Crossed(nn.Module):
    """Twelve blocks with names that contain one another."""

    def __init__(self):
        super().__init__()
        names = ("fc1", "attn", "cross_attn")
        blocks = (nn.ModuleDict({name: nn.Sequential(nn.Linear(64, 64)) for name in names}) for _ in range(12))
        self.h = nn.ModuleList(blocks)


@pytest.mark.parametrize(
    ("pattern", "skipped"),
    [
        ("0.fc1", {"h.0.fc1.0"}),
        ("1", {"h.1.fc1.0", "h.1.attn.0", "h.1.cross_attn.0"}),
        ("attn", {f"h.{i}.attn.0" for i in range(12)}),
    ],
)
def test_skip_rule_names_whole_components_of_a_path(pattern, skipped):
    # accelerate: "0.fc1" matches nothing, "1" hits h.11 too, "attn" hits cross_attn too.
    theirs = linears(replace_with_bnb_layers(Crossed(), accelerates(), [pattern]))
    assert theirs != skipped
    model = load_and_quantize_model(Crossed(), config(skip_modules=[pattern]), device_map="cpu")
    assert linears(model) == skipped


class BodyLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 8)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def test_body_is_quantized_when_it_is_the_last_child():
    # accelerate: skips the last child whatever it is, so only the head is quantized.
    theirs = replace_with_bnb_layers(BodyLast(), accelerates(), get_keys_to_not_convert(BodyLast()))
    assert quantized(theirs) == {"head"}
    assert quantized(load_and_quantize_model(BodyLast(), "nf4", device_map="cpu")) >= {"body.0", "body.1"}


def test_callers_config_lists_and_maps_are_never_changed(weights_location):
    def load(load_and_quantize_model, given):
        kept = {"device_map": {"transformer": "cpu", "lm_head": "cpu"}, "max_memory": {"cpu": "1GB"}}
        before = copy.deepcopy((given, kept))
        load_and_quantize_model(empty(GPT), given, weights_location, **kept)
        return (given, kept) == before

    # accelerate: appends the blocks on the CPU and those kept in fp32 to the caller's own list.
    given = accelerates(skip_modules=["lm_head"])
    with pytest.raises(SafetensorError):
        accelerate.utils.load_and_quantize_model(
            empty(GPT),
            given,
            weights_location,
            device_map={"transformer": "cpu", "lm_head": torch.device("cpu")},
        )
    assert given.skip_modules != ["lm_head"]
    fields = {"skip_modules": ["lm_head"], "keep_in_fp32_modules": ["ln_f"]}
    for given in (config(**fields), accelerates(**fields), accelerates(), {"load_in_4bit": True, **fields}):
        assert load(load_and_quantize_model, given)


def test_subclass_of_linear_stays_and_computes():
    # accelerate: replaces MultiheadAttention's out_proj, whose weight is read past its forward.
    theirs = replace_with_bnb_layers(Attended(), accelerates(), ["head"])
    assert type(theirs.attention.out_proj) is bnb.nn.Linear4bit
    full = Attended().eval()
    reference = dequantized_reference(full, "nf4", {"head"}, torch.float32)
    model = load_and_quantize_model(full, "nf4", device_map="cpu")
    assert quantized(model) == {"enter", "leave"}
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert relative_error(model(x), reference(x)) < 0.01


def test_conv1d_is_quantized():
    sizes = GPT2Config(vocab_size=96, n_positions=32, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    # accelerate: knows no Conv1D, so nothing of GPT-2's body is quantized.
    assert not quantized(replace_with_bnb_layers(GPT2LMHeadModel(sizes), accelerates(), ["lm_head"]))
    assert len(quantized(load_and_quantize_model(GPT2LMHeadModel(sizes), "nf4", device_map="cpu"))) == 4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_replaced_layers_are_in_the_mode_of_the_model(training):
    # accelerate: replaced layers are in train mode, also in an eval model.
    theirs = replace_with_bnb_layers(GPT().train(training), accelerates(), ["lm_head"])
    assert all(theirs.get_submodule(path).training for path in quantized(theirs))
    model = load_and_quantize_model(GPT().train(training), "nf4", device_map="cpu")
    assert {module.training for module in model.modules()} == {training}


def test_weights_of_wrong_shapes_are_all_refused(tmp_path):
    save_checkpoint(GPT(width=128), tmp_path)
    model = empty(GPT)
    # accelerate: puts a weight of any shape into a 4-bit layer.
    theirs = nn.ModuleDict({"lm_head": empty(nn.Linear, 64, 96, False)})
    with accelerate.init_empty_weights():
        theirs = replace_with_bnb_layers(theirs, accelerates(), [])
    accelerate.load_checkpoint_in_model(theirs, tmp_path, device_map={"": "cpu"}, dtype=torch.float16)
    assert theirs["lm_head"].weight.numel() == 96 * 128 // 2
    assert theirs["lm_head"].in_features == 64
    with pytest.raises(CheckpointError) as caught:
        load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu")
    assert caught.value.mismatched_shapes["lm_head.weight"] == ((96, 128), (96, 64))
    assert len(caught.value.mismatched_shapes) == len(list(model.parameters()))


def test_gpu_of_the_map_is_the_one_used(tmp_path, monkeypatch):
    # accelerate: quantizes what it offloads on GPU 0, whatever the map says.
    seen = []
    monkeypatch.setattr(accelerate.utils.bnb, "set_module_tensor_to_device", lambda *given, **_: seen.append(given[2]))
    linear = nn.Linear(64, 64)
    accelerate.utils.bnb.quantize_and_offload_8bit(
        linear, linear.weight, "weight", torch.float16, tmp_path, {}, fp16_statistics=None
    )
    assert seen[0] == 0
    model = empty(GPT)
    for value in (3, "3", "cuda:3", torch.device("cuda", 3)):
        for device_map in ({"": value}, value):
            plan = plan_device_map(model, "int8", device_map=device_map)
            assert plan.execution_map == {"": torch.device("cuda", 3)}
            assert set(plan.device_bytes) == {torch.device("cuda", 3)}


def test_gpu_that_does_not_exist_is_refused_by_name(weights_location, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for value in (7, "cuda:7", torch.device("cuda", 7)):
        with pytest.raises(PlacementError, match=r"cuda:7.*0 to 1"):
            load_and_quantize_model(empty(GPT), "nf4", weights_location, device_map={"": value})


def test_device_is_taken_in_every_spelling(weights_location, device):
    # accelerate: a torch.device in a map fails in safetensors, a device instead of a map is refused.
    with pytest.raises(SafetensorError):
        accelerate.utils.load_and_quantize_model(
            empty(GPT), accelerates(), weights_location, device_map={"": torch.device("cpu")}
        )
    with pytest.raises(ValueError, match="If passing a string"):
        get_quantized_model_device_map(empty(GPT), accelerates(), "cuda:0")
    spellings = ["cpu", "cpu:0", torch.device("cpu")] if device.type == "cpu" else [0, "cuda:0", "cuda", device]
    for spelling in spellings:
        for device_map in (spelling, {"": spelling}, {"transformer": spelling, "lm_head": spelling}):
            model = load_and_quantize_model(empty(GPT), "nf4", weights_location, device_map=device_map)
            assert {tensor.device for tensor in [*model.parameters(), *model.buffers()]} == {device}


def test_ties_survive_an_empty_build(tmp_path):
    # accelerate: its init_empty_weights makes two parameters of one.
    with accelerate.init_empty_weights():
        theirs = GPT(tied=True)
    assert theirs.lm_head.weight is not theirs.transformer["wte"].weight
    save_checkpoint(GPT(tied=True), tmp_path)
    pairs = [("transformer.wte.weight", "lm_head.weight")]
    for model, tied in ((empty(GPT, 96, 64, 2, 2, 16, True), None), (theirs, pairs)):
        model = load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu", tied_parameters=tied)
        assert model.lm_head.weight is model.transformer["wte"].weight
        assert "lm_head" not in quantized(model)


def test_failed_load_leaves_the_model_as_it_was_and_a_second_try_works(tmp_path, weights_location):
    # accelerate: a load that fails leaves bitsandbytes layers without weights in the model.
    theirs = empty(GPT)
    with pytest.raises(ValueError, match="dispatched on the CPU"):
        accelerate.utils.load_and_quantize_model(theirs, accelerates(), weights_location, device_map={"": "cpu"})
    assert quantized(theirs)

    model = empty(GPT)
    before = _identity(model)
    poisoned = GPT()
    poisoned.transformer["h"][1].mlp["c_proj"].weight.data[3, 5] = float("nan")
    for location in (save_checkpoint(poisoned, tmp_path / "nan"), save_checkpoint(GPT(128), tmp_path / "large")):
        with pytest.raises((CheckpointError, QuantizationError)):
            load_and_quantize_model(model, "nf4", location, device_map="cpu")
        assert _identity(model) == before
    assert len(quantized(load_and_quantize_model(model, "nf4", weights_location, device_map="cpu"))) == 8


def _identity(model):
    return [id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())], list(vars(model))


class Wide(nn.Module):
    """A model of many small tensors, one child each two of them."""

    def __init__(self, tensors):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(1) for _ in range((tensors - 2) // 2))


def _calls(function, *arguments, **named):
    """How many Python and C functions are called."""
    with cProfile.Profile() as profile:
        function(*arguments, **named)
    return sum(entry.callcount for entry in profile.getstats())


def _each_leaf(model):
    return {path: "cpu" for path, module in model.named_modules() if not list(module.children())}


@pytest.mark.slow
def test_work_for_5000_keys_grows_with_their_number_only(tmp_path):
    # accelerate: compares every name with every entry of the map.
    models = [empty(Wide, tensors) for tensors in (250, 1000)]
    few, many = (_calls(accelerate.utils.check_device_map, model, _each_leaf(model)) for model in models)
    assert many > 12 * few
    calls = []
    for tensors in (625, 5000):
        location = save_checkpoint(Wide(tensors), tmp_path / str(tensors))
        model = empty(Wide, tensors)
        calls.append(_calls(load_and_quantize_model, model, "nf4", location, device_map=_each_leaf(model)))
        assert not any(parameter.is_meta for parameter in model.parameters())
    few, many = calls
    assert many < 8.2 * few


class Uncopyable(GPT):
    def __deepcopy__(self, memo):
        raise MemoryError("a second model does not fit")


def test_loaded_model_is_quantized_without_a_copy_and_where_the_map_says(monkeypatch):
    # accelerate: copies the model to find its head, and goes to the current GPU whatever the map says.
    with pytest.raises(MemoryError):
        get_keys_to_not_convert(Uncopyable())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="No GPU"):
        accelerate.utils.load_and_quantize_model(GPT(), accelerates(), device_map={"": "cpu"})
    monkeypatch.undo()
    model = Uncopyable()
    norm = model.transformer["ln_f"].weight
    found = load_and_quantize_model(model, "nf4", device_map={"": "cpu"})
    assert found is model
    assert found.transformer["ln_f"].weight is norm
    assert len(quantized(model)) == 8
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_folder_with_indexes_of_both_kinds_loads(tmp_path):
    full = GPT()
    save_checkpoint(full, tmp_path, shards=2)
    index = {"metadata": {}, "weight_map": dict.fromkeys(full.state_dict(), "pytorch_model-00001-of-00001.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    # accelerate: refuses the folder.
    with pytest.raises(ValueError, match=r"more than one `\.index\.json`"):
        accelerate.load_checkpoint_in_model(empty(GPT), tmp_path, device_map={"": "cpu"})
    model = load_and_quantize_model(empty(GPT), "nf4", tmp_path, device_map="cpu")
    assert torch.equal(model.lm_head.weight, full.lm_head.weight)


@pytest.mark.parametrize("name", ["gpt.safetensors", "weights.fp32.safetensors", "gpt.bin"])
def test_weights_in_a_file_of_any_name_load(tmp_path, name):
    full = GPT()
    if name.endswith(".bin"):
        torch.save(full.state_dict(), tmp_path / name)
    else:
        save_checkpoint(full, tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / name)
    # accelerate: knows two file names.
    with pytest.raises(ValueError, match="is not a folder containing"):
        accelerate.load_checkpoint_in_model(empty(GPT), tmp_path, device_map={"": "cpu"})
    for location in (tmp_path, tmp_path / name):
        model = load_and_quantize_model(empty(GPT), "nf4", location, device_map="cpu")
        assert torch.equal(model.lm_head.weight, full.lm_head.weight)


def test_partly_quantized_model_is_reloaded_by_transformers(tmp_path):
    llama(False).save_pretrained(tmp_path / "full")
    cpu = torch.device("cpu")
    device_map = {f"model.{name}": cpu for name in ("embed_tokens", "norm", "rotary_emb", "layers.1")}
    device_map |= {"model.layers.0": "cpu", "lm_head": cpu}  # "cpu", the string, is what it keeps unquantized
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_enable_fp32_cpu_offload=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=quantization, device_map=device_map, dtype=torch.float32
    )
    # transformers: forgets on saving which modules it left alone, and cannot load what it saved.
    assert quantized(theirs)
    assert not any(path.startswith("model.layers.0") for path in quantized(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours = config(skip_modules=["model.layers.0", "lm_head"])
    model = load_and_quantize_model(llama(False), ours, tmp_path / "full", device_map="cpu").eval()
    assert quantized(model) == quantized(theirs)
    model.save_pretrained(tmp_path / "ours")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert quantized(reloaded) == quantized(model)
    tokens = torch.randint(0, 128, (1, 8))
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


def test_explicit_skip_list_leaves_a_tied_head_alone_and_the_model_runs(tmp_path):
    full = llama(True).eval()
    full.save_pretrained(tmp_path)
    tokens = torch.randint(0, 128, (1, 8))
    # transformers: the list replaces its defaults, and the tied head becomes a 4-bit layer that cannot run.
    theirs = load_as_transformers(AutoModelForCausalLM, tmp_path, llm_int8_skip_modules=["q_proj"])
    assert "lm_head" in quantized(theirs)
    with pytest.raises(AssertionError), torch.no_grad():
        theirs(tokens)
    model = load_and_quantize_model(
        empty(llama, True), config(skip_modules=["q_proj"]), tmp_path, device_map="cpu"
    ).eval()
    assert len(quantized(model)) == 12
    assert not {path for path in quantized(model) if path.endswith(("q_proj", "lm_head"))}
    reference = dequantized_reference(full, "nf4", linears(model), torch.float32)(tokens).logits
    with torch.no_grad():
        assert relative_error(model(tokens).logits, reference) < 0.01


@pytest.mark.parametrize(
    ("name", "pattern", "ours_skips", "theirs_skips"),
    [("phi3", "kv_proj", False, True), ("llama", "layers.1", True, False)],
)
def test_skip_rule_is_not_an_ending(tmp_path, name, pattern, ours_skips, theirs_skips):
    full = build(name)
    full.save_pretrained(tmp_path)
    path = "model.layers.1.self_attn." + ("qkv_proj" if name == "phi3" else "q_proj")
    # transformers: "kv_proj" skips qkv_proj; "layers.1" misses model.layers.1.
    theirs = load_as_transformers(type(full), tmp_path, llm_int8_skip_modules=[pattern])
    assert (path not in quantized(theirs)) == theirs_skips
    model = load_and_quantize_model(full, config(skip_modules=[pattern]), tmp_path, device_map="cpu")
    assert (path not in quantized(model)) == ours_skips


class Repeated(PreTrainedModel):
    """One layer used twice, under two names."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.first = nn.Linear(64, 64)
        self.again = self.first
        self.head = nn.Linear(64, 8)
        self.post_init()

    def forward(self, x):
        return self.head(self.again(self.first(x)))


def test_shared_modules_stay_shared(tmp_path):
    full = Repeated(PretrainedConfig()).eval()
    full.config.save_pretrained(tmp_path)
    save_checkpoint(full, tmp_path)
    # transformers: quantizes the first name's module and leaves the other one apart from it.
    theirs = load_as_transformers(Repeated, tmp_path)
    assert theirs.again is not theirs.first
    model = load_and_quantize_model(empty(Repeated, full.config), "nf4", tmp_path, device_map="cpu").eval()
    assert isinstance(model.first, bnb.nn.Linear4bit)
    assert model.again is model.first
    x = torch.randn(3, 64)
    with torch.no_grad():
        reference = dequantized_reference(full, "nf4", {"head"}, torch.float32)(x)
        assert relative_error(model(x), reference) < 0.01


def test_any_module_loads_not_only_transformers_own(weights_location):
    # transformers: its quantizer asks a model for what only its own classes have.
    quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    with pytest.raises(AttributeError):
        quantizer.preprocess_model(model=empty(GPT), dtype=torch.float32, device_map={"": "cpu"})
    model = load_and_quantize_model(empty(GPT), "nf4", weights_location, device_map="cpu")
    assert len(quantized(model)) == 8


def test_classifier_of_three_labels_stays_and_runs(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    full = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, num_labels=3)).eval()
    full.save_pretrained(tmp_path)
    # transformers: takes a biased classifier for one named "classifier.bias" and quantizes it; no AVX512-BF16 CPU
    # can run three outputs then.
    assert "classifier" in quantized(load_as_transformers(BertForSequenceClassification, tmp_path))
    tokens = torch.randint(0, 96, (2, 8))
    for skip in (None, ["pooler"]):
        model = empty(BertForSequenceClassification, full.config)
        model = load_and_quantize_model(model, config(skip_modules=skip), tmp_path, device_map="cpu").eval()
        assert ("classifier" in quantized(model)) == (skip is not None)
        reference = dequantized_reference(full, "nf4", linears(model), torch.float32)(tokens).logits
        with torch.no_grad():
            assert relative_error(model(tokens).logits, reference) < 0.03


@pytest.mark.parametrize("skip", [None, ["lm_head"]], ids=str)
def test_t5_wo_stays_whatever_is_skipped(tmp_path, skip):
    full = build("t5")
    save_checkpoint(full, tmp_path)
    # accelerate: quantizes wo, whose large weights 4 bit ruins; transformers keeps it, by its own rule.
    theirs = quantized(replace_with_bnb_layers(copy.deepcopy(full), accelerates(), ["lm_head"]))
    kept = {path for path in theirs if path.endswith(".wo")}
    assert len(kept) == 4
    model = load_and_quantize_model(empty(type(full), full.config), config(skip_modules=skip), tmp_path, "cpu")
    assert quantized(model) == theirs - kept


def test_mamba_runs_in_int8_and_4_bit(tmp_path):
    full = build("mamba")
    full.save_pretrained(tmp_path)
    # transformers: quantizes dt_proj, whose weight the mixer multiplies by itself.
    with pytest.raises(RuntimeError):
        outputs(load_as_transformers(type(full), tmp_path, "int8"), **inputs("mamba"))
    for mode in ("int8", "nf4"):
        model = load_and_quantize_model(empty(type(full), full.config), mode, tmp_path, device_map="cpu").eval()
        assert not any("dt_proj" in path for path in quantized(model))
        reference = dequantized_reference(full, mode, linears(model), torch.float32)
        assert relative_error(outputs(model, **inputs("mamba")), outputs(reference, **inputs("mamba"))) < 0.02


# Random weights are scaled until the layers, and not the residual stream alone, make the output.
@pytest.mark.parametrize(("name", "scale"), [("t5", 1), ("bert", 5), ("whisper", 5), ("llama", 5), ("opt", 5)])
def test_every_architecture_loses_only_what_its_format_loses(tmp_path, name, scale):
    full = build(name)
    with torch.no_grad():
        for path, parameter in full.named_parameters():
            if parameter.dim() == 2 and "embed" not in path:
                parameter.mul_(scale)
    save_checkpoint(full, tmp_path)
    expected = outputs(full, **inputs(name))
    found = {}
    for mode in ("nf4", "int8"):
        model = load_and_quantize_model(empty(type(full), full.config), mode, tmp_path, device_map="cpu").eval()
        assert quantized(model)
        found[mode] = torch.cosine_similarity(
            outputs(model, **inputs(name)).flatten(), expected.flatten(), dim=0
        ).item()
    assert 0.95 < found["nf4"] < found["int8"]
    assert found["int8"] > 0.995
