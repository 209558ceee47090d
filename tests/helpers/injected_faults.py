"""Faults at each edge of the package: the n-th call of a function of the system, of torch or of a device fails.

A job is a load, a save and the like. A try runs it with one fault. Afterwards all is as it was before: the model,
threads, descriptors, host memory, files. A second run, without a fault, then gives the bits of a run that met none.
"""

import builtins
import gc
import io
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import late_gpu
import pytest
import torch
from checkpoints import contents, empty, offloaded, save_checkpoint
from comparisons import assert_same_bits, state_of
from experts import made, pack, routed
from models import GPT
from resources import open_and_running
from streaming import engines_of, parts_of, tensors_of, tokens, written
from torch import nn

from bigload import BigloadError, load_and_quantize_model, quantize_checkpoint, save_quantized_model
from bigload.checkpoint.safetensors import read_header
from bigload.hardware import interrupts, pinned
from bigload.io import feed, ring, transfer
from bigload.io.native_feed import NativeFeed
from bigload.offload import weight_cache
from bigload.offload.engine import Engine
from bigload.offload.files import FileGroup
from bigload.offload.leaves import Group, Leaf
from bigload.quantization.quantizer import Quantizer

# Errors, by what the table calls them.
ERRORS = {
    "I/O error": lambda: OSError(5, "Input/output error"),
    "disk full": lambda: OSError(28, "No space left on device"),
    "too many open files": lambda: OSError(24, "Too many open files"),
    "not permitted": lambda: PermissionError(13, "Permission denied"),
    "host memory": lambda: MemoryError("refused"),
    "device memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "torch's host memory": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "mapping": lambda: RuntimeError("unable to mmap 64 bytes from file: Cannot allocate memory (12)"),
    "no thread": lambda: RuntimeError("can't start new thread"),
    "Ctrl-C": KeyboardInterrupt,
}
_READS = ("I/O error", "host memory", "Ctrl-C")
_WRITES = ("I/O error", "disk full", "Ctrl-C")
_MEMORY = ("host memory", "device memory", "torch's host memory", "Ctrl-C")


@dataclass(frozen=True)
class Edge:
    """Functions that one kind of fault can come from, and what they may raise."""

    places: tuple
    errors: tuple


EDGES = {
    "open": Edge(
        ((os, "open"), (io, "open"), (builtins, "open")),
        ("too many open files", "not permitted", "I/O error", "Ctrl-C"),
    ),
    "stat": Edge(((os, "stat"),), ("I/O error", "Ctrl-C")),
    "list": Edge(((os, "listdir"), (os, "scandir")), ("I/O error", "Ctrl-C")),
    "read": Edge(((os, "pread"), (os, "preadv")), _READS),
    "write": Edge(((os, "pwrite"),), _WRITES),
    "allocate on disk": Edge(((os, "ftruncate"),), _WRITES),
    "write by safetensors": Edge(((weight_cache, "save_file"),), _WRITES),
    "fsync": Edge(((os, "fsync"),), _WRITES),
    "rename": Edge(((os, "rename"), (os, "replace"), (os, "link")), _WRITES),
    "make folder": Edge(((os, "mkdir"),), _WRITES),
    "delete": Edge(((os, "unlink"),), ("I/O error", "Ctrl-C")),
    "map": Edge(((torch, "from_file"), (pinned, "_Mapping")), ("mapping", "host memory", "Ctrl-C")),
    "allocate": Edge(((torch, "empty"),), _MEMORY),
    "pin": Edge(((ring, "pinned_memory"),), ("device memory", "torch's host memory", "Ctrl-C")),
    "copy": Edge(((torch.Tensor, "copy_"), (torch, "_foreach_copy_")), _MEMORY),
    "quantize": Edge(((Quantizer, "add"), (Quantizer, "finish")), _MEMORY),
    "thread": Edge(((threading.Thread, "start"),), ("no thread", "Ctrl-C")),
}
DEVICE = "device"  # an error of a function that the part in C is given
HOW = "an error of the driver"


