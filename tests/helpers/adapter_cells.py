"""What PEFT does with a loaded model, for each method, mode and place: right, or refused with a reason.

Run as a program it writes the table in docs/fine-tuning.md, each cell of which tests/interop/test_adapters.py holds
against what it finds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import empty
from mixtures import MIXTURES, config
from models import TOKENS, llama
from torch import nn

from bigload import BnbQuantizationConfig, load_and_quantize_model, plan_device_map

MODES = ("none", "nf4", "nf4-dq", "fp4", "int8")
# Place -> the family that is loaded there.
PLACES = {"resident": "llama", "disk": "llama", "cpu": "llama", "two": "llama", "experts": "qwen3_moe"}
TITLES = {
    "resident": "resident",
    "disk": "streamed from the disk",
    "cpu": "from host memory",
    "two": "two GPUs",
    "experts": "mixture of experts",
}
FAMILIES = {
    "llama": partial(llama, num_hidden_layers=2),
    "qwen3_moe": lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe")),
}


@dataclass(frozen=True)
class Cell:
    """A model that can be loaded again and again, with the same weights.

    Attributes:
        source: the checkpoint.
        folder: an empty one.
    """

    place: str
    mode: str
    device: torch.device
    source: Path
    folder: Path

    @property
    def tokens(self) -> torch.Tensor:
        """Return two sequences, on the device that computes."""
        return (TOKENS + 3).to(self.device)

    def load(self) -> nn.Module:
        """Load the model, for inference."""
        build = FAMILIES[PLACES[self.place]]
        fields = {"torch_dtype": "fp32", "bnb_4bit_compute_dtype": "fp32"}
        fields |= {"skip_modules": ["*"]} if self.mode == "none" else {}
        asked = BnbQuantizationConfig.from_mode("nf4" if self.mode == "none" else self.mode, **fields)
        options: dict[str, Any] = {"device_map": {"": self.device}}
        if self.place == "two":
            plan = plan_device_map(empty(build), asked, self.source, options["device_map"])
            total, reserve = sum(plan.device_bytes.values()), plan.accounts[0].reserve
            options = {"device_map": "balanced", "max_memory": dict.fromkeys((0, 1), total * 3 // 4 + reserve)}
        elif self.place in ("disk", "cpu"):
            options["device_map"] |= {name: self.place for name, _ in empty(build).named_children()}
            options["offload_folder"] = self.folder / "cache"
        return load_and_quantize_model(empty(build), asked, self.source, **options).eval()


Method = Callable[[Cell, Any], dict[str, torch.Tensor]]


def _logits(cell: Cell, model: Any, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=cell.tokens, **given).logits


def _trained(cell: Cell, model: Any) -> dict[str, torch.Tensor]:
    """Train two steps. Returns the logits before and after, and the first gradients."""
    found = {"before": _logits(cell, model)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model.train()
    for step in range(2):
        model(input_ids=cell.tokens, labels=cell.tokens).loss.backward()
        if step == 0:
            found |= {f"gradient of {name}": p.grad.clone() for name, p in trained.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    assert len(found) > 1
    return found | {"after": _logits(cell, model)}


def _adapted(model: Any, kind: str = "Lora", **fields: Any) -> Any:
    import peft

    torch.manual_seed(2)
    if kind == "Lora":
        fields = {"r": 4, "init_lora_weights": False} | fields
    return peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**fields))


def _plain(cell: Cell, model: Any, *, kind: str = "Lora", **fields: Any) -> dict[str, torch.Tensor]:
    return _trained(cell, _adapted(model, kind, **fields))


def _saved(cell: Cell, model: Any) -> dict[str, torch.Tensor]:
    import peft

    adapted = _adapted(model, target_modules=LAYERS)
    expected = {"saved": _logits(cell, adapted)}
    adapted.save_pretrained(cell.folder / "adapter")
    again = peft.PeftModel.from_pretrained(cell.load(), cell.folder / "adapter", is_trainable=True)
    found = _trained(cell, again)
    assert torch.equal(found["before"], expected["saved"])
    return found | expected


def _merged(cell: Cell, model: Any, **fields: Any) -> dict[str, torch.Tensor]:
    found = {"without": _logits(cell, model)}
    adapted = _adapted(model, **({"target_modules": LAYERS} | fields))
    return found | {"unmerged": _logits(cell, adapted), "merged": _logits(cell, adapted.merge_and_unload())}


def _merged_for_a_while(cell: Cell, model: Any) -> dict[str, torch.Tensor]:
    adapted = _adapted(model, target_modules=LAYERS)
    found = {"unmerged": _logits(cell, adapted)}
    adapted.merge_adapter()
    found["merged"] = _logits(cell, adapted)
    adapted.unmerge_adapter()
    return found | {"merged and unmerged": _logits(cell, adapted)}


def _several(cell: Cell, model: Any) -> dict[str, torch.Tensor]:
    import peft

    adapted = _adapted(model, target_modules=LAYERS)
    torch.manual_seed(5)
    other = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted.add_adapter("other", other)
    adapted.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    found = {}
    for name in ("other", "both", "default"):
        adapted.set_adapter(name)
        found[name] = _logits(cell, adapted)
    with adapted.disable_adapter():
        found["disabled"] = _logits(cell, adapted)
    found["one for each sequence"] = _logits(cell, adapted, adapter_names=["other", "__base__"])
    adapted.set_adapter("other")
    adapted.delete_adapter("default")
    return found | _trained(cell, adapted)


LAYERS = ["q_proj", "o_proj"]
METHODS: dict[str, Method] = {
    "LoRA": partial(_plain, target_modules=LAYERS),
    "LoRA, rank-stabilized": partial(_plain, target_modules=LAYERS, use_rslora=True),
    "DoRA": partial(_plain, target_modules=LAYERS, use_dora=True),
    'LoRA, `target_modules="all-linear"`': partial(_plain, target_modules="all-linear"),
    "LoRA, the embedding and the head too": partial(_plain, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "`modules_to_save`, the head and a norm": partial(
        _plain, target_modules=LAYERS, modules_to_save=["lm_head", "norm"]
    ),
    "`modules_to_save`, a layer": partial(_plain, target_modules=LAYERS, modules_to_save=["v_proj"]),
    "`trainable_token_indices`": partial(
        _plain, target_modules=LAYERS, trainable_token_indices={"embed_tokens": [4, 5]}
    ),
    "`target_parameters`, a layer's weight": partial(
        _plain, target_modules=LAYERS, target_parameters=["self_attn.v_proj.weight"]
    ),
    "`layer_replication`": partial(_plain, target_modules=LAYERS, layer_replication=[[0, 2], [1, 2]]),
    'init "gaussian"': partial(_plain, target_modules=LAYERS, init_lora_weights="gaussian"),
    'init "orthogonal"': partial(_plain, target_modules=LAYERS, init_lora_weights="orthogonal"),
    'init "olora"': partial(_plain, target_modules=LAYERS, init_lora_weights="olora"),
    'init "pissa"': partial(_plain, target_modules=LAYERS, init_lora_weights="pissa"),
    "saved and loaded again": _saved,
    "`merge_and_unload`": _merged,
    "`merge_adapter`, `unmerge_adapter`": _merged_for_a_while,
    "several adapters": _several,
    "IA3": partial(_plain, kind="IA3", target_modules=["k_proj", "o_proj"], feedforward_modules=[]),
    "AdaLoRA": partial(_plain, kind="AdaLora", target_modules=LAYERS, total_step=10),
    "VeRA": partial(_plain, kind="Vera", target_modules=LAYERS, r=4, init_weights=False),
    "OFT": partial(_plain, kind="OFT", target_modules=LAYERS, oft_block_size=32, r=0),
    "FourierFT": partial(_plain, kind="FourierFT", target_modules=LAYERS, n_frequency=10),
    "FourierFT, merged": partial(_merged, kind="FourierFT", target_modules=LAYERS, n_frequency=10, init_weights=True),
    "HRA": partial(_plain, kind="HRA", target_modules=LAYERS),
    "prompt tuning": partial(_plain, kind="PromptTuning", task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": partial(_plain, kind="PrefixTuning", task_type="CAUSAL_LM", num_virtual_tokens=3),
}

_QUANTIZED = MODES[1:]
# Method -> the modes in which it is refused, the words of the error, and the letter of the reason in the page.
REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "`modules_to_save`, a layer": (_QUANTIZED, "modules_to_save would train a copy", "a"),
    'init "orthogonal"': (_QUANTIZED, "dtype can require gradients", "b"),
    'init "pissa"': (_QUANTIZED, "initialize PiSSA under float32", "c"),
    "FourierFT, merged": (_QUANTIZED, "cannot merge into its weight", "d"),
    "HRA": (_QUANTIZED, "would compute with its packed bytes", "e"),
}
_OF_EXPERTS = {'LoRA, `target_modules="all-linear"`': (MODES[1:4], "holds experts in 4 bit", "f")}
_STREAMED = {"`target_parameters`, a layer's weight": (MODES[:1], "has no parameter 'weight' to stream", "h")}
_STREAMED_TO_A_GPU = {"`layer_replication`": (_QUANTIZED, "but its input is on cuda", "g")}


def refusal(method: str, place: str, mode: str, kind: str) -> tuple[str, str] | None:
    """Return the words and the letter of the reason why a cell is refused; None if it is right.

    Args:
        kind: "cpu" or "cuda", the device that computes.
    """
    refused = REFUSED
    if place == "experts":
        refused = refused | _OF_EXPERTS
    elif place in ("disk", "cpu"):
        refused = refused | _STREAMED | (_STREAMED_TO_A_GPU if kind == "cuda" else {})
    modes, words, letter = refused.get(method, ((), "", ""))
    return (words, letter) if mode in modes else None


# These round to the mode's format once more, so that the result is near what values that are not rounded give.
ROUNDED_AGAIN = {"`merge_and_unload`", "`merge_adapter`, `unmerge_adapter`", 'init "olora"'}


PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
_MARK = "<!-- made by: python tests/helpers/adapter_cells.py -->\n"


def table() -> str:
    """Return the table of methods and places, as Markdown, with the mark before it."""
    rows = [["method", *TITLES.values()], ["---"] * (len(TITLES) + 1)]
    for method in METHODS:
        rows.append([method, *(_cell(method, place) for place in TITLES)])
    return _MARK + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(method: str, place: str) -> str:
    kind = "cpu" if place in ("resident", "disk", "experts") else "cuda"
    found = {mode: refusal(method, place, mode, kind) for mode in MODES}
    refused = [mode for mode, reason in found.items() if reason is not None]
    if not refused:
        return "right"
    letter = next(reason[1] for reason in found.values() if reason is not None)
    which = {
        MODES: "refused",
        MODES[:1]: "none: refused",
        _QUANTIZED: "quantized: refused",
        MODES[1:4]: "4 bit: refused",
    }[tuple(refused)]
    return f"{which} ({letter})"


def with_table(page: str) -> str:
    """Return a page with the table where it had one."""
    return re.sub(rf"{re.escape(_MARK)}(\|.*\n)*", lambda _: table(), page)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
