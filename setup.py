"""Everything stands in setup.cfg but the description, which is the README as it reads outside of the repository."""

import re
from pathlib import Path

from setuptools import Extension, setup

readme = Path(__file__).with_name("README.md").read_text()
readme = re.sub(r"<picture>.*?</picture>\n\n", "", readme, flags=re.DOTALL)
readme = re.sub(r"\[([^]]+)\]\((?!http)[^)]*\)", r"\1", readme)  # links into the repository

# Without a compiler bigload reads by Python. It is no module of Python, but a library that ctypes loads: one for all
# versions.
feed = Extension(
    "bigload.io._feed",
    ["bigload/io/feed.c"],
    extra_compile_args=["-std=gnu11", "-O2"],
    py_limited_api=True,
    optional=True,
)

setup(
    long_description=readme,
    ext_modules=[feed],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
