"""What a step tells first_quarter_hour.sh beside passing or failing: figures and versions, a JSON object each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "RLAIF_GPU_RECORDS"  # the file of the step that runs; unset outside the script


def record(line: dict[str, Any]) -> None:
    """Prints it, and hands it to the script that runs this step."""
    text = json.dumps(line)
    print(text, flush=True)
    if VARIABLE in os.environ:
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.write(text + "\n")
