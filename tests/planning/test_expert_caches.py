"""Mixtures that do not fit: what leaves a GPU is experts, and how many of these stay is held against the budget."""

import functools

import pytest
import torch
from checkpoints import empty
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import MIXTURES, config
from models import GPT
from plans import planned
from torch import nn
from transformers import EncodecConfig, MusicgenConfig, T5Config

from bigload import ConfigError, OffloadConfig, PlacementError, plan_device_map
from bigload.notation import show
from bigload.planning.placing.cpu_or_gpu import experts_gb_per_s
from bigload.planning.report import Rates, plan_json, step_bytes, step_seconds, verdict

GPU = torch.device("cuda", 0)
# Experts of 8 MiB in each block, and some 0.4 MiB beside them, which stays on the device anyway.
LAYERS = 12
FIELDS = {"hidden_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 4096}
FIELDS |= {"moe_intermediate_size": 640, "num_experts": 16, "intermediate_size": 512}
RESERVE = 200 * 2**20


@functools.cache
def build():
    return empty(lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe", **FIELDS)))


def plan(budget=None, device_map="auto", mode="nf4", host="10GiB", reserve=RESERVE, **options):
    offload = OffloadConfig(reserve=reserve, **options)
    max_memory = None if budget is None else {0: budget, "cpu": host}
    return plan_device_map(build(), mode, device_map=device_map, max_memory=max_memory, offload=offload)


def account(made, place=GPU):
    return next(account for account in made.accounts if account.place == place)


def caches(made):
    return [placed.cached for placed in made.units if placed.is_by_expert]


WHOLE = account(plan("9GiB")).needed - RESERVE
ONE = plan("9GiB", {"": 0, "model.layers.0.mlp.experts": "cpu"}).streamed_bytes  # the experts of one block
RECORD = ONE // 16


def test_nothing_but_experts_leaves_and_what_is_left_is_their_cache():
    made = plan(WHOLE + RESERVE - 2 * ONE)
    away = [planned.tensor.name for planned in made.tensors if planned.home is not None]
    assert away
    assert all(".mlp.experts." in name for name in away)
    assert account(made).ring == 2 * ONE
    assert account(made).cache == sum(placed.cache_bytes for placed in made.units)
    assert 0 <= account(made).free < 2 * RECORD
    by_expert = [placed for placed in made.units if placed.is_by_expert]
    assert len(by_expert) == LAYERS or min(caches(made)) >= 8
    assert made.streamed_bytes == len(by_expert) * ONE
    assert max(caches(made)) - min(caches(made)) <= 1


def test_the_map_names_the_experts_and_gives_the_same_again():
    budget = WHOLE + RESERVE - 2 * ONE
    made = plan(budget)
    first = next(placed.unit.name for placed in made.units if placed.is_by_expert)
    assert made.device_map[first] == GPU
    assert made.device_map[f"{first}.mlp.experts"] == torch.device("cpu")
    assert set(made.execution_map.values()) == {GPU}
    again = plan(budget, dict(made.device_map))
    assert [(one.home, one.cached) for one in again.units] == [(one.home, one.cached) for one in made.units]
    assert again.accounts == made.accounts


@settings(max_examples=60)
@given(lacking=st.integers(1, LAYERS * ONE), more=st.integers(0, ONE))
def test_no_budget_is_exceeded_and_a_larger_one_is_not_worse(lacking, more):
    budget = WHOLE + RESERVE - lacking
    try:
        made = plan(budget)
    except PlacementError:
        return
    assert account(made).free >= 0
    larger = plan(budget + more)
    assert account(larger).free >= 0
    assert larger.streamed_bytes <= made.streamed_bytes

    def held(made):
        resident = sum(not one.is_by_expert for one in made.units if one.unit.is_block)
        return resident * ONE + account(made).cache

    if all(one.is_by_expert or one.home is None for one in (*made.units, *larger.units)):
        assert held(larger) >= held(made) - 2 * RECORD - 4096


def test_a_model_that_lacks_little_offloads_few_and_these_keep_half():
    made = plan(WHOLE + RESERVE - 10 * 2**20)  # more than the embedding, which would leave instead
    assert 1 <= len(caches(made)) <= 8
    assert min(caches(made)) >= 8


def test_where_there_is_no_room_for_a_cache_of_use_there_is_none_or_that_of_a_few():
    staying = WHOLE - LAYERS * ONE + 2 * ONE + 2**16  # and what rounding takes
    assert set(caches(plan(RESERVE + staying))) == {0}
    found = caches(plan(RESERVE + staying + 5 * RECORD))
    assert sorted(set(found)) == [0, 2]
    assert found.count(2) == 2


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1.0])
def test_a_share_is_held(share, mode):
    made = plan(
        "9GiB", {"": 0, "model.layers.1.mlp.experts": "cpu", "model.layers.2.mlp": "cpu"}, mode, expert_cache=share
    )
    assert caches(made) == [int(16 * share)] * 2
    budget = WHOLE + RESERVE - 2 * ONE
    if share <= 0.5:
        assert set(caches(plan(budget, expert_cache=share))) == {int(16 * share)}


