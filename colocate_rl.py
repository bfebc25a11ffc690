"""Reinforcement learning on language models with rollout and training on the same GPUs ("colocate"), in one file.

SGLang generates, torch (FSDP2) trains, Ray places both on the GPUs of one placement group. They take turns: the engine
sleeps while the trainer works, the trainer's memory leaves while the engine generates. One step of the loop:

    generate -> engine sleeps -> trainer onloads, trains -> engine wakes its weights -> weights are sent
             -> trainer offloads -> engine wakes its KV cache and CUDA graphs

What this file is careful about, because systems of this kind get it wrong:

* `base_gpu_id`: Ray hands out ids of the *node's list* of GPUs; SGLang and torch count *positions in the process's
  list*. `local_gpu_index` converts and never guesses; `plan_engines` refuses what SGLang cannot express.
* The same GPU, proven: trainer ranks and SGLang's scheduler processes each report the UUID of the device they use.
* Custom all-reduce v2 and CUDA graphs stay on. `custom_all_reduce.cuh:37: CUDA error: invalid argument` at graph capture
  is not a mapping error: it is memory that CUDA IPC cannot export. `parse_engine_log` tells the faults apart.
* What generates is what was trained: an exact check of the weights at start, log-probabilities compared every step.

The algorithm is GRPO (DeepSeekMath, arXiv:2402.03300) with the token mean and the asymmetric clip of DAPO
(arXiv:2503.14476) and truncated importance weights for the mismatch between the two implementations of the policy.

    python colocate_rl.py                         # no GPU needed: a tiny model learns a toy task with the real engine
    python colocate_rl.py --gpus 2                # two engines, two trainer ranks
    python colocate_rl.py --dry-run               # place, print the mapping, stop
    python colocate_rl.py --gpus 2 --gpus-per-engine 2 --model Qwen/Qwen3-0.6B      # on two GPUs: one engine of TP=2
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import json
import math
import os
import random
import re

import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings
# ---------------------------------------------------------------------------------------------------------------------


def _option(default: Any, group: str, help: str, choices: tuple | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line is made from it (`gpus_per_engine` is `--gpus-per-engine`)."""

    steps: int = _option(60, "run", "training steps")
    seed: int = _option(0, "run", "makes a run repeatable: initial weights, data order, sampling")
    heldout_every: int = _option(10, "run", "score the held-out prompts greedily every this many steps")
    dry_run: bool = _option(False, "run", "place, print the mapping of bundles to engines, and stop")
    timeout: float = _option(600.0, "run", "limit, in seconds, of an engine's start and of every other single call")

    device: str = _option("auto", "placement", "auto takes cuda where there is one", ("auto", "cuda", "cpu"))
    gpus: int = _option(0, "placement", "GPUs to use, logical ones on a CPU; 0: all that this machine has, or 1")
    gpus_per_engine: int = _option(1, "placement", "tensor parallel size (TP) of each engine")
    placement_timeout: float = _option(60.0, "placement", "seconds to wait for the placement group")

    model: str = _option("", "model", "Hugging Face id or folder, trained on sums; empty: a Qwen3 from random weights")
    shape: str = _option("tiny", "model", "size of the Qwen3 from random weights", ("tiny", "0.6B", "4B"))
    trust_remote_code: bool = _option(False, "model", "run the code that a model folder brings along")

    prompts_per_step: int = _option(16, "rollout", "different prompts in a step")
    group_size: int = _option(16, "rollout", "responses sampled for each prompt")
    max_new_tokens: int = _option(6, "rollout", "longest response, in tokens")
    temperature: float = _option(1.0, "rollout", "of sampling; training divides its logits by the same")
    context_length: int = _option(512, "rollout", "longest prompt and response together, in tokens")
    mem_fraction: float = _option(0.6, "rollout", "share of a GPU for the engine's weights and KV cache")

    learning_rate: float = _option(3e-3, "training", "of AdamW, constant")
    updates_per_step: int = _option(2, "training", "optimizer steps on each batch; the clip matters from the second on")
    micro_batch: int = _option(64, "training", "sequences in one forward and backward pass of a rank")
    clip_low: float = _option(0.2, "training", "the probability ratio is clipped below 1 minus this")
    clip_high: float = _option(0.28, "training", "the probability ratio is clipped above 1 plus this")
    scale_advantages: bool = _option(True, "training", "divide advantages by their group's standard deviation")
    kl_coef: float = _option(0.0, "training", "weight of the k3 KL to the initial model; 0 keeps no such model")
    importance_cap: float = _option(2.0, "training", "cap on trainer/rollout probability; 0 turns the correction off")
    max_grad_norm: float = _option(1.0, "training", "gradient norm at which to clip")
    bucket_mib: int = _option(2048, "training", "size of one bucket of weights on its way to the engine")


def device_of(config: Config) -> str:
    return config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def check_config(config: Config) -> list[str]:
    """Every problem with the settings; each names the option, its value and what was expected."""
    problems = []

    def expect(holds: bool, name: str, expected: str) -> None:
        if not holds:
            problems.append(f"--{name.replace('_', '-')} is {getattr(config, name)!r}; expected {expected}")

    for option in dataclasses.fields(config):
        value, low = getattr(config, option.name), 0 if option.name in MAY_BE_ZERO else None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds = "a finite number, 0 or more" if low == 0 else "a finite number above 0"
            expect(math.isfinite(value) and (value > 0 or value == low), option.name, bounds)
        if choices := option.metadata["choices"]:
            expect(value in choices, option.name, f"one of {', '.join(choices)}")
    expect(config.group_size > 1, "group_size", "2 or more: an advantage compares the responses to one prompt")
    expect(config.clip_low < 1, "clip_low", "less than 1")
    expect(config.mem_fraction < 1, "mem_fraction", "less than 1")
    expect(config.max_new_tokens < config.context_length, "max_new_tokens", "fewer than --context-length")
    if problems:
        return problems
    gpus, samples = num_gpus(config), config.prompts_per_step * config.group_size
    expect(gpus % config.gpus_per_engine == 0, "gpus", f"a multiple of --gpus-per-engine, {config.gpus_per_engine}")
    expect(device_of(config) == "cuda" or config.gpus_per_engine == 1 or config.dry_run,
           "gpus_per_engine", "1 on a CPU, where SGLang has no tensor parallelism")  # fmt: skip
    expect(samples % (gpus * config.updates_per_step) == 0, "prompts_per_step", f"prompts x --group-size, {samples}, to "
           f"divide by GPUs x --updates-per-step, {gpus * config.updates_per_step}: ranks train on equal shares")  # fmt: skip
    return problems


MAY_BE_ZERO = ("gpus", "seed", "clip_low", "clip_high", "kl_coef", "importance_cap")


def num_gpus(config: Config) -> int:
    return config.gpus or torch.cuda.device_count() or 1


# ---------------------------------------------------------------------------------------------------------------------
# 2. Devices: visible list -> local index -> engine plan (pure)
# ---------------------------------------------------------------------------------------------------------------------


class PlacementError(ValueError):
    """GPUs cannot be mapped or placed as asked; the message says which, why, and what to do."""


