"""Reinforcement learning on language models with rollout and training on the same GPUs ("colocate"), in one file.

SGLang generates, torch (FSDP2) trains, Ray places both, and they take turns; custom all-reduce v2 and CUDA graphs stay
on. GRPO (arXiv:2402.03300) with DAPO's token mean and asymmetric clip (arXiv:2503.14476), truncated importance weights.

    python colocate_rl.py           # no GPU needed: a tiny model learns a toy task with the real engine; see --help
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import parent_process, reduction
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import psutil
import pynvml
import ray
import torch
import torch.distributed as dist
from packaging.version import Version
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_optimizer_state_dict
from tqdm import tqdm


# ---- 1. Settings ----------------------------------------------------------------------------------------------------
def _option(default: Any, group: str, help: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata=dict(group=group, help=help, **limits))


@dataclasses.dataclass
class Config:
    """Every setting of a run; the command line is made from it. Numbers: above 0, or at least `low`; below `high`."""
    steps: int = _option(50, "run", "training steps")
    seed: int = _option(0, "run", "makes a run repeatable: initial weights, data, sampling", low=0, high=2**32)
    heldout_every: int = _option(10, "run", "every this many steps: score the held-out prompts, write a checkpoint")
    resume: str = _option("", "run", "folder of a run to go on with, by its own settings where none are given")
    max_restarts: int = _option(2, "run", "restarts from the last checkpoint, anew after each new step", low=0)
    dry_run: bool = _option(False, "run", "place, print the mapping of bundles to engines, and stop")
    timeout: float = _option(600.0, "run", "limit, in seconds, of an engine's start and of every other single call")
    device: str = _option("auto", "placement", "auto: cuda where there is one", choices=("auto", "cuda", "cpu"))
    gpus: int = _option(0, "placement", "GPUs to use, logical ones on a CPU; 0: all of this machine, or 1", low=0)
    gpus_per_engine: int = _option(1, "placement", "tensor parallel size (TP) of each engine")
    placement_timeout: float = _option(60.0, "placement", "seconds to wait for the placement group")
    model: str = _option("", "model", "Hugging Face id or folder, trained on sums; empty: a Qwen3 from random weights")
    shape: str = _option("tiny", "model", "size of the Qwen3 from random weights", choices=("tiny", "0.6B"))
    prompts_per_step: int = _option(16, "rollout", "different prompts in a step")
    group_size: int = _option(8, "rollout", "responses sampled for each prompt", low=2)
    max_new_tokens: int = _option(4, "rollout", "longest response, in tokens")
    temperature: float = _option(1.0, "rollout", "of sampling; training divides its logits by the same")
    context_length: int = _option(512, "rollout", "longest prompt and response together, in tokens")
    mem_fraction: float = _option(0.6, "rollout", "share of a GPU for the engine's weights and KV cache", high=1)
    graph_pool: str = _option("resident", "rollout", "where CUDA graphs are kept", choices=("resident", "saver"))
    learning_rate: float = _option(3e-3, "training", "of AdamW, constant")
    updates_per_step: int = _option(2, "training", "optimizer steps on a batch; the clip matters from the second on")
    micro_batch: int = _option(64, "training", "sequences in one forward and backward pass of a rank")
    compile: bool = _option(False, "training", "torch.compile the layers and the log-probabilities")
    offload: bool = _option(True, "training", "weights and optimizer state leave the GPU while the engine generates")

    def __post_init__(self) -> None:
        self.device = self.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
        self.gpus = self.gpus or (torch.cuda.device_count() if self.device == "cuda" else 1)


def check_config(config: Config, task: "Task") -> list[str]:
    """Every problem with the settings; each names the option, its value and what was expected."""
    rules = []
    for option in dataclasses.fields(config):
        low, high = option.metadata.get("low"), option.metadata.get("high", math.inf)
        if type(value := getattr(config, option.name)) in (int, float):
            ok = value < high and (value > 0 if low is None else value >= low)
            rules.append((option.name, ok, f"{'above 0' if low is None else f'at least {low}'}, below {high}"))
    tp, samples = config.gpus_per_engine, config.prompts_per_step * config.group_size
    shares, trained = max(1, config.gpus * config.updates_per_step), len(task.problems[64:])
    needed = max(len(prompt) for prompt, _ in task.problems) + max(config.max_new_tokens + 2, 7)  # SGLang keeps some
    rules += [("context_length", needed <= config.context_length, f"at least {needed}, for prompt, answer and engine"),
              ("model", (size := len(task.tokenizer)) <= task.vocab_size, f"an embedding of {size} tokens or more"),
              ("gpus_per_engine", tp == 1 or config.device == "cuda" or config.dry_run, "1 on a CPU"),
              ("gpus", tp < 1 or (config.gpus > 0 and config.gpus % tp == 0), f"a multiple of --gpus-per-engine, {tp}"),
              ("prompts_per_step", samples % shares == 0, f"{samples} samples to divide by GPUs x updates, {shares}"),
              ("prompts_per_step", config.prompts_per_step <= trained, f"at most {trained}, those not held out")]
    return [f"--{name.replace('_', '-')} is {getattr(config, name)!r}; expected {expected}"
            for name, holds, expected in rules if not holds]


# ---- 2. Devices: visible list -> local index -> engine plan (pure) --------------------------------------------------
class PlacementError(ValueError):
    """GPUs cannot be mapped or placed as asked; the message says which, why, and what to do."""


class EngineError(RuntimeError):
    """The engine failed, or refused a call that would have killed its scheduler."""


def visible_devices(value: str | None, device_count: int) -> list[str]:
    """The devices that a process sees; None, unset, means all. As in CUDA, the first invalid entry ends the list."""
    if value is None:
        return [str(index) for index in range(device_count)]
    entries, visible = [entry.strip() for entry in value.split(",")], []
    of_machine = device_count > len(entries)  # device_count is of all GPUs, or else of those that CUDA sees of the list
    for entry in entries:
        if re.fullmatch("[0-9]+", entry) and not (of_machine and int(entry) >= device_count):
            entry = str(int(entry))
        elif not re.fullmatch(r"(GPU|MIG)-\S+", entry):
            break
        if any(_same_device(entry, other) for other in visible):
            raise PlacementError(f"CUDA_VISIBLE_DEVICES={value!r} names {entry!r} twice; expected once. Remove one.")
        visible.append(entry)
    return visible[:device_count]


def local_gpu_index(gpu_id: int | str, visible: Sequence[str]) -> int:
    """The position of Ray's `gpu_id` (an int, digits, a GPU UUID or its prefix, a MIG name) in the visible list; torch
    and SGLang count so. PlacementError if it is ambiguous or not in the list, even where it is a valid position."""
    token = re.sub(r"^0+(?=\d)", "", str(gpu_id).strip())
    positions = [index for index, entry in enumerate(visible) if _same_device(token, entry)]
    if len(positions) != 1:
        raise PlacementError(f"gpu_id={gpu_id!r} matches {len(positions)} entries of the list {list(visible)}; expected"
                             " one. Give this process its node's list: a runtime_env with ONE_LIST.")
    return positions[0]


def _same_device(one: str, other: str) -> bool:  # CUDA takes a UUID cut short: either may be a prefix of the other
    return one == other or one[:4] == other[:4] == "GPU-" and (one.startswith(other) or other.startswith(one))


@dataclasses.dataclass(frozen=True)
class Bundle:  # one GPU of the placement group, as its probe found it
    index: int  # of the bundle in the placement group
    node_id: str
    node_ip: str
    gpu_id: int | str  # Ray's: an entry of the node's visible list, never a position in it
    local_index: int  # the position in the visible list: torch's device index, SGLang's gpu_id
    uuid: str | None = None  # None on a machine without GPUs


EnginePlacement = namedtuple("EnginePlacement", "engine bundles base_gpu_id node_ip")  # tp_rank r: base_gpu_id + r


def plan_engines(bundles: Sequence[Bundle], gpus_per_engine: int) -> list[EnginePlacement]:
    """Cut the bundles, sorted by node and then by *local* index, into engines. (By physical id 1,0 would come wrong.)
    PlacementError where an engine would not get consecutive local indices on one node."""
    if gpus_per_engine < 1 or not bundles or len(bundles) % gpus_per_engine:
        raise PlacementError(f"{gpus_per_engine=}, {len(bundles)} bundles; expected whole engines. Ask for a multiple.")
    ordered = sorted(bundles, key=lambda b: (int(ipaddress.ip_address(b.node_ip)), b.node_id, b.local_index))
    engines = []
    for engine, start in enumerate(range(0, len(ordered), gpus_per_engine)):
        part = tuple(ordered[start : start + gpus_per_engine])
        local, node_ips = [bundle.local_index for bundle in part], [bundle.node_ip for bundle in part]
        which = f"engine {engine} of {gpus_per_engine=} would get the Ray ids {[b.gpu_id for b in part]}"
        if len({bundle.node_id for bundle in part}) > 1:
            raise PlacementError(f"{which} on {node_ips}; expected one node. Choose a divisor of each node's GPUs.")
        if local != list(range(local[0], local[0] + gpus_per_engine)):
            raise PlacementError(f"{which} at the local indices {local} of node {node_ips[0]}; expected consecutive "
                                 "ones. Free those between, or list these side by side in CUDA_VISIBLE_DEVICES.")
        engines.append(EnginePlacement(engine, part, base_gpu_id=local[0], node_ip=node_ips[0]))
    return engines


def get_base_gpu_id(engine: int, gpus_per_engine: int, gpus_per_node: int) -> int:
    """The loop-index formula, where no bundle was probed; sure to equal the plan only if all visible GPUs are taken."""
    if engine < 0 or gpus_per_engine < 1 or gpus_per_node < 1 or gpus_per_node % gpus_per_engine:
        raise PlacementError(f"{engine=}, {gpus_per_engine=}, {gpus_per_node=}; expected one that divides the node's")
    return engine * gpus_per_engine % gpus_per_node


# ---- 3. Placement group: create, probe (Ray) ------------------------------------------------------------------------
# With these, Ray and SGLang leave the list alone, and one local index means one device in every process of a node.
ONE_LIST = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "0"}
ENGINE_SHARE, TRAINER_SHARE, PROBE_SHARE = 0.3, 0.6, 0.1  # of a bundle's GPU: Ray's bookkeeping, no limit on memory


def create_placement_group(num_gpus: int, timeout_s: float) -> PlacementGroup:
    """Reserve bundles of one GPU each, packed on few nodes. Waits visibly; PlacementError after `timeout_s` seconds."""
    group, deadline = placement_group([{"GPU": 1, "CPU": 0.1}] * num_gpus, "PACK"), time.monotonic() + timeout_s
    while not group.wait(max(0.1, min(5.0, deadline - time.monotonic()))):
        total, free = (int(found.get("GPU", 0)) for found in (ray.cluster_resources(), ray.available_resources()))
        state = (f"asked for {num_gpus} GPUs, {max(0, num_gpus - free)} are missing: the cluster has {total} on "
                 f"{sum(node['Alive'] for node in ray.nodes())} node(s), of which others hold {total - free}")
        if time.monotonic() >= deadline:
            remove_placement_group(group)
            raise PlacementError(f"no placement group within placement_timeout={timeout_s:g} s: {state}. Ask for at "
                                 f"most {free}, wait for the others, who may hold all CPUs, or raise the limit.")
        print(f"waiting for the placement group: {state}", flush=True)
    return group


def on_bundle(group: PlacementGroup, index: int, gpu_share: float) -> dict[str, Any]:
    """Options of a Ray actor that lives on a bundle and sees the node's whole list of GPUs."""
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return dict(num_gpus=gpu_share, num_cpus=0, scheduling_strategy=strategy, runtime_env={"env_vars": ONE_LIST})


