"""From the checkpoint's names to the model's tensors: what is found, what is refused, and what is only said."""

import ast
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from checkpoints import empty, save
from hypothesis import given
from hypothesis import strategies as st
from models import llama
from references import stored_by_bitsandbytes
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from bigload import init_empty_weights
from bigload.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bigload.errors import CheckpointError, ConfigError
from bigload.io.tensors import StoredTensor
from bigload.model.tensors import ModelTensor, tensors_of
from bigload.model.transformers_facts import KeyConversion
from bigload.model.twins import rebuilt_buffers
from bigload.planning.sources import sources_in_checkpoint


def checkpoint_of(shapes, dtype=torch.float32):
    """Describe a checkpoint of tensors by name; a value is a shape, or a (dtype, shape)."""
    tensors = {}
    for name, value in shapes.items():
        own, shape = value if value and isinstance(value[0], torch.dtype) else (dtype, value)
        nbytes = math.prod(shape) * own.itemsize
        tensors[name] = StoredTensor(name, Path("model.safetensors"), own, tuple(shape), 0, nbytes)
    return Checkpoint(Path("model.safetensors"), tensors)


def checkpoint_for(model, **changed):
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return checkpoint_of({**shapes, **changed})


def parameter(name, shape=(2, 3), dtype=torch.float32):
    return ModelTensor((name,), nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), False), True, True)


def stored_names(sources):
    return {name: source.tensor.name for name, (source,) in sources.items()}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.b = nn.Linear(3, 2)


class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("transient", torch.ones(4), persistent=False)


class EmbeddingAndHead(nn.Module):
    def __init__(self, shared=False):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        if shared:
            self.head.weight = self.embed.weight


def test_each_tensor_is_filled_whole_and_untransposed_from_its_namesake():
    model = TwoLayers()
    sources = sources_in_checkpoint(tensors_of(model), checkpoint_for(model))
    assert stored_names(sources) == {name: name for name in ("a.weight", "a.bias", "b.weight", "b.bias")}
    assert all(source.region == () and not source.transposed for (source,) in sources.values())


def test_all_missing_parameters_stand_in_one_error():
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        sources_in_checkpoint(tensors_of(TwoLayers()), checkpoint_of({"a.weight": (3, 4)}))
    assert caught.value.missing_keys == ["a.bias", "b.weight", "b.bias"]
    assert all(repr(name) in str(caught.value) for name in caught.value.missing_keys)


def test_all_mismatched_shapes_stand_in_one_error_with_both_shapes():
    model = TwoLayers()
    checkpoint = checkpoint_for(model, **{"a.weight": (5, 4), "b.bias": ()})
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        sources_in_checkpoint(tensors_of(model), checkpoint)
    assert caught.value.mismatched_shapes == {"a.weight": ((5, 4), (3, 4)), "b.bias": ((), (2,))}
    message = str(caught.value)
    assert all(part in message for part in ("'a.weight'", "(5, 4)", "(3, 4)", "'b.bias'", "()", "(2,)"))


def test_all_mismatched_shapes_are_on_the_error_when_the_message_cuts_them_short():
    tensors = [parameter(f"p{n}") for n in range(30)]
    with pytest.raises(CheckpointError, match="and 20 more") as caught:
        sources_in_checkpoint(tensors, checkpoint_of({tensor.name: (9,) for tensor in tensors}))
    assert caught.value.mismatched_shapes == {tensor.name: ((9,), (2, 3)) for tensor in tensors}


def test_shape_transposed_in_the_checkpoint_is_a_mismatch():
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint([parameter("w", (2, 3))], checkpoint_of({"w": (3, 2)}))
    assert caught.value.mismatched_shapes == {"w": ((3, 2), (2, 3))}


def test_unexpected_keys_are_a_warning_that_lists_them(logged):
    model = TwoLayers()
    with logged.at_level(logging.WARNING, "bigload"):
        sources = sources_in_checkpoint(tensors_of(model), checkpoint_for(model, extra=(1,), more=(2,)))
    assert sources.keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert len(logged.records) == 1
    assert "'extra', 'more'" in logged.text


