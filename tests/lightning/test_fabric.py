"""`BitsandbytesPrecision` in Fabric: which layers it quantizes, to what, and that a loop trains and infers."""

import copy
import threading
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import BitsandbytesPrecision as LightningsOwn
from lightning_loops import MODES, WIDTH, Net, bits, differing, fabric_of, fabric_on, inputs
from torch import nn

from bigload import (
    BnbQuantizationConfig,
    ConfigError,
    QuantizationError,
    dequantize_model,
    load_and_quantize_model,
    save_quantized_model,
)
from bigload.lightning import BitsandbytesPrecision
from bigload.quantization import bnb
from bigload.quantization.layers import quantized_layers

DTYPES = {torch.float16, torch.bfloat16, torch.float32}


def loaded(model, mode, dtype, device="cpu", **fields):
    """Quantize a model from its own weights, as the plugin should."""
    config = BnbQuantizationConfig.from_mode(
        mode, torch_dtype=dtype, bnb_4bit_compute_dtype=dtype, **({"skip_modules": []} | fields)
    )
    return load_and_quantize_model(model, config, device_map=device, progress=False)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_is_quantized_as_a_load_quantizes_it(device, mode):
    own = Net()
    expected = loaded(copy.deepcopy(own), mode, torch.float16)  # on the CPU, where its weights lie
    fabric = fabric_of(device, mode, dtype=torch.float16)
    model = fabric.setup(own)
    assert differing(bits(own), bits(expected)) == []
    assert {type(layer) for layer in quantized_layers(own).values()} == {type(expected.up)}
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    out = model(inputs().to(device))
    assert out.dtype == torch.float32
    if device.type == "cpu":
        assert torch.equal(out, expected(inputs().half()).float())


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_trains_with_an_optimizer_made_before_setup(device, mode):
    fabric, net = fabric_of(device, mode, dtype=torch.bfloat16), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    model, optimizer = fabric.setup(net, optimizer)
    before = bits(net)
    losses = []
    for _ in range(3):
        loss = model(inputs().to(device)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained = {name.rpartition(".")[0] for name in differing(before, bits(net))}
    assert trained == ({"norm"} if mode != "int8-training" else {"norm", "up", "down", "head"})
    assert losses[-1] < losses[0]
    assert {id(parameter) for parameter in net.parameters() if parameter.requires_grad} <= held


@pytest.mark.parametrize("mode", ["nf4-dq", "int8", "int8-training"])
def test_an_8_bit_optimizer_trains_what_is_trained(device, mode):
    fabric, net = fabric_of(device, mode), Net()
    if device.type == "cuda":
        net.cuda()
    model, optimizer = fabric.setup(net, bnb.library().optim.Adam8bit(net.parameters(), lr=1e-3))
    before, losses = bits(net), []
    for _ in range(4):
        loss = model(inputs().to(device)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name.rpartition(".")[0] for name in differing(before, bits(net))}
    assert trained == ({"norm"} if mode != "int8-training" else {"norm", "up", "down", "head"})


SCRIPT = """
import sys
sys.path.append({helpers!r})
import torch
from lightning.fabric import Fabric
from lightning_loops import Net, inputs
from bigload.lightning import BitsandbytesPrecision

if __name__ == "__main__":
    for mode in sys.argv[1:]:  # starting two processes takes the time
        plugin = BitsandbytesPrecision(mode, dtype=torch.float32)
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=plugin)
        fabric.launch()
        torch.manual_seed(0)
        net = Net()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        for _ in range(2):
            mine = inputs().chunk(2)[fabric.global_rank]
            fabric.backward(model(mine).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        found = fabric.all_gather(net.norm.bias.detach())
        assert found.any() and torch.equal(found[0], found[1])
        if fabric.global_rank == 0:
            torch.save(found[0], f"{{mode}}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(tmp_path, programs):
    modes = ["nf4", "int8-training"]
    helpers = str(Path(__file__).parents[1] / "helpers")
    (tmp_path / "train.py").write_text(SCRIPT.format(helpers=helpers))
    programs.run(f"import sys; sys.argv = ['train.py', *{modes}]\n{SCRIPT.format(helpers=helpers)}", tmp_path)
    for mode in modes:
        fabric = fabric_of(torch.device("cpu"), mode, dtype=torch.float32)
        torch.manual_seed(0)
        net = Net()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        for _ in range(2):
            fabric.backward(model(inputs()).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        # In int8 the halves of a batch are rounded by their own rows, but the gradients are added in another order.
        assert torch.allclose(torch.load(tmp_path / f"{mode}.pt"), net.norm.bias, atol=1e-3)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_loss_may_be_propagated_without_fabric_as_with_its_own_precisions(mode):
    model = fabric_of(torch.device("cpu"), mode).setup(Net())
    model(inputs()).square().mean().backward()
    assert model.norm.weight.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_inference_gives_no_gradients_and_the_same_output_twice(device, mode):
    model = fabric_of(device, mode).setup(Net()).eval()
    with torch.no_grad():
        first, second = (model(inputs().to(device)) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert first.isfinite().all()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.l1, self.l10, self.pair = (nn.Linear(8, 8) for _ in range(3))
        self.deep = nn.ModuleDict({"l1": nn.Linear(8, 8), "l1x": nn.Sequential(nn.Linear(8, 8))})
        self.pair2 = self.pair


@pytest.mark.parametrize(
    ("ignored", "plain"),
    [
        ((), set()),
        ({"l1"}, {"l1"}),
        (["deep.l1", "l10"], {"deep.l1", "l10"}),
        ({"deep"}, {"deep.l1", "deep.l1x.0"}),
        ({"pair2"}, {"pair"}),
    ],
)
def test_names_are_ignored_as_whole_components_from_the_root(ignored, plain):
    model = fabric_of(torch.device("cpu"), "nf4", ignore_modules=ignored).setup(Named())
    left = {name for name, module in model.module.named_modules() if type(module) is nn.Linear}
    assert left == plain


def test_names_that_no_module_has_are_said_with_what_was_meant(warned):
    outer = nn.ModuleDict({"net": Net()})
    fabric_of(torch.device("cpu"), "nf4", ignore_modules={"head", "dwn"}).setup(outer)
    (message,) = warned()
    assert "'dwn', 'head'" in message
    assert "did you mean 'net.head'?" in message
    assert type(outer["net"].head) is not nn.Linear
    meant = nn.ModuleDict({"net": Net()})
    fabric_of(torch.device("cpu"), "nf4", ignore_modules={"net.head"}).setup(meant)
    assert type(meant["net"].head) is nn.Linear
    assert len(warned()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nf4_dq",), "did you mean 'nf4-dq'"),
        (("int4",), "choose one of nf4"),
        ((None,), "unknown quantization mode None"),
        (("nf4", torch.int8), "dtype must be one of torch.float16"),
        (("nf4", torch.float64), "torch.float64"),
        (("nf4", None, "head"), "must be a set of names"),
        (("nf4", None, [1]), "must be a set of names"),
    ],
)
def test_arguments_are_checked(arguments, said):
    with pytest.raises(ConfigError, match=said):
        BitsandbytesPrecision(*arguments)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_each_mode_computes_in_each_dtype(mode, dtype):
    """Lightning's own takes nothing but float16 for int8."""
    net = Net()
    model = fabric_of(torch.device("cpu"), mode, dtype=dtype, ignore_modules={"head"}).setup(net)
    seen = []
    net.head.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    assert model(inputs()).dtype == torch.float32
    assert seen == [(dtype, dtype)]
    assert {net.norm.weight.dtype, net.head.weight.dtype} == {dtype}


def test_default_dtype_of_each_mode():
    assert {BitsandbytesPrecision(mode).dtype for mode in MODES[:4]} == {torch.bfloat16}
    assert {BitsandbytesPrecision(mode).dtype for mode in MODES[4:]} == {torch.float16}


def test_a_model_without_linear_layers_is_refused_and_runs_without_the_plugin():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU())
    with pytest.raises(ConfigError, match=r"Sequential has no Linear layers.*without this plugin"):
        fabric_of(torch.device("cpu"), "nf4").setup(model)
    assert fabric_on(torch.device("cpu")).setup(model)(torch.ones(1, 4, 2)).shape == (1, 4, 2)


