"""`rlaif <job> CONFIG... [key=value...] [--dry-run]`.

Exit codes: 0 done; 2 the user's input is wrong; 1 the run failed; 130 interrupted. Nothing heavy is imported before
the arguments are parsed, so that --help and a wrong config answer at once.
"""

from __future__ import annotations

import os
import re
import shlex
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from rlaif_ray import __version__
from rlaif_ray.errors import InputError, RlaifError
from rlaif_ray.output import say, say_as_is, shown, survive_lost_output
from rlaif_ray.secrecy import masked_word
from rlaif_ray.writing import open_to_append

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded

app = typer.Typer(
    name="rlaif",
    help="Reinforcement learning from AI feedback, on Ray, vLLM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG... [key=value...]",
        help="YAML files, merged left to right, then single settings such as learner.lr=1e-6.",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved config and the placement; start nothing.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"rlaif {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """RLAIF: each command is a job with a config of its own."""


class _Job(NamedTuple):
    """A job whose command has no options of its own; functions are named by module in pipelines/."""

    start: str
    plan: str
    help: str


_RESUMES = "A run goes on from its newest checkpoint when its run_dir has one."
_GOES_ON = "Goes on where it was ended, when started again with the same output or run_dir."
_JOBS = {
    "train": _Job(
        "rl.train_rl",
        "rl.plan_rl",
        f"RL from AI feedback: trains a policy against a judge or a reward model.\n\n{_RESUMES}",
    ),
    "pairs": _Job(
        "pairs.make_pairs",
        "pairs.plan_pairs",
        f"Samples responses to compare: two or more per prompt, from one or more policies.\n\n{_GOES_ON}",
    ),
    "sample": _Job(
        "sampling.sample_responses",
        "sampling.plan_sample",
        f"A policy's responses, or the best of several by a judge, as records to fine-tune on.\n\n{_GOES_ON}",
    ),
    "revise": _Job(
        "constitution.revise",
        "constitution.plan_revise",
        f"Responses, critiques and revisions by a constitution, as records to fine-tune on.\n\n{_GOES_ON}",
    ),
    "sft": _Job(
        "supervised.fine_tune",
        "supervised.plan_supervised",
        f"Supervised fine-tuning on conversations: the loss is on the assistant's tokens only.\n\n{_RESUMES}",
    ),
    "reward-model": _Job(
        "reward.train_reward_model",
        "supervised.plan_supervised",
        f"Trains a reward model on preference records, with soft or hard labels.\n\n{_RESUMES}",
    ),
    "dpo": _Job(
        "dpo.train_dpo",
        "supervised.plan_supervised",
        f"Direct preference optimisation: a policy from preference records, without a reward model.\n\n{_RESUMES}",
    ),
    "evaluate": _Job(
        "evaluate.evaluate",
        "evaluate.plan_evaluation",
        "AI labeler alignment against people's labels, win rates of models against each other, harmless rates.\n\n"
        "Goes on where it was ended, when started again with the same run_dir.",
    ),
}


def _add_command(name: str, job: _Job) -> None:
    def command(arguments: Arguments, dry_run: DryRun = False) -> None:
        def of(function: str) -> Callable[[Loaded], str]:
            # Once it runs, and not before: a pipeline imports torch, Ray and more.
            module, _, name = function.partition(".")
            return lambda loaded: getattr(import_module(f"rlaif_ray.pipelines.{module}"), name)(loaded)

        _run(name, arguments, of(job.plan) if dry_run else None, of(job.start))

    app.command(name, help=job.help)(command)


for _name, _described in _JOBS.items():
    _add_command(_name, _described)


@app.command()
def label(
    arguments: Arguments,
    dry_run: DryRun = False,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Also write this many labels for a person to check.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The file for --sample.")] = Path("review.csv"),
    reviewed: Annotated[
        Path | None, typer.Option("--reviewed", help="A checked file of --sample: its answers become human labels.")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="trl: also write prompt/chosen/rejected rows beside the output.")
    ] = "records",
    to_argilla: Annotated[
        str | None, typer.Option("--to-argilla", help="Also push the records to this Argilla data set.")
    ] = None,
    from_argilla: Annotated[
        str | None, typer.Option("--from-argilla", help="An Argilla data set whose answers become human labels.")
    ] = None,
) -> None:
    """AI preference labels for pairs of responses.

    Goes on where it was ended, when started again with the same output or run_dir; what a judge answered once is
    not asked again.
    """

    def plan(loaded: Loaded) -> str:
        from rlaif_ray.pipelines.preferences import plan_labels

        return plan_labels(loaded)

    def start(loaded: Loaded) -> None:
        from rlaif_ray.pipelines.preferences import make_labels
        from rlaif_ray.pipelines.review import Review

        review = Review(format, sample, out, reviewed, to_argilla, from_argilla)
        review.check()
        review.after(Path(make_labels(loaded)["output"]), loaded.config.seed)

    _run("label", arguments, plan if dry_run else None, start)


@app.command()
def pipeline(
    arguments: Arguments,
    dry_run: DryRun = False,
    start: Annotated[
        str | None, typer.Option("--from", help="Do this stage and all that build on it once more.", metavar="STAGE")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Do no other stage than this.", metavar="STAGE")] = None,
) -> None:
    """Several jobs that build on each other, as stages of one.

    Does what isn't done yet or has changed; goes on where it was ended, when started again.
    """

    def load(files: Sequence[Path], overrides: Sequence[str]) -> Any:
        from rlaif_ray.config.pipeline import load_pipeline

        return load_pipeline(files, overrides)

    def plan(loaded: Any) -> str:
        from rlaif_ray.pipelines.pipeline import plan_pipeline

        return plan_pipeline(loaded)

    def run(loaded: Any) -> None:
        from rlaif_ray.pipelines.pipeline import run_pipeline

        run_pipeline(loaded, start=start, only=only)

    _run("pipeline", arguments, plan if dry_run else None, run, load=load)


@app.command()
def plan(
    arguments: Arguments,
    job: Annotated[
        str | None, typer.Option("--job", help="Whose config it is, where that can't be told.", show_default=False)
    ] = None,
    gpu_memory: Annotated[
        float, typer.Option("--gpu-memory", min=1, help="GiB in a GPU's name, such as 80; CUDA gives 98.9%.")
    ] = 80.0,
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1)] = 8,
    host_memory: Annotated[
        float | None,
        typer.Option(
            "--host-memory",
            min=1,
            help="GiB of a node's own memory; without it that is checked only for a job on this machine's CPUs.",
            show_default=False,
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            "--bandwidth",
            min=0.001,
            help="GB/s of a weight sync, in place of 200 by NVLink, 40 by RDMA, 5 by TCP, 300 by ipc, 0.6 by shm. Over "
            "several nodes that of a node's network.",
            show_default=False,
        ),
    ] = None,
    disk_bandwidth: Annotated[
        float, typer.Option("--disk-bandwidth", min=0.001, help="GB/s of the storage of checkpoints.")
    ] = 2.0,
    model_params: Annotated[
        list[str] | None,
        typer.Option(
            "--model-params",
            metavar="NAME=COUNT",
            help="Parameters of a model that isn't known here.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Where a config's actors go and what they hold, before anything starts; also of a pipeline's stages.

    Needs no GPU and no network. Exit code 0: it fits; 1: it doesn't, and the nearest settings that do are shown;
    2: wrong input.
    """
    try:
        from rlaif_ray.pipelines.plan import make_plan

        files, overrides = _split(arguments)
        fits = make_plan(
            files,
            overrides,
            job=job,
            gpu_memory=gpu_memory,
            gpus_per_node=gpus_per_node,
            host_memory=host_memory,
            bandwidth=bandwidth,
            disk_bandwidth=disk_bandwidth,
            model_params=model_params or (),
            as_json=as_json,
        )
    except KeyboardInterrupt:
        _say("interrupted.")
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(_report("plan", error, None)) from None
    raise typer.Exit(0 if fits else 1)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run folders, a pipeline's too.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; default report.html in the first.", show_default=False)
    ] = None,
    labels: Annotated[
        list[Path] | None,
        typer.Option(
            "--labels",
            help="Records that a run wrote outside of its folder; else nothing there is read.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """One HTML page of what runs left behind: curves, measures, and their samples.

    Works while a run is going and on one that crashed; the page needs no network.
    """
    try:
        from rlaif_ray.pipelines.report import make_report

        say(str(make_report(runs, out, labels or ())))
    except KeyboardInterrupt:
        _say("interrupted.")
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(_report("report", error, None)) from None


def _run(
    job: str,
    arguments: Sequence[str],
    plan: Callable[[Loaded], str] | None,
    start: Callable[[Loaded], object],
    load: Callable[[Sequence[Path], Sequence[str]], Any] | None = None,
) -> None:
    """Loads the config, then plans (a dry run) or starts; ends the process with the exit code that fits."""
    loaded: Loaded | None = None
    try:
        from rlaif_ray.config.load import load_job

        files, overrides = _split(arguments)
        loaded = load(files, overrides) if load is not None else load_job(job, files, overrides)
        import_module("rlaif_ray.pipelines.model_checks").check_models(*_jobs(loaded), dry_run=plan is not None)
        if plan is not None:
            say(_resolved(loaded))
            say(plan(loaded))
        else:
            start(loaded)
    except KeyboardInterrupt:
        _say("interrupted.")
        if loaded is not None and plan is None:
            _say_how_to_resume(loaded)
        raise typer.Exit(130) from None
    except Exception as error:
        raise typer.Exit(_report(job, error, None if plan else loaded)) from None


def _jobs(loaded: Any) -> list[Any]:
    """The configs of the jobs that will run: one, or a pipeline's stages."""
    stages = getattr(loaded, "stages", None)
    return [loaded.config] if stages is None else [stage.config for stage in stages]


def _split(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Config files and key=value settings, told apart by the dotted name before the first `=`."""
    overrides = [text for text in arguments if re.match(r"[A-Za-z_]\w*(\.[A-Za-z_][\w-]*)*=", text)]
    files = [Path(text) for text in arguments if text not in overrides]
    if not files:
        raise InputError(
            f"a config file is needed (got only settings: {' '.join(overrides)}): it names the run. "
            f"Name one before them, e.g. configs/demo/train.yaml."
        )
    return files, overrides


def _resolved(loaded: Loaded) -> str:
    from rlaif_ray.config.resolved import git_revision, resolved_yaml, versions

    return resolved_yaml(loaded, versions(), git_revision(Path(__file__).parent))


def _report(job: str, error: Exception, loaded: Loaded | None) -> int:
    """Says on stderr what went wrong and how to go on; returns the exit code. `loaded` once a run has started."""
    cause = _cause(error)
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("RLAIF_DEBUG") == "1":
        say(trace, error=True)
    if isinstance(cause, InputError):
        _say(str(cause))
        return 2
    if isinstance(cause, RlaifError):
        what = str(cause)
    else:
        lines = [line for line in str(cause).splitlines() if line.strip()]
        what = lines[0] if lines else "no message"
    headline = f"{job} failed: {type(cause).__name__}: {what}"
    if loaded is None:
        _say(headline, *([] if isinstance(cause, RlaifError) else [trace]))
        return 1
    log = _write_log(loaded.run_dir, trace)
    _say(
        headline,
        f"logs: {loaded.run_dir}" + (f" (traceback: {log})" if log else ""),
        *getattr(error, "__notes__", []),  # such as where Ray's logs are
    )
    _say_how_to_resume(loaded)
    if log is None:
        say(f"  The traceback could not be written there, so here it is:\n{trace}", error=True)
    return 1


def _cause(error: BaseException) -> BaseException:
    """The exception behind Ray's: it wraps an actor's in a RayTaskError with the original as `cause`."""
    inner = getattr(error, "cause", None)
    return _cause(inner) if isinstance(inner, BaseException) and inner is not error else error


def _write_log(run_dir: Path, trace: str) -> Path | None:
    log = run_dir / "error.log"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open_to_append(log) as file:
            text = f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{shown(trace)}\n"
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError:
        return None
    return log


def _say_how_to_resume(loaded: Loaded) -> None:
    say_as_is(f"  resume: {_resume_command(loaded)}", error=True)


def _resume_command(loaded: Loaded) -> str:
    """What the user typed, with the folder that a default made up."""
    words = [*map(str, loaded.files), *loaded.overrides]
    if not loaded.run_dir_given:
        words.append(f"run_dir={loaded.run_dir}")
    checkpoint = getattr(loaded.config, "checkpoint", None)
    if checkpoint is not None and checkpoint.resume == "never":
        words.append("checkpoint.resume=auto")
    return shlex.join(["rlaif", loaded.job, *map(masked_word, words)])


def _say(message: str, *more: str) -> None:
    say("\n".join([f"rlaif: {message}", *(f"  {line}" for line in more)]), error=True)


def main() -> None:
    """The `rlaif` program."""
    survive_lost_output()
    app(prog_name="rlaif")


if __name__ == "__main__":
    main()
