"""The report of a run: one HTML page that loads nothing else."""

from gcahng.report.options import ReportOptions
from gcahng.report.write import write_report

__all__ = ["ReportOptions", "write_report"]