class Fault:
    """One fault. Counts the calls of an edge, in all threads; Ctrl-C comes to the main thread alone."""

    def __init__(self, edge, error, call=0):
        """Describe it.

        Args:
            edge: its name in EDGES, or of a function of the device.
            error: its name in ERRORS.
            call: that fails; 0 for none: calls are counted only.
        """
        self.edge, self.error, self.call = edge, error, call
        self.calls, self._lock = 0, threading.Lock()

    @contextmanager
    def injected(self):
        if self.error == DEVICE:
            late_gpu.fail_function(self.edge, self.call)
            try:
                yield
            finally:
                self.calls = late_gpu.calls_of(self.edge)
                late_gpu.fail_function(self.edge, 0)
            return
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in EDGES[self.edge].places:
                patch.setattr(owner, name, self._counted(getattr(owner, name)))
            yield

    def _counted(self, original):
        is_for_main = self.error == "Ctrl-C"

        def counted(*args, **kwargs):
            if not is_for_main or threading.current_thread() is threading.main_thread():
                with self._lock:
                    self.calls += 1
                    is_hit = self.calls == self.call
                if is_hit:
                    raise ERRORS[self.error]()
            return original(*args, **kwargs)

        return counted


class CtrlC:
    """SIGINT after some time, wherever the main thread is then. Its test puts SIGALRM's handler back."""

    edge, error, call, calls = "any moment", "Ctrl-C", 0, 0

    def __init__(self, delay):
        self.delay = delay

    @contextmanager
    def injected(self):
        """Nothing here has to be undone where Ctrl-C keeps this from its end: the timer is over by then."""
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, self.delay)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)


class CtrlCAtPoint:
    """SIGINT right before the n-th point where it is raised; 0 for none: points are counted only."""

    edge, error = "each point", "Ctrl-C"

    def __init__(self, call=0):
        self.call, self.calls = call, 0

    def injected(self):
        return at_each_point(self._press)

    def _press(self):
        self.calls += 1
        if self.calls == self.call:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def at_each_point(act):
    """Call a function before each look for Ctrl-C, in the main thread."""
    own = interrupts.check_interrupt

    def checked():
        if threading.current_thread() is threading.main_thread():
            act()
        own()

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("bigload.") and vars(module).get("check_interrupt") is own:
                patch.setattr(module, "check_interrupt", checked)
        yield


def is_clear(error, fault, job):
    """Whether a caller is told: by an error of bigload's, or that of the memory, the thread or Ctrl-C itself.

    A forward raises torch's own errors of memory, which callers know how to catch.
    """
    if job.is_forward and fault.error in ("device memory", "torch's host memory"):
        return isinstance(error, RuntimeError) and "memory" in str(error)
    if fault.error == "Ctrl-C":
        return isinstance(error, KeyboardInterrupt)
    if fault.error == DEVICE:
        return isinstance(error, (RuntimeError, MemoryError)) and ("GPU" in str(error) or "memory" in str(error))
    return isinstance(error, (BigloadError, MemoryError)) or (fault.error == "no thread" and "thread" in str(error))


def anatomy(model):
    """List what a model consists of: its objects, what each has, where its tensors lie."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    return (
        [(n, id(t), t.data_ptr(), t.device, t.dtype, t.requires_grad, sorted(vars(t))) for n, t in tensors],
        [(id(m), type(m), m.training, sorted(vars(m))) for m in model.modules()],
        [[len(getattr(m, each)) for each in hooks] for m in model.modules()],
    )


_mappings = weakref.WeakSet()


class _Watched(pinned._Mapping):
    def __init__(self, *_):
        super().__init__()
        _mappings.add(self)


@contextmanager
def small_surroundings():
    """A small ring and window, read by Python's threads: every read is a call that can fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIGLOAD_RING_BYTES", "8KiB")
        patch.setenv("BIGLOAD_THREADS", "2")
        patch.setattr("bigload.planning.units.RESIDENT_BYTES", 2000)
        patch.setattr("bigload.quantization.cpu_forwards._PACKED_ROWS", 2**40)
        patch.setattr(pinned, "_Mapping", _Watched)
        yield patch


