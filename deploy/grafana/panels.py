"""Panels, rows and variables in one style: each panel has a description, a unit and its queries."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import common as options
from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
SCOPE = 'job=~"$job", run="$run", instance=~"$instance"'
"""What `$scope` in a query stands for: the series that the variables choose."""
LINE_WIDTH = 24
"""Grafana's columns."""

Panel = timeseries.Panel | stat.Panel | table.Panel


@dataclass(frozen=True)
class Limits:
    """Where a value becomes a warning and where an alarm; `alarm` below `warning`: small values are the bad ones."""

    warning: float
    alarm: float

    def thresholds(self) -> dashboard.ThresholdsConfig:
        rising = self.alarm >= self.warning
        first, second = (self.warning, self.alarm) if rising else (self.alarm, self.warning)
        colors = ("green", "yellow", "red") if rising else ("red", "yellow", "green")
        steps = [Threshold(value, color) for value, color in zip((None, first, second), colors, strict=True)]
        return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


PLAIN = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(None, "green")])


def chart(
    title: str, description: str, queries: Mapping[str, str], *, unit: str, limits: Limits | None = None, width: int = 8
) -> timeseries.Panel:
    """Values over time; `queries`: expression by legend. Limits are drawn as dashed lines."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(7)
        .line_width(1)
        .fill_opacity(8)
        .show_points(VisibilityMode.NEVER)
        .legend(options.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(True))
        .tooltip(options.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .thresholds(limits.thresholds() if limits else PLAIN)
    )
    if limits:
        panel.thresholds_style(options.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    for place, (legend, expression) in enumerate(queries.items()):
        panel.with_target(_query(expression).range().legend_format(legend).ref_id(_letter(place)))
    return panel


def number(
    title: str, description: str, expression: str, *, unit: str, limits: Limits | None = None, width: int = 3
) -> stat.Panel:
    """One value of now, coloured by its limits."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(SOURCE)
        .unit(unit)
        .span(width)
        .height(4)
        .graph_mode(BigValueGraphMode.NONE)
        .reduce_options(options.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(limits.thresholds() if limits else PLAIN)
        .with_target(_query(expression).instant().ref_id(_letter(0)))
    )


@dataclass(frozen=True)
class Column:
    """One measure of a table whose rows are instances."""

    title: str
    expression: str
    """Has a series for each instance, without other labels."""
    unit: str
    limits: Limits | None = None


def instances(title: str, description: str, columns: Sequence[Column]) -> table.Panel:
    """One row for each instance."""
    panel = table.Panel().title(title).description(description).datasource(SOURCE).unit("short")
    panel.span(LINE_WIDTH).height(9).thresholds(PLAIN)
    names = {f"Value #{_letter(place)}": column.title for place, column in enumerate(columns)}
    for place, column in enumerate(columns):
        panel.with_target(_query(column.expression).instant().format(PromQueryFormat.TABLE).ref_id(_letter(place)))
        panel.override_by_name(column.title, _properties(column))
    panel.with_transformation(DataTransformerConfig("joinByField", options={"byField": "instance", "mode": "outer"}))
    hidden = {"Time": True} | {f"Time {place + 1}": True for place in range(len(columns))}
    panel.with_transformation(
        DataTransformerConfig("organize", options={"excludeByName": hidden, "renameByName": names})
    )
    return panel


def _letter(place: int) -> str:
    return chr(ord("A") + place)


def _properties(column: Column) -> list[DynamicConfigValue]:
    found = [DynamicConfigValue("unit", column.unit)]
    if column.limits:
        found.append(DynamicConfigValue("thresholds", column.limits.thresholds().build()))
        found.append(DynamicConfigValue("custom.cellOptions", {"type": "color-text"}))
    return found


def _query(expression: str) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(SOURCE).expr(expression.replace("$scope", SCOPE))


@dataclass(frozen=True)
class Row:
    """A heading and its panels, in lines of 24 columns."""

    title: str
    panels: Sequence[Panel]
    repeat: str = ""
    """Name of the variable for each of whose values the row is there once; folded then."""


def board(title: str, description: str, *, uid: str, members: str, rows: Sequence[Row]) -> dict[str, Any]:
    """A dashboard as Grafana reads it; `members`: a metric of every instance that may be chosen."""
    made = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["chord-rl"])
        .editable()
        .time("now-3h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("chord-rl")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["chord-rl"])
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", f"label_values({members}, job)"))
        .with_variable(_variable("run", f'label_values({members}{{job=~"$job"}}, run)', has_all=False))
        .with_variable(_variable("instance", f'label_values({members}{{job=~"$job", run="$run"}}, instance)'))
    )
    for row in rows:
        heading = dashboard.Row(row.title)
        if not row.repeat:
            made.with_row(heading)
            for panel in row.panels:
                made.with_panel(panel)
            continue
        for panel in row.panels:
            heading.with_panel(panel)
        made.with_row(heading.repeat(row.repeat))
    return _numbered(made)


def _variable(name: str, query: str, *, has_all: bool = True) -> dashboard.QueryVariable:
    variable = (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query(query)
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
    )
    if not has_all:
        return variable
    return variable.multi(True).include_all(True).all_value(".*").current(VariableOption(text="All", value="$__all"))


def _numbered(made: dashboard.Dashboard) -> dict[str, Any]:
    """With an id for each panel: links to panels then last."""
    found = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    number = 0
    for panel in found["panels"]:
        for one in (panel, *panel.get("panels", ())):
            number += 1
            one["id"] = number
    return found
