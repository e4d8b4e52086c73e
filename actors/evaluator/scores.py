"""The score of a task, from its samples."""

from collections.abc import Sequence

from actors.evaluator.samples import Sample
from actors.evaluator.statistics import accuracy_by_category, bootstrap_interval, mean_pass_at_k, pass_sizes
from common.wire.messages import MAX_CATEGORIES, MAX_CATEGORY_CHARACTERS, TaskScore


def score_task(samples: Sequence[Sample], *, wall_s: float, seed: int) -> TaskScore:
    """`samples`: of one task, equally many to each problem. More categories than a message takes are left out."""
    problems = sorted({sample.problem for sample in samples})
    k = len(samples) // len(problems)
    right = dict.fromkeys(problems, 0)
    category = {sample.problem: sample.category[:MAX_CATEGORY_CHARACTERS] for sample in samples}
    for sample in samples:
        right[sample.problem] += sample.is_correct
    num_right = [right[problem] for problem in problems]
    accuracies = [count / k for count in num_right]
    categories = accuracy_by_category([category[problem] for problem in problems], accuracies)
    return TaskScore(
        task=samples[0].task,
        num_problems=len(problems),
        samples_per_problem=k,
        num_correct=sum(num_right),
        num_unparsed=sum(not sample.is_parsed for sample in samples),
        num_truncated=sum(sample.is_truncated for sample in samples),
        confidence_95=bootstrap_interval(accuracies, seed=seed),
        pass_at_k={str(size): mean_pass_at_k(num_right, k, size) for size in pass_sizes(k)},
        categories=categories if len(categories) <= MAX_CATEGORIES else {},
        mean_score=sum(sample.reward for sample in samples) / len(samples),
        mean_answer_tokens=sum(sample.num_answer_tokens for sample in samples) / len(samples),
        wall_s=wall_s,
    )
