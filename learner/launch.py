"""Starts this machine's ranks of the learner through torchrun, one process each, and ends as they ended."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from common.config.schema import Learner
from common.errors import COMPONENT_FAILURE, OPERATOR_ERROR, ComponentFailure, OperatorError

SHUTDOWN_S = 600
"""Longest time from SIGTERM to SIGKILL: the ranks first end their step and write a checkpoint."""


def placement(learner: Learner, node: int) -> list[str]:
    """torchrun's arguments for the ranks of machine `node`. Raises OperatorError where there is no such machine.

    Ranks are numbered machine by machine, so that rank 0, which actors know, is always on the same one.
    """
    if not 0 <= node < learner.num_nodes:
        raise OperatorError(f"--node-index: got {node}, expected 0 to {learner.num_nodes - 1}, below learner.num_nodes")
    here = ["--nproc-per-node", str(learner.num_ranks // learner.num_nodes)]
    if learner.num_nodes == 1:
        return ["--standalone", *here]
    host, _, port = learner.rendezvous.rpartition(":")
    nodes = ["--nnodes", str(learner.num_nodes), "--node-rank", str(node)]
    return [*nodes, "--master-addr", host, "--master-port", port, *here]


def start_ranks(learner: Learner, node: int, arguments: Sequence[str]) -> NoReturn:
    """Run `chord-learner ARGUMENTS` on every rank of machine `node`; the exit code is 2 where a rank met an operator's
    error."""
    where = placement(learner, node)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the rank's own line is the last one
    try:
        run(parse_args([*where, "-m", "learner", *arguments]))
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        sys.exit(OPERATOR_ERROR if OPERATOR_ERROR in codes else COMPONENT_FAILURE)
    except DistError as error:
        raise ComponentFailure(
            f"learner.rendezvous: {learner.num_nodes} machines did not meet at {learner.rendezvous}, or one has left "
            f"({str(error).splitlines()[0]})"
        ) from error
    except SignalException:
        pass
    sys.exit(0)
