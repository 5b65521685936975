"""The offline side of eplb-dump: open a run, get polars frames, compute the field's figures.

>>> run = open_run("dumps")                                          # doctest: +SKIP
>>> run.balancedness("balancedness", by="layer")                     # doctest: +SKIP
>>> summarize(run).idle_fraction                                     # doctest: +SKIP

The names in ``__all__`` are the public API. They are imported on first use, so that
``eplb-analyze --help`` does not wait for polars and pyarrow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eplb_analyze import json_report

if TYPE_CHECKING:
    from eplb_analyze.analysis.check import CheckReport as CheckReport
    from eplb_analyze.analysis.check import check_run as check_run
    from eplb_analyze.analysis.compare import Comparison as Comparison
    from eplb_analyze.analysis.compare import compare_runs as compare_runs
    from eplb_analyze.analysis.experts import ExpertReport as ExpertReport
    from eplb_analyze.analysis.experts import expert_report as expert_report
    from eplb_analyze.analysis.layer import layer_report as layer_report
    from eplb_analyze.analysis.layer_report import LayerReport as LayerReport
    from eplb_analyze.analysis.placement import PlacementReport as PlacementReport
    from eplb_analyze.analysis.placement import placement_report as placement_report
    from eplb_analyze.analysis.ranks import RankReport as RankReport
    from eplb_analyze.analysis.ranks import rank_report as rank_report
    from eplb_analyze.analysis.rearrangements import RearrangementReport as RearrangementReport
    from eplb_analyze.analysis.rearrangements import rearrangement_report as rearrangement_report
    from eplb_analyze.analysis.summary import summarize as summarize
    from eplb_analyze.analysis.summary_report import Summary as Summary
    from eplb_analyze.analysis.timeline import timeline as timeline
    from eplb_analyze.analysis.timeline_report import Timeline as Timeline
    from eplb_analyze.analysis.traffic import TrafficReport as TrafficReport
    from eplb_analyze.analysis.traffic import traffic_report as traffic_report
    from eplb_analyze.errors import AnalyzeError as AnalyzeError
    from eplb_analyze.errors import DumpError as DumpError
    from eplb_analyze.errors import Finding as Finding
    from eplb_analyze.errors import NotInDumpError as NotInDumpError
    from eplb_analyze.errors import UsageError as UsageError
    from eplb_analyze.live.watch import Follower as Follower
    from eplb_analyze.metrics.formulas import FORMULAS as FORMULAS
    from eplb_analyze.reader.recorded_setting import Setting as Setting
    from eplb_analyze.reader.run import Run as Run
    from eplb_analyze.reader.run import open_run as open_run
    from eplb_analyze.reader.run_info import RunInfo as RunInfo
    from eplb_analyze.replay.advice import Advice as Advice
    from eplb_analyze.replay.advise import advise as advise
    from eplb_analyze.replay.replay import Replay as Replay
    from eplb_analyze.replay.replay import replay_run as replay_run
    from eplb_analyze.replay.settings import Choices as Choices
    from eplb_analyze.sessions.segments import DamagedSegmentError as DamagedSegmentError
    from eplb_analyze.sessions.step_range import StepRange as StepRange
    from eplb_analyze.storage.bucket import UnreachableError as UnreachableError

_EXPORTS = {
    "analysis.check": ["CheckReport", "check_run"],
    "analysis.compare": ["Comparison", "compare_runs"],
    "analysis.experts": ["ExpertReport", "expert_report"],
    "analysis.layer": ["layer_report"],
    "analysis.layer_report": ["LayerReport"],
    "analysis.placement": ["PlacementReport", "placement_report"],
    "analysis.ranks": ["RankReport", "rank_report"],
    "analysis.rearrangements": ["RearrangementReport", "rearrangement_report"],
    "analysis.summary": ["Summary", "summarize"],
    "analysis.timeline": ["Timeline", "timeline"],
    "analysis.traffic": ["TrafficReport", "traffic_report"],
    "errors": ["AnalyzeError", "DumpError", "Finding", "NotInDumpError", "UsageError"],
    "live.watch": ["Follower"],
    "metrics.formulas": ["FORMULAS"],
    "reader.recorded_setting": ["Setting"],
    "reader.run": ["Run", "open_run"],
    "reader.run_info": ["RunInfo"],
    "replay.advice": ["Advice"],
    "replay.advise": ["advise"],
    "replay.replay": ["Replay", "replay_run"],
    "replay.settings": ["Choices"],
    "sessions.segments": ["DamagedSegmentError"],
    "sessions.step_range": ["StepRange"],
    "storage.bucket": ["UnreachableError"],
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _html(report: json_report.Report) -> str | None:
    html: str | None = import_module(f"{__name__}.cli.notebook").html(report)
    return html


json_report.show_in_notebooks(_html)
