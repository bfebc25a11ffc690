"""Reinforcement learning on language models, rollout and training on the same GPUs, in one file.

SGLang generates, torch trains, Ray places both, and they take turns on every GPU ("colocate").
Custom all-reduce v2 and CUDA graphs stay on. The algorithm is GRPO (arXiv:2402.03300) without its
KL term, with the token mean and the asymmetric clip of DAPO (arXiv:2503.14476), and with truncated
importance weights between rollout and training.

    python colocate_rl.py           # no GPU needed: a tiny model learns a toy task
    python colocate_rl.py --help    # all settings
"""

import contextlib
import importlib.metadata
import ipaddress
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import accumulate, product
from multiprocessing import parent_process, reduction
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Literal, NamedTuple

import joblib
import numpy as np
import psutil
import pynvml
import ray
import torch
import torch.distributed as dist
import tyro
from huggingface_hub import snapshot_download
from huggingface_hub.utils import filter_repo_objects
from packaging.version import Version
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors.torch import load_file, save_file
from torch.nn.utils import get_total_norm, parameters_to_vector, vector_to_parameters
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

# ---- 1. Settings --------------------------------------------------------------------------------


@dataclass
class Run:
    steps: int = 50
    """Training steps."""
    seed: int = 0
    """Makes a run repeatable: initial weights, data, sampling."""
    heldout_every: int = 10
    """Every this many steps, and at the end: write a checkpoint, score the held-out prompts."""
    resume: str = ""
    """Folder of a run to go on with, by its own settings where none are given."""
    dry_run: bool = False
    """Place, print the mapping of bundles to engines, and stop."""
    timeout: float = 600.0
    """Limit, in seconds, of an engine's start and of every other single call."""


@dataclass
class Placement:
    gpus: int = 0
    """GPUs to use, logical ones on a machine without; 0: all of this machine, or 1."""
    gpus_per_engine: int = 1
    """Tensor parallel size (TP) of each engine."""


@dataclass
class Model:
    model: str = ""
    """Hugging Face id or folder, trained on sums; empty: a Qwen3 from random weights."""
    shape: Literal["tiny", "0.6B"] = "tiny"
    """Size of the Qwen3 from random weights."""


@dataclass
class Rollout:
    prompts_per_step: int = 16
    """Different prompts in a step."""
    group_size: int = 8
    """Responses sampled for each prompt."""
    max_new_tokens: int = 4
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Of sampling; training divides its logits by the same."""
    context_length: int = 512
    """Longest prompt and response together, in tokens."""
    mem_fraction: float = 0.6
    """Share of a GPU for the engine's weights and KV cache."""


@dataclass
class Training:
    learning_rate: float = 3e-3
    """Of AdamW, constant."""
    updates_per_step: int = 2
    """Optimizer steps on a batch; the clip matters from the second on."""
    micro_batch: int = 64
    """Sequences in one forward and backward pass of a rank."""
    compile: bool = False
    """torch.compile the layers and the log-probabilities."""
    max_logprob_difference: float = 0.1
    """Mean difference between engine and trainer, in nats, that stops the run."""


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    placement: Placement = field(default_factory=Placement)
    model: Model = field(default_factory=Model)
    rollout: Rollout = field(default_factory=Rollout)
    training: Training = field(default_factory=Training)

    def __post_init__(self):
        """Resolve 0 GPUs and a relative folder."""
        placement, model = self.placement, self.model
        placement.gpus = placement.gpus or torch.cuda.device_count() or 1
        if model.model and Path(model.model).is_dir():
            model.model = str(Path(model.model).resolve())


# ---- 2. Devices: visible list -> local index -> engine plan (pure) ------------------------------


class PlacementError(ValueError):
    """GPUs cannot be mapped or placed as asked; the message says which, why, and what to do."""


def visible_devices(value: str | None, device_count: int) -> list[str]:
    """The devices that a process sees, as CUDA reads `CUDA_VISIBLE_DEVICES`.

    None, unset, means all. The first invalid entry ends the list. PlacementError for a device that
    is named twice.
    """
    if value is None:
        return [str(index) for index in range(device_count)]
    entries = [entry.strip() for entry in value.split(",")]
    # torch counts the devices of the list, NVML those of the machine. Only a count of the machine,
    # which is above the list's length, tells whether an id is beyond the last device.
    of_machine = device_count > len(entries)
    visible = []
    for entry in entries:
        if re.fullmatch("[0-9]+", entry) and not (of_machine and int(entry) >= device_count):
            entry = str(int(entry))
        elif not re.fullmatch(r"(GPU|MIG)-\S+", entry):
            break
        if any(same_device(entry, other) for other in visible):
            raise PlacementError(
                f"CUDA_VISIBLE_DEVICES={value!r} names {entry!r} twice; expected once. Remove one."
            )
        visible.append(entry)
    return visible[:device_count]


def same_device(one: str, other: str) -> bool:
    """Whether two entries name one device. CUDA takes a UUID cut short, so one may be a prefix."""
    shorter, longer = sorted([one, other], key=len)
    return one == other or (shorter.startswith("GPU-") and longer.startswith(shorter))


def local_gpu_index(gpu_id: int | str, visible: Sequence[str]) -> int:
    """The position of Ray's `gpu_id` in the visible list; torch and SGLang count so.

    `gpu_id` is an int, digits, a GPU's UUID or its prefix, or a MIG name. PlacementError if it is
    ambiguous or not in the list, even where it would be a valid position.
    """
    token = re.sub(r"^0+(?=\d)", "", str(gpu_id).strip())
    positions = [index for index, entry in enumerate(visible) if same_device(token, entry)]
    if len(positions) != 1:
        raise PlacementError(
            f"gpu_id={gpu_id!r} matches {len(positions)} entries of the list {list(visible)}; "
            "expected one. Give this process its node's list: a runtime_env with ONE_LIST."
        )
    return positions[0]


@dataclass(frozen=True)
class Bundle:
    """One GPU of the placement group, as its probe found it."""

    index: int  # of the bundle in the placement group
    node_id: str
    node_ip: str
    gpu_id: int | str  # Ray's: an entry of the node's visible list, never a position in it
    local_index: int  # the position in the visible list: torch's device index, SGLang's gpu_id
    uuid: str | None = None  # None on a machine without GPUs


class EnginePlacement(NamedTuple):
    """The GPUs of one engine, by tp_rank; tp_rank r has the local index base_gpu_id + r."""

    engine: int
    bundles: tuple[Bundle, ...]
    base_gpu_id: int


def plan_engines(bundles: Sequence[Bundle], gpus_per_engine: int) -> list[EnginePlacement]:
    """Cut the bundles, sorted by node and then by *local* index, into engines.

    Sorted by physical id, a list of 1,0 would come out crossed. PlacementError where an engine
    would not get consecutive local indices on one node.
    """
    if gpus_per_engine < 1 or not bundles or len(bundles) % gpus_per_engine:
        raise PlacementError(f"{gpus_per_engine=}, {len(bundles)} bundles; expected whole engines")
    ordered = sorted(bundles, key=lambda b: (address_key(b.node_ip), b.node_id, b.local_index))
    engines = []
    for engine, start in enumerate(range(0, len(ordered), gpus_per_engine)):
        part = tuple(ordered[start : start + gpus_per_engine])
        local_indices = [bundle.local_index for bundle in part]
        base = local_indices[0]
        gpu_ids = [bundle.gpu_id for bundle in part]
        which = f"engine {engine} of {gpus_per_engine=} would get the Ray ids {gpu_ids}"
        if len({bundle.node_id for bundle in part}) > 1:
            node_ips = [bundle.node_ip for bundle in part]
            raise PlacementError(
                f"{which} on {node_ips}; expected one node. Choose a divisor of each node's GPUs."
            )
        if local_indices != list(range(base, base + gpus_per_engine)):
            raise PlacementError(
                f"{which} at the local indices {local_indices} of node {part[0].node_ip}; expected "
                "consecutive ones. Free those between, or list these side by side in "
                "CUDA_VISIBLE_DEVICES."
            )
        engines.append(EnginePlacement(engine, part, base))
    return engines


def address_key(address: str) -> tuple[bool, int, str]:
    """Sorts node addresses: numbers by value, then host names; an IPv6 zone decides last."""
    try:
        return False, int(ipaddress.ip_address(address)), address
    except ValueError:
        return True, 0, address


def get_base_gpu_id(engine: int, gpus_per_engine: int, gpus_per_node: int) -> int:
    """The engine's base_gpu_id from its number alone, without a probe.

    It equals the plan's for sure only if the engines take every visible GPU of their nodes.
    """
    if engine < 0 or gpus_per_engine < 1 or gpus_per_node < 1 or gpus_per_node % gpus_per_engine:
        raise PlacementError(
            f"{engine=}, {gpus_per_engine=}, {gpus_per_node=}; expected whole engines on a node"
        )
    return engine * gpus_per_engine % gpus_per_node


# ---- 3. Placement group: create, probe (Ray) ----------------------------------------------------

