"""What processes need, planned before there are any."""

import json

import pytest
import torch
from models import LLAMA_8B, QWEN3_30B

from bigload import init_empty_weights, plan_device_map
from bigload.cli import main
from bigload.distributed.ranks_plan import plan_ranks
from bigload.model.described import empty_model


@pytest.fixture(scope="module", params=["llama", "mixture"])
def planned(request, tmp_path_factory):
    """A model of billions of parameters, on meta, and its plan for one GPU."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B if request.param == "llama" else QWEN3_30B))
    model = empty_model(folder)
    return model, plan_device_map(model, "nf4-dq", device_map="cuda:0")


def test_all_together_read_and_hold_the_same_however_many_they_are(planned):
    model, plan = planned
    one, *more = [plan_ranks(model, plan, ranks) for ranks in range(1, 9)]
    for made in more:
        buffers = 10_000 * made.ranks  # had by all
        assert one.read_bytes[0] <= sum(made.read_bytes) <= one.read_bytes[0] + buffers
        assert max(made.read_bytes) <= one.read_bytes[0] / made.ranks * 1.001 + 10_000
        # Beside the padding each holds tables, and the scales of scales: 4 bytes of 16,384 values.
        assert made.held_bytes <= one.held_bytes / made.ranks * 1.01 + 40 * 2**20
        assert made.gathers == one.gathers
        assert made.received_bytes == sum(gather.nbytes for gather in made.gathers) * (made.ranks - 1) // made.ranks
    assert one.held_bytes == pytest.approx(plan.nbytes, rel=1e-3)


def test_blocks_are_gathered_one_by_one_and_large_layers_beside_them(planned):
    model, plan = planned
    made = plan_ranks(model, plan, 4)
    layers = model.config.num_hidden_layers
    paths = [gather.path for gather in made.gathers]
    assert paths == ["model.embed_tokens", *(f"model.layers.{n}" for n in range(layers)), "lm_head", ""]
    assert sum(gather.nbytes for gather in made.gathers) == pytest.approx(plan.nbytes, rel=1e-3)
    pairs = [a.nbytes + b.nbytes for a, b in zip(made.gathers[:-2], made.gathers[1:-1], strict=True)]
    assert made.gathered_bytes == max(pairs) + made.gathers[-1].nbytes


def test_tied_weights_are_gathered_with_the_model_itself():
    with init_empty_weights():
        model = torch.nn.ModuleDict(
            {"tokens": torch.nn.Embedding(4096, 256), "head": torch.nn.Linear(256, 4096, bias=False)}
        )
    model["head"].weight = model["tokens"].weight
    made = plan_ranks(model, plan_device_map(model, "none", device_map="cuda:0"), 2)
    assert [(gather.path, gather.nbytes) for gather in made.gathers] == [("", 4096 * 256 * 4)]


def test_command_shows_it(tmp_path, capsys):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | sizes))
    main(["plan", str(tmp_path), "--quant", "nf4", "--ranks", "16", "--hosts", "2"])
    printed = capsys.readouterr().out
    assert "In nf4, each of 16 ranks holds" in printed
    assert [line.split("  ")[0] for line in printed.splitlines() if line.startswith(("held", "read"))] == [
        "held by each rank",
        "read by each rank, at most",
        "read by each host",
        "read by all",
    ]
    main(["plan", str(tmp_path), "--quant", "nf4", "--ranks", "16", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert (made["ranks"], len(made["read_bytes"]), len(made["gathers"])) == (16, 16, 5)
    parameters = sum(parameter.numel() for parameter in empty_model(tmp_path).parameters())
    assert sum(made["read_bytes"]) == pytest.approx(parameters * 2, rel=1e-3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--ranks", "2", "--quant", "int8-training"], "int8-training is not divided"),
        (["--ranks", "2", "--context", "100"], "--context: a plan of --ranks does not count this"),
        (["--ranks", "2", "--device-map", "balanced"], "--device-map: a plan of --ranks"),
        (["--ranks", "2", "--max-memory", "0=1GiB", "--blocks"], "--max-memory, --blocks: a plan of --ranks"),
        (["--hosts", "2"], "--hosts: pass --ranks too"),
        (["--ranks", "8", "--hosts", "3"], "equally many"),
    ],
)
def test_command_refuses_what_it_would_not_count(tmp_path, capsys, given, said):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    assert main(["plan", str(tmp_path), *given]) != 0
    assert said in " ".join(capsys.readouterr().err.split())
