"""Plans of well-known models on usual budgets, from their configs alone: the table in docs/plans.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BUDGETS = {"8 GB": {0: "8GB"}, "24 GB": {0: "24GB"}, "80 GB": {0: "80GB"}, "2 x 80 GB": {0: "80GB", 1: "80GB"}}
HOST = "512GB"
PLANNED_MODES = ("none", "int8", "nf4", "nf4-dq")


def configs() -> dict[str, Any]:
    """Give the published configs by the models' names."""
    from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

    llama: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "dtype": "bfloat16"}
    return {
        "Llama-3-8B": LlamaConfig(
            **llama, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
        ),
        "Llama-3-70B": LlamaConfig(
            **llama, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
        ),
        "Mixtral-8x7B": MixtralConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_local_experts=8,
            dtype="bfloat16",
        ),
        "Qwen3-30B-A3B": Qwen3MoeConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            tie_word_embeddings=False,
            dtype="bfloat16",
        ),
    }


def plans_table() -> str:
    """Write the table: a line for each model and mode, a cell for each budget."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    import transformers

    from bigload import init_empty_weights

    yield f"| model | mode | GiB | {' | '.join(BUDGETS)} |"
    yield "|---|---|---|" + "---|" * len(BUDGETS)
    for name, config in configs().items():
        with init_empty_weights():
            model = transformers.AutoModelForCausalLM.from_config(config)
        for mode in PLANNED_MODES:
            size, cells = _cells(model, mode)
            yield f"| {name} | {mode} | {size} | {' | '.join(cells)} |"


def _cells(model: Any, mode: str) -> tuple[str, list[str]]:
    from bigload import BnbQuantizationConfig, PlacementError, plan_device_map

    config = (
        BnbQuantizationConfig(load_in_4bit=True, skip_modules=["*"], torch_dtype="auto")
        if mode == "none"
        else BnbQuantizationConfig.from_mode(mode)
    )
    size, cells = "-", []
    for gpus in BUDGETS.values():
        try:
            plan = plan_device_map(model, config, max_memory={**gpus, "cpu": HOST})
        except PlacementError:
            cells.append("-")
            continue
        size = f"{sum(placed.unit.nbytes for placed in plan.units) / 2**30:.2f}"
        blocks = [placed for placed in plan.units if placed.unit.is_block]
        away = sum(placed.home is not None for placed in blocks)
        by_expert = [placed for placed in blocks if placed.is_by_expert]
        if by_expert and len(by_expert) == len(plan.offloaded):
            held = sum(placed.cached for placed in by_expert) / sum(one.unit.most_experts for one in by_expert)
            cells.append(f"experts of {away} of {len(blocks)} away, {held:.0%} of them cached")
            continue
        cells.append(_cell(away, len(blocks), plan.streamed_bytes, len(plan.offloaded)))
    return size, cells


def _cell(away: int, blocks: int, streamed: int, offloaded: int) -> str:
    if not offloaded:
        return "resident"
    if not streamed:
        return "embedding on the CPU"
    return f"{away} of {blocks} streamed, {streamed / 2**30:.2f} GiB"
