"""The courier's process, started by the learner: `python -m learner.courier`, told what to do on its standard input."""

import signal
import sys

from common.command import run_command, start_logging


def courier() -> None:
    start_logging("courier")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its input, after the learner
    import torch

    from learner.courier.service import Service
    from learner.courier.settings import CourierSettings

    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as orders:  # what comes later is the service's
        settings = CourierSettings.model_validate_json(orders.readline())
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    service = Service(settings, sys.stdin.fileno())
    try:
        service.run()
    finally:
        service.close()


def main() -> None:
    run_command("courier", courier)


if __name__ == "__main__":
    main()
