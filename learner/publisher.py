"""The publisher: turns the policy into a version, offers it to the actors, and keeps the versions that evaluations
still need.

Consumes tensors; produces announcements, each in a thread of its own beside the next optimizer step: one at a time, so
that their order is kept. Waits for the disk only. An evaluation that is owed pins its version until its result is in.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from common.errors import OperatorError
from common.version import Version
from common.wait import Wait
from common.weights.deltas import make_delta
from common.weights.server import WeightServer
from common.weights.snapshot import Snapshot, read_snapshot, write_snapshot
from common.wire.messages import EvaluationResult, Outcome
from learner.courier.process import Courier
from learner.ledger.ledger import Ledger
from learner.recorder import Recorder

log = logging.getLogger(__name__)

LOOK_S = 0.1
CLOSE_S = 30.0
"""Longest wait at the end of a failed run for the publication under way."""
MAX_OWED = 3
"""Evaluations owed at a time at most; further ones are left out: a slow evaluator must not fill the disk."""


@dataclass(frozen=True)
class Publication:
    """A version on its way to the actors."""

    step: int
    patience: Wait
    """With the disk, from the begin of it."""
    snapshot: Future[Snapshot] = field(default_factory=Future[Snapshot])
    """There once it has been announced, where it is to be."""

    def check(self) -> None:
        """Raises what went wrong with it, WaitTimeout where it takes too long."""
        if self.snapshot.done():
            self.snapshot.result()
        else:
            self.patience.check(f"version {self.step} to be written and announced")

    def wait(self) -> Snapshot:
        while not self.snapshot.done():
            self.check()
            with suppress(TimeoutError):
                self.snapshot.exception(timeout=LOOK_S)
        return self.snapshot.result()


class Publisher:
    """Owns the folder of snapshots."""

    def __init__(
        self,
        folder: Path,
        server: WeightServer,
        ledger: Ledger,
        recorder: Recorder,
        *,
        every_steps: int,
        last_steps: Collection[int],
        chunk_bytes: int,
        timeout_s: float,
        keep: Callable[[Snapshot], None] = lambda _: None,
        courier: Courier | None = None,
    ) -> None:
        """`last_steps` end a phase: their versions are evaluated in any case. `keep` sees each version first.

        `timeout_s`: longest time of one publication.
        """
        self._folder = folder
        self._server = server
        self._ledger = ledger
        self._recorder = recorder
        self._every_steps = every_steps
        self._last_steps = last_steps
        self._keep = keep
        self._courier = courier
        self._chunk_bytes = chunk_bytes
        self._timeout_s = timeout_s
        self._publication: Publication | None = None
        """The last one."""
        self._base: Snapshot | None = None
        """The newest snapshot that was announced: what the actors hold, or are about to."""
        self._owed: dict[int, Version] = {}
        self._hashes: dict[int, str] = {}
        self._lock = threading.Lock()
        self._take_over()

    def publish(
        self, tensors: Mapping[str, Tensor], step: int, *, is_announced: bool = True, replaces: bool = False
    ) -> None:
        """Begin to write version `step`, to announce and to offer it, once the one before has been.

        `replaces`: in the place of another policy of that step. A replayed version is not announced: it would take the
        actors back to what they have left behind.
        """
        if self._publication:
            self.settle()
        self._publication = Publication(step, Wait("the disk", limit_s=self._timeout_s))
        thread = threading.Thread(
            target=self._run,
            args=(self._publication, tensors),
            kwargs={"is_announced": is_announced, "replaces": replaces},
            name=f"publish {step}",
            daemon=True,  # no end of the process waits for a disk that hangs
        )
        thread.start()

    def settle(self) -> Snapshot:
        """The last version that was begun, once all is done for it. Raises what went wrong with it.

        That is an OperatorError where the first version of this start, which nothing was computed for, is not the one
        on record; WaitTimeout where it takes too long.
        """
        assert self._publication, "settle before publish"
        return self._publication.wait()

    def check(self) -> None:
        """Raises what went wrong with the last version that was begun: whoever waits for groups that are to be sampled
        with it would wait in vain."""
        if self._publication:
            self._publication.check()

    def close(self) -> None:
        """Let a publication under way come to its end, whatever that is."""
        if self._publication:
            with suppress(Exception):
                self._publication.snapshot.exception(CLOSE_S)

    def _run(self, publication: Publication, tensors: Mapping[str, Tensor], **how: bool) -> None:
        began = time.monotonic()
        try:
            snapshot = self._publish(tensors, publication.step, **how)
            self._recorder.prometheus.publish_s.observe(time.monotonic() - began)
            publication.snapshot.set_result(snapshot)
        except BaseException as error:
            publication.snapshot.set_exception(error)

    def _publish(self, tensors: Mapping[str, Tensor], step: int, *, is_announced: bool, replaces: bool) -> Snapshot:
        snapshot = write_snapshot(
            tensors,
            self._folder / f"{step:08d}.safetensors",
            run_id=self._ledger.run_id,
            incarnation=self._ledger.incarnation,
            step=step,
            chunk_bytes=self._chunk_bytes,
        )
        self._keep(snapshot)
        self._note(snapshot, replaces=replaces)
        is_owed = self._is_due(step) and self._ledger.evaluations.owe(step)
        if is_announced:
            self._announce(snapshot, pin=is_owed)
        elif is_owed:
            self._server.offer(snapshot, pin=True)
        else:
            snapshot.path.unlink()
        with self._lock:  # not before it can be fetched
            before = self._owed.get(step)
            if before and before.hash != snapshot.version.hash:
                self._server.unpin(self._owed.pop(step))
            if is_owed:
                self._owed[step] = snapshot.version
        return snapshot

    def _note(self, snapshot: Snapshot, *, replaces: bool) -> None:
        """Compare with what is on record of that step.

        An evaluation that is owed of the policy before is waived for good: it would score its successor in its place.
        """
        version = snapshot.version
        is_first, self._hashes[version.step] = not self._hashes, version.hash
        with self._ledger.transaction():
            noted = self._ledger.note_version(version.step, version.hash)
            is_other = noted != version.hash
            if is_other and is_first and not replaces:  # in here, so that what was noted stays
                raise OperatorError(
                    f"{version}: expected hash {noted[:8]}, as when it was published: model.path or the checkpoint is "
                    "not the one that this run was trained with"
                )
            is_waived = is_other and replaces and self._ledger.evaluations.waive(version.step)
        if is_waived:
            log.warning("%s takes the place of %s, which was not evaluated in time and will not be", version, noted[:8])
        if is_other and not replaces:
            log.warning(
                "%s came out otherwise than before (%s): this machine does not compute the same step alike twice",
                version,
                noted[:8],
            )

    def _announce(self, snapshot: Snapshot, *, pin: bool) -> None:
        """The delta comes first: those who hear of a version before there is one fetch all of it."""
        base, self._base = self._base, snapshot
        if self._courier:
            self._courier.offer(snapshot)
        is_there = base is not None and base.path != snapshot.path  # a version that replaces another takes its file
        delta = make_delta(base, snapshot) if base and is_there else None
        self._recorder.prometheus.count_version(
            num_bytes=snapshot.manifest.num_bytes, delta_bytes=delta.num_bytes if delta else 0
        )
        self._server.publish(snapshot, pin=pin, delta=delta)

    def _take_over(self) -> None:
        """Of an earlier start's snapshots keep those whose evaluation is still owed, where they are whole."""
        owed = set(self._ledger.evaluations.owed())
        noted = self._ledger.history.version_hashes()
        for path in sorted(self._folder.glob("*.safetensors")):
            step = int(path.stem)
            if step not in owed:
                path.unlink()
                continue
            snapshot = read_snapshot(
                path,
                run_id=self._ledger.run_id,
                incarnation=self._ledger.incarnation,
                step=step,
                chunk_bytes=self._chunk_bytes,
            )
            if snapshot.version.hash != noted.get(step):
                log.error("%s is damaged: version %d is not evaluated, unless it is made again", path, step)
                path.unlink()
                continue
            self._server.offer(snapshot, pin=True)
            self._owed[step] = snapshot.version

    @property
    def newest(self) -> Version | None:
        return self._server.newest

    def has_published(self, version: Version) -> bool:
        """Whether this learner made a version with these very weights since it started."""
        return version.run_id == self._ledger.run_id and self._hashes.get(version.step) == version.hash

    def evaluation(self) -> Version | None:
        """The oldest version whose evaluation is owed."""
        with self._lock:
            return self._owed[min(self._owed)] if self._owed else None

    @property
    def owed_steps(self) -> list[int]:
        with self._lock:
            return sorted(self._owed)

    def finish_evaluation(self, result: EvaluationResult) -> Outcome:
        """Journal a result, once, and let its version go; a result for other weights is refused."""
        with self._lock:
            owed = self._owed.get(result.version.step)
        if owed and owed.hash != result.version.hash:
            return Outcome.REFUSED
        lines = [
            {"step": result.version.step, **score.line(), "version_hash": result.version.hash, "time": time.time()}
            for score in result.scores
        ]
        outcome = self._ledger.evaluations.finish(result.version.step, lines)
        if outcome is Outcome.COMMITTED:
            self._recorder.add_evaluation(lines)
        with self._lock:
            version = self._owed.pop(result.version.step, None)
        if version:
            self._server.unpin(version)
        return outcome

    def _is_due(self, step: int) -> bool:
        if step in self.owed_steps:  # of an earlier start, and made again
            return True
        if self._every_steps == 0:
            return False
        if step in (0, *self._last_steps):
            return True
        if step % self._every_steps:
            return False
        if len(self.owed_steps) >= MAX_OWED:
            log.warning("version %d is not evaluated: the evaluator is %d evaluations behind", step, MAX_OWED)
            return False
        return True