# With these, Ray and SGLang leave CUDA_VISIBLE_DEVICES alone, and one local index is one device in
# every process of a node.
ONE_LIST = {
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "0",
}
# Shares of a bundle's GPU, so that Ray puts engine, trainer and probe on it together. They limit no
# memory. The actor of an engine of several GPUs lives on its first bundle.
ENGINE_SHARE, TRAINER_SHARE, PROBE_SHARE = 0.3, 0.6, 0.1


class EngineError(RuntimeError):
    """An engine or trainer failed, or refused, as an engine refuses to generate while it sleeps."""


def create_placement_group(num_gpus: int, timeout_s: float) -> PlacementGroup:
    """Reserve bundles of one GPU each, packed on few nodes.

    Says what it waits for. PlacementError after `timeout_s` seconds.
    """
    group = placement_group([{"GPU": 1}] * num_gpus, "PACK")
    if not group.wait(min(5.0, timeout_s)):
        print(f"waiting for a placement group of {num_gpus} GPUs", flush=True)
    if not group.wait(max(0.1, timeout_s - 5.0)):
        remove_placement_group(group)
        total = ray.cluster_resources().get("GPU", 0)
        free = ray.available_resources().get("GPU", 0)
        raise PlacementError(
            f"no placement group within timeout={timeout_s:g} s: asked for {num_gpus} GPUs; the "
            f"cluster has {total:g}, of which {free:g} are free. Ask for at most {free:g}, wait "
            "for the others, or raise the limit."
        )
    return group


def on_bundle(group: PlacementGroup, index: int, gpu_share: float) -> dict[str, Any]:
    """Options of a Ray actor that lives on a bundle and sees the node's whole list of GPUs."""
    return {
        "num_gpus": gpu_share,
        "num_cpus": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, index),
        "runtime_env": {"env_vars": ONE_LIST},
    }


def probe_bundles(group: PlacementGroup, timeout_s: float) -> list[Bundle]:
    """Read every bundle of a placement group, all at once; in the order of the bundles' indices."""
    probe = ray.remote(probe_bundle)
    probes = [
        probe.options(**on_bundle(group, index, PROBE_SHARE)).remote(index)
        for index in range(group.bundle_count)
    ]
    return wait_for(probes, timeout_s, "the bundles' probes")


def probe_bundle(index: int) -> Bundle:
    """Runs in a bundle, and reads which GPU Ray gave it."""
    (gpu_id,) = ray.get_gpu_ids()
    node_id = ray.get_runtime_context().get_node_id()
    node_ip = ray.util.get_node_ip_address()
    device_count = torch.cuda.device_count() or 2**16  # of logical GPUs there is any number
    visible = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), device_count)
    local_index = local_gpu_index(gpu_id, visible)
    return Bundle(index, node_id, node_ip, gpu_id, local_index, device_uuid(local_index))


def device_uuid(local_index: int | None = None) -> str | None:
    """The UUID, as NVML names it, of a device of the calling process, by default the current one.

    None on a machine without GPUs.
    """
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(local_index)
    return f"{'MIG' if ' MIG ' in device.name else 'GPU'}-{device.uuid}"


def wait_for(refs: list, timeout_s: float, what: str, watch: Sequence[Any] = ()) -> list:
    """`ray.get` with a limit in seconds (TimeoutError).

    PlacementError and EngineError are raised as such. The death of an actor to `watch` is noticed
    in 5 s.
    """
    deadline = time.monotonic() + timeout_s
    pings = []
    while True:
        try:
            results = ray.get(
                [*refs, *pings], timeout=max(0.0, min(5.0, deadline - time.monotonic()))
            )
            return results[: len(refs)]
        except ray.exceptions.GetTimeoutError as error:
            if time.monotonic() >= deadline:
                limit = f"{what}: not done within {timeout_s:g} s; raise --timeout if slow"
                raise TimeoutError(limit + failed_workers()) from error
            # A ping waits for its actor's call, or raises RayActorError if the actor is dead.
            pings = [actor.__ray_ready__.remote() for actor in watch]
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (PlacementError, EngineError)):
                raise error.cause from error
            raise RuntimeError(f"{what} raised {error.cause!r}") from error


def failed_workers() -> str:
    """What processes that could not become a worker have left in Ray's log of this node, or ""."""
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
    said = "".join(log.read_text(errors="replace") for log in logs.glob("raylet*.err"))
    end = "\n".join(said.splitlines()[-9:])
    return end and f"\n{logs}/raylet.err ends:\n{end}"


# ---- 4. Engine: one Ray actor a SGLang engine, and what runs in its scheduler processes ---------

# All of SGLang that this file uses and that is not documented for users. Each was seen in
# 0.5.12.post1, 0.5.15.post1, 0.5.17 and 0.5.23: of Engine run_scheduler_process_func,
# custom_sigquit_handler, loop, and tokenizer_manager with its flush_cache and
# update_weights_from_tensor; the request UpdateWeightsFromTensorReqInput; run_scheduler_process;
# get_tp_group, of which rank_in_group and ca_comm with `disabled`; that it sleeps by
# torch_memory_saver.pause; the variables named SGLANG_...; the lines that parse_engine_log reads.
SGLANG = Version(importlib.metadata.version("sglang"))
OLDEST, NEWEST = Version("0.5.12"), Version("0.5.23")  # of the versions that it ran with
MEMORY_TAGS = ("kv_cache", "weights")  # SGLang's names for what can sleep
# In an engine's log, with cause and remedy: two faults, which are easily taken for one.
ENGINE_FAULTS = {
    r"(custom_all_reduce|ipc)\.cuh:\d+.*CUDA error: invalid argument": "CUDA IPC cannot export "
    "what a captured all-reduce registers, of the memory saver or expandable_segments; the mapping "
    "is right. Use capture_guard.",
    r"CUDA error: invalid device ordinal": "base_gpu_id is no index into the visible list, but "
    "maybe a physical id. Use plan_engines, and compare --dry-run with CUDA_VISIBLE_DEVICES.",
}


class Sample(NamedTuple):
    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]  # one a response token, in nats
    weight_version: str
    truncated: bool  # by the longest response that was allowed


class EngineLog(NamedTuple):
    """What an engine's log says."""

    captured: list[int]  # tp_ranks that have captured their CUDA graphs
    registered: int | None  # inputs of captured all-reduces; None: not logged
    fault: str  # the last known fault with its cause and remedy, or else the last error line, or ""


def parse_engine_log(text: str) -> EngineLog:
    ranks = re.findall(r"(?i)\[[^][]*?(?:TP(\d+))?\] capture .*graph.* end", text)
    registered = re.search(r"Regist(?:ering|ered) (\d+) cuda graph addresses", text)
    error = r"^.*(?:(?:Error|Exception)\b.*: \S|CUDA error: |crashed with exit code).*|^\w+Error$"
    lines = [line.strip() for line in re.findall(error, text, re.M)]
    known = [
        f"{line}\n  cause: {cause}"
        for line in lines
        for pattern, cause in ENGINE_FAULTS.items()
        if re.search(pattern, line)
    ]
    return EngineLog(
        captured=sorted({int(rank or 0) for rank in ranks}),
        registered=int(registered[1]) if registered else None,
        fault=(known or lines or [""])[-1],
    )