def probe_bundle(index: int) -> Bundle:
    """Runs in a bundle, and reads which GPU Ray gave it."""
    (gpu_id,), node_id = ray.get_gpu_ids(), ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    device_count = torch.cuda.device_count() or int(node["Resources"]["GPU"])  # logical GPUs
    local_index = local_gpu_index(gpu_id, visible_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), device_count))
    return Bundle(index, node_id, node["NodeManagerAddress"], gpu_id, local_index, read_device(local_index)["uuid"])


def read_device(local_index: int) -> dict[str, Any]:
    """What the calling process sees at an index; without GPUs the UUID is None."""
    uuid = f"GPU-{torch.cuda.get_device_properties(local_index).uuid}" if torch.cuda.is_available() else None
    return dict(pid=os.getpid(), local_index=local_index, uuid=uuid)


def probe_bundles(group: PlacementGroup, timeout_s: float) -> list[Bundle]:
    """Read every bundle of a placement group, all at once; in the order of the bundles' indices."""
    probes = [ray.remote(**on_bundle(group, i, PROBE_SHARE))(probe_bundle).remote(i) for i in range(group.bundle_count)]
    return wait_for(probes, timeout_s, "the bundles' probes")


def wait_for(refs: list, timeout_s: float, what: str, actors: Iterable[Any] = ()) -> list:
    """`ray.get` with a limit (TimeoutError). This file's errors come out as themselves, an actor's death in 5 s."""
    deadline, pings = time.monotonic() + timeout_s, []
    while True:
        try:
            return ray.get([*refs, *pings], timeout=max(0.0, min(5.0, deadline - time.monotonic())))[: len(refs)]
        except ray.exceptions.GetTimeoutError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{what}: not done within {timeout_s:g} s; raise that limit if slow") from error
            pings = [actor.__ray_ready__.remote() for actor in actors]  # raises RayActorError where one is dead
        except ray.exceptions.RayTaskError as error:
            own = isinstance(error.cause, (PlacementError, EngineError))
            raise error.cause if own else RuntimeError(f"{what}: {error}") from error


# ---- 4. Engine: one Ray actor a SGLang engine, and what runs inside its scheduler processes -------------------------
SGLANG = importlib.metadata.version("sglang")
MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")  # SGLang's names for what can sleep
GraphPool = namedtuple("GraphPool", "in_saver register_inputs alloc_conf why")  # what plan_graph_pool decides on
Sample = namedtuple("Sample", "prompt_ids response_ids logprobs weight_version")  # one logprob a response token, nats
ENGINE_FAULTS = (  # in an engine's log, with cause and remedy; these two were taken for one and the same fault
    (r"custom_all_reduce\.cuh:\d+: CUDA error: invalid argument", "CUDA IPC cannot export what a captured all-reduce "
     "registers, of the memory saver or expandable_segments; the mapping is right. Use plan_graph_pool."),
    (r"CUDA error: invalid device ordinal", "base_gpu_id is no index into the visible list, but maybe a physical id. "
     "Use plan_engines, and compare --dry-run with CUDA_VISIBLE_DEVICES."))


class EngineLogReport(NamedTuple):  # what an engine's log says of its start
    all_reduce: str | None  # "v2", "v1", or None: the log does not say
    graphs: dict[int, list[int]]  # tp_rank -> batch sizes of the CUDA graphs it captured
    registered: int | None  # inputs of captured all-reduces that were registered; None: SGLang said nothing
    replayed: bool | None  # a decode batch ran with a graph; None: the log has no decode batch
    errors: list[str]  # all error lines
    fault: str  # the last of them that is known, with its cause and remedy, or else the last one, or ""
    plan: str  # what plan_graph_pool decided on, and why; "" in the log of an engine that this file did not start

    def __str__(self) -> str:
        inputs = "0 (messages too small to show the fault)" if self.registered == 0 else self.registered or "not logged"
        sizes = {rank: f"{len(sizes)} up to batches of {max(sizes)}" for rank, sizes in self.graphs.items()}
        works = f"all-reduce {self.all_reduce}, inputs registered: {inputs}, CUDA graphs by rank: {sizes or 'none'}"
        return self.fault if self.fault and not self.graphs else f"{works}\n{self.plan}".strip()


