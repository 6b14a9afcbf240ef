"""The report of a run: one HTML page that needs nothing beside itself."""

from gcahng.report.write import write_report

__all__ = ["write_report"]