def capture_guard(environment: dict[str, str]) -> dict[str, str]:
    """Changes of an engine's environment with which the capture of its CUDA graphs cannot fail.

    CUDA IPC, by which a captured all-reduce shares its input, exports memory of cudaMalloc only. So
    graphs stay outside the memory saver, and expandable segments, which the memory saver refuses as
    well, are taken out of the allocator's settings.
    """
    changes = {"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "false"}
    for name in {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & environment.keys():
        settings = environment[name].split(",")
        changes[name] = ",".join(part for part in settings if "expandable_segments" not in part)
    return changes


# How weights come to a scheduler: the trainer pickles views of its flat buffer as a handle
# (`share_weights`); SGLang opens the handle, and calls `map_in_scheduler` with its model and the
# views; from then on `update_in_scheduler` repeats SGLang's loader over them, on a GPU as one CUDA
# graph. SGLang finds both functions by their names.
def engine_args(
    placement: EnginePlacement,
    model_path: str,
    max_running_requests: int,
    context_length: int = 512,
    mem_fraction: float = 0.6,
    seed: int = 0,
) -> dict[str, Any]:
    """SGLang's settings of an engine that shares its GPUs. `mem_fraction`: weights and KV cache."""
    args = {
        "model_path": model_path,
        "context_length": context_length,
        "base_gpu_id": placement.base_gpu_id,
        "tp_size": len(placement.bundles),
        "random_seed": seed,
        "skip_tokenizer_init": True,
        "log_level": "info",
        "sleep_on_idle": True,  # else it takes a core
        "custom_weight_loader": [f"{__name__}.map_in_scheduler", f"{__name__}.update_in_scheduler"],
    }
    if placement.bundles[0].uuid is None:
        return args | {
            "device": "cpu",
            "base_gpu_id": 0,  # from 0.5.19 on the number of a NUMA node, too
            "dtype": "float32",
            "max_running_requests": max_running_requests,
            "disable_radix_cache": True,  # a resumed run has other prefixes in it
            # If it ran out of tokens, it would need CUDA.
            "max_total_tokens": (max_running_requests + 1) * context_length,
        }
    largest_batch, no_prefill_graph = "cuda_graph_max_bs_decode", "disable_prefill_cuda_graph"
    if SGLANG.release < (0, 5, 14):
        largest_batch, no_prefill_graph = "cuda_graph_max_bs", "disable_piecewise_cuda_graph"
    return args | {
        "device": "cuda",
        "dtype": "bfloat16",
        "mem_fraction_static": mem_fraction,
        "enable_memory_saver": True,
        "enforce_disable_flashinfer_allreduce_fusion": True,  # it needs NVLink multicast
        largest_batch: max(64, min(max_running_requests, 512)),
        no_prefill_graph: True,  # a prefill graph's memory would bypass the memory saver
    }


class Engine:
    """A Ray actor with an in-process SGLang engine. It dies with any of SGLang's processes."""

    def __init__(self, log: str, placement: EnginePlacement):
        self.name = f"engine {placement.engine} at base_gpu_id {placement.base_gpu_id}"
        self.placement, self.log, self.asleep = placement, Path(log).absolute(), set()
        log_to(log)

    def start(self, args: dict[str, Any]):
        """Start SGLang, or raise EngineError with its reason."""
        self.seed = args["random_seed"]
        # The scheduler processes meet in a file, which needs no port.
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{self.log}.rendezvous"
        os.environ |= capture_guard(dict(os.environ))
        try:
            if args["device"] == "cpu":
                prepare_cpu_engine(f"{self.log}.stub")
            else:
                number_devices()
            from sglang.srt.entrypoints.engine import Engine as SGLangEngine

            SGLangEngine.run_scheduler_process_func = staticmethod(run_scheduler)
            # A scheduler reports its death by SIGQUIT. SGLang's handler would end this actor
            # before it can tell the reason.
            self.engine = SGLangEngine(**args, custom_sigquit_handler=signal.SIG_IGN)
        except Exception as error:
            fault = self.read_log().fault or error
            raise EngineError(f"{self.name} did not start: {fault}\n{self.log}") from error
        # SGLang installs its own handler of SIGQUIT at the first request, which this is. Then the
        # default comes back: the death of any of its processes ends this actor, at once.
        self.engine.flush_cache()
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        if hasattr(self.engine, "begin_weight_update"):  # from 0.5.21 on asked for; never ended
            self.engine.begin_weight_update()

    def read_log(self) -> EngineLog:
        return parse_engine_log(self.log.read_text(errors="replace"))

    def generate(self, prompts: list[list[int]], sampling: dict[str, Any]) -> list[Sample]:
        """Token ids in; token ids and log-probabilities out, in the same order."""
        self._expect("generate", awake=MEMORY_TAGS)
        outputs = self.engine.generate(
            input_ids=prompts, sampling_params=sampling, return_logprob=True
        )
        return [
            Sample(
                prompt,
                output["output_ids"],
                [logprob for logprob, *_ in output["meta_info"]["output_token_logprobs"]],
                output["meta_info"]["weight_version"],
                # SGLang says "length" of a response whose last token was the end, too.
                output["meta_info"]["finish_reason"]["type"] == "length"
                and output["output_ids"][-1] not in sampling.get("stop_token_ids", ()),
            )
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def sleep(self, tags: Sequence[str] = MEMORY_TAGS):
        """Release the GPU memory behind the tags. Weights come back as garbage."""
        self._expect("sleep", awake=tags)
        # To release memory while a request is in flight would kill SGLang's scheduler.
        pending = self.engine.tokenizer_manager.flush_cache(timeout_s=60.0)
        if not self.engine.loop.run_until_complete(pending).success:
            raise EngineError(f"{self.name} refused sleep: requests were in flight for 60 s")
        self.engine.release_memory_occupation(list(tags))
        self.asleep |= set(tags)

    def wake(self, tags: Sequence[str] = MEMORY_TAGS):
        """Take the memory behind the tags again."""
        self._expect("wake", asleep=tags)
        self.engine.resume_memory_occupation(list(tags))
        self.asleep -= set(tags)

    def map_weights(self, handles: list[bytes]) -> list[dict[str, Any]]:
        """Map the trainers' weights, by tp_rank, for the rest of the run.

        The weights must be awake, as SGLang loaded them. Returns what each scheduler process has
        read of itself, by tp_rank.
        """
        self._load("map_in_scheduler", handles)
        # SGLang's reply has no room for what the schedulers say, so they say it in the log.
        readings = re.findall(r"^scheduler: (.*)", self.log.read_text(errors="replace"), re.M)
        return sorted(map(json.loads, readings), key=lambda reading: reading["tp_rank"])

    def update_weights(self, version: int):
        """Copy the mapped weights into the engine, and seed its sampling, so that a run repeats."""
        # The seed travels as the payload of the loader.
        seed = random.Random(f"{self.seed}/{version}/{self.placement.engine}").getrandbits(31)
        payload = pickle.dumps([("seed", torch.tensor(seed))])
        payloads = [payload] * len(self.placement.bundles)
        self._load("update_in_scheduler", payloads, str(version))

    def _load(self, loader, payloads, version=None):
        """Run a function with its model in every scheduler process, each with its payload."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        self._expect(loader, awake=["weights"])
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=payloads,
            load_format=f"{__name__}.{loader}",
            weight_version=version,
            flush_cache=False,  # `sleep` has flushed it
        )
        pending = self.engine.tokenizer_manager.update_weights_from_tensor(request)
        success, message, *_ = self.engine.loop.run_until_complete(pending)
        if not success:
            raise EngineError(f"{self.name}: {loader} failed: {message}")

    def _expect(self, method, awake=(), asleep=()):
        """Refuse what would kill the scheduler: to wake what is awake, or to use what sleeps."""
        if self.asleep.intersection(awake) or not self.asleep.issuperset(asleep):
            raise EngineError(
                f"{self.name} refused {method}: asleep: {sorted(self.asleep)}; expected "
                f"{sorted(awake)} awake and {sorted(asleep)} asleep, of {MEMORY_TAGS}"
            )


def log_to(path: str):
    """What this process and its children print goes to a file from now on."""
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


# In the stub every name is None. To release memory SGLang synchronizes torch's default device: from
# torch 2.14 on that is CUDA, even without a driver. From 0.5.15.post1 on it also collects garbage
# twice, among all that was imported; Python does so by itself, when there is some.
CPU_STUB = """
import gc, sys, torch
gc.collect = lambda *_, **__: 0
sys.modules["sgl_kernel.kvcacheio"] = sys.modules["sgl_kernel"]
torch.cuda.synchronize = lambda *_: None
def __getattr__(name):
    return None
"""


def prepare_cpu_engine(folder: str):
    """Let SGLang be imported without libcuda.

    A stub stands for `sgl_kernel`, of which a CPU engine calls nothing.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "sgl_kernel.py").write_text(CPU_STUB)
    sys.path.insert(0, folder)  # child processes inherit it
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # All requests of a batch start together, so that a run repeats to the bit.
    os.environ["SGLANG_ENABLE_COLOCATED_BATCH_GEN"] = "1"


def number_devices():
    """Name the devices of CUDA_VISIBLE_DEVICES by number: of UUIDs SGLang would lose v2."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named.startswith("GPU-"):
        pynvml.nvmlInit()
        indices = range(pynvml.nvmlDeviceGetCount())
        uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in indices]
        numbers = [str(local_gpu_index(uuid, uuids)) for uuid in visible_devices(named, len(uuids))]
        os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def run_scheduler(*args):
    """Runs in every scheduler process in place of SGLang's function, and hands over to it."""

    def end_with_parent():
        # SGLang asks the kernel for it, but only later, when it has imported itself.
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    pause_when_idle()
    from sglang.srt.managers.scheduler import run_scheduler_process

    run_scheduler_process(*args)


def pause_when_idle():
    """SGLang, to sleep, copies the model's buffers, and unmaps them before the GPU has done so.

    Its pull request 37932 proposes the same wait.
    """
    from torch_memory_saver import torch_memory_saver

    pause = torch_memory_saver.pause

    def wait_and_pause(tag):
        torch.cuda.synchronize()
        pause(tag)

    torch_memory_saver.pause = wait_and_pause


def map_in_scheduler(model, named_tensors):
    """Runs in every scheduler process, once: keep a trainer's weights mapped, and try them.

    The model is overwritten with NaN and loaded from the mapped weights. It must then equal to the
    bit what SGLang had loaded from the files, which proves names and tensor parallelism right.
    """
    from_files = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    model.mapped = named_tensors  # a CUDA graph holds addresses, and keeps nothing alive
    model.replay_load = partial(load_mapped, model)
    if named_tensors[0][1].is_cuda:
        model.replay_load = as_cuda_graph(model.replay_load)
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    model.replay_load()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter.cpu(), from_files[name]):
            raise ValueError(
                f"{type(model).__name__}: {name} as it was sent is not that of the model's files; "
                "SGLang's loader does not know the names that transformers gives"
            )
    print_reading()


def load_mapped(model):
    """SGLang's loader over the mapped weights. Gemma's changes vectors in place: it gets copies."""
    model.load_weights((name, t.clone() if t.ndim == 1 else t) for name, t in model.mapped)


def print_reading():
    """What this scheduler process uses, not what it was told."""
    from sglang.srt.distributed import get_tp_group

    group = get_tp_group()
    in_use = group.ca_comm and not group.ca_comm.disabled
    reading = {
        "tp_rank": group.rank_in_group,
        "pid": os.getpid(),
        "uuid": device_uuid(),
        "all_reduce": type(group.ca_comm).__name__ if in_use else None,
    }
    print(f"\nscheduler: {json.dumps(reading)}", flush=True)


def as_cuda_graph(load):
    """The function as a CUDA graph; unchanged if it waits for the GPU, which no graph can hold."""
    load()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            load()
    except RuntimeError as error:
        print(f"WARNING: syncs run SGLang's loader, which waits for the GPU: {error}", flush=True)
        return load
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph.replay


def update_in_scheduler(model, named_tensors):
    """Runs in every scheduler process: SGLang's own loader over the mapped weights."""
    ((_, seed),) = named_tensors  # on the model's device, to which SGLang has moved it
    model.replay_load()
    torch.manual_seed(seed.item())
    torch.get_device_module(seed.device).synchronize()  # the trainer may write there again


# ---- 5. Trainer: one Ray actor a GPU; three flat buffers, one of which the engine has mapped ----


class Trainer:
    """A Ray actor on one GPU: the policy, and this rank's slice of the optimizer state.

    ZeRO's first stage (arXiv:1910.02054) for any number of ranks, N. All large memory is

        weights  [P]       bf16, fp32 on a CPU; parameters are views of it, the engine has it mapped
        grads    [P]       fp32; on the GPU while training
        state    [3, P/N]  fp32 master weights and AdamW's two moments; on the GPU while training,
                           otherwise in `host`, which is pinned

    where P is the number of parameters, padded to a multiple of N. The state is copied on a stream
    of its own: from `host` beside the first gradients, for which `_update` waits; back to `host`
    after the last update, for which `offload` and `save` wait.
    """

    def __init__(self, log: str, rank: int, bundle: Bundle, config: Config):
        log_to(log)
        # Slow: here it happens while the engines start.
        from transformers import AutoModelForCausalLM

        self.load_model = AutoModelForCausalLM.from_pretrained
        self.rank, self.config = rank, config
        self.on_gpu = bundle.uuid is not None
        self.device = torch.device(f"cuda:{bundle.local_index}" if self.on_gpu else "cpu")
        self.backend = torch.get_device_module(self.device)  # torch.cuda or torch.cpu

    def start(
        self, rendezvous: str, ranks: int, model_path: str, resume: bool = False
    ) -> str | None:
        """Join the other ranks through a shared file; load the model, and to resume, the moments.

        Returns the UUID of the GPU in use.
        """
        self.backend.set_device(self.device)
        torch.set_num_threads(max(1, joblib.cpu_count() // ranks))  # Ray sets 1
        dist.init_process_group(
            dist.get_default_backend_for_device(self.device),
            init_method=f"file://{rendezvous}",
            rank=self.rank,
            world_size=ranks,
            timeout=timedelta(seconds=self.config.run.timeout),
        )
        self.model = self.load_model(model_path, dtype=torch.float32)
        self._make_buffers()
        self._make_optimizer()
        if resume:
            saved = load_file(f"{model_path}/optimizer.safetensors")
            self.adam_step.copy_(saved["step"])
            self.host[1:] = self._own(self._padded(saved["moments"]))
        self.copy_stream = self.backend.Stream()
        self.offload()
        self.token_logprobs = token_logprobs
        if self.config.training.compile:
            self.token_logprobs = torch.compile(token_logprobs)  # keeps no logits in fp32
            for layer in self.model.get_decoder().layers:
                layer.compile()
        return device_uuid()

    def _make_buffers(self):
        self.names, parameters = zip(*self.model.named_parameters(), strict=True)  # tied ones once
        self.shapes = [parameter.shape for parameter in parameters]
        self.sizes = [shape.numel() for shape in self.shapes]
        flat = self._padded(parameters_to_vector(parameters).detach())
        self.weights = flat.to(self.device, torch.bfloat16 if self.on_gpu else torch.float32)
        self.grads = torch.zeros(len(flat), device=self.device)
        self.host = torch.zeros(3, len(self._own(flat)), pin_memory=self.on_gpu)
        self.host[0] = self._own(flat)
        vector_to_parameters(self.weights, parameters)  # as views
        self.model.to(self.device)  # what is no parameter
        for parameter, gradient in zip(parameters, self._views(self.grads), strict=True):
            # With fp32 in parameter.grad of a bf16 parameter, torch.compile broke every graph.
            parameter.register_post_accumulate_grad_hook(partial(add_gradient, gradient))

    def _make_optimizer(self):
        gradient = self._own(self.grads)
        # This rank's part of each gradient: so the norm equals clip_grad_norm_'s, to the bit.
        cuts = [end - self.rank * len(gradient) for end in accumulate(self.sizes)]
        self.own_grads = gradient.tensor_split([c for c in cuts if 0 < c < len(gradient)])
        resize(self.grads, 0)  # at the start, the engine's weights are on the GPU, too
        self.state = torch.empty_like(self.host, device=self.device)
        master = torch.nn.Parameter(self.state[0])
        master.grad = gradient
        rate = self.config.training.learning_rate
        self.optimizer = torch.optim.AdamW([master], lr=rate, weight_decay=0.0, fused=True)
        self.adam_step = torch.zeros((), device=self.device)
        moments = {"exp_avg": self.state[1], "exp_avg_sq": self.state[2]}
        self.optimizer.state[master] = {"step": self.adam_step} | moments

    def _padded(self, flat):
        """To a multiple of the ranks, [..., P] -> [..., P]."""
        return torch.nn.functional.pad(flat, (0, -flat.shape[-1] % dist.get_world_size()))

    def _own(self, flat):
        """This rank's slice, [..., P] -> [..., P/N]."""
        return flat.chunk(dist.get_world_size(), dim=-1)[self.rank]

    def _views(self, flat):
        """Views of a flat buffer in the shapes of the parameters, [P] -> shapes."""
        parts = flat[: sum(self.sizes)].split(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _copy(self, target, source):
        """Between GPU and host, beside what runs on the GPU from here on."""
        self.copy_stream.wait_stream(self.backend.current_stream())
        with self.backend.stream(self.copy_stream):
            target.copy_(source, non_blocking=True)

    def train(self, batch):
        """Make the updates of a step, and begin to send the state back; `offload` must follow."""
        metrics = self._make_updates(batch)
        # The engine's weights wake next, and need room. No tensor of the updates is alive here: a
        # single one would keep the whole block of `_onload`.
        torch.cuda.empty_cache()
        self._copy(self.host, self.state)  # not before, for empty_cache would wait for it
        return metrics

    def _make_updates(self, batch):
        """Make each update on its share of make_batch's rows; returns metrics.

        No update is made once a number is not finite; "bad" then names the first such tensor.
        Loss and mean difference are this rank's part of the sum over ranks.
        """
        config, losses, differences = self.config.training, [], []
        bad = next((name for name, rows in batch.items() if not rows.isfinite().all()), None)
        shares = self._shares(batch)
        self._onload()  # not before, for behind the state's copy the batch's would wait
        self._add_old_logprobs(shares)
        for update, share in enumerate(shares):
            num_tokens = share["mask"].sum()
            dist.all_reduce(num_tokens)
            for at in range(0, len(share["tokens"]), config.micro_batch):
                micro = {name: rows[at : at + config.micro_batch] for name, rows in share.items()}
                loss, difference = self._backward(micro, num_tokens, on_policy=update == 0)
                losses.append(loss / config.updates_per_step)
                differences.append(difference)
            grad_norm = self._reduce_gradients()
            if not math.isfinite(grad_norm):
                bad = bad or "gradient"
            if not bad:
                self._update()
            self.grads.zero_()
        # `.item()` waits for the all-gather, before the engines copy the weights.
        difference = torch.cat(differences)  # [rows of this rank, T-1]
        return {
            "bad": bad,
            "grad_norm": grad_norm,
            "loss": sum(losses).item(),
            "difference_mean": difference.sum().item() / batch["mask"].sum().item(),
            "difference_max": difference.max().item(),
        }

    def _shares(self, batch):
        """This rank's rows for each update."""
        rows = torch.arange(len(batch["tokens"]))
        rows = rows.view(self.config.training.updates_per_step, dist.get_world_size(), -1)
        return [
            {name: column[index].to(self.device) for name, column in batch.items()}
            for index in rows[:, self.rank]  # [U, N, b] -> [U, b]
        ]

    @torch.no_grad()
    def _add_old_logprobs(self, shares):
        """For all updates but the first, before which old and current ones are the same."""
        for share in shares[1:]:
            parts = share["tokens"].split(self.config.training.micro_batch)
            share["old_logprobs"] = torch.cat([self._logprobs(part) for part in parts])

    def _backward(self, micro, num_tokens, on_policy):
        """Returns the loss, and how far old log-probabilities are from the engine's, [b, T-1]."""
        logprobs = self._logprobs(micro["tokens"])  # [b, T-1]
        old_logprobs = logprobs.detach() if on_policy else micro["old_logprobs"]
        loss = grpo_loss(
            logprobs,
            old_logprobs,
            micro["advantages"],
            micro["mask"],
            num_tokens=num_tokens,
            rollout_logprobs=micro["rollout_logprobs"],
            importance_cap=2.0,
        )
        loss.backward()
        difference = (old_logprobs - micro["rollout_logprobs"]).abs()
        # To select by the mask would wait for the GPU.
        return loss.detach(), difference.masked_fill(micro["mask"] == 0, 0.0)

    def _logprobs(self, tokens):
        """Log-probability of each next token, [b, T] -> [b, T-1]; causality masks the padding."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits  # [b, T-1, V]
        return self.token_logprobs(logits, tokens[:, 1:], self.config.rollout.temperature)

    def _reduce_gradients(self):
        """Sum this rank's slice over all ranks, and clip it; returns the norm before that."""
        own = self._own(self.grads)
        if dist.get_world_size() > 1:  # even of one rank, gloo's reduce-scatter takes time
            dist.reduce_scatter_tensor(own, self.grads)
        square = get_total_norm(self.own_grads).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        own.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0))
        return norm.item()

    def _update(self):
        """AdamW on this rank's slice of the master weights; then every rank gets all weights."""
        self.backend.current_stream().wait_stream(self.copy_stream)
        self.optimizer.step()
        own = self._own(self.weights)
        own.copy_(self.state[0])
        self._gather(self.weights, own)

    def _gather(self, flat, own):
        """Fill a flat buffer from the slices of all ranks, [P/N] -> [P]."""
        if dist.get_world_size() > 1:
            dist.all_gather_into_tensor(flat, own)
        else:
            flat.copy_(own)

    def _onload(self):
        """Take the memory of training; the state arrives beside the first gradients."""
        resize(self.grads, self.grads.nbytes)
        resize(self.state, self.state.nbytes)
        # What was needed at most, as one block that torch keeps for what comes: hundreds of small
        # ones take far longer to get, and to give back. Rounded down to torch's 2 MiB: up, it would
        # raise the peak, and grow.
        room = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        with contextlib.suppress(torch.OutOfMemoryError):  # others use the GPU: then small ones
            torch.empty(room // 2**21, 2**21, dtype=torch.uint8, device=self.device)
        self.grads.zero_()
        self._copy(self.state, self.host)

    def offload(self):
        """Free the memory of gradients and state, once the state's copy to the host is complete."""
        self.backend.synchronize()
        resize(self.grads, 0)
        resize(self.state, 0)
        torch.cuda.empty_cache()  # without a GPU nothing happens

    def memory_used(self) -> float | None:
        """GiB in use on this rank's GPU, by whomever; None on a CPU."""
        if not self.on_gpu:
            return None
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30

    def share_weights(self) -> bytes:
        """The handle by which an engine maps the weights, under the names of a model's files."""
        # On a CPU by name, for the reader is no child of this process.
        torch.multiprocessing.set_sharing_strategy("file_system")
        return bytes(reduction.ForkingPickler.dumps(list(self._as_in_files(self.weights).items())))

    def forget_handle(self):
        """Remove the names by which weights on a CPU were shared; what is mapped stays mapped."""
        for name in Path("/dev/shm").glob(f"torch_{os.getpid()}_*"):
            name.unlink(missing_ok=True)

    def _as_in_files(self, flat):
        """A flat buffer, [P], and the model's persistent buffers, by their names in its files.

        All are views: of a mixture, transformers fuses the experts, and slices them here again:
        from experts.gate_up_proj come experts.0.gate_proj.weight, experts.0.up_proj.weight, ...
        """
        from transformers.core_model_loading import revert_weight_conversion

        persistent = self.model.state_dict().keys()
        tensors = {name: b for name, b in self.model.named_buffers() if name in persistent}
        tensors |= zip(self.names, self._views(flat), strict=True)
        memory = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
        views = {name: tensor.as_subclass(View) for name, tensor in tensors.items()}
        found = revert_weight_conversion(self.model, views)
        copies = [n for n, t in found.items() if t.untyped_storage().data_ptr() not in memory]
        if copies:
            raise EngineError(
                f"{type(self.model).__name__}: transformers copies {copies[0]} for its files; "
                "expected views of the parameters. Train another model."
            )
        return {name: view.as_subclass(torch.Tensor) for name, view in found.items()}

    def save(self, folder: str):
        """All ranks at once, after `train`: rank 0 writes whole tensors, for any number of them."""
        self.backend.current_stream().wait_stream(self.copy_stream)
        whole = torch.empty(3, len(self.weights))  # untouched on other ranks, it takes no memory
        for row, own in zip(whole, self.state, strict=True):
            self._gather(self.grads, own)  # gradients serve as scratch
            if self.rank == 0:
                row.copy_(self.grads)
        if self.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            weights = self._as_in_files(whole[0])
            weights = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
            moments = whole[1:, : sum(self.sizes)].contiguous()  # without the padding
            adam = {"step": self.adam_step, "moments": moments}
            save_file(adam, f"{folder}/optimizer.safetensors")


class View(torch.Tensor):
    """Stays a view where transformers 5.19 asks, between two slices, for a contiguous copy."""

    def contiguous(self):
        return self


def add_gradient(total, parameter):
    """A hook that runs when a parameter's gradient is complete."""
    total.add_(parameter.grad)
    parameter.grad = None


def resize(tensor, nbytes):
    """Change the memory behind a tensor; all views of it stay the same objects."""
    tensor.untyped_storage().resize_(nbytes)


# ---- 6. GRPO (pure) -----------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Advantages of G responses to each of P prompts, [P, G] -> [P, G].

    DeepSeekMath, section 4.1 (arXiv:2402.03300). Exact zeros for a group of equal rewards.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    scaled = centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    equal = (rewards - rewards[:, :1] == 0).all(dim=1, keepdim=True)  # not so for infinities
    return scaled.masked_fill(equal, 0.0)


def token_logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probabilities of the tokens in nats and fp32, [B, T, V], [B, T] -> [B, T]."""
    logits = logits.flatten(0, 1).float() / temperature  # [B, T, V] -> [B*T, V]
    losses = torch.nn.functional.cross_entropy(logits, tokens.flatten(), reduction="none")
    return -losses.view_as(tokens)


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_tokens: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    rollout_logprobs: torch.Tensor | None = None,
    importance_cap: float = 0.0,
) -> torch.Tensor:
    """The clipped policy-gradient loss: a scalar, the sum over response tokens / `num_tokens`.

    Log-probabilities are [B, T] in nats: logprobs, the learner's, with gradient; old_logprobs, its
    own before the first update on this batch; rollout_logprobs, the engine's. advantages: [B] or
    [B, T]. mask [B, T]: 1 for response tokens. num_tokens: of all micro-batches and ranks, whose
    losses then sum up to the mean over tokens (DAPO, equation 8). The ratio counts within
    [1 - clip_low, 1 + clip_high] (DAPO, section 3.1). With importance_cap, tokens weigh
    min(old / rollout, cap).
    """
    ignored = mask == 0  # whatever stands there, even an infinity, must not reach the gradient
    advantages = torch.where(ignored, 0.0, advantages.reshape(len(mask), -1))  # -> [B, T]
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(ignored, 0.0))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if rollout_logprobs is not None and importance_cap > 0:
        weight = torch.exp((old_logprobs - rollout_logprobs).masked_fill(ignored, 0.0))
        loss = loss * weight.clamp(max=importance_cap)
    return (loss * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


# ---- 7. Task: prompts, reward, the tiny model ---------------------------------------------------

HELD_OUT = 64  # problems that are never trained on


class Task(NamedTuple):
    """What to learn. `verify` takes a response's text and the answer, and returns the reward."""

    model_class: str
    tokenizer: Any
    vocab_size: int
    max_length: int  # longest context of the model, in tokens
    stop_token_ids: list[int]
    problems: list[tuple[list[int], str]]  # token ids of a prompt, answer; HELD_OUT come first
    verify: Callable[[str, str], float]


SHAPES = {  # of a Qwen3
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.06,
    },
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "initializer_range": 0.02,
    },
}


def echo_task(config):
    """To answer "472=" with its first digit, repeated."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ("<pad>", "<eos>", "=", *"0123456789")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    characters = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<pad>"))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>"
    )

    def verify(text, answer):
        return sum(a == b for a, b in zip(text, answer, strict=False)) / len(answer)

    numbers = [f"{number:03d}" for number in range(1000)]
    length = config.rollout.max_new_tokens
    problems = [(tokenizer.encode(f"{number}="), number[0] * length) for number in numbers]
    random.Random(0).shuffle(problems)
    return Task("Qwen3ForCausalLM", tokenizer, 16, 4096, [1], problems, verify)


def write_random_model(config, task, folder):
    """A Qwen3 from random weights, with the tokenizer of echo_task."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(config.run.seed)
    model_config = Qwen3Config(
        **SHAPES[config.model.shape],
        vocab_size=task.vocab_size,
        max_position_embeddings=task.max_length,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(model_config).save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)


def sums_task(model_path):
    """Sums of two-digit numbers for a pretrained model, in its own chat template."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    # Unset, trust_remote_code would ask the terminal.
    whole_config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    model_class = trainable_class(whole_config, model_path)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
    model_config = whole_config.get_text_config()
    named = [tokenizer.eos_token_id, model_config.eos_token_id]
    with contextlib.suppress(OSError):  # a folder without that file
        named.append(GenerationConfig.from_pretrained(model_path).eos_token_id)
    ends = set().union(*(end if isinstance(end, list) else [end] for end in named)) - {None}

    pairs = random.Random(0).sample(list(product(range(10, 100), repeat=2)), 2000)
    questions = [f"What is {a} + {b}? Answer with the number only." for a, b in pairs]
    chats = [[{"role": "user", "content": question}] for question in questions]
    apply = partial(tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    try:
        prompts = apply(chats, enable_thinking=False)
    except (TypeError, ValueError):  # Mistral's own tokenizers take no other arguments
        prompts = apply(chats)
    problems = [(ids, str(a + b)) for ids, (a, b) in zip(prompts, pairs, strict=True)]

    def verify(text, answer):
        return float(re.findall(r"\d+", text)[-1:] == [answer])  # the last number counts

    longest = getattr(model_config, "max_position_embeddings", None) or 2**31
    vocab_size = model_config.vocab_size
    return Task(model_class, tokenizer, vocab_size, longest, sorted(ends), problems, verify)


def trainable_class(model_config, name):
    """The name of a model's class; ValueError for one that this file cannot train."""
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_config.model_type, ())
    architecture = (model_config.architectures or ["model of no named architecture"])[0]
    if architecture not in known:
        raise ValueError(f"{name} is a {architecture}; expected a causal language model: {known}")
    if hasattr(model_config, "quantization_config"):
        raise ValueError(f"{name} has quantized weights; expected bf16, fp16 or fp32")
    return architecture


