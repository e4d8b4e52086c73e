"""Errors that end a component with one line instead of a traceback, and the exit code that goes with each kind."""

OPERATOR_ERROR = 2
COMPONENT_FAILURE = 1


class OperatorError(Exception):
    """Something outside the program must be mended; the message says what, where, got and expected. Exit code 2."""


class ConfigError(OperatorError):
    """One or more configuration values are wrong; `lines` holds one line for each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class ComponentFailure(Exception):
    """A component or its peer has failed; starting it again may help. Exit code 1."""


class WaitTimeout(ComponentFailure):
    """A wait reached its limit; the message names the peer and the phase that was waited for."""
