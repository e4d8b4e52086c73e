"""Starts the ranks of the learner through torchrun, one process each, and ends as they ended."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from common.errors import COMPONENT_FAILURE, OPERATOR_ERROR

SHUTDOWN_S = 600
"""Longest time from SIGTERM to SIGKILL: the ranks first end their step and write a checkpoint."""


def start_ranks(count: int, arguments: Sequence[str]) -> NoReturn:
    """Run `chord-learner ARGUMENTS` on `count` ranks; the exit code is 2 where a rank met an operator's error."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the rank's own line is the last one
    try:
        run(parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "learner", *arguments]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        sys.exit(OPERATOR_ERROR if OPERATOR_ERROR in codes else COMPONENT_FAILURE)
    except SignalException:
        pass
    sys.exit(0)
