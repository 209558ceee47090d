"""What is printed, without what differs from run to run."""

import re

# Seconds, rates and peaks of memory: of a load, and of the demo's table.
VARYING = (
    (r"in \d+\.\d+ s at \d+\.\d+ GB/s", "in # s at # GB/s"),
    (r", peak [\d.]+ \w+ on cpu", ""),
    (r"^(\S+ +[\d.]+ MiB) +[\d.]+ +[\d.]+ +[\d.]+(?=   )", r"\1 # # #"),
)


def without_figures(text, *others):
    """Replace what differs from run to run, and what other patterns find; each comes with what takes its place."""
    for pattern, said in (*VARYING, *others):
        text = re.sub(pattern, said, text, flags=re.MULTILINE)
    return text
