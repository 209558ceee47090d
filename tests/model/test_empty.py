"""Models built without weights: what goes to meta, what stays shared, and what other threads see of it."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from models import Net, llama, t5
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from bigload import init_empty_weights


def test_parameters_go_to_meta_and_buffers_stay_real():
    with init_empty_weights():
        model = nn.BatchNorm1d(3)
    assert model.weight.is_meta
    assert model.weight.shape == (3,)
    assert torch.equal(model.running_mean, torch.zeros(3))
    assert torch.equal(model.running_var, torch.ones(3))
    assert model.num_batches_tracked.item() == 0


def test_modules_that_register_in_their_own_ways_are_empty_too():
    with init_empty_weights():
        model = Net(rnn=nn.LSTM(3, 4), attn=nn.MultiheadAttention(4, 2), rows=nn.ParameterList([torch.ones(2)]))
        model.table = nn.ParameterDict({"a": torch.ones(3)})
    parameters = dict(model.named_parameters())
    assert len(parameters) == 4 + 4 + 1 + 1
    assert all(parameter.is_meta for parameter in parameters.values())


def test_buffers_go_to_meta_when_asked():
    with init_empty_weights(include_buffers=True):
        model = nn.BatchNorm1d(3)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not torch.ones(1).is_meta


@pytest.mark.parametrize("include_buffers", [False, True])
def test_weight_assigned_from_another_layer_stays_tied(include_buffers):
    with init_empty_weights(include_buffers):
        model = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4))
        model.a.weight = model.b.weight
    assert model.a.weight is model.b.weight
    assert model.a.weight.is_meta


def test_parameter_registered_twice_stays_one():
    with init_empty_weights():
        model = Net(a=nn.Module(), b=nn.Module())
        parameter = nn.Parameter(torch.ones(2))
        model.a.weight = parameter
        model.b.register_parameter("weight", parameter)
        model.b.other = nn.Parameter(torch.ones(2))
    assert model.a.weight is model.b.weight
    assert model.b.other is not model.a.weight
    assert parameter.device.type == "cpu"


def test_parameter_keeps_dtype_shape_strides_and_requires_grad():
    with init_empty_weights():
        model = nn.Module()
        model.frozen = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16), requires_grad=False)
        model.trained = nn.Parameter(torch.ones(2, 3).t())
        model.integers = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    assert (model.frozen.dtype, model.frozen.shape, model.frozen.requires_grad) == (torch.bfloat16, (2, 3), False)
    assert (model.trained.shape, model.trained.stride(), model.trained.requires_grad) == ((3, 2), (1, 3), True)
    assert (model.integers.dtype, model.integers.is_meta) == (torch.int8, True)


def test_parameter_keeps_its_class_and_attributes():
    class Sharded(nn.Parameter):
        pass

    with init_empty_weights():
        model = nn.Module()
        parameter = Sharded(torch.ones(2))
        parameter.axis = 1
        model.weight = parameter
    assert type(model.weight) is Sharded
    assert model.weight.axis == 1
    assert model.weight.is_meta


def test_parameter_slot_without_a_parameter_stays_empty():
    with init_empty_weights():
        model = nn.Linear(4, 4, bias=False)
    assert model.bias is None


def test_memory_of_a_weight_is_free_as_soon_as_it_is_registered():
    with init_empty_weights():
        parameter = nn.Parameter(torch.ones(2))
        alive = weakref.ref(parameter)
        model = nn.Module()
        model.weight = parameter
        del parameter
        assert alive() is None
    assert model.weight.is_meta


def test_lazy_modules_stay_lazy():
    with init_empty_weights():
        model = nn.LazyLinear(4)
    model(torch.ones(2, 3))
    assert model.weight.shape == (4, 3)


def test_module_built_meanwhile_in_another_thread_is_real():
    built = []
    with init_empty_weights():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(4, 4)))
        thread.start()
        thread.join()
        mine = nn.Linear(4, 4)
    assert built[0].weight.device.type == "cpu"
    assert mine.weight.is_meta


def test_two_threads_inside_at_once_each_build_empty_models():
    inside = threading.Barrier(2, timeout=30)
    built = []

    def build():
        with init_empty_weights():
            inside.wait()
            built.append(nn.Linear(4, 4))
            inside.wait()

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [model.weight.is_meta for model in built] == [True, True]


def test_leaving_an_inner_use_does_not_end_the_outer_one():
    with init_empty_weights():
        shared = nn.Parameter(torch.ones(4))
        outer = nn.Module()
        outer.weight = shared
        with init_empty_weights():
            inner = nn.Module()
            inner.weight = shared
        after = nn.Linear(4, 4)
    assert inner.weight is outer.weight
    assert inner.weight.is_meta
    assert after.weight.is_meta
    assert not nn.Linear(4, 4).weight.is_meta


@pytest.mark.parametrize("include_buffers", [False, True])
def test_exception_inside_restores_everything(include_buffers):
    before = dict(torch_module._global_parameter_registration_hooks)
    with pytest.raises(ZeroDivisionError), init_empty_weights(include_buffers):
        raise ZeroDivisionError
    assert dict(torch_module._global_parameter_registration_hooks) == before
    assert all(not tensor.is_meta for tensor in nn.BatchNorm1d(3).state_dict().values())


def test_hooks_do_not_pile_up_and_the_one_that_stays_does_nothing_after():
    with init_empty_weights():
        once = dict(torch_module._global_parameter_registration_hooks)
    with init_empty_weights():
        assert dict(torch_module._global_parameter_registration_hooks) == once
    parameter = nn.Parameter(torch.ones(4))
    module = nn.Module()
    module.weight = parameter
    assert module.weight is parameter


def test_threads_that_enter_and_leave_at_once_do_not_disturb_each_other():
    def build(_):
        for _ in range(30):
            with init_empty_weights():
                empty = nn.Linear(4, 4)
            real = nn.Linear(4, 4)
            assert empty.weight.is_meta
            assert not real.weight.is_meta
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(build, range(16)))


class Holds(nn.Module):
    """A parameter of 64 TiB, which no machine could hold, and large tensors that are none."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(make(2**22, 2**22))
        self.register_buffer("table", torch.zeros(2**18))
        self.table[3] = 5
        self.later = torch.ones(2**18)
        half = torch.full((2**18,), 2.0)
        self.register_buffer("quarter", half / 4)
        filled = torch.empty(2**18).fill_(7)
        self.register_buffer("filled", filled, persistent=False)
        nn.init.normal_(self.weight)


