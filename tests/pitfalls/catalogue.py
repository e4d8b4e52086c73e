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
    needs_two_ranks: bool = False
    """Whether one rank alone cannot tell."""


STEP, CHORD, POLICY = "learner/train_engine.py", "learner/objective/chord.py", "learner/objective/policy.py"
IMPORTANCE, ADVANTAGES = "learner/objective/importance.py", "learner/objective/advantages.py"
HEAD, BATCH, ROWS, SOURCE = "learner/head.py", "learner/batch.py", "learner/rows.py", "learner/source.py"
STEP_ROWS, SCHEMA, ALGORITHM = "learner/step_rows.py", "common/config/schema.py", "common/config/algorithm.py"
VLLM = "actors/engines/vllm.py"

PITFALLS = (
    # Wrong denominators.
    Pitfall(
        "mean of micro-batch means, policy half", STEP,
        "correction=self._objective.correction, num_tokens=denominators.policy,",
        "correction=self._objective.correction, num_tokens=float(batch.policy_mask.sum()),",
    ),
    Pitfall(
        "mean of micro-batch means, expert half", STEP,
        "weighting=self._objective.expert_weighting, num_tokens=denominators.expert",
        "weighting=self._objective.expert_weighting, num_tokens=float(batch.expert_mask.sum())",
    ),
    Pitfall(
        "mean per rank: counts are not all-reduced", STEP,
        "policy, expert, num_policy_tokens, num_expert_tokens = self._ranks.add_up(counts)",
        "policy, expert, num_policy_tokens, num_expert_tokens = *counts[:2], *self._ranks.add_up(counts[2:])",
        needs_two_ranks=True,
    ),
    Pitfall(
        "divided a second time by accumulation, both halves", STEP,
        "self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * self._ranks.count)",
        "self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * self._ranks.count / num_micro_batches)",
    ),
    Pitfall(
        "divided a second time by accumulation, policy half alone", STEP,
        "loss = chord_loss(losses.policy, losses.expert, mu=mu)",
        "loss = chord_loss(losses.policy / num_micro_batches, losses.expert, mu=mu)",
    ),
    Pitfall(
        "world-size factor missing", STEP,
        "self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * self._ranks.count)",
        "self._engine.backward(loss + 0.0 * losses.logprobs.sum())",
        needs_two_ranks=True,
    ),
    Pitfall(
        "gradients are reduced after every micro-batch, not once a step", STEP,
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
        "positions.append(np.arange(size, size + length))",
        "positions.append(np.arange(end - start, end - start + length))",
    ),
    Pitfall(
        "a branch sees past the end of its prompt", BATCH,
        "in_prompt = places < self.prompt_sizes[self.branch_rows, None]",
        "in_prompt = places < torch.full_like(self.branch_rows, len(places))[:, None]",
    ),
    Pitfall(
        "a branch sees the prompt of another row", BATCH,
        "[r for r, row in enumerate(rows) for _ in row.branches]",
        "[0 for row in rows for _ in row.branches]",
    ),
    Pitfall(
        "a branch sees what comes after in it", BATCH,
        "torch.ones(width, width, dtype=torch.bool, device=self.tokens.device).tril()",
        "torch.ones(width, width, dtype=torch.bool, device=self.tokens.device)",
    ),
    Pitfall(
        "a size typed by hand: the rank count", STEP,
        "self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * self._ranks.count)",
        "self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * 2)",
    ),
    Pitfall(
        "a size typed by hand: expert tokens", STEP,
        "weighting=self._objective.expert_weighting, num_tokens=denominators.expert",
        "weighting=self._objective.expert_weighting, num_tokens=32",
    ),
    Pitfall(
        "a sequence mean that divides by all positions", ROWS,
        "mask / total",
        "mask / len(mask)",
    ),
    Pitfall(
        "the soft overlong penalty has no floor", "learner/objective/rewards.py",
        ".clamp(-1.0, 0.0)",
        ".clamp(max=0.0)",
    ),
    # Masked and rejected tokens.
    Pitfall(
        "rejected tokens leave the denominator", POLICY,
        "loss = -(mask * w * surrogate).sum() / N",
        "loss = -(mask * w * surrogate).sum() / max(float((mask * (w > 0)).sum()), 1.0)",
    ),
    Pitfall(
        "answers cut off leave the denominator", ROWS,
        "loss_weights(t.mask[start:], aggregation)",
        "loss_weights(t.mask[start:] * np.float32(advantage != 0), aggregation)",
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
        "(entropies * batch.policy_mask).sum() / max(denominators.policy, 1.0)",
        "(entropies * batch.mask).sum() / max(denominators.policy, 1.0)",
    ),
    Pitfall(
        "expert rows in the advantages of a group", STEP_ROWS,
        "advantages = [self._shaping.advantages(group).tolist() for group in groups]",
        "from dataclasses import replace as put\n"
        "        expert = [put(group.trajectories[0], reward=1.0) for group in groups]\n"
        "        with_expert = [put(g, trajectories=(*g.trajectories, e)) for g, e in zip(groups, expert)]\n"
        "        advantages = [self._shaping.advantages(group).tolist()[:-1] for group in with_expert]",
    ),
    Pitfall(
        "expert rows in importance weights and effective sample size", ROWS,
        "nothing = np.full(len(weights), np.nan, dtype=np.float32)\n"
        '    branch = Branch(tokens[start:], weights, nothing, float("nan"), EXPERT_TEMPERATURE, is_expert=True)',
        "nothing = np.full(len(weights), -1.0, dtype=np.float32)\n"
        "    branch = Branch(tokens[start:], weights, nothing, 1.0, EXPERT_TEMPERATURE, is_expert=False)",
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
    Pitfall(
        "the expert cursor stays where it is", SOURCE,
        "cursor += count",
        "cursor += 0",
    ),
    Pitfall(
        "a half that has weight and no rows is no matter", STEP_ROWS,
        "if weight > 0 and not count:",
        "if False:",
    ),
    Pitfall(
        "a band that masks on-policy tokens is accepted: every step is SFT-only", ALGORITHM,
        "if not 0 <= low < 1 < high:",
        "if low > high:",
    ),
    # The schedule of μ.
    Pitfall(
        "μ counted from 1", "learner/schedule.py",
        "        step - sft_steps,\n        peak=algorithm.mu_peak,",
        "        step - sft_steps + 1,\n        peak=algorithm.mu_peak,",
    ),
    Pitfall(
        "μ starts anew after a resume", STEP_ROWS,
        "        mu = mu_of(self._config, composition.step,",
        "        self._num_read = getattr(self, '_num_read', -1) + 1\n"
        "        mu = mu_of(self._config, self._num_read,",
    ),
    Pitfall(
        "a decay of 0 from peak to another valley is accepted by the schedule", CHORD,
        "if decay_steps == 0 and peak != valley:",
        "if False:",
    ),
    Pitfall(
        "a decay of 0 from peak to another valley is accepted by the configuration", ALGORITHM,
        "if self.mu_target is None and self.mu_decay_steps == 0 and self.mu_peak != self.mu_valley:",
        "if False:",
    ),
    Pitfall(
        "an adaptive μ follows another number than the groups' reward", STEP_ROWS,
        "mean_reward=self._history.mean_reward(composition.group_ids)",
        "mean_reward=0.0",
    ),
    Pitfall(
        "an adaptive μ rises with the reward", CHORD,
        "return min(1.0, max(0.0, target - mean_reward))",
        "return min(1.0, max(0.0, target + mean_reward))",
    ),
    Pitfall(
        "μ multiplies the wrong half", CHORD,
        "return (1 - mu) * policy + mu * expert",
        "return mu * policy + (1 - mu) * expert",
    ),
    Pitfall(
        "an adaptive μ beyond 1", CHORD,
        "return min(1.0, max(0.0, target - mean_reward))",
        "return max(0.0, target - mean_reward)",
    ),
    Pitfall(
        "effective μ without μ", CHORD,
        "expert, policy = mu * expert_norm, (1 - mu) * policy_norm",
        "expert, policy = expert_norm, policy_norm",
    ),
    # Temperature.
    Pitfall(
        "top-p is accepted in training", SCHEMA,
        'for key, plain in (("top_p", 1.0), ("top_k", 0)):',
        'for key, plain in (("top_k", 0),):',
    ),
    Pitfall(
        "top-k is accepted in training", SCHEMA,
        'for key, plain in (("top_p", 1.0), ("top_k", 0)):',
        'for key, plain in (("top_p", 1.0),):',
    ),
    Pitfall(
        "vLLM's log-probs are raw, not processed", VLLM,
        'logprobs_mode="processed_logprobs"',
        'logprobs_mode="raw_logprobs"',
    ),
    Pitfall(
        "policy log-probs at temperature 1", ROWS,
        "t.logprobs[start:], advantage, temperature,\n            is_expert=False,",
        "t.logprobs[start:], advantage, 1.0,\n            is_expert=False,",
    ),
    Pitfall(
        "expert rows at the rollouts' temperature", STEP_ROWS,
        "        mu = mu_of(self._config, composition.step,",
        "        from dataclasses import replace as put\n"
        "        warm, mends = self._config.sampling.temperature, lambda b: put(b, temperature=warm)\n"
        "        rows = [put(row, branches=tuple(map(mends, row.branches))) for row in rows]\n"
        "        mu = mu_of(self._config, composition.step,",
    ),
    Pitfall(
        "behaviour log-probs are raw, not processed", "actors/engines/drawing.py",
        "return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]",
        "return tokens[:, 0], torch.log_softmax(logits.float(), dim=-1).gather(1, tokens)[:, 0]",
    ),
    Pitfall(
        "logits are not divided by the temperature", HEAD,
        "return linear(hidden, weight, bias).float().div_(temperatures[:, None])",
        "return linear(hidden, weight, bias).float()",
    ),
    Pitfall(
        "log-probs are those of the next position", BATCH,
        "[start + size - 1, *range(end, end + length - 1)]",
        "[*range(end, end + length)]",
    ),
    # Groups and advantages.
    Pitfall(
        "K = 1 is accepted by the configuration", ALGORITHM,
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
        "if exact.max() == exact.min():",
        "if exact.std() < eps:",
    ),
    Pitfall(
        "no guard for zero variance", ADVANTAGES,
        "if exact.max() == exact.min():",
        "if False:",
    ),
    Pitfall(
        "advantages of close rewards in low precision", ADVANTAGES,
        "exact = rewards.double()",
        "exact = rewards.float() if dtype == torch.float32 else rewards.double()",
    ),
    Pitfall(
        "the biased std", ADVANTAGES,
        "exact.std(correction=1)",
        "exact.std(correction=0)",
    ),
    Pitfall(
        "advantages have the wrong sign", ADVANTAGES,
        "centred = exact - exact.mean()",
        "centred = exact.mean() - exact",
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
        "self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * self._ranks.count)",
        "batch.mask.any() and self._engine.backward(loss * self._ranks.count)",
        needs_two_ranks=True,
    ),
    Pitfall(
        "the mask comes after exp, policy log-probs", POLICY,
        "log_pi = torch.where(live, logprobs, 0.0)",
        "log_pi = logprobs",
    ),
    Pitfall(
        "the mask comes after exp, proximal log-probs", POLICY,
        "log_pi_prox = torch.where(live, proximal_logprobs, 0.0).detach()",
        "log_pi_prox = proximal_logprobs.detach()",
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
    Pitfall(
        "an effective sample size without the square", IMPORTANCE,
        "return ratio_mean**2 / ratio_sq_mean if",
        "return ratio_mean / ratio_sq_mean if",
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
        "an uncorrected asynchronous run is accepted", ALGORITHM,
        'if self.correction == "none" and self.max_staleness > 0 and not self.allow_uncorrected:',
        "if False:",
    ),
    Pitfall(
        "log-probs in low precision", HEAD,
        "return linear(hidden, weight, bias).float()",
        "return linear(hidden, weight, bias).bfloat16().float()",
    ),
    Pitfall(
        "the head's backward forgets the temperature", HEAD,
        "scale = grads[0] / temperatures",
        "scale = grads[0]",
    ),
)  # fmt: skip
