"""Stand-ins follow tensors to where they end up: filling by their regions gives what the real operations give."""

import architectures
import pytest
import torch
from checkpoints import empty, empty_like, save
from comparisons import assert_same_bits, state_of
from hypothesis import given, settings
from hypothesis import strategies as st
from models import llama
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, conversion_mapping
from transformers.core_model_loading import Chunk, PermuteForRope, Transpose, WeightConverter

from bigload import init_empty_weights, load_and_quantize_model
from bigload.checkpoint.checkpoint import open_checkpoint
from bigload.errors import CheckpointError
from bigload.io.tensors import LazyTensor, read_whole
from bigload.model.tensors import tensors_of
from bigload.model.transformers_facts import KeyConversion
from bigload.planning.sources import sources_in_checkpoint
from bigload.planning.tracing import NotTraceable, TracedTensor

SIZES = st.integers(1, 3)


def fill(shape, pieces):
    """Fill an empty tensor region by region, as the pipeline does. Pieces are (values, region, transposed)."""
    filled = torch.full(tuple(shape), float("nan"))
    for values, region, transposed in pieces:
        target = filled[region] if region else filled
        (target.mT if transposed else target).copy_(values)
    return filled


def rebuilt(traced, stored):
    return fill(traced.shape, [(stored[piece.name], piece.region, piece.transposed) for piece in traced.pieces])


def traced(*shape, name="w"):
    return TracedTensor.whole(name, shape)


def is_transposed(each):
    return any(piece.transposed for piece in each.pieces)


def may_be_transposed(each):
    stacked = any(isinstance(index, int) for piece in each.pieces for index in piece.region[-2:])
    return len(each.shape) > 1 and not stacked


@st.composite
def rearrangements(draw):
    """Draw stored tensors and run some of them through random operations, real and traced side by side."""
    stored, pool = {}, []

    def store(shape):
        name = f"w{len(stored)}"
        stored[name] = torch.rand(shape)
        pool.append((stored[name], TracedTensor.whole(name, shape)))
        return pool[-1]

    store(tuple(draw(st.lists(SIZES, min_size=1, max_size=3))))
    for operation in draw(st.lists(st.sampled_from(["stack", "cat", "transpose", "contiguous"]), max_size=6)):
        real, stand_in = draw(st.sampled_from(pool))
        rank = real.ndim
        if operation == "contiguous":
            pool.append((real.contiguous(), stand_in.contiguous()))
        elif operation == "transpose" and may_be_transposed(stand_in):
            dims = draw(st.sampled_from([(-1, -2), (-2, -1), (rank - 2, rank - 1)]))
            pool.append((torch.transpose(real, *dims), torch.transpose(stand_in, *dims)))
            assert stand_in.transpose(*dims).pieces == pool[-1][1].pieces
        elif operation == "stack":
            twins = [pair for pair in pool if pair[0].shape == real.shape] + [store(real.shape)]
            chosen = [(real, stand_in), *draw(st.lists(st.sampled_from(twins), max_size=2))]
            # Not between dimensions that were swapped before.
            last = rank - 2 if any(is_transposed(each) for _, each in chosen) else rank
            dim = draw(st.integers(0, max(last, 0))) - draw(st.sampled_from([0, rank + 1]))
            pool.append(tuple(torch.stack(side, dim=dim) for side in zip(*chosen, strict=True)))
        elif operation == "cat":
            dim = draw(st.integers(-rank, rank - 1))
            shape = list(real.shape)
            shape[dim] = draw(SIZES)
            fitting = [
                pair
                for pair in pool
                if pair[0].ndim == rank and all(pair[0].shape[d] == shape[d] for d in range(rank) if d != dim % rank)
            ]
            chosen = [(real, stand_in), *draw(st.lists(st.sampled_from([*fitting, store(shape)]), max_size=2))]
            pool.append(tuple(torch.cat(side, dim=dim) for side in zip(*chosen, strict=True)))
    return stored, pool


