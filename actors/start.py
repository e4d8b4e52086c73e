"""What actor and evaluator do alike to come up (engine, environment, link) and to leave."""

import asyncio
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry

from actors.engine import Engine
from actors.engines.choose import make_engine
from actors.environment import Environment, make_environment
from actors.guard import EngineGuard, describe
from actors.link import LearnerLink
from actors.rollout import Rollout
from common.chat import Chat
from common.command import run_command
from common.config.schema import Config, EngineKind
from common.errors import ComponentFailure, OperatorError
from common.keys.folder import only_peer_name, peer_keys
from common.wire.messages import Goodbye, Hello, Receipt, Role

log = logging.getLogger(__name__)

GOODBYE_S = 2.0


@dataclass(frozen=True)
class Parts:
    """What a peer works with."""

    engine: Engine
    guard: EngineGuard
    environment: Environment
    rollout: Rollout
    chat: Chat


def make_parts(
    config: Config, kind: EngineKind, registry: CollectorRegistry, environment: Environment | None = None
) -> Parts:
    """Everything but the network; the engine is not started yet. Raises ConfigError on a wrong environment.

    The environment is the configured one where none is given.
    """
    environment = environment or make_environment(
        config.environment.name, seed=config.run.seed, options=config.environment.options
    )
    model_path = Path(config.model.path)
    chat = Chat(model_path)
    engine = make_engine(
        kind, model_path=model_path, actor=config.actor, vocab_size=chat.vocab_size, end_tokens=chat.end_tokens
    )
    guard = EngineGuard(engine, config.actor, registry)
    return Parts(engine, guard, environment, Rollout(guard, environment, chat, config.actor), chat)


def make_hello(config: Config, *, name: str, role: Role, engine: Engine) -> Hello:
    """Raises OperatorError where the name will not do."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise OperatorError(f"--name: got {name!r}, expected 1 to 64 letters, digits, '_', '.' or '-'")
    return Hello(
        peer_id=name, session=secrets.token_hex(8), role=role, engine=engine.name, config_hash=config.agreement_hash
    )


def default_name(role: Role, keys: str) -> str:
    """Differs between processes even where hosts and process numbers are alike, as in containers.

    With a folder of `keys` it is a name that the one key there speaks for. Raises OperatorError where there are more.
    """
    host = re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname())[-14:]
    return f"{only_peer_name(keys) + '.' if keys else ''}{role}-{host}-{secrets.token_hex(3)}"[:64]


def check_address(config: Config, name: str) -> None:
    """Raises OperatorError where the configuration does not say where the learner is, or `name` has no key."""
    peer_keys(config.network.keys, name)
    if config.network.port == 0:
        raise OperatorError("network.port: got 0, expected the port that the learner listens on")


def on_stop(action: Callable[[], None]) -> None:
    """Call `action` on SIGTERM and Ctrl-C."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, action)


async def say_goodbye(link: LearnerLink, reason: str) -> None:
    """Best effort: a learner that has gone needs no goodbye."""
    with suppress(TimeoutError, OperatorError, ComponentFailure):
        async with asyncio.timeout(GOODBYE_S):
            await link.ask(Goodbye(reason=reason[:500]), Receipt, phase="a goodbye")


async def cancel_all(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Returns when they have ended."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def raise_one_line(failure: BaseException) -> NoReturn:
    """End the peer; what is neither the operator's nor a peer's fault is its own, and a new start may help."""
    if isinstance(failure, OperatorError | ComponentFailure):
        raise failure
    raise ComponentFailure(f"{describe(failure)}: ending, so that a supervisor starts it again") from failure


def run_peer(name: str, command: Callable[[], object]) -> NoReturn:
    """As run_command; but all that needs an end has had it, so the process leaves without taking the interpreter down.

    That takes seconds with these libraries, and trips over an engine whose start, in a thread, cannot be cancelled.
    """
    try:
        run_command(name, command)
    except SystemExit as end:
        if threading.active_count() == 1:  # --help, --check, or a mistake that was told before anything began
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