def test_unexpected_keys_are_an_error_under_strict():
    model = TwoLayers()
    with pytest.raises(CheckpointError, match="'extra', 'more'") as caught:
        sources_in_checkpoint(tensors_of(model), checkpoint_for(model, extra=(1,), more=(2,)), strict=True)
    assert caught.value.unexpected_keys == ["extra", "more"]


def test_nothing_is_said_when_everything_fits(logged):
    model = TwoLayers()
    with logged.at_level(logging.WARNING, "bigload"):
        sources_in_checkpoint(tensors_of(model), checkpoint_for(model), strict=True)
    assert not logged.records


def test_keys_that_the_model_ignores_are_silent_and_allowed_under_strict(logged):
    model = TwoLayers()
    checkpoint = checkpoint_for(model, **{"rotary.inv_freq": (1,)})
    with logged.at_level(logging.WARNING, "bigload"):
        sources_in_checkpoint(
            tensors_of(model), checkpoint, ignores_key=lambda key: key == "rotary.inv_freq", strict=True
        )
    assert not logged.records


@pytest.mark.parametrize(
    "key_mapping", [{r"^model\.(\w)\.": r"\1."}, lambda key: key.removeprefix("model.")], ids=["regexes", "function"]
)
def test_key_mapping_renames_the_checkpoints_keys(key_mapping):
    model = TwoLayers()
    checkpoint = checkpoint_of({f"model.{name}": tuple(t.shape) for name, t in model.state_dict().items()})
    sources = sources_in_checkpoint(tensors_of(model), checkpoint, key_mapping=key_mapping, strict=True)
    assert stored_names(sources) == {name: f"model.{name}" for name in model.state_dict()}


def test_key_mapping_applies_its_rules_in_turn():
    rules = {"^x": "y", "^y": "z"}
    sources = sources_in_checkpoint([parameter("z")], checkpoint_of({"x": (2, 3)}), key_mapping=rules, strict=True)
    assert stored_names(sources) == {"z": "x"}


def test_key_mapping_of_two_keys_to_one_is_refused_and_names_all_three():
    with pytest.raises(ConfigError, match=r"'old'.*'new'.*'w'"):
        sources_in_checkpoint(
            [parameter("w")], checkpoint_of({"old": (2, 3), "new": (2, 3)}), key_mapping={"old|new": "w"}
        )


def test_key_mapping_onto_a_key_that_is_there_already_is_refused():
    with pytest.raises(ConfigError, match=r"'w'.*'v'.*'w'"):
        sources_in_checkpoint([parameter("w")], checkpoint_of({"w": (2, 3), "v": (2, 3)}), key_mapping={"v": "w"})


def test_key_mapping_that_is_neither_rules_nor_a_function_is_refused():
    with pytest.raises(ConfigError, match=r"key_mapping must be .* but it is 'model'"):
        sources_in_checkpoint([parameter("w")], checkpoint_of({"w": (2, 3)}), key_mapping="model")


def test_key_mapping_with_an_invalid_regex_is_refused_and_names_it():
    with pytest.raises(ConfigError, match=r"key_mapping.*'\(oops'"):
        sources_in_checkpoint([parameter("w")], checkpoint_of({"w": (2, 3)}), key_mapping={"(oops": "w"})


@pytest.mark.parametrize("replacement", [r"\1", r"\g<name>"])
def test_key_mapping_with_an_invalid_replacement_is_refused_and_names_it(replacement):
    with pytest.raises(ConfigError, match="key_mapping"):
        sources_in_checkpoint([parameter("w")], checkpoint_of({"v": (2, 3)}), key_mapping={"v": replacement})


def test_missing_keys_are_named_as_the_model_names_them_whatever_the_mapping():
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint([parameter("w")], checkpoint_of({"v": (2, 3)}), key_mapping={"v": "u"})
    assert caught.value.missing_keys == ["w"]


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
def test_tied_parameter_is_found_under_either_name(stored):
    model = EmbeddingAndHead(shared=True)
    checkpoint = checkpoint_of({stored: (7, 4), "inner.weight": (4, 4)})
    sources = sources_in_checkpoint(tensors_of(model), checkpoint, strict=True)
    assert stored_names(sources) == {"embed.weight": stored, "inner.weight": "inner.weight"}


