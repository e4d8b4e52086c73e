"""The pitfalls of CHORD implementations, each as a change of a line or two of the learner or an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pitfall:
    """One mistake, and where it would be made."""

    name: str
    file: str
    right: str
    """Stands in the file exactly once."""
    wrong: str


STEP, CHORD, POLICY = "learner/train_engine.py", "learner/objective/chord.py", "learner/objective/policy.py"
IMPORTANCE, ADVANTAGES = "learner/objective/importance.py", "learner/objective/advantages.py"
MODEL, BATCH, ROWS, SOURCE = "learner/policy_model.py", "learner/batch.py", "learner/rows.py", "learner/source.py"
TRAINER, SCHEMA = "learner/trainer.py", "common/config/schema.py"

PITFALLS = (
    # Wrong denominators.
    Pitfall(
        "mean of micro-batch means, policy half", STEP,
        "correction=self._objective.correction, num_tokens=num_policy_tokens,",
        "correction=self._objective.correction, num_tokens=float(batch.policy_mask.sum()),",
    ),
    Pitfall(
        "mean of micro-batch means, expert half", STEP,
        "weighting=self._objective.expert_weighting, num_tokens=num_expert_tokens",
        "weighting=self._objective.expert_weighting, num_tokens=float(batch.expert_mask.sum())",
    ),
    Pitfall(
        "mean per rank: counts are not all-reduced", STEP,
        "num_policy_tokens, num_expert_tokens = self._ranks.add_up(counts)",
        "num_policy_tokens, num_expert_tokens = counts",
    ),
    Pitfall(
        "divided a second time by accumulation, both halves", STEP,
        "self._engine.backward(loss * self._ranks.count)",
        "self._engine.backward(loss * self._ranks.count / num_micro_batches)",
    ),
    Pitfall(
        "divided a second time by accumulation, policy half alone", STEP,
        "loss = chord_loss(policy, expert, mu=mu)",
        "loss = chord_loss(policy / (1 + (batch.policy_mask.sum() < num_policy_tokens)), expert, mu=mu)",
    ),
    Pitfall(
        "world-size factor missing", STEP,
        "self._engine.backward(loss * self._ranks.count)",
        "self._engine.backward(loss)",
    ),
    Pitfall(
        "a step for every micro-batch", STEP,
        "self._engine.set_gradient_accumulation_boundary(number == num_micro_batches)",
        "self._engine.set_gradient_accumulation_boundary(True)",
    ),
    Pitfall(
        "weights depend on packing: mean over rows of row means", POLICY,
        "loss = -(mask * w * surrogate).sum() / N",
        "loss = -(row_mean(w * surrogate, mask) * mask.sum() / max(len(mask), 1)).sum() / N",
    ),
    Pitfall(
        "packed positions go on counting over branches", BATCH,
        "positions[r, span] = np.arange(start, start + size)",
        "positions[r, span] = np.arange(end, end + size)",
    ),
    Pitfall(
        "a branch sees its neighbours in the packed row", BATCH,
        "is_seen = is_causal & ((asked == PROMPT) | (asked == asking))",
        "is_seen = is_causal & (asked != PADDING)",
    ),
    Pitfall(
        "a size typed by hand: the rank count", STEP,
        "self._engine.backward(loss * self._ranks.count)",
        "self._engine.backward(loss * 1)",
    ),
    Pitfall(
        "a size typed by hand: expert tokens", STEP,
        "weighting=self._objective.expert_weighting, num_tokens=num_expert_tokens",
        "weighting=self._objective.expert_weighting, num_tokens=32",
    ),
    # Masked and rejected tokens.
    Pitfall(
        "rejected tokens leave the denominator", POLICY,
        "loss = -(mask * w * surrogate).sum() / N",
        "loss = -(mask * w * surrogate).sum() / max(float((mask * (w > 0)).sum()), 1.0)",
    ),
    Pitfall(
        "clipped tokens leave the denominator", POLICY,
        "loss = -(mask * w * surrogate).sum() / N",
        "loss = -(mask * w * surrogate).sum() / max(N - float((mask * is_clipped).sum()), 1.0)",
    ),
    # Expert rows stay out.
    Pitfall(
        "expert rows among the policy rows", BATCH,
        "return self.mask * ~self.is_expert[:, None]",
        "return self.mask",
    ),
    Pitfall(
        "expert rows in the entropy", STEP,
        "entropy = (entropies * batch.policy_mask).sum()",
        "entropy = (entropies * batch.mask).sum()",
    ),
    Pitfall(
        "expert rows in the advantages of a group", "learner/step_rows.py",
        "            rows += [expert_row(self._chat.demonstration(row.messages)) for row in demonstrations]",
        "            experts = [expert_row(self._chat.demonstration(row.messages)) for row in demonstrations]\n"
        "            for group, row in zip(groups, list(rows), strict=True):\n"
        "                from dataclasses import replace\n"
        "                import torch\n"
        "                from learner.objective.advantages import group_advantages\n"
        "                rewards = torch.tensor([t.reward for t in group.trajectories] + [1.0])\n"
        "                found = group_advantages(rewards).tolist()\n"
        "                branches = [replace(b, advantage=a) for b, a in zip(row.branches, found)]\n"
        "                rows[rows.index(row)] = replace(row, branches=tuple(branches))\n"
        "            rows += experts",
    ),
    Pitfall(
        "expert rows in importance weights and effective sample size", ROWS,
        "nothing = np.full(len(mask), np.nan, dtype=np.float32)\n"
        '    branch = Branch(tokens[start:], mask, nothing, float("nan"), EXPERT_TEMPERATURE, is_expert=True)',
        "nothing = np.full(len(mask), -1.0, dtype=np.float32)\n"
        "    branch = Branch(tokens[start:], mask, nothing, 1.0, EXPERT_TEMPERATURE, is_expert=False)",
    ),
    # Neither half is ever missing.
    Pitfall(
        "a starved queue makes an SFT-only step", SOURCE,
        "                wait.check(",
        "                if wait.waited_s > 0.25:\n"
        "                    return []\n"
        "                wait.check(",
    ),
    Pitfall(
        "a starved queue makes a smaller step", SOURCE,
        "if len(ready) == wanted:",
        "if ready:",
    ),
    Pitfall(
        "an exhausted expert set makes an RL-only step", "learner/expert/sampler.py",
        "    while len(drawn) < count:",
        "    while len(drawn) < count and cursor + len(drawn) < num_rows:",
    ),
    # The schedule of μ.
    Pitfall(
        "μ counted from 1", "learner/schedule.py",
        "    return mu_at(\n        step,",
        "    return mu_at(\n        step + 1,",
    ),
    Pitfall(
        "μ starts anew after a resume", TRAINER,
        "mu=mu_of(self._config.algorithm, step), lr=lr)",
        "mu=mu_of(self._config.algorithm, self._engine._engine.global_steps % 3), lr=lr)",
    ),
    Pitfall(
        "a decay of 0 from peak to another valley is accepted by the schedule", CHORD,
        "if decay_steps == 0 and peak != valley:",
        "if False:",
    ),
    Pitfall(
        "a decay of 0 from peak to another valley is accepted by the configuration", SCHEMA,
        "if self.mu_decay_steps == 0 and self.mu_peak != self.mu_valley:",
        "if False:",
    ),
    Pitfall(
        "μ multiplies the wrong half", CHORD,
        "return (1 - mu) * policy + mu * expert",
        "return mu * policy + (1 - mu) * expert",
    ),
    # Temperature.
    Pitfall(
        "policy log-probs at temperature 1", ROWS,
        "Branch(t.tokens[start:], t.mask[start:], t.logprobs[start:], advantage, temperature, is_expert=False)",
        "Branch(t.tokens[start:], t.mask[start:], t.logprobs[start:], advantage, 1.0, is_expert=False)",
    ),
    Pitfall(
        "expert rows at the rollouts' temperature", "learner/step_rows.py",
        "        return StepRows(composition, groups, rows,",
        "        from dataclasses import replace\n"
        "        warm = lambda row: replace(\n"
        "            row, branches=tuple(replace(b, temperature=temperature) for b in row.branches))\n"
        "        rows = [warm(row) for row in rows]\n"
        "        return StepRows(composition, groups, rows,",
    ),
    Pitfall(
        "behaviour log-probs are raw, not processed", "actors/engines/transformers.py",
        "return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]",
        "return tokens[:, 0], torch.log_softmax(logits.float(), dim=-1).gather(1, tokens)[:, 0]",
    ),
    Pitfall(
        "logits are not divided by the temperature", MODEL,
        "logits = self.lm.get_output_embeddings()(hidden).float() / temperatures[:, None]",
        "logits = self.lm.get_output_embeddings()(hidden).float()",
    ),
    Pitfall(
        "log-probs are those of the next position", BATCH,
        "np.array([start - 1, *range(end, end + size - 1)])",
        "np.array(range(end, end + size))",
    ),
    # Groups and advantages.
    Pitfall(
        "K = 1 is accepted by the configuration", SCHEMA,
        "group_size: Annotated[int, Field(ge=2)]",
        "group_size: Annotated[int, Field(ge=1)]",
    ),
    Pitfall(
        "K = 1 is accepted by the advantages", ADVANTAGES,
        "if rewards.ndim != 1 or len(rewards) < 2:",
        "if rewards.ndim != 1:",
    ),
    Pitfall(
        "zero variance by std < eps", ADVANTAGES,
        "if rewards.max() == rewards.min():",
        "if rewards.std() < eps:",
    ),
    Pitfall(
        "no guard for zero variance", ADVANTAGES,
        "if rewards.max() == rewards.min():",
        "if False:",
    ),
    Pitfall(
        "the biased std", ADVANTAGES,
        "rewards.std(correction=1)",
        "rewards.std(correction=0)",
    ),
    Pitfall(
        "advantages have the wrong sign", ADVANTAGES,
        "centred = rewards - rewards.mean()",
        "centred = rewards.mean() - rewards",
    ),
    # Empty components and leaks.
    Pitfall(
        "an empty policy half is NaN", POLICY,
        "N = max(num_tokens, 1.0)",
        "N = torch.as_tensor(num_tokens)",
    ),
    Pitfall(
        "an empty expert half is NaN", CHORD,
        "N = max(num_tokens, 1.0)",
        "N = torch.as_tensor(num_tokens)",
    ),
    Pitfall(
        "an idle rank does not run backward", STEP,
        "return loss + 0.0 * logprobs.sum(), metrics",
        "return (loss if batch.mask.any() else loss.detach()), metrics",
    ),
    Pitfall(
        "the mask comes after exp, behaviour log-probs", POLICY,
        "log_pi_b = torch.where(live, behavior_logprobs, 0.0)",
        "log_pi_b = behavior_logprobs",
    ),
    Pitfall(
        "the mask comes after exp, advantages", POLICY,
        "A = torch.where(live, advantages[:, None], 0.0)",
        "A = advantages[:, None].expand_as(mask)",
    ),
    Pitfall(
        "the mask comes after exp, expert log-probs", CHORD,
        "log_p = torch.where(mask > 0, logprobs, 0.0)",
        "log_p = logprobs",
    ),
    # Ratios, clips and constants.
    Pitfall(
        "log-ratios are not clamped", IMPORTANCE,
        "return (log_p - log_q).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)",
        "return log_p - log_q",
    ),
    Pitfall("no stop-gradient on φ", CHORD, "p = log_p.detach().exp()", "p = log_p.exp()"),
    Pitfall(
        "no stop-gradient on the importance weight", POLICY,
        "log_pi_prox = log_pi.detach()",
        "log_pi_prox = log_pi",
    ),
    Pitfall(
        "no stop-gradient on the weight of cispo", POLICY,
        "token_weights(correction, r=r.detach(), k=k)",
        "token_weights(correction, r=r, k=k)",
    ),
    Pitfall("the loss has the wrong sign", POLICY, "loss = -(mask * w * surrogate)", "loss = (mask * w * surrogate)"),
    Pitfall(
        "the clip is on the wrong side", POLICY,
        "return torch.minimum(free, clipped), clipped < free",
        "return torch.maximum(free, clipped), clipped > free",
    ),
    Pitfall(
        "the bounds of the clip are swapped", POLICY,
        "ratio.clamp(1 - correction.clip_low, 1 + correction.clip_high)",
        "ratio.clamp(1 - correction.clip_high, 1 + correction.clip_low)",
    ),
    Pitfall(
        "gspo takes the sum of the row's log-ratios", POLICY,
        "return (mask * values).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)",
        "return (mask * values).sum(-1, keepdim=True)",
    ),
    Pitfall(
        "an uncorrected asynchronous run is accepted", SCHEMA,
        'if self.correction == "none" and self.max_staleness > 0:',
        "if False:",
    ),
    Pitfall(
        "expert log-probs in low precision", MODEL,
        "logprobs = logits.log_softmax(dim=-1)",
        "logprobs = logits.bfloat16().log_softmax(dim=-1).float()",
    ),
)  # fmt: skip
