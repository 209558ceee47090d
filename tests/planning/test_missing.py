"""What the checkpoint lacks: kept, initialised, made anew, or an error whose remedies work."""

import logging

import pytest
import torch
from checkpoints import PLAIN, empty, save, save_checkpoint
from models import llama
from torch import nn

from bigload import (
    CheckpointError,
    ConfigError,
    load_and_quantize_model,
    plan_device_map,
    quantize_checkpoint,
)

FP32 = PLAIN | {"torch_dtype": "fp32"}


class Regressor(nn.Module):
    """A body that a checkpoint holds, and a head that it does not, in the middle."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)
        self.projector = nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.projector(self.body(x)) * self.scale)


@pytest.fixture
def stored(tmp_path):
    """Write a regressor without its projector."""
    torch.manual_seed(1)
    state = {name: value for name, value in Regressor().state_dict().items() if "projector" not in name}
    return save(state, tmp_path / "stored")


def test_real_values_are_kept_with_one_warning_and_not_quantized(stored, device, logged):
    model = empty(Regressor)
    model.projector = nn.Linear(64, 64)
    own = model.projector.weight.detach().clone()
    with logged.at_level(logging.WARNING):
        model = load_and_quantize_model(model, "nf4", stored, device_map=device)
    (warning,) = [r.getMessage() for r in logged.records if "not found in" in r.getMessage()]
    assert "'projector.weight', 'projector.bias'" in warning
    assert type(model.projector) is nn.Linear
    assert type(model.body).__name__ == "Linear4bit"
    assert torch.equal(model.projector.weight.cpu(), own)
    assert model.projector.weight.requires_grad
    assert model(torch.ones(2, 64, device=device)).isfinite().all()


def test_strict_keeps_nothing(stored):
    model = empty(Regressor)
    model.projector = nn.Linear(64, 64)
    with pytest.raises(CheckpointError, match=r"2 tensors of the model not found in.*'projector\.weight'"):
        load_and_quantize_model(model, "nf4", stored, strict=True)


def test_what_is_on_meta_is_an_error_that_names_a_remedy_that_works(stored, device):
    model = empty(Regressor)
    with pytest.raises(CheckpointError, match="name them in initialize_missing") as caught:
        load_and_quantize_model(model, "nf4", stored, device_map=device)
    assert caught.value.missing_keys == ["projector.weight", "projector.bias"]
    torch.manual_seed(5)
    model = load_and_quantize_model(model, "nf4", stored, device_map=device, initialize_missing=["projector"])
    torch.manual_seed(5)
    wanted = nn.Linear(64, 64)
    assert type(model.projector) is nn.Linear
    assert torch.equal(model.projector.weight.cpu(), wanted.weight)
    assert torch.equal(model.projector.bias.cpu(), wanted.bias)


def test_a_parameter_that_no_class_initialises_is_refused(tmp_path):
    state = {name: value for name, value in Regressor().state_dict().items() if name != "scale"}
    folder, model = save(state, tmp_path), empty(Regressor)
    with pytest.raises(CheckpointError, match=r"'scale': neither its class Regressor nor .* has a reset_parameters"):
        load_and_quantize_model(model, "nf4", folder, initialize_missing=["scale"])
    model.scale = nn.Parameter(torch.full((64,), 2.0))  # the remedy
    assert load_and_quantize_model(model, "nf4", folder).scale.unique().tolist() == [2]


def test_a_checkpoint_of_another_model_is_refused_although_the_values_are_real(tmp_path):
    folder = save({"other.weight": torch.ones(3)}, tmp_path)
    with pytest.raises(CheckpointError, match="is it the checkpoint of this model"):
        load_and_quantize_model(Regressor(), "nf4", folder)


def test_keys_of_another_prefix_are_refused_although_the_values_are_real(tmp_path):
    state = {f"net.{name}": value for name, value in Regressor().state_dict().items()}
    state["scale"] = torch.ones(64)
    with pytest.raises(CheckpointError, match="key_mapping"):
        load_and_quantize_model(Regressor(), "nf4", save(state, tmp_path))


@pytest.mark.parametrize("wrong", ["projector", 3, [1]])
def test_the_argument_is_a_list_of_names(stored, wrong):
    with pytest.raises(ConfigError, match="initialize_missing must be a list of names"):
        load_and_quantize_model(empty(Regressor), "nf4", stored, initialize_missing=wrong)


def test_a_name_that_nothing_missing_has_is_said(stored, logged):
    with logged.at_level(logging.WARNING):
        load_and_quantize_model(empty(Regressor), "nf4", stored, initialize_missing=["projector", "skore"])
    assert "initialize_missing names 'skore', which the checkpoint does not lack" in logged.text


def test_plans_and_conversions_take_it_too(stored, tmp_path, device):
    plan = plan_device_map(empty(Regressor), "nf4", stored, device_map="cpu", initialize_missing=["projector"])
    assert "projector" not in plan.layers
    make = {"initialize_missing": ["projector"], "device": device}
    torch.manual_seed(3)
    quantize_checkpoint(stored, tmp_path / "made", "nf4", model=empty(Regressor), **make)
    again = load_and_quantize_model(empty(Regressor), None, tmp_path / "made", device_map=device)
    torch.manual_seed(3)
    assert torch.equal(again.projector.weight.cpu(), nn.Linear(64, 64).weight)


def test_a_new_head_of_transformers_is_initialised_by_its_rules(tmp_path):
    from transformers import LlamaForSequenceClassification

    causal = llama(num_labels=3, pad_token_id=0, initializer_range=0.5)
    causal.save_pretrained(tmp_path)
    model = empty(LlamaForSequenceClassification, causal.config)
    torch.manual_seed(0)
    model = load_and_quantize_model(model, "nf4", tmp_path, device_map="cpu", initialize_missing=["score"])
    assert type(model.score) is nn.Linear
    assert 0.3 < model.score.weight.std() < 0.7  # as the config says, not as nn.Linear
    torch.manual_seed(0)
    wanted = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3, dtype=torch.float32)
    assert torch.equal(model.score.weight, wanted.score.weight)


class Rotary(nn.Module):
    """A table that is in no checkpoint; `reset_parameters` makes it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.empty(16), persistent=False)
        self.reset_parameters()

    def reset_parameters(self):
        self.table = torch.arange(16.0)

    def forward(self, x):
        return x * self.table


