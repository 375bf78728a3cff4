"""A judge's model at work: on engines of ours or behind an endpoint, with a memory of what it has answered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.sections import JudgeConfig, LongerJudge, OpenAIJudge
from rlaif_ray.data.identity import model_content
from rlaif_ray.feedback.local import LocalAsker
from rlaif_ray.feedback.remembered import Memory, RememberingAsker
from rlaif_ray.feedback.remote import OpenAIAsker
from rlaif_ray.pipelines.begun import in_precision_of, keep_precision
from rlaif_ray.pipelines.streaming import CHUNK
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.tracking.progress import ItemProgress

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import LabelJob


@contextmanager
def open_asker(
    job: LabelJob, chat: Any, context: int, state: Path, progress: ItemProgress
) -> Iterator[tuple[RememberingAsker, int]]:
    """The judge's model at work, which remembers its answers in `state`; and how many chunks keep it busy."""
    job = in_precision_of(job, state)
    judge = job.judge
    assert not isinstance(judge, LongerJudge), "it has no model"
    with ExitStack() as stack:
        memory = Memory(state / "answers.sqlite")
        stack.callback(memory.close)
        asker: Any
        if isinstance(judge, OpenAIJudge):
            asker = OpenAIAsker(judge, spent=memory.spent())
            stack.callback(asker.close)
            at_once = 2 + 2 * math.ceil(judge.concurrency / (2 * CHUNK))  # some wait for their slowest answer
        else:
            progress.note(f"starting engines for {judge.model}")
            cluster = stack.enter_context(open_cluster(job))
            keep_precision(state, cluster.precisions())
            engines = cluster.start_judges(judge, context=context)
            cluster.wait()
            asker = LocalAsker(
                engines,
                chat,
                context,
                judge.model,
                identity=_judge_identity(judge, cluster.precision(judge.precision)),
                prices=(judge.price_in, judge.price_out),
            )
            at_once = 1 + judge.replicas  # the next chunk is ready when an engine is
        yield RememberingAsker(asker, memory), at_once


def _judge_identity(judge: JudgeConfig, precision: str) -> str:
    """What answers depend on beside the question: after the model was trained anew in place they are other ones, and
    where `precision` is left to the machine, on another one."""
    content = model_content(judge.model, judge.revision)
    return f"vllm/{content.known_by}/{precision}/{judge.max_context}"
