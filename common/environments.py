"""Environments by name: what installed packages offer in the entry-point group `chord_rl.environments`."""

from importlib.metadata import EntryPoint, entry_points

from common.errors import ConfigError


def find_environment(name: str) -> EntryPoint:
    """The offer of that name; nothing is imported. Raises ConfigError where there is none."""
    offered = {entry.name: entry for entry in entry_points(group="chord_rl.environments")}
    if name not in offered:
        raise ConfigError([f"environment.name: got {name!r}, expected one of {', '.join(sorted(offered))}"])
    return offered[name]
