"""Models built under `fabric.init_module`: empty, on meta or with values, and what is loaded into them."""

import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load
from lightning_loops import MODES, WIDTH, Net, bits, differing, fabric_of, inputs
from torch import nn

from bigload import CheckpointError, QuantizationError

CPU = torch.device("cpu")


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def written(folder, mode, device=CPU, **options):
    """Write a plain checkpoint, and the one that a model with its weights saves when it is quantized."""
    net = Net()
    torch.save(net.state_dict(), folder / "plain.ckpt")
    fabric = fabric_of(device, mode, **options)
    model = fabric.setup(net)
    fabric.save(folder / "quantized.ckpt", {"model": model})
    return model


def by_load_raw(fabric, model, file):
    if file.name == "plain.ckpt":
        fabric.load_raw(file, model)
    else:
        fabric.load(file, {"model": model})


def by_load_state_dict(fabric, model, file, assign=False):
    state = torch.load(file, mmap=True, weights_only=True)
    model.load_state_dict(state.get("model", state), assign=assign)


def by_assigning(fabric, model, file):
    by_load_state_dict(fabric, model, file, assign=True)


def by_lazy_load(fabric, model, file):
    state = _lazy_load(file)
    model.load_state_dict(state.get("model", state))


@pytest.mark.parametrize("kind", ["plain", "quantized"])
@pytest.mark.parametrize("order", ["setup first", "load first"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_loaded_into_an_empty_model_is_quantized_or_taken(tmp_path, device, mode, order, kind):
    expected = written(tmp_path, mode, device)
    fabric = fabric_of(device, mode)
    with fabric.init_module(empty_init=True):
        net = Net()
    assert all(layer.weight.is_meta for layer in linears(net))  # no memory for what will be quantized
    assert net.norm.weight.device.type == device.type
    file = tmp_path / f"{kind}.ckpt"
    if order == "setup first":  # as Lit-GPT does
        model = fabric.setup_module(net)
        by_load_raw(fabric, model, file)
    else:
        by_load_raw(fabric, net, file)
        model = fabric.setup_module(net)
    x = inputs().to(device)
    if device.type == "cpu":  # a GPU's kernels may round a value at the border of two to the other
        assert differing(bits(net), bits(expected.module)) == []
        assert torch.equal(model(x), expected(x))
    assert torch.allclose(model(x), expected(x), atol=0.05)
    assert {parameter.device.type for parameter in net.parameters()} == {device.type}


@pytest.mark.parametrize("load", [by_load_state_dict, by_assigning, by_lazy_load])
@pytest.mark.parametrize("kind", ["plain", "quantized"])
@pytest.mark.parametrize("order", ["setup first", "load first"])
@pytest.mark.parametrize("mode", ["nf4-dq", "int8", "int8-training"])
def test_every_way_to_load_gives_the_same(tmp_path, mode, order, kind, load):
    expected = written(tmp_path, mode)
    fabric = fabric_of(CPU, mode)
    with fabric.init_module(empty_init=True):
        net = Net()
    steps = [lambda: fabric.setup(net), lambda: load(fabric, net, tmp_path / f"{kind}.ckpt")]
    for step in steps if order == "setup first" else reversed(steps):
        step()
    if load is by_assigning:  # which keeps the dtypes of the checkpoint where the module is torch's own
        net.norm.to(expected.module.norm.weight.dtype)
    assert differing(bits(net), bits(expected.module)) == []
    assert torch.equal(net(inputs().to(net.norm.weight.dtype)), expected.module(inputs().to(net.norm.weight.dtype)))


@pytest.mark.parametrize("mode", MODES)
def test_values_are_loaded_again_after_the_model_has_run(tmp_path, device, mode):
    expected = written(tmp_path, mode)
    fabric = fabric_of(device, mode)
    model = fabric.setup(Net())
    other = model(inputs().to(device))
    for kind in ("plain", "quantized"):
        by_load_raw(fabric, model, tmp_path / f"{kind}.ckpt")
        found = model(inputs().to(device)).cpu()
        assert torch.allclose(found, expected(inputs()), atol=0.05)
        assert not torch.allclose(found, other.cpu(), atol=0.05)
        if device.type == "cpu":
            assert torch.equal(found, expected(inputs()))
            assert differing(bits(model.module), bits(expected.module)) == []


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
@pytest.mark.parametrize("kind", ["plain", "quantized"])
def test_default_dtype_and_device_do_not_change_what_is_loaded(tmp_path, mode, kind):
    expected = written(tmp_path, mode)
    fabric = fabric_of(CPU, mode)
    net, other = Net(), Net()
    with torch.device("meta"):
        fabric.setup(net)
        by_load_state_dict(fabric, net, tmp_path / f"{kind}.ckpt")
    fabric.setup(other)
    with fabric.init_module():  # the default dtype has fewer digits than the offset of double quantization
        by_load_state_dict(fabric, other, tmp_path / f"{kind}.ckpt")
    assert differing(bits(net), bits(expected.module)) == []
    assert differing(bits(other), bits(expected.module)) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_meta_is_quantized_as_it_is_loaded(tmp_path, mode):
    """Lightning's own cannot do this in int8."""
    expected = written(tmp_path, mode)
    fabric = fabric_of(CPU, mode)
    with fabric.init_module(), torch.device("meta"):
        net = Net()
    assert all(parameter.is_meta for parameter in net.parameters())
    model = fabric.setup(net, move_to_device=False)
    assert all(parameter.is_meta for parameter in net.parameters())
    net.norm.to_empty(device="cpu")
    by_load_state_dict(fabric, model, tmp_path / "plain.ckpt")
    assert torch.equal(model(inputs()), expected(inputs()))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_meta_may_get_values_before_it_is_converted(mode):
    fabric = fabric_of(CPU, mode)
    with fabric.init_module(), torch.device("meta"):
        net = Net()
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model = fabric.setup(net)
    assert model(inputs()).isfinite().all()
    assert type(net.up) is not nn.Linear


def test_a_layer_that_waits_on_meta_may_be_cast_and_moved_but_not_emptied(tmp_path):
    expected = written(tmp_path, "nf4")
    fabric = fabric_of(CPU, "nf4")
    with fabric.init_module(), torch.device("meta"):
        net = Net()
    fabric.setup(net, move_to_device=False)
    net.up.float()
    assert net.up.weight.is_meta
    with pytest.raises(QuantizationError, match=r"'up' will be quantized.*load its values with load_state_dict\(\)"):
        net.to_empty(device="cpu")
    net.up.to("cpu")
    assert net.up.weight.dtype == torch.uint8
    net.norm.to_empty(device="cpu")
    by_load_state_dict(fabric, net, tmp_path / "plain.ckpt")
    assert differing(bits(net), bits(expected.module)) == []
    with fabric.init_module(), torch.device("meta"):
        before = Net()
    before.to_empty(device="cpu").load_state_dict(torch.load(tmp_path / "plain.ckpt"))
    fabric.setup(before)
    assert differing(bits(before), bits(expected.module)) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_was_never_loaded_refuses_to_compute_and_is_named(tmp_path, mode):
    written(tmp_path, mode)
    state = torch.load(tmp_path / "plain.ckpt")
    fabric = fabric_of(CPU, mode)
    with fabric.init_module(empty_init=True):
        net = Net()
    model = fabric.setup(net)
    del state["down.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["down.weight"]
    with pytest.raises(QuantizationError, match="'down' was built empty and its weight was never loaded"):
        model(inputs())
    by_load_raw(fabric, model, tmp_path / "plain.ckpt")
    assert model(inputs()).isfinite().all()
    with fabric.init_module():
        filled = Net()
    assert fabric.setup(filled)(inputs()).isfinite().all()


def test_missing_and_unexpected_keys_are_those_of_a_plain_model(tmp_path):
    written(tmp_path, "nf4")
    state = torch.load(tmp_path / "plain.ckpt")
    del state["up.bias"], state["head.weight"]
    state["more"] = torch.ones(1)
    for empty in (True, False):
        fabric = fabric_of(CPU, "nf4")
        with fabric.init_module(empty_init=empty):
            net = Net()
        keys = fabric.setup(net).load_state_dict(state, strict=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["up.bias", "head.weight"], ["more"])


@pytest.mark.parametrize(
    ("saved", "into"),
    [
        ("nf4", "nf4-dq"),
        ("nf4", "fp4"),
        ("nf4", "int8"),
        ("int8", "nf4"),
        ("nf4-dq", "int8-training"),
        ("int8", "int8-training"),
    ],
)
@pytest.mark.parametrize("order", ["setup first", "load first"])
def test_a_checkpoint_quantized_in_another_mode_is_refused_without_strict_too(tmp_path, saved, into, order):
    """Lightning's own keeps the old weights without a word."""
    written(tmp_path, saved)
    state = torch.load(tmp_path / "quantized.ckpt")["model"]
    fabric = fabric_of(CPU, into)
    with fabric.init_module():
        net = Net()
    if order == "setup first":
        fabric.setup(net)
        before = bits(net.up)
        with pytest.raises(RuntimeError, match=r"up.weight"):
            net.load_state_dict(state, strict=False)
        kept = {name for name in before if name.startswith("weight")}
        assert not kept & set(differing(before, bits(net.up)))
    else:
        net.load_state_dict(state, strict=False)
        with pytest.raises(CheckpointError, match=r"'up'.*use the mode that it was saved in"):
            fabric.setup(net)
        assert type(net.up) is nn.Linear
        by_its_mode = fabric_of(CPU, saved).setup(net)
        assert by_its_mode(inputs()).isfinite().all()


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("order", ["setup first", "load first"])
def test_a_quantized_layer_is_not_loaded_into_one_that_stays_plain(tmp_path, mode, order):
    """torch would copy the rows of int8 as if they were values."""
    expected = written(tmp_path, mode)
    state = torch.load(tmp_path / "quantized.ckpt")["model"]
    fabric = fabric_of(CPU, mode, ignore_modules={"down"})
    with fabric.init_module():
        net = Net()
    if order == "setup first":
        model = fabric.setup(net)
        with pytest.raises(RuntimeError, match=r"'down.weight' is quantized in the state_dict, but not in the model"):
            model.load_state_dict(state, strict=False)
    else:
        net.load_state_dict(state)
        with pytest.raises(CheckpointError, match=r"'down'.*use the ignore_modules that it was saved with"):
            fabric.setup(net)
        assert torch.equal(fabric_of(CPU, mode).setup(net)(inputs()), expected(inputs()))


def test_values_of_another_shape_or_not_finite_are_refused(tmp_path):
    model = fabric_of(CPU, "int8").setup(Net())
    before = bits(model.module)
    with pytest.raises(RuntimeError, match=r"'up.weight': size mismatch: the state_dict has shape \(2, 2\)"):
        model.load_state_dict({"up.weight": torch.ones(2, 2)}, strict=False)
    large = torch.full((2 * WIDTH, WIDTH), 70000.0)  # more than float16 holds
    with pytest.raises(RuntimeError, match=r"'up.weight'.*not finite as int8"):
        model.load_state_dict({"up.weight": large}, strict=False)
    assert differing(before, bits(model.module)) == []


class Initialized(nn.Module):
    """Initialises its layers in its constructor, as GPT-2 and Lit-GPT do, and ties two of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, WIDTH), nn.Linear(WIDTH, 16, bias=False)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.apply(self.init)
        self.head.weight = self.embed.weight

    def init(self, module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)))


class TiedToTheHead(Initialized):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.embed.weight = self.head.weight


@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_values_of_the_constructor_are_kept(mode):
    """Lightning's own has packed bytes there, which code that initialises layers fails on."""
    fabric = fabric_of(CPU, mode, dtype=torch.float16)
    with fabric.init_module():
        net = Initialized()
    assert net.inner.weight.dtype == torch.float16
    fabric.setup(net)
    x = torch.randn(4, WIDTH).half()
    expected = nn.functional.linear(x, torch.full((WIDTH, WIDTH), 0.5).half(), net.inner.bias)
    assert torch.allclose(net.inner(x), expected, atol=0.1)


@pytest.mark.parametrize("build", [Initialized, TiedToTheHead])
@pytest.mark.parametrize("order", ["setup first", "load first"])
def test_ties_are_kept_in_an_empty_model(build, order):
    fabric, state = fabric_of(CPU, "nf4"), build().state_dict()
    with fabric.init_module(empty_init=True):
        net = build()
    assert net.head.weight is net.embed.weight
    steps = [lambda: fabric.setup(net), lambda: net.load_state_dict(state)]
    for step in steps if order == "setup first" else reversed(steps):
        step()
    assert net.head.weight is net.embed.weight
    assert torch.equal(net.head.weight, state["head.weight"].bfloat16())
    assert net(torch.arange(3)).isfinite().all()


@pytest.mark.parametrize("empty", [True, False])
def test_ignored_modules_stay_plain_in_a_model_built_under_init_module(tmp_path, empty):
    """Lightning's own refuses init_module where names are ignored."""
    plain = written(tmp_path, "nf4", ignore_modules={"head", "down"})
    fabric = fabric_of(CPU, "nf4", ignore_modules={"head", "down"})
    with fabric.init_module(empty_init=empty):
        net = Net()
    model = fabric.setup(net)
    by_load_raw(fabric, model, tmp_path / "plain.ckpt")
    assert torch.equal(model(inputs()), plain(inputs()))
    assert [type(layer) is nn.Linear for layer in (net.up, net.down, net.head)] == [False, True, True]


def test_training_does_not_write_to_the_state_dict_that_was_loaded():
    state = Net().half().state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    fabric = fabric_of(CPU, "int8-training", ignore_modules={"head"})
    with fabric.init_module(empty_init=True):
        net = Net()
    net.load_state_dict(state)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    fabric.backward(model(inputs()).square().mean())
    optimizer.step()
    assert not torch.equal(net.up.weight, kept["up.weight"])
    assert all(torch.equal(state[name], kept[name]) for name in kept)


@pytest.mark.cuda
def test_an_empty_model_takes_no_more_than_its_quantized_form_and_one_layer(tmp_path):
    def build():
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))

    torch.save(build().half().state_dict(), tmp_path / "plain.ckpt")
    fabric = fabric_of(torch.device("cuda"), "nf4")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with fabric.init_module(empty_init=True):
        net = build()
    model = fabric.setup(net)
    by_load_raw(fabric, model, tmp_path / "plain.ckpt")
    layer = 2048 * 2048
    assert torch.cuda.max_memory_allocated() - before < 16 * layer * 0.58 + 4 * layer * 2


class Adapted(nn.Module):
    """A layer with an adapter of its own, whose low-rank parts are parameters, as Lit-GPT writes it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.lora_a, self.lora_b = nn.Parameter(torch.zeros(4, WIDTH)), nn.Parameter(torch.zeros(WIDTH, 4))
        nn.init.kaiming_uniform_(self.lora_a)

    def forward(self, x):
        return self.linear(x) + x @ self.lora_a.T @ self.lora_b.T


@pytest.mark.parametrize("mode", MODES[:-1])
def test_adapters_of_the_model_are_trained_on_weights_that_are_loaded_after_the_optimizer_was_made(
    tmp_path, device, mode
):
    torch.save(nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH, bias=False)}).state_dict(), tmp_path / "base.ckpt")
    fabric = fabric_of(device, mode)
    with fabric.init_module(empty_init=False):
        net = Adapted()
    for name, parameter in net.named_parameters():
        parameter.requires_grad = "lora" in name
    model = fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.5))
    missing, _ = model.load_state_dict(torch.load(tmp_path / "base.ckpt", mmap=True), strict=False)
    assert missing == ["lora_a", "lora_b"]
    base, losses = bits(net.linear), []
    for _ in range(5):
        loss = model(inputs().to(device)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert differing(base, bits(net.linear)) == []


@pytest.mark.parametrize(("mode", "ignored"), [("int8-training", set()), ("nf4", {"head"})])
def test_an_optimizer_that_would_not_train_empty_layers_is_refused_and_the_remedy_works(tmp_path, mode, ignored):
    written(tmp_path, mode)
    fabric = fabric_of(CPU, mode, ignore_modules=ignored)

    def stepped(is_made_before):
        with fabric.init_module(empty_init=True):
            net = Net()
        if is_made_before:
            model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
        else:
            model = fabric.setup(net)
            optimizer = fabric.setup_optimizers(torch.optim.SGD(net.parameters(), lr=0.5))
        fabric.load_raw(tmp_path / "plain.ckpt", model)
        before = net.head.weight.detach().clone()
        fabric.backward(model(inputs()).square().mean())
        optimizer.step()
        return not torch.equal(net.head.weight, before)

    with pytest.raises(QuantizationError, match=r"in_features=64.*built empty.*make the optimizer after fabric\.setup"):
        stepped(is_made_before=True)
    assert stepped(is_made_before=False)


def test_an_optimizer_made_before_setup_may_hold_what_is_not_trained(tmp_path):
    written(tmp_path, "nf4")
    fabric = fabric_of(CPU, "nf4")
    with fabric.init_module(empty_init=True):
        net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.5))
    fabric.load_raw(tmp_path / "plain.ckpt", model)
    before = net.norm.weight.detach().clone()
    fabric.backward(model(inputs()).square().mean())
    optimizer.step()
    assert not torch.equal(net.norm.weight, before)
