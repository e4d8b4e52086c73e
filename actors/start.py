"""What actor and evaluator do alike to come up: engine, environment, link."""

import asyncio
import logging
import re
import secrets
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from actors.engine import Engine
from actors.engines.choose import make_engine
from actors.environment import Environment, make_environment
from actors.rollout import Rollout
from common.chat import Chat
from common.config.schema import Config, EngineKind
from common.errors import OperatorError
from common.keys.folder import only_peer_name, peer_keys
from common.metrics import serve_metrics
from common.wire.messages import Hello, Role

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a peer works with."""

    engine: Engine
    environment: Environment
    rollout: Rollout
    chat: Chat


def make_parts(config: Config, kind: EngineKind) -> Parts:
    """Everything but the network; the engine is not started yet."""
    model_path = Path(config.model.path)
    chat = Chat(model_path)
    environment = make_environment(config.environment.name, seed=config.run.seed, options=config.environment.options)
    engine = make_engine(
        kind, model_path=model_path, actor=config.actor, vocab_size=chat.vocab_size, end_tokens=chat.end_tokens
    )
    rollout = Rollout(engine, environment, chat, max_model_tokens=config.actor.max_model_tokens)
    return Parts(engine, environment, rollout, chat)


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


def serve_peer_metrics(registry: CollectorRegistry, *, host: str, port: int, key: str) -> None:
    found = serve_metrics(registry, host=host, port=port, key=key)
    log.info("metrics: http://%s:%d/metrics", host, found)


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
