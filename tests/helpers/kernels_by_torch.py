"""The kernels of Triton, computed by torch, for tests without a GPU.

Each takes its arguments by the names and in the order that the kernel itself has in its file, and computes what the
kernel would: only so much as the grid has programs for, with the rest of what it writes left NaN. So what is launched
is tested, and how; the kernels themselves are on a GPU.
"""

import ast
import contextlib
from pathlib import Path

import torch

import bigload
from bigload.offload.on_device import gpu_book
from bigload.quantization import expert_launches

PACKAGE = Path(bigload.__file__).parent
# What Triton is told beside the arguments.
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def _arguments(file):
    """The names of each kernel's arguments."""
    tree = ast.parse((PACKAGE / file).read_text())
    return {each.name: [arg.arg for arg in each.args.args] for each in tree.body if isinstance(each, ast.FunctionDef)}


class _Kernel:
    def __init__(self, compute, names, launched):
        self._compute, self._names, self._launched = compute, names, launched

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            given = {name: value for name, value in kwargs.items() if name not in OPTIONS}
            assert not given.keys() & set(self._names[: len(args)])
            given |= dict(zip(self._names, args, strict=False))
            assert given.keys() == set(self._names)
            self._launched.append(self._compute.__name__)
            with torch.no_grad():
                self._compute(grid, **given)

        return launch


class Kernels:
    """Takes the place of a module of kernels."""

    def __init__(self, file, computations, launched):
        for name, names in _arguments(file).items():
            if name in computations:
                setattr(self, name, _Kernel(computations[name], names, launched))