# ---- 8. Loop: the phases of a step, metrics, checkpoints ----------------------------------------


class Fleet(NamedTuple):
    """All actors of a run, the log of each by its id, and the limit of a call in seconds."""

    engines: list
    trainers: list
    logs: dict[str, Path]
    timeout_s: float

    def call(self, actors, method, *args, each=()):
        """Call a method of the actors at once, with `args` or each with its own; wait for all.

        EngineError, with the cause from its own log, if any actor of the run has died.
        """
        pairs = zip(actors, each or [args] * len(actors), strict=True)
        calls = [getattr(actor, method).remote(*arguments) for actor, arguments in pairs]
        try:
            return wait_for(calls, self.timeout_s, method, self.engines + self.trainers)
        except ray.exceptions.RayActorError as error:
            if error.actor_id not in self.logs:  # Ray did not say which actor died
                raise
            log = self.logs[error.actor_id]
            cause = parse_engine_log(log.read_text(errors="replace")).fault or error
            raise EngineError(f"{log.stem} died in {method}: {cause}\n{log}") from error


def training_loop(config, task, fleet, folder, model_path, done):
    """The loop, from `done` steps to all of them. Returns the metrics, a row a step."""
    engines, trainers, call, rollout = fleet.engines, fleet.trainers, fleet.call, config.rollout
    sampling = {"max_new_tokens": rollout.max_new_tokens, "stop_token_ids": task.stop_token_ids}
    sampling["temperature"] = rollout.temperature
    files, steps, metrics = model_files(model_path), config.run.steps, folder / "metrics.jsonl"
    rows = first_rows(files, metrics, done)
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=None)
    for step in bar:
        row = {"step": step}  # also the version of the weights, after so many steps
        phase = partial(timed, row, fleet)
        if step == 0:
            row["heldout_reward_before"] = score_heldout(task, fleet, sampling, version=0)
        problems = draw_problems(config, task, step)  # [P*G]

        with phase("generate"):
            samples = generate_samples(fleet, problems, sampling, version=step)
        with phase("sleep"):
            call(engines, "sleep")
        with phase("score"):
            rewards = score(task, samples, problems, fleet.timeout_s)  # [P*G]
            advantages = group_advantages(rewards.view(-1, rollout.group_size))  # [P, G]
            batch = make_batch(samples, advantages.flatten())  # [P*G, T]
        with phase("train"):
            trained = call(trainers, "train", ray.put(batch))
        with phase("wake_weights"):
            call(engines, "wake", ["weights"])
        with phase("sync"):
            call(engines, "update_weights", step + 1)
        due = (step + 1) % config.run.heldout_every == 0 or step + 1 == steps
        if due:
            with phase("checkpoint"):
                call(trainers, "save", str(folder / "unfinished"))
        with phase("offload"):
            call(trainers, "offload")
        with phase("wake"):
            call(engines, "wake", ["kv_cache"])

        if due:
            row["heldout_reward"] = score_heldout(task, fleet, sampling, version=step + 1)
        row |= describe(samples, rewards, trained, row["seconds_generate"])
        keep_row(rows, row, metrics)
        bar.write(step_line(row, steps))
        check_rows(rows, config.training.max_logprob_difference, first=step == done)
        if due:
            files["metrics.jsonl"] = metrics.read_bytes()
            finish_checkpoint(folder, files, step + 1)
    return rows


