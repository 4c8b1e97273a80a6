"""The search for a plan: what may be chosen, how each choice is tried, and which is best."""

from distserve_planner.selection.problem import Effort, Problem
from distserve_planner.selection.run import SearchResult, search
from distserve_planner.selection.trials import FromFit, FromProfile, FromTables, LatencySource

__all__ = ["Effort", "FromFit", "FromProfile", "FromTables", "LatencySource", "Problem", "SearchResult", "search"]