@pytest.mark.parametrize(
    "make",
    [torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand, lambda *shape: torch.empty(*shape).normal_()],
)
def test_parameters_are_never_allocated_and_everything_else_is(make):
    with init_empty_weights():
        model = Holds(make)
    assert model.weight.is_meta
    assert model.weight.shape == (2**22, 2**22)
    real = {name: value.unique().tolist() for name, value in model.named_buffers()}
    assert real == {"table": [0, 5], "quarter": [0.5], "filled": [7]}
    assert model.later.sum() == 2**18


class Filled(TorchDispatchMode):
    """Notes what fills tensors on meta."""

    def __init__(self):
        super().__init__()
        self.noted = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("normal_", "uniform_", "fill_") and args[0].is_meta:
            self.noted.add(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("build", [lambda: nn.Linear(4, 4), partial(llama, False), t5])
def test_parameters_on_meta_are_not_initialized(build):
    """transformers replaces torch's functions by its own meanwhile: a model took four times as long to build."""
    with Filled() as filled, init_empty_weights():
        model = build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert filled.noted <= {"fill_"}  # by zeros_ and ones_, which tell no mode


def test_large_tensors_of_nested_blocks_and_dtypes_are_as_without():
    with init_empty_weights():
        with init_empty_weights():
            inner = torch.ones(2**19, dtype=torch.float16)
        outer = inner.float() + torch.zeros(2**19)
    assert (outer.device.type, outer.dtype, outer.unique().tolist()) == ("cpu", torch.float32, [1])


@pytest.mark.parametrize("dtype", [bool, int, float, complex])
def test_large_tensors_may_have_the_dtype_of_a_python_type(dtype):
    """GPT-Neo's mask is `torch.ones(..., dtype=bool)`."""
    with init_empty_weights():
        made = [torch.ones((1024, 1024), dtype=dtype), torch.zeros(3, dtype=dtype)]
    assert [tensor.dtype for tensor in made] == [torch.ones((), dtype=dtype).dtype] * 2
    assert torch.equal(made[0], torch.ones(1024, 1024, dtype=dtype))
