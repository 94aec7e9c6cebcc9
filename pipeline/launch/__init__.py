"""How a grid is run: the engine, which decides what starts when, and backends, which start it here or elsewhere.

A job is always the same child process, `pipeline.launch.worker`, that runs the commands of stages one after the other;
so a stage does not know how it was started. Processes find out by a heartbeat that their grid has ended, and state is
in plain files.
"""

from pipeline.host.heartbeat import Heartbeat
from pipeline.launch._engine import Options, run_jobs
from pipeline.launch._job import Attempt, Device, Ended, Event, Job, Work
from pipeline.launch._state import GridState

__all__ = ["Attempt", "Device", "Ended", "Event", "GridState", "Heartbeat", "Job", "Options", "Work", "run_jobs"]
