"""Write Grafana's dashboards: `python -m cluster.monitoring.dashboards` makes grafana/dashboards/*.json from panels.py.

grafana-foundation-sdk (Grafana's own builder library, of the extra `test`) writes the JSON; the files are checked in, and a test
says when they differ.
"""

import argparse
import json
import sys
from pathlib import Path

from cluster.monitoring.panels import BOARDS, Board, Panel
from data_pipeline.command import command_line

FOLDER = Path(__file__).resolve().parent / "grafana" / "dashboards"
COLUMNS, HEIGHT = 2, 8  # Grafana's grid is 24 wide


def render(board: Board) -> str:
    """Return a dashboard's JSON."""
    from grafana_foundation_sdk.builders import dashboard
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

    source = DataSourceRef(type_val="prometheus", uid="prometheus")
    run = (
        dashboard.QueryVariable("run")
        .label("run")
        .datasource(source)
        .query({"query": "label_values(evenkeel_images_seen, run)", "refId": "run"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current({"selected": True, "text": "All", "value": "$__all"})
    )
    built = dashboard.Dashboard(board.title).uid(board.uid).tags(["evenkeel"]).refresh("30s").time("now-6h", "now")
    built = built.tooltip(DashboardCursorSync.CROSSHAIR).with_variable(run)
    for number, panel in enumerate(board.panels):
        built = built.with_panel(_graph(panel, number, source))
    return json.dumps(_without_empty(json.loads(JSONEncoder(sort_keys=True).encode(built.build()))), indent=1) + "\n"


def _graph(panel: Panel, number: int, source):
    from grafana_foundation_sdk.builders import common, prometheus, timeseries
    from grafana_foundation_sdk.models.common import (
        LegendDisplayMode,
        LegendPlacement,
        ScaleDistribution,
        VisibilityMode,
    )
    from grafana_foundation_sdk.models.dashboard import GridPos

    width = 24 // COLUMNS
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    graph = (
        timeseries.Panel()
        .id(number + 1)
        .title(panel.title)
        .datasource(source)
        .unit(panel.unit)
        .legend(legend.show_legend(True).calcs([]))
        .show_points(VisibilityMode.AUTO)
        .grid_pos(GridPos(h=HEIGHT, w=width, x=number % COLUMNS * width, y=number // COLUMNS * HEIGHT))
    )
    if panel.log:
        graph = graph.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    for letter, (query, name) in zip("ABCD", panel.queries, strict=False):
        graph = graph.with_target(prometheus.Dataquery().expr(query).legend_format(name).ref_id(letter).range())
    return graph


def _without_empty(value):
    """Drop the `auto` keys of query variables, which the library writes and Grafana's schema does not know."""
    if isinstance(value, dict):
        return {
            k: _without_empty(v) for k, v in value.items() if not k.startswith("auto") or value.get("type") != "query"
        }
    return [_without_empty(v) for v in value] if isinstance(value, list) else value


@command_line()
def main(argv: list[str] | None = None) -> int:
    """Write the files and print their names."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.monitoring.dashboards", description=__doc__.splitlines()[0]
    )
    parser.parse_args(argv)
    try:
        texts = {FOLDER / f"{board.uid}.json": render(board) for board in BOARDS}
    except ImportError as error:
        raise ValueError(
            f"{error}: dashboards are written with grafana-foundation-sdk; pip install '.[test]'"
        ) from None
    for path, text in texts.items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