def parse_engine_log(text: str) -> EngineLogReport:
    """Read an engine's log, of SGLang 0.5.12 or 0.5.13, or of one up to 0.5.15 that this file started."""
    registered = re.search(r"Regist(?:ering|ered) (\d+) cuda graph addresses", text)
    v2 = re.search(r"Custom allreduce v2 initialized|all-reduce: CustomAllReduceV2", text)  # v1 does not say so
    sizes = dict(re.findall(r"(?i)\[[^][]*?(?:TP(\d+))?\] capture .*graph.*\bbs[ =](\[[\d, ]*\])", text))
    ranks = re.findall(r"(?i)\[[^][]*?(?:TP(\d+))?\] capture .*graph end", text)  # a progress bar may stand before it
    bad = r"^.*(?:(?:Error|Exception)\b.*: \S|CUDA error: |crashed with exit code|check_weights see error).*|^\w+Error$"
    errors = [line.strip() for line in re.findall(bad, text, re.M)]
    known = [f"{line}\n  cause: {why}" for line in errors for pattern, why in ENGINE_FAULTS if re.search(pattern, line)]
    graphs = {int(rank or 0): json.loads(sizes.get(rank) or sizes[min(sizes)]) for rank in sorted(ranks) if sizes}
    return EngineLogReport("v2" if v2 else "v1" if registered else None, graphs, registered and int(registered[1]),
                           bool(re.search("Decode.*graph: True", text)) if "Decode batch" in text else None, errors,
                           (known or errors or [""])[-1], (re.findall(r"SGLang .*: CUDA graphs .*", text) or [""])[0])


def plan_graph_pool(version: str, memory_saver: bool, tp_size: int, alloc_conf: str, prefer: str) -> GraphPool:
    """Where CUDA graphs keep their memory, "saver" or "resident" as preferred, so that capture cannot fail."""
    handled = Version(version) >= Version("0.5.15")  # by SGLang itself
    in_saver = memory_saver and prefer == "saver"
    register_inputs = not in_saver or handled or tp_size == 1
    why = f"SGLang {version}, TP={tp_size}: CUDA graphs {'in' if in_saver else 'outside'} the memory saver, whose"
    why += " memory CUDA IPC cannot export" + (": no all-reduce inputs registered" if in_saver and tp_size > 1 else "")
    if "expandable_segments:True" in alloc_conf.replace(" ", "") and (memory_saver or tp_size > 1 and not handled):
        alloc_conf = ",".join(part for part in alloc_conf.split(",") if "expandable_segments" not in part)
        why += "; WARNING: expandable_segments taken out for the engine: the memory saver and CUDA IPC refuse them"
    return GraphPool(in_saver, register_inputs, alloc_conf, why)


def run_scheduler(register_inputs: bool, server_args: Any, port_args: Any, gpu_id: int, *args: Any) -> None:
    """Runs in every scheduler process in place of SGLang's function, and hands over to it."""
    # SGLang asks the kernel to end a scheduler with its parent, but only later, when it has imported itself.
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()
    from sglang.srt.distributed.parallel_state import get_tp_group
    from sglang.srt.layers import sampler
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.server_args import get_global_server_args
    if on_gpu := server_args.device == "cuda":
        torch.cuda.set_device(gpu_id)  # before any other CUDA call, which would leave a context on device 0
    sampler.multinomial_with_seed = torch.compile(draw_with_seeds, dynamic=True) if on_gpu else draw_with_seeds
    if not register_inputs:
        from sglang.srt.distributed.device_communicators.custom_all_reduce_v2 import CustomAllReduceV2
        CustomAllReduceV2.capture = lambda self: contextlib.nullcontext()
    def send_ready(message: dict[str, Any], send: Callable = args[-1].send) -> None:
        # Set earlier it selects other kernels; now it makes a draw depend on its request's seed and position only.
        get_global_server_args().enable_deterministic_inference = True
        communicator = get_tp_group().ca_comm
        all_reduce = type(communicator).__name__ if communicator and not communicator.disabled else None
        print(f"all-reduce: {all_reduce}", flush=True)  # SGLang 0.5.14 and later do not log it
        device = torch.cuda.current_device() if on_gpu else gpu_id  # in use, not as told
        send({**message, "reading": dict(tp_rank=args[0], all_reduce=all_reduce, **read_device(device))})
    args[-1].send = send_ready  # the pipe on which the scheduler says, once, that it is ready
    run_scheduler_process(server_args, port_args, gpu_id, *args)


def receive_weights(model: torch.nn.Module, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Runs in every scheduler process: SGLang's own loader, first with all weights, in memory of the trainer that stays
    mapped. Later calls bring none, and do the same again: on a GPU, as a CUDA graph."""
    if named_tensors:
        model.reload = partial(model.load_weights, named_tensors)
    model.reload()
    if named_tensors and named_tensors[0][1].is_cuda:
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            torch.cuda.set_sync_debug_mode("error")  # what waits for the GPU raises before it can spoil the capture
            try:
                model.reload()
                model.reload, model.mapped = graph.replay, named_tensors  # a graph keeps nothing alive
            except RuntimeError as error:
                print(f"WARNING: syncs run the loader itself, which a CUDA graph cannot hold: {error}", flush=True)
            torch.cuda.set_sync_debug_mode("default")
    torch.get_device_module(next(model.parameters()).device).synchronize()  # the trainer may write there again


def draw_with_seeds(logprobs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One draw a row, [B, V], [B], [B] -> [B, 1]: each token rings after an exponential time / its probability, and the
    first is drawn. SGLang's own is slower, needs Triton, and now and then takes a token whatever its probability."""
    row = (seeds.long() * 0x2545F4914F6CDD1D ^ positions) * 0x5851F42D4C957F2D
    bits = row[:, None] + torch.arange(1, logprobs.shape[1] + 1, device=row.device)  # [B, V]; the hash of 0 would be 0
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):  # the hash of splitmix64
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor  # masked: an unsigned shift
    minus_uniform = (((bits >> 32) & 0xFFFFFFFF) + 0.5) * -(2.0**-32)  # fp32: exact near 0, may round to -1
    return (logprobs - torch.log(-torch.log1p(minus_uniform).clamp(min=-20.0))).argmax(dim=1, keepdim=True)


def prepare_cpu_engine(folder: str) -> None:
    """Let SGLang be imported without libcuda: a stub stands for `sgl_kernel`, of which a CPU engine calls nothing."""
    (package := Path(folder) / "sgl_kernel").mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    (package / "kvcacheio.py").write_text("__getattr__ = {}.get")  # whatever is imported from it is None
    sys.path.insert(0, folder)  # child processes inherit it
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"


