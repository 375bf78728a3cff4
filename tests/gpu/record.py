"""What a step tells first_quarter_hour.sh beside passing or failing: figures and versions, a JSON object each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "RLAIF_GPU_RECORDS"  # the file of the step that runs; unset outside the script


def record(line: dict[str, Any]) -> None:
    """Prints it, and hands it to the script that runs this step."""
    print(json.dumps(line), flush=True)
    hand_over(line)


def hand_over(line: dict[str, Any]) -> None:
    """To the script that runs this step, if one does."""
    if VARIABLE in os.environ:
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.write(json.dumps(line) + "\n")