@pytest.mark.parametrize("context", ["forward_context", "tensor_init_context", "module_init_context"])
def test_contexts_set_the_default_dtype_and_restore_it(context):
    plugin = BitsandbytesPrecision("nf4", dtype=torch.float16)
    again = getattr(plugin, context)()
    torch.set_default_dtype(torch.float64)  # what it is when the context begins counts
    try:
        seen = []
        with pytest.raises(ZeroDivisionError), again:
            seen.append(torch.get_default_dtype()) or 1 // 0
        assert (seen, torch.get_default_dtype()) == ([torch.float16], torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def test_inputs_and_outputs_are_cast_wherever_they_lie():
    plugin = BitsandbytesPrecision("nf4", dtype=torch.bfloat16)
    data = {"x": torch.ones(2), "ids": torch.ones(2, dtype=torch.int64), "more": [(torch.ones(1).double(), "text")]}
    cast = plugin.convert_input(data)
    assert cast["x"].dtype == cast["more"][0][0].dtype == torch.bfloat16
    assert cast["ids"].dtype == torch.int64
    assert cast["more"][0][1] == "text"
    assert plugin.convert_output(cast)["more"][0][0].dtype == torch.float32


def test_code_of_a_forward_makes_tensors_in_the_plugins_dtype():
    class Shifting(Net):
        def forward(self, x):
            assert torch.get_default_dtype() == torch.bfloat16
            return super().forward(x + torch.ones(WIDTH))

    assert fabric_of(torch.device("cpu"), "nf4").setup(Shifting())(inputs()).dtype == torch.float32


def test_fabric_and_trainer_take_the_class_off_cuda_where_they_refuse_lightnings():
    Fabric(accelerator="cpu", devices=1, plugins=BitsandbytesPrecision("int8"))
    with pytest.raises(RuntimeError, match="only supported on CUDA"):
        Fabric(accelerator="cpu", devices=1, plugins=LightningsOwn("int8"))


def test_modules_stay_the_same_objects_wherever_they_are_held():
    net = Net()
    net.order = [net.up, net.down]  # a list, which torch does not look into
    net.call = net.head.forward
    before = {name: id(module) for name, module in net.named_modules()}
    fabric_of(torch.device("cpu"), "nf4").setup(net)
    assert {name: id(module) for name, module in net.named_modules()} == before
    assert net.order[0].weight.dtype == torch.uint8
    assert net.up.weight.module is net.up


def test_hooks_of_a_layer_are_kept_and_called_with_it():
    net, called = Net(), []
    net.up.register_load_state_dict_pre_hook(lambda module, *rest: called.append(module))
    net.up.register_forward_hook(lambda module, args, out: called.append(module))
    net.up.register_state_dict_post_hook(lambda module, *rest: called.append(module))
    model = fabric_of(torch.device("cpu"), "int8").setup(net)
    model(inputs())
    model.load_state_dict(model.state_dict())
    assert called == [net.up] * 3


def test_a_copy_computes_with_its_own_weights():
    net = Net()
    fabric_of(torch.device("cpu"), "nf4").setup(net)
    copied = copy.deepcopy(net)
    with torch.no_grad():
        copied.up.load_state_dict({"weight": torch.zeros(2 * WIDTH, WIDTH), "bias": torch.zeros(2 * WIDTH)})
    x = inputs().bfloat16()
    assert not copied.up(x).any()
    assert net.up(x).any()


def test_tied_layers_and_those_whose_weight_is_read_stay_plain():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16, bias=False)
            self.head.weight = self.embed.weight
            self.read, self.called = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(self.called(x) @ self.read.weight)

    net = Reading()
    model = fabric_of(torch.device("cpu"), "nf4").setup(net)
    assert [path for path, _ in net.named_modules() if path in quantized_layers(net)] == ["called"]
    assert net.head.weight is net.embed.weight
    assert model(torch.arange(4)).isfinite().all()