def visible_devices(value: str | None, device_count: int) -> list[str]:
    """What a process sees, as tokens; the position of a token is torch's and SGLang's device index.

    Args:
        value: CUDA_VISIBLE_DEVICES of the process; None where it is unset.
        device_count: devices counted where it is unset. Where it is set and `device_count` is larger than the list, it
            can only be the machine's count, and an index past it is as invalid as CUDA has it.
    Returns:
        Indices without leading zeros, and `GPU-...` or `MIG-...` names. As in CUDA, the list ends before the first
        invalid entry ("-1" is the usual one).
    Raises:
        PlacementError: a device is named twice.
    """
    if value is None:
        return [str(index) for index in range(device_count)]
    entries = [entry.strip() for entry in value.split(",")]
    machine_count = device_count if device_count > len(entries) else math.inf
    visible: list[str] = []
    for entry in entries:
        if entry.isascii() and entry.isdigit() and int(entry) < machine_count:
            entry = str(int(entry))
        elif not re.fullmatch(r"(GPU|MIG)-\S+", entry):
            break
        if _positions(entry, visible):
            raise PlacementError(
                f"CUDA_VISIBLE_DEVICES={value!r} names the device {entry!r} twice; expected every device once. "
                "Remove the second mention."
            )
        visible.append(entry)
    return visible


def local_gpu_index(gpu_id: int | str, visible: Sequence[str]) -> int:
    """The position of Ray's `gpu_id` in the visible list, which is what torch and SGLang count by.

    Ray's ids are tokens of the node's list (ints where that list was unset), so under CUDA_VISIBLE_DEVICES=4,5,6,7 the
    id "4" is local index 0. An id that is not in the list is an error even where it would be a valid position.

    Args:
        gpu_id: an element of `ray.get_gpu_ids()`: an int, a digit string, a GPU UUID or its prefix, or a MIG name.
        visible: the list as `visible_devices` gives it.
    Raises:
        PlacementError: the id is not in the list, or matches several of its entries.
    """
    token = str(gpu_id).strip()
    if token.isascii() and token.isdigit():
        token = str(int(token))
    positions = _positions(token, visible)
    if len(positions) != 1:
        found = "is not in" if not positions else f"matches {len(positions)} entries of"
        raise PlacementError(
            f"gpu_id={gpu_id!r} {found} the visible list {list(visible)}; expected exactly one of its entries. Give this "
            "process the list that Ray's node was started with: set RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1 in "
            "its runtime_env, and do not change CUDA_VISIBLE_DEVICES inside it."
        )
    return positions[0]


def _positions(token: str, visible: Sequence[str]) -> list[int]:
    """Where a token stands in a list. CUDA lets a UUID be cut short, on either side of this comparison."""
    if token in visible:
        return [index for index, other in enumerate(visible) if other == token]
    if not re.match("GPU-.", token):
        return []
    return [i for i, other in enumerate(visible)
            if re.match("GPU-.", other) and (other.startswith(token) or token.startswith(other))]  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """One GPU of the placement group, as the probe found it."""

    index: int  # of the bundle in the placement group
    node_id: str
    node_ip: str
    gpu_id: int | str  # Ray's id: an entry of the node's visible list, never a position in it
    local_index: int  # the position in the visible list: torch's device index, SGLang's gpu_id
    uuid: str | None = None  # None on a machine without GPUs


@dataclass(frozen=True)
class EnginePlacement:
    """One SGLang engine: tensor parallel rank r runs on `bundles[r]`, local index `base_gpu_id + r`."""

    engine: int
    bundles: tuple[Bundle, ...]
    base_gpu_id: int
    node_ip: str


