"""Modules that read a child's weight past its forward are recognised by their code, and compute right when loaded."""

import functools
import linecache
from pathlib import Path

import pytest
import torch
from checkpoints import empty, save_checkpoint
from comparisons import relative_error
from models import Block, llama
from references import FOUR_BIT, dequantized_reference
from torch import nn
from torch.nn import functional
from transformers import BartConfig, BartModel, BertConfig, BertModel, BloomConfig, BloomModel, MambaConfig, MambaModel
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomMLP
from transformers.models.mamba.modeling_mamba import MambaMixer

from bigload import BnbQuantizationConfig, load_and_quantize_model
from bigload.inspection.weight_readers import reader
from bigload.model.quantizable import layers_to_quantize
from bigload.model.tensors import tensors_of


def weights_read(owner):
    """Return the paths of the modules whose weight's values the owner's own methods read."""
    found = reader(owner)
    return set() if found is None else found.paths_read()


class Owner(nn.Module):
    """Has two children that a subclass may read."""

    def __init__(self, width=4, flag=1):
        super().__init__()
        self.flag = flag
        self.proj = nn.Linear(width, width)
        self.other = nn.Linear(width, width)

    def forward(self, x):
        return self.other(self.proj(x))


class Multiplies(Owner):
    def forward(self, x):
        return self.other(x) + x @ self.proj.weight.t() + self.proj.bias


class PassesItOn(Owner):
    def forward(self, x):
        return self.other(functional.linear(x, self.proj.weight, self.proj.bias))


class KeepsItInAName(Owner):
    def forward(self, x):
        weight = self.proj.weight
        return self.other(x @ weight)


class ReadsInAnotherMethod(Owner):
    def merged(self):
        return self.proj.weight + self.other.weight


class ReadsInANestedFunction(Owner):
    def forward(self, x):
        def inner():
            return x @ self.proj.weight

        return inner()


class ReadsInALambda(Owner):
    forward = lambda self, x: x @ self.proj.weight  # noqa: E731


class Inherits(Multiplies):
    """Reads in a method that is its parent's."""

    def extra(self, x):
        return x


def decorated(function):
    @functools.wraps(function)
    def wrapped(self, *args):
        return function(self, *args)

    return wrapped


class ReadsInADecoratedMethod(Owner):
    @decorated
    def forward(self, x):
        return x @ self.proj.weight


class ReadsThroughAnotherName(Owner):
    def forward(self, x):
        proj = self.proj
        return x @ proj.weight


class ReadsInAProperty(Owner):
    @property
    def merged(self):
        return self.proj.weight

    def forward(self, x):
        return x @ self.merged


class AsksForFacts(Owner):
    def forward(self, x):
        x = x.to(self.proj.weight.dtype).to(self.proj.weight.device)
        return self.other(self.proj(x)) if self.proj.weight.shape[0] > 1 and self.proj.weight.numel() else x


class ReadsBeforeLoading(Owner):
    def __init__(self):
        super().__init__()
        self.scale = self.proj.weight.norm().item()

    def _init_weights(self, module):
        nn.init.normal_(self.proj.weight)

    def reset_parameters(self):
        nn.init.normal_(self.proj.weight)

    def tie_weights(self):
        self.proj.weight = self.other.weight


class AssignsTo(Owner):
    def adopt(self, weight):
        self.proj.weight = weight


class NamesAnothersWeight(Owner):
    def forward(self, x, given=None):
        return self.proj(x) if given is None else self.proj(x) @ given.weight


class ReadsUnderAFlag(Owner):
    def forward(self, x):
        if self.flag > 1:
            return x @ self.proj.weight
        return self.other(self.proj(x))


class ReadsUnlessAFlag(Owner):
    def forward(self, x):
        if self.flag > 1:
            return self.other(self.proj(x))
        elif self.flag == 1:  # noqa: RET505
            return x @ self.proj.weight
        else:
            return x @ self.other.weight


class ReadsUnderAnArgument(Owner):
    def forward(self, x, flag=1):
        if flag > 1:
            return x @ self.proj.weight
        return self.other(self.proj(x))


class ReadsUnderAnAbsentAttribute(Owner):
    def forward(self, x):
        if self.not_there_yet:
            return x @ self.proj.weight
        return self.proj(x)