@settings(max_examples=100, deadline=None)
@given(rearrangements())
def test_filling_by_regions_gives_what_the_real_operations_give(drawn):
    stored, pool = drawn
    for real, stand_in in pool:
        assert stand_in.shape == real.shape
        assert torch.equal(rebuilt(stand_in, stored), real)


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: torch.add(w, w),
        lambda w: w + w,
        lambda w: -w,
        lambda w: w * 2,
        lambda w: 2 * w,
        lambda w: w @ w,
        lambda w: torch.reshape(w, (4,)),
        lambda w: w.reshape(4),
        lambda w: w.view(4),
        lambda w: torch.chunk(w, 2),
        lambda w: w.chunk(2, dim=0),
        lambda w: torch.split(w, 1),
        lambda w: w[0],
        lambda w: w[:, :1],
        lambda w: list(w),
        lambda w: len(w),
        lambda w: w.T,
        lambda w: w.mT,
        lambda w: w.t(),
        lambda w: w.permute(1, 0),
        lambda w: w.to(torch.float16),
        lambda w: w.size(0),
        lambda w: w.ndim,
        lambda w: torch.stack([w, torch.zeros(2, 2)]),
        lambda w: torch.cat([w, torch.zeros(2, 2)]),
        lambda w: torch.stack([w, traced(2, 3)]),
        lambda w: torch.cat([w, traced(2, 3)]),
        lambda w: torch.cat([w, traced(2)]),
        lambda w: torch.stack([w.transpose(0, 1), w], dim=1),
        lambda w: torch.stack([w, w], dim=2).transpose(-1, -2),
        lambda w: torch.transpose(torch.stack([w, w]), 0, 1),
        lambda w: torch.transpose(traced(2), 0, 0),
    ],
    ids=[
        "add", "plus", "minus", "times", "times_reversed", "matmul", "reshape", "reshape_method", "view", "chunk",
        "chunk_method", "split", "index", "slice", "iterate", "len", "T", "mT", "t", "permute", "to", "size", "ndim",
        "stack_with_real", "cat_with_real", "stack_shapes", "cat_shapes", "cat_ranks", "stack_between_transposed",
        "transpose_stacked", "transpose_other_dims", "transpose_vector",
    ],
)  # fmt: skip
def test_what_does_more_than_rearrange_is_not_traceable(operation):
    with pytest.raises(NotTraceable):
        operation(traced(2, 2))


TINY = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "head_dim": 4}


def mixtral(experts=11):
    return empty(MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=experts))


def qwen3_moe(experts=11):
    sizes = {"moe_intermediate_size": 6, "num_experts": experts, "num_experts_per_tok": 2}
    return empty(Qwen3MoeForCausalLM, Qwen3MoeConfig(**TINY, **sizes))


# How each stores expert E of layer 1: where, its gate, up and down projections, and their width.
MIXTRAL = (mixtral, "model.layers.1.block_sparse_moe.experts.{}.", ("w1", "w3", "w2"), 12)
QWEN3_MOE = (qwen3_moe, "model.layers.1.mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj"), 6)
MERGED = "model.layers.1.mlp.experts."
MOE = pytest.mark.parametrize("library", [MIXTRAL, QWEN3_MOE], ids=["mixtral", "qwen3_moe"])


def stored_experts(library, experts=11):
    """Make the tensors of one layer's experts, by name, in the order of a checkpoint: 1, 10, 2..."""
    _, place, (gate, up, down), width = library
    stored = {}
    for expert in range(experts):
        stored[f"{place.format(expert)}{gate}.weight"] = torch.rand(width, 8)
        stored[f"{place.format(expert)}{up}.weight"] = torch.rand(width, 8)
        stored[f"{place.format(expert)}{down}.weight"] = torch.rand(8, width)
    return dict(sorted(stored.items()))


def experts_of(model):
    return [tensor for tensor in tensors_of(model) if tensor.name.startswith(MERGED)]