def test_tied_parameter_stored_under_both_names_leaves_nothing_unexpected():
    model = EmbeddingAndHead(shared=True)
    sources = sources_in_checkpoint(tensors_of(model), checkpoint_for(model), strict=True)
    assert sources.keys() == {"embed.weight", "inner.weight"}


def test_missing_head_of_the_embeddings_shape_comes_with_the_likely_tie():
    checkpoint = checkpoint_of({"embed.weight": (7, 4), "inner.weight": (4, 4)})
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint(tensors_of(EmbeddingAndHead()), checkpoint)
    assert "tied_parameters=[('embed.weight', 'head.weight')]" in str(caught.value)


def test_missing_square_matrix_comes_without_a_guess():
    checkpoint = checkpoint_of({"a": (4, 4)})
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint([parameter("a", (4, 4)), parameter("b", (4, 4))], checkpoint)
    assert "tied_parameters" not in str(caught.value)


def test_real_persistent_buffer_may_be_missing_and_stays_as_it_is():
    sources = sources_in_checkpoint(tensors_of(Buffers()), checkpoint_of({"weight": (2,)}))
    assert sources.keys() == {"weight"}


def test_real_persistent_buffer_is_loaded_where_the_checkpoint_has_it():
    sources = sources_in_checkpoint(tensors_of(Buffers()), checkpoint_of({"weight": (2,), "kept": (3,)}))
    assert stored_names(sources) == {"weight": "weight", "kept": "kept"}


def test_persistent_buffer_on_meta_may_not_be_missing():
    model = Buffers()
    model.kept = model.kept.to("meta")
    with pytest.raises(CheckpointError, match="'kept'") as caught:
        sources_in_checkpoint(tensors_of(model), checkpoint_of({"weight": (2,)}))
    assert caught.value.missing_keys == ["kept"]


def test_non_persistent_buffer_on_meta_is_an_error_with_the_remedy():
    with init_empty_weights(include_buffers=True):
        model = Buffers()
    checkpoint = checkpoint_of({"weight": (2,), "kept": (3,), "transient": (4,)})
    with pytest.raises(CheckpointError, match=r"'transient'.*init_empty_weights") as caught:
        sources_in_checkpoint(tensors_of(model), checkpoint)
    assert caught.value.missing_keys == ["transient"]


def test_checkpoint_key_of_a_non_persistent_buffer_is_silent_and_not_loaded(logged):
    checkpoint = checkpoint_of({"weight": (2,), "kept": (3,), "transient": (9, 9)})
    with logged.at_level(logging.WARNING, "bigload"):
        sources = sources_in_checkpoint(tensors_of(Buffers()), checkpoint, strict=True)
    assert sources.keys() == {"weight", "kept"}
    assert not logged.records


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_stored_dtype_that_is_already_quantized_is_refused_where_floats_belong(dtype):
    with pytest.raises(CheckpointError, match=f"'w' is stored as {dtype}"):
        sources_in_checkpoint([parameter("w")], checkpoint_of({"w": (dtype, (2, 3))}))


def test_all_tensors_stored_as_integers_where_floats_belong_stand_in_one_error():
    checkpoint = checkpoint_of({"v": (2, 3), "w": (2, 3)}, torch.int8)
    with pytest.raises(CheckpointError, match="'v'") as caught:
        sources_in_checkpoint([parameter("v"), parameter("w")], checkpoint)
    assert "'w'" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_floating_dtype_may_fill_a_floating_parameter(dtype):
    assert sources_in_checkpoint([parameter("w")], checkpoint_of({"w": (dtype, (2, 3))})).keys() == {"w"}


def test_integer_buffer_is_filled_from_integers():
    model = nn.BatchNorm1d(3)
    checkpoint = checkpoint_for(model, num_batches_tracked=(torch.int64, ()))
    assert "num_batches_tracked" in sources_in_checkpoint(tensors_of(model), checkpoint, strict=True)