def log_to(path: str) -> None:
    """What this process and its children print goes to a file from now on."""
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def engine_args(config: Config, placement: EnginePlacement, model: str) -> dict[str, Any]:
    args = dict(model_path=model, context_length=config.context_length, base_gpu_id=placement.base_gpu_id,
                tp_size=len(placement.bundles), device=config.device, random_seed=config.seed,
                skip_tokenizer_init=True, log_level="info", weight_version="0",
                custom_weight_loader=[f"{__name__}.receive_weights"], sleep_on_idle=True,  # else it takes a core
                sampling_backend="pytorch",  # flashinfer's refuses seeds beside top_p or a greedy row
                decode_log_interval=min(config.max_new_tokens, 16))  # the log says whether graphs are replayed
    own = -(-config.prompts_per_step * config.group_size // (config.gpus // config.gpus_per_engine))
    if config.device == "cpu":  # if it ran out of tokens, it would need CUDA
        return dict(args, dtype="float32", max_running_requests=own, max_total_tokens=(own + 1) * config.context_length)
    newer = Version(SGLANG) >= Version("0.5.14")  # it renamed both; larger batches decode without a graph
    graphs = {"cuda_graph_max_bs_decode" if newer else "cuda_graph_max_bs": max(64, min(own, 512)),
              "disable_prefill_cuda_graph" if newer else "disable_piecewise_cuda_graph": True}  # no saver for a prefill
    return dict(args, dtype="bfloat16", mem_fraction_static=config.mem_fraction, enable_memory_saver=True,
                enforce_disable_flashinfer_allreduce_fusion=True, **graphs)  # it needs NVLink multicast


class Engine:
    """A Ray actor with an in-process SGLang engine. It dies with any of SGLang's processes; its calls queue up."""
    def __init__(self, log: str, placement: EnginePlacement):
        self.name = f"engine {placement.engine} (base_gpu_id {placement.base_gpu_id} on {placement.node_ip})"
        self.uuids, self.log, self._asleep = [bundle.uuid for bundle in placement.bundles], log, set()
        log_to(log)
        if placement.bundles[0].uuid:
            pynvml.nvmlInit()

    def start(self, args: dict[str, Any], prefer: str = "resident", pool: GraphPool | None = None) -> list[dict]:
        """Start SGLang (or EngineError), with `pool` if given, not the plan; returns its schedulers' readings."""
        conf = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF", "")  # as torch
        pool = pool or plan_graph_pool(SGLANG, args.get("enable_memory_saver", False), args["tp_size"], conf, prefer)
        os.environ |= {"SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{self.log}.rendezvous",  # needs no port
                       "SGLANG_MEMORY_SAVER_CUDA_GRAPH": str(pool.in_saver).lower(),
                       "PYTORCH_CUDA_ALLOC_CONF": pool.alloc_conf, "PYTORCH_ALLOC_CONF": pool.alloc_conf}
        print(pool.why if args["device"] == "cuda" else "without a GPU", flush=True)
        try:
            if args["device"] == "cpu":
                prepare_cpu_engine(f"{self.log}.stub")
            elif (visible := os.environ.get("CUDA_VISIBLE_DEVICES", "")).startswith("GPU-"):  # SGLang would lose v2
                uuids = [pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(i))
                         for i in range(pynvml.nvmlDeviceGetCount())]
                numbers = [str(local_gpu_index(token, uuids)) for token in visible_devices(visible, len(uuids))]
                os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(numbers), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            from sglang.srt.entrypoints.engine import Engine as SGLangEngine
            SGLangEngine.run_scheduler_process_func = staticmethod(partial(run_scheduler, pool.register_inputs))
            SGLangEngine._launch_detokenizer_subprocesses = lambda **_: ([], [])  # skip_tokenizer_init idles it
            # A scheduler reports its death by SIGQUIT, at which SGLang would kill this actor and all that it knows.
            self.engine = SGLangEngine(**args, custom_sigquit_handler=signal.SIG_IGN)
        except Exception as error:
            log = parse_engine_log(Path(self.log).read_text(errors="replace"))
            raise EngineError(f"{self.name} did not start ({error}): {log.fault or log}\n  log: {self.log}") from error
        self.engine.flush_cache()  # SGLang's handler, set with this first request, acts only while a request runs;
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # the default ends this actor with any of its processes, at once
        return [info["reading"] for info in self.engine._scheduler_init_result.scheduler_infos]

    def memory_used(self) -> list[float]:
        """GiB in use on each of the engine's GPUs, by whomever, as NVML counts it; takes no CUDA context."""
        return [pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(u)).used / 2**30 for u in self.uuids]

    def generate(self, prompts: list[list[int]], sampling: list[dict[str, Any]]) -> list[Sample]:
        """Token ids in, token ids and log-probabilities out; each `sampling` may carry its own `sampling_seed`."""
        self._expect("generate", awake=MEMORY_TAGS)
        outputs = self.engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
        return [Sample(prompt, out["output_ids"], [entry[0] for entry in out["meta_info"]["output_token_logprobs"]],
                       out["meta_info"]["weight_version"]) for prompt, out in zip(prompts, outputs, strict=True)]

    def sleep(self, tags: Sequence[str] = MEMORY_TAGS) -> None:
        """Release the GPU memory behind the tags. Weights come back as garbage: send them after the wake."""
        self._expect("sleep", awake=tags)
        reply = self.engine.tokenizer_manager.flush_cache(timeout_s=60.0)  # of a batch in flight SGLang would die
        if not self.engine.loop.run_until_complete(reply).success:
            raise EngineError(f"{self.name} refused sleep: requests were in flight for 60 s; expected none")
        self.engine.release_memory_occupation(list(tags))
        self._asleep |= set(tags)

    def wake(self, tags: Sequence[str] = MEMORY_TAGS) -> None:
        """Take the memory behind the tags again."""
        self._expect("wake", asleep=tags)
        self.engine.resume_memory_occupation(list(tags))
        self._asleep -= set(tags)

    def update_weights(self, version: str, handles: Sequence[bytes] = ()) -> None:
        """Load all weights, at first from `handles[tp_rank]`; a KV cache of older ones is flushed, or it sleeps."""
        self._ask("update_weights_from_tensor", "UpdateWeightsFromTensorReqInput", weight_version=version,
                  serialized_named_tensors=handles or [bytes(reduction.ForkingPickler.dumps([]))] * len(self.uuids),
                  load_format=f"{__name__}.receive_weights", flush_cache="kv_cache" not in self._asleep)

    def check_weights(self, action: str) -> None:
        """SGLang's checker: "snapshot" keeps the weights, "reset_tensors" spoils them, "compare" wants them equal."""
        self._ask("check_weights", "CheckWeightsReqInput", action=action)

    def _ask(self, method: str, request: str, **fields: Any) -> None:
        from sglang.srt.managers import io_struct
        self._expect(method, awake=["weights"])
        reply = getattr(self.engine.tokenizer_manager, method)(getattr(io_struct, request)(**fields))
        success, message, *_ = self.engine.loop.run_until_complete(reply)
        if not success:
            raise EngineError(f"{self.name}: {method} failed: {message}")

    def _expect(self, method: str, awake: Sequence[str] = (), asleep: Sequence[str] = ()) -> None:
        """Refuse what would kill the scheduler: to wake what is awake, or to use what sleeps."""
        if not (set(awake) <= set(MEMORY_TAGS) - self._asleep and set(asleep) <= self._asleep):
            raise EngineError(f"{self.name} refused {method}: asleep: {sorted(self._asleep)}; expected {sorted(awake)} "
                              f"awake and {sorted(asleep)} asleep, of {MEMORY_TAGS}")


