"""Shares of tensors from checkpoints of all kinds, put together again: bit for bit what one process loads."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from checkpoints import empty, save
from comparisons import equal
from mixtures import MIXTURES, config, mixture
from references import stored_by_bitsandbytes
from safetensors.torch import load_file
from scaled import BLOCKS, in_blocks, in_fp8, in_mxfp4, says
from torch import nn

from bigload import QuantizationError
from bigload.distributed.parts import Shares, to_execute
from bigload.distributed.shards import NotHere, QuantizedShard
from bigload.model.view import ModelView
from bigload.pipeline.execute import execute
from bigload.planning.placing.shares import shared_among
from bigload.planning.planner import plan_load
from bigload.planning.request import load_request
from bigload.quantization.quantized_weight import QuantizedWeight


class Together:
    """Stands for the processes of a mesh: what all gather is known when each has been run once."""

    def __init__(self, ranks):
        self.ranks, self.device, self.rank, self._known, self._number = ranks, torch.device("cpu"), 0, {}, 0

    def begin(self, rank):
        self.rank, self._number = rank, 0

    def gather(self, own):
        self._number += 1
        self._known[self.rank, self._number] = own.clone()
        return torch.cat([self._known.get((rank, self._number), own) for rank in range(self.ranks)])

    def spread(self, tensor, **given):
        pass


def loaded(build, mode, location, select=None):
    """Return the plan, and what is loaded by one process."""
    request = load_request(mode, location, "cpu")
    request = dataclasses.replace(request, placement=dataclasses.replace(request.placement, select=select))
    plan = plan_load(ModelView(build()), request)
    return plan, execute(to_execute(plan))


def joined(build, mode, location, ranks):
    """Return what the first of several processes has gathered, by name, and how many bytes they have read."""
    each = [
        loaded(build, mode, location, lambda view, tensors, rank=rank: shared_among(tensors, rank, ranks))
        for rank in range(ranks)
    ]
    together = Together(ranks)
    for _ in range(4):  # each pass knows one more of the gathers, which depend on those before
        for rank in reversed(range(ranks)):
            together.begin(rank)
            plan, found = each[rank]
            shares = Shares(together, plan, dict(found))
            made = {planned.tensor.name: shares.gathered(planned) for planned in plan.tensors}
    return made, sum(plan.read_bytes for plan, _ in each)


def parts_of(value):
    return value.parts if isinstance(value, QuantizedWeight) else {"weight": value}


class Net(nn.Module):
    """Rows that no blocksize divides, biases, a parameter without dimensions, and fewer rows than processes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(72, 50), nn.Linear(50, 72)]) for _ in range(2))
        self.scale, self.few = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.randn(2, 3))
        self.head = nn.Linear(72, 5)


def plain(folder):
    return Net, save(Net().state_dict(), folder)


def pickled(folder):
    folder.mkdir()
    torch.save(Net().state_dict(), folder / "pytorch_model.bin")
    return Net, folder


def in_memory(folder):
    torch.manual_seed(0)
    net = Net()
    return (lambda: net), None


def stored_in(mode, storage=torch.uint8):
    def make(folder):
        state = {}
        for name, tensor in Net().state_dict().items():
            is_quantized = name.startswith("blocks") and name.endswith("weight")
            state |= stored_by_bitsandbytes(name, tensor, mode, storage=storage) if is_quantized else {name: tensor}
        return Net, save(state, folder)

    return make


def in_scales(height, width=1024):
    """Numbers in fp8 with scales for each row, some rows, or all of them."""

    def make(folder):
        state = {}
        for name, tensor in Net().state_dict().items():
            if name.startswith("blocks") and name.endswith("weight"):
                state[name], scales = in_blocks(tensor, (height, width))
                state[f"{name}_scale" + "_inv" * (width < 1024)] = scales if height < 1024 else scales[0, 0]
            else:
                state[name] = tensor
        save(state, folder)
        if height == 1024:
            says(folder, quant_method="modelopt", quant_algo="FP8")
        elif height == 1:
            weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
            groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
            says(folder, quant_method="compressed-tensors", format="float-quantized", config_groups=groups)
        else:
            says(folder, **BLOCKS | {"weight_block_size": [height, width]})
        return Net, folder

    return make


def family(name, rewrite=lambda folder: None):
    def make(folder):
        mixture(name).save_pretrained(folder)
        rewrite(folder)
        return lambda: MIXTURES[name][0](config(name)), folder

    return make


def in_linears(folder):
    """As transformers 4 writes it: each expert quantized for itself."""
    state = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        is_quantized = key.endswith("proj.weight")
        state |= stored_by_bitsandbytes(key, tensor, "nf4-dq") if is_quantized else {key: tensor}
    save({key: tensor.clone() for key, tensor in state.items()}, folder)


KINDS = {
    "plain": (plain, ("nf4", "nf4-dq", "int8", "none"), 1),
    "pickled": (pickled, ("nf4-dq",), 1),
    "in memory": (in_memory, ("nf4-dq", "int8"), 1),
    "stored in nf4": (stored_in("nf4-dq"), (None,), 1),
    "stored in nf4 as bfloat16": (stored_in("nf4", torch.bfloat16), (None,), 1),
    "stored in int8": (stored_in("int8"), (None,), 1),
    "merged experts": (family("qwen3_moe"), ("nf4-dq", "none"), 1),
    "experts that are stored quantized": (family("qwen3_moe", in_linears), (None,), 2),
    "experts that are turned": (family("gpt_oss"), ("nf4-dq", "none"), 2),
    "experts in mxfp4": (family("gpt_oss", in_mxfp4), ("nf4",), 2),
    "fp8 by rows": (in_scales(1), ("nf4",), 1),
    "fp8 by small blocks": (in_scales(8, 32), ("nf4-dq", "int8"), 1),
    "fp8 by tensor": (in_scales(1024), ("nf4",), 1),
    "fp8 by blocks": (family("qwen3_moe", in_fp8), ("nf4-dq", "int8", "none"), 1),
}


@pytest.mark.parametrize("ranks", [3])
@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind, (_, modes, _) in KINDS.items() for mode in modes])
def test_shares_together_are_the_whole(tmp_path, kind, mode, ranks):
    make, _, times = KINDS[kind]
    build, location = make(tmp_path / "checkpoint")
    first = build if location is None else lambda: empty(build)
    plan, expected = loaded(first, mode, location)
    found, read = joined(first, mode, location, ranks)
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        parts, own = parts_of(value), parts_of(found[name])
        assert parts.keys() == own.keys(), name
        for part, tensor in parts.items():
            one, other = (each.view(torch.uint8) if each.dim() else each for each in (own[part], tensor))
            assert equal(one, other), (name, part)
    # Buffers and tables are had by all; what is stored in another order, some read in vain.
    assert read <= plan.read_bytes * (1 if times == 1 else ranks) * 1.1 + 3000 * ranks


def test_versions_of_torch_that_gather_into_other_memory_each_time_are_refused():
    whole, gathered = SimpleNamespace(name="w"), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(QuantizationError, match="'w': this version of torch gathers into other memory each time"):
        QuantizedShard.fsdp_post_all_gather(None, (gathered,), (whole, 0), torch.bfloat16, out=gathered.clone())
    assert QuantizedShard.fsdp_post_all_gather(None, (gathered,), (whole, 0), torch.bfloat16, out=gathered) is None


def test_scales_that_are_not_here_are_refused_and_have_nothing_private():
    assert not hasattr(NotHere("w"), "__deepcopy__")
    with pytest.raises(QuantizationError, match="'w'"):
        _ = NotHere("w").absmax