def build(layers=1):
    return GPT(vocab=32, width=32, layers=layers)


def remove(folder, name):
    """Delete what a run has made, also what it could not delete itself."""
    for each in (*folder.glob(f"{name}*"), *folder.glob(f".{name}*")):
        if each.is_dir():
            shutil.rmtree(each)
        else:
            each.unlink()


class Job:
    """What is tried. One object serves many tries, each with a subject of its own.

    Attributes:
        edges: (edge, error) that it may meet.
    """

    is_native = is_forward = False

    def __init__(self, folder, patch):
        self.folder = folder
        if not self.is_native:
            patch.setattr(transfer, "library", lambda: None)
        torch.manual_seed(0)
        self.prepare()

    @property
    def edges(self):
        return [(edge, error) for edge, said in EDGES.items() for error in said.errors]

    def prepare(self):
        raise NotImplementedError

    def subject(self):
        raise NotImplementedError

    def act(self, subject):
        raise NotImplementedError

    def seen(self, subject):
        """Return what a try that fails must leave as it is."""
        return anatomy(subject)

    def result(self, subject, acted):
        """Return what must be the same in each run that does not fail, by name."""
        return state_of(acted)

    def left(self):
        """Return the files, by name; those that a run that was stopped keeps for the next are no matter."""
        return {name: held for name, held in contents(self.folder).items() if not name.startswith("kept/")}

    def settle(self):
        """Wait for what goes on in the background."""

    def is_complete(self, subject, expected):
        """Whether all is there that a run makes, and nothing else."""
        return False

    def clean(self, subject):
        """Take away what a subject has made."""


class Load(Job):
    """A checkpoint in two files, quantized with nested scales."""

    mode = "nf4-dq"

    def prepare(self):
        save_checkpoint(build(), self.folder / "checkpoint", shards=2, dtype=torch.bfloat16)

    def subject(self):
        return empty(build)

    def act(self, subject):
        return load_and_quantize_model(subject, self.mode, self.folder / "checkpoint", device_map="cpu")

    def is_complete(self, subject, expected):
        if "load_report" not in vars(subject):
            return False
        assert_same_bits(self.result(subject, subject), expected)
        return True


class LoadByC(Load):
    """The same by the part in C."""

    is_native = True


class LoadIn16Bit(LoadByC):
    """As it is stored."""

    mode = "none"


class LoadInPlace(Load):
    """A model is quantized from its own weights."""

    def subject(self):
        torch.manual_seed(0)
        return build()

    def act(self, subject):
        return load_and_quantize_model(subject, "int8", device_map="cpu")


class LoadOntoLateGpu(Load):
    """The same by the part in C, onto a device whose streams are late."""

    mode, is_native = "nf4", True

    def __init__(self, folder, patch):
        self.gpu = late_gpu.install(patch)
        take = NativeFeed.take

        def take_when_there(own, batch):
            take(own, batch)
            self.gpu.work.synchronize()  # what quantizes here is in the order of no stream

        patch.setattr(NativeFeed, "take", take_when_there)
        patch.setattr("bigload.io.timeline.timed_event", late_gpu.Event)
        super().__init__(folder, patch)

    @property
    def edges(self):
        return [*super().edges, *((name, DEVICE) for name in late_gpu.FUNCTIONS)]

    def subject(self):
        ring.release_ring()  # the load pins one
        return super().subject()

    def clean(self, subject):
        self.gpu.memory.clear()

    def let_go(self):
        """End what was left alone, since the device could not tell when it is over."""
        for each in feed._abandoned:
            for lane in each.lanes.values():
                lane.copies.synchronize()
            while each._descriptors:
                os.close(each._descriptors.pop())
        feed._abandoned.clear()


