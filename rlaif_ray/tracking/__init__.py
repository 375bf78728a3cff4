"""What a run shows while it goes and leaves when it ends: files, wandb, live progress, summary.

files.py      JSON lines and JSON in the run folder, cut back on resume
tracker.py    open_tracker, Tracker, StepMetrics: the one object the loop talks to
wandb_run.py  wandb, which may fail but never stops a run; secrets masked
console.py    draws on the terminal, and shows of texts only their letters
display.py    progress on a terminal, plain lines elsewhere, the closing table
memory.py     peak memory of the run's processes
"""

from rlaif_ray.tracking.display import print_summary
from rlaif_ray.tracking.tracker import PHASES, StepMetrics, Tracker, open_tracker

__all__ = ["PHASES", "StepMetrics", "Tracker", "open_tracker", "print_summary"]
