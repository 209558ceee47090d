"""Models whose weights are streamed, from host memory or files, as a load leaves them."""

import copy

import torch
from models import GPT
from torch import nn

from bigload import load_and_quantize_model
from bigload.hardware.layout import TensorSpec
from bigload.hardware.pinned import HostGroup
from bigload.offload.device_hooks import detach
from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup, FilePart
from bigload.offload.leaves import Group, Leaf, streamed_tensors_of
from bigload.quantization.cpu_forwards import streamed_forward

# Later than a file's time by what the coarsest clock of a file system can tell.
CLOCK_NS = 10 * 10**9
# Of several dtypes and odd sizes, one of them empty.
PARTS = {
    "packed": TensorSpec(torch.uint8, (33, 1)),
    "scales": TensorSpec(torch.float32, (5,)),
    "offset": TensorSpec(torch.float32, ()),
    "none": TensorSpec(torch.bfloat16, (0, 4)),
    "rows": TensorSpec(torch.int8, (3, 7)),
}
MODES = ("fp32", "bf16", "int8", "nf4", "nf4-dq", "fp4")


def parts_of(tensors):
    """Describe tensors as parts."""
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def tensors_of(leaves):
    """Return what is streamed of leaves, by name."""
    return {each.name: each.get() for leaf in leaves for each in streamed_tensors_of(leaf)}


def at_rest(tensors, device):
    """Copy tensors into host memory, from which they are copied to a device."""
    store = HostGroup(parts_of(tensors), device)
    with torch.no_grad():
        for name, tensor in tensors.items():
            store.tensors[name].copy_(tensor)
    return store


def group_of(name, leaves, device):
    """Copy the weights of leaves into host memory."""
    return Group(name, tuple(leaves), at_rest(tensors_of(leaves), device))


def written(tensors, file):
    """Write tensors one after the other, 8 bytes apart as in safetensors, and say where."""
    parts, content = {}, b"header--"
    for name, part in parts_of(tensors).items():
        parts[name] = FilePart(file, len(content), part)
        values = tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        content += values + b"-" * (-len(values) % 8)
    file.write_bytes(content)
    return parts


class Poisoned(HostGroup):
    """Holds its bytes where nobody views them; what is viewed at rest is 0xFF: NaN, -1, the last entry of a table."""

    @property
    def source(self):
        return self.truth


def poison(group):
    store = group.store
    truth = store._memory.clone()
    store.truth = truth.pin_memory() if store.is_pinned else truth
    store._memory.fill_(0xFF)
    store.__class__ = Poisoned


def resident(mode, device, layers=3):
    """A model whose weights are on its device; on the CPU its 4-bit layers keep no packed twin, as streamed ones."""
    torch.manual_seed(7)
    model = GPT(layers=layers).eval()
    if mode in ("fp32", "bf16"):
        model.to(device, torch.float32 if mode == "fp32" else torch.bfloat16)
    else:
        model = load_and_quantize_model(model, mode, device_map=device)
        detach(model)  # these ask a layer of the model where it is, which may be streamed next
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.forward = streamed_forward(module)
    return model.requires_grad_(False)


def linears(model, path):
    return [Leaf(name, m) for name, m in model.named_modules() if name.startswith(path) and isinstance(m, nn.Linear)]


def stream(model, device, slots=2, poisoned=True):
    groups = [
        group_of(f"h.{i}", linears(model, f"transformer.h.{i}."), device) for i in range(len(model.transformer["h"]))
    ]
    if poisoned:
        for group in groups:
            poison(group)
    return Engine(model, groups, device, slots)


def tokens(device, time=16):
    return torch.randint(0, 96, (2, time), generator=torch.Generator().manual_seed(3)).to(device)


def assert_at_rest(engine):
    assert not any(slot.users for slot in engine.pool.slots)
    for group in engine.groups:
        for name, tensor in tensors_of(group.leaves).items():
            assert tensor.data_ptr() == group.store.tensors[name].data_ptr()


def engines_of(model):
    """Return what streams the weights of a loaded model, one for each device: nobody else tells what it holds."""
    return model.offload._engines


def hooks_of(model):
    """List the forward hooks of a model and of all modules in it."""
    each = [(*module._forward_pre_hooks.values(), *module._forward_hooks.values()) for module in model.modules()]
    return [hook for hooks in each for hook in hooks]


class Own(nn.Linear):
    """A layer that must find its weight in itself."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def pairs(kind, count=4, device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(kind(64, 64), kind(64, 64)) for _ in range(count))).to(device)


def groups_of(model, device, folder=None):
    """Let each pair be a group, in host memory or in files."""
    for index, pair in enumerate(model):
        leaves = [Leaf(f"{index}.{k}", layer) for k, layer in enumerate(pair)]
        if folder is None:
            yield group_of(str(index), leaves, device)
        else:
            yield Group(str(index), tuple(leaves), FileGroup(written(tensors_of(leaves), folder / str(index))))


def stream_from_disk(model, device, folder, slots=2):
    groups = []
    for index in range(len(model.transformer["h"])):
        leaves = tuple(linears(model, f"transformer.h.{index}."))
        groups.append(Group(f"h.{index}", leaves, FileGroup(written(tensors_of(leaves), folder / f"{index}.bin"))))
    return Engine(model, groups, device, slots)


def streamed(device, folder, home, dtype=torch.float32, kind=nn.Linear, slots=2):
    """Return a model on the device, and a copy of it that is streamed from host memory or from files."""
    expected = pairs(kind, device=device).to(dtype).requires_grad_(False)
    model = copy.deepcopy(expected)
    groups = list(groups_of(model, device, folder if home == "disk" else None))
    return expected, model, Engine(model, groups, device, slots)
