"""What messages about loads by several processes tell the user to do, done."""

import pytest
import torch
import torch.distributed as dist
from checkpoints import empty, save
from comparisons import outputs
from models import llama
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from world_faults import Net

from bigload import (
    CheckpointError,
    ConfigError,
    OffloadConfig,
    QuantizationError,
    dequantize_model,
    init_empty_weights,
    load_and_quantize_model,
    save_quantized_model,
)
from bigload.distributed.joint_save import require_shared
from bigload.distributed.ranks import Ranks

X = torch.ones(2, 64)


@pytest.fixture
def path(tmp_path):
    return save(Net().state_dict(), tmp_path / "net")


def load(path, mode="nf4", **given):
    with init_empty_weights():
        model = Net()
    return load_and_quantize_model(model, mode, path, progress=False, **given)


def test_mesh_is_passed_for_what_processes_share(alone, path):
    for given in ({"replicate": True}, {"fsdp_options": {"reshard_after_forward": False}}, {"adapters": lambda m: m}):
        with pytest.raises(ConfigError, match="pass the mesh of them too"):
            load(path, **given)
        assert torch.equal(outputs(load(path, mesh=alone, **given), X), outputs(load(path, device_map="cpu"), X))


def test_arguments_that_a_mesh_leaves_no_choice_of_are_left_out(alone, path, tmp_path):
    choices = {"device_map": "cpu", "offload": OffloadConfig(), "offload_folder": tmp_path / "offload"}
    for name, value in choices.items():
        with pytest.raises(ConfigError, match=f"'{name}'.*leave it out"):
            load(path, mesh=alone, **{name: value})
    load(path, mesh=alone)


def test_replicas_take_no_options_of_fully_shard(alone, path):
    with pytest.raises(ConfigError, match="leave them out"):
        load(path, mesh=alone, replicate=True, adapters=lambda m: m)
    model = load(path, mesh=alone, replicate=True)
    assert type(model.blocks[0][0].weight).__name__ == "Params4bit"


def test_int8_training_is_left_to_one_process(alone, path):
    with pytest.raises(ConfigError, match="use 'nf4' or 'int8' with adapters"):
        load(path, "int8-training", mesh=alone)
    load(path, "int8", mesh=alone)


def test_process_group_is_made_before_the_mesh(tmp_path, path):
    with pytest.raises(ConfigError, match="start the program by torchrun"):
        load(path, mesh="any")
    method = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="must be a DeviceMesh"):
            load(path, mesh="any")
        load(path, mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def test_mesh_has_one_dimension_or_two_with_names(alone, path):
    with pytest.raises(ConfigError, match="two that have names"):
        load(path, mesh=init_device_mesh("cpu", (1, 1)))
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    assert torch.equal(outputs(load(path, mesh=mesh), X), outputs(load(path, device_map="cpu"), X))


def tuned(model):
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["blocks.0.0", "blocks.1.0"]))


def test_adapters_are_passed_to_the_load(alone, path):
    model = tuned(load(path, mesh=alone))
    with pytest.raises(ConfigError, match="added to the model after it was sharded"):
        model(X)
    with torch.no_grad():
        model(X)  # nothing is trained
    model = load(path, mesh=alone, adapters=tuned)
    model(X).sum().backward()
    model(X).sum().backward()  # the weights of the model itself are still gathered


def test_adapters_return_the_model(alone, path):
    with pytest.raises(ConfigError, match=r"adapters must return the model that it is given, .* returned a NoneType"):
        load(path, mesh=alone, adapters=lambda model: None)
    load(path, mesh=alone, adapters=tuned)


def test_what_casts_the_weights_is_said_in_the_config(alone, path):
    with pytest.raises(QuantizationError, match="keep_in_fp32_modules in the config instead"):
        load(path, {"load_in_4bit": True, "torch_dtype": "bf16"}, mesh=alone, adapters=_for_training)
    config = {"load_in_4bit": True, "torch_dtype": "bf16", "keep_in_fp32_modules": ["head"]}
    model = load(path, config, mesh=alone, adapters=tuned)
    assert model.head.weight.dtype == torch.float32


def _for_training(model):
    import peft

    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def test_sharded_weights_are_loaded_by_a_load(alone, path):
    model = load(path, mesh=alone)
    state = load(path, device_map="cpu").state_dict()
    with pytest.raises(RuntimeError, match="load such weights by load_and_quantize_model with mesh") as raised:
        model.load_state_dict(state, strict=False)
    assert str(raised.value).count("divided among processes") == 1  # not for each layer
    load(path, mesh=alone)


@pytest.mark.parametrize("is_whole", [True, False])
def test_adapters_are_loaded_without_the_weights_they_belong_to(alone, path, is_whole):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model, other = (load(path, mesh=alone, adapters=tuned) for _ in range(2))
    with pytest.raises(RuntimeError, match=r"set_model_state_dict.*strict=False"):
        model.load_state_dict(other.state_dict())
    before = outputs(model, X)
    model.blocks[0][0].lora_B.default.weight.data.fill_(1)
    assert not torch.equal(outputs(model, X), before)
    whole = {"full_state_dict": True} if is_whole else {}
    state = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True, **whole))
    set_model_state_dict(other, state, options=StateDictOptions(strict=False, **whole))
    assert torch.equal(outputs(other, X), outputs(model, X))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_sharded_model_loads_its_own_state(alone, path, mode):
    model = load(path, mode, mesh=alone)
    before, state = outputs(model, X), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.head.weight.data.fill_(1)
    assert not torch.equal(outputs(model, X), before)
    model.load_state_dict(state)
    assert torch.equal(outputs(model, X), before)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_layers_are_called_by_their_block(alone, path, mode):
    model = load(path, mode, mesh=alone, adapters=tuned, no_split_module_classes=["Sequential"])
    block, x = model.blocks[0], X
    for _ in range(2):
        with pytest.raises(
            QuantizationError, match=r"blocks\.0\.0\.weight.*whole only while 'blocks\.0' runs: call that"
        ):
            block[0](x)
        expected = block(x)
        block.unshard()
        assert torch.equal(block[1](block[0](x)), expected)
        block.reshard()