class Fixed(Rotary):
    """Makes its table in the constructor alone."""

    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer("table", torch.arange(16.0), persistent=False)

    reset_parameters = None


def with_table(part):
    return lambda: nn.Sequential(nn.Linear(16, 16), part(), nn.Linear(16, 4))


def test_tables_that_their_module_makes_are_made_anew(tmp_path, device, logged):
    make = with_table(Rotary)
    folder = save_checkpoint(make(), tmp_path)
    with torch.device("meta"):
        on_meta = make()
    emptied = make().to(device="meta").to_empty(device="cpu")
    emptied[1].table.fill_(-7)
    for model in (on_meta, emptied):
        made = load_and_quantize_model(model, "nf4", folder, device_map=device)
        assert made[1].table.tolist() == list(range(16))


def test_tables_that_nothing_makes_are_warned_of_after_to_empty_alone(tmp_path, logged):
    make = with_table(Fixed)
    folder = save_checkpoint(make(), tmp_path)
    with logged.at_level(logging.WARNING):
        load_and_quantize_model(make(), FP32, folder)
        load_and_quantize_model(empty(make), FP32, folder)
    assert "to_empty" not in logged.text
    with torch.device("meta"):
        model = make()
    with logged.at_level(logging.WARNING):
        load_and_quantize_model(model.to_empty(device="cpu"), FP32, folder)
    assert "'1.table'; after to_empty() these are arbitrary" in logged.text


def test_buffers_of_transformers_are_as_their_class_makes_them_after_to_empty(tmp_path, logged):
    source = llama()
    source.save_pretrained(tmp_path)
    model = empty(type(source), source.config).to_empty(device="cpu")
    model.model.rotary_emb.inv_freq.fill_(9)
    with logged.at_level(logging.WARNING):
        model = load_and_quantize_model(model, FP32, tmp_path, device_map="cpu")
    tokens = torch.arange(8)[None]
    assert "'model.rotary_emb.inv_freq'" in logged.text
    assert torch.equal(model(tokens).logits, source.eval()(tokens).logits)


def test_a_class_that_needs_more_than_a_config_loads(tmp_path):
    from transformers import PretrainedConfig, PreTrainedModel

    class Toy(PretrainedConfig):
        model_type = "toy"

    class Heads(PreTrainedModel):
        config_class = Toy

        def __init__(self, config, count):
            super().__init__(config)
            self.body = nn.Linear(64, 64)
            self.heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(count))
            self.rates = [rate.item() for rate in torch.linspace(0, 1, count)]
            self.post_init()

    folder = save_checkpoint(Heads(Toy(), 2), tmp_path)
    model = load_and_quantize_model(empty(Heads, Toy(), 2), "nf4", folder)
    assert type(model.body).__name__ == "Linear4bit"


def test_a_class_that_reads_values_while_it_is_built_keeps_its_dtypes(tmp_path):
    from transformers import PretrainedConfig, PreTrainedModel

    class Toy(PretrainedConfig):
        model_type = "toy"

    class Vision(PreTrainedModel):
        config_class = Toy

        def __init__(self, config):
            super().__init__(config)
            self.rates = [rate.item() for rate in torch.linspace(0, 1, 2)]
            self.body = nn.Linear(64, 64)
            self.decay = nn.Parameter(torch.ones(4, dtype=torch.float32))
            self.head = nn.Linear(64, 64)
            self.post_init()

    folder = save_checkpoint(Vision(Toy()), tmp_path, dtype=torch.bfloat16)
    model = load_and_quantize_model(empty(Vision, Toy()), "nf4", folder)
    assert model.decay.dtype == torch.float32
    assert model.head.weight.dtype == torch.bfloat16
