"""Everything stands in setup.cfg but the description, which is the README as it reads outside of the repository."""

import re
from pathlib import Path

from setuptools import setup

readme = Path(__file__).with_name("README.md").read_text()
readme = re.sub(r"<picture>.*?</picture>\n\n", "", readme, flags=re.DOTALL)
readme = re.sub(r"\[([^]]+)\]\((?!http)[^)]*\)", r"\1", readme)  # links into the repository

setup(long_description=readme)