class ReadsInTraining(Owner):
    def forward(self, x):
        if self.training:
            return x @ self.proj.weight
        return self.proj(x)


@pytest.mark.parametrize(
    ("owner", "read"),
    [
        (Owner, set()),
        (Multiplies, {"proj"}),
        (PassesItOn, {"proj"}),
        (KeepsItInAName, {"proj"}),
        (ReadsInAnotherMethod, {"proj", "other"}),
        (ReadsInANestedFunction, {"proj"}),
        (ReadsInALambda, {"proj"}),
        (ReadsInADecoratedMethod, {"proj"}),
        (ReadsThroughAnotherName, {"proj"}),
        (ReadsInAProperty, {"proj"}),
        (Inherits, {"proj"}),
        (AsksForFacts, set()),
        (ReadsBeforeLoading, set()),
        (AssignsTo, set()),
        (NamesAnothersWeight, set()),
        (ReadsUnlessAFlag, {"proj", "other"}),
        (ReadsUnderAnArgument, {"proj"}),
        (ReadsUnderAnAbsentAttribute, {"proj"}),
    ],
)
def test_children_whose_weight_is_a_value_in_the_code_are_read_and_no_others(owner, read):
    assert weights_read(owner()) == read


@pytest.mark.parametrize(("flag", "read"), [(1, set()), (2, {"proj"})])
def test_read_under_a_condition_counts_only_where_the_instance_makes_it_true(flag, read):
    assert weights_read(ReadsUnderAFlag(flag=flag)) == read


def test_two_instances_of_a_class_are_judged_each_by_its_own_attributes():
    assert [weights_read(ReadsUnderAFlag(flag=flag)) for flag in (2, 1, 2)] == [{"proj"}, set(), {"proj"}]


@pytest.mark.parametrize("training", [False, True])
def test_read_under_training_counts_in_either_mode_because_the_mode_changes_later(training):
    assert weights_read(ReadsInTraining().train(training)) == {"proj"}


def made_by_exec(body):
    scope = {"Owner": Owner}
    exec(f"class Made(Owner):\n    def forward(self, x):\n        {body}", scope)
    return scope["Made"]()


def test_class_without_a_source_counts_every_child_that_a_method_with_weight_names():
    assert weights_read(made_by_exec("return self.other(x) if False else x @ self.proj.weight")) == {"proj", "other"}
    assert weights_read(made_by_exec("return self.proj(x).to(self.proj.weight.dtype)")) == {"proj"}


def test_class_without_a_source_that_names_no_weight_reads_nothing():
    assert weights_read(made_by_exec("return self.other(self.proj(x))")) == set()


def test_lost_source_file_is_no_crash(tmp_path):
    file = tmp_path / "gone.py"
    file.write_text("class Gone(Owner):\n    def forward(self, x):\n        return self.other(x @ self.proj.weight)\n")
    scope = {"Owner": Owner}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    file.unlink()
    linecache.checkcache()
    assert weights_read(scope["Gone"]()) == {"proj", "other"}


def test_mixer_of_mamba_reads_its_dt_proj_and_never_its_in_proj():
    model = MambaModel(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    (mixer,) = (module for module in model.modules() if isinstance(module, MambaMixer))
    # Its fused path, for kernels that need not be there, reads x_proj and out_proj too.
    assert {"dt_proj"} <= weights_read(mixer) <= {"dt_proj", "conv1d", "x_proj", "out_proj"}


def bloom(pretraining_tp, slow_but_exact):
    return BloomModel(
        BloomConfig(
            vocab_size=32,
            hidden_size=16,
            n_layer=1,
            n_head=2,
            pretraining_tp=pretraining_tp,
            slow_but_exact=slow_but_exact,
        )
    )


@pytest.mark.parametrize(
    ("pretraining_tp", "slow_but_exact", "attention", "mlp"),
    [
        (1, False, set(), set()),
        (1, True, set(), set()),
        (2, False, set(), set()),
        (2, True, {"dense"}, {"dense_4h_to_h"}),
    ],
)
def test_bloom_reads_its_weights_only_in_slices_for_exactness(pretraining_tp, slow_but_exact, attention, mlp):
    model = bloom(pretraining_tp, slow_but_exact)
    read = {type(module): weights_read(module) for module in model.modules()}
    assert (read[BloomAttention], read[BloomMLP]) == (attention, mlp)


BERT = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
BART = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
BART |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}