# ---- 5. Trainer: one Ray actor a GPU; FSDP2; offload and onload; weights out ----------------------------------------
class Trainer:
    """A Ray actor on one GPU: the policy and its optimizer; if there are several, each has its shard (FSDP2)."""
    def __init__(self, log: str, rank: int, bundle: Bundle, config: Config):
        log_to(log)
        self.rank, self.config, self.on_gpu = rank, config, config.device == "cuda"
        from transformers import AutoModelForCausalLM  # slow: here it happens while the engines start
        self._load = AutoModelForCausalLM.from_pretrained
        self.device = torch.device("cuda", bundle.local_index) if self.on_gpu else torch.device("cpu")
        self.backend = torch.get_device_module(self.device)  # torch.cuda or torch.cpu
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32  # of the engine and of products; weights are fp32

    def start(self, rendezvous: str, world_size: int, model: str, resume: bool = False) -> dict[str, Any]:
        """Join the process group, by a file that all ranks see, and load the model; to `resume`, the optimizer, too."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        self.backend.set_device(self.device)
        self._copies = self.backend.Stream()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))  # Ray sets 1
        dist.init_process_group("nccl" if self.on_gpu else "gloo", init_method=f"file://{rendezvous}", rank=self.rank,
                                world_size=world_size, timeout=timedelta(seconds=self.config.timeout))
        self.model = self._load(model, dtype=torch.float32)
        self.model.generation_config.do_sample = True  # without it, save_pretrained refuses a temperature there
        layers = [m for m in self.model.modules() if type(m).__name__ in (self.model._no_split_modules or ())]
        compiled = torch.compile if self.config.compile else lambda function: function
        for layer in layers:
            layer.forward = compiled(layer.forward)  # of the layer itself, FSDP's hooks would be a part
        self._token_logprobs = compiled(token_logprobs)  # compiled, it keeps no logits in fp32
        if world_size > 1:
            mesh = dist.init_device_mesh(self.device.type, (world_size,))
            for module in (*layers, self.model):  # moved to the device shard by shard
                fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32))
            self._shards = [p.detach().to_local().view(-1) for p in self.model.parameters()]  # each by itself, padded
        else:  # FSDP2 would copy each parameter by itself, and a GPU wait for the CPU
            self.model.to(self.device)
            self._shards = [pack(self.model.parameters())]  # all in one piece
            self.model.forward = torch.autocast(self.device.type, self.dtype, enabled=self.on_gpu)(self.model.forward)
        parameters = list(self.model.parameters())  # tied weights come once
        self.optimizer = torch.optim.AdamW(parameters, lr=self.config.learning_rate, weight_decay=0.0, fused=True)
        self.optimizer.state |= {p: dict(step=torch.zeros((), device=self.device), exp_avg=torch.zeros_like(p),
                                         exp_avg_sq=torch.zeros_like(p)) for p in parameters}  # as AdamW begins
        if resume:
            state = torch.load(f"{model}/optimizer.pt", weights_only=True)
            set_optimizer_state_dict(self.model, self.optimizer, state, options=StateDictOptions(full_state_dict=True))
            self.optimizer.param_groups[0]["lr"] = self.config.learning_rate  # a resumed run may have another
        moments = [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        sizes = [world_size * math.ceil(p.shape[0] / world_size) * math.prod(p.shape[1:]) for p in parameters]  # padded
        self._whole = (buffer := torch.full([sum(sizes)], torch.nan, dtype=self.dtype, device=self.device)).split(sizes)
        self._slots = [buffer] if world_size == 1 else [whole.chunk(world_size)[self.rank] for whole in self._whole]
        held = [t.new_empty(0).set_(t.untyped_storage()) for t in (*self._shards, pack(moments)) if self.config.offload]
        host = torch.empty(sum(map(len, held)))  # weights first, the moments last
        if held and self.on_gpu:  # pin it; pin_memory() would take the next power of two
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        self._moved = [(d, part.copy_(d)) for d, part in zip(held, host.split([*map(len, held)]), strict=True)]
        torch.cuda.empty_cache()  # the engine's weights wake next
        return {"rank": self.rank, **read_device(self._shards[0].device.index or 0)}  # in use

    def train(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A step for each share of make_batch's rows, none once one is not finite ("bad"); then fills the buffer."""
        config, ranks, losses, metrics = self.config, dist.get_world_size(), [], {"bad": first_bad(batch)}
        rows = torch.arange(len(batch["tokens"])).view(config.updates_per_step, ranks, -1)  # [B] -> [updates, ranks, b]
        totals = [batch["mask"][share.flatten()].sum().item() for share in rows]  # tokens of all ranks
        parts = [{name: column[share[self.rank]].to(self.device) for name, column in batch.items()} for share in rows]
        self._copy(self._moved[-1:])  # the optimizer state comes while the GPU makes the first gradients
        with torch.no_grad():
            for part in parts[1:]:  # the first share trains with the weights that its old_logprobs are of
                part["old_logprobs"] = torch.cat([*map(self._logprobs, part["tokens"].split(config.micro_batch))])
        for part, total in zip(parts, totals, strict=True):
            old_logprobs = []
            for at in range(0, len(part["tokens"]), config.micro_batch):
                micro = {name: column[at : at + config.micro_batch] for name, column in part.items()}
                logprobs = self._logprobs(micro["tokens"])
                old_logprobs.append(micro.get("old_logprobs", logprobs.detach()))  # the first share has none yet
                loss = grpo_loss(logprobs, old_logprobs[-1], micro["advantages"], micro["mask"], num_tokens=total,
                                 rollout_logprobs=micro["rollout_logprobs"], importance_cap=2.0)
                (loss * ranks).backward()  # FSDP averages over ranks; the loss is a share of a sum
                losses.append(loss.detach() / len(parts))
            part["old_logprobs"] = torch.cat(old_logprobs)
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            metrics["grad_norm"] = (norm.full_tensor() if ranks > 1 else norm).item()
            if not math.isfinite(metrics["grad_norm"]):  # all ranks see this alike; a tensor of one must not decide
                metrics["bad"] = metrics["bad"] or first_bad(part) or "gradient"
            if not metrics["bad"]:
                self.backend.current_stream().wait_stream(self._copies)
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.gather_weights()
        if self.on_gpu and torch.cuda.memory_reserved() > torch.cuda.mem_get_info()[0]:
            torch.cuda.empty_cache()  # the engine's weights wake next, no more than what is held here
        gap = torch.cat([(p["old_logprobs"] - p["rollout_logprobs"]).abs()[p["mask"] > 0] for p in parts])
        metrics |= {"loss": sum(losses).item(), "difference_max": gap.max().item(),
                    "difference_mean": gap.sum().item() / sum(totals)}
        self._copy((host, device) for device, host in self._moved)  # as the engine takes weights; all above has ended
        return metrics

    def _logprobs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of each next token, [B, T] -> [B, T-1]; with padding on the right, causality masks it."""
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T-1, V]
        return self._token_logprobs(logits, tokens[:, 1:], self.config.temperature)

    def _copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with self.backend.stream(self._copies):  # beside what else runs
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def offload(self) -> None:
        """Free the device's memory of weights and optimizer state, once `train` has copied them to the host."""
        self.backend.synchronize()
        for device, _ in self._moved:
            device.untyped_storage().resize_(0)  # all views stay the same objects; the memory behind comes and goes
        torch.cuda.empty_cache()  # without a GPU nothing happens

    def onload(self) -> None:
        """Bring the weights back; `train`, which must come next, copies the optimizer state into its place."""
        for device, host in self._moved:
            device.untyped_storage().resize_(host.nbytes)
        self._copy(self._moved[:-1])
        self.backend.synchronize()

    def share_weights(self) -> bytes:
        """The handle by which an engine maps the buffer of all weights, once; after that, `gather_weights`."""
        torch.multiprocessing.set_sharing_strategy("file_system")  # on a CPU: by name, for the reader is no child
        return bytes(reduction.ForkingPickler.dumps([(name, whole[: p.numel()].view(p.shape)) for (name, p), whole
                                           in zip(self.model.named_parameters(), self._whole, strict=True)]))

    def gather_weights(self) -> None:
        """All ranks at once: fill the buffer, which engines have mapped by now."""
        for slot, shard in zip(self._slots, self._shards, strict=True):
            slot[: len(shard)].copy_(shard)
        if dist.get_world_size() > 1:
            dist.group.WORLD.allgather_into_tensor_coalesced(self._whole, self._slots).wait()
        self.backend.synchronize()  # the reader, in another process, does not wait for this stream
        for name in Path("/dev/shm").glob(f"torch_{os.getpid()}_*"):  # Ray ends the process that would remove it
            name.unlink(missing_ok=True)

    def save(self, folder: str) -> None:
        """All ranks at once: gather weights and optimizer state in fp32; rank 0 writes what `start` can load."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(self.model, self.optimizer, options=options)
        if self.rank == 0:
            tied = self.model.all_tied_weights_keys  # copies by now, which would be written twice
            self.model.save_pretrained(folder, state_dict={name: w for name, w in weights.items() if name not in tied})
            torch.save(state, f"{folder}/optimizer.pt")


def pack(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Lay tensors, or this rank's shards of them, side by side in one piece of memory, which is returned."""
    shards = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]  # FSDP2's, or the tensor itself
    piece = torch.cat([shard.data.flatten() for shard in shards])
    for shard, part in zip(shards, piece.split([shard.numel() for shard in shards]), strict=True):
        shard.data = part.view_as(shard)
    return piece


