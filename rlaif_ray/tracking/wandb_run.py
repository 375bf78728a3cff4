"""wandb, the only importer of it. It may fail; the run goes on, told once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlaif_ray.secrecy import without_secrets
from rlaif_ray.tracking.files import plain
from rlaif_ray.writing import replace_text

RUN_ID = "wandb_run_id.txt"  # in the run folder
_INIT_TIMEOUT_S = 30  # without a network wandb waits this long before we go offline
_FINISH_TIMEOUT_S = 300.0  # for uploads at the end
_FLUSH_S = 1.0  # what a killed process loses of the offline file; wandb's default is 15


class TrackingSettings(Protocol):
    """What tracking needs of its config (config.jobs.TrackingConfig)."""

    @property
    def wandb(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def entity(self) -> str | None: ...
    @property
    def tags(self) -> tuple[str, ...]: ...
    @property
    def samples_per_step(self) -> int: ...


def keep_run_id(run_dir: Path, run_id: str) -> None:
    """So that a run folder on another machine goes on with the same wandb run; what it knows by itself stays.

    An id that could not be one of ours is left out: it comes from a file, and ends in names of files.
    """
    path = run_dir / RUN_ID
    if not path.exists() and re.fullmatch(r"[0-9a-f]{8}", run_id):
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(path, run_id + "\n")


class WandbRun:
    """One wandb run, the same across resumes (its id stands in `wandb_run_id.txt`).

    wandb keeps one row per step and takes no step twice. A run resumed online therefore keeps there the rows that the
    killed process had already sent; metrics.jsonl has those of the resumed one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        config: Mapping[str, Any],
        tracking: TrackingSettings,
        name: str,
        resumed: bool,
        warn: Callable[[str], None],
    ) -> None:
        self.failures = 0  # calls that wandb failed
        self._gone = False  # its process was ended under us: `ray job stop` sends SIGTERM to a job's whole family
        self._dir = run_dir
        self._tracking = tracking
        self._warn = warn
        self._run: Any = None
        self.run_id: str | None = None
        self.mode = _mode(tracking.wandb)
        if self.mode == "disabled":
            return
        with self._guarded("start"), self._environment():
            self._open(without_secrets(config), name, resumed)

    def _open(self, config: dict[str, Any], name: str, resumed: bool) -> None:
        id_path = self._dir / RUN_ID
        run_id = id_path.read_text().strip() if resumed and id_path.exists() else ""
        if not re.fullmatch(r"[\w-]{1,64}", run_id):
            import secrets

            run_id = secrets.token_hex(4)
            replace_text(id_path, run_id + "\n")
        self.run_id = run_id
        if self.mode == "online":
            try:
                self._run = self._init(run_id, config, name)
                return
            except Exception as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                self._warn(
                    f"wandb is not reachable ({reason[:200]}): going on offline, upload later with `wandb sync`."
                )
                self.mode = "offline"
                self._forget_service()
        self._run = self._init(run_id, config, name)

    def _forget_service(self) -> None:
        import wandb

        wandb.teardown(exit_code=1)  # it keeps the id of a run that could not start, and refuses it afterwards

    def _init(self, run_id: str, config: dict[str, Any], name: str) -> Any:
        import wandb

        settings: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "x_disable_meta": True,  # it would hold the command line, and secrets given there
            "init_timeout": _INIT_TIMEOUT_S,
            "login_timeout": _INIT_TIMEOUT_S,
            "finish_timeout": _FINISH_TIMEOUT_S,
            "x_transaction_log_flush_interval": _FLUSH_S,
        }
        known = wandb.Settings.model_fields  # another wandb may lack some
        return wandb.init(
            mode="online" if self.mode == "online" else "offline",
            dir=str(self._dir),
            project=self._tracking.project,
            entity=self._tracking.entity,
            tags=list(self._tracking.tags),
            name=name,
            id=run_id,
            resume="allow" if self.mode == "online" else None,  # offline, the equal id does it, when uploaded
            config=config,
            reinit="create_new",
            settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known}),
        )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Adds numbers to the row of `step`."""
        if self._run is not None:
            with self._guarded("log"):
                self._run.log({key: value for key, value in values.items() if value is not None}, step=step)

    def table(self, rows: list[dict[str, Any]], step: int) -> None:
        """Logs a fresh table `samples` (a logged one can't grow); wandb shows them by step."""
        if self._run is None or not rows:
            return
        with self._guarded("log samples"), self._environment():
            import wandb

            columns = list(dict.fromkeys(key for row in rows for key in row))
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            table = wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
            self._run.log({"samples": table}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._run is not None:
            with self._guarded("write the summary"):
                self._run.summary.update(flat(plain(values)))

    def finish(self, *, failed: bool) -> None:
        if self._run is not None:
            with self._guarded("finish"), self._environment():
                self._run.finish(exit_code=1 if failed else 0)
            self._run = None
            if self._gone:
                with self._guarded("end"):  # which also takes back what it would do, and say, at our exit
                    self._forget_service()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever wandb raises: the run matters more than its mirror
            self.failures += 1
            self._gone |= isinstance(error, ConnectionError)
            if self.failures == 1:
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._warn(f"wandb could not {what} ({reason}): going on, the run's own files are complete.")

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """wandb's files in the run folder, and its greetings unsaid; the user's own variables win."""
        folder = self._dir / "wandb"
        ours = {"WANDB_SILENT": "true", "WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
        added = {name: value for name, value in ours.items() if name not in os.environ}
        os.environ.update(added)
        try:
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)


def _mode(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") else "offline"


def _cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by `/`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}/"))
        else:
            result[f"{prefix}{key}"] = value
    return result
