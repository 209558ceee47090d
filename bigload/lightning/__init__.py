"""`from bigload.lightning import BitsandbytesPrecision`: imports Lightning, which bigload alone does not."""

from .plugin import BitsandbytesPrecision

__all__ = ["BitsandbytesPrecision"]