def _values(of, expert):
    """The dequantized values of an expert, (rows, columns), fp32."""
    place = int(of["places"][expert]) if of["has_places"] else expert
    rows, columns, blocksize = of["rows"], of["columns"], of["blocksize"]
    packed = of["data"].view(-1).view(-1, rows * columns // 2)[place].long()
    count = rows * columns // blocksize
    scales = of["scales"].view(-1)[place * count : (place + 1) * count]
    if of["nested"]:
        inner = of["nested_scales"][torch.arange(expert * count, (expert + 1) * count) // 256]
        scales = of["nested_code"][scales.long()] * inner + of["offsets"]
    values = torch.stack([of["code"][packed >> 4], of["code"][packed & 15]], 1).view(count, blocksize)
    return (values * scales.view(-1, 1)).view(rows, columns)


def _products(of, pair, row, dtype):
    """A row times an expert's weight, with its bias; None for no expert."""
    expert = int(of["ids"].view(-1)[pair])
    if not 0 <= expert < of["num_experts"]:
        return None
    total = _values(of, expert) @ of["x"][row].view(dtype).float()
    return total + of["bias"][expert].float() if of["has_bias"] else total


def gemv(grid, **of):
    out, rows = of["out"].fill_(float("nan")), of["rows"]
    covered = grid[0] * of["block_rows"] // (2 if of["gated"] else 1)
    for pair in range(grid[1]):
        total = _products(of, pair, pair // of["pairs_per_row"], out.dtype)
        total = torch.zeros(rows) if total is None else total
        if of["gated"]:
            gate, up = total.to(out.dtype).float().chunk(2)
            total = torch.nn.functional.silu(gate).to(out.dtype).float() * up
        out[pair, :covered] = total[:covered].to(out.dtype)


def gemv_combined(grid, **of):
    out, top_k = of["out"].fill_(float("nan")), of["top_k"]
    assert top_k <= of["choices"]
    for token in range(grid[1]):
        total = torch.zeros(of["rows"])
        for pair in range(token * top_k, (token + 1) * top_k):
            product = _products(of, pair, pair, out.dtype)
            if product is not None:
                total += product.to(out.dtype).float() * of["weights"].view(-1)[pair].float()
        out[token, : grid[0] * of["block_rows"]] = total[: grid[0] * of["block_rows"]].to(out.dtype)


def grouped(grid, **of):
    out, begin, block = of["out"].fill_(float("nan")), 0, 0
    covered = grid[0] * of["block_rows"]
    assert of["num_experts"] <= of["experts_padded"]
    for expert, end in enumerate(of["ends"].tolist()):
        for first in range(begin, end, of["block_pairs"]):
            pairs = of["order"][first : min(first + of["block_pairs"], end)].long()
            total = of["x"][pairs // of["pairs_per_row"]].view(out.dtype).float() @ _values(of, expert).T
            total = total + of["bias"][expert].float() if of["has_bias"] else total
            if block < grid[1]:
                out[pairs, :covered] = total[:, :covered].to(out.dtype)
            block += 1
        begin = end


def dequantize_visited(grid, **of):
    out, begin = of["out"].fill_(float("nan")), 0
    for expert, end in enumerate(of["ends"].tolist()):
        if end > begin:
            row, column = of["first_row"], of["first_column"]
            values = _values(of, expert)[row : row + of["num_rows"], column : column + of["width"]].reshape(-1)
            covered = min(grid[0] * of["block"], len(values))
            out[expert].view(-1)[:covered] = values[:covered].to(out.dtype)
        begin = end
    assert len(of["ends"]) == grid[1]


def route(grid, **of):
    ids, experts = of["ids"].view(-1), of["num_experts"]
    assert len(ids) == of["num_pairs"] <= of["pairs_padded"]
    assert experts <= of["experts_padded"]
    experts_of = ids.where((ids >= 0) & (ids < experts), experts)
    of["order"].copy_(experts_of.argsort(stable=True))
    of["ends"].copy_(experts_of.bincount(minlength=experts + 1)[:experts].cumsum(0))


def combine(grid, **of):
    out, top_k = of["out"].fill_(float("nan")), of["top_k"]
    covered = grid[1] * of["block"]
    for token in range(grid[0]):
        total = torch.zeros(of["features"])
        for pair in range(token * top_k, (token + 1) * top_k):
            if 0 <= int(of["ids"].view(-1)[pair]) < of["num_experts"]:
                row = of["y"][int(of["places"][pair]) if of["has_places"] else pair].float()
                total += row * of["weights"].view(-1)[pair].float() if of["has_weights"] else row
        out[token, :covered] = total[:covered].to(out.dtype)


def combine_backward(grid, **of):
    of["grad_y"].fill_(float("nan"))
    for place in range(grid[0]):
        pair = int(of["order"][place])
        is_there = 0 <= int(of["ids"].view(-1)[pair]) < of["num_experts"]
        grad = of["grad"][pair // of["top_k"]].float() * is_there
        weight = of["weights"].view(-1)[pair].float() if of["has_weights"] else 1.0
        of["grad_y"][place] = (grad * weight).to(of["grad_y"].dtype)
        if of["has_weights"]:
            row = of["y"][place].float() if is_there else torch.zeros(of["features"])
            of["grad_weights"].view(-1)[pair] = (grad * row).sum().to(of["grad_weights"].dtype)


def admit(grid, **of):
    book, table, slots = of["book"], of["table"], of["slots"]
    owners, uses, missing = book[4 : 4 + slots], book[4 + slots : 4 + 2 * slots], book[4 + 2 * slots : 4 + 4 * slots]
    assert of["ids"].numel() == of["pairs"] <= of["block_pairs"]
    call, hits, misses, _ = book[:4].tolist()
    call += of["is_first"]
    wanted = sorted({expert for expert in of["ids"].tolist() if 0 <= expert < of["num_experts"]})
    there = [int(table[expert]) for expert in wanted if table[expert] >= 0]
    hits += sum(int(uses[slot]) != call for slot in there)
    uses[there] = call
    new = [expert for expert in wanted if table[expert] < 0]
    for at, expert in enumerate(new):
        slot = int(uses.argmin())
        if owners[slot]:
            table[owners[slot] - 1] = -1
        table[expert], owners[slot], uses[slot] = slot, expert + 1, call
        missing[2 * at], missing[2 * at + 1] = expert, slot
    book[:4] = torch.tensor([call, hits, misses + len(new), len(new)])


def fetch(grid, **of):
    book, slots = of["book"], of["slots"]
    assert book[3] <= grid[1]
    for expert, slot in book[4 + 2 * slots : 4 + 4 * slots].view(-1, 2)[: int(book[3])].tolist():
        for begin, words, target in book[4 + 4 * slots :].view(-1, 3)[: of["num_parts"]].tolist():
            source = of["source"][begin + expert * words : begin + (expert + 1) * words]
            of["memory"][target + slot * words : target + (slot + 1) * words] = source


def multiply(grid, **of):
    out, columns = of["out"].fill_(float("nan")), of["columns"]
    assert len(out) == grid[0]
    covered = min(grid[1] * of["block"], columns)
    for own in range(grid[0]):
        row = of["first"] + own
        packed = of["numbers"][own * (columns // 2) : (own + 1) * (columns // 2)].long()
        values = of["number_table"][torch.stack([packed & 15, packed >> 4], 1).view(-1)]
        line = (row // of["rows"] * of["down"] + row % of["rows"] // of["height"]) * of["across"]
        scales = of["scales"].view(-1)[line + torch.arange(columns) // of["width"]]
        scales = of["scale_table"][scales.long()] if of["are_exponents"] else scales.float()
        out[own, :covered] = (values * scales)[:covered].to(out.dtype)


def rms_norm(grid, **of):
    """In the order in which the kernel adds squares."""
    width, threads = of["width"], of["threads"]
    x, out = of["x"].view(-1, width), of["out"].fill_(float("nan")).view(-1, width)
    padded = torch.nn.functional.pad(x.float().square(), (0, 4 * threads * of["turns"] - width))
    shape = (of["turns"], threads, 4) if of["are_fours"] else (of["turns"], 4, threads)
    fours = padded.view(-1, *shape)
    first, second, third, fourth = (fours if of["are_fours"] else fours.mT).cumsum(1)[:, -1].unbind(-1)
    total = ((first + second) + third) + fourth
    for _ in range(of["halvings"]):
        total = total.view(len(x), 2, -1).sum(1)
    for _ in range(of["pairings"]):
        total = total.view(len(x), -1, 2).sum(2)
    scale = torch.rsqrt(total.view(len(x), 1) * of["factor"] + of["eps"])
    found = (x.float() * scale).to(out.dtype) * of["weight"]
    out[: grid[0]] = found[: grid[0]]


def rotate(grid, **of):
    """Heads of queries, then of keys, where their strides say that they are."""
    width, half = of["width"], of["width"] // 2
    of["q_out"].fill_(float("nan"))
    of["k_out"].fill_(float("nan"))
    for program in range(grid[0]):
        row, head = divmod(program, of["heads"])
        name, head = ("q", head) if head < of["q_heads"] else ("k", head - of["q_heads"])
        x, out = (
            of[each].as_strided(
                (width,), (1,), of[each].storage_offset() + row * of[f"{each}_row"] + head * of[f"{each}_head"]
            )
            for each in (name, f"{name}_out")
        )
        cos, sin = (
            of[each]
            .as_strided((of["table_width"],), (1,), of[each].storage_offset() + row * of[f"{each}_row"])
            .repeat(width // of["table_width"])
            for each in ("cos", "sin")
        )
        out.copy_(x * cos + torch.cat([-x[half:], x[:half]]) * sin)


EXPERTS = {each.__name__: each for each in (gemv, gemv_combined, grouped, dequantize_visited, route)}
EXPERTS |= {each.__name__: each for each in (combine, combine_backward)}
BOOK = {each.__name__: each for each in (admit, fetch)}


def install(patch):
    """Compute on the CPU as on a GPU with kernels. Returns a list of those that were launched."""
    launched = []
    experts = Kernels("quantization/kernels/expert_kernels.py", EXPERTS, launched)
    suits = expert_launches.suits_kernels
    patch.setattr(expert_launches, "kernels", lambda: experts)
    patch.setattr(expert_launches, "runs_kernels", lambda device: True)
    patch.setattr(expert_launches, "suits_kernels", lambda weight, dtype: suits(_OnGpu(weight), dtype))
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return launched


def install_book(patch):
    """Let a GPU that is the CPU keep the books of caches of experts, with `lazy_gpu`. Returns what was launched."""
    launched = []
    kernels = Kernels("offload/on_device/cache_kernels.py", BOOK, launched)
    suits = gpu_book.GpuBook.suits
    patch.setattr(gpu_book, "_kernels", lambda: kernels)
    patch.setattr(gpu_book, "runs_kernels", lambda device: True)
    patch.setattr(gpu_book.GpuBook, "suits", lambda memory, store, device: suits(memory, store, torch.device("cuda")))
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return launched


def install_in(patch, module, file, computation):
    """Let a module launch one of the kernels in a file. Returns what was launched."""
    launched = []
    kernels = Kernels(file, {computation.__name__: computation}, launched)
    patch.setattr(module, "_kernels" if hasattr(module, "_kernels") else "kernels", lambda: kernels)
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    return launched


class _OnGpu:
    """A weight that says that it is there."""

    def __init__(self, weight):
        self.state, self.shape, self.data = weight.state, weight.shape, self
        self.device = torch.device("cuda", 0)