def test_an_encoder_layer_of_torch_does_not_read_packed_weights():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, dropout=0.0).eval()
    expected = loaded(copy.deepcopy(layer), "nf4", torch.float32)
    model = fabric_of(torch.device("cpu"), "nf4", dtype=torch.float32).setup(layer)
    x = inputs().view(2, 4, WIDTH)
    with torch.no_grad():  # in which it would take its fast path
        assert torch.equal(model(x), expected(x))
    assert type(layer.linear1) is not nn.Linear


def test_a_model_that_is_one_layer_and_one_that_was_compiled_are_converted():
    layer = nn.Linear(WIDTH, WIDTH)
    held = layer.weight
    assert fabric_of(torch.device("cpu"), "int8-training").setup(layer)(inputs()).isfinite().all()
    assert layer.weight is held
    net = Net()
    compiled = torch.compile(net, backend="eager")
    assert fabric_of(torch.device("cpu"), "nf4").setup(compiled)(inputs()).shape == (8, 8)
    assert net.up.weight.dtype == torch.uint8


def test_subclasses_are_quantized_if_they_compute_the_same():
    class Same(nn.Linear):
        pass

    class Doubling(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(Same(WIDTH, WIDTH), Doubling(WIDTH, WIDTH))
    fabric_of(torch.device("cpu"), "nf4").setup(model)
    assert list(quantized_layers(model)) == ["0"]


def test_a_weight_that_is_not_finite_is_named_and_nothing_changes():
    net = Net()
    with torch.no_grad():
        net.down.weight[3, 3] = float("inf")
    before, classes = bits(net), [type(module) for module in net.modules()]
    with pytest.raises(QuantizationError, match=r"'down'.*not finite as nf4"):
        fabric_of(torch.device("cpu"), "nf4").setup(net)
    assert differing(before, bits(net)) == []
    assert [type(module) for module in net.modules()] == classes


def test_adapters_of_peft_are_refused_and_made_after_the_conversion():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["up", "down"], init_lora_weights=False)
    plugin = BitsandbytesPrecision("nf4")
    fabric = fabric_on(torch.device("cpu"), plugin)
    with pytest.raises(QuantizationError, match=r"of PEFT.*convert_module\(model\) first, then get_peft_model"):
        fabric.setup(get_peft_model(Net(), config))
    adapted = get_peft_model(plugin.convert_module(Net()), config)
    assert type(adapted.base_model.model.up).__module__ == "peft.tuners.lora.bnb"
    model, optimizer = fabric.setup(adapted, torch.optim.SGD(adapted.parameters(), lr=0.5))
    before = bits(adapted)
    fabric.backward(model(inputs()).square().mean())
    optimizer.step()
    changed = differing(before, bits(adapted))
    assert changed
    assert all("lora_" in name for name in changed)


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_a_converted_model_is_not_converted_again(mode):
    plugin, net = BitsandbytesPrecision(mode), Net()
    plugin.convert_module(net)
    before = bits(net)
    assert plugin.convert_module(net) is net
    assert BitsandbytesPrecision("fp4", dtype=torch.float32).convert_module(net) is net
    assert differing(before, bits(net)) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_converted_model_is_saved_loaded_and_dequantized_as_a_loaded_one(tmp_path, mode):
    net = Net()
    model = fabric_of(torch.device("cpu"), mode, dtype=torch.float16).setup(net)
    expected = model(inputs())
    save_quantized_model(net, tmp_path / "saved")
    again = load_and_quantize_model(Net(), None, tmp_path / "saved", device_map="cpu", progress=False)
    assert torch.equal(again(inputs().half()).float(), expected)
    if mode != "int8-training":
        plain = dequantize_model(net)
        assert {type(module) for module in plain.modules() if hasattr(module, "in_features")} == {nn.Linear}
        assert torch.allclose(plain(inputs().half()).float(), expected, atol=2e-2)  # int8 rounds inputs too