def first_bad(tensors: dict[str, torch.Tensor]) -> str | None:
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


# ---- 6. GRPO (pure) -------------------------------------------------------------------------------------------------
def group_advantages(rewards: torch.Tensor, scale: bool = True) -> torch.Tensor:
    """Advantages of G responses to each of P prompts, [P, G] -> [P, G] (DeepSeekMath, section 4.1); exact zeros for a
    group of equal rewards. `scale=False` does not divide by the deviation (arXiv:2503.20783)."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    centred = centred / (rewards.std(dim=1, keepdim=True) + 1e-6) if scale else centred
    return centred.masked_fill((rewards - rewards[:, :1] == 0).all(dim=1, keepdim=True), 0.0)  # infinities: NaN


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the tokens in nats and fp32, [B, T, V], [B, T] -> [B, T]."""
    logits = logits.flatten(0, 1).float() / temperature  # [B, T, V] -> [B*T, V]
    return -torch.nn.functional.cross_entropy(logits, tokens.flatten(), reduction="none").view_as(tokens)


def grpo_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, *,
              num_tokens: float | None = None, clip_low: float = 0.2, clip_high: float = 0.28,
              ref_logprobs: torch.Tensor | None = None, kl_coef: float = 0.0,
              rollout_logprobs: torch.Tensor | None = None, importance_cap: float = 0.0) -> torch.Tensor:
    """The clipped policy-gradient loss, a scalar: the sum over response tokens divided by `num_tokens`.
    Log-probabilities are [B, T] in nats: the learner's, with gradient; `old`, before the first update on this batch;
    `ref`, a reference's; `rollout`, the engine's. advantages: [B] or [B, T]. mask [B, T]: 1 for response tokens.
    num_tokens: of all micro-batches and ranks, whose losses sum up to the mean over tokens (DAPO, equation 8). The
    ratio counts within [1 - clip_low, 1 + clip_high] (DAPO, section 3.1). kl_coef weighs the k3 KL to the reference
    (joschu.net/blog/kl-approx.html). With importance_cap, tokens weigh min(old / rollout, cap)."""
    padding = mask == 0  # whatever stands there, even an infinity, must not reach the loss or its gradient
    advantages = torch.where(padding, 0.0, advantages.reshape(len(mask), -1))  # [B] or [B, T] -> [B, T]
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(padding, 0.0))
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if rollout_logprobs is not None and importance_cap > 0:
        weight = torch.exp((old_logprobs - rollout_logprobs).masked_fill(padding, 0.0))
        loss = loss * weight.clamp(max=importance_cap)
    if ref_logprobs is not None and kl_coef > 0:
        difference = (ref_logprobs - logprobs).masked_fill(padding, 0.0)
        loss = loss + kl_coef * (torch.exp(difference) - difference - 1)
    return (loss * mask).sum() / (mask.sum() if num_tokens is None else num_tokens)


# ---- 7. Task: prompts, reward, the tiny model -----------------------------------------------------------------------
# What to learn: prompts (token ids) with their answers, the first 64 held out; (text, answer) -> reward in [0, 1].
Task = namedtuple("Task", "tokenizer vocab_size problems verify")
SHAPES = {"tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=16, initializer_range=0.06),
          "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, initializer_range=0.02)}


def echo_task(config: Config) -> Task:
    """To answer "472=" with its first digit, repeated."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<eos>", "=", *"0123456789"))}
    characters = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<pad>"))
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    problems = [(tokenizer.encode(f"{n:03d}="), f"{n:03d}"[0] * config.max_new_tokens) for n in range(1000)]
    random.Random(0).shuffle(problems)
    return Task(tokenizer, 16, problems, lambda text, answer: sum(a == b for a, b in zip(text, answer)) / len(answer))


def write_random_model(config: Config, folder: Path) -> None:
    """A Qwen3 from random weights, for echo_task."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(config.seed)
    Qwen3ForCausalLM(Qwen3Config(**SHAPES[config.shape], vocab_size=16, max_position_embeddings=4096, eos_token_id=1,
                                 pad_token_id=0, tie_word_embeddings=True)).save_pretrained(folder)


def sums_task(config: Config) -> Task:
    """Sums of two-digit numbers for a pretrained model, in its own chat template; the last number it says counts."""
    from transformers import AutoConfig, AutoTokenizer
    model_config = AutoConfig.from_pretrained(config.model, trust_remote_code=False)  # unset, it asks the terminal
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    pairs = random.Random(0).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 2000)
    chats = [[{"role": "user", "content": f"What is {a} + {b}? Answer with the number only."}] for a, b in pairs]
    prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    problems = [(prompt, str(a + b)) for prompt, (a, b) in zip(prompts, pairs, strict=True)]
    return Task(tokenizer, model_config.get_text_config().vocab_size, problems,
                lambda text, answer: float(re.findall(r"\d+", text)[-1:] == [answer]))