class LoadToDisk(Load):
    """A block in int8 goes into files of offload_folder."""

    def subject(self):
        shutil.rmtree(self.folder / "kept", ignore_errors=True)
        return empty(build)

    def act(self, subject):
        device_map = {"": "cpu", "transformer.h.0": "disk"}
        return load_and_quantize_model(
            subject, "int8", self.folder / "checkpoint", device_map=device_map, offload_folder=self.folder / "kept"
        )

    def seen(self, subject):
        kept = self.folder / "kept"
        assert not [each for each in kept.glob("*.safetensors") if not read_header(each)]
        return anatomy(subject)

    def clean(self, subject):
        if "offload" in vars(subject):
            subject.offload.remove()


class Save(Job):
    """A quantized model is saved in several files."""

    def prepare(self):
        torch.manual_seed(0)
        self.model = load_and_quantize_model(build(), "nf4-dq", device_map="cpu")

    def subject(self):
        remove(self.folder, "saved")
        return self.model

    def act(self, subject):
        save_quantized_model(subject, self.folder / "saved", max_shard_size="8KB")

    def result(self, subject, acted):
        return contents(self.folder / "saved")

    def is_complete(self, subject, expected):
        others = [path.name for path in self.folder.glob(".*")]
        return not others and (self.folder / "saved").is_dir() and contents(self.folder / "saved") == expected


class SaveOver(Save):
    """The same, in the place of another one."""

    def prepare(self):
        super().prepare()
        other = load_and_quantize_model(build(), "int8", device_map="cpu")
        save_quantized_model(other, self.folder / "other")
        (self.folder / "other" / "notes.txt").write_text("the owner's")

    def subject(self):
        super().subject()
        shutil.copytree(self.folder / "other", self.folder / "saved")
        return self.model

    def act(self, subject):
        save_quantized_model(subject, self.folder / "saved", max_shard_size="8KB", overwrite=True)


class Quantize(Job):
    """A checkpoint is quantized into files, and other files are copied."""

    def prepare(self):
        save_checkpoint(build(), self.folder / "checkpoint", shards=2, dtype=torch.bfloat16)
        (self.folder / "checkpoint" / "tokenizer.json").write_text("{}")
        self.model = empty(build)

    def subject(self):
        remove(self.folder, "made")
        return self.model

    def act(self, subject):
        source, target = self.folder / "checkpoint", self.folder / "made"
        quantize_checkpoint(source, target, "nf4-dq", model=subject, device="cpu", max_shard_size="8KB")

    def left(self):
        # What Ctrl-C leaves for the next run lies beside the target.
        return {n: held for n, held in super().left().items() if not n.startswith((".made.partial", ".made.lock"))}

    def result(self, subject, acted):
        return contents(self.folder / "made")

    def is_complete(self, subject, expected):
        return (self.folder / "made").is_dir() and contents(self.folder / "made") == expected


BLOCKS = [f"transformer.h.{number}" for number in range(4)]


class Forward(Job):
    """A forward of a model of which four blocks and the embedding are on the disk."""

    is_forward = True
    device, away = torch.device("cpu"), [*BLOCKS, "transformer.wte"]

    def prepare(self):
        checkpoint = save_checkpoint(build(4), self.folder / "checkpoint", dtype=torch.bfloat16)
        kept = self.folder / "kept"
        self.model = offloaded(lambda: build(4), checkpoint, self.device, self.away, kept).eval()
        with torch.no_grad():
            self.model(self.inputs)

    @property
    def inputs(self):
        return tokens(self.device) % 32

    def subject(self):
        return self.model

    def act(self, subject):
        with torch.no_grad():
            return subject(self.inputs)

    def result(self, subject, acted):
        return {"logits": acted}

    def settle(self):
        for engine in engines_of(self.model):  # which reads ahead for the next forward
            engine.pool.copier.finish()