def test_a_share_that_has_no_room_is_refused_and_a_smaller_one_or_a_larger_budget_helps():
    budget = RESERVE + WHOLE - LAYERS * ONE + 4 * ONE
    with pytest.raises(
        PlacementError, match=r"expert_cache=0\.5: there is no room .* a smaller expert_cache, or a larger"
    ):
        plan(budget, expert_cache=0.5)
    assert caches(plan(budget, expert_cache=0.125))
    assert caches(plan(budget + 5 * ONE, expert_cache=0.5))


def test_a_share_that_a_map_has_no_room_for_is_refused():
    away = {"": 0} | {f"model.layers.{number}.mlp.experts": "cpu" for number in range(LAYERS)}
    with pytest.raises(PlacementError, match="a smaller expert_cache or a larger budget"):
        plan(RESERVE + WHOLE - 3 * ONE, away, expert_cache=1.0)
    assert caches(plan(RESERVE + WHOLE - 3 * ONE, away, expert_cache=0.1)) == [1] * LAYERS


def test_bytes_are_the_most_that_caches_take():
    limit = 20 * RECORD
    made = plan(WHOLE + RESERVE - 2 * ONE, expert_cache=limit)
    assert limit - RECORD * len(caches(made)) - 2**16 < account(made).cache <= limit
    away = {"": 0, "model.layers.1.mlp.experts": "cpu", "model.layers.4.mlp.experts": "cpu"}
    made = plan(WHOLE + RESERVE + 2 * ONE, away, expert_cache=f"{limit}B")
    assert caches(made) in ([9, 9], [10, 9], [10, 10])
    assert account(made).cache <= limit


def test_without_a_budget_a_map_caches_a_quarter():
    away = {"": 0, "model.layers.1.mlp.experts": "cpu"}
    assert caches(plan(None, away)) == [4]
    assert caches(plan(WHOLE + RESERVE + 7 * RECORD, away)) in ([6], [7])


def test_blocks_that_are_offloaded_whole_have_no_cache(small_parts_stream):
    made = plan("9GiB", {"": 0, "model.layers.1": "cpu"}, expert_cache=0.5)
    (placed,) = made.offloaded
    assert any("self_attn" in planned.tensor.name for planned in placed.unit.offloaded)
    assert not placed.is_by_expert
    assert not placed.cached


def test_a_cache_that_nothing_has_is_said_and_the_remedy_gives_it(small_parts_stream, warned):
    plan("9GiB", {"": 0, "model.layers.1": "cpu"}, expert_cache=0.5)
    assert sum("more than the experts of 'model.layers.1' is offloaded; name the modules" in m for m in warned()) == 1
    assert caches(plan("9GiB", {"": 0, "model.layers.1.mlp.experts": "cpu"}, expert_cache=0.5))
    for options in ({"expert_cache": 0}, {}):
        plan("9GiB", {"": 0, "model.layers.1": "cpu"}, **options)
    assert len([m for m in warned() if "expert_cache" in m]) == 1
    plan("9GiB", {"": 0, "model.embed_tokens": "cpu"}, expert_cache=0.5)
    assert "holds no fused experts in 4 bit" in warned()[-1]


