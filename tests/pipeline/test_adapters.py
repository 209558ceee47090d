"""Adapters of PEFT that would compute with packed bytes are refused, and what a message says to do instead works."""

import gc
import weakref

import pytest
import torch
from comparisons import relative_error
from models import TOKENS, llama
from torch import nn

from bigload import BnbQuantizationConfig, QuantizationError, load_and_quantize_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

MODES = ("nf4", "int8")
FIRST = "model.layers.0.self_attn.q_proj"
LAYERS = ["q_proj", "o_proj"]


def loaded(mode, device, **fields):
    torch.manual_seed(0)
    config = BnbQuantizationConfig.from_mode(mode, **({"torch_dtype": "fp32"} | fields))
    return load_and_quantize_model(llama(), config, device_map=device)


def adapted(model, kind="Lora", targets=LAYERS, **fields):
    torch.manual_seed(1)
    return peft.get_peft_model(model, getattr(peft, f"{kind}Config")(target_modules=targets, **fields))


def loss_falls(model, device):
    tokens, losses = TOKENS.to(device), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses[-1] < losses[0]


READING = [("HRA", "int8"), ("HRA", "nf4"), ("Peanut", "int8"), ("Peanut", "nf4"), ("LoHa", "nf4"), ("LoKr", "nf4")]
READING += [("Deft", "int8"), ("UniLora", "int8"), ("UniLora", "nf4")]


@pytest.mark.parametrize(("kind", "mode"), READING)
def test_an_adapter_that_reads_packed_bytes_is_refused_and_both_remedies_work(kind, mode, device):
    if not hasattr(peft, f"{kind}Config"):
        pytest.skip(f"this PEFT has no {kind}")
    model = loaded(mode, device)
    with pytest.raises(QuantizationError, match=rf"'{FIRST}' is quantized, and PEFT's peft\.tuners\.\w+\.layer\.\w+ "):
        adapted(model, kind)
    assert loss_falls(adapted(model), device)
    assert loss_falls(adapted(loaded(mode, device, skip_modules=[*LAYERS, "lm_head"]), kind), device)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("LoHa", "int8"),
        ("LoKr", "int8"),
        ("FourierFT", "nf4"),
        ("C3A", "int8"),
        ("C3A", "nf4"),
        ("Gralora", "nf4"),
        ("RandLora", "int8"),
    ],
)
def test_merges_that_peft_cannot_do_are_refused_and_the_adapter_stays(kind, mode, device, tmp_path):
    options = {"C3A": {"block_size": 32}, "FourierFT": {"n_frequency": 10}}.get(kind, {})
    model = adapted(loaded(mode, device), kind, **options)
    assert loss_falls(model, device)
    with torch.no_grad():
        expected = model(TOKENS.to(device)).logits
    with pytest.raises(QuantizationError, match=rf"'{FIRST}' is quantized, .*cannot merge .*: keep the adapter .* or"):
        model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(model(TOKENS.to(device)).logits, expected)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(loaded(mode, device, skip_modules=["*"]), tmp_path)
    with torch.no_grad():
        unmerged = plain(TOKENS.to(device)).logits
        assert relative_error(plain.merge_and_unload()(TOKENS.to(device)).logits, unmerged) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_trained_copy_of_a_quantized_layer_is_refused_and_both_remedies_work(mode, device):
    for named in ("v_proj", "mlp"):
        with pytest.raises(
            QuantizationError, match=r"modules_to_save would train a copy.*target_modules.*skip_modules"
        ):
            adapted(loaded(mode, device), modules_to_save=[named])
    assert loss_falls(adapted(loaded(mode, device), targets=[*LAYERS, "v_proj"]), device)
    copied = adapted(loaded(mode, device, skip_modules=["v_proj", "lm_head"]), modules_to_save=["v_proj"])
    assert loss_falls(copied, device)
    assert sum("v_proj.modules_to_save" in name for name, p in copied.named_parameters() if p.requires_grad) == 2


