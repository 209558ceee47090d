"""`from bigload.lightning import BitsandbytesPrecision`: imports Lightning, which bigload alone does not."""

from .integrations.lightning import BitsandbytesPrecision

__all__ = ["BitsandbytesPrecision"]
