"""The processes of one job: how they find, watch and tell each other."""

from gcahng.processes.group import ALONE, OtherProcessFailed, Processes, run_processes

__all__ = ["ALONE", "OtherProcessFailed", "Processes", "run_processes"]