def test_five_thousand_tensors_are_found():
    tensors = [parameter(f"layers.{n}.weight") for n in range(5000)]
    checkpoint = checkpoint_of({f"model.{tensor.name}": (2, 3) for tensor in tensors})
    sources = sources_in_checkpoint(tensors, checkpoint, key_mapping={r"^model\.": ""}, strict=True)
    assert stored_names(sources) == {tensor.name: f"model.{tensor.name}" for tensor in tensors}


def test_five_thousand_missing_and_unexpected_tensors_are_all_on_the_errors():
    tensors = [parameter(f"layers.{n}.weight") for n in range(5000)]
    checkpoint = checkpoint_of({f"model.{tensor.name}": (2, 3) for tensor in tensors})
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint(tensors, checkpoint)
    assert caught.value.missing_keys == [tensor.name for tensor in tensors]
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint([], checkpoint, strict=True)
    assert caught.value.unexpected_keys == list(checkpoint.tensors)


def suggested_mapping(error):
    """Read the key_mapping that a message suggests, as its reader would type it."""
    (literal,) = re.findall(r"try key_mapping=(\{[^}]*\})", str(error))
    return ast.literal_eval(literal)


@pytest.mark.parametrize("prefix", ["module.", "model.", "a+b.", "base_model.model."])
def test_prefix_that_only_the_checkpoint_has_comes_with_the_mapping_that_works(prefix):
    model = TwoLayers()
    checkpoint = checkpoint_of({f"{prefix}{name}": tuple(t.shape) for name, t in model.state_dict().items()})
    with pytest.raises(CheckpointError, match="not found in") as caught:
        sources_in_checkpoint(tensors_of(model), checkpoint)
    sources = sources_in_checkpoint(
        tensors_of(model), checkpoint, key_mapping=suggested_mapping(caught.value), strict=True
    )
    assert stored_names(sources) == {name: f"{prefix}{name}" for name in model.state_dict()}


@pytest.mark.parametrize("prefix", ["model.", "base_model.model."])
def test_prefix_that_only_the_model_has_comes_with_the_mapping_that_works(prefix):
    names = ("a.weight", "a.bias", "b.weight")
    tensors = [parameter(prefix + name) for name in names]
    checkpoint = checkpoint_of(dict.fromkeys(names, (2, 3)))
    with pytest.raises(CheckpointError, match="not found in") as caught:
        sources_in_checkpoint(tensors, checkpoint)
    sources = sources_in_checkpoint(tensors, checkpoint, key_mapping=suggested_mapping(caught.value), strict=True)
    assert stored_names(sources) == {prefix + name: name for name in names}


def test_names_that_differ_by_more_than_a_prefix_come_without_a_mapping():
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint([parameter("a.weight")], checkpoint_of({"aa.weight": (2, 3), "x.b.weight": (2, 3)}))
    assert "key_mapping" not in str(caught.value)


@pytest.mark.parametrize(("present", "missing"), [("encoder.norm.w", "norm.w"), ("norm.w", "encoder.norm.w")])
def test_key_that_has_a_place_of_its_own_is_no_hint_of_a_prefix(present, missing):
    tensors = [parameter(present), parameter(missing)]
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint(tensors, checkpoint_of({present: (2, 3)}))
    assert caught.value.missing_keys == [missing]
    assert "key_mapping" not in str(caught.value)


def save_tied(folder, embed, head):
    """Write both names of a tied weight, in safetensors and as a pickle."""
    state = {"embed.weight": embed, "inner.weight": torch.zeros(4, 4), "head.weight": head}
    save(state, folder)
    torch.save(state, folder / "weights.bin")


FILES = pytest.mark.parametrize("file", ["model.safetensors", "weights.bin"])


