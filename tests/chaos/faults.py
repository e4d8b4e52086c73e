"""The faults of `make chaos`: each strikes a living run, and returns when the run has answered it.

A fault is a method of `Faults`; its name is the class under which chaos.json counts it.
"""

import errno
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.chaos.damage import NOTICED, Damage, durable_files, ledger_history
from tests.chaos.proxy import CALM, Weather
from tests.chaos.shim import Control, Kind
from tests.chaos.site import FAR_HOSTS, Site

NOTICE_LIMIT_S = 60.0
WATCHDOG_LIMIT_S = 90.0
"""A process left stopped for longer is let go on by the harness."""


STRIKE_LIMIT_S = 30.0
"""A fault that has met nothing for longer has missed."""
TRIES = 3
"""Of a fault that misses."""


class Missed(Exception):
    """The fault was set and met nothing, so it shows nothing."""


class Faults:
    """Strikes one run at a time; the record goes on over all of them."""

    def __init__(self, chance: random.Random, say: Callable[[str], None]) -> None:
        self._chance = chance
        self._say = say
        self.kills = Counter[str]()
        self.struck = Counter[str]()
        self.missed = Counter[str]()
        """Tries that met nothing; they are made again, and never counted as struck."""
        self.recovery_s: list[float] = []
        """From the kill of a learner to the next step that had not been finished before."""
        self.training_again_s: list[float] = []
        """From the kill of a learner to its first step or replay after the restart, model load included."""
        self.notice_s: list[float] = []
        """From a black hole to the learner's notice of it."""
        self.stopped_found = Counter[str]()
        """Processes left stopped: whether somebody found and replaced them."""
        self.violations: list[str] = []
        self.site: Site

    def begin(self, site: Site) -> None:
        """The faults to come strike this run."""
        self.site = site

    def strike(self, name: str) -> None:
        """Raises RunFailed where the run did not answer."""
        self.site.ends.read()
        self.site.ends.fault = name
        for _ in range(TRIES):
            try:
                getattr(self, name)()
            except Missed as miss:
                self.missed[name] += 1
                self._say(f"{name} met nothing: {miss}")
            else:
                self.struck[name] += 1
                break
        self.site.ends.read()
        self.site.ends.fault = ""

    # Kills

    def kill_learner(self) -> None:
        self._kill_and_time("learner")

    def kill_actor(self) -> None:
        """One to three at a time, mostly such as serve already."""
        names = [name for name in self.site.components() if name.startswith(("actor", "far"))]
        serving = [name for name in names if self.site.peer_state(name) == "serving"]
        pool = serving if serving and self._chance.random() < 0.75 else names
        victims = self._chance.sample(pool, min(len(pool), self._chance.choice((1, 2, 3))))
        self._kill_and_wait(*victims)

    def kill_evaluator(self) -> None:
        self._kill_and_wait("evaluator")

    def kill_supervisor(self) -> None:
        """chord-local itself; what it started ends by itself, and an operator starts it again."""
        self._say("SIGKILL supervisor")
        self.site.components()["supervisor"].kill()
        self.kills["supervisor"] += 1
        self._pass_some_steps()

    def kill_all(self) -> None:
        """Learner, actors, evaluator, supervisor at one moment, as when power fails."""
        self._say("SIGKILL everything")
        self.kills.update(self.site.kill_everything())
        self._pass_some_steps()

    def kill_at_call(self) -> None:
        """The learner, somewhere within its next writes."""
        skip, is_torn = self._chance.randrange(250), self._chance.random() < 0.5
        self._say(f"SIGKILL learner {'within' if is_torn else 'before'} its {skip + 1}. writing call from now")
        control, before = self.site.control("learner"), self._pid_of("learner")
        control.count_anew()
        control.kill(skip=skip, is_torn=is_torn)
        self.site.wait_until(lambda: self._is_replaced("learner", before), "the learner to meet its end")
        control.clear()
        if not control.num_struck:
            raise Missed("the learner met another end")
        self.kills["learner"] += 1
        self._pass_some_steps()

    # Stops

    def stop_actor(self) -> None:
        """SIGSTOP for longer than a peer may be silent, then SIGCONT."""
        self._suspend(self._one_actor(), self._chance.uniform(2, 12))

    def stop_learner(self) -> None:
        self._suspend("learner", self._chance.uniform(1, 8))

    def stop_left(self) -> None:
        """SIGSTOP without an end: somebody is to find and replace the process."""
        name = self._chance.choice(["learner", *[n for n in self.site.components() if n.startswith("actor")]])
        before = self._signal(name, signal.SIGSTOP)
        self._say(f"SIGSTOP {name}, left as it is")
        started = time.monotonic()
        while not self._is_replaced(name, before) and time.monotonic() - started < WATCHDOG_LIMIT_S:
            self.site.tend()
            time.sleep(0.2)
        is_found = self._is_replaced(name, before)
        self.stopped_found["found" if is_found else "not found"] += 1
        if not is_found:
            self._say(f"nobody replaced {name} within {WATCHDOG_LIMIT_S:.0f} s: SIGCONT")
            self._signal(name, signal.SIGCONT)
        self._pass_some_steps()

    # Network

    def reset(self) -> None:
        for _ in range(self._chance.choice((1, 3))):
            host = self._chance.choice(FAR_HOSTS)
            proxy = self.site.proxies[host]
            self.site.wait_until(lambda proxy=proxy: proxy.num_open >= 4, f"connections through {host}")
            self._say(f"reset {proxy.reset_all()} connections through {host}")
            self._pass_some_steps(1)

    def black_hole(self) -> None:
        """Until the learner has noticed that the actor behind it is gone."""
        number = self._chance.randrange(len(FAR_HOSTS))
        name, proxy = self.site.far_names[number], self.site.proxies[FAR_HOSTS[number]]
        self.site.wait_until(lambda: self.site.peer_state(name) == "serving", f"{name} to serve")
        self._say(f"black hole around {name}")
        started = time.monotonic()
        proxy.change(Weather(is_black_hole=True))
        try:
            self.site.wait_until(
                lambda: self.site.peer_state(name) in ("", "gone"), f"notice of {name}", limit_s=NOTICE_LIMIT_S
            )
            self.notice_s.append(time.monotonic() - started)
            self._pass_some_steps(1)
        finally:
            proxy.change(CALM)
        self.site.wait_until(lambda: self.site.peer_state(name) == "serving", f"{name} to serve again")

    def delay(self) -> None:
        self._weather(Weather(delay_s=(0.05, 0.5)), self._chance.uniform(4, 8))

    def truncate(self) -> None:
        self._weather(Weather(cut_probability=0.05), self._chance.uniform(4, 8))

    def loss(self) -> None:
        self._weather(Weather(delay_s=(0.0, 0.2), reset_probability=0.1), self._chance.uniform(4, 8))

    def throttle(self) -> None:
        self._weather(Weather(bytes_per_s=200_000), self._chance.uniform(4, 8))

    # Disk and clock

    def full_disk(self) -> None:
        """No component can write, until there is room again some seconds later."""
        victims = ["evaluator", "far-0", "actor-0", "learner"] if self._chance.random() < 0.5 else ["learner"]
        self._refuse(victims, lambda control: control.fill_disk(), "disk full for", self._chance.uniform(1, 6))

    def eio(self) -> None:
        name = self._chance.choice(["learner", "learner", "actor-0", "far-0"])
        is_learner, repeat = name == "learner", self._chance.choice((1, 3))
        skip = self._chance.randrange(100 if is_learner else 5)
        kinds = self._chance.choice([Kind.WRITE, Kind.SYNC, Kind.ALL] if is_learner else [Kind.WRITE, Kind.ALL])
        self._refuse(
            [name],
            lambda control: control.fail(errno.EIO, skip=skip, repeat=repeat, kinds=kinds),
            f"EIO after {skip} calls for",
            4.0,
        )

    def clock_jump(self) -> None:
        name = self._chance.choice(["learner", "learner", "actor-0", "far-0", "evaluator", "supervisor"])
        hours = self._chance.choice((-1, 1)) * self._chance.uniform(0.5, 30)
        self._pid_of(name)
        self._say(f"clock of {name} {hours:+.1f} h")
        control = self.site.control("common.local" if name == "supervisor" else name)
        control.shift_clock(hours * 3600)
        self._pass_some_steps(3)
        control.shift_clock(0)
        self._pass_some_steps(1)

    # Damage between two starts

    def bit_flip(self) -> None:
        self._damage(Damage.FLIP)

    def truncation(self) -> None:
        self._damage(Damage.TRUNCATE)

    def _damage(self, damage: Damage) -> None:
        """Stop or kill the run, damage one file, start it: it must say so and stop, or go on with its true history."""
        if self._chance.random() < 0.5:
            self._say("SIGKILL everything")
            self.kills.update(self.site.kill_everything())
        else:
            self._say("stop")
            self.site.stop()
        path = self._chance.choice(durable_files(self.site.run_dir, self._chance))
        good, history = path.read_bytes(), ledger_history(self.site.run_dir / "ledger.sqlite")
        where = damage.apply(path, self._chance)
        name = str(path.relative_to(self.site.folder))
        self._say(f"{damage} {name} at {where}, start")
        self.site.is_ending = True  # a refusal to start is what we look for, not what an operator answers blindly
        try:
            self.site.start()
            code = self._wait_for_step_or_end()
        finally:
            self.site.is_ending = False
        if code is None:
            self._compare_history(history, f"{damage} {name} at {where}")
            return
        said = self.site.last_words()
        is_named = path.name.removesuffix("-wal") in said or ("checkpoints" in name and "checkpoints" in said)
        if not is_named or code != 2:
            self.violations.append(f"{damage} {name} at {where}: chord-local ended with {code} and said: {said}")
        self._say(f"refused: {said[:150]}; file put back, start")
        self.site.wait_until_gone()
        path.write_bytes(good)
        self.site.start()
        self._pass_some_steps()

    def _wait_for_step_or_end(self) -> int | None:
        """None where a new step was recorded, else chord-local's exit code."""
        wanted, deadline = self.site.steps() + 1, time.monotonic() + 180
        while time.monotonic() < deadline:
            if (code := self.site.local_exit_code) is not None:
                return code
            if self.site.steps() >= wanted:
                return None
            time.sleep(0.2)
        self.violations.append(f"neither a step nor an end within 180 s: {self.site.describe()}")
        return None

    def _compare_history(self, before: dict[str, str], what: str) -> None:
        after = ledger_history(self.site.run_dir / "ledger.sqlite")
        changed = [key for key, value in before.items() if after.get(key, value) not in (value, NOTICED)]
        gone = [key for key in before if key.startswith("batch") and key not in after]
        if changed or gone:
            self.violations.append(f"{what}: the run went on with another history: {[*changed, *gone][:5]}")

    # What faults have in common

    def _one_actor(self) -> str:
        return self._chance.choice([n for n in self.site.components() if n.startswith(("actor", "far"))])

    def _pid_of(self, name: str) -> int:
        """Once the component runs."""
        self.site.wait_until(lambda: self.site.pid(name) != 0, f"{name} to run")
        return self.site.pid(name)

    def _is_replaced(self, name: str, before: int) -> bool:
        return self.site.pid(name) not in (0, before)

    def _signal(self, name: str, number: signal.Signals) -> int:
        """To the component, once it runs; returns its pid. Raises Missed where it ended at this very moment."""
        pid = self._pid_of(name)
        try:
            psutil.Process(pid).send_signal(number)
        except (psutil.NoSuchProcess, ValueError):  # psutil takes no pid 0
            raise Missed(f"{name} was gone before {number.name}") from None
        return pid

    def _kill_and_wait(self, *names: str) -> None:
        self._say(f"SIGKILL {', '.join(names)}")
        before: dict[str, int] = {}
        for name in names:
            before[name] = self._signal(name, signal.SIGKILL)
            self.kills[name] += 1
        self.site.wait_until(
            lambda: all(self._is_replaced(name, pid) for name, pid in before.items()), f"{', '.join(names)} to be back"
        )
        if self._chance.random() < 0.3:
            self._pass_some_steps(1)

    def _kill_and_time(self, name: str) -> None:
        self._pid_of(name)
        if self._chance.random() < 0.3:
            time.sleep(self._chance.uniform(0, 0.5))
        self._say(f"SIGKILL {name}")
        started = time.monotonic()
        pid = self._signal(name, signal.SIGKILL)
        self.kills[name] += 1
        self.site.wait_for_death(pid)
        newest, killed_at, status = self.site.newest_step(), time.time(), self.site.run_dir / "status.json"

        def is_training() -> bool:
            is_new = status.exists() and status.stat().st_mtime > killed_at
            return is_new and self.site.status().get("phase") in ("replaying", "training")

        self.site.wait_until(is_training, "the learner's restart")
        self.training_again_s.append(time.monotonic() - started)
        self.site.wait_until(lambda: self.site.steps() > newest, f"step {newest + 1}")
        self.recovery_s.append(time.monotonic() - started)

    def _suspend(self, name: str, for_s: float) -> None:
        self._say(f"SIGSTOP {name} for {for_s:.0f} s")
        before = self._signal(name, signal.SIGSTOP)
        self._let_pass(for_s)
        if self.site.pid(name) != before:
            self._say(f"{name} was replaced while it stood")
        else:
            self._signal(name, signal.SIGCONT)
        self._pass_some_steps()

    def _weather(self, weather: Weather, for_s: float) -> None:
        host = self._chance.choice(FAR_HOSTS)
        proxy = self.site.proxies[host]
        self._say(f"{weather} through {host} for {for_s:.0f} s")
        num_hit = proxy.num_hit
        proxy.change(weather)
        try:
            self._let_pass(for_s)
            self._wait_for_strike(lambda: proxy.num_hit > num_hit, f"{host} carried nothing")
        finally:
            proxy.change(CALM)
        self._pass_some_steps(1)

    def _refuse(self, names: list[str], arm: Callable[[Control], None], what: str, for_s: float) -> None:
        """One after the other, the learner last: without it nobody has anything to write. The evaluator writes too
        seldom to be waited for."""
        self._say(f"{what} {', '.join(names)}")
        try:
            for name in names:
                self._pid_of(name)
                control = self.site.control(name)
                control.count_anew()
                arm(control)
                if name != "evaluator":
                    self._wait_for_strike(lambda control=control: control.num_struck > 0, f"{name} wrote nothing")
            self._let_pass(for_s)
        finally:
            for name in names:
                self.site.control(name).clear()
        self._pass_some_steps()

    def _wait_for_strike(self, has_struck: Callable[[], bool], miss: str) -> None:
        """Raises Missed, which says `miss`."""
        deadline = time.monotonic() + STRIKE_LIMIT_S
        while not has_struck():
            if time.monotonic() > deadline:
                raise Missed(f"{miss} within {STRIKE_LIMIT_S:.0f} s")
            self.site.tend()
            time.sleep(0.05)

    def _let_pass(self, for_s: float) -> None:
        """Wall time, while the run is tended."""
        deadline = time.monotonic() + for_s
        while time.monotonic() < deadline:
            self.site.tend()
            time.sleep(0.1)

    def _pass_some_steps(self, count: int = 2) -> None:
        self.site.wait_for_steps(count)


def actor_logs(site: Site) -> list[Path]:
    return [*site.run_dir.glob("logs/actor-*.log"), *site.folder.glob("far-*.log")]