class Experts(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.experts = nn.ModuleList(made("gpt_oss", 6, seed=number).experts for number in range(layers))

    def forward(self, x, ids, weights):
        for layer in self.experts:
            x = x + layer(x, ids, weights)
        return x


class FetchExperts(Job):
    """Experts are fetched from files into a cache that has room for two of six."""

    is_forward = True

    def prepare(self):
        self.model = Experts()
        pack(self.model, "nf4", torch.float32)
        self.model.requires_grad_(False)
        groups = []
        for number, module in enumerate(self.model.experts):
            leaf = Leaf(f"experts.{number}", module, module.quantized_experts.weights)
            tensors = tensors_of([leaf])
            assert parts_of(tensors)
            store = FileGroup(written(tensors, self.folder / f"{number}.bin"))
            groups.append(Group(str(number), (leaf,), store))
            groups[-1].cached = 2
        self.engine = Engine(self.model, groups, torch.device("cpu"), 1)
        self.x, _, self.weights = routed(4, 1, self.model.experts[0])
        self.turn = 0

    def subject(self):
        return self.model

    def act(self, subject):
        """Want others each time: what is there already needs no fetch."""
        with torch.no_grad():
            made = {}
            for expert in (0, 1, 2, 3, 4):
                ids = torch.full((4, 1), expert)
                ids[0] = (expert + 1) % 6
                made[str(expert)] = subject(self.x, ids, self.weights)
            return made

    def result(self, subject, acted):
        return acted


class LoadOntoGpu(Load):
    """A checkpoint in two files, onto a GPU, whose memory is as before after a fault."""

    is_native = True

    def act(self, subject):
        return load_and_quantize_model(subject, self.mode, self.folder / "checkpoint", device_map=0)

    def seen(self, subject):
        gc.collect()  # bitsandbytes' layers and their weights refer to each other
        torch.cuda.synchronize()
        return anatomy(subject), torch.cuda.memory_allocated()


class ForwardOnGpu(Forward):
    """A forward on a GPU of a model of which four blocks are in host memory."""

    device, away = torch.device("cuda", 0), BLOCKS

    def settle(self):
        super().settle()
        torch.cuda.synchronize()


# Those that need a GPU: a table of their own.
GPU_JOBS = {"load onto a GPU": LoadOntoGpu, "forward streamed to a GPU": ForwardOnGpu}
# Those that are tried with Ctrl-C alone.
MORE_LOADS = {"load by C": LoadByC, "load in 16 bit": LoadIn16Bit, "load in place": LoadInPlace}
JOBS = {
    "load": Load,
    "load onto a late GPU": LoadOntoLateGpu,
    "load to the disk": LoadToDisk,
    "save": Save,
    "save over another": SaveOver,
    "quantize_checkpoint": Quantize,
    "offloaded forward": Forward,
    "expert fetch": FetchExperts,
}


@dataclass
class Outcomes:
    """What came of tries.

    Attributes:
        counts: (job, edge, error) -> outcome -> tries.
        failures: of tries that left something behind, or a wrong bit.
    """

    counts: dict = field(default_factory=dict)
    failures: list = field(default_factory=list)

    def add(self, job, edge, error, outcome):
        self.counts.setdefault((job, edge, error), Counter())[outcome] += 1

    @property
    def tries(self):
        return sum(sum(counts.values()) for counts in self.counts.values())


class Tries:
    """All tries of one job."""

    def __init__(self, name, patch, folder):
        self.name, self._calls = name, {}
        self.job = (JOBS | MORE_LOADS | GPU_JOBS)[name](folder, patch)
        for _ in range(2):  # what is made once per process is made now
            subject = self.job.subject()
            self.expected = self._copied(self.job.result(subject, self.job.act(subject)))
            self.job.clean(subject)
        self.job.settle()

    @staticmethod
    def _copied(result):
        return {name: each.clone() if isinstance(each, torch.Tensor) else each for name, each in result.items()}

    def calls(self, edge, error):
        """Count the calls of an edge in a run without a fault; of most errors they are the same."""
        counted = edge, error if error in ("Ctrl-C", DEVICE) else "any other"
        if counted not in self._calls:
            self._calls[counted] = self.calls_of(Fault(edge, error))
        return self._calls[counted]

    def calls_of(self, fault):
        """Count what a fault counts, in a run that meets none."""
        subject = self.job.subject()
        with fault.injected():
            self.job.act(subject)
        self.job.clean(subject)
        return fault.calls

    def run(self, edge, error, call):
        """Run the job with a fault, and once more without.

        Returns:
            "refused" with a clear error, "right" where the fault does no harm, or "not met".

        Raises:
            AssertionError: something is not as it was, or not what it is to be.
        """
        return self.run_with(Fault(edge, error, call))

    def run_with(self, fault):
        """Do what `run` does, with a fault of any kind."""
        job = self.job
        subject = job.subject()
        files, held, mappings = job.left(), open_and_running(), len(_mappings)
        seen = job.seen(subject)
        raised, where = None, ""
        try:
            with fault.injected():
                acted = job.act(subject)
        except BaseException as error_met:
            raised, where = error_met, "".join(traceback.format_tb(error_met.__traceback__)[-6:])
        job.settle()
        if fault.error == DEVICE and fault.edge in ("event_record", "event_query"):
            job.let_go()
        if raised is not None:
            self._without_frames(raised)
            assert is_clear(raised, fault, job), f"not clear: {raised!r}\n{where}"
            assert not open_and_running() - held, open_and_running() - held
            is_complete = fault.error == "Ctrl-C" and job.is_complete(subject, self.expected)
            assert is_complete or job.seen(subject) == seen, "the model is not as it was"
            assert not feed._abandoned, "a feed was left alone"
            if len(_mappings) > mappings:
                gc.collect()
            assert len(_mappings) <= mappings, "host memory is still held"
            if is_complete:  # it came when all was done, but for the return
                job.clean(subject)
                subject = job.subject()
            else:
                left = job.left()
                assert left == files, sorted(left.keys() ^ files.keys()) or "files are not as they were"
            acted = job.act(subject)
        self._check_result(subject, acted)
        del acted
        job.clean(subject)
        job.settle()
        assert not open_and_running() - held, open_and_running() - held
        return "refused" if raised is not None else "right" if fault.calls >= fault.call else "not met"

    def _check_result(self, subject, acted):
        found = self.job.result(subject, acted)
        if isinstance(next(iter(found.values())), torch.Tensor):
            assert_same_bits(found, self.expected)
        else:
            assert found == self.expected, sorted(name for name in found if found[name] != self.expected.get(name))

    @staticmethod
    def _without_frames(error):
        """Drop the frames of an error and of those before it: they hold what the try had made."""
        each = error
        while each is not None:
            each.__traceback__ = None
            each = each.__cause__ or each.__context__
        return error


@contextmanager
def tries_of(name):
    """Give all tries of a job, in a folder of their own."""
    with ExitStack() as stack:
        patch = stack.enter_context(small_surroundings())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tries = Tries(name, patch, folder)
        yield tries
        if isinstance(tries.job, LoadOntoLateGpu):
            tries.job.gpu.end()
            ring.release_ring()


def every_try(names=tuple(JOBS), choose=lambda calls: range(1, calls + 1), say=lambda text: None):
    """Run tries of jobs: of each edge and error those calls that are chosen among its calls."""
    outcomes = Outcomes()
    for name in names:
        with tries_of(name) as tries:
            for edge, error in tries.job.edges:
                for call in choose(tries.calls(edge, error)):
                    try:
                        outcome = tries.run(edge, error, call)
                    except Exception as found:
                        outcome = "failed"
                        outcomes.failures.append(f"{name}: {error} at call {call} of {edge}: {found!r}"[:2000])
                        say(outcomes.failures[-1])
                    outcomes.add(name, edge, error, outcome)
        say(f"{name}: {outcomes.tries} tries so far, {len(outcomes.failures)} failures")
    return outcomes