@FILES
def test_tied_weight_stored_with_two_values_is_a_warning_that_says_which_is_taken(tmp_path, logged, file):
    save_tied(tmp_path, torch.zeros(7, 4), torch.ones(7, 4))
    with logged.at_level(logging.WARNING, "bigload"):
        sources = sources_in_checkpoint(tensors_of(EmbeddingAndHead(True)), open_checkpoint(tmp_path / file))
    (message,) = (record.getMessage() for record in logged.records)
    assert message.startswith("'embed.weight', 'head.weight' are one weight")
    assert "'embed.weight' is taken" in message
    assert stored_names(sources)["embed.weight"] == "embed.weight"


@FILES
@pytest.mark.parametrize("shared", [False, True])
def test_tied_weight_stored_twice_with_one_value_is_silent(tmp_path, logged, file, shared):
    embed = torch.rand(7, 4)
    save_tied(tmp_path, embed, embed if shared else embed.clone())
    with logged.at_level(logging.WARNING, "bigload"):
        sources_in_checkpoint(tensors_of(EmbeddingAndHead(True)), open_checkpoint(tmp_path / file), strict=True)
    assert not logged.records


@FILES
def test_untied_weights_with_two_values_are_silent(tmp_path, logged, file):
    save_tied(tmp_path, torch.zeros(7, 4), torch.ones(7, 4))
    with logged.at_level(logging.WARNING, "bigload"):
        sources_in_checkpoint(tensors_of(EmbeddingAndHead()), open_checkpoint(tmp_path / file), strict=True)
    assert not logged.records


def test_tied_weight_that_differs_only_at_its_end_is_a_warning(tmp_path, logged):
    model = EmbeddingAndHead()
    model.embed = nn.Embedding(5000, 4)
    model.head = nn.Linear(4, 5000, bias=False)
    model.head.weight = model.embed.weight
    embed = torch.zeros(5000, 4)
    head = embed.clone()
    head[-1] = 1
    save_tied(tmp_path, embed, head)
    with logged.at_level(logging.WARNING, "bigload"):
        sources_in_checkpoint(tensors_of(model), open_checkpoint(tmp_path / "model.safetensors"))
    assert "different values" in logged.text