def plan_engines(bundles: Sequence[Bundle], gpus_per_engine: int) -> list[EnginePlacement]:
    """Cut the bundles into engines: sorted by node, then by *local* index (by physical id is wrong under "1,0").

    SGLang gives rank r the device `base_gpu_id + r`, so an engine's local indices must be consecutive, on one node.

    Raises:
        PlacementError: the bundles do not divide into engines, or an engine would break that rule.
    """
    if gpus_per_engine < 1 or not bundles or len(bundles) % gpus_per_engine:
        raise PlacementError(
            f"gpus_per_engine={gpus_per_engine} with {len(bundles)} bundles; expected at least one of each and engines "
            "that use up all bundles. Ask for a multiple of gpus_per_engine."
        )
    ordered = sorted(bundles, key=lambda bundle: (*_ip_order(bundle.node_ip), bundle.node_id, bundle.local_index))
    engines = []
    for engine in range(len(ordered) // gpus_per_engine):
        part = tuple(ordered[engine * gpus_per_engine : (engine + 1) * gpus_per_engine])
        where = f"engine {engine} of gpus_per_engine={gpus_per_engine}"
        if len(nodes := {bundle.node_id: bundle.node_ip for bundle in part}) > 1:
            ids = [(bundle.node_ip, bundle.gpu_id) for bundle in part]
            raise PlacementError(
                f"{where} would span the nodes {list(nodes.values())} with the Ray ids {ids}; expected one node. Choose "
                "gpus_per_engine so that it divides the GPUs taken on every node, or ask for another number of GPUs."
            )
        base = part[0].local_index
        if [bundle.local_index for bundle in part] != list(range(base, base + gpus_per_engine)):
            raise PlacementError(
                f"{where} on node {part[0].node_ip} has the local indices {[b.local_index for b in part]} (Ray ids "
                f"{[b.gpu_id for b in part]}); expected consecutive ones, since SGLang counts up from base_gpu_id. Free "
                "the GPUs between them, or start Ray's node with CUDA_VISIBLE_DEVICES listing these side by side."
            )
        engines.append(EnginePlacement(engine, part, base, part[0].node_ip))
    return engines


def _ip_order(node_ip: str) -> tuple[int, int]:
    """Addresses as numbers, so that 10.0.0.9 comes before 10.0.0.10."""
    try:
        address = ipaddress.ip_address(node_ip)
    except ValueError as error:
        raise PlacementError(
            f"node_ip={node_ip!r} is not an IP address; expected one, as Ray reports it. Start the node with "
            "--node-ip-address=<its IP>."
        ) from error
    return address.version, int(address)


def get_base_gpu_id(engine: int, gpus_per_engine: int, gpus_per_node: int) -> int:
    """The loop-index formula, for where no bundle was probed.

    It equals `plan_engines` only where the placement group holds every visible GPU of its nodes. It is wrong where
    another job holds some of them, and it never sees the order of CUDA_VISIBLE_DEVICES.
    """
    if engine < 0 or gpus_per_engine < 1 or gpus_per_node % gpus_per_engine:
        raise PlacementError(
            f"engine={engine}, gpus_per_engine={gpus_per_engine}, gpus_per_node={gpus_per_node}; expected engine >= 0 "
            "and whole engines on each node. Choose gpus_per_engine so that it divides gpus_per_node."
        )
    return engine * gpus_per_engine % gpus_per_node


# ---------------------------------------------------------------------------------------------------------------------
# 3. Placement group: create, probe, show (Ray)
# ---------------------------------------------------------------------------------------------------------------------

# With this, Ray leaves CUDA_VISIBLE_DEVICES alone, so an actor, the scheduler processes it starts and the trainers on the
# same node all see the node's list, and one local index means one device everywhere.
ONE_LIST = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
ENGINE_SHARE, TRAINER_SHARE, PROBE_SHARE = 0.3, 0.6, 0.1  # of a bundle's GPU: bookkeeping for Ray, no limit on memory
CPUS_PER_BUNDLE = 0.1  # bookkeeping too; small, so that a laptop places several logical GPUs


def create_placement_group(num_gpus: int, timeout_s: float) -> PlacementGroup:
    """Reserve `num_gpus` bundles of one GPU, packed on few nodes; waits visibly, for at most `timeout_s` seconds.

    Raises:
        PlacementError: not placed in time; says what the cluster has, what is free and what is missing.
    """
    group = placement_group([{"GPU": 1, "CPU": CPUS_PER_BUNDLE}] * num_gpus, strategy="PACK")
    deadline = time.monotonic() + timeout_s
    while not group.wait(max(0.1, min(5.0, deadline - time.monotonic()))):
        total, free = (int(resources.get("GPU", 0)) for resources in (ray.cluster_resources(), ray.available_resources()))
        state = (f"the cluster has {total} GPUs on {sum(node['Alive'] for node in ray.nodes())} node(s), {total - free} of "
                 f"them held by other jobs; {num_gpus} asked for, {max(0, num_gpus - free)} missing")  # fmt: skip
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise PlacementError(
                f"placement group not placed within placement_timeout={timeout_s:g} s: {state}. Ask for at most {free} "
                "GPUs, wait for the other jobs, add a node, or raise the limit."
            )
        print(f"waiting for GPUs: {state}", flush=True)
    return group


def on_bundle(group: PlacementGroup, bundle: int, gpu_share: float, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Options of a Ray actor that lives on a bundle and sees the node's whole list of GPUs."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {"num_gpus": gpu_share, "num_cpus": 0, "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": {**ONE_LIST, **(env or {})}}}  # fmt: skip


class Probe:
    """A short-lived actor in a bundle that reads which GPU Ray gave it."""

    def read(self, index: int) -> Bundle:
        context = ray.get_runtime_context()
        (gpu_id,) = ray.get_gpu_ids()
        (node,) = (node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        value, on_gpu = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.is_available()
        device_count = torch.cuda.device_count() if on_gpu else int(node["Resources"]["GPU"])
        visible = visible_devices(value, device_count)
        if on_gpu and len(visible) != device_count:
            raise PlacementError(
                f"CUDA_VISIBLE_DEVICES={value!r} reads as {len(visible)} devices but torch counts {device_count} on node "
                f"{node['NodeManagerAddress']}; expected the same. Name only devices that the machine has."
            )
        local_index = local_gpu_index(gpu_id, visible)
        uuid = device_uuid(local_index) if on_gpu else None
        return Bundle(index, context.get_node_id(), node["NodeManagerAddress"], gpu_id, local_index, uuid)


def device_uuid(local_index: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(local_index).uuid}"


def probe_bundles(group: PlacementGroup, timeout_s: float) -> list[Bundle]:
    """Read every bundle of a placement group, all at once; in the order of the bundles' indices."""
    count = group.bundle_count
    probes = [ray.remote(Probe).options(**on_bundle(group, index, PROBE_SHARE)).remote() for index in range(count)]
    try:
        return wait_for([probe.read.remote(i) for i, probe in enumerate(probes)], timeout_s, "the probes of the bundles")
    finally:
        for probe in probes:
            ray.kill(probe)


def wait_for(refs: list, timeout_s: float, what: str) -> list:
    """`ray.get` with a limit; an actor's own exception is raised as itself, not wrapped in a remote trace."""
    try:
        return ray.get(refs, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        raise TimeoutError(f"{what}: not done within {timeout_s:g} s. Raise that limit, or see the run's logs.") from error
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (PlacementError, EngineError)):
            raise error.cause from error
        raise
    except ray.exceptions.RayActorError as error:
        raise RuntimeError(f"{what}: the actor died: {str(error).strip().splitlines()[-1].strip()}") from error


def placement_table(engines: Sequence[EnginePlacement]) -> str:
    """The mapping as text: bundle -> node -> Ray id -> local index -> UUID -> engine -> base_gpu_id."""
    rows = [("bundle", "node", "Ray id", "local index", "UUID", "engine", "tp_rank", "base_gpu_id")]
    for engine in engines:
        for tp_rank, bundle in enumerate(engine.bundles):
            rows.append((bundle.index, f"{bundle.node_ip} ({bundle.node_id[:6]})", repr(bundle.gpu_id), bundle.local_index,
                         bundle.uuid or "no GPU", engine.engine, tp_rank, engine.base_gpu_id))  # fmt: skip
    return format_table(rows)


def format_table(rows: Sequence[Sequence[Any]]) -> str:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Engine: one Ray actor a SGLang engine, and what runs inside its scheduler processes
# ---------------------------------------------------------------------------------------------------------------------

MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")  # SGLang's names for what can sleep

# What an engine's log says, what caused it, what helps. The first two are the two halves of one well-known report.
ENGINE_FAULTS = (
    (r"custom_all_reduce\.cuh:\d+: CUDA error: invalid argument",
     "a captured all-reduce registers graph memory that CUDA IPC cannot export; the device mapping is not involved",
     "keep the graph pool out of the memory saver (SGLANG_MEMORY_SAVER_CUDA_GRAPH=false) and take expandable_segments "
     "out of PYTORCH_CUDA_ALLOC_CONF"),
    (r"CUDA error: invalid device ordinal",
     "base_gpu_id is not an index into the visible list; a physical id was probably used as one",
     "use plan_engines, and compare --dry-run with CUDA_VISIBLE_DEVICES"),
    (r"CUDA out of memory|Not enough memory|memory capacity is unbalanced",
     "the engine does not get the GPU memory that it asks for",
     "lower --mem-fraction, or end what else is on that GPU (nvidia-smi lists it)"),
    (r"Address already in use|EADDRINUSE",
     "another process listens on the engine's port",
     "start again: ports are chosen anew"),
)  # fmt: skip


class EngineError(RuntimeError):
    """The engine failed, or refused a call that would have killed its scheduler."""


def explain_failure(log: str) -> str:
    """The last error line of an engine's log, with its cause and remedy where they are known."""
    errors = [line.strip() for line in log.splitlines() if re.search(r"(Error|Exception|error)\b.*: ", line)]
    for pattern, cause, remedy in ENGINE_FAULTS:
        if match := [line.strip() for line in log.splitlines() if re.search(pattern, line)]:
            return f"{match[-1]}\n  cause: {cause}\n  remedy: {remedy}"
    return errors[-1] if errors else "its log holds no error line"


def seed_every_request(on_gpu: bool) -> None:
    """Let a request's `sampling_seed` count without SGLang's deterministic mode, which a CPU cannot run.

    SGLang's sampler draws from (seed, position) where the batch carries seeds, but fills them in only in that mode. With
    them a response depends on its prompt, its seed and the weights, and not on which requests shared its batch.
    """
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    original = SamplingBatchInfo.from_schedule_batch.__func__

    def from_schedule_batch(cls, batch, vocab_size):
        info = original(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        if None not in seeds:
            info.sampling_seed = torch.tensor(seeds, dtype=torch.int64, device=batch.device)
        return info

    SamplingBatchInfo.from_schedule_batch = classmethod(from_schedule_batch)
    if not on_gpu:
        sampler.multinomial_with_seed = draw_with_seeds  # SGLang's is a Triton kernel


def draw_with_seeds(logprobs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One draw from each row's distribution by inverting its cumulative sum, [B, V], [B], [B] -> [B, 1]."""
    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    uniform = torch.tensor([[random.Random(f"{seed}/{position}").random()] for seed, position in pairs])  # [B, 1]
    cumulative = logprobs.exp().cumsum(dim=-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=logprobs.shape[1] - 1)


class ReadingPipe:
    """Adds what a scheduler process sees to the message by which it tells its parent that it is ready."""

    def __init__(self, pipe: Any, reading: dict[str, Any]):
        self.pipe, self.reading = pipe, reading

    def send(self, message: dict[str, Any]) -> None:
        self.pipe.send({**message, "reading": self.reading})


def run_scheduler(server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, *args: Any) -> None:
    """Runs in every scheduler process in place of SGLang's function of the same signature, and hands over to it.

    Module-level, in a module that a spawned process can import: SGLang sends it there by name.
    """
    on_gpu = server_args.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(gpu_id)  # before any other CUDA call, which would leave a context on device 0
    *ranks, pipe = args
    reading = {"tp_rank": tp_rank, "local_index": gpu_id, "pid": os.getpid(),
               "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
               "uuid": device_uuid(gpu_id) if on_gpu else None}  # fmt: skip
    from sglang.srt.managers.scheduler import run_scheduler_process

    seed_every_request(on_gpu)
    run_scheduler_process(server_args, port_args, gpu_id, tp_rank, *ranks, ReadingPipe(pipe, reading))


def prepare_cpu_engine(folder: Path) -> None:
    """Let SGLang be imported without a GPU: its compiled `sgl_kernel` cannot load without libcuda.

    All that a CPU engine imports of it is `sgl_kernel.kvcacheio`, which it never calls. Child processes inherit sys.path.
    """
    package = folder / "sgl_kernel"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    (package / "kvcacheio.py").write_text(
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    def needs_gpu(*args, **kwargs):\n        raise RuntimeError(f'sgl_kernel.kvcacheio.{name} needs a GPU')\n"
        "    return needs_gpu\n"
    )
    sys.path.insert(0, str(folder))
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"


def reserve_port() -> tuple[int, socket.socket]:
    """A free TCP port of this machine, and the lock that keeps it ours while the socket lives.

    Ports are taken below the range from which the kernel hands out ephemeral ones. The lock is a name in the abstract
    namespace of unix sockets: engines that start at once never pick the same port, and a dead process leaves no lock.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 1000):
        lock = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                lock.bind(f"\0colocate_rl-port-{port}")
                probe.bind(("", port))
                return port, lock
            except OSError:  # taken by another engine, or by another program
                lock.close()
    raise EngineError("no free port found in 1000 tries between 20000 and 32000; free some, then start again")


def engine_args(config: Config, placement: EnginePlacement, model: str, port: int) -> dict[str, Any]:
    """The arguments of `sglang.Engine` for one engine."""
    args = {
        "model_path": model,
        "trust_remote_code": config.trust_remote_code,
        "skip_tokenizer_init": True,  # token ids in, token ids out
        "base_gpu_id": placement.base_gpu_id,
        "tp_size": len(placement.bundles),
        "nccl_port": port,
        "random_seed": config.seed,
        "context_length": config.context_length,
        "log_level": "info",
        "disable_piecewise_cuda_graph": True,
    }
    if device_of(config) == "cpu":
        requests = config.prompts_per_step * config.group_size
        return args | {"device": "cpu", "dtype": "float32", "max_running_requests": requests, "disable_overlap_schedule": True,
                       "max_total_tokens": 64 * requests, "disable_cuda_graph": True}  # fmt: skip
    return args | {
        "device": "cuda",
        "dtype": "bfloat16",
        "mem_fraction_static": config.mem_fraction,
        "enable_memory_saver": True,
        "enforce_disable_flashinfer_allreduce_fusion": True,  # it needs NVLink multicast
    }


class Engine:
    """A Ray actor around one in-process `sglang.Engine`; create it with `max_concurrency=2`.

    One call runs at a time. A second thread exists so that a call which arrives meanwhile is refused and not queued:
    a sleep that overtakes a request kills SGLang's scheduler, and so do waking what is awake and generating asleep.
    """

    def __init__(self, placement: EnginePlacement, log: str):
        # The scheduler reports its death by SIGQUIT, for which SGLang would kill this actor with all that it knows.
        # Python installs handlers in the main thread alone, which is where Ray runs an actor's __init__.
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        self.placement, self.log, self.engine = placement, Path(log), None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.name = f"engine {placement.engine} (base_gpu_id {placement.base_gpu_id} on {placement.node_ip})"
        self._asleep: set[str] = set()
        self._running: str | None = None
        self._lock = threading.Lock()
        with open(self.log, "ab") as file:  # everything this process and its children print goes to the engine's log
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)

    def start(self, config: Config, model: str) -> list[dict[str, Any]]:
        """Start SGLang; returns, for each tp_rank, what its scheduler process sees (visible list, index, UUID)."""
        with self._exclusive("start"):
            if device_of(config) == "cpu":
                prepare_cpu_engine(self.log.parent / "cpu_stub")
            from sglang.srt.entrypoints.engine import Engine as SGLangEngine

            class ColocatedEngine(SGLangEngine):
                run_scheduler_process_func = staticmethod(run_scheduler)

            port, self._port_lock = reserve_port()
            try:
                self.engine = ColocatedEngine(**engine_args(config, self.placement, model, port))
            except Exception as error:
                traceback.print_exc()
                raise EngineError(f"{self.name} did not start ({error}): {explain_failure(self.read_log())}") from error
            return [info["reading"] for info in self.engine._scheduler_init_result.scheduler_infos]

    def generate(self, prompts: list[list[int]], sampling: list[dict[str, Any]], timeout_s: float) -> list[Sample]:
        """Token ids in, token ids and log-probabilities out; `sampling[i]` may carry a `sampling_seed` of its own."""
        outputs = self._call("generate_request", "GenerateReqInput", timeout_s, awake=MEMORY_TAGS, input_ids=prompts,
                             sampling_params=sampling, return_logprob=True)  # fmt: skip
        return [Sample(prompt, out["output_ids"], [entry[0] for entry in out["meta_info"]["output_token_logprobs"]],
                       out["meta_info"]["weight_version"]) for prompt, out in zip(prompts, outputs, strict=True)]  # fmt: skip

    def sleep(self, tags: Sequence[str] = MEMORY_TAGS) -> None:
        """Release the GPU memory behind the tags. Weights come back as garbage: send them after the wake."""
        self._call("release_memory_occupation", "ReleaseMemoryOccupationReqInput", awake=tags, then_asleep=tags,
                   tags=list(tags))  # fmt: skip

    def wake(self, tags: Sequence[str] = MEMORY_TAGS) -> None:
        """Take the memory behind the tags again."""
        self._call("resume_memory_occupation", "ResumeMemoryOccupationReqInput", asleep=tags, tags=list(tags))

    def update_weights(self, buckets: list[bytes], version: str, last: bool) -> None:
        """Load one bucket of weights; `buckets[r]` is for tp_rank r, from the trainer rank on the same GPU.

        Each scheduler opens its own entry exactly once: a handle opened twice, or never, leaks device memory.
        """
        # What the KV cache holds came from the old weights; a cache that sleeps was flushed on its way down.
        success, message = self._call(
            "update_weights_from_tensor", "UpdateWeightsFromTensorReqInput", awake=["weights"],
            serialized_named_tensors=buckets, load_format="flattened_bucket",
            flush_cache=last and "kv_cache" not in self._asleep, weight_version=version if last else None)  # fmt: skip
        if not success:
            raise EngineError(f"{self.name} refused the weights of version {version}: {message}")

    def check_weights(self, action: str) -> None:
        """SGLang's checker: "snapshot" keeps the weights, "reset_tensors" overwrites them, "compare" wants equality."""
        success, message, *_ = self._call("check_weights", "CheckWeightsReqInput", awake=["weights"], action=action)
        if not success:
            raise EngineError(f"{self.name}: weights check {action!r} failed: {message}")

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def shutdown(self) -> None:
        """End SGLang's processes; the actor itself stays until Ray ends it."""
        if self.engine is not None:
            self.engine.shutdown()
            self.engine = None

    @contextlib.contextmanager
    def _exclusive(self, call: str, awake: Sequence[str] = (), asleep: Sequence[str] = ()) -> Iterator[None]:
        """One call at a time, on an engine that is up and whose tags are in the state that the call needs."""
        if not self._lock.acquire(blocking=False):
            raise EngineError(f"{self.name}: {call} while {self._running} is in flight; wait for that, then call again")
        try:
            self._running = call
            if (self.engine is None) != (call == "start"):
                raise EngineError(f"{self.name}: {call} on an engine that is {'not up' if self.engine is None else 'up'}")
            if unknown := {*awake, *asleep} - set(MEMORY_TAGS):
                raise EngineError(f"{self.name}: {call} with tags {sorted(unknown)}; expected some of {MEMORY_TAGS}")
            if wrong := self._asleep & set(awake):
                raise EngineError(f"{self.name}: {call} needs {sorted(wrong)} awake, but they sleep; wake them first")
            if wrong := set(asleep) - self._asleep:
                raise EngineError(f"{self.name}: {call} on {sorted(wrong)}, awake already; only what sleeps can wake")
            yield
        finally:
            self._running = None
            self._lock.release()

    def _call(self, method: str, request: str, timeout_s: float = 300, awake: Sequence[str] = (),
              asleep: Sequence[str] = (), then_asleep: Sequence[str] = (), **fields: Any) -> Any:  # fmt: skip
        """Await a request of SGLang's tokenizer manager until done, a process of the engine died, or the limit passed."""
        from sglang.srt.managers import io_struct

        async def watched() -> Any:
            manager = self.engine.tokenizer_manager
            answer = getattr(manager, method)(getattr(io_struct, request)(**fields))
            task = asyncio.ensure_future(anext(answer) if hasattr(answer, "__anext__") else answer)
            deadline = time.monotonic() + timeout_s
            while not (await asyncio.wait([task], timeout=1))[0]:
                dead = [process.pid for process in manager._subprocess_watchdog._processes if not process.is_alive()]
                if dead or time.monotonic() > deadline:
                    task.cancel()
                    reason = f"lost its processes {dead}" if dead else f"did not answer within {timeout_s:g} s"
                    raise EngineError(f"{self.name}: {method}: the engine {reason}: {explain_failure(self.read_log())}")
            return task.result()

        with self._exclusive(method, awake, asleep):
            result = self.engine.loop.run_until_complete(watched())
            self._asleep = self._asleep - set(asleep) | set(then_asleep)
            return result


@dataclass(frozen=True)
class Sample:
    """One response of the engine."""

    prompt_ids: list[int]
    response_ids: list[int]
    logprobs: list[float]  # one a response token, nats
    weight_version: str


# ---------------------------------------------------------------------------------------------------------------------
# 5. Trainer: one Ray actor a GPU; FSDP2; offload and onload; weights out
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Responses to train on, padded on the right. B sequences of T tokens; position t of the others is token t + 1."""

    tokens: torch.Tensor  # [B, T] prompt, response, padding
    mask: torch.Tensor  # [B, T-1] 1.0 where token t + 1 belongs to the response
    rollout_logprobs: torch.Tensor  # [B, T-1] nats, from the engine
    advantages: torch.Tensor  # [B]

    def __getitem__(self, rows: Any) -> Batch:
        return Batch(*(getattr(self, column.name)[rows] for column in dataclasses.fields(self)))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, column.name).to(device) for column in dataclasses.fields(self)))


class Trainer:
    """The policy and its optimizer on one GPU, sharded with all other ranks."""

    def __init__(self, rank: int, bundle: Bundle, config: Config):
        import transformers  # noqa: F401  slow, so it happens here, while the engines start

        if device_of(config) == "cpu":
            prepare_cpu_engine(Path(tempfile.mkdtemp(prefix="colocate_rl-")))
        self.rank, self.config, self.node_ip = rank, config, bundle.node_ip
        self.device = torch.device("cpu") if device_of(config) == "cpu" else torch.device("cuda", bundle.local_index)
        self.send_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._bucket = None
        self._host: list[torch.Tensor] = []  # what was offloaded, in the order of _storages

    def listen(self) -> tuple[str, int]:
        """Rank 0: open the rendezvous of all ranks, on the node's own address and a port that the kernel picks."""
        self._listener = socket.create_server((self.node_ip, 0))
        return self._listener.getsockname()

    def start(self, address: tuple[str, int], world_size: int, model: str) -> dict[str, Any]:
        """Join the process group and load the model; returns which device this process uses."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        from transformers import AutoModelForCausalLM

        limit = timedelta(seconds=self.config.timeout)
        listener = {"master_listen_fd": self._listener.detach(), "wait_for_workers": False} if self.rank == 0 else {}
        store = dist.TCPStore(*address, world_size, self.rank == 0, limit, **listener)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))  # Ray sets 1
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=self.rank, world_size=world_size,
                                timeout=limit, device_id=self.device if on_gpu else None)  # fmt: skip
        mesh = dist.init_device_mesh(self.device.type, (world_size,))
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()

        def load() -> torch.nn.Module:
            network = AutoModelForCausalLM.from_pretrained(
                model, dtype=torch.float32, trust_remote_code=self.config.trust_remote_code
            ).to(self.device)
            for module in network.modules():
                if type(module).__name__ in network._no_split_modules:
                    fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
            return fully_shard(network, mesh=mesh, mp_policy=precision, reshard_after_forward=True)

        self.model, self.reference = load(), load().requires_grad_(False) if self.config.kl_coef else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.learning_rate, weight_decay=0.0)
        return {"rank": self.rank, "local_index": self.device.index, "pid": os.getpid(),
                "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "uuid": device_uuid(self.device.index) if on_gpu else None}  # fmt: skip

    def train(self, batches: list[Batch], num_tokens: list[int]) -> dict[str, float]:
        """One optimizer step for each batch, this rank's share; `num_tokens` are response tokens over all ranks."""
        batches = [batch.to(self.device) for batch in batches]
        with torch.no_grad():
            old = [self._logprobs(self.model, batch) for batch in batches]
            reference = [self._logprobs(self.reference, b) if self.reference else None for b in batches]
        differences = torch.cat([(o - b.rollout_logprobs).abs()[b.mask > 0] for o, b in zip(old, batches, strict=True)])
        losses, norms = [], []
        for batch, old_logprobs, ref_logprobs, total in zip(batches, old, reference, num_tokens, strict=True):
            loss_sum = 0.0
            for rows in torch.arange(len(batch.tokens)).split(self.config.micro_batch):
                part = batch[rows]
                loss = grpo_loss(
                    self._logprobs(self.model, part), old_logprobs[rows], part.advantages, part.mask, num_tokens=total,
                    clip_low=self.config.clip_low, clip_high=self.config.clip_high, kl_coef=self.config.kl_coef,
                    ref_logprobs=None if ref_logprobs is None else ref_logprobs[rows],
                    rollout_logprobs=part.rollout_logprobs, importance_cap=self.config.importance_cap)  # fmt: skip
                (loss * dist.get_world_size()).backward()  # FSDP averages gradients over ranks; the loss is a sum
                loss_sum += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss_sum)
            norms.append(norm.full_tensor().item())
        return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms),
                "difference_max": differences.max().item(), "difference_sum": differences.sum().item()}  # fmt: skip

    def _logprobs(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Log-probability of every next token, [B, T-1]. Padding stands on the right, so causal attention needs no mask."""
        parts = []
        for tokens in batch.tokens.split(self.config.micro_batch):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()  # [b, T-1, V]
            parts.append(token_logprobs(logits / self.config.temperature, tokens[:, 1:]))
        return torch.cat(parts)

    # -- memory: everything this rank keeps on the device leaves for the host while the engine generates

    def _storages(self) -> list[torch.UntypedStorage]:
        states = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        weights = [*self.model.parameters(), *(self.reference.parameters() if self.reference else ())]
        return [tensor.to_local().untyped_storage() for tensor in (*weights, *states)]

    def offload(self) -> None:
        """Copy weights and optimizer state to pinned host memory, which is kept, and give up the device's."""
        self._bucket = None
        storages, on_gpu = self._storages(), self.device.type == "cuda"
        for storage in storages[len(self._host) :]:
            self._host.append(torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu))
        for storage, host in zip(storages, self._host, strict=True):
            host.copy_(_bytes_of(storage), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        for storage in storages:
            storage.resize_(0)
        if on_gpu:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def onload(self) -> None:
        """Bring back what `offload` moved. Tensors keep their identity: only the storage behind them comes and goes."""
        for storage, host in zip(self._storages(), self._host, strict=False):
            storage.resize_(host.nbytes)
            _bytes_of(storage).copy_(host, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # -- weights out

    def num_buckets(self) -> int:
        """Group the parameters into buckets of at most `bucket_mib`; a larger parameter is one by itself."""
        self._plan, size = [[]], 0
        for name, parameter in self.model.named_parameters():  # tied weights are named once
            nbytes = parameter.numel() * self.send_dtype.itemsize
            if self._plan[-1] and size + nbytes > self.config.bucket_mib * 2**20:
                self._plan, size = [*self._plan, []], 0
            self._plan[-1].append(name)
            size += nbytes
        return len(self._plan)

    def weight_bucket(self, index: int) -> bytes:
        """All ranks at once: gather a bucket's full tensors, flatten them, and return a handle to this rank's copy.

        The memory itself goes through CUDA IPC, or through shared memory on a CPU. It lives until the next call here.
        """
        from sglang.srt.utils import MultiprocessingSerializer
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        if self.device.type == "cuda":
            monkey_patch_torch_reductions()  # names the device by UUID in the handle
        torch.multiprocessing.set_sharing_strategy("file_system")  # by name: the scheduler is not a child of this process
        parameters, self._bucket = dict(self.model.named_parameters()), None
        bucket = FlattenedTensorBucket([(name, self._full(parameters[name])) for name in self._plan[index]])
        self._bucket = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the reader is another process, which does not wait for this stream
        return MultiprocessingSerializer.serialize(self._bucket)

    def _full(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().to(self.send_dtype).full_tensor()

    def save(self, folder: str) -> None:
        """All ranks at once: gather the weights; rank 0 writes them as safetensors."""
        from safetensors.torch import save_file

        tensors = {name: self._full(parameter).cpu() for name, parameter in self.model.named_parameters()}
        if self.rank == 0:
            save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


# ---------------------------------------------------------------------------------------------------------------------
# 6. GRPO (pure)
# ---------------------------------------------------------------------------------------------------------------------


def group_advantages(rewards: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """Advantages of G responses to each of P prompts, [P, G] -> [P, G] (DeepSeekMath, section 4.1).

    A group whose rewards are all equal gets exact zeros. With `scale=False` the mean is taken off but the group's
    standard deviation is not divided by (Dr. GRPO, arXiv:2503.20783).
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if scale:
        centred = centred / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return torch.where(rewards == rewards[:, :1], 0.0, 1.0).amax(dim=1, keepdim=True) * centred


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (nats) of the tokens, [B, T, V] and [B, T] -> [B, T]."""
    return -torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    num_tokens: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    rollout_logprobs: torch.Tensor | None = None,
    importance_cap: float = 0.0,
) -> torch.Tensor:
    """The clipped policy-gradient loss, summed over response tokens and divided by `num_tokens`; a scalar.

    Args:
        logprobs: [B, T] nats, with gradient: the policy that learns.
        old_logprobs: [B, T] the trainer's own, before the first update on this batch.
        advantages: [B], or broadcastable to [B, T].
        mask: [B, T] 1 for response tokens, 0 elsewhere.
        num_tokens: response tokens of the *whole* batch, over micro-batches and ranks, so that the sum of all their
            losses is the mean over tokens however the batch is split (DAPO, equation 8). Default: those of `mask`.
        clip_low, clip_high: the ratio is held in [1 - clip_low, 1 + clip_high] (DAPO, section 3.1).
        ref_logprobs, kl_coef: [B, T] adds kl_coef times the k3 estimate of KL(policy || reference)
            (joschu.net/blog/kl-approx.html).
        rollout_logprobs, importance_cap: [B, T] the engine's. Weighs each token by min(old / rollout, cap), since the
            engine sampled from slightly other probabilities than the trainer's (truncated importance sampling); 0: off.
    """
    advantages = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages  # [B] -> [B, 1]
    mask = mask.to(logprobs.dtype)
    ratio = torch.exp((logprobs - old_logprobs) * mask)  # [B, T]; padding must not overflow
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if rollout_logprobs is not None and importance_cap > 0:
        loss = loss * torch.exp((old_logprobs - rollout_logprobs) * mask).clamp(max=importance_cap).detach()
    if ref_logprobs is not None and kl_coef > 0:
        difference = (ref_logprobs - logprobs) * mask
        loss = loss + kl_coef * (torch.exp(difference) - difference - 1)
    return (loss * mask).sum() / (mask.sum().clamp(min=1) if num_tokens is None else num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Task: prompts, reward, the tiny model
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=64),
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, vocab_size=151936),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, vocab_size=151936),
}


@dataclass(frozen=True)
class Problem:
    prompt_ids: list[int]
    answer: str


@dataclass(frozen=True)
class Task:
    """Problems to train on, others held out, and a verifier: text of a response, answer -> reward in [0, 1]."""

    tokenizer: Any
    train: list[Problem]
    heldout: list[Problem]
    verify: Callable[[str, str], float]

    def reward(self, problem: Problem, response_ids: list[int]) -> float:
        return self.verify(self.tokenizer.decode(response_ids, skip_special_tokens=True), problem.answer)

    def problems(self, seed: int, step: int, count: int) -> list[Problem]:
        """The problems of a step, a function of (seed, step) alone."""
        return random.Random(f"{seed}/{step}").choices(self.train, k=count)


def split_heldout(problems: list[Problem], count: int = 64) -> tuple[list[Problem], list[Problem]]:
    random.Random(0).shuffle(problems)
    return problems[count:], problems[:count]


def echo_task(config: Config, folder: Path) -> Task:
    """A Qwen3 from random weights, written to `folder`, and what it learns: "472=" asks for its first digit, repeated.

    The reward is the share of the answer's characters that are right, so the first lucky guess already counts.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocabulary = {token: index for index, token in enumerate(("<pad>", "<eos>", "=", *"0123456789"))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    tiny = config.shape == "tiny"
    torch.manual_seed(config.seed)
    network = Qwen3ForCausalLM(Qwen3Config(
        **SHAPES[config.shape], num_key_value_heads=2 if tiny else 8, head_dim=16 if tiny else 128,
        initializer_range=0.06 if tiny else 0.02, max_position_embeddings=4096, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None))  # fmt: skip
    network.to(torch.float32 if tiny else torch.bfloat16).save_pretrained(folder)
    length = config.max_new_tokens
    problems = [Problem(tokenizer.encode(f"{number:03d}="), f"{number:03d}"[0] * length) for number in range(1000)]
    return Task(tokenizer, *split_heldout(problems), lambda text, answer: _share_of_equal(text, answer))


def _share_of_equal(text: str, answer: str) -> float:
    return sum(a == b for a, b in zip(text, answer, strict=False)) / len(answer)


def sums_task(config: Config) -> Task:
    """Sums of two-digit numbers for a pretrained model, in its own chat template; right is right, all else is 0."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)

    def encode(question: str) -> list[int]:
        if tokenizer.chat_template is None:
            return tokenizer.encode(question)
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                             return_dict=False, enable_thinking=False)  # fmt: skip

    problems = [Problem(encode(f"What is {a} + {b}? Answer with the number only."), str(a + b))
                for a in range(10, 100) for b in range(10, 100)]  # fmt: skip
    return Task(tokenizer, *split_heldout(problems), _last_number_is)


def _last_number_is(text: str, answer: str) -> float:
    return float(re.findall(r"\d+", text)[-1:] == [answer])


# ---------------------------------------------------------------------------------------------------------------------
# 8. Loop: phases, metrics
# ---------------------------------------------------------------------------------------------------------------------


def each(actors: Sequence[Any], method: str, *args: Any, timeout_s: float) -> list[Any]:
    """Call a method on all actors at once, and wait for all."""
    return wait_for([getattr(actor, method).remote(*args) for actor in actors], timeout_s, f"{method} on {len(actors)} actors")


class Run:
    """Engines and trainers on one placement group, and the phases of a step."""

    def __init__(self, config: Config, folder: Path, task: Task, model: str, plan: list[EnginePlacement], group: Any):
        self.config, self.folder, self.task, self.plan = config, folder, task, plan
        self.seconds: dict[str, float] = {}
        self.version = 0
        bundles = [bundle for placement in plan for bundle in placement.bundles]  # in the order of the trainers' ranks
        self.engines = [ray.remote(Engine).options(max_concurrency=2, **on_bundle(group, placement.bundles[0].index,
                        ENGINE_SHARE)).remote(placement, str(folder / f"engine{placement.engine}.log"))
                        for placement in plan]  # fmt: skip
        self.trainers = [ray.remote(Trainer).options(**on_bundle(group, bundle.index, TRAINER_SHARE)).remote(
                         rank, bundle, config) for rank, bundle in enumerate(bundles)]  # fmt: skip
        # The engines first: they size their KV cache by what is free, and see the GPU empty only once.
        engine_devices = sum(self.call(self.engines, "start", config, model), [])
        self.call(self.engines, "check_weights", "snapshot")
        self.heldout_before = self.score_heldout()
        self.call(self.engines, "sleep")
        address = self.call(self.trainers[:1], "listen")[0]
        trainer_devices = self.call(self.trainers, "start", address, len(bundles), model)
        self.devices = check_same_device(trainer_devices, engine_devices)
        self.check_sync()

    def call(self, actors: Sequence[Any], method: str, *args: Any) -> list[Any]:
        return each(actors, method, *args, timeout_s=self.config.timeout)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def step(self, step: int) -> dict[str, Any]:
        self.seconds = {}
        problems = self.task.problems(self.config.seed, step, self.config.prompts_per_step)
        with self.phase("generate"):
            samples = self.generate(problems, step)
        rewards = torch.tensor([self.task.reward(problem, sample.response_ids) for problem, sample in samples])
        rewards = rewards.view(len(problems), self.config.group_size)  # [P*G] -> [P, G]
        with self.phase("sleep"):
            self.call(self.engines, "sleep")
        with self.phase("onload"):
            self.call(self.trainers, "onload")
        with self.phase("train"):
            advantages = group_advantages(rewards, self.config.scale_advantages).flatten()  # [P, G] -> [P*G]
            trained = self.train(make_batch([sample for _, sample in samples], advantages))
        with self.phase("wake"):
            self.call(self.engines, "wake", ["weights"])
        with self.phase("sync"):
            self.sync_weights()
        with self.phase("offload"):
            self.call(self.trainers, "offload")
        with self.phase("wake"):
            self.call(self.engines, "wake", ["kv_cache", "cuda_graph"])
        tokens = sum(len(sample.response_ids) for _, sample in samples)
        scored = (step + 1) % self.config.heldout_every == 0 or step + 1 == self.config.steps
        return {"step": step, "reward": rewards.mean().item(),
                **({"heldout_reward": self.score_heldout()} if scored else {}),
                "tokens_per_second": tokens / self.seconds["generate"], "response_tokens": tokens, **trained,
                **{f"seconds_{name}": seconds for name, seconds in self.seconds.items()}}  # fmt: skip

    def generate(self, problems: list[Problem], step: int) -> list[tuple[Problem, Sample]]:
        """`group_size` samples of every problem, in order; the engines share them evenly."""
        group = [problem for problem in problems for _ in range(self.config.group_size)]  # [P] -> [P*G]
        seeds = random.Random(f"{self.config.seed}/{step}/sampling")
        sampling = [{"sampling_seed": seeds.getrandbits(31), "temperature": self.config.temperature} for _ in group]
        samples = self.ask_engines([problem.prompt_ids for problem in group], sampling)
        if stale := {sample.weight_version for sample in samples} - {str(self.version)}:
            raise EngineError(f"weight_version of samples is {stale}; expected {self.version}: a sync did not arrive")
        return list(zip(group, samples, strict=True))

    def score_heldout(self) -> float:
        """Mean reward of greedy answers to the held-out problems."""
        problems = self.task.heldout
        samples = self.ask_engines([p.prompt_ids for p in problems], [{"temperature": 0.0, "sampling_seed": 0}] * len(problems))
        return sum(self.task.reward(p, s.response_ids) for p, s in zip(problems, samples, strict=True)) / len(problems)

    def ask_engines(self, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> list[Sample]:
        sampling = [{"max_new_tokens": self.config.max_new_tokens, **params} for params in sampling]
        share = -(-len(prompts) // len(self.engines))
        limit = self.config.timeout
        refs = [engine.generate.remote(prompts[i * share : (i + 1) * share], sampling[i * share : (i + 1) * share], limit)
                for i, engine in enumerate(self.engines)]  # fmt: skip
        return sum(wait_for(refs, limit + 10, "generate"), [])

    def train(self, batch: Batch) -> dict[str, float]:
        """Deal the batch out: update u of rank r gets an equal, contiguous share of the rows."""
        updates, ranks = self.config.updates_per_step, len(self.trainers)
        shares = torch.arange(len(batch.tokens)).view(updates, ranks, -1)  # [P*G] -> [updates, ranks, rows]
        num_tokens = [int(batch.mask[rows.flatten()].sum()) for rows in shares]
        refs = [trainer.train.remote([batch[shares[u, rank]] for u in range(updates)], num_tokens)
                for rank, trainer in enumerate(self.trainers)]  # fmt: skip
        results = wait_for(refs, self.config.timeout, "train")
        return {"loss": sum(result["loss"] for result in results), "grad_norm": results[0]["grad_norm"],
                "logprob_difference_max": max(result["difference_max"] for result in results),
                "logprob_difference_mean": sum(r["difference_sum"] for r in results) / sum(num_tokens)}  # fmt: skip

    def sync_weights(self) -> None:
        """Bucket by bucket from each trainer rank to the engine's scheduler on the same GPU."""
        self.version += 1
        count = self.call(self.trainers, "num_buckets")[0]
        for index in range(count):
            buckets = self.call(self.trainers, "weight_bucket", index)
            tp = self.config.gpus_per_engine
            refs = [engine.update_weights.remote(buckets[i * tp : (i + 1) * tp], str(self.version), index + 1 == count)
                    for i, engine in enumerate(self.engines)]  # fmt: skip
            wait_for(refs, self.config.timeout, "update_weights")

    def check_sync(self) -> None:
        """Overwrite the engine's weights with noise, send the trainer's, and compare with what the engine had loaded.

        Trainer and engine read the same file, so equality means that every weight arrives, unchanged, in its place.
        SGLang's comparison needs a GPU; without one the log-probabilities of the first step are the check.
        """
        self.call(self.engines, "wake", ["weights"])
        self.call(self.engines, "check_weights", "reset_tensors")
        self.sync_weights()
        if device_of(self.config) == "cuda":
            self.call(self.engines, "check_weights", "compare")
        self.call(self.trainers, "offload")
        self.call(self.engines, "wake", ["kv_cache", "cuda_graph"])


def check_same_device(trainers: list[dict[str, Any]], schedulers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare, rank by rank, the device that the trainer and the engine's scheduler process read inside themselves."""
    pairs = [{"rank": t["rank"], "tp_rank": s["tp_rank"], "trainer_uuid": t["uuid"], "scheduler_uuid": s["uuid"]}
             for t, s in zip(trainers, schedulers, strict=True)]  # fmt: skip
    if any(pair["trainer_uuid"] != pair["scheduler_uuid"] for pair in pairs):
        table = format_table([list(pairs[0]), *(list(pair.values()) for pair in pairs)])
        raise PlacementError(f"trainer and engine do not share their GPUs; expected equal UUIDs in every row:\n{table}")
    return pairs


def make_batch(samples: Sequence[Sample], advantages: torch.Tensor) -> Batch:
    """Pad prompt + response on the right to the longest."""
    sequences = [torch.tensor(sample.prompt_ids + sample.response_ids) for sample in samples]
    tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # [B, T]
    mask, logprobs = torch.zeros(2, len(samples), tokens.shape[1] - 1)  # [B, T-1] each
    for row, sample in enumerate(samples):
        start = len(sample.prompt_ids) - 1  # the first response token is predicted at the prompt's last position
        mask[row, start : start + len(sample.response_ids)] = 1.0
        logprobs[row, start : start + len(sample.response_ids)] = torch.tensor(sample.logprobs)
    return Batch(tokens, mask, logprobs, advantages)


def plot(metrics: list[dict[str, Any]], path: Path) -> None:
    """Reward and phase times by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    reward, phases = figure.subplots(1, 2)
    steps = [row["step"] for row in metrics]
    reward.plot(steps, [row["reward"] for row in metrics], label="training prompts, sampled")
    scored = [(row["step"], row["heldout_reward"]) for row in metrics if "heldout_reward" in row]
    reward.plot(*zip(*scored, strict=True), "o-", label="held-out prompts, greedy")
    reward.set(xlabel="step", ylabel="reward", ylim=(0, 1.02))
    names = [name for name in metrics[0] if name.startswith("seconds_")]
    phases.stackplot(steps, *([row[n] for row in metrics] for n in names), labels=[n.removeprefix("seconds_") for n in names])
    phases.set(xlabel="step", ylabel="seconds")
    for axes in (reward, phases):
        axes.legend()
    figure.savefig(path, dpi=110)


def run(config: Config) -> dict[str, Any]:
    """One whole run; returns what `summary.json` holds."""
    start, device = time.perf_counter(), device_of(config)
    folder = Path("runs", time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}").resolve()
    try:
        start_ray(config)
        group = create_placement_group(num_gpus(config), config.placement_timeout)
        plan = plan_engines(probe_bundles(group, config.placement_timeout), config.gpus_per_engine)
        print(placement_table(plan), flush=True)
        if config.dry_run:
            return {}
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
        model = folder / "model"
        task = sums_task(config) if config.model else echo_task(config, model)
        this = Run(config, folder, task, config.model or str(model), plan, group)
        metrics = []
        with open(folder / "metrics.jsonl", "w", buffering=1) as file, tqdm(total=config.steps, unit="step") as bar:
            for step in range(config.steps):
                row = this.step(step)
                metrics.append(row)
                file.write(json.dumps(row) + "\n")
                bar.update()
                bar.set_postfix(reward=f"{row['reward']:.3f}", tokens_per_second=f"{row['tokens_per_second']:.0f}")
                bar.write(step_line(row))
        if config.model:
            task.tokenizer.save_pretrained(model)
            from transformers import AutoConfig

            AutoConfig.from_pretrained(config.model).save_pretrained(model)
        this.call(this.trainers, "onload")
        this.call(this.trainers, "save", str(model))
        plot(metrics, folder / "reward.png")
        versions = {name: importlib.metadata.version(name) for name in ("sglang", "torch", "ray", "transformers")}
        summary = {"heldout_reward_before": this.heldout_before, "heldout_reward_after": metrics[-1]["heldout_reward"],
                   "steps": config.steps, "wall_seconds": time.perf_counter() - start, "device": device,
                   "devices": this.devices, "versions": versions}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
        print(f"held-out reward {this.heldout_before:.3f} -> {summary['heldout_reward_after']:.3f} in {config.steps} steps, "
              f"{summary['wall_seconds']:.0f} s; see {folder}")  # fmt: skip
        each(this.engines, "shutdown", timeout_s=60)
        return summary
    finally:
        ray.shutdown()  # ends every actor; SGLang's processes are set to die with theirs


def step_line(row: dict[str, Any]) -> str:
    heldout = f"  heldout {row['heldout_reward']:.3f}" if "heldout_reward" in row else ""
    phases = "  ".join(f"{name.removeprefix('seconds_')} {row[name]:.2f}" for name in row if name.startswith("seconds_"))
    return (f"step {row['step']:4d}  reward {row['reward']:.3f}  {row['tokens_per_second']:7.0f} tok/s  "
            f"logprob difference {row['logprob_difference_max']:.1e}  {phases}{heldout}")  # fmt: skip


def start_ray(config: Config) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine that listens on loopback alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    shipped = {"py_modules": [str(Path(__file__).resolve())]}
    if "RAY_ADDRESS" in os.environ:
        ray.init(runtime_env=shipped, log_to_driver=False, logging_level="error")
    else:
        logical = {"num_gpus": num_gpus(config)} if device_of(config) == "cpu" else {}
        ray.init(address="local", _node_ip_address="127.0.0.1", include_dashboard=False, runtime_env=shipped,
                 log_to_driver=False, logging_level="error", **logical)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# 9. Command line
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> Config:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(Config):
        name = option.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name) if name not in groups else None)
        flag = "--" + option.name.replace("_", "-")
        if isinstance(option.default, bool):
            group.add_argument(flag, default=option.default, help=option.metadata["help"], action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(flag, default=option.default, help=option.metadata["help"] or " ",
                               type=type(option.default), choices=option.metadata["choices"])  # fmt: skip
    return Config(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 (failed), 2 (refused), 130 (Ctrl-C), 143 (SIGTERM)."""
    config = parse_args(argv)
    if problems := check_config(config):
        print("\n".join(problems), file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(config)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (PlacementError, EngineError, TimeoutError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # What this script defines would be called __main__.Engine, which neither Ray's workers nor SGLang's processes can
    # import. Under its own name they can.
    from colocate_rl import main as main_by_name

    sys.exit(main_by_name())