@pytest.mark.cuda
@pytest.mark.parametrize("mode", MODES)
def test_a_model_goes_to_the_gpu_and_back(mode):
    net = Net()
    fabric = fabric_of(torch.device("cuda"), mode, dtype=torch.float16)
    model = fabric.setup(net)
    there = model(inputs().cuda())
    net.cpu()
    here = net(inputs().half()).float()
    assert torch.allclose(there.cpu(), here, atol=0.05)  # other kernels, in float16
    net.cuda()
    assert torch.equal(model(inputs().cuda()), there)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_model_of_transformers_is_quantized_however_it_was_built(tmp_path, mode):
    from models import llama

    plain = llama()
    plain.save_pretrained(tmp_path)
    fabric, tokens = fabric_of(torch.device("cpu"), mode), torch.arange(8).view(1, 8)
    first = fabric.setup(plain.eval())
    with fabric.init_module():
        read = type(plain).from_pretrained(tmp_path)
    with fabric.init_module(empty_init=True):
        empty = type(plain)(plain.config).eval()
    models = [first, fabric.setup(read), fabric.setup(empty)]
    empty.load_state_dict(type(plain).from_pretrained(tmp_path).state_dict())
    with torch.no_grad():
        a, b, c = (model(tokens).logits for model in models)
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert {model.is_loaded_in_4bit for model in (plain, read, empty)} == {mode == "nf4"}
    assert empty.model.rotary_emb.inv_freq.dtype == torch.float32  # a buffer that is not saved


def test_other_threads_build_and_compute_as_before():
    built = []
    with BitsandbytesPrecision("nf4").module_init_context():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(8, 8)))
        thread.start()
        thread.join()
    assert "waiting" not in vars(built[0])