def small_mixtral(size):
    sizes = {"vocab_size": 32, "hidden_size": size, "intermediate_size": size, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return empty(MixtralForCausalLM, MixtralConfig(**sizes, **heads, num_local_experts=2))


@pytest.mark.parametrize(("mode", "size"), [("int8", 64), ("nf4", 4), ("nf4-dq", 4), ("fp4", 4)])
def test_quantized_experts_that_cannot_be_joined_are_refused_by_both_names(tmp_path, mode, size):
    """Rows of int8 could be, but there is no kernel; in 4 bit a block of scales would hold values of two experts."""
    model = small_mixtral(size)
    state = {}
    for expert in (0, 1):
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            # Weights of different sizes: the length of their packed quant_state differs too.
            state |= stored_by_bitsandbytes(name, torch.rand(size, size) * 10.0 ** (-3 * expert), mode)
    save(state, tmp_path)
    stored = r"'model\.layers\.0\.block_sparse_moe\.experts\.0\.w\d\.weight'"
    merged = r"'model\.layers\.0\.mlp\.experts\.\w+'"
    message = rf"^{stored} is quantized already.*combines it with others into {merged}.*use the original checkpoint"
    with pytest.raises(CheckpointError, match=message):
        sources_in_checkpoint(tensors_of(model), open_checkpoint(tmp_path), conversion=KeyConversion(model))


@pytest.mark.parametrize("odd", ["plain", "of another shape"])
def test_experts_of_which_one_is_stored_otherwise_are_not_joined(tmp_path, odd):
    model = small_mixtral(64)
    state = {}
    for expert in (0, 1):
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.{expert}.{part}.weight"
            is_odd = (expert, part) == (1, "w2")
            weight = torch.rand(128 if is_odd and odd == "of another shape" else 64, 64)
            is_plain = is_odd and odd == "plain"
            state |= {name: weight} if is_plain else stored_by_bitsandbytes(name, weight, "nf4")
    save(state, tmp_path)
    message = r"is quantized already.*into 'model\.layers\.0\.mlp\.experts\.down_proj'.*use the original checkpoint"
    with pytest.raises(CheckpointError, match=message):
        sources_in_checkpoint(tensors_of(model), open_checkpoint(tmp_path), conversion=KeyConversion(model))


def test_non_persistent_buffer_on_meta_is_taken_from_what_was_built_again():
    with init_empty_weights(include_buffers=True):
        model = Buffers()
    again = Buffers()
    sources = sources_in_checkpoint(
        tensors_of(model),
        checkpoint_of({"weight": (2,), "kept": (3,)}),
        rebuilt_buffers=lambda: dict(again.named_buffers()),
        strict=True,
    )
    assert sources.keys() == {"weight", "kept", "transient"}
    (transient,), (kept,) = sources["transient"], sources["kept"]
    assert transient.tensor is again.transient
    assert kept.tensor.name == "kept"


def test_nothing_is_built_again_where_no_buffer_is_lost():
    def never():
        raise AssertionError("built again")

    sources = sources_in_checkpoint(tensors_of(Buffers()), checkpoint_of({"weight": (2,)}), rebuilt_buffers=never)
    assert sources.keys() == {"weight"}


def test_buffer_that_is_not_among_those_built_again_is_an_error():
    with init_empty_weights(include_buffers=True):
        model = Buffers()
    checkpoint = checkpoint_of({"weight": (2,), "kept": (3,)})
    with pytest.raises(CheckpointError) as caught:
        sources_in_checkpoint(tensors_of(model), checkpoint, rebuilt_buffers=lambda: {"other": torch.ones(4)})
    assert caught.value.missing_keys == ["transient"]


def test_llama_built_on_meta_gets_its_rotary_buffers_again(tmp_path):
    model = llama(False)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(buffer.is_meta for buffer in empty.buffers())
    sources = sources_in_checkpoint(
        tensors_of(empty),
        open_checkpoint(tmp_path),
        conversion=KeyConversion(empty),
        rebuilt_buffers=lambda: rebuilt_buffers(empty, torch.float32),
    )
    lost = dict(model.named_buffers())
    assert lost
    assert all(torch.equal(sources[name][0].tensor, buffer) for name, buffer in lost.items())


COMPONENT = st.sampled_from(["a", "b", "layers", "0", "1", "10", "a_b", "weight", "a+b", "(x)"])
TREE = st.lists(st.lists(COMPONENT, min_size=1, max_size=4).map(".".join), min_size=1, max_size=8, unique=True)
PART = st.text("XYZ_+*()[]|^$", min_size=1, max_size=4)


@given(names=TREE, data=st.data())
def test_random_renaming_undone_by_key_mapping_finds_every_tensor(names, data):
    shapes = {name: (index + 1, 2) for index, name in enumerate(names)}
    size = len(names)
    renamed = data.draw(st.lists(st.lists(PART, min_size=1, max_size=3).map(".".join), min_size=size, max_size=size,
                                 unique=True))  # fmt: skip
    original = dict(zip(renamed, names, strict=True))
    rules = {f"^{re.escape(new)}$": old for new, old in original.items()}
    mapping = data.draw(st.sampled_from([original.__getitem__, rules]))
    stored = data.draw(st.permutations(renamed))
    sources = sources_in_checkpoint(
        [parameter(name, shape) for name, shape in shapes.items()],
        checkpoint_of({new: shapes[original[new]] for new in stored}),
        key_mapping=mapping,
        strict=True,
    )
    assert stored_names(sources) == {old: new for new, old in original.items()}


def test_key_mapping_that_gives_no_name_is_refused():
    with pytest.raises(ConfigError, match=r"returns None for 'a\.weight'"):
        sources_in_checkpoint(tensors_of(TwoLayers()), checkpoint_for(TwoLayers()), key_mapping=lambda key: None)


def test_floating_numbers_where_the_model_has_integers_are_refused():
    with pytest.raises(CheckpointError, match="'count'"):
        sources_in_checkpoint(
            [ModelTensor(("count",), torch.tensor(0), False, True)], checkpoint_of({"count": (torch.float32, ())})
        )
