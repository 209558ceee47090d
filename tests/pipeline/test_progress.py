"""When the progress bar is shown, and that it is the one of notebooks there."""

import subprocess
import sys
import types

import pytest

from bigload.pipeline.progress import progress_bar


@pytest.fixture
def ipython(monkeypatch):
    """Return a function that pretends to run in IPython, with a kernel or in a terminal."""

    def pretend(shell):
        module = types.ModuleType("IPython")
        module.get_ipython = lambda: shell
        monkeypatch.setitem(sys.modules, "IPython", module)

    return pretend


def is_shown(progress=None):
    with progress_bar(10, "loading", progress) as bar:
        return not bar.disable


def test_bar_is_shown_on_a_terminal_and_in_a_kernel(monkeypatch, ipython, capfd):
    assert not is_shown()
    assert is_shown(True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert is_shown()
    assert not is_shown(False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    ipython(types.SimpleNamespace(kernel=object()))
    assert is_shown()
    assert not is_shown(False)
    ipython(types.SimpleNamespace())  # IPython's own terminal, whose output goes elsewhere
    assert not is_shown()
    ipython(None)
    assert not is_shown()


def test_bar_in_a_process_without_a_terminal_says_nothing():
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "from bigload.pipeline.progress import progress_bar, tqdm\n"
        "import tqdm.auto\n"
        "assert tqdm.auto.tqdm is not None\n"
        "with progress_bar(10, 'loading', None) as bar:\n    bar.update(10)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bar_is_the_one_that_tqdm_chooses():
    from tqdm.auto import tqdm

    with progress_bar(10, "loading", False) as bar:
        assert isinstance(bar, tqdm)
