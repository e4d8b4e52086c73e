"""The rows of a step, from its committed composition: groups of the ledger and rows of the expert store."""

from dataclasses import dataclass
from pathlib import Path

from common.chat import Chat
from common.config.schema import Config
from common.errors import OperatorError
from common.trajectory import TrajectoryGroup
from common.wire.groups import from_blob
from learner.context import Context
from learner.expert.store import ExpertStore, store_path
from learner.ledger.history import Composition, History
from learner.rows import Row, expert_row, policy_row
from learner.schedule import mu_of
from learner.shaping import Shaping


@dataclass(frozen=True, eq=False)
class StepRows:
    """Everything that one optimizer step trains on."""

    composition: Composition
    groups: tuple[TrajectoryGroup, ...]
    rows: list[Row]
    mu: float
    num_groups_with_signal: int
    """Groups with an advantage other than 0."""


def open_experts(config: Config, chat: Chat) -> ExpertStore | None:
    """The store, every row of it seen to fit the model and its chat template; None where no step has μ > 0.

    Raises OperatorError where it is empty or a row does not fit, so that no step fails on one.
    """
    if not config.algorithm.trains_on_experts:
        return None
    path = store_path(config)
    store = ExpertStore(path)
    store.check()
    if not store.row_ids():
        raise OperatorError(f"expert.path: {path} holds no rows, expected at least one (see chord-expert import)")
    limit = Context.of(Path(config.model.path)).limit
    for row in store.rows():
        try:
            num_tokens = len(chat.demonstration(row.messages).tokens)
        except Exception as error:  # a template says no in whatever way it likes
            raise OperatorError(
                f"expert.path: {path}: row {row.row_id}: the chat template refuses it ({error})"
            ) from error
        if limit and num_tokens > limit[0]:
            raise OperatorError(
                f"expert.path: {path}: row {row.row_id}: got {num_tokens} tokens, expected at most {limit[0]} "
                f"({limit[1]} of {config.model.path})"
            )
    return store


class StepReader:
    """Reads the same rows for the same composition, whenever it is asked."""

    def __init__(self, config: Config, history: History, experts: ExpertStore | None, chat: Chat) -> None:
        """`experts` is None where no step has μ > 0."""
        self._config = config
        self._history = history
        self._experts = experts
        self._chat = chat
        self._shaping = Shaping.of(config)

    def read(self, composition: Composition) -> StepRows:
        """Raises OperatorError where a group is not what was written, or where a half of the loss that has weight has
        nothing to learn from: such a step would silently be another method's."""
        groups = tuple(from_blob(body) for body in self._history.bodies(composition.group_ids))
        advantages = [self._shaping.advantages(group).tolist() for group in groups]
        aggregation = self._config.algorithm.aggregation
        rows = [
            policy_row(group, ours, temperature=self._config.sampling.temperature, aggregation=aggregation)
            for group, ours in zip(groups, advantages, strict=True)
        ]
        if self._experts and composition.expert_row_ids:
            demonstrations = self._experts.read(composition.expert_row_ids)
            rows += [
                expert_row(self._chat.demonstration(row.messages), aggregation=aggregation) for row in demonstrations
            ]
        mu = mu_of(self._config, composition.step, mean_reward=self._history.mean_reward(composition.group_ids))
        for half, weight, count in (("policy", 1 - mu, len(groups)), ("expert", mu, len(composition.expert_row_ids))):
            if weight > 0 and not count:
                raise OperatorError(
                    f"step {composition.step}: got μ {mu:g} and nothing for the {half} half, expected rows"
                )
        return StepRows(composition, groups, rows, mu, sum(any(ours) for ours in advantages))