def test_sharded_model_is_built_again_to_be_loaded(alone, path):
    model = load(path, mesh=alone)
    for given in ({"mesh": alone}, {"device_map": "cpu"}):
        with pytest.raises(ConfigError, match="divided among processes: build it again"):
            load_and_quantize_model(model, "nf4", path, progress=False, **given)
        load(path, **given)


def test_model_to_dequantize_is_loaded_whole(alone, path):
    model = load(path, mesh=alone)
    with pytest.raises(QuantizationError, match="load the model by one process, or with replicate=True"):
        dequantize_model(model)
    dequantize_model(load(path, mesh=alone, replicate=True))
    dequantize_model(load(path, device_map="cpu"))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_adapters_are_merged_into_whole_models(alone, path, mode):
    model = load(path, mode, mesh=alone, adapters=tuned)
    for _ in range(2):  # in parts, and gathered, as this model stays after a forward
        with pytest.raises(QuantizationError, match="load the model and its adapter by one process for that"):
            model.merge_and_unload()
        model(X)
    tuned(load(path, mode, mesh=alone, replicate=True)).merge_and_unload()
    tuned(load(path, mode, device_map="cpu")).merge_and_unload()


def test_model_of_transformers_is_saved_by_all_processes(alone, tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    model = load_and_quantize_model(empty(llama), "nf4", tmp_path / "llama", mesh=alone, progress=False)
    with pytest.raises(QuantizationError, match=r"save it by bigload\.save_quantized_model"):
        model.save_pretrained(tmp_path / "saved")
    save_quantized_model(model, tmp_path / "saved")
    again = load_and_quantize_model(empty(llama), None, tmp_path / "saved", mesh=alone, progress=False)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(outputs(again, tokens), outputs(model, tokens))


def test_folder_that_all_hosts_share_is_saved_into(tmp_path):
    with pytest.raises(CheckpointError, match="save into one that they share"):
        require_shared(tmp_path / "of another host" / "model")
    require_shared(tmp_path)


def test_parts_of_quantized_weights_are_left_to_forwards(alone, path):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = load(path, mesh=alone, adapters=tuned)
    weight = next(p for name, p in model.named_parameters() if name.endswith("base_layer.weight"))
    own = weight._local_tensor
    for read in (lambda: weight + 1, lambda: torch.cat([own, own])):
        with pytest.raises(QuantizationError, match="leave it to forwards"):
            read()
    model(X)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, ignore_frozen_params=True))
    assert {name.rpartition("lora_")[1] for name in state} == {"lora_"}


def test_sharded_model_is_trained_without_ddp_or_replicated_for_it(alone, path):
    from torch.nn.parallel import DistributedDataParallel

    for model in (load(path, mesh=alone), load(path, mesh=alone, adapters=tuned)):
        with pytest.raises(ConfigError, match=r"fully_shard.*replicate=True"):
            DistributedDataParallel(model)
    replica = tuned(load(path, mesh=alone, replicate=True))
    DistributedDataParallel(replica)(X).sum().backward()


@pytest.mark.parametrize("is_safe", [True, False])
def test_adapters_are_saved_whole(alone, path, tmp_path, is_safe):
    """Without safetensors PEFT would write each process's part over the others'."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, folder = load(path, mesh=alone, adapters=tuned), tmp_path / "adapter"
    with pytest.raises(QuantizationError, match=r"full_state_dict=True.*state_dict=\.\.\."):
        model.save_pretrained(folder, safe_serialization=is_safe)
    assert not folder.exists()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    model.save_pretrained(folder, state_dict=get_model_state_dict(model, options=options))
    assert (folder / "adapter_model.safetensors").exists()


def test_adapters_are_saved_beside_the_model(alone, path, tmp_path):
    model = load(path, mesh=alone, adapters=tuned)
    with pytest.raises(QuantizationError, match=r"\.blocks\.0\.0', .*save_pretrained\(folder, state_dict=") as raised:
        save_quantized_model(model, tmp_path / "saved")
    assert len(str(raised.value)) < 400
    save_quantized_model(load(path, mesh=alone), tmp_path / "saved")


def test_wrong_argument_of_a_save_is_told_to_the_other_processes(alone, path, tmp_path, monkeypatch):
    model, told = load(path, mesh=alone), []
    monkeypatch.setattr(Ranks, "_report", lambda self, step, report: told.append((step, report)))
    with pytest.raises(ConfigError, match="max_shard_size"):
        save_quantized_model(model, tmp_path / "saved", max_shard_size="much")
    step, report = told[0]
    assert step == "saved"
    assert "max_shard_size" in report["error"]


def test_mesh_of_other_devices_is_refused(alone, path, monkeypatch):
    monkeypatch.setattr(alone, "_device_type", "meta")
    with pytest.raises(ConfigError, match="mesh is of 'meta' devices: bigload loads onto 'cuda' or 'cpu'"):
        load(path, mesh=alone)


def test_process_that_is_not_in_the_mesh_is_told(tmp_path, path):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with pytest.raises(ConfigError, match="this process, rank 1, is not in the mesh"):
            load(path, mesh=DeviceMesh("cpu", [0]))
    finally:
        dist.destroy_process_group()