def as_on_a_gpu(weight, num_bits, reduced_rank, num_iter):
    """What PEFT's `loftq_init` does there: it casts values to the dtype of the weight that it was given."""
    values = weight.to(torch.float32)
    rows, columns = weight.shape
    return values.to(weight.dtype), torch.zeros(reduced_rank, columns), torch.zeros(rows, reduced_rank)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_adapter_that_writes_over_packed_bytes_is_refused_too(mode, device, monkeypatch):
    """PEFT adds it to the modules that are there already."""
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", as_on_a_gpu)
    model = adapted(loaded(mode, device))
    model.add_adapter("more", peft.LoraConfig(target_modules=LAYERS))
    second = peft.LoraConfig(target_modules=LAYERS, init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with pytest.raises(QuantizationError, match=rf"'{FIRST}' is quantized, .*written over .*load the model again"):
        model.add_adapter("wrong", second)


def test_a_class_of_ones_own_derived_from_pefts_is_looked_at_too(device):
    class Reading(peft.tuners.lora.layer.Linear):
        def forward(self, x, *args, **kwargs):
            return nn.functional.linear(x, self.get_base_layer().weight.to(x.dtype))

    model = loaded("int8", device)
    config = peft.LoraConfig(target_modules=LAYERS)
    config._register_custom_module({type(model.get_submodule(FIRST)): Reading})
    with pytest.raises(
        QuantizationError, match=rf"'{FIRST}' is quantized, and PEFT's [\w.]*test_adapters\.Reading would"
    ):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_whose_adapters_peft_refused_takes_no_memory_afterwards(mode, device):
    model = loaded(mode, device)
    layer = weakref.ref(model.get_submodule(FIRST))
    with pytest.raises(TypeError, match="PiSSA"):
        adapted(model, init_lora_weights="pissa")
    del model
    gc.collect()
    assert layer() is None


@pytest.mark.parametrize("mode", MODES)
def test_an_initialization_that_writes_over_packed_bytes_is_refused_and_the_remedies_work(mode, device, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", as_on_a_gpu)
    with pytest.raises(QuantizationError, match=rf"'{FIRST}' is quantized, .*written over .*load the model again"):
        adapted(loaded(mode, device), init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    for how in (True, "gaussian", "olora"):
        assert loss_falls(adapted(loaded(mode, device), init_lora_weights=how), device)


@pytest.mark.parametrize("mode", MODES)
def test_lora_of_a_part_that_does_not_say_what_it_holds_trains_and_does_not_merge(mode, device):
    """PEFT looks for flags on the model that it is given; without them it takes its class for plain layers."""
    whole = loaded(mode, device)
    part = adapted(whole.model.layers[0].self_attn, use_dora=True)
    layer = part.base_model.model.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.layer"
    assert loss_falls(whole, device)
    with pytest.raises(QuantizationError, match="cannot merge"):
        part.merge_and_unload()


def test_models_that_are_not_quantized_are_left_alone(device):
    loaded("nf4", device)
    plain = nn.Sequential(nn.Linear(64, 64)).to(device)
    for kind in ("HRA", "LoHa"):
        peft.get_peft_model(plain, getattr(peft, f"{kind}Config")(target_modules=["0"])).merge_and_unload()


def test_an_adapter_begins_with_the_random_values_that_it_has_on_a_plain_model(device):
    found = []
    for mode in ("*", "lm_head"):
        model = adapted(loaded("int8", device, skip_modules=[mode]), "FourierFT", n_frequency=10)
        found.append([p for name, p in model.named_parameters() if "fourierft" in name])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_merges_into_main_weights_are_refused_and_the_remedies_work(device, tmp_path):
    """PEFT would take the float16 of int8 training for int8 rows: a third off, without a word."""
    model = adapted(loaded("int8-training", device, torch_dtype="fp16"), init_lora_weights=False).eval()
    with torch.no_grad():
        expected = model(TOKENS.to(device)).logits
        with pytest.raises(
            QuantizationError, match=r"cannot merge into its weight: keep the adapter beside it, or load"
        ):
            model.merge_and_unload()
        assert torch.equal(model(TOKENS.to(device)).logits, expected)
        model.save_pretrained(tmp_path)
        plain = loaded("int8", device, skip_modules=["*"], torch_dtype="fp16").eval()
        merged = peft.PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
        assert relative_error(merged(TOKENS.to(device)).logits, expected) < 0.05