def experts_in(library, stored, folder):
    """Find the sources of the merged experts in a checkpoint of these tensors."""
    save(stored, folder)
    model = library[0]()
    return sources_in_checkpoint(experts_of(model), open_checkpoint(folder), conversion=KeyConversion(model))


@MOE
def test_experts_traced_through_the_librarys_converters_are_rebuilt(library):
    conversion = KeyConversion(library[0]())
    stored = stored_experts(library)
    groups = {}
    for key in stored:
        target, pattern = conversion.target(key)
        groups.setdefault(target, {}).setdefault(pattern, []).append(key)
    assert groups.keys() == {MERGED + "gate_up_proj", MERGED + "down_proj"}
    for target, group in groups.items():
        real = conversion.convert(target, {pattern: [stored[key] for key in keys] for pattern, keys in group.items()})
        stand_ins = {
            pattern: [TracedTensor.whole(key, stored[key].shape) for key in keys] for pattern, keys in group.items()
        }
        made = conversion.convert(target, stand_ins)
        assert made.keys() == real.keys() == {target}
        assert torch.equal(rebuilt(made[target], stored), real[target])


@MOE
def test_experts_are_merged_in_the_order_of_their_numbers(library, tmp_path):
    stored = stored_experts(library)
    sources = experts_in(library, stored, tmp_path)
    _, place, (gate, up, down), _ = library
    expected = {
        MERGED + "gate_up_proj": [
            torch.cat([stored[f"{place.format(n)}{part}.weight"] for part in (gate, up)]) for n in range(11)
        ],
        MERGED + "down_proj": [stored[f"{place.format(n)}{down}.weight"] for n in range(11)],
    }
    assert sources.keys() == expected.keys()
    for name, experts in expected.items():
        merged = torch.stack(experts)
        pieces = [(read_whole(s.tensor), s.region, s.transposed) for s in sources[name]]
        assert not any(isinstance(s.tensor, LazyTensor) for s in sources[name])
        assert torch.equal(fill(merged.shape, pieces), merged)


@MOE
@pytest.mark.parametrize("part", [0, 1, 2], ids=["gate", "up", "down"])
def test_checkpoint_that_lacks_one_expert_is_a_checkpoint_error(library, part, tmp_path):
    stored = stored_experts(library)
    del stored[f"{library[1].format(4)}{library[2][part]}.weight"]
    with pytest.raises(CheckpointError, match="experts"):
        experts_in(library, stored, tmp_path)


@MOE
@pytest.mark.parametrize("part", [0, 1, 2], ids=["gate", "up", "down"])
def test_expert_of_another_shape_is_a_checkpoint_error(library, part, tmp_path):
    stored = stored_experts(library)
    stored[f"{library[1].format(4)}{library[2][part]}.weight"] = torch.rand(7, 7)
    with pytest.raises(CheckpointError, match="experts"):
        experts_in(library, stored, tmp_path)


def load_converted(model, stored, converter, folder, monkeypatch):
    """Load a checkpoint into a Llama whose class would convert it so."""
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *args, **kwargs: [converter()])
    save(stored, folder)
    kept = {"skip_modules": ["*"], "load_in_4bit": True, "torch_dtype": torch.float32}
    loaded = load_and_quantize_model(empty_like(model), kept, folder, device_map="cpu", strict=True)
    sources = sources_in_checkpoint(tensors_of(model), open_checkpoint(folder), conversion=KeyConversion(model))
    return loaded, sources


@pytest.mark.parametrize("tied", [False, True])
def test_fused_weight_that_the_library_chunks_loads_right(tied, tmp_path, monkeypatch):
    model = llama(tied, num_key_value_heads=4)
    stored = state_of(model)
    if tied:
        del stored["lm_head.weight"]
    for layer in ("model.layers.0.self_attn.", "model.layers.1.self_attn."):
        stored[f"{layer}qkv.weight"] = torch.cat([stored.pop(f"{layer}{part}_proj.weight") for part in "qkv"])
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    loaded, sources = load_converted(
        model,
        stored,
        lambda: WeightConverter("self_attn.qkv.weight", list(parts), [Chunk(dim=0)]),
        tmp_path,
        monkeypatch,
    )
    for part in parts:
        (source,) = sources[f"model.layers.1.{part}"]
        assert torch.equal(read_whole(source.tensor), model.get_parameter(f"model.layers.1.{part}"))
    assert_same_bits(loaded.state_dict(), model.state_dict())