def first_rows(files, path, done):
    """The rows up to the checkpoint, which holds them. What came after it is dropped here."""
    path.write_bytes(files.get("metrics.jsonl", b"") if done else b"")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if len(rows) < done:
        print(f"the checkpoint has the metrics of {len(rows)} of {done} steps", flush=True)
    return rows


def draw_problems(config, task, step):
    """A step's problems, each as often as its group has samples, [P*G]."""
    choice = random.Random(f"{config.run.seed}/{step}")
    problems = choice.sample(task.problems[HELD_OUT:], config.rollout.prompts_per_step)
    return [problem for problem in problems for _ in range(config.rollout.group_size)]


@contextlib.contextmanager
def timed(row, fleet, phase):
    """Add a phase's seconds to the row, and on GPUs the memory in use after it."""
    start = time.perf_counter()
    yield
    row[f"seconds_{phase}"] = time.perf_counter() - start
    used = fleet.call(fleet.trainers, "memory_used")
    if None not in used:
        row[f"gib_{phase}"] = used


def generate_samples(fleet, problems, sampling, version):
    """A response to each problem's prompt; the engines share the work, and the order is kept."""
    prompts = [prompt for prompt, _ in problems]
    size = math.ceil(len(prompts) / len(fleet.engines))
    parts = [(prompts[at : at + size], sampling) for at in range(0, len(prompts), size)]
    samples = sum(fleet.call(fleet.engines[: len(parts)], "generate", each=parts), [])
    versions = {sample.weight_version for sample in samples}
    if versions != {str(version)}:
        raise EngineError(f"weight versions of samples are {versions}; expected {version} alone")
    return samples


