"""Plans of well-known models on usual budgets, from their configs alone: the tables of the README and docs/plans.md."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigload.planning.placing.accounts import PlacedUnit
    from bigload.planning.plan import Plan

BUDGETS = {"8 GB": {0: "8GB"}, "24 GB": {0: "24GB"}, "80 GB": {0: "80GB"}, "2 x 80 GB": {0: "80GB", 1: "80GB"}}
HOST = "512GB"
PLANNED_MODES = ("none", "int8", "nf4", "nf4-dq")
# What the README has of it.
BRIEF_MODE, BRIEF_BUDGETS = "nf4", ("8 GB", "24 GB", "80 GB")


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
    lines = [f"| model | mode | GiB | {' | '.join(BUDGETS)} |", "|---|---|---|" + "---|" * len(BUDGETS)]
    for name in configs():
        for mode in PLANNED_MODES:
            plans = [_plan(name, mode, budget) for budget in BUDGETS]
            size = next((f"{plan.nbytes / 2**30:.2f}" for plan in plans if plan is not None), "-")
            lines.append(f"| {name} | {mode} | {size} | {' | '.join(map(_cell, plans))} |")
    return "\n".join(lines)


def brief_plans_table() -> str:
    """Write a line for each model in one mode: what of it stays on one GPU."""
    heads = ["in 4 bit (nf4)", "size", *(f"on a GPU of {budget}" for budget in BRIEF_BUDGETS)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in configs():
        plans = [_plan(name, BRIEF_MODE, budget) for budget in BRIEF_BUDGETS]
        size = next((f"{plan.nbytes / 2**30:.1f} GiB" for plan in plans if plan is not None), "-")
        lines.append(f"| {name} | {size} | {' | '.join(map(_brief_cell, plans))} |")
    return "\n".join(lines)


def example_plan() -> tuple[str, Plan]:
    """Return a plan that is drawn in the documents, and its title: a model that is larger than its GPU."""
    plan = _plan("Llama-3-70B", "nf4", "24 GB", host="64GB")
    assert plan is not None
    return "Llama-3-70B on a 24 GB GPU", plan


@functools.cache
def _empty(name: str) -> Any:
    import transformers

    from bigload import init_empty_weights

    with init_empty_weights():
        return transformers.AutoModelForCausalLM.from_config(configs()[name])


@functools.cache
def _plan(name: str, mode: str, budget: str, host: str = HOST) -> Plan | None:
    from bigload import PlacementError, plan_device_map

    try:
        return plan_device_map(_empty(name), mode, max_memory={**BUDGETS[budget], "cpu": host})
    except PlacementError:
        return None


def _cell(plan: Plan | None) -> str:
    """Say what is streamed."""
    if plan is None:
        return "-"
    if not plan.offloaded:
        return "resident"
    if not plan.streamed_bytes:
        return "embedding on the CPU"
    blocks, away = _blocks(plan)
    by_expert = [placed for placed in away if placed.is_by_expert]
    if by_expert and len(by_expert) == len(plan.offloaded):
        held = sum(placed.cached for placed in by_expert) / sum(placed.unit.most_experts for placed in by_expert)
        return f"experts of {len(away)} of {len(blocks)} away, {held:.0%} of them cached"
    return f"{len(away)} of {len(blocks)} streamed, {plan.streamed_bytes / 2**30:.2f} GiB"


def _brief_cell(plan: Plan | None) -> str:
    """Say what stays on the GPU."""
    if plan is None:
        return "-"
    if not plan.streamed_bytes:
        return "fits"
    blocks, away = _blocks(plan)
    by_expert = [placed for placed in away if placed.is_by_expert]
    if by_expert and len(by_expert) == len(plan.offloaded):
        here = [placed.cached if placed.home is not None else placed.unit.most_experts for placed in blocks]
        share = sum(here) / sum(placed.unit.most_experts for placed in blocks)
        return f"{share:.0%} of the experts"
    return f"{len(blocks) - len(away)} of {len(blocks)} blocks"


def _blocks(plan: Plan) -> tuple[list[PlacedUnit], list[PlacedUnit]]:
    """Return the blocks of a plan, and those whose weights are stored elsewhere than on the GPU."""
    blocks = [placed for placed in plan.units if placed.unit.is_block]
    return blocks, [placed for placed in blocks if placed.home is not None]
