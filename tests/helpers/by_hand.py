"""What the commands have in common that go on with tests by hand: `python tests/differential`, `fuzzing`, `faults`."""

import logging
import os
import warnings


def be_quiet():
    """Reach no hub, and print nothing but what the command prints; before anything else is imported."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
