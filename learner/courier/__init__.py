"""The courier: a process beside the learner that hands versions over to engines directly, over NCCL (or gloo)."""
