"""Reading prompts: tokenised together against one by one, and how much memory a prompt takes.

Memory is measured in a process of its own each, with as many prompts and with twice as many: what one more takes.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import alternate, arguments, json_output, machine, medians, ratio, timed

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--tokenised", type=int, default=4096, help="of them, for the comparison of speed")
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.chat.renderer import ChatRenderer
    from rlaif_ray.data.prompts import read_conversations
    from rlaif_ray.models import load_tokenizer, resolve_model

    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "prompts.jsonl"
        with file.open("w") as lines:
            lines.writelines(rows(2 * args.prompts))
        render = ChatRenderer(load_tokenizer(args.model))
        talks = read_conversations(str(file), limit=args.tokenised)
        places = [f"line {number}" for number in range(1, len(talks) + 1)]
        sides = {
            "together": lambda k: timed(lambda: render.tokens_of(talks, places)),
            "one_by_one": lambda k: timed(lambda: [render.tokens(*one) for one in zip(talks, places, strict=True)]),
        }
        seconds = alternate(sides, args.rounds)
        model = str(resolve_model(args.model))
        single, double = (loaded(model, file, count) for count in (args.prompts, 2 * args.prompts))
    added = {key: (double[key] - single[key]) / args.prompts for key in ("held", "peak", "content")}
    return {
        "benchmark": "prompts",
        "ratio": ratio(seconds, "one_by_one", "together"),
        "ratio_memory": round(added["held"] / added["content"], 3),  # of one more prompt, over its text and tokens
        "ratio_peak": round(added["peak"] / added["content"], 3),
        "bytes_a_prompt": {key: round(value) for key, value in added.items()},
        "ratio_doubled_s": round(double["seconds"] / single["seconds"], 3),
        "prompts_per_s": round(2 * args.prompts / double["seconds"]),
        **medians(seconds),
        "prompts": args.prompts,
        "model": args.model,
        **machine(),
    }


def rows(count: int) -> Iterator[str]:
    """Lines of prompts of 20 to 120 words of this project's own texts, each with an id."""
    words = re.findall("[a-z]+", " ".join(path.read_text() for path in sorted(ROOT.glob("docs/*.md"))))
    draw = random.Random(0)
    for number in range(count):
        text = " ".join(draw.choices(words, k=draw.randint(20, 120)))
        yield json.dumps({"id": f"q{number:07}", "prompt": text}) + "\n"


def loaded(model: str, file: Path, count: int) -> dict[str, float]:
    """What the first `count` prompts take: bytes held and at the peak, of their content, and seconds."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: dict[str, float] = pool.apply(_load, (model, str(file), count))
        return found


def _load(model: str, file: str, count: int) -> dict[str, float]:
    from transformers import AutoTokenizer

    from rlaif_ray.data.prompts import load_prompts

    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    prompts = load_prompts(file, limit=count, tokenizer=tokenizer, max_prompt_tokens=100_000).prompts
    seconds = time.perf_counter() - began
    memory = {key: _status(key) for key in ("VmRSS", "VmHWM")}  # before the prompts are made one by one, below
    content = sum(len(p.text.encode()) + len(p.id) + 4 * len(p.tokens) for p in prompts)
    return {"held": memory["VmRSS"], "peak": memory["VmHWM"], "content": content, "seconds": seconds}


def _status(key: str) -> float:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024.0 * float(lines[key].split()[0])


if __name__ == "__main__":
    main()
