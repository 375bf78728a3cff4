"""From conversations to examples, batches that visit all once an epoch, and wrong rows."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from rlaif_ray.config.data_sections import SupervisedConfig
from rlaif_ray.config.jobs import SftJob
from rlaif_ray.data.demonstrations import read_demonstrations
from rlaif_ray.errors import InputError
from rlaif_ray.learner.finetune import stop_at
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines.supervised import batch_of, read_sft_inputs, total_steps
from tests.chat_families import enlarge, model_of
from tests.tiny import cached_tiny_model

TWO_TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Why <|im_end|>?"},
    {"role": "assistant", "content": "Because."},
]


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def inputs(path: Path, **sft: Any) -> Any:
    job = {"policy": {"model": str(cached_tiny_model(tied=True))}, "data": {"path": str(path)}}
    return read_sft_inputs(SftJob.model_validate({**job, "sft": {"held_out_fraction": 0.0, **sft}}))


def test_every_turn_of_the_assistant_is_learned_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(cached_tiny_model(tied=True))
    found = inputs(written(tmp_path / "d.jsonl", {"messages": TWO_TURNS}))
    first, second = found.train
    assert tokenizer.decode(first.prompt) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(first.response) == "Hello<|im_end|>"
    assert tokenizer.decode(second.prompt).endswith("Why <|im_end|>?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(second.response) == "Because.<|im_end|>"
    # What a user writes is text: the control token in it is spelt out.
    assert second.prompt.count(tokenizer.eos_token_id) == 3 and second.response.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("family", "end"), [("chatml", "<|im_end|>"), ("harmony", "<|return|>"), ("gemma", "<end_of_turn>")]
)
def test_the_last_token_that_is_learned_ends_the_turn(family: str, end: str, tmp_path: Path) -> None:
    """Of a base model with a chat template, whose EOS ends texts: the template's, not that one."""
    model = Path(model_of(family, tmp_path))
    tokenizer: Any = load_tokenizer(model)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "additional_special_tokens": [end]})
    tokenizer.save_pretrained(model)
    enlarge(model, len(tokenizer))
    data = written(tmp_path / "d.jsonl", {"messages": TWO_TURNS[:2]})
    job = {"policy": {"model": str(model)}, "data": {"path": str(data)}, "sft": {"held_out_fraction": 0.0}}
    (example,) = read_sft_inputs(SftJob.model_validate(job)).train
    assert tokenizer.convert_ids_to_tokens(example.response[-1]) == end
    assert tokenizer.eos_token_id not in example.response


@pytest.mark.parametrize(
    ("known", "stops"),
    [(None, 7), (2, [2, 7]), ([2, 5], [2, 5, 7]), (7, 7), ([2, 7], [2, 7])],
)
def test_a_saved_model_stops_at_what_it_was_trained_to_end_with(known: Any, stops: Any) -> None:
    settings = GenerationConfig(eos_token_id=known)
    stop_at(settings, (7,))
    assert settings.eos_token_id == stops


def test_prompt_and_response_rows_are_the_same(tmp_path: Path) -> None:
    one = inputs(written(tmp_path / "a.jsonl", {"messages": TWO_TURNS[:2]}))
    other = inputs(written(tmp_path / "b.jsonl", {"prompt": "Hi", "response": "Hello", "source": "x"}))
    assert list(one.train) == list(other.train)


def test_no_request_is_on_both_sides(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{k % 40}", "response": f"r{k}"} for k in range(200)]
    found = inputs(written(tmp_path / "d.jsonl", *rows), held_out_fraction=0.3)
    assert len(found.train) + len(found.held_out) == 200 and 20 <= len(found.held_out) <= 100
    assert not {e.prompt for e in found.train} & {e.prompt for e in found.held_out}


def test_too_long_turns_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "r"}, {"prompt": "q", "response": "z" * 400}]
    assert inputs(written(tmp_path / "d.jsonl", *rows), max_tokens=100).too_long == 1


def test_batches_visit_every_example_once_an_epoch() -> None:
    cfg = SupervisedConfig(epochs=3, batch_size=4)
    examples = list(range(10))
    assert total_steps(cfg, 10) == 9
    epochs = [[x for step in range(3 * e + 1, 3 * e + 4) for x in batch_of(cfg, examples, step, 5)] for e in range(3)]
    assert all(Counter(epoch) == Counter(examples) for epoch in epochs)
    assert epochs[0] != epochs[1] and [len(batch_of(cfg, examples, s, 5)) for s in (1, 2, 3)] == [4, 4, 2]
    assert batch_of(cfg, examples, 5, 5) == batch_of(cfg, examples, 5, 5) != batch_of(cfg, examples, 5, 6)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "must have messages, or prompt and response"),
        ({"messages": "x"}, "messages must be a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [TWO_TURNS[0]]}, "no turn of the assistant"),
        ({"messages": [TWO_TURNS[1]]}, "must follow one of the user"),
        ({"messages": [TWO_TURNS[0], {"role": "assistant", "content": " "}]}, "is empty"),
        ({"prompt": "p", "response": 3}, "response must be text"),
        ('{"messages": [', "not a JSON object"),
    ],
)
def test_wrong_rows_name_file_and_line_after_what_was_good(tmp_path: Path, row: Any, says: str) -> None:
    path = written(tmp_path / "d.jsonl", {"messages": TWO_TURNS}, row)
    good = []
    with pytest.raises(InputError) as caught:
        for demonstration in read_demonstrations(str(path)):
            good.append(demonstration)
    assert len(good) == 1 and f"{path}, line 2" in str(caught.value) and says in str(caught.value)


def test_no_rows(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(InputError, match="empty"):
        list(read_demonstrations(str(tmp_path / "d.jsonl")))


def test_trls_prompts_and_completions_are_read(tmp_path: Path) -> None:
    talk = {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}
    path = written(tmp_path / "d.jsonl", talk, {"prompt": "Hi", "completion": "Hello"})
    first, second = read_demonstrations(str(path))
    assert first.messages == second.messages and first.messages[-1].content == "Hello"
    with pytest.raises(InputError, match=r"line 1: completion\[0\] must be a message"):
        list(read_demonstrations(str(written(tmp_path / "d.jsonl", {"prompt": "Hi", "completion": ["Hello"]}))))
    with pytest.raises(InputError, match="a turn of the assistant must follow one of the user"):
        list(read_demonstrations(str(written(tmp_path / "d.jsonl", {**talk, "completion": TWO_TURNS[1:2] * 2}))))