def test_models_without_experts_are_placed_as_ever(small_parts_stream):
    made = planned(lambda: GPT(width=512, layers=8), max_memory={0: "152MiB", "cpu": "4GiB"}, mode="nf4")
    assert made.offloaded
    assert not any(placed.cached for placed in made.units)
    made = plan(WHOLE + RESERVE + 10 * ONE, mode="int8")  # which keeps experts in float32
    assert made.offloaded
    assert not any(placed.is_by_expert for placed in made.units)


def test_host_memory_that_is_too_small_leaves_the_usual_ways(tmp_path):
    with pytest.raises(PlacementError):
        plan(WHOLE + RESERVE - 2 * ONE, host="1MiB")


def test_two_gpus_share_the_caches():
    half = RESERVE + (WHOLE - ONE) // 2
    offload = OffloadConfig(reserve=RESERVE)
    made = plan_device_map(build(), "nf4", max_memory={0: half, 1: half, "cpu": "9GiB"}, offload=offload)
    assert {one.device.index for one in made.units if one.is_by_expert} == {0, 1}
    assert all(account.free >= 0 for account in made.accounts if account.budget)
    assert all(account.cache for account in made.accounts if account.place != torch.device("cpu"))


def test_the_table_shows_them():
    text = str(plan(WHOLE + RESERVE - 2 * ONE))
    head = text.partition("\n")[0].split()
    assert head == ["place", "budget", "weights", "quant", "state", "ring", "cache", "reserve", "free"]
    assert "cuda:0, experts on cpu (" in text
    assert " of 16 cached)" in text
    assert "each other expert that a token visits is copied" in text
    assert "cache" not in str(plan("9GiB")).partition("\n")[0]


def test_what_is_no_size_is_refused():
    for wrong in (-0.5, 1.5, True, "much", [1]):
        with pytest.raises(ConfigError, match=r"expert_cache is .*; expected a share from 0 to 1, bytes, or '2GiB'"):
            OffloadConfig(expert_cache=wrong)
    assert OffloadConfig(expert_cache=2**20).expert_bytes == 2**20
    assert OffloadConfig(expert_cache="1MiB").expert_bytes == 2**20
    assert OffloadConfig(expert_cache=0).expert_share == 0
    assert OffloadConfig(expert_cache=1).expert_share == 1


def by_cpu(made):
    return [placed for placed in made.units if placed.by_cpu]


def test_the_cpu_gets_the_experts_in_4_bit_and_none_is_copied_or_cached():
    budget = WHOLE + RESERVE - 2 * ONE
    made = plan(budget, execute="cpu")
    away = by_cpu(made)
    assert away == made.offloaded
    assert 2 <= len(away) <= 3
    assert {placed.device for placed in made.units} == {GPU}
    assert made.streamed_bytes == made.token_bytes == 0
    assert account(made).ring == account(made).cache == 0
    on_cpu = account(made, torch.device("cpu"))
    assert on_cpu.weights + on_cpu.quant_state == sum(placed.unit.group_bytes for placed in away)
    assert not made.plain_experts
    assert f"only the experts of {len(away)} of them: the CPU computes them where they are, in 4 bit" in str(made)
    again = plan(budget, dict(made.device_map), execute="cpu")
    assert [(one.home, one.by_cpu) for one in again.units] == [(one.home, one.by_cpu) for one in made.units]
    assert again.accounts == made.accounts


def test_where_leaving_the_experts_is_not_enough_the_cpu_gets_whole_blocks():
    made = plan(RESERVE + WHOLE - LAYERS * ONE - 2 * 2**20, execute="cpu", host="20GiB")
    assert not by_cpu(made)
    assert any(placed.device == torch.device("cpu") for placed in made.units)


@pytest.mark.parametrize("execute", ["gpu", "cpu"])
def test_what_a_map_sends_away_beside_the_experts_and_stays_is_warned_of(execute, logged):
    class Scaled(nn.Module):
        """Holds the experts, and a large parameter of its own, which cannot leave as its module is no leaf."""

        def __init__(self, mlp):
            super().__init__()
            self.experts, self.scales = mlp.experts, nn.Parameter(torch.empty(2**20, device="meta"))

    model = empty(lambda: MIXTURES["qwen3_moe"][0](config("qwen3_moe", **FIELDS)))
    model.model.layers[1].mlp = Scaled(model.model.layers[1].mlp)
    away = {"": 0, "model.layers.1.mlp": "cpu"}
    made = plan_device_map(model, "nf4", device_map=away, offload=OffloadConfig(execute=execute))
    assert [placed.is_by_expert for placed in made.offloaded] == [True]
    assert "device_map offloads 'model.layers.1.mlp.scales', which stay on the device" in logged.text


