"""The threads of feed.c, under the compiler's sanitizers and on devices that work late."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "native"
# Of the checkout: what is installed has the library, but not what it was built from.
SOURCE = Path(__file__).parent.parent.parent / "bigload" / "io"
SANITIZERS = {
    "plain": [],
    "threads": ["-fsanitize=thread"],
    "addresses": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_bytes_arrive_where_and_when_they_may(sanitizer, tmp_path):
    """Also where the caller gives up, a copy fails, or a file ends too early."""
    program = tmp_path / "test"
    command = ["gcc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", *SANITIZERS[sanitizer]]
    subprocess.run([*command, f"-I{SOURCE}", HERE / "test_feed.c", "-o", program, "-lpthread"], check=True)
    done = subprocess.run([program, tmp_path / "data"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
