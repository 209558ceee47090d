"""The library's messages in the words of the command line, and what they tell to do works there."""

import re

import pytest
import torch
from models import llama
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, MixtralConfig, PreTrainedTokenizerFast

from bigload.cli import main
from bigload.cli.messages import for_the_shell


def said(arguments, capsys):
    """Run what must fail, and return its message."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def test_paths_are_as_they_were_typed():
    shown = {"/home/me/models": "models", "/home/me/models/deep": "../x/deep", "/c/snapshots/ab": "org/name"}
    text = "'/home/me/models/a.bin', '/home/me/models/deep/b', '/home/me/models2', '/c/snapshots/ab/config.json'"
    expected = "'models/a.bin', '../x/deep/b', '/home/me/models2', 'org/name/config.json'"
    assert for_the_shell(text, shown) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: name an offload_folder too", "x: pass --offload-folder too"),
        ("would help: an offload_folder, or", "would help: --offload-folder, or"),
        ("max_memory: 'x' is not a device", "--max-memory: 'x' is not a device"),
        (
            "max_memory holds '3Gb'; expected bytes as an int, or a string such as '10GiB'",
            "'3Gb' is not a size; write bytes",
        ),
        ("device_map['a.b']: no", "--device-map, 'a.b': no"),
        ("pass overwrite=True (--overwrite) to replace it", "pass --overwrite to replace it"),
        ("two\nlines", "two lines"),
        ("add them to skip_modules", "add them to --skip-modules"),
        ("a folder /tmp/my_skip_modules", "a folder /tmp/my_skip_modules"),
    ],
)
def test_arguments_of_python_are_options(text, expected):
    made = for_the_shell(text, {})
    assert made.startswith(expected)
    assert "argument in Python" not in made


@pytest.mark.parametrize(
    "text", ["pass key_mapping={...}", "list it in quantizable=(...)", "call model.offload.remove()"]
)
def test_what_the_shell_has_no_option_for_is_said_to_be_of_python(text):
    assert "it is an argument in Python" in for_the_shell(text, {})


WORDS = {
    "quantise": (["quantise", "model", "made"], "quantize"),
    "--qant": (["load", "model", "--qant", "nf4"], "--quant"),
    "nf4dq": (["load", "model", "--quant", "nf4dq"], "nf4-dq"),
    "INT8": (["load", "model", "--quant", "INT8"], "int8"),
    "sequental": (["load", "model", "--device-map", "sequental"], "sequential"),
    "4bit": (["load", "model", "--quant", "4bit"], "nf4"),
    "int4": (["load", "model", "--quant", "int4"], "nf4"),
    "8-bit": (["load", "model", "--quant", "8-bit"], "int8"),
    "bf16": (["load", "model", "--quant", "bf16"], "none"),
    "-q": (["load", "model", "-q", "nf4"], "--quant"),
    "cpu=8Gb": (["load", "model", "--max-memory", "cpu=8Gb"], "8GiB"),
    "cpu=8": (["load", "model", "--max-memory", "cpu=8"], "8GiB"),
    "4": (["load", "model", "--reserve", "4"], "4GiB"),
    "1.5": (["load", "model", "--reserve", "1.5"], "1.5GiB"),
    "cpu=8.5": (["load", "model", "--max-memory", "cpu=8.5"], "8.5GiB"),
    "2": (["load", "model", "--expert-cache", "2"], "2GiB"),
    "512.": (["load", "model", "--expert-cache", "512."], "512.MiB"),
    "5g": (["quantize", "model", "made", "--max-shard-size", "5g"], "5GiB"),
}


@pytest.mark.parametrize("word", WORDS)
def test_what_was_meant_is_said_and_works(place, capsys, word):
    arguments, meant = WORDS[word]
    text = said(arguments, capsys)
    (found,) = re.findall(r"did you mean '([^']*)'", text)
    assert found == meant
    device, equals, _ = word.rpartition("=")
    assert main([device + equals + meant if argument == word else argument for argument in arguments]) == 0


@pytest.mark.parametrize(("word", "meant"), [("help", "--help"), ("version", "--version"), ("--verison", "--version")])
def test_help_and_version_that_were_meant_are_said_and_work(capsys, word, meant):
    assert f"did you mean '{meant}'?" in said([word], capsys)
    with pytest.raises(SystemExit) as ended:
        main([meant])
    assert ended.value.code == 0


def test_an_option_that_was_misspelt_is_named_before_what_is_missing(place, capsys):
    assert "no option --qant (did you mean '--quant'?)" in said(["load", "--qant", "nf4"], capsys)
    assert "required: path" in said(["load", "--qua", "nf4"], capsys)  # the beginning of an option is that option


def test_without_anything_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "bigload plan org/name" in capsys.readouterr().out


def test_a_file_in_a_models_folder_leads_to_the_folder(place, capsys):
    (folder,) = re.findall(r"the folder that it is in, '(.*)'", said(["load", "model/model.safetensors"], capsys))
    assert main(["load", folder]) == 0


def test_tokens_are_generated_with_a_prompt_only(place, capsys):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="b").save_pretrained("model")
    assert "pass both, or neither" in said(["load", "model", "--max-new-tokens", "2"], capsys)
    assert main(["load", "model", "--max-new-tokens", "2", "--prompt", "a"]) == 0
    assert main(["load", "model"]) == 0


def test_one_budget_is_set_for_each_device(place, capsys):
    text = said(["load", "model", "--max-memory", "cpu=1MiB", "cpu=1GiB"], capsys)
    assert "names cpu twice; set one budget for each device" in text
    assert main(["load", "model", "--max-memory", "cpu=1GiB"]) == 0


@pytest.mark.parametrize("device", ["disk", "auto", "balanced"])
def test_one_device_quantizes(place, capsys, device):
    assert "expected the one that quantizes: 'cpu'" in said(["quantize", "model", "q", "--device", device], capsys)
    assert main(["quantize", "model", "q", "--device", "cpu"]) == 0


@pytest.fixture
def streamed(place):
    """A model whose blocks are large enough to be offloaded."""
    llama(False, hidden_size=256, intermediate_size=8192, num_hidden_layers=3).save_pretrained("streamed")


@pytest.mark.usefixtures("streamed")
def test_a_folder_that_cannot_be_written_is_named_as_it_was_typed(place, capsys):
    (place / "file").write_text("")
    for arguments in (
        ["quantize", "model", "file/made"],
        ["load", "streamed", "--device-map", "disk", "--offload-folder", "file/made"],
    ):
        main(arguments)
        (text,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
        assert re.search("'file/made' cannot be written: (Not a directory|File exists)", text)
        assert not re.search(r"Errno|\.lock|\.writing", text)


@pytest.mark.usefixtures("streamed")
def test_a_load_says_what_it_streams(capsys):
    assert main(["load", "streamed", "--max-memory", "cpu=9MiB", "--offload-folder", "off", "--quant", "nf4"]) == 0
    assert re.search(r"streamed for each forward: [\d.]+ MiB", capsys.readouterr().out)
    assert main(["load", "model"]) == 0
    assert "streamed" not in capsys.readouterr().out


def test_a_key_of_a_map_that_was_meant_is_said_and_works(place, capsys):
    assert main(["load", "model", "--device-map", '{"modell": "cpu", "lm_head": "cpu"}']) == 1
    text = capsys.readouterr().err
    assert text.startswith("bigload: warning: ")
    assert re.findall(r"did you mean '([^']*)'", text) == ["model"]
    assert main(["load", "model", "--device-map", '{"model": "cpu", "lm_head": "cpu"}']) == 0


def test_without_a_tokenizer_a_model_is_loaded_without_a_prompt(place, capsys):
    assert "leave --prompt out" in said(["load", "model", "--prompt", "hello"], capsys)
    assert main(["load", "model"]) == 0


def test_what_keeps_no_cache_is_planned_without_one(place, capsys):
    BertModel(BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)).save_pretrained(
        "b"
    )
    arguments = ["plan", "b", "--quant", "nf4", "--max-memory", "0=1GiB"]
    assert "leave --context out" in said([*arguments, "--context", "8"], capsys)
    assert main(arguments) == 0
    assert "KV cache" not in capsys.readouterr().out


def test_a_picture_is_drawn_where_it_can_be(place, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr("bigload.cli.arguments.import_optional", lambda *args: None)
    monkeypatch.setattr("bigload.cli.pictures.draw_plan", lambda plan, path, title, dark: drawn.append(path))
    arguments = ["plan", "model", "--quant", "nf4", "--max-memory", "cpu=1GiB", "--plot"]
    assert "name a file in a folder that exists" in said([*arguments, "none/plan.png"], capsys)
    assert "expected a file whose name ends with" in said([*arguments, "plan.exe"], capsys)
    assert drawn == []
    assert main([*arguments, "plan.png"]) == 0
    assert [str(path) for path in drawn] == ["plan.png"]


def test_a_picture_that_cannot_be_written_is_one_line(place, capsys):
    (place / "plan.png").mkdir()
    arguments = ["plan", "model", "--quant", "nf4", "--max-memory", "cpu=1GiB", "--plot", "plan.png"]
    assert "cannot be written" in said(arguments, capsys)


def test_room_for_the_cache_is_kept_by_a_load_with_the_reserve_that_is_named(place, capsys, monkeypatch):
    assert main(["plan", "model", "--quant", "nf4", "--max-memory", "0=1GiB", "--context", "100000"]) == 0
    (reserve,) = re.findall(r"--reserve (\w+)", capsys.readouterr().out)
    asked = []

    def load(*args, offload, **options):
        asked.append(offload.reserve)
        raise KeyboardInterrupt

    monkeypatch.setattr("bigload.loading.load_and_quantize_model", load)
    assert main(["load", "model", "--reserve", reserve]) == 130
    assert asked == [reserve]


def test_cache_that_does_not_fit_is_refused_with_what_is_lacking(place, capsys):
    arguments = ["plan", "model", "--quant", "nf4", "--max-memory"]
    text = said([*arguments, "cpu=10MiB", "--context", "100000"], capsys)
    assert "with the KV cache" in text
    assert "too little on cpu" in text
    text = said([*arguments, "0=150MiB", "cpu=1GiB", "--context", "100000"], capsys)
    assert "the KV cache" in text
    assert main([*arguments, "0=150MiB", "cpu=1GiB", "--context", "1000"]) == 0


def test_cache_that_does_not_fit_onto_several_gpus_is_refused(place, capsys):
    arguments = ["plan", "model", "--quant", "nf4", "--context", "1000000", "--max-memory", "cpu=1GiB"]
    assert "the KV cache" in said([*arguments, "0=150MiB", "1=150MiB"], capsys)


def test_damaged_weights_of_a_folder_are_named(place, capsys):
    weights = place / "model/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    arguments = ["plan", "model", "--quant", "nf4", "--max-memory", "cpu=1GiB"]
    assert "model/model.safetensors" in said(arguments, capsys)
    weights.write_bytes(whole)
    assert main(arguments) == 0


IN_A_TERMINAL = """
import fcntl, os, pty, struct, sys, termios
from bigload.cli import main

