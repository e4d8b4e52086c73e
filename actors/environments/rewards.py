"""Rewards of an answer that is right or wrong: 1 or 0, or CHORD's four levels."""

from enum import StrEnum

from common.errors import ConfigError

BADLY_FORMED = -0.1
OVER_THE_LIMIT = -1.0


class Reward(StrEnum):
    """Which levels there are."""

    BINARY = "binary"
    """1 for a right answer, else 0."""
    FOUR_LEVEL = "four_level"
    """1 right; 0 wrong but well formed; −0.1 wrong and badly formed; −1 cut off at the limit without an answer."""


def reward_named(name: str) -> Reward:
    """The reward of that name. Raises ConfigError where there is none."""
    if name not in list(Reward):
        expected = " or ".join(f'"{reward}"' for reward in Reward)
        raise ConfigError([f'environment.options.reward: got "{name}", expected {expected}'])
    return Reward(name)


def reward_of(reward: Reward, *, is_right: bool, is_well_formed: bool, has_answer: bool, is_truncated: bool) -> float:
    """`is_well_formed`: the answer stands in the form that was asked for; `has_answer`: in any that is looked for."""
    if is_right:
        return 1.0
    if reward is Reward.BINARY or (is_well_formed and has_answer):
        return 0.0
    return OVER_THE_LIMIT if is_truncated and not has_answer else BADLY_FORMED
