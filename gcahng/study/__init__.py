"""Studies: methods, each with the same seeds on the same data sets, compared by paired tests."""

from gcahng.study.plan import Method, Run, Study, read_study
from gcahng.study.runs import finish_study

__all__ = ["Method", "Run", "Study", "finish_study", "read_study"]