for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
pid, terminal = pty.fork()
if pid == 0:
    fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 60, 0, 0))
    status = main(["plan", "model", "--max-memory", "0=1GiB", "cpu=1GiB"])
    sys.stdout.flush()
    os._exit(status)
shown = b""
while True:
    try:
        read = os.read(terminal, 4096)
    except OSError:  # Linux says so when the other side has ended
        break
    if not read:
        break
    shown += read
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
print(shown.decode().replace("\\r", ""))
"""


def test_a_plan_fits_a_terminal_of_60_columns(place, programs):
    """In a terminal of its own, whose width is asked for."""
    lines = programs.run(IN_A_TERMINAL, place).splitlines()
    assert any("fits" in line for line in lines)
    assert max(map(len, lines)) <= 60


@pytest.fixture
def large(place):
    """A config whose blocks are large enough to be streamed."""
    llama(False, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4).config.save_pretrained("large")
    return ["plan", "large", "--quant", "nf4", "--device-map", '{"": 0, "layers.1": "cpu"}']


def test_speed_of_the_link_is_measured_told_or_assumed(large, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(large) == 0
    assert "the link at 25 GB/s, assumed: --link-gbps" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("bigload.hardware.bandwidth.link_gb_per_s", lambda device: 12.5)
    assert main(large) == 0
    assert "the link at 12.5 GB/s, measured" in capsys.readouterr().out
    assert main([*large, "--link-gbps", "50"]) == 0
    assert "the link at 50 GB/s)" in capsys.readouterr().out


@pytest.mark.cuda
def test_speed_of_the_link_is_measured_on_a_gpu(large, capsys):
    assert main(large) == 0
    (speed,) = re.findall(r"the link at ([\d.]+) GB/s, measured", capsys.readouterr().out)
    assert float(speed) > 0.5


@pytest.mark.cuda
def test_a_load_keeps_the_room_that_the_plan_names(place, capsys):
    assert main(["plan", "model", "--quant", "nf4", "--max-memory", "0=1GiB", "cpu=4GiB", "--context", "100000"]) == 0
    (reserve,) = re.findall(r"--reserve (\w+)", capsys.readouterr().out)
    assert main(["load", "model", "--max-memory", "0=1GiB", "cpu=4GiB", "--reserve", reserve]) == 0
    assert "on cuda:0 as nf4" in capsys.readouterr().out


def test_only_the_mode_that_was_meant_warns(place, capsys):
    """int8 has no kernel for fused experts, which is worth a word only to who asks for it."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2).save_pretrained("experts")
    arguments = ["plan", "experts", "--max-memory", "0=1GiB"]
    assert main(arguments) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*arguments, "--quant", "int8"]) == 0
    assert "bigload: warning: int8 was asked for" in capsys.readouterr().err


def test_captured_decode_steps_are_counted_where_one_gpu_has_room_for_them(place, capsys):
    arguments = ["plan", "model", "--quant", "nf4", "--context", "1000", "--batch", "2", "--max-memory"]
    assert main([*arguments, "0=1GiB", "cpu=1GiB"]) == 0
    with_room = capsys.readouterr().out
    assert "in the reserve for captured decode steps" in with_room
    assert main([*arguments, "0=170MiB", "cpu=1GiB"]) == 0
    without = capsys.readouterr().out
    assert "Captured decode steps, which need " in without
    assert "in the reserve for captured" not in without
    assert main([*arguments, "0=1GiB", "1=1GiB", "cpu=1GiB"]) == 0
    assert "aptured decode steps" not in capsys.readouterr().out