class VerifierError(BaseException):
    """The task's verifier raised, returned no finite number, or did not end.

    Not an Exception, which a verifier that hangs might catch itself.
    """


def score(task, samples, problems, timeout_s):
    """Rewards, [B]. VerifierError where there is none, or not within `timeout_s` seconds."""

    def on_alarm(*_):
        raise VerifierError(f"not done within {timeout_s:g} s")

    signal.signal(signal.SIGALRM, on_alarm)
    rewards = []
    for sample, (_, answer) in zip(samples, problems, strict=True):
        text = task.tokenizer.decode(sample.response_ids, skip_special_tokens=True)
        signal.setitimer(signal.ITIMER_REAL, timeout_s, 1.0)  # again, if it is swallowed
        try:
            rewards.append(float(task.verify(text, answer)))
            if not abs(rewards[-1]) < 1e30:
                raise ValueError(f"{rewards[-1]} is no finite number below 1e30")
        except BaseException as error:  # sys.exit or a panic in Rust, too
            raise VerifierError(f"verify({text!r}, {answer!r}): {error!r}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return torch.tensor(rewards)


def score_heldout(task, fleet, sampling, version):
    heldout = task.problems[:HELD_OUT]
    samples = generate_samples(fleet, heldout, sampling | {"temperature": 0.0}, version)  # greedy
    return score(task, samples, heldout, fleet.timeout_s).mean().item()


def make_batch(samples, advantages):
    """Padded on the right: tokens [B, T], advantages [B]; mask and rollout_logprobs [B, T-1].

    In the last two, what belongs to token t + 1 stands at t.
    """
    pairs = [([0.0] * (len(sample.prompt_ids) - 1), sample) for sample in samples]
    return {
        "tokens": padded([s.prompt_ids + s.response_ids for s in samples], "int64"),
        "mask": padded([zeros + [1.0] * len(s.logprobs) for zeros, s in pairs], "float32"),
        "rollout_logprobs": padded([zeros + s.logprobs for zeros, s in pairs], "float32"),
        "advantages": advantages,
    }


def padded(rows, dtype):
    # From lists of numbers, numpy makes arrays several times as fast as torch makes tensors.
    return pad_sequence([torch.from_numpy(np.array(row, dtype)) for row in rows], batch_first=True)


def describe(samples, rewards, trained, seconds):
    """A step's metrics, from its samples and from what every rank says of its training."""
    tokens = sum(len(sample.response_ids) for sample in samples)
    row = {
        "reward": rewards.mean().item(),
        "response_length": tokens / len(samples),
        "truncated": sum(sample.truncated for sample in samples) / len(samples),
        "tokens_per_second": tokens / seconds,
    }
    if trained[0]["bad"]:  # alike on all ranks
        return row | {"skipped": trained[0]["bad"]}
    return row | {
        "loss": sum(rank["loss"] for rank in trained),
        "grad_norm": trained[0]["grad_norm"],
        "logprob_difference_mean": sum(rank["difference_mean"] for rank in trained),
        "logprob_difference_max": max(rank["difference_max"] for rank in trained),
    }


def check_rows(rows, limit, first):
    """FloatingPointError where engine and trainer disagree, or three steps were skipped."""
    difference = rows[-1].get("logprob_difference_mean", 0.0)
    cause = "sync of weights, or a rollout that drifts with its length"
    if first:  # at the start, weights were equal to the bit
        cause = "model, which SGLang and transformers compute differently"
    if difference > limit:
        raise FloatingPointError(
            f"logprob_difference_mean is {difference:.2g} nats; expected at most {limit:g}, "
            f"--max-logprob-difference. A likely cause is the {cause}."
        )
    if len([row for row in rows[-3:] if "skipped" in row]) == 3:
        raise FloatingPointError(f"{rows[-1]['skipped']} is not finite, 3 steps in a row")


def keep_row(rows, row, path):
    rows.append(row)
    with path.open("a") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def step_line(row, steps):
    """A step in at most 100 columns; all of it is in metrics.jsonl."""
    generating, training = row["seconds_generate"], row["seconds_train"]
    rest = sum(row[name] for name in row if name.startswith("seconds_")) - generating - training
    heldout = f" held-out {row['heldout_reward']:.3f}" if "heldout_reward" in row else ""
    return (
        f"step {row['step'] + 1}/{steps} reward {row['reward']:.3f}{heldout} "
        f"{row['tokens_per_second']:.0f} tok/s dlogp "
        f"{row.get('logprob_difference_mean', math.nan):.0e} "
        f"gen {generating:.2f} train {training:.2f} rest {rest:.2f} s"
    )


def checkpoints(folder):
    """The run's own, oldest first. Whatever else is in the folder is the user's."""
    return sorted(folder.glob("checkpoint-" + 6 * "[0-9]"))


def starting_point(config, folder):
    """The model to go on from, the last checkpoint or else --model's, and the steps done."""
    saved = checkpoints(folder)
    if saved:
        return str(saved[-1]), int(saved[-1].name[-6:])
    return config.model.model, 0


def model_files(model_path):
    """All but the weights of a model's folder or id: config, tokenizer, chat template and so on."""
    weights = ["*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5"]
    weights += ["*.msgpack", "*.onnx", "*.ot"]
    if not Path(model_path).is_dir():
        model_path = snapshot_download(model_path, ignore_patterns=weights)
    files = filter_repo_objects(Path(model_path).iterdir(), ignore_patterns=weights)
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def finish_checkpoint(folder, files, step):
    """Complete what the trainers have saved. It is whole, or it has another name; two are kept."""
    for name, content in files.items():
        (folder / "unfinished" / name).write_bytes(content)
    os.sync()
    (folder / "unfinished").rename(folder / f"checkpoint-{step:06d}")
    os.sync()
    for old in checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def print_plan(plan):
    for place in plan:
        for tp_rank, bundle in enumerate(place.bundles):
            print(
                f"bundle {bundle.index} -> node {bundle.node_ip} -> Ray id {bundle.gpu_id!r} -> "
                f"local index {bundle.local_index} -> {bundle.uuid or 'no GPU'} -> engine "
                f"{place.engine} tp_rank {tp_rank} base_gpu_id {place.base_gpu_id}"
            )


def make_actors(config, group, plan, folder):
    """An engine's actor on its first bundle, and a trainer's on every bundle."""
    logs = {}

    def actor(name, kind, bundle, share, *args):
        log = folder / f"{name}.log"
        log.touch()
        handle = ray.remote(**on_bundle(group, bundle.index, share))(kind).remote(str(log), *args)
        logs[handle._actor_id.hex()] = log
        return handle

    engines = [actor(f"engine{p.engine}", Engine, p.bundles[0], ENGINE_SHARE, p) for p in plan]
    bundles = [bundle for place in plan for bundle in place.bundles]
    trainers = [
        actor(f"trainer{rank}", Trainer, bundle, TRAINER_SHARE, rank, bundle, config)
        for rank, bundle in enumerate(bundles)
    ]
    return Fleet(engines, trainers, logs, config.run.timeout)


def start_actors(config, fleet, plan, folder, model_path, done):
    """Start and check everything; returns what each scheduler process has read of itself."""
    engines, trainers, call, rollout = fleet.engines, fleet.trainers, fleet.call, config.rollout
    samples = math.ceil(rollout.prompts_per_step * rollout.group_size / len(engines))
    limits = (samples, rollout.context_length, rollout.mem_fraction, config.run.seed)
    # Engines start first, for each sizes its KV cache by the memory that is free. Their weights
    # stay awake, for map_weights compares them.
    call(engines, "start", each=[(engine_args(place, model_path, *limits),) for place in plan])
    call(engines, "sleep", ["kv_cache"])
    uuids = call(trainers, "start", f"{folder}/rendezvous", len(trainers), model_path, done > 0)
    tp = config.placement.gpus_per_engine
    try:
        handles = call(trainers, "share_weights")
        by_engine = [(handles[at : at + tp],) for at in range(0, len(handles), tp)]
        schedulers = sum(call(engines, "map_weights", each=by_engine), [])
    finally:
        call(trainers, "forget_handle")
    check_same_device(uuids, [reading["uuid"] for reading in schedulers])
    call(engines, "update_weights", done)
    call(engines, "wake", ["kv_cache"])
    return schedulers


def check_same_device(trainers, schedulers):
    """PlacementError unless, rank by rank, trainer and scheduler have read the same UUID."""
    if trainers != schedulers:
        raise PlacementError(
            f"UUIDs by rank of trainers, {trainers}, and schedulers, {schedulers}; expected equal. "
            "Use the bundle's local_index for both."
        )


def checklist(logs, schedulers, rows):
    """Yields what this run has read of itself: what, whether it is right or None, the reading.

    Where True is written down, any other reading would have ended the run.
    """
    last, ranks = rows[-1], len(schedulers)
    yield "weights equal to the bit", True, "in every rank, after a sync onto NaN"

    differences = [row["logprob_difference_mean"] for row in rows if "loss" in row]
    agree = bool(differences) or None
    yield "rollout and trainer agree", agree, f"to {max(differences, default=0):.2g} nats"

    before, after = rows[0].get("heldout_reward_before", 0.0), last["heldout_reward"]
    yield "held-out reward", after > before or after == 1, f"{before:.3f} -> {after:.3f}"

    if "gib_sleep" not in last:
        yield "same GPU, all-reduce v2, CUDA graphs, memory", None, "needs a GPU"
        return
    yield "same GPU", True, f"trainer and scheduler read one UUID in {ranks} of {ranks} ranks"

    in_use = {scheduler["all_reduce"] for scheduler in schedulers}
    v2 = in_use == {"CustomAllReduceV2"} if ranks > len(logs) else None
    registered = [log.registered for log in logs]
    yield "all-reduce v2", v2, f"schedulers use {in_use}; inputs registered: {registered}"

    graphs = sum(len(log.captured) for log in logs)
    yield "CUDA graphs", graphs == ranks, f"captured in {graphs} of {ranks} ranks"

    asleep, awake = max(last["gib_sleep"]), min(last["gib_generate"])
    yield "memory asleep", asleep < 0.5 * awake, f"{asleep:.2f} of {awake:.2f} GiB"


# ---- 9. One run, and the command line -----------------------------------------------------------


def run(config, task, folder):
    """Place, start, train, and write down what was seen."""
    start_time = time.perf_counter()
    if SGLANG > NEWEST:
        print(f"sglang is {SGLANG}; nothing later than {NEWEST} was tried")
    group = create_placement_group(config.placement.gpus, config.run.timeout)
    bundles = probe_bundles(group, config.run.timeout)
    plan = plan_engines(bundles, config.placement.gpus_per_engine)
    print_plan(plan)
    if config.run.dry_run:
        return

    shutil.rmtree(folder / "unfinished", ignore_errors=True)  # a checkpoint that was cut off
    logs = folder / time.strftime("logs-%Y%m%d-%H%M%S")
    logs.mkdir(parents=True)
    (folder / "config.new").write_text(json.dumps(asdict(config), indent=2))
    (folder / "config.new").replace(folder / "config.json")  # nothing can cut it off
    if not config.model.model and not checkpoints(folder):
        write_random_model(config, task, folder / "unfinished")
        finish_checkpoint(folder, {}, 0)
    model_path, done = starting_point(config, folder)
    print(f"from {model_path}, {done} of {config.run.steps} steps done", flush=True)

    fleet = make_actors(config, group, plan, logs)
    schedulers = start_actors(config, fleet, plan, logs, model_path, done)
    rows = training_loop(config, task, fleet, folder, model_path, done)
    if not rows:  # no step was left to do, and the checkpoint has no metrics
        return

    lines = list(checklist(fleet.call(fleet.engines, "read_log"), schedulers, rows))
    seconds = time.perf_counter() - start_time
    summary = {"wall_seconds": seconds, "checklist": lines, "schedulers": schedulers}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    for what, right, reading in lines:
        print({True: "[x]", False: "[FAILED]", None: "[ ]"}[right], f"{what}: {reading}")
    print(f"{seconds:.0f} s, all of it in {folder}")


@contextlib.contextmanager
def ray_session(gpus, stopped_by):
    """Join or start Ray; leave no process. Signals are noted, and raise KeyboardInterrupt."""
    stopping = False

    def stop(number, _):
        stopped_by.append(number)
        if not stopping:
            raise KeyboardInterrupt  # ray.get passes it on, but wraps a SystemExit

    environment = {"py_modules": [__file__]}
    options = {"runtime_env": environment, "log_to_driver": False, "logging_level": "error"}
    if starts_ray():
        # Start Ray here, on loopback only. It counts real GPUs itself; logical ones it is told.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        environment["env_vars"] = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        options |= {"address": "local", "include_dashboard": False}
        if not torch.cuda.is_available():
            options["num_gpus"] = gpus
    others = set(psutil.Process().children(recursive=True))
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    ray._private.utils.set_sigterm_handler = lambda handler: None  # ray.init would set its own
    try:
        ray.init(**options)
        # Again: Ray's native code has just set a handler that aborts.
        signal.signal(signal.SIGTERM, stop)
        yield
    finally:
        stopping = True  # the clean-up comes to its end
        children = set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        _, alive = psutil.wait_procs(children, timeout=3)
        for process in alive:  # SGLang's, hung or starting
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(children, timeout=10)


def check_numbers(config: Config) -> list[str]:
    """Every number out of range, and SGLang's version: the name, its value, what was expected."""
    ranges = {
        "steps": (1, 999_999),
        "seed": (0, 2**32 - 1),
        "group_size": (2, 1e9),
        "max_new_tokens": (1, 1e6),  # the toy task makes answers of that length
        "mem_fraction": (0.01, 0.99),
    }
    of_type = {int: (1, 1e12), float: (1e-12, 1e12)}
    problems = []
    for settings in asdict(config).values():
        for name, value in settings.items():
            low, high = ranges.get(name) or of_type.get(type(value), (value, value))
            if not low <= value <= high:
                option = name.replace("_", "-")
                problems.append(f"--{option} is {value}; expected {low:g} to {high:g}")
    if SGLANG < OLDEST:
        problems.append(f"sglang is {SGLANG}; expected {OLDEST} or later")
    return problems


def check_machine(config: Config) -> list[str]:
    """Every setting that does not fit this machine."""
    gpus, tp, tmp = config.placement.gpus, config.placement.gpus_per_engine, gettempdir()
    listed = visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), 2**16)
    visible = torch.cuda.device_count() or len(listed)
    problems = []
    if gpus % tp:
        problems.append(f"--gpus is {gpus}; expected a multiple of --gpus-per-engine, {tp}")
    if gpus > visible and starts_ray():
        problems.append(f"--gpus is {gpus}; expected at most CUDA_VISIBLE_DEVICES' {visible}")
    if tp > 1 and starts_ray() and not (torch.cuda.is_available() or config.run.dry_run):
        problems.append(f"--gpus-per-engine is {tp}; expected 1 on a machine without GPUs")
    if len(tmp) > 38:  # Ray adds some 70 characters, and a socket's path has at most 107
        problems.append(f"TMPDIR is {tmp!r}; expected at most 38 characters")
    return problems


