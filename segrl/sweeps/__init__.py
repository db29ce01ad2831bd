"""Tables of a paper as runs: every row a command, under several seeds, with the paper's numbers beside."""

from segrl.sweeps.jobs import Job, plan_sweep
from segrl.sweeps.running import run_sweep
from segrl.sweeps.summary import summarise_sweep, sweep_table

__all__ = ["Job", "plan_sweep", "run_sweep", "summarise_sweep", "sweep_table"]
