"""Reads how full vLLM is from the statistics that it gives to its stat loggers, once for each step of decoding."""

from typing import TYPE_CHECKING

from actors.engine import Pressure

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import StatLoggerBase
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats


class PressureGauge:
    """What was read last."""

    def __init__(self) -> None:
        self.pressure = Pressure()

    def read(self, scheduler: "SchedulerStats | None", iteration: "IterationStats | None") -> None:
        """Of one step; either part may be missing."""
        before = self.pressure
        kv_cache_frac, waiting_frac = before.kv_cache_frac, before.waiting_frac
        if scheduler:
            num_waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            kv_cache_frac = scheduler.kv_cache_usage
            waiting_frac = num_waiting / max(num_waiting + scheduler.num_running_reqs, 1)
        num_preempted = iteration.num_preempted_reqs if iteration else 0
        self.pressure = Pressure(kv_cache_frac, waiting_frac, before.num_preemptions + num_preempted)

    def stat_logger(self, vllm_config: "VllmConfig", engine_index: int = 0) -> "StatLoggerBase":
        """What vLLM calls to make its stat logger, which reads into this gauge."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        gauge = self

        class PressureLogger(StatLoggerBase):
            def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0) -> None: ...

            def record(
                self,
                scheduler_stats: "SchedulerStats | None",
                iteration_stats: "IterationStats | None",
                mm_cache_stats: object = None,
                engine_idx: int = 0,
            ) -> None:
                gauge.read(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None: ...

        return PressureLogger(vllm_config, engine_index)
