"""What is logged while a test runs.

pytest's own plugin hands six handlers to each of some hundred loggers, for each test, whether it asks or not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class Logged(logging.Handler):
    """Keeps records, from when it is entered.

    Attributes:
        records: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._levels = ExitStack()

    def __enter__(self) -> Logged:
        # torch's are left out: as soon as one has a handler, torch.compile writes down all that it does.
        loggers = (each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger))
        own = [each for each in loggers if not each.propagate and each.name.partition(".")[0] != "torch"]
        for logger in (logging.root, *own):
            logger.addHandler(self)
            self._levels.callback(logger.removeHandler, self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._levels.close()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        """The messages, a line each."""
        return "\n".join(record.getMessage() for record in self.records)

    def clear(self) -> None:
        """Forget what was logged so far."""
        self.records.clear()

    @contextmanager
    def at_level(self, level: int | str, logger: str | None = None) -> Iterator[None]:
        """Have a logger, the root by default, log from a level on."""
        found = logging.getLogger(logger)
        before = found.level
        found.setLevel(level)
        try:
            yield
        finally:
            found.setLevel(before)

    def set_level(self, level: int | str, logger: str | None = None) -> None:
        """Do so until the test ends."""
        self._levels.enter_context(self.at_level(level, logger))