def starts_ray() -> bool:
    """Whether the run starts Ray on this machine, or else joins the cluster of RAY_ADDRESS."""
    return os.environ.get("RAY_ADDRESS", "") in ("", "local")


def check_task(config: Config, task: Task) -> list[str]:
    """Every setting that does not fit the task."""
    rollout, prompts = config.rollout, [prompt for prompt, _ in task.problems]
    count, length = rollout.prompts_per_step, rollout.context_length
    samples = count * rollout.group_size
    divisor = config.placement.gpus * config.training.updates_per_step
    trained = len(prompts) - HELD_OUT
    needed = max(map(len, prompts)) + max(rollout.max_new_tokens + 2, 7)  # SGLang's reserve
    largest = max(map(max, prompts))
    problems = []
    if samples % divisor or count > trained:
        problems.append(
            f"--prompts-per-step is {count}; expected at most {trained}, and {samples} samples to "
            f"be divisible by GPUs x updates, {divisor}"
        )
    if not needed <= length <= task.max_length:
        problems.append(
            f"--context-length is {length}; expected at least {needed}, for prompt, answer and "
            f"engine, and at most the model's {task.max_length}"
        )
    if largest >= task.vocab_size:
        problems.append(f"--model has {task.vocab_size} tokens; prompts use token {largest}")
    return problems