@pytest.mark.parametrize(
    "model",
    [
        lambda: llama(False),
        lambda: BertModel(BertConfig(**BERT)),
        lambda: BartModel(BartConfig(**BART)),
        lambda: Block(64, 2, 16),
        lambda: nn.TransformerEncoderLayer(16, 2),
        lambda: nn.TransformerDecoderLayer(16, 2).linear1,
    ],
    ids=["llama", "bert", "bart", "gpt", "encoder_layer", "linear"],
)
def test_blocks_that_only_call_their_children_read_no_linear(model):
    read = {owner._modules[name] for owner in model().modules() for name in weights_read(owner)}
    assert not [module for module in read if type(module) is nn.Linear]


class EncoderLayerThatReads(nn.TransformerEncoderLayer):
    def forward(self, x):
        return x @ self.linear1.weight.t()


def test_subclass_of_the_encoder_layer_counts_for_what_its_own_methods_read():
    assert weights_read(EncoderLayerThatReads(16, 2)) == {"linear1"}


class Net(nn.Module):
    """An owner between two plain layers."""

    def __init__(self, owner):
        super().__init__()
        self.enter = nn.Linear(64, 64)
        self.owner = owner(64)
        self.leave = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.leave(self.owner(self.enter(x))))


@pytest.mark.parametrize("owner", [Multiplies, PassesItOn, ReadsInADecoratedMethod])
@pytest.mark.parametrize("mode", ["int8", *FOUR_BIT])
def test_loaded_model_with_such_an_owner_computes_what_its_dequantized_reference_computes(
    tmp_path: Path, device, mode, owner
):
    model = Net(owner)
    save_checkpoint(model, tmp_path)
    loaded = load_and_quantize_model(empty(Net, owner), mode, tmp_path, device_map=device).eval()
    assert type(loaded.owner.proj) is nn.Linear
    assert torch.equal(loaded.owner.proj.weight.cpu(), model.owner.proj.weight)
    assert type(loaded.owner.other) is not nn.Linear
    reference = dequantized_reference(model, mode, {"owner.proj"}, torch.float32)
    x = torch.randn(5, 64)
    # int8 rounds the activations too; 4-bit layers multiply in bfloat16 on CPUs that can.
    assert relative_error(loaded(x.to(device)), reference(x)) < 0.02


def test_layer_that_its_owner_reads_is_kept_under_every_name_it_has():
    model = Net(Multiplies)
    model.alias = model.owner.proj
    config = BnbQuantizationConfig(load_in_8bit=True, skip_modules=[])
    assert set(layers_to_quantize(model, config, tensors_of(model))) == {"enter", "owner.other", "leave"}


class Spellings(nn.Module):
    """Reads a weight in each way that is recognised; `spare` is read in none."""

    def __init__(self):
        super().__init__()
        self.several = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.inner = nn.ModuleDict({"proj": nn.Linear(4, 4), "spare": nn.Linear(4, 4)})
        self.first, self.second, self.third, self.spare = (nn.Linear(4, 4) for _ in range(4))

    def loop(me, x):  # noqa: N805 - any first name will do
        return [x @ layer.weight for layer in me.several]

    def grandchild(self, x):
        return x @ self.inner.proj.weight

    def pair(self, x):
        a, b = self.first, self.second
        return x @ a.weight @ b.weight

    def listed(self, x):
        return [x @ layer.weight for layer in (self.third,)], self.spare(x)


def test_each_recognised_spelling_names_the_very_layers_that_are_read():
    expected = {"several.0", "several.1", "inner.proj", "first", "second", "third"}
    assert weights_read(Spellings()) == expected
    model = nn.ModuleDict({"body": Spellings(), "norm": nn.LayerNorm(4)})
    config = BnbQuantizationConfig.from_mode("nf4").resolved(torch.float32)
    assert set(layers_to_quantize(model, config, tensors_of(model))) == {"body.inner.spare", "body.spare"}


def test_child_under_two_names_is_read_under_either():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = self.first

        def forward(self, x):
            return x @ self.second.weight

    assert weights_read(Alias()) == {"first", "second"}