def test_a_cache_that_the_cpu_makes_useless_is_warned_of(logged):
    assert by_cpu(plan(WHOLE + RESERVE - 2 * ONE, execute="cpu", expert_cache=0.5))
    assert "expert_cache has no effect: the CPU computes the experts" in logged.text


@pytest.fixture
def rates(monkeypatch):
    """Return what sets the rates, of the link and of the CPU, that a measurement would find."""

    def found(link, host):
        where = "bigload.planning.placing.cpu_or_gpu."
        monkeypatch.setattr(f"{where}_link_rate", lambda device: link)
        monkeypatch.setattr(f"{where}experts_gb_per_s", lambda dtype: host)

    return found


@pytest.mark.parametrize("device_map", ["auto", {"": 0, "model.layers.1.mlp.experts": "cpu"}])
def test_the_faster_of_link_and_cpu_computes_the_experts_and_the_log_says_why(device_map, rates, logged):
    budget = WHOLE + RESERVE - 6 * ONE if device_map == "auto" else None
    for link, host, which in ((50.0, 5.0, "GPU"), (2.0, 20.0, "CPU")):
        rates(link, host)
        logged.clear()
        with logged.at_level("INFO", "bigload"):
            made = plan(budget, device_map, execute="auto")
        assert bool(by_cpu(made)) == (which == "CPU")
        assert made.offloaded
        said = f"experts in host memory are computed on the {which}: for a token that visits 2 of each module, a GPU"
        assert said in logged.text
        assert f"at {link} GB/s, the CPU computes" in logged.text


@pytest.mark.parametrize("link", [50.0, 2.0])
@pytest.mark.parametrize("device_map", ["auto", {"": 0, "model.layers.1.mlp": "cpu", "model.norm": "cpu"}])
def test_what_is_asked_in_vain_is_warned_of_once_though_both_ways_are_tried(device_map, link, rates, logged):
    rates(link, 10.0)
    budgets = {0: WHOLE + RESERVE - 6 * ONE, "cpu": "10GiB", "disk": "1GiB"} if device_map == "auto" else None
    made = plan_device_map(
        build(),
        "nf4",
        device_map=device_map,
        max_memory=budgets,
        no_split_module_classes=["Qwen3MoeDecoderLayer", "Absent"],
        offload=OffloadConfig(execute="auto", reserve=RESERVE),
    )
    assert made.offloaded
    said = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
    assert len(said) == len(set(said)) == 2
    assert said[0].startswith("no_split_module_classes names 'Absent'")


def test_what_need_not_be_copied_counts_for_the_gpu(rates):
    """With a cache of half, half of the visited experts are copied."""
    away = {"": 0, "model.layers.1.mlp.experts": "cpu"}
    rates(10.0, 15.0)
    assert by_cpu(plan(None, away, execute="auto", expert_cache=0))
    assert not by_cpu(plan(None, away, execute="auto", expert_cache=0.5))


def test_without_a_gpu_to_measure_nothing_is_decided_for_the_cpu(monkeypatch):
    monkeypatch.setattr("bigload.planning.placing.cpu_or_gpu._link_rate", lambda device: None)
    assert not by_cpu(plan(None, {"": 0, "model.layers.1.mlp.experts": "cpu"}, execute="auto"))


def test_the_rate_of_the_cpu_is_measured():
    for dtype in (torch.bfloat16, torch.float32):
        assert 0.01 < experts_gb_per_s(dtype) < 1000


