"""Sinks by name: whether what they need is installed."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution

from common.config.run import SinkName
from common.errors import OperatorError


def require_sinks(names: Iterable[SinkName]) -> None:
    """Nothing is imported. Raises OperatorError where a package is missing.

    Its metadata is what is looked for: a folder `wandb` beside the program, which W&B itself leaves behind, would pass
    for the package.
    """
    for name in names:
        try:
            distribution(name)
        except PackageNotFoundError:
            raise OperatorError(
                f'run.sinks: got "{name}", which is not installed, expected: pip install ".[{name}]" in the checkout'
            ) from None
