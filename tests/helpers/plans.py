"""Plans of empty models."""

from checkpoints import empty

from bigload import plan_device_map


def planned(build, device_map="auto", mode="nf4", **options):
    return plan_device_map(empty(build), mode, device_map=device_map, **options)
