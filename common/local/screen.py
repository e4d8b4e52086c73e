"""The live view of chord-local: one screen with what happens now, trend lines, who takes part, and the last news."""

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.layout import Layout
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common.local.progress import Progress
from common.local.record import Board, BoardPeer
from common.local.supervisor import Component
from common.local.trends import Series, Trend, draw_trend

WIDE = 110
"""From so many columns on, trends and the rest stand side by side."""
NOW_LINES = 3
FRAME = 2
"""Rows, and about as many columns on each side, that a panel takes for itself."""
MIN_NEWS_LINES = 2
LABEL, VALUE, RANGE = 18, 8, 19
"""Columns of a trend's row beside its line."""
MIN_BLOCKS = 20
"""A shorter line is not worth the columns of a range."""
UNDER_WAY = ("leased", "committed", "training")
STATE_STYLES = {"serving": "green", "gone": "red", "stale": "yellow", "fitting": "yellow", "starting": "yellow"}


@dataclass(frozen=True)
class View:
    """What there is to show."""

    title: str
    num_steps: int
    progress: Progress
    components: Sequence[Component]
    """The learner first."""
    news: Sequence[str]


def draw(view: View, *, width: int, height: int) -> RenderableType:
    """The whole screen. Where it is too small for everything, rows of less weight are left out."""
    layout, now, body = Layout(), Layout(_now(view), size=NOW_LINES + FRAME), Layout()
    layout.split_column(now, body)
    room = max(height - NOW_LINES - FRAME, 1)
    trends, peers = view.progress.trends.rows(), _peer_rows(view)
    if width >= WIDE:
        num_peer_rows = _fit(len(peers), room - 2 * FRAME - MIN_NEWS_LINES)
        side, trends_width = Layout(), width * 3 // 5
        side.split_column(
            Layout(_peers(peers, num_peer_rows), size=num_peer_rows + FRAME),
            Layout(_news(view, width - trends_width, room - num_peer_rows - 2 * FRAME)),
        )
        body.split_row(Layout(_trends(trends, trends_width, room - FRAME), size=trends_width), side)
        return layout
    num_peer_rows = _fit(len(peers), max(room // 3 - FRAME, 1))
    num_trend_rows = _fit(len(trends), room - num_peer_rows - 3 * FRAME - MIN_NEWS_LINES)
    num_news_lines = room - num_trend_rows - num_peer_rows - 3 * FRAME
    body.split_column(
        Layout(_trends(trends, width, num_trend_rows), size=num_trend_rows + FRAME),
        Layout(_peers(peers, num_peer_rows), size=num_peer_rows + FRAME),
        Layout(_news(view, width, num_news_lines)),
    )
    return layout


def _fit(wanted: int, room: int) -> int:
    """At least one row: an empty panel says what is missing."""
    return max(min(wanted, room), 1)


def _now(view: View) -> Panel:
    progress, board, learner = view.progress, view.progress.board, view.components[0]
    step = max(board.step if board else 0, progress.last_step.step if progress.last_step else 0)
    num_steps = view.num_steps
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(
        Text(f"step {step}/{num_steps}", style="bold"),
        ProgressBar(total=num_steps, completed=min(step, num_steps)),
        Text(_times(progress, step=step, num_steps=num_steps), style="dim"),
    )
    doing = Text(f"learner: {progress.doing()}", style="bold", no_wrap=True, overflow="ellipsis")
    if learner.trouble:
        doing = Text(f"learner {learner.trouble}, it is started again", style="bold red")
    flow = Text(_flow(board), style="dim", no_wrap=True, overflow="ellipsis")
    return Panel(Group(bar, doing, flow), title=Text(view.title), title_align="left")


def _times(progress: Progress, *, step: int, num_steps: int) -> str:
    """How long the run has taken, and how long it will, by its last steps."""
    last = progress.last_step
    if not last or last.run_wall_s is None:
        return ""
    since = time.time() - max(last.time or 0.0, progress.started) if step < num_steps else 0.0
    gone = _duration(last.run_wall_s + max(since, 0.0))
    if step >= num_steps or not (pace_s := progress.recent_step_s):
        return f"{gone} gone"
    return f"{gone} gone, about {_duration(max(pace_s * (num_steps - step), 1.0))} left"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _flow(board: Board | None) -> str:
    """Where groups are, in the ledger's words."""
    if not board:
        return ""
    under_way = [f"{board.groups[state]} {state}" for state in UNDER_WAY if board.groups.get(state)]
    parts = [f"groups: {', '.join(under_way) or 'none under way'}"]
    if board.dropped:
        parts.append("dropped: " + ", ".join(f"{count} {reason}" for reason, count in board.dropped.items()))
    if board.evaluations_owed:
        parts.append(f"to evaluate: version {', '.join(map(str, board.evaluations_owed))}")
    return "; ".join(parts)


def _trends(rows: Sequence[tuple[Trend, str, Series]], width: int, num_rows: int) -> Panel:
    inner = width - 2 * FRAME
    has_range = inner >= LABEL + VALUE + RANGE + MIN_BLOCKS
    label_width = LABEL if inner >= LABEL + VALUE + MIN_BLOCKS else LABEL // 2
    blocks = max(inner - label_width - VALUE - 2 - (RANGE if has_range else 0), 1)
    last_step = max((series.points[-1][0] for _, _, series in rows if series.points), default=0)
    lines: list[Text] = []
    for trend, label, series in rows[: max(num_rows, 1)]:
        low, high = trend.scale or series.scale
        drawn = draw_trend(series.points, last_step=last_step, width=blocks, scale=(low, high))
        name = label if len(label) < label_width else f"{label[: label_width - 2]}…"
        text = Text(f"{name:<{label_width}}", no_wrap=True, overflow="crop")
        text.append(f"{drawn:<{blocks}}", style="cyan")
        value = math.nan if series.last is None else series.last
        text.append(f"  {value:>{VALUE}{trend.form}}", style="bold" if math.isfinite(value) else "bold red")
        if has_range:
            between = f"{low:{trend.form}} … {high:{trend.form}}"
            text.append(f"{between:>{RANGE}}", style="dim")
        lines.append(text)
    title = f"trends, steps 0 to {last_step}" if rows else "trends"
    return Panel(Group(*lines) if lines else Text("no step yet", style="dim"), title=title, title_align="left")


Cells = tuple[str, str, str, str, str]
"""Of a peer: name, state, version, speed and engine."""


def _peer_rows(view: View) -> list[Cells]:
    """Our own processes in their order, then peers from elsewhere."""
    board = view.progress.board
    known = {peer.peer_id: peer for peer in board.peers} if board else {}
    rows = [
        _cells_of(view, component.name, component, known.pop(component.name, None)) for component in view.components[1:]
    ]
    return rows + [_cells_of(view, name, None, peer) for name, peer in known.items()]


def _cells_of(view: View, name: str, component: Component | None, peer: BoardPeer | None) -> Cells:
    """A process that is down is down, whatever the learner has not noticed yet."""
    if component and component.trouble:
        return name, component.trouble, "", "", peer.engine if peer else ""
    if component and component.exit_code is not None:
        return name, "ended", "", "", peer.engine if peer else ""
    if peer is None:
        board = view.progress.board
        return name, "leaving" if board and board.phase == "ended" else "starting", "", "", ""
    state = f"{peer.state}, silent for {peer.silence_s:.0f} s" if peer.silence_s > 3 else peer.state
    version = "" if peer.serving_step is None else f"version {peer.serving_step}"
    speed = view.progress.tokens_per_s(name)
    return name, state, version, f"{speed:.0f} tokens/s" if speed else "", peer.engine


def _peers(rows: Sequence[Cells], num_rows: int) -> Panel:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, ratio=1)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    shown = rows if len(rows) <= num_rows else rows[: num_rows - 1]
    for name, state, version, speed, engine in shown:
        word = state.split(",")[0].split(":")[0]
        style = "bold red" if word == "crashed" else STATE_STYLES.get(word, "")
        table.add_row(Text(name), Text(state, style=style), version, speed, Text(engine, style="dim"))
    if rest := rows[len(shown) :]:
        states = [state.split(",")[0].split(":")[0] for _, state, *_ in rest]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        table.add_row(f"and {len(rest)} more", Text(counts), "", "", "")
    return Panel(table if rows else Text("none", style="dim"), title="actors and evaluator", title_align="left")


def _news(view: View, width: int, num_lines: int) -> Panel:
    inner = max(width - 2 * FRAME, 10)
    lines = [part for line in list(view.news)[-max(num_lines, 1) :] for part in textwrap.wrap(line, inner)]
    return Panel(Text("\n".join(lines[-max(num_lines, 1) :])), title="news", title_align="left")