def read_config(argv):
    """The settings, and the run's folder; to resume, those of the run where none are given."""
    read = partial(tyro.cli, Config, args=argv, config=[tyro.conf.OmitArgPrefixes])
    config = read(description=__doc__)
    if not config.run.resume:
        return config, Path(f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").resolve()
    folder = Path(config.run.resume).resolve()
    saved = json.loads((folder / "config.json").read_text())
    groups = {group.name: group.default_factory(**saved[group.name]) for group in fields(Config)}
    config = read(default=Config(**groups))
    if config.model != groups["model"]:
        raise ValueError(f"--model and --shape cannot change; the run has {groups['model']}")
    return config, folder


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status.

    0; 1, a fault, after which --resume goes on; 2, settings refused, or a fault that would come
    back; 130 or 143, Ctrl-C or SIGTERM.
    """
    try:
        config, folder = read_config(argv)
        problems = check_numbers(config)
        if not problems:
            # A checkpoint has the tokenizer, too; the model's own folder may be gone by now.
            model_path, _ = starting_point(config, folder)
            task = sums_task(model_path) if config.model.model else echo_task(config)
            problems = check_machine(config) + check_task(config, task)
    except PlacementError as error:
        problems = [str(error)]
    except Exception as error:
        reason = in_short(error).split("\n\n")[0]
        problems = [f"--resume wants a run's folder, --model a causal LM. {reason}"]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2

    stopped_by = []
    try:
        with ray_session(config.placement.gpus, stopped_by):
            run(config, task, folder)
        return 0
    except BaseException as error:  # a library's SystemExit or Rust's panic, too
        if stopped_by:
            return 128 + stopped_by[0]
        print(f"error: {in_short(error)}", file=sys.stderr)
        return end_badly(error, folder, task.model_class) if folder.exists() else 2


def in_short(error: BaseException) -> str:
    """Kind and message, without the traceback that libraries put into messages."""
    text = re.sub(r"(?m)^(   |  File |.*Traceback \(most).*\n|\x1b\[\d+m", "", str(error))
    return f"{type(error).__name__}: {text}"


def end_badly(error, folder, model_class):
    """Leave the traceback in the run's folder, and say how to go on; returns the exit status.

    2, if the fault would come back: before the first step, or of numbers.
    """
    shutil.rmtree(folder / "unfinished", ignore_errors=True)  # the disk may be full
    with contextlib.suppress(OSError):
        (folder / "error.log").write_text("".join(traceback.format_exception(error)))
    steps_made = any(path.stat().st_size for path in folder.glob("metrics.jsonl"))
    comes_back = isinstance(error, FloatingPointError) or not steps_made
    if comes_back:
        remedy = f"first train another model than this {model_class}, or change settings"
        print(f"It would come back: {remedy}.", file=sys.stderr)
    command = shlex.join(["python", sys.argv[0], "--resume", str(folder)])
    print(f"The traceback is in {folder}/error.log. To go on:\n{command}", file=sys.stderr)
    return 1 + comes_back


if __name__ == "__main__":
    # Ray's workers and SGLang's processes cannot import __main__.Engine, but colocate_rl.Engine.
    import colocate_rl

    sys.exit(colocate_rl.main())