def test_weight_that_the_library_transposes_loads_right(tmp_path, monkeypatch):
    model = llama(False)
    stored = state_of(model)
    for layer in ("model.layers.0.mlp.", "model.layers.1.mlp."):
        stored[f"{layer}fc.weight"] = stored.pop(f"{layer}gate_proj.weight").t().contiguous()
    loaded, sources = load_converted(
        model,
        stored,
        lambda: WeightConverter("mlp.fc.weight", "mlp.gate_proj.weight", [Transpose(0, 1)]),
        tmp_path,
        monkeypatch,
    )
    (source,) = sources["model.layers.1.mlp.gate_proj.weight"]
    assert source.transposed
    assert not isinstance(source.tensor, LazyTensor)
    assert_same_bits(loaded.state_dict(), model.state_dict())


def test_weight_that_the_library_transposes_is_quantized_as_the_model_holds_it(tmp_path, monkeypatch):
    model = llama(False)
    stored = state_of(model)
    turned = {name.replace("gate_proj", "fc"): t.t().contiguous() if "gate_proj" in name else t
              for name, t in stored.items()}  # fmt: skip
    states = {}
    for folder, tensors in (("plain", stored), ("turned", turned)):
        converters = [WeightConverter("mlp.fc.weight", "mlp.gate_proj.weight", [Transpose(0, 1)])]
        monkeypatch.setattr(
            conversion_mapping, "get_model_conversion_mapping", lambda *args, made=converters, **kwargs: made
        )
        save(tensors, tmp_path / folder)
        states[folder] = load_and_quantize_model(
            empty_like(model), "nf4", tmp_path / folder, device_map="cpu"
        ).state_dict()
    assert_same_bits(states["turned"], states["plain"])


def test_weight_that_the_library_transposes_and_then_permutes_loads_right(tmp_path, monkeypatch):
    model = llama(False)
    stored = state_of(model)
    for layer in ("model.layers.0.self_attn.", "model.layers.1.self_attn."):
        weight = stored.pop(f"{layer}q_proj.weight")
        heads = weight.view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)  # the inverse of PermuteForRope
        stored[f"{layer}q.weight"] = heads.t().contiguous()
    operations = [Transpose(0, 1), PermuteForRope()]
    loaded, _ = load_converted(
        model,
        stored,
        lambda: WeightConverter("self_attn.q.weight", "self_attn.q_proj.weight", operations),
        tmp_path,
        monkeypatch,
    )
    assert_same_bits(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_renamings_that_are_left_out_would_have_renamed_nothing(name):
    """Keys as they are stored today, and as they were in older versions, of the base model too."""
    with init_empty_weights():
        model = architectures.build(name)
    conversion = KeyConversion(model)
    keys = [*model.state_dict()]
    old = [key.replace("norm.weight", "LayerNorm.gamma").replace("norm.bias", "LayerNorm.beta") for key in keys]
    based = [key.removeprefix(f"{model.base_model_prefix}.") for key in keys]
    nested = [f"language_model.model.model.{key}" for key in based]
    for each in (keys, old, based, nested, [*keys, *nested]):
        among = conversion.among(each)
        assert [among.target(key) for key in each] == [conversion.target(key) for key in each]
    assert len(conversion.among(["x.LayerNorm.gamma"])._renamings) == len(conversion._renamings) > 0


def test_renamings_of_old_names_are_left_out_for_todays():
    conversion = KeyConversion(llama())
    assert conversion._renamings
    assert conversion.among(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])._renamings == []