@pytest.mark.parametrize("share", [0, 0.0625, 0.25, 0.5, 1.0])
def test_bytes_of_a_token_are_what_a_cache_lacks_of_two_visited_experts(share):
    made = plan(
        None, {"": 0, "model.layers.1.mlp.experts": "cpu", "model.layers.2.mlp.experts": "cpu"}, expert_cache=share
    )
    record = made.offloaded[0].unit.experts[0][1]
    assert RECORD - 4096 < record <= RECORD
    hits = share if share * 16 >= 2 else 0  # of a cache that does not hold both, none is used
    assert made.token_bytes == pytest.approx(2 * 2 * record * (1 - hits))
    assert made.experts_per_token == 2
    assert f"as any other: {hits:.0%} are cached then" in str(made)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_hits_foretold_are_those_of_a_simulated_cache(share):
    generator, there, hits, wanted = torch.Generator().manual_seed(0), [], 0, 0
    for _ in range(4000):
        visited = torch.randperm(16, generator=generator)[:2].tolist()
        hits, wanted = hits + len(set(visited) & set(there)), wanted + 2
        there = ([each for each in there if each not in visited] + visited)[-int(16 * share) :]
    made = plan(None, {"": 0, "model.layers.1.mlp.experts": "cpu"}, expert_cache=share)
    (placed,) = made.offloaded
    assert 1 - placed.token_bytes(2) / placed.visited_bytes(2) == pytest.approx(hits / wanted, abs=0.02)


def test_a_config_of_several_texts_does_not_say_how_many_a_token_visits():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = MIXTURES["qwen3_moe"][0](config("qwen3_moe", **FIELDS))
            parts = {"text_encoder": T5Config().to_dict(), "audio_encoder": EncodecConfig().to_dict()}
            self.config = MusicgenConfig(**parts, decoder={"model_type": "musicgen_decoder"})

    made = plan_device_map(empty(Several), "nf4", device_map={"": 0, "decoder.model.layers.1.mlp.experts": "cpu"})
    assert [placed.is_by_expert for placed in made.offloaded] == [True]
    assert made.experts_per_token is None


def test_a_token_that_visits_more_than_half_gets_all():
    (placed,) = plan(None, {"": 0, "model.layers.1.mlp.experts": "cpu"}, expert_cache=0.25).offloaded
    ((number, each),) = placed.unit.experts
    assert placed.token_bytes(9) == number * each
    assert placed.token_bytes(8) == 8 * each
    assert placed.token_bytes(None) == placed.streamed_bytes


def test_verdict_of_experts_says_what_a_token_waits_for():
    away, rates = {"": 0, "model.layers.1.mlp.experts": "cpu"}, Rates(10.0, 1.0)
    made = plan("9GiB", away, expert_cache=0.25)
    said = verdict(made, rates)
    assert "fits if the experts of 1 of 12 blocks are streamed" in said
    assert f"Each token waits for {show(round(made.token_bytes))}: " in said
    assert f"about {1e10 / made.token_bytes:.0f} tokens a second" in said
    assert step_seconds(made, rates) == made.token_bytes / 1e10
    full = verdict(plan("9GiB", away, expert_cache=1.0), rates)
    assert full.endswith("Each expert is copied when it is first visited, and stays.")
    on_cpu = verdict(plan("9GiB", away, execute="cpu"), rates)
    assert "fits if the CPU computes the experts of 1 of 12 blocks: it needs" in on_cpu
    assert on_cpu.endswith("Nothing is streamed.")


def test_sequences_share_some_of_the_experts_that_their_tokens_visit():
    made = plan(None, {"": 0, "model.layers.1.mlp.experts": "cpu"}, expert_cache=0.5)
    (placed,) = made.offloaded
    ((number, each),) = placed.unit.experts
    one, two, many = (placed.token_bytes(2, tokens) for tokens in (1, 2, 64))
    assert one < two < 2 * one
    assert two == pytest.approx(16 * (1 - (14 / 16) ** 2) * each / 2)
    assert many == number * each
    assert step_bytes(made, 2) == two
    assert plan_json(made, Rates(10.0, 1.0), 2)["step_s"] == two / 1e10


def test_biases_that_stay_beside_the_cache_are_not_warned_of(logged, monkeypatch):
    monkeypatch.setattr("bigload.planning.placement.RESIDENT_BYTES", 2000)
    monkeypatch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)
    fields = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 16}
    model = empty(lambda: MIXTURES["gpt_oss"][0](config("gpt_oss", **fields)))
    made = plan_device_map(model, "nf4", device_map={"": 0, "model.layers.1.mlp.experts": "cpu"})
    away = [planned.tensor.name for planned in made.tensors if planned.home is not None]
    assert sorted(name.rpartition(".")[2] for name in away) == ["down_proj", "gate_up_proj"]
    assert "which stay on the device" not in logged.text
