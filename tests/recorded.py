"""What a tiny run of every job writes, to hold against what it writes after a change that must change nothing.

    python -m tests.recorded before.json     runs every job, and notes what it left (10 minutes)
    python -m tests.recorded after.json before.json     the same, and exit code 1 with what differs

Bits are those of one kind of CPU: record and compare on the same machine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.ray.test_pipeline import PIPELINE, write_constitution
from tests.runs import finish_train, rows, start, tiny_config
from tests.tiny import cached_tiny_model

FOLDER = Path("/tmp/rlaif-recorded")  # always the same: records name files
UNLIKE = re.compile(r"time/|_s$|per_s$|seconds|started|ended|pid|host|version|git|run_id|memory|mfu|date")
TRAININGS = {
    "ppo": [],
    "grpo": ["algorithm={type: grpo, kl: {coef: 0.05}}"],
    "reinforce": ["algorithm={type: reinforce}"],
    "rloo of two ranks": ["algorithm={type: rloo}", "learner.ranks=2", "learner.zero_stage=3"],
}


def runs() -> dict[str, Path]:
    """Runs every job; their folders."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    found = {}
    config = tiny_config(FOLDER)
    for name, settings in TRAININGS.items():
        found[name] = FOLDER / name.replace(" ", "-")
        program = finish_train(config, "tracking.wandb=disabled", *settings, run_dir=found[name])
        assert program.exit_code == 0, program.stderr
    write_constitution(FOLDER, "Which answer wastes fewer words?")
    constitution = FOLDER / "constitution.yaml"
    model = str(cached_tiny_model(tied=True, context=4096))
    (FOLDER / "pipeline.yaml").write_text(PIPELINE.format(model=model, constitution=constitution))
    words = [sys.executable, "-m", "rlaif_ray.cli", "pipeline", FOLDER / "pipeline.yaml", f"run_dir={FOLDER / 'all'}"]
    program = start(words, FOLDER / "all.out").wait(3600)
    assert program.exit_code == 0, program.stderr
    return found | {path.name: path.resolve() for path in sorted((FOLDER / "all" / "latest").iterdir())}


def noted(folder: Path) -> dict[str, Any]:
    """What a run left, by file: rows and documents without times, weights by their hash."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if name.startswith(("checkpoints", "wandb")) or not path.is_file():
            continue
        if path.suffix == ".jsonl":
            found[name] = [alike(row) for row in rows(path)]
        elif path.name == "summary.json":
            found[name] = alike(json.loads(path.read_text()))
        elif path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def alike(value: Any) -> Any:
    """Without what no two runs share."""
    if isinstance(value, dict):
        return {name: alike(each) for name, each in value.items() if not UNLIKE.search(name)}
    if isinstance(value, list):
        return [alike(each) for each in value]
    return re.sub(r"-[0-9a-f]{12}\b", "-HASH", value) if isinstance(value, str) else value  # of a stage's settings


def differences(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """Where they differ, and how."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from differences(before.get(name), after.get(name), f"{at}/{name}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (a, b) in enumerate(zip(before, after, strict=True)):
            yield from differences(a, b, f"{at}[{number}]")
    elif before != after:
        yield f"{at}: {str(before)[:200]} -> {str(after)[:200]}"


def main() -> int:
    after = {name: noted(folder) for name, folder in runs().items()}
    Path(sys.argv[1]).write_text(json.dumps(after, indent=1))
    print(f"{len(after)} runs, {sum(map(len, after.values()))} files: {sys.argv[1]}")
    if len(sys.argv) < 3:
        return 0
    found = list(differences(json.loads(Path(sys.argv[2]).read_text()), after))
    print("\n".join(found) or "nothing differs")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
