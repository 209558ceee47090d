"""The examples in the docstrings of the public names run, and give what they say."""

import doctest

import pytest
import torch

import bigload

EXAMPLES = [name for name in bigload.__all__ if ">>>" in (getattr(bigload, name).__doc__ or "")]


def test_functions_on_quantized_models_and_both_configs_have_examples():
    assert {
        "save_quantized_model",
        "quantize_checkpoint",
        "dequantize_model",
        "BnbQuantizationConfig",
        "OffloadConfig",
    } <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_as_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(bigload, name), name, globs={})
    output = []
    assert doctest.DocTestRunner(verbose=False).run(test, out=output.append).failed == 0, "".join(output)
    assert test.examples
