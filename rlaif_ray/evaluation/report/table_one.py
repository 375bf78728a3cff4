"""Arms laid out like Table 1 of Lee et al. (2309.00267), this project's figures beside the paper's.

The paper's are percentages that people gave on PaLM 2 policies of its own data: something to hold ours against, no
target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlaif_ray.documents import at
from rlaif_ray.evaluation.report.runs import Json, Run

TASKS = {"summary": "Summarization", "helpful": "Helpful dialogue"}

# (arm, against): per task the win rate and, where the paper has it, the rate at equal length; percent.
PAPER: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {
    ("rlaif", "sft"): {"summary": (71, 59), "helpful": (63, 61)},
    ("rlhf", "sft"): {"summary": (73, 61), "helpful": (64, 61)},
    ("rlaif", "rlhf"): {"summary": (50, 47), "helpful": (52, 50)},
    ("same-size rlaif", "sft"): {"summary": (68, 59)},
    ("d-rlaif", "sft"): {"summary": (74, 65), "helpful": (66, None)},
    ("d-rlaif", "same-size rlaif"): {"summary": (60, 56)},
}
PAPER_HARMLESS: dict[str, tuple[float, float]] = {"sft": (64, 64), "rlhf": (76, 78), "rlaif": (88, 91)}
ALIASES = {"direct rlaif": "d-rlaif", "d rlaif": "d-rlaif", "drlaif": "d-rlaif", "same size rlaif": "same-size rlaif"}


@dataclass(slots=True)
class Row:
    """One comparison, or one policy of the harmless table."""

    name: str
    ours: dict[str, list[tuple[int, Json]]] = field(default_factory=dict)  # by task: run, and what it measured
    paper: dict[str, tuple[float, float | None]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableOne:
    """Both halves of the table; `tasks` are the columns of the left one, by label template."""

    tasks: dict[str, str]
    comparisons: list[Row]
    policies: list[Row]

    @property
    def measured(self) -> bool:
        """Whether any run has a figure for it."""
        return any(row.ours for row in [*self.comparisons, *self.policies])


def table_one(runs: Sequence[Run]) -> TableOne:
    """The paper's rows in its order, ours in theirs where arms have the same names, and below them the rest."""
    comparisons = {pair: Row(f"{_shown(pair[0])} vs {_shown(pair[1])}", paper=dict(p)) for pair, p in PAPER.items()}
    policies = {name: Row(_shown(name), paper={"harmless": p}) for name, p in PAPER_HARMLESS.items()}
    tasks = dict(TASKS)
    for number, run in enumerate(runs):
        task = str(run.given("label", "template") or "helpful")
        for found in met(run):
            pair = _known(found["a"]), _known(found["b"])
            row = comparisons.setdefault(pair, Row(f"{found['a']} vs {found['b']}"))
            row.ours.setdefault(task, []).append((number, found))
            tasks.setdefault(task, task.rpartition("/")[2].removesuffix(".yaml"))
        for arm, rates in harmless_arms(run).items():
            row = policies.setdefault(_known(arm), Row(arm))
            row.ours.setdefault("harmless", []).append((number, rates))
    return TableOne(tasks, list(comparisons.values()), list(policies.values()))


def met(run: Run) -> Iterator[Json]:
    """The comparisons of an evaluation that have a win rate."""
    for found in run.summary.get("win_rates") or []:
        if isinstance(found, dict) and at(found, "win_rate", "rate") is not None and {"a", "b"} <= found.keys():
            yield found


def harmless_arms(run: Run) -> dict[str, Json]:
    """Harmless rates of an evaluation by arm: `rate`, `over_refusal`, `corrected`."""
    arms = at(run.summary, "harmless", "arms")
    return {n: one for n, one in (arms or {}).items() if at(one, "rate", "rate") is not None}


def _known(arm: str) -> str:
    plain = " ".join(arm.lower().replace("_", " ").replace("-", " ").split())
    return ALIASES.get(plain, plain)


def _shown(arm: str) -> str:
    return {"d-rlaif": "d-RLAIF", "same-size rlaif": "Same-size RLAIF"}.get(arm, arm.upper())