# ---- 8. Loop: phases, metrics ---------------------------------------------------------------------------------------
class Loop:
    """Engines and trainers that share the GPUs of a plan, and the phases of a step."""
    def __init__(self, config: Config, task: Task, folder: Path, group: PlacementGroup, plan: list[EnginePlacement]):
        def actor(kind: type, number: int, bundle: Bundle, share: float, *args: Any) -> Any:
            (log := folder / f"{kind.__name__.lower()}{number}.log").touch()
            handle = ray.remote(kind).options(**on_bundle(group, bundle.index, share)).remote(str(log), *args)
            self.logs[handle] = log
            return handle
        self.config, self.task, self.folder, self.plan, self.version = config, task, folder, plan, 0
        self.phases, self.logs = {}, {}  # by phase: seconds_, and gib_ used after it on each GPU; by actor
        ranks = [bundle for place in plan for bundle in place.bundles]
        self.engines = [actor(Engine, i, place.bundles[0], ENGINE_SHARE, place) for i, place in enumerate(plan)]
        self.trainers = [actor(Trainer, i, b, TRAINER_SHARE, i, b, config) for i, b in enumerate(ranks)]

    def each(self, actors: Sequence[Any], method: str, *common: Any, own: Sequence[tuple] | None = None) -> list[Any]:
        """Call a method of all actors at once, with common arguments or each with its own, and wait for all."""
        calls = [getattr(actor, method).remote(*(own[i] if own else common)) for i, actor in enumerate(actors)]
        try:
            return wait_for(calls, self.config.timeout, method, self.logs)
        except ray.exceptions.RayActorError as error:
            for name, log in self.read_logs(a for a in self.logs if a._actor_id.hex() == error.actor_id).items():
                raise EngineError(f"{name} died in {method}: {log.fault or error}\n{self.folder}/{name}.log") from error
            raise  # Ray did not say which actor died

    def read_logs(self, actors: Iterable[Any]) -> dict[str, EngineLogReport]:
        return {self.logs[a].stem: parse_engine_log(self.logs[a].read_text(errors="replace")) for a in actors}

    def start(self, model: str, resume: bool) -> None:
        """Start and check everything; ends with the trainers offloaded and the engines awake."""
        self.timed("before", list)  # only reads the memory
        args = [(engine_args(self.config, place, model), self.config.graph_pool) for place in self.plan]
        self.schedulers = sum(self.each(self.engines, "start", own=args), [])  # first: KV caches take what is free
        print(*(f"{name}: {report}" for name, report in self.read_logs(self.engines).items()), sep="\n", flush=True)
        self.each(self.engines, "check_weights", "snapshot")
        self.timed("asleep", self.each, self.engines, "sleep")
        readings = self.each(self.trainers, "start", str(self.folder / "rendezvous"), len(self.trainers), model, resume)
        self.devices = check_same_device(readings, self.schedulers)
        # Overwritten with NaNs, then noise, and sent, weights must be those loaded from disk; only GPUs can compare.
        self.each(self.engines, "wake", ["weights"])
        handles, tp = self.each(self.trainers, "share_weights"), self.config.gpus_per_engine
        self.each(self.engines, "update_weights", own=[("0", handles[i : i + tp]) for i in range(0, len(handles), tp)])
        self.each(self.trainers, "gather_weights")
        self.each(self.engines, "check_weights", "reset_tensors")
        self.sync_weights()
        if self.config.device == "cuda":
            self.each(self.engines, "check_weights", "compare")
            self.left = max(a - b for a, b in zip(self.phases["gib_asleep"], self.phases["gib_before"], strict=True))
        self.each(self.trainers, "offload")
        self.each(self.engines, "wake", ["kv_cache", "cuda_graph"])
        if unequal := [name for name, log in self.read_logs(self.engines).items() if "check_weights" in repr(log)]:
            raise EngineError(f"weights of {unequal} are not those of {model}; SGLang loads what was sent otherwise")

    def timed(self, phase: str, function: Callable, *args: Any) -> Any:
        start = time.perf_counter()
        result = function(*args)
        self.phases[f"seconds_{phase}"] = time.perf_counter() - start
        if self.config.device == "cuda":
            self.phases[f"gib_{phase}"] = sum(self.each(self.engines, "memory_used"), [])
        return result

    def step(self, step: int) -> dict[str, Any]:
        config, self.phases = self.config, {}
        metrics = {"step": step} if step else {"step": step, "heldout_reward_before": self.score_heldout()}
        problems = random.Random(f"{config.seed}/{step}").sample(self.task.problems[64:], config.prompts_per_step)
        group = [problem for problem in problems for _ in range(config.group_size)]  # [P] -> [P*G]
        samples, rewards = self.timed("generate", self.ask, group, f"{config.seed}/{step}/sampling", config.temperature)
        self.timed("sleep", self.each, self.engines, "sleep")
        batch = make_batch(samples, group_advantages(rewards.view(-1, config.group_size)).flatten())  # [P, G] -> [P*G]
        self.timed("onload", self.each, self.trainers, "onload")
        trained = self.timed("train", self.train, batch)
        self.timed("wake_weights", self.each, self.engines, "wake", ["weights"])
        self.timed("sync", self.sync_weights)
        if due := (step + 1) % config.heldout_every == 0 or step + 1 == config.steps:
            self.timed("checkpoint", self.each, self.trainers, "save", str(self.folder.parent / "unfinished"))
        self.timed("offload", self.each, self.trainers, "offload")
        self.timed("wake", self.each, self.engines, "wake", ["kv_cache", "cuda_graph"])
        tokens = sum(len(sample.response_ids) for sample in samples)
        metrics |= {"reward": rewards.mean().item(), "tokens_per_second": tokens / self.phases["seconds_generate"]}
        return metrics | trained | self.phases | ({"heldout_reward": self.score_heldout()} if due else {})

    def ask(self, problems: list[tuple], seed: str, temperature: float) -> tuple[list[Sample], torch.Tensor]:
        """Deal the problems' prompts out to the engines in equal shares; answers and rewards come in the same order."""
        seeds, params = random.Random(seed), dict(temperature=temperature, max_new_tokens=self.config.max_new_tokens)
        sampling = [params | {"sampling_seed": seeds.getrandbits(31)} for _ in problems]
        prompts, share = [prompt for prompt, _ in problems], -(-len(problems) // len(self.engines))
        own = [(prompts[at : at + share], sampling[at : at + share]) for at in range(0, len(prompts), share)]
        samples = sum(self.each(self.engines[: len(own)], "generate", own=own), [])
        if stale := {sample.weight_version for sample in samples} - {str(self.version)}:
            raise EngineError(f"weight_version of samples is {stale}; expected {self.version}: a sync did not arrive")
        texts = [self.task.tokenizer.decode(sample.response_ids, skip_special_tokens=True) for sample in samples]
        rewards = [self.task.verify(text, answer) for text, (_, answer) in zip(texts, problems, strict=True)]
        return samples, torch.tensor(rewards, dtype=torch.float32)

    def score_heldout(self) -> float:
        return self.ask(self.task.problems[:64], "greedy", 0.0)[1].mean().item()

    def train(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        results = self.each(self.trainers, "train", ray.put(batch))
        if bad := {result["bad"] for result in results} - {None}:  # "gradient": another rank's tensor is the cause
            return {"skipped": min(bad - {"gradient"} or bad).replace("advantages", "rewards")}  # these make those
        mean = sum(result["difference_mean"] for result in results)  # each is a share of it
        if not mean < (limit := 0.02 if self.config.device == "cuda" else 1e-4):  # bf16, or fp32
            raise FloatingPointError(f"logprob_difference_mean is {mean:.2g}; expected below {limit}. Check the sync.")
        return {"loss": sum(r["loss"] for r in results), "grad_norm": results[0]["grad_norm"],
                "logprob_difference_max": max(r["difference_max"] for r in results), "logprob_difference_mean": mean}

    def sync_weights(self) -> None:
        self.version += 1
        self.each(self.engines, "update_weights", str(self.version))

    def checklist(self, metrics: list[dict[str, Any]]) -> list[tuple[str, bool | None, str]]:
        """What this run has read of itself: (what, whether it is right or None if it cannot be read, the reading)."""
        first, last, tp, ranks = metrics[0], metrics[-1], self.config.gpus_per_engine, len(self.devices)
        mean, top = (max((row.get(f"logprob_difference_{kind}", 0) for row in metrics)) for kind in ("mean", "max"))
        before, after, made = first["heldout_reward_before"], last["heldout_reward"], sum("loss" in r for r in metrics)
        lines = [("server started", True, f"{len(self.plan)} engine(s) of TP={tp}"),
                 ("weight version", True, f"that of the last sync in every sample; {self.version} syncs acknowledged"),
                 ("rollout and trainer agree", True, f"log-probabilities differ by {mean:.2g} nats, at most {top:.2g}"),
                 ("training steps", made == self.config.steps, f"{made} of {self.config.steps}"),
                 ("held-out reward", after > before or after == 1, f"{before:.3f} -> {after:.3f}")]
        if self.config.device == "cpu":
            return lines + [("same GPU, all-reduce v2, CUDA graphs, exact weights, memory", None, "needs a GPU")]
        logs = list(self.read_logs(self.engines).values())
        used, graphs = {s["all_reduce"] for s in self.schedulers}, [g for log in logs for g in log.graphs.values()]
        warm, replayed = metrics[:2][-1], {log.replayed for log in logs}  # step 0 takes buffers; a rank may wake late
        grown = max(b - a for n in warm if re.match("gib_(?!wake$)", n) for a, b in zip(warm[n], last[n], strict=True))
        return lines + [
            ("same GPU", True, f"trainer and scheduler read the same UUID in {ranks} of {ranks} ranks"),
            ("all-reduce v2", used == {"CustomAllReduceV2"} if tp > 1 else None, f"TP={tp}, schedulers use {used}"),
            ("CUDA graphs captured", len(graphs) == ranks, f"in {len(graphs)} of {ranks} ranks"),
            ("CUDA graphs replayed", None if None in replayed else all(replayed), "by decode batches of every engine"),
            ("no CUDA error", all(b"CUDA error" not in log.read_bytes() for log in self.logs.values()), "in any log"),
            ("weights equal to the bit", "check_weights" not in repr(logs), "in every rank, after a sync onto noise"),
            ("memory asleep", self.left < 0.5 * min(last["gib_wake"]), f"engines leave {self.left:.2f} GiB (< 50 %)"),
            ("memory does not grow", grown < 0.1 if last["step"] > 1 else None, f"{grown:+.3f} GiB after step 1")]


def check_same_device(trainers: list[dict[str, Any]], schedulers: list[dict[str, Any]]) -> list[tuple]:
    """PlacementError unless, rank by rank, trainer and scheduler process have read the same device in themselves."""
    rows = [(t["rank"], s["tp_rank"], t["uuid"], s["uuid"]) for t, s in zip(trainers, schedulers, strict=True)]
    if any(trainer_uuid != scheduler_uuid for *_, trainer_uuid, scheduler_uuid in rows):
        raise PlacementError("rank, tp_rank, UUIDs of trainer and scheduler; expected one GPU a row. Use the bundle's "
                             "local_index for both.\n" + "\n".join(map(str, rows)))
    return rows


def make_batch(samples: Sequence[Sample], advantages: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pad on the right: tokens [B, T]; mask and rollout_logprobs of token t + 1 at t, [B, T-1]; advantages [B]."""
    def pad(rows: list[list]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(numpy.array(row)) for row in rows], batch_first=True)
    return dict(tokens=pad([s.prompt_ids + s.response_ids for s in samples]), advantages=advantages,
                mask=pad([[0.0] * (len(s.prompt_ids) - 1) + [1.0] * len(s.logprobs) for s in samples]).float(),
                rollout_logprobs=pad([[0.0] * (len(s.prompt_ids) - 1) + s.logprobs for s in samples]).float())


def plot(metrics: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("reward", "seconds_"), strict=True):
        for name in (name for name in metrics[-1] if kind in name):
            axes.plot(*zip(*[(row["step"], row[name]) for row in metrics if name in row], strict=True), label=name)
        axes.legend()
    figure.savefig(path, dpi=110)


def run(config: Config, task: Task, folder: Path, metrics: list[dict], stopped_by: list[int]) -> None:
    """Fill `metrics`, a row a step, from the last checkpoint on; leave no process; note signals in `stopped_by`."""
    def stop(number: int, frame: Any) -> None:
        stopped_by.append(number)
        if armed:
            raise KeyboardInterrupt  # ray.get passes it on; of a SystemExit it makes its own
    armed = True  # until the clean-up, which comes to its end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    options: dict[str, Any] = dict(runtime_env={"py_modules": [__file__]}, log_to_driver=False, logging_level="error")
    if "RAY_ADDRESS" not in os.environ:  # start Ray here, on loopback only; logical GPUs it must be told, not real ones
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        options["runtime_env"]["env_vars"] = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        options |= dict(address="local", include_dashboard=False, num_gpus={"cpu": config.gpus}.get(config.device))
    start, others = time.perf_counter(), set(psutil.Process().children(recursive=True))
    ray._private.utils.set_sigterm_handler = lambda handler: None  # ray.init would set its own handler
    try:
        ray.init(**options)
        signal.signal(signal.SIGTERM, stop)  # again: Ray's native code has just set a handler that aborts
        group = create_placement_group(config.gpus, config.placement_timeout)
        plan = plan_engines(probe_bundles(group, config.placement_timeout), config.gpus_per_engine)
        for place in plan:
            for rank, b in enumerate(place.bundles):
                print(f"bundle {b.index} -> node {b.node_ip} -> Ray id {b.gpu_id!r} -> local index {b.local_index} -> "
                      f"{b.uuid or 'no GPU'} -> engine {place.engine} tp_rank {rank} base_gpu_id {place.base_gpu_id}")
        if config.dry_run:
            return
        (attempt := folder / f"attempt{len(list(folder.glob('attempt*')))}").mkdir(parents=True)
        shutil.rmtree(unfinished := folder / "unfinished", ignore_errors=True)  # a checkpoint that was cut off
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2))
        checkpoint = max(folder.glob("checkpoint-*"), default=folder / "checkpoint-000000")
        done = int(checkpoint.name[-6:])
        model = str(checkpoint) if done or not config.model else config.model
        print(f"from {model}, {done} of {config.steps} steps done", flush=True)
        if not done and not config.model:
            write_random_model(config, checkpoint)
        loop = Loop(config, task, attempt, group, plan)
        loop.start(model, resume=done > 0)
        with open(folder / "metrics.jsonl", "a+", buffering=1) as file:
            file.seek(0)
            metrics[:] = [json.loads(file.readline()) for _ in range(done)]
            file.truncate(file.tell())  # what came after the checkpoint comes again
            for step in (bar := tqdm(range(done, config.steps), initial=done, total=config.steps, unit="step")):
                metrics.append(loop.step(step))
                file.write(json.dumps(metrics[-1]) + "\n")
                if "seconds_checkpoint" in metrics[-1]:
                    task.tokenizer.save_pretrained(unfinished)
                    unfinished.rename(folder / f"checkpoint-{step + 1:06d}")  # it is whole, or it is not there
                    for old in sorted(folder.glob("checkpoint-*"))[:-2]:
                        shutil.rmtree(old)
                bar.write("  ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}"
                                    for name, x in metrics[-1].items() if "gib_" not in name))
                if len(bad := [row["skipped"] for row in metrics[-3:] if "skipped" in row]) == 3:
                    raise FloatingPointError(f"{bad[2]} is not finite, 3 steps in a row. Check rewards, learning rate.")
        plot(metrics, folder / "reward.png")
        summary = dict(steps=config.steps, heldout_reward_before=metrics[0]["heldout_reward_before"],
                       heldout_reward_after=metrics[-1]["heldout_reward"], wall_seconds=time.perf_counter() - start,
                       devices=loop.devices, checklist=loop.checklist(metrics),
                       engines={name: report._asdict() for name, report in loop.read_logs(loop.engines).items()},
                       versions={name: importlib.metadata.version(name) for name in ("sglang", "torch", "ray")})
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
        for what, right, reading in summary["checklist"]:
            print({True: "[x]", False: "[FAILED]", None: "[ ]"}[right], f"{what}: {reading}")
        print(f"{summary['wall_seconds']:.0f} s, all of it in {folder}")
    finally:
        armed = False
        children = set(psutil.Process().children(recursive=True)) - others
        ray.shutdown()
        for process in psutil.wait_procs(children, timeout=0 if stopped_by else 3)[1]:  # SGLang's, hung or starting
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(children, timeout=10)


# ---- 9. Command line ------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 (failed), 2 (settings refused), 130 (Ctrl-C), 143 (SIGTERM)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups = {name: parser.add_argument_group(name) for name in ("run", "placement", "model", "rollout", "training")}
    for option in dataclasses.fields(Config):
        meta, kind = option.metadata, dict(type=type(option.default), choices=option.metadata.get("choices"))
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(option.default, bool) else kind
        groups[meta["group"]].add_argument(f"--{option.name.replace('_', '-')}", default=option.default,
                                           help=f"{meta['help']} (%(default)s)", **kind)
    resume = parser.parse_args(argv).resume
    folder = Path(resume or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}").resolve()
    try:
        if resume:
            parser.set_defaults(**json.loads((folder / "config.json").read_text()))
        config = Config(**vars(parser.parse_args(argv)))
        task = sums_task(config) if config.model else echo_task(config)
        problems = check_config(config, task)
    except (OSError, ValueError, TypeError) as error:
        problems = [f"--resume wants a run's folder, --model one with a tokenizer and a chat template: {error}"]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    metrics, stopped_by, furthest, faults = [], [], 0, 0
    while not stopped_by:
        try:
            run(config, task, folder, metrics, stopped_by)
            return 0
        except KeyboardInterrupt:
            stopped_by.append(signal.SIGINT)  # counts only if it came before `run` took note
        except (PlacementError, FloatingPointError, RuntimeError, OSError, ray.exceptions.RayError) as error:
            faults, furthest = 1 if len(metrics) > furthest else faults + 1, max(furthest, len(metrics))
            if faults > config.max_restarts or isinstance(error, (PlacementError, FloatingPointError)):
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(f"{error}\nrestart {faults} of at most {config.max_restarts}", file=sys.stderr, flush=True)
    return 128 + stopped_by[0]


if __name__ == "__main__":
    import colocate_rl  # Ray's workers and SGLang's processes cannot import __main__.Engine, but colocate_rl.Engine
    sys.exit(colocate_rl.main())
