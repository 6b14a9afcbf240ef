"""The processes of one job: how they find, watch and tell each other."""

from gcahng.processes.group import ALONE, TIMEOUT, OtherProcessFailed, Processes, alone, run_processes

__all__ = ["ALONE", "TIMEOUT", "OtherProcessFailed", "Processes", "alone", "run_processes"]
