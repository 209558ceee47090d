"""Tables fit a width, and are safe as HTML."""

import pytest

from bigload import BnbQuantizationConfig, OffloadConfig
from bigload.notation import MODES, html_table, output_width, shortened, text_table, turned_to_fit, wrapped

ROWS = [("name", "first", "second"), ("a rather long name of a thing", "1", "22"), ("b", "333", "4")]


def test_first_column_is_at_the_left_and_the_others_at_the_right():
    assert text_table([("a", "b"), ("long", "10")]) == ["a      b", "long  10"]


@pytest.mark.parametrize("width", [26, 30, 40, None])
def test_only_the_first_column_is_shortened(width):
    lines = text_table(ROWS, width)
    assert max(map(len, lines)) <= (width or 100)
    assert [line.split()[-2:] for line in lines] == [["first", "second"], ["1", "22"], ["333", "4"]]


def test_what_is_too_long_loses_its_middle():
    assert shortened("model.layers.10", 15) == "model.layers.10"
    assert shortened("model.layers.10", 9) == "mode\u2026s.10"
    assert len(shortened("model.layers.10", 8)) == 8


def test_wide_tables_are_turned_and_divided():
    rows = [("place", *map(str, range(8))), *((f"gpu{n}", *["1000 GiB"] * 8) for n in range(5))]
    assert list(turned_to_fit(rows, None)) == [rows]
    made = list(turned_to_fit(rows, 50))
    assert len(made) > 1
    assert all(len(line) <= 50 for table in made for line in text_table(table))
    assert [cell for table in made for cell in table[0][1:]] == [f"gpu{n}" for n in range(5)]
    assert all([row[0] for row in table] == list(rows[0]) for table in made)


def test_text_is_wrapped_at_words_only():
    assert wrapped("a b c", None) == ["a b c"]
    assert wrapped("one two three", 8) == ["one two", "  three"]
    assert wrapped("https://a-very-long-word", 8) == ["https://a-very-long-word"]


def test_html_says_what_is_written():
    made = html_table([("a <b>", "c&d"), ("1", "2")])
    assert "a &lt;b&gt;" in made
    assert "c&amp;d" in made
    assert made.count("<th") == 2


def test_width_is_that_of_the_terminal_or_of_columns(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output_width() is None
    for text, width in (("61", 61), ("0", None), ("wide", None)):
        monkeypatch.setenv("COLUMNS", text)
        assert output_width() == width


@pytest.mark.parametrize("mode", MODES)
def test_config_shows_its_mode_and_what_differs(mode):
    config = BnbQuantizationConfig.from_mode(mode)
    assert repr(config) == f"BnbQuantizationConfig.from_mode({mode!r})"
    made = BnbQuantizationConfig.from_mode(mode, torch_dtype="bf16", keep_in_fp32_modules=["wo"])
    assert "torch.bfloat16" in repr(made)
    assert eval(repr(made), {"BnbQuantizationConfig": BnbQuantizationConfig, "torch": __import__("torch")}) == made
    assert "bfloat16</td>" in made._repr_html_()


def test_offload_config_shows_itself():
    assert repr(OffloadConfig()) == "OffloadConfig(execute='gpu', slots=2, pin=True, reserve=None, expert_cache=None)"
    assert "slots" in OffloadConfig()._repr_html_()
