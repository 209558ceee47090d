"""However a command ends, it is one line and the right exit status: Ctrl-C, a closed pipe, a full disk, a bug."""

import errno
import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigload.cli import main

MOMENTS = {
    "while the arguments are read": ("bigload.cli.program._parser", ["show", "model"]),
    "while it looks for the model": ("bigload.cli.load.model_folder", ["load", "model"]),
    "while the model is built": ("bigload.model.described.transformers_facts.empty_model", ["load", "model"]),
    "while it is planned": ("bigload.loading.plan_load", ["load", "model"]),
    "while it is loaded": ("bigload.loading.execute", ["load", "model"]),
    "while text is generated": ("bigload.cli.load._Prompt.continued_by", ["load", "model", "--prompt", "w1"]),
    "while a plan is made": ("bigload.planning.planner.plan_load", ["plan", "model"]),
    "while a plan is printed": ("bigload.planning.plan.text_table", ["plan", "model"]),
    "while files are quantized": ("bigload.conversion._convert", ["quantize", "model", "made"]),
    "while a checkpoint is described": ("bigload.checkpoint.describe.open_checkpoint", ["show", "model"]),
}


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_is_one_line_and_130(place, capsys, monkeypatch, moment):
    target, arguments = MOMENTS[moment]
    monkeypatch.setattr("bigload.cli.load._Prompt.__init__", lambda *args: None)
    monkeypatch.setattr(target, interrupt)
    capsys.readouterr()
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("bigload: interrupted")
    assert captured.err.count("\n") == 1


def test_interrupted_quantize_says_how_to_go_on_and_that_works(place, capsys, monkeypatch):
    from bigload import conversion

    written = []

    def stopped(writer_class):
        class Writer(writer_class):
            def write(self, *args, **kwargs):
                super().write(*args, **kwargs)

            def finish(self):
                if not written:
                    written.append(True)
                    raise KeyboardInterrupt
                super().finish()

        return Writer

    monkeypatch.setattr(conversion, "ShardWriter", stopped(conversion.ShardWriter))
    command = ["quantize", "model", "made it", "--quant", "nf4-dq", "--device", "cpu", "--max-shard-size", "40KB"]
    assert main(command) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert (place / ".made it.partial").is_dir()
    assert "'.made it.partial'" in said
    again = shlex.split(said.partition("goes on from there: ")[2])
    assert again[0] == "bigload"
    assert again[1:3] == command[:2]
    assert sorted(again[1:]) == sorted(command)
    assert main(again[1:]) == 0
    assert not (place / ".made it.partial").exists()


def test_quantize_that_had_not_begun_says_no_more(place, capsys, monkeypatch):
    monkeypatch.setattr("bigload.conversion.plan_load", interrupt)
    assert main(["quantize", "model", "made"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "bigload: interrupted"


INTERRUPTED_PROCESS = """
import os, signal, sys
from bigload import conversion
from bigload.cli import main
own = conversion._convert
def convert(*args):
    os.kill(os.getpid(), signal.SIGINT)
    return own(*args)
conversion._convert = convert
sys.argv[1:] = ["quantize", "model", "made", "--device", "cpu"]
sys.exit(main())
"""


def test_ctrl_c_in_a_process_of_its_own(place, programs):
    done = programs.ended(INTERRUPTED_PROCESS, place)
    assert done.status == 130
    said = [line for line in done.said.splitlines() if line.strip()]
    assert said == [
        "bigload: interrupted; what is finished is in '.made.partial', and this goes on from there: "
        "bigload quantize model made --device cpu"
    ]


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--help"], ""), (["plan", "--help"], "1"), (["show", "model"], "1"), (["plan", "model"], "")],
)
def test_a_pipe_that_is_closed_ends_it_without_a_word(place, arguments, unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "bigload", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered, "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writes)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["show", "model"]], ids=" ".join)
def test_output_that_cannot_be_written_is_one_line(place, arguments):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bigload", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_was_not_foreseen_is_one_line_too_and_a_traceback_on_request(place, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a bug\nin two lines")

    monkeypatch.setattr("bigload.loading.execute", fail)
    capsys.readouterr()
    assert main(["load", "model", "--device-map", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "KeyError" in said
    monkeypatch.setenv("BIGLOAD_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["load", "model", "--device-map", "cpu"])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_memory_that_is_not_there_is_one_line_with_what_takes_less(place, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("bigload.loading.execute", fail)
    capsys.readouterr()
    assert main(["load", "model", "--device-map", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "--max-memory" in said
    assert said.count("\n") == 1


def test_output_in_ascii_has_question_marks_for_other_letters(place, monkeypatch):
    """As in the C locale: a shortened name of a block has an ellipsis, and a generated text may have any letter."""
    written = io.BytesIO()
    monkeypatch.setenv("COLUMNS", "40")
    with monkeypatch.context() as patch:
        stream = io.TextIOWrapper(written, encoding="ascii")
        patch.setattr(sys, "stdout", stream)
        assert main(["plan", "model", "--quant", "nf4", "--max-memory", "0=1GiB"]) == 0
        assert stream.errors == "strict"
    assert b"mode?ens" in written.getvalue()


def test_a_full_disk_is_told_without_its_number(place, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bigload.checkpoint.describe.open_checkpoint", full)
    assert main(["show", "model"]) == 1
    assert capsys.readouterr().err == "bigload: No space left on device\n"
