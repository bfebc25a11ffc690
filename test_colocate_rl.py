"""Tests of colocate_rl.py with the real Ray, SGLang and torch; those that need GPUs skip where there are none."""

import functools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import colocate_rl as c
from colocate_rl import (
    Bundle,
    Config,
    PlacementError,
    check_config,
    get_base_gpu_id,
    group_advantages,
    grpo_loss,
    local_gpu_index,
    plan_engines,
    token_logprobs,
    visible_devices,
)

MODULE = Path(c.__file__).resolve()
GPUS = torch.cuda.device_count()
UUIDS = ["GPU-aaaaaaaa-1111-2222-3333-444444444444", "GPU-aaaabbbb-1111-2222-3333-444444444444"]
MIG = "MIG-GPU-aaaaaaaa-1111-2222-3333-444444444444/1/0"
EIGHT = list("01234567")


def without_gpus():
    if GPUS:
        pytest.skip("is about a machine without GPUs; this one's would be used")


def environment(changes):
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS")}
    path = os.pathsep.join(filter(None, [str(MODULE.parent), os.environ.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | changes


def python(*args, cwd, timeout=60, **env):
    return subprocess.run([sys.executable, *args], cwd=cwd, env=environment(env), timeout=timeout, capture_output=True,
                          text=True)


# ---- Devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "count", "expected"), [
    pytest.param(None, 3, ["0", "1", "2"], id="unset"),
    pytest.param("", 8, [], id="empty"),
    pytest.param("4,5,6,7", 4, ["4", "5", "6", "7"], id="count-of-the-list"),
    pytest.param("4,5,6,7", 8, ["4", "5", "6", "7"], id="count-of-the-machine"),
    pytest.param(" 1 ,00\t", 2, ["1", "0"], id="trimmed"),
    *[pytest.param(f"2,{bad},3", 4, ["2"], id=f"ends-at-'{bad}'") for bad in ("-1", "-2", "", "abc", "1.5", "GPU-")],
    pytest.param("0,8,1", 8, ["0"], id="ends-past-the-machine"),
    pytest.param("0,7,1", 8, ["0", "7", "1"], id="last-of-the-machine"),
    pytest.param("0,-1,0", 4, ["0"], id="twice-but-after-the-end"),
    pytest.param(f"{UUIDS[0]},{UUIDS[1]},{MIG}", 8, [*UUIDS, MIG], id="uuids-and-mig"),
])
def test_visible_devices(value, count, expected):
    assert visible_devices(value, count) == expected


@pytest.mark.parametrize("value", ["0,1,0", "0,00", f"{UUIDS[0]},GPU-aaaaa", f"GPU-aaaaa,{UUIDS[0]}", f"{MIG},{MIG}"])
def test_a_device_named_twice_is_refused(value):
    with pytest.raises(PlacementError, match=re.escape(repr(value))):
        visible_devices(value, 2)


@pytest.mark.parametrize(("gpu_id", "visible", "expected"), [
    pytest.param(1, ["0", "1"], 1, id="int"),
    pytest.param("1", ["3", "1"], 1, id="digits"),
    pytest.param("4", ["4", "5", "6", "7"], 0, id="physical-id"),
    pytest.param("1", ["11", "1"], 1, id="a-number-is-no-prefix"),
    pytest.param(UUIDS[1], UUIDS, 1, id="uuid"),
    pytest.param("GPU-aaaab", UUIDS, 1, id="id-is-prefix"),
    pytest.param(UUIDS[1], ["GPU-aaaaa", "GPU-aaaab"], 1, id="entry-is-prefix"),
    pytest.param(MIG, [UUIDS[1], MIG], 1, id="mig"),
])
def test_local_gpu_index(gpu_id, visible, expected):
    assert local_gpu_index(gpu_id, visible) == expected


@pytest.mark.parametrize(("gpu_id", "visible"), [
    pytest.param(0, ["4", "5"], id="a-valid-position"),
    pytest.param("1", ["3", "2"], id="a-valid-position-as-digits"),
    pytest.param(0, UUIDS, id="int-among-uuids"),
    pytest.param(0, [], id="nothing-visible"),
    pytest.param("GPU-aaaa", UUIDS, id="ambiguous-prefix"),
])
def test_an_id_that_is_not_one_entry_is_refused(gpu_id, visible):
    with pytest.raises(PlacementError) as error:
        local_gpu_index(gpu_id, visible)
    assert repr(gpu_id) in str(error.value) and str(visible) in str(error.value)


# ---- Engine plan ----------------------------------------------------------------------------------------------------


def held(gpu_ids, visible, ip="10.0.0.1", node="a"):
    return [Bundle(0, node, ip, gpu_id, local_gpu_index(gpu_id, visible)) for gpu_id in gpu_ids]


def shuffled(bundles):
    return random.Random(1).sample(bundles, len(bundles))


@pytest.mark.parametrize(("bundles", "gpus_per_engine", "bases", "gpu_ids"), [
    pytest.param(held("4567", list("4567")), 2, [0, 2], ["45", "67"], id="worked-example"),
    pytest.param(held("01", list("10")), 2, [0], ["10"], id="list-1,0"),
    pytest.param(held("4567", EIGHT), 4, [4], ["4567"], id="upper-half"),
    pytest.param(held("123", list("0123")), 1, [1, 2, 3], ["1", "2", "3"], id="first-gpu-held-by-another"),
    pytest.param(held("4567", EIGHT) + held("0123", EIGHT, "10.0.0.2", "b"), 4, [4, 0], ["4567", "0123"], id="halves"),
])
def test_plan_where_the_formula_may_be_wrong(bundles, gpus_per_engine, bases, gpu_ids):
    plan = plan_engines(shuffled(bundles), gpus_per_engine)
    assert [engine.base_gpu_id for engine in plan] == bases
    assert ["".join(bundle.gpu_id for bundle in engine.bundles) for engine in plan] == gpu_ids


def test_nodes_are_sorted_by_ip_as_numbers_and_kept_apart_by_id():
    nodes = [("10.0.0.9", "z"), ("10.0.0.10", "b"), ("10.0.0.10", "c"), ("10.0.1.1", "a")]
    plan = plan_engines(shuffled([bundle for ip, node in nodes for bundle in held("01", EIGHT, ip, node)]), 2)
    assert [[(b.node_ip, b.node_id) for b in engine.bundles] for engine in plan] == [[node] * 2 for node in nodes]
    assert [(engine.engine, engine.node_ip) for engine in plan] == list(enumerate(ip for ip, _ in nodes))


@settings(deadline=None)
@given(st.data())
def test_plan_is_the_formula_where_every_visible_gpu_is_held(data):
    per_node, tp = data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (8, 1), (8, 2), (8, 4), (8, 8)]))
    lists = data.draw(st.lists(st.permutations(EIGHT).map(lambda ids: ids[:per_node]), min_size=1, max_size=3))
    bundles = [b for i, visible in enumerate(lists) for b in held(visible, visible, f"10.0.0.{8 + i}", f"node{i}")]
    plan = plan_engines(data.draw(st.permutations(bundles)), tp)
    assert [e.base_gpu_id for e in plan] == [get_base_gpu_id(e, tp, per_node) for e in range(len(bundles) // tp)]
    assert [b for engine in plan for b in engine.bundles] == bundles


@pytest.mark.parametrize(("bundles", "gpus_per_engine", "facts"), [
    pytest.param(held("012", EIGHT), 2, ["gpus_per_engine=2", "3 bundles"], id="does-not-divide"),
    pytest.param(held("01", EIGHT), 0, ["gpus_per_engine=0"], id="engines-of-none"),
    pytest.param([], 1, ["0 bundles"], id="no-bundles"),
    pytest.param(held("0", EIGHT) + held("1", EIGHT, "10.0.0.2", "b"), 2, ["10.0.0.1", "10.0.0.2"], id="two-ips"),
    pytest.param(held("0", EIGHT) + held("1", EIGHT, node="b"), 2, ["10.0.0.1", "['0', '1']"], id="two-nodes-one-ip"),
    pytest.param(held("67", list("6017")), 2, ["10.0.0.1", "['6', '7']", "[0, 3]"], id="gap"),
    pytest.param(held("00", EIGHT), 2, ["['0', '0']", "[0, 0]"], id="one-gpu-twice"),
])
def test_a_plan_that_sglang_cannot_express_is_refused(bundles, gpus_per_engine, facts):
    with pytest.raises(ValueError) as error:
        plan_engines(bundles, gpus_per_engine)
    assert type(error.value) is PlacementError and all(fact in str(error.value) for fact in facts), error.value


def random_layout(rng):
    """Up to 16 nodes with up to 16 GPUs, each seen through a list of its own of which some GPUs are held, shuffled.

    (CUDA_VISIBLE_DEVICES, GPUs of the machine, what the list means) of each node, and the held bundles as
    (address, node, position in the list, Ray's id).
    """
    lists, held = [], []
    for node in range(rng.randint(1, 16)):
        machine = rng.randint(1, 16)
        physical = rng.sample(range(machine), rng.randint(1, machine))
        as_uuids, address = rng.random() < 0.3, f"10.{rng.randint(0, 2)}.{rng.randint(0, 12)}.{node + 1}"
        tokens = [f"GPU-{gpu:08x}-{node:04x}" if as_uuids else str(gpu) for gpu in physical]
        if rng.random() < 0.3:
            value, tokens = None, [str(gpu) for gpu in range(machine)]
        else:  # an invalid entry ends the list, whatever follows
            value = " , ".join(tokens + rng.choice([[], ["-1", tokens[0]], ["x", tokens[-1]]]))
        lists.append((value, machine, tokens))
        taken = rng.sample(range(len(tokens)), rng.randint(1, len(tokens)))
        if rng.random() < 0.5:  # often the kind of layout that has a plan
            taken = list(range(min(taken), max(taken) + 1))
        held += [(address, f"{rng.randint(0, 9)}{node}", at, tokens[at]) for at in taken]
    return lists, rng.sample(held, len(held))


@settings(deadline=None, max_examples=10_000, database=None)
@given(seed=st.integers(0, 2**64), gpus_per_engine=st.sampled_from([1, 1, 2, 2, 3, 4, 4, 8, 16]))
def test_plans_equal_an_oracle_or_are_refused_for_a_true_reason(seed, gpus_per_engine):
    lists, held = random_layout(random.Random(seed))
    for value, machine, tokens in lists:
        assert visible_devices(value, machine) == tokens
        for at, token in enumerate(tokens):
            assert local_gpu_index(int(token) if token.isdigit() and at % 2 else token, tokens) == at
    bundles = [Bundle(i, node, ip, token, at) for i, (ip, node, at, token) in enumerate(held)]
    expected = sorted(held, key=lambda gpu: ([int(part) for part in gpu[0].split(".")], gpu[1], gpu[2]))
    engines = [expected[at : at + gpus_per_engine] for at in range(0, len(expected), gpus_per_engine)]
    uneven = len(expected) % gpus_per_engine != 0
    spanning = any(len({(ip, node) for ip, node, _, _ in engine}) > 1 for engine in engines)
    gap = any([gpu[2] for gpu in engine] != list(range(engine[0][2], engine[0][2] + len(engine))) for engine in engines)
    try:
        plan = plan_engines(bundles, gpus_per_engine)
    except PlacementError as error:
        reason = str(error)
        assert uneven if "whole engines" in reason else spanning if "one node" in reason else gap, reason
    else:
        assert not (uneven or spanning or gap)
        assert [[(b.node_ip, b.node_id, b.local_index, b.gpu_id) for b in e.bundles] for e in plan] == engines
        assert [(e.base_gpu_id, e.node_ip) for e in plan] == [(engine[0][2], engine[0][0]) for engine in engines]


def test_trainer_and_engine_on_different_gpus_are_refused_with_a_table():
    readings = [dict(rank=rank, tp_rank=rank, uuid=uuid) for rank, uuid in enumerate(UUIDS)]
    assert c.check_same_device(readings, readings) == [(0, 0, UUIDS[0], UUIDS[0]), (1, 1, UUIDS[1], UUIDS[1])]
    with pytest.raises(PlacementError) as error:
        c.check_same_device(readings, [readings[1] | {"tp_rank": 0}, readings[0] | {"tp_rank": 1}])
    assert str((0, 0, *UUIDS)) in str(error.value) and str((1, 1, *UUIDS[::-1])) in str(error.value)


@pytest.mark.parametrize("arguments", [(0, 3, 8), (0, 16, 8), (-1, 2, 8), (0, 0, 8), (0, 1, 0)])
def test_the_formula_refuses_what_does_not_divide(arguments):
    with pytest.raises(PlacementError, match="=%d.*=%d.*=%d" % arguments):
        get_base_gpu_id(*arguments)


# ---- Ray, with logical GPUs -----------------------------------------------------------------------------------------

# One cluster that grows: a node of four GPUs, two of them held by another job, then two nodes with lists of their own.
DRIVER = """
import dataclasses, json, sys, time
import ray
from ray.cluster_utils import Cluster
import colocate_rl as c

def refused(call, *args):
    start = time.monotonic()
    try:
        call(*args)
    except c.PlacementError as error:
        return str(error), time.monotonic() - start

@ray.remote(num_gpus=2)
class OtherJob:
    def gpu_ids(self):
        return ray.get_gpu_ids()

cluster = Cluster(True, head_node_args=dict(num_gpus=4, num_cpus=4, include_dashboard=False))
ray.init(cluster.address, runtime_env={"py_modules": [c.__file__]}, log_to_driver=False)
too_many = refused(c.create_placement_group, 6, 1)
job = OtherJob.remote()
other = ray.get(job.gpu_ids.remote())
taken = refused(c.create_placement_group, 4, 1)
shared = c.probe_bundles(c.create_placement_group(2, 60), 120)
for visible in sys.argv[1:]:
    cluster.add_node(num_gpus=2, env_vars={"CUDA_VISIBLE_DEVICES": visible})
bundles = c.probe_bundles(c.create_placement_group(4, 60), 120)
plans = [[engine._asdict() | dict(bundles=[dataclasses.asdict(bundle) for bundle in engine.bundles])
          for engine in c.plan_engines(found, 2)] for found in (shared, bundles)]
print(json.dumps(dict(too_many=too_many, other=other, taken=taken, shared=plans[0], listed=plans[1],
                      spanning=refused(c.plan_engines, bundles, 4))))
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    without_gpus()
    done = python("-c", DRIVER, "3,1", ",".join(UUIDS), cwd=tmp_path_factory.mktemp("cluster"), timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_gpus_held_by_another_job_shift_the_base(cluster):
    (engine,) = cluster["shared"]
    assert cluster["other"] == [0, 1]
    assert [(b["index"], b["gpu_id"], b["local_index"]) for b in engine["bundles"]] == [(0, 2, 2), (1, 3, 3)]
    assert engine["base_gpu_id"] == 2 != get_base_gpu_id(0, 2, 4)


@pytest.mark.parametrize("gpu_ids", [pytest.param(["3", "1"], id="3,1"), pytest.param(UUIDS, id="uuids")])
def test_the_local_index_is_the_position_in_the_node_s_list(cluster, gpu_ids):
    (engine,) = (e for e in cluster["listed"] if e["bundles"][0]["gpu_id"] in gpu_ids)
    assert [(b["gpu_id"], b["local_index"]) for b in engine["bundles"]] == list(zip(gpu_ids, (0, 1), strict=True))
    assert engine["base_gpu_id"] == 0 and len({b["node_id"] for b in engine["bundles"]}) == 1


def test_an_engine_does_not_span_nodes(cluster):
    message, _ = cluster["spanning"]
    assert "gpus_per_engine=4" in message and "one node" in message


@pytest.mark.parametrize(("case", "numbers"), [
    pytest.param("too_many", dict(limit=1, asked=6, missing=2, total=4, nodes=1, held=0, free=4), id="too-many"),
    pytest.param("taken", dict(limit=1, asked=4, missing=2, total=4, nodes=1, held=2, free=2), id="held-by-another"),
])
def test_placement_that_cannot_be_is_refused_in_time(cluster, case, numbers):
    message, seconds = cluster[case]
    assert [int(n) for n in re.findall(r"\d+", message)] == list(numbers.values()), message
    assert 1 <= seconds < 5


def test_dry_run_prints_the_mapping_and_leaves_nothing(tmp_path):
    command = [str(MODULE), *"--dry-run --gpus 4 --gpus-per-engine 2 --device cpu".split()]
    done = python(*command, cwd=tmp_path, timeout=240, CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert done.returncode == 0, done.stderr
    header, *rows = (re.split("  +", line) for line in done.stdout.splitlines())
    columns = [header.index(name) for name in ("Ray id", "local index", "engine", "tp_rank", "base_gpu_id")]
    found = [" ".join(row[column] for column in columns) for row in rows]
    assert found == ["'4' 0 0 0 0", "'5' 1 0 1 0", "'6' 2 1 0 2", "'7' 3 1 1 2"]
    assert list(tmp_path.iterdir()) == []


# ---- GRPO -----------------------------------------------------------------------------------------------------------


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [2, 2, 4, 4]])  # unbiased standard deviations 1/2 and sqrt(4/3)
    centred, scaled = torch.tensor([[0.75, -0.25, -0.25, -0.25], [-1, -1, 1, 1]]), torch.tensor([[2], [0.75**0.5]])
    torch.testing.assert_close(group_advantages(rewards, scale=False), centred)
    torch.testing.assert_close(group_advantages(rewards), centred * scaled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_equal_rewards_has_no_advantages(scale):
    rewards = torch.full((1, 7), 0.7)
    assert (rewards != rewards.mean()).any()  # rounding alone would make an advantage of it
    assert (group_advantages(rewards, scale) == 0).all()


def test_token_logprobs():
    logits = doubles([[1, 3], [1, 1]], [[1, 1], [1, 7]]).log() + 5
    result = token_logprobs(logits, torch.tensor([[1, 0], [0, 0]]))
    torch.testing.assert_close(result, doubles([3 / 4, 1 / 2], [1 / 2, 1 / 8]).log())


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), [
    pytest.param(1.0, 2.0, -2.0, -2.0, id="good-token-is-raised"),
    pytest.param(1.0, -2.0, 2.0, 2.0, id="bad-token-is-lowered"),
    pytest.param(1.25, 1.0, -1.25, -1.25, id="between-the-two-clips"),
    pytest.param(1.5, 2.0, -2.56, 0.0, id="clipped-high"),
    pytest.param(0.5, -1.0, 0.8, 0.0, id="clipped-low"),
    pytest.param(1.5, -1.0, 1.5, 1.5, id="bad-and-likelier-is-not-clipped"),
    pytest.param(0.5, 1.0, -0.5, -0.5, id="good-and-unlikelier-is-not-clipped"),
])
def test_loss_of_one_token(ratio, advantage, loss, gradient):
    logprobs = doubles([0.4 * ratio]).log().requires_grad_()
    result = grpo_loss(logprobs, doubles([0.4]).log(), doubles(advantage), torch.ones(1, 1))
    result.backward()
    assert (result.item(), logprobs.grad.item()) == pytest.approx((loss, gradient))


@pytest.mark.parametrize(("mask", "num_tokens", "loss"), [
    pytest.param([[1, 1], [0, 0]], None, -(1 + 1.28) / 2, id="two-tokens"),
    pytest.param([[1, 1], [1, 0]], None, -(1 + 1.28 - 1.5) / 3, id="mean-over-tokens-not-sequences"),
    pytest.param([[1, 1], [1, 0]], 6, -(1 + 1.28 - 1.5) / 6, id="of-the-whole-batch"),
])
def test_loss_is_a_mean_over_tokens(mask, num_tokens, loss):
    ratios, mask = doubles([1, 1.5], [1.5, 9]), torch.tensor(mask)
    result = grpo_loss(ratios.log(), torch.zeros(2, 2), doubles(1, -1), mask, num_tokens=num_tokens)
    assert result.item() == pytest.approx(loss)


@pytest.mark.parametrize("absurd", [1e4, -1e4])
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs"])
def test_padding_changes_nothing(name, absurd):
    torch.manual_seed(0)
    inputs = {n: -torch.rand(2, 3) for n in ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")}
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def loss_and_gradient(**changed):
        leaf = (inputs | changed)["logprobs"].clone().requires_grad_()
        loss = grpo_loss(**inputs | changed | dict(logprobs=leaf), advantages=torch.tensor([1.0, -1.0]), mask=mask,
                         kl_coef=0.1, importance_cap=2.0)
        return loss, *torch.autograd.grad(loss, leaf)

    (loss, gradient), padded = loss_and_gradient(), loss_and_gradient(**{name: inputs[name].where(mask > 0, absurd)})
    assert torch.equal(loss, padded[0]) and torch.equal(gradient, padded[1])
    assert ((gradient != 0) == (mask > 0)).all()


@pytest.mark.parametrize(("difference", "kl"), [
    pytest.param(math.log(2), 1 - math.log(2), id="reference-likelier"),
    pytest.param(-math.log(2), math.log(2) - 0.5, id="policy-likelier"),
    pytest.param(0.0, 0.0, id="equal"),
])
def test_kl_is_k3_and_pulls_to_the_reference(difference, kl):
    logprobs, reference = doubles([-1.0]).requires_grad_(), doubles([-1.0 + difference])
    loss = grpo_loss(logprobs, doubles([-1.0]), doubles(0), torch.ones(1, 1), ref_logprobs=reference, kl_coef=0.1)
    loss.backward()
    assert loss.item() >= 0
    assert (loss.item(), logprobs.grad.item()) == pytest.approx((0.1 * kl, 0.1 * (1 - math.exp(difference))))


@pytest.mark.parametrize(("weight", "cap", "factor"), [
    pytest.param(3.0, 2.0, 2.0, id="cut"),
    pytest.param(1.5, 2.0, 1.5, id="below-the-cap"),
    pytest.param(0.25, 2.0, 0.25, id="never-raised"),
    pytest.param(3.0, 0.0, 1.0, id="off"),
])
def test_importance_weight_is_old_over_rollout_up_to_the_cap(weight, cap, factor):
    logprobs, old = doubles([0.6]).log().requires_grad_(), doubles([0.5]).log()
    rollout = old - math.log(weight)
    loss = grpo_loss(logprobs, old, doubles(2), torch.ones(1, 1), rollout_logprobs=rollout, importance_cap=cap)
    loss.backward()
    assert (loss.item(), logprobs.grad.item()) == pytest.approx((-2.4 * factor, -2.4 * factor))


@pytest.mark.parametrize("size", [1, 3])
def test_gradient_does_not_depend_on_the_micro_batches(size):
    torch.manual_seed(0)
    logprobs, old, ref, rollout = (-torch.rand(4, 8, 5)).requires_grad_()
    advantages, mask = torch.randn(8), torch.arange(5) < torch.randint(1, 6, (8, 1))

    def gradient(micro_batches):
        loss = sum(grpo_loss(logprobs[r], old[r], advantages[r], mask[r], num_tokens=mask.sum(), ref_logprobs=ref[r],
                             kl_coef=0.1, rollout_logprobs=rollout[r], importance_cap=2) for r in micro_batches)
        return torch.autograd.grad(loss, logprobs)[0]

    rows = torch.arange(8)
    torch.testing.assert_close(gradient(rows.split(size)), gradient([rows]), atol=1e-7, rtol=0)


# ---- Settings, command line, import ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "named"), [
    pytest.param(changes, named, id=named.removeprefix("--").replace(" ", "-")) for changes, named in [
        (dict(steps=0), "--steps is 0"), (dict(seed=-1), "--seed is -1"), (dict(timeout=math.inf), "--timeout is inf"),
        (dict(gpus=-1), "--gpus is -1"), (dict(gpus=3, gpus_per_engine=2, dry_run=True), "--gpus is 3"),
        (dict(gpus_per_engine=0), "--gpus-per-engine is 0"), (dict(gpus_per_engine=2), "--gpus-per-engine is 2"),
        (dict(gpus=3), "--prompts-per-step is 16"),
        (dict(prompts_per_step=901), "--prompts-per-step is 901"), (dict(group_size=1), "--group-size is 1"),
        (dict(max_new_tokens=512), "--max-new-tokens is 512"), (dict(temperature=0.0), "--temperature is 0.0"),
        (dict(mem_fraction=1.0), "--mem-fraction is 1.0"), (dict(learning_rate=math.nan), "--learning-rate is nan"),
        (dict(kl_coef=-1.0), "--kl-coef is -1.0")]])
def test_a_bad_setting_is_named(changes, named):
    problems = check_config(Config(**dict(device="cpu", gpus=1) | changes))
    assert any(named in problem for problem in problems), problems


def test_settings_at_their_limits_are_accepted_and_all_problems_come_at_once():
    least = dict(seed=0, kl_coef=0.0, group_size=2, prompts_per_step=900, mem_fraction=0.99)
    assert check_config(Config(device="cpu", gpus=1, **least)) == []
    problems = check_config(Config(device="cpu", gpus=1, steps=0, group_size=1, kl_coef=-2.0, updates_per_step=1))
    assert sorted(problem.split()[0] for problem in problems) == ["--group-size", "--kl-coef", "--steps"]


@pytest.mark.parametrize(("command", "status", "named"), [
    pytest.param("--group-size 1 --steps 0", 2, ["--group-size is 1", "--steps is 0"], id="bad-values"),
    pytest.param("--group-sise 4", 2, ["--group-sise"], id="unknown-option"),
    pytest.param("--help", 0, ["run:", "placement:", "model:", "rollout:", "training:", "--kl-coef"], id="help"),
])
def test_command_line(tmp_path, command, status, named):
    done = python(str(MODULE), *command.split(), cwd=tmp_path)
    text, other = (done.stderr, done.stdout) if status else (done.stdout, done.stderr)
    assert done.returncode == status and all(name in text for name in named) and not other, done
    assert list(tmp_path.iterdir()) == []


def test_import_only_defines(tmp_path):
    code = """
import os, sys, threading
import ray, torch
before = dict(os.environ), threading.active_count()
import colocate_rl
assert not {"sglang", "transformers", "matplotlib"} & set(sys.modules)
assert not ray.is_initialized() and (dict(os.environ), threading.active_count()) == before
"""
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- The command, end to end ----------------------------------------------------------------------------------------


def command_line(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


class Job:
    """`python colocate_rl.py ...` in a folder of its own."""

    def __init__(self, folder, *options, on_gpus=False, **env):
        if not on_gpus:
            without_gpus()
        self.folder = folder
        self.process = subprocess.Popen([sys.executable, c.__file__, *options], cwd=folder, text=True,
                                        env=environment(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def rows(self):
        files = list(self.folder.glob("runs/*/metrics.jsonl"))
        return [json.loads(line) for line in files[0].read_text().splitlines()] if files else []

    def until(self, condition, limit_s=240):
        """Wait for a condition on the metrics; returns the processes that the job has started by then."""
        deadline = time.monotonic() + limit_s
        while not condition(self.rows()):
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, "the job is too slow"
            time.sleep(0.1)
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, processes, limit_s=60):
        """Its exit status and output; fails if one of the processes outlives it by more than 15 seconds."""
        output = self.process.communicate(timeout=limit_s)[0]
        assert len(processes) > 5
        _, alive = psutil.wait_procs(processes, timeout=15)
        assert not alive, f"left behind: {alive}"
        return self.process.returncode, output


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    """The main job as a user runs it, to its end."""
    job = Job(tmp_path_factory.mktemp("main"))
    processes = job.until(lambda rows: rows)
    status, output = job.end(processes, 300)
    assert status == 0, output
    return job, output


def test_main_job_learns(main_job):
    job, output = main_job
    (folder,) = job.folder.glob("runs/*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_reward_before"] < 0.15 and summary["heldout_reward_after"] > 0.9
    assert summary["steps"] == len(job.rows()) == c.Config().steps and summary["versions"]["ray"] == ray.__version__
    assert "base_gpu_id" in output and (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["seed"] == 0
    assert [right for _, right, _ in summary["checklist"]] == [True] * 5 + [None] and "[x] training steps" in output


def test_what_generates_is_what_was_trained(main_job):
    for row in main_job[0].rows():
        assert 0 < row["logprob_difference_max"] < 1e-4
        assert {"seconds_generate", "seconds_sleep", "seconds_onload", "seconds_train", "seconds_sync",
                "seconds_wake", "tokens_per_second"} <= set(row)


def test_two_gpus_learn_and_ctrl_c_leaves_nothing(tmp_path):
    job = Job(tmp_path, "--gpus", "2", "--steps", "400", "--heldout-every", "5")
    processes = job.until(lambda rows: any(row.get("heldout_reward", 0) > 0.9 for row in rows), 400)
    job.process.send_signal(signal.SIGINT)
    assert job.end(processes)[0] == 130
    assert all(row["logprob_difference_max"] < 1e-4 for row in job.rows())


def test_a_seed_repeats_a_run_and_sigterm_leaves_nothing(main_job, tmp_path):
    job = Job(tmp_path, "--steps", "400", "--seed", "0")
    processes = job.until(lambda rows: len(rows) >= 12)
    job.process.terminate()
    assert job.end(processes)[0] == 143
    assert [row["reward"] for row in job.rows()[:12]] == [row["reward"] for row in main_job[0].rows()[:12]]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A small Qwen3 in a folder of its own, with a tokenizer of printable characters and a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    characters = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {chr(n): n for n in range(32, 127)}, "<pad>"))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}="
    tokenizer.save_pretrained(folder)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
                                 num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
                                 eos_token_id=1)).save_pretrained(folder)
    return folder


def test_the_sums_task_asks_in_the_model_s_chat_template(chat_model, tmp_path):
    task = c.sums_task(Config(model=str(chat_model), device="cpu"), tmp_path)
    prompt, answer = task.problems[0]
    text = task.tokenizer.decode(prompt)
    question = re.fullmatch(r"<What is (\d\d) \+ (\d\d)\? Answer with the number only.>=", text)
    assert int(answer) == sum(map(int, question.groups()))
    for text, reward in ((answer, 1), (f"1 + 1 is {answer}.", 1), (f"{answer} or 1", 0), (f"{answer}1", 0), ("", 0)):
        assert task.verify(text, answer) == reward, text


def test_a_model_folder_is_trained_with_kl_and_saved_with_its_tokenizer(chat_model, tmp_path):
    job = Job(tmp_path, "--model", str(chat_model), "--steps", "3", "--prompts-per-step", "4", "--group-size", "4",
              "--kl-coef", "0.1", "--heldout-every", "2")
    status, output = job.end(job.until(lambda rows: rows))
    assert status == 0, output
    (folder,) = tmp_path.glob("runs/*/model")
    before, after = AutoModelForCausalLM.from_pretrained(chat_model), AutoModelForCausalLM.from_pretrained(folder)
    assert set(before.state_dict()) == set(after.state_dict())
    assert AutoTokenizer.from_pretrained(folder).chat_template.startswith("{% for message in messages %}")


def test_ctrl_c_while_the_engine_starts_leaves_nothing(tmp_path):
    job = Job(tmp_path)

    def scheduler_is_starting(rows):
        children = psutil.Process(job.process.pid).children(recursive=True)
        return any("spawn_main" in command_line(process) for process in children)

    processes = job.until(scheduler_is_starting)
    job.process.send_signal(signal.SIGINT)
    assert job.end(processes)[0] == 130


def test_a_dead_scheduler_ends_the_run_with_its_name(tmp_path):
    job = Job(tmp_path, "--steps", "400", "--seed", "3")
    processes = job.until(lambda rows: len(rows) >= 1)
    (scheduler,) = [process for process in processes if "scheduler" in command_line(process)]
    scheduler.kill()
    status, output = job.end(processes)
    assert status == 1 and "error: engine0 died in" in output and f"pid={scheduler.pid}" in output


HOLDER = """
import sys, time
import ray

@ray.remote(num_gpus=1)
class OtherJob:
    def gpu_ids(self):
        return ray.get_gpu_ids()

ray.init("local", num_gpus=int(sys.argv[1]) or None, include_dashboard=False, log_to_driver=False)
job = OtherJob.remote()
print(ray.get_runtime_context().gcs_address, ray.get(job.gpu_ids.remote())[0], flush=True)
time.sleep(600)
"""


def test_a_cluster_on_which_another_job_holds_a_gpu(tmp_path):
    """The run gets the GPU that is left, whose local index is not its rank; logical GPUs or real ones."""
    if GPUS == 1:
        pytest.skip("needs a second GPU")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, "0" if GPUS else "2"], cwd=tmp_path, env=environment({}),
                              stdout=subprocess.PIPE, text=True)
    try:
        address, held = holder.stdout.readline().split()
        job = Job(tmp_path, "--gpus", "1", "--steps", "2", on_gpus=True, RAY_ADDRESS=address,
                  RAY_AUTH_MODE="token")  # as the cluster that ray.init started
        output = job.process.communicate(timeout=300)[0]
        assert job.process.returncode == 0, output
        (summary,) = (json.loads(path.read_text()) for path in tmp_path.glob("runs/*/summary.json"))
        ((rank, tp_rank, trainer, scheduler),) = summary["devices"]
        index = [line.split()[3] for line in output.splitlines() if line.startswith("0  ")]
        assert (rank, tp_rank) == (0, 0) and trainer == scheduler and held == "0" and index == ["1"], output
        assert trainer == (machine_uuids()[1] if GPUS else None)
    finally:
        processes = psutil.Process(holder.pid).children(recursive=True)
        holder.kill()
        psutil.wait_procs(processes, timeout=15)


# ---- Engine: two started at once, on one local Ray -----------------------------------------------------------------


NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@pytest.fixture(scope="module")
def two_gpus():
    without_gpus()
    os.environ |= NO_MULTICAST
    ray.init("local", num_gpus=2, include_dashboard=False, log_to_driver=False,
             runtime_env={"py_modules": [c.__file__]})
    yield c.create_placement_group(2, 60)
    ray.shutdown()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    c.echo_task(c.Config(device="cpu"), folder)
    return str(folder)


def new_engine(group, placement, log):
    options = c.on_bundle(group, placement.bundles[0].index, c.ENGINE_SHARE)
    return ray.remote(c.Engine).options(**options).remote(str(log), placement)


@pytest.fixture(scope="module")
def engines(two_gpus, tiny_model, tmp_path_factory):
    """Two engines started at once, and what their scheduler processes read."""
    config, logs = c.Config(device="cpu"), tmp_path_factory.mktemp("logs")
    plan = c.plan_engines(c.probe_bundles(two_gpus, 60), 1)
    actors = [new_engine(two_gpus, place, logs / f"engine{place.engine}.log") for place in plan]
    starts = [a.start.remote(c.engine_args(config, p, tiny_model)) for a, p in zip(actors, plan, strict=True)]
    readings = c.wait_for(starts, 300, "start")
    yield actors, readings
    for actor in actors:
        ray.kill(actor)


def ask(engine, prompts, **sampling):
    params = [{"max_new_tokens": 8, **sampling} for _ in prompts]
    return c.wait_for([engine.generate.remote(prompts, params)], 100, "generate")[0]


def test_scheduler_processes_report_what_they_see(engines):
    for index, (reading,) in enumerate(engines[1]):
        assert reading["tp_rank"] == 0 and reading["local_index"] == index and reading["uuid"] is None
        assert reading["pid"] != os.getpid()
    assert engines[1][0][0]["pid"] != engines[1][1][0]["pid"]


def test_nvlink_multicast_stays_off_where_it_is_turned_off(engines):
    for (reading,) in engines[1]:
        scheduler = psutil.Process(reading["pid"])
        for process in (scheduler, scheduler.parent()):
            assert NO_MULTICAST.items() <= process.environ().items()


def test_generate_returns_ids_logprobs_and_version(engines):
    (sample,) = ask(engines[0][0], [[3, 4, 5, 2]], temperature=0.0)
    assert sample.prompt_ids == [3, 4, 5, 2] and sample.weight_version == "0"
    assert len(sample.response_ids) == len(sample.logprobs) and all(logprob < 0 for logprob in sample.logprobs)


def test_a_seed_decides_whatever_shares_the_batch_and_on_either_engine(engines):
    prompt, other = [3, 4, 5, 2], [[7, 7, index % 10 + 3, 2] for index in range(40)]
    alone = ask(engines[0][0], [prompt], temperature=1.0, sampling_seed=11)[0].response_ids
    assert ask(engines[0][0], [*other, prompt], temperature=1.0, sampling_seed=11)[-1].response_ids == alone
    assert ask(engines[0][1], [prompt], temperature=1.0, sampling_seed=11)[0].response_ids == alone
    assert len({tuple(ask(engines[0][0], [prompt], temperature=1.0, sampling_seed=seed)[0].response_ids)
                for seed in range(5)}) > 1


def test_draw_with_seeds_follows_the_distribution():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    rows = 20_000
    drawn = c.draw_with_seeds(probabilities.log().expand(rows, -1), torch.arange(rows), torch.full((rows,), 7))
    assert drawn.shape == (rows, 1)
    assert torch.allclose(torch.bincount(drawn[:, 0], minlength=4) / rows, probabilities, atol=0.02)


def test_an_engine_refuses_what_would_kill_its_scheduler(engines):
    engine = engines[0][0]

    def refused(ref, *words):
        with pytest.raises(c.EngineError) as error:
            c.wait_for([ref], 60, "call")
        assert all(word in str(error.value) for word in ("engine 0", *words)), error.value

    refused(engine.wake.remote(["weights"]), "wake", "['weights'] asleep")
    refused(engine.sleep.remote(["kv-cache"]), "sleep", "kv-cache")
    long = engine.generate.remote([[3, 4, 2]], [{"max_new_tokens": 400, "ignore_eos": True}])
    c.wait_for([engine.sleep.remote(["kv_cache", "weights"])], 60, "sleep")  # after the answer, not while it is made
    assert len(c.wait_for([long], 60, "generate")[0][0].response_ids) == 400
    refused(engine.generate.remote([[3, 4, 2]], [{}]), "asleep: ['kv_cache', 'weights']")
    refused(engine.sleep.remote(["weights"]), "asleep")
    refused(engine.update_weights.remote([b""], "1"), "update_weights_from_tensor")
    c.wait_for([engine.wake.remote(["weights"])], 60, "wake")
    c.wait_for([engine.wake.remote(["kv_cache"])], 60, "wake")
    assert ask(engine, [[3, 4, 2]])  # still alive


def test_generation_has_a_limit(engines):
    params = [{"max_new_tokens": 500, "ignore_eos": True}] * 128
    with pytest.raises(TimeoutError, match="generate: not done within 1 s"):
        c.wait_for([engines[0][1].generate.remote([[3, 4, 2]] * 128, params)], 1, "generate")


def test_a_start_that_fails_says_why(two_gpus, engines, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    placement = c.plan_engines(c.probe_bundles(two_gpus, 60), 1)[0]
    engine = new_engine(two_gpus, placement, tmp_path / "engine.log")
    with pytest.raises(c.EngineError) as error:
        args = c.engine_args(c.Config(device="cpu"), placement, str(tmp_path))
        c.wait_for([engine.start.remote(args)], 120, "start")
    ray.kill(engine)
    assert "engine 0" in str(error.value) and "did not start" in str(error.value)
    assert "no error" not in str(error.value) and "actor died" not in str(error.value), error.value


# Engine logs of SGLang 0.5.12, TP=2 unless said, cut down to the lines that matter.
V2 = "[2026-11-22 20:10:38 TP0] Custom allreduce v2 initialized successfully (rank-check failed: tensor model ...)\n"
BEGIN = "[2026-11-22 20:10:40 TP1] Capture cuda graph begin. This can take up to several minutes. avail mem=96.59 GB\n"
SIZES = "[2026-11-22 20:10:40 TP0] Capture cuda graph bs [8, 512]\n"
END = "".join(f"[2026-11-22 20:10:43 TP{rank}] Capture cuda graph end. Time elapsed: 2.4 s.\n" for rank in (0, 1))
DECODE = "[2026-11-22 20:10:59 TP0] Decode batch, #running-req: 8, #token: 336, token usage: 0.00, cuda graph: True\n"
PREFILL = "[2026-11-22 20:10:58 TP0] Prefill batch, #new-seq: 3, #running-req: 1, #queue-req: 0, cuda graph: False\n"
NOT_EXPORTED = V2 + BEGIN + SIZES + """[2026-11-22 20:08:35 TP0] Scheduler hit an exception: Traceback (most ...):
    pairs = self.obj.share_graph_inputs()
RuntimeError: Runtime check failed at sgl_kernel/distributed/custom_all_reduce.cuh:37: CUDA error: invalid argument

During handling of the above exception, another exception occurred:

Exception: Capture cuda graph failed: Runtime check failed at custom_all_reduce.cuh:37: CUDA error: invalid argument
Possible solutions:
4. disable CUDA graph by --disable-cuda-graph. (Not recommended. Huge performance loss)

[2026-11-22 20:08:35] Received sigquit from a child process. It usually means the child failed.
"""
WRONG_INDEX = """[2026-11-22 20:01:47] Scheduler hit an exception: Traceback (most recent call last):
    torch._C._cuda_setDevice(device)
torch.AcceleratorError: CUDA error: invalid device ordinal
GPU device may be out of range, do you have enough GPUs?
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
"""


def registering(count):
    return f"[2026-11-22 20:10:42 TP0] Registering {count} cuda graph addresses\n"


BOTH = {0: [8, 512], 1: [8, 512]}


@pytest.mark.parametrize(("log", "all_reduce", "graphs", "registered", "says"), [
    pytest.param(V2 + BEGIN + SIZES + registering(9) + END, "v2", BOTH, 9, "v2, 9 inputs", id="resident"),
    pytest.param(V2 + BEGIN + SIZES + END, "v2", BOTH, None, "v2, no inputs registered", id="unregistered"),
    pytest.param(BEGIN + SIZES + registering(18) + END, "v1", BOTH, 18, "v1, 18 inputs", id="v1"),
    pytest.param(V2 + BEGIN + SIZES.replace("8, 512", "1, 2, 4, 8") + registering(0) + END, "v2",
                 {rank: [1, 2, 4, 8] for rank in (0, 1)}, 0, "too small to show the fault", id="small-messages"),
    pytest.param(NOT_EXPORTED, "v2", {}, None, "CUDA IPC cannot export", id="graph-memory-is-not-exported"),
    pytest.param(WRONG_INDEX, None, {}, None, "physical id", id="wrong-index"),
    pytest.param("[2026-11-22 20:10:43 TP0] Capture target decode CUDA graph begin. backend=full, bs=[8, 512], avail\n"
                 "[2026-11-22 20:10:43 TP0] Capture target decode CUDA graph end. elapsed=2.36 s\n"
                 "all-reduce: CustomAllReduceV2\n", "v2", {0: [8, 512]}, None, "v2, no inputs", id="0.5.15"),
    pytest.param("[2026-11-22 20:10:40] Capture cuda graph bs [1, 2]\n[2026-11-22 20:10:43] Capture cuda graph end.\n",
                 None, {0: [1, 2]}, None, "None, no inputs", id="one-gpu"),
    pytest.param("RuntimeError: Not enough memory. Please increase it.\n", None, {}, None, "lower --mem", id="memory"),
    pytest.param("ValueError: bad model: x\nReceived sigquit\n", None, {}, None, "ValueError: bad", id="unknown"),
    pytest.param("AssertionError\n", None, {}, None, "AssertionError", id="without-a-message"),
    pytest.param(WRONG_INDEX + "RuntimeError: Connection closed\n", None, {}, None, "physical id", id="not-the-last"),
    pytest.param("ImportError: no x\n" + SIZES + END, None, BOTH, None, "None, no inputs", id="harmless-error"),
])
@pytest.mark.parametrize("decoded", [False, True])
def test_the_engine_s_log_tells_the_outcomes_apart(log, all_reduce, graphs, registered, says, decoded):
    report = c.parse_engine_log(log + PREFILL + decoded * DECODE)
    assert report[:4] == (all_reduce, graphs, registered, decoded)
    assert says in str(report) and (not report.error or report.error in log)
    assert ("cause" in report.help) == (bool(report.error) and not graphs and says not in report.error)


@pytest.mark.parametrize(("sglang", "saver", "tp", "prefer", "in_saver", "registers"), [
    ("0.5.12.post1", True, 2, "saver", True, False), ("0.5.14.post1", True, 2, "saver", True, False),
    ("0.5.15.post1", True, 2, "saver", True, True), ("0.5.12.post1", True, 1, "saver", True, True),
    ("0.5.12.post1", True, 2, "resident", False, True), ("0.5.15.post1", True, 2, "resident", False, True),
    ("0.5.12.post1", False, 2, "saver", False, True),
])
def test_graphs_in_the_memory_saver_register_no_inputs_where_sglang_would(sglang, saver, tp, prefer, in_saver,
                                                                         registers):
    pool = c.plan_graph_pool(sglang, saver, tp, "max_split_size_mb:64", prefer)
    assert pool[:3] == (in_saver, registers, "max_split_size_mb:64")
    assert sglang in pool.why and ("not registered" in pool.why) == (not registers)


@pytest.mark.parametrize(("sglang", "saver", "tp", "kept"), [
    ("0.5.12.post1", False, 2, False), ("0.5.15.post1", False, 2, True), ("0.5.12.post1", False, 1, True),
    ("0.5.15.post1", True, 2, False), ("0.5.12.post1", True, 1, False),
])
def test_expandable_segments_are_taken_out_where_they_break_an_engine(sglang, saver, tp, kept):
    conf = "garbage_collection_threshold:0.8,expandable_segments:True,max_split_size_mb:64"
    pool = c.plan_graph_pool(sglang, saver, tp, conf, "resident")
    assert pool.alloc_conf == (conf if kept else "garbage_collection_threshold:0.8,max_split_size_mb:64")
    assert ("WARNING" in pool.why) == (not kept)
    assert c.plan_graph_pool(sglang, saver, tp, "expandable_segments:False", "resident").alloc_conf


def test_ports_are_held_and_can_be_listened_on():
    held = [c.reserve_port() for _ in range(50)]
    assert len({port for port, _ in held}) == 50
    with socket.socket() as server:  # as a server does it
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", held[0][0]))
        server.listen()
    for _, holder in held:
        holder.close()


# ---- Trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(two_gpus, tiny_model, tmp_path_factory):
    """The same batch trained on by one rank and by two, with KL to the reference; weights before and after."""
    torch.manual_seed(0)
    samples = [c.Sample([3 + i % 10, 4, 2], [3 + (i * 7 + t) % 10 for t in range(2 + i % 4)], [-2.5] * (2 + i % 4), "0")
               for i in range(16)]
    batch = c.make_batch(samples, torch.randn(16))
    result = {}
    bundles = c.probe_bundles(two_gpus, 60)
    for ranks in (1, 2):
        config = c.Config(device="cpu", gpus=ranks, kl_coef=0.1, micro_batch=16 if ranks == 1 else 3)
        actors = [ray.remote(c.Trainer).options(**c.on_bundle(two_gpus, rank, c.TRAINER_SHARE)).remote(
            str(tmp_path_factory.mktemp("log") / "trainer.log"), rank, bundles[rank], config) for rank in range(ranks)]
        call = lambda method, *args: c.wait_for([getattr(a, method).remote(*args) for a in actors], 120, method)  # noqa
        call("start", str(tmp_path_factory.mktemp("group") / "rendezvous"), ranks, tiny_model)
        call("offload"), call("onload")
        metrics = [call("train", batch) for _ in range(2)]
        call("offload"), call("onload")
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        call("save", str(folder))
        result[ranks] = metrics, load_file(folder / "model.safetensors")
        for actor in actors:
            ray.kill(actor)
    return load_file(f"{tiny_model}/model.safetensors"), result


def test_training_does_not_depend_on_ranks_or_micro_batches(trained):
    before, result = trained
    (one, after_one), (two, after_two) = result[1], result[2]
    assert set(after_one) == set(before) and any(not torch.equal(after_one[name], before[name]) for name in before)
    for name in before:
        assert torch.allclose(after_one[name], after_two[name], atol=2e-6), name
    for step in range(2):
        assert sum(rank["loss"] for rank in two[step]) == pytest.approx(one[step][0]["loss"], abs=1e-6)
        assert two[step][0]["grad_norm"] == pytest.approx(one[step][0]["grad_norm"], rel=1e-4)


def test_a_rollout_that_the_trainer_disagrees_with_stops_the_run(two_gpus, tiny_model, tmp_path):
    loop, (bundle, _) = object.__new__(c.Loop), c.probe_bundles(two_gpus, 60)
    loop.config = Config(device="cpu", updates_per_step=1)
    loop.trainers = [ray.remote(c.Trainer).options(**c.on_bundle(two_gpus, 0, c.TRAINER_SHARE)).remote(
        str(tmp_path / "trainer.log"), 0, bundle, loop.config)]
    loop.each(loop.trainers, "start", str(tmp_path / "rendezvous"), 1, tiny_model)
    samples = [c.Sample([3, 4, 5, 2], [6, 7], [-2.5, -2.5], "0")] * 4  # the model's are another value
    with pytest.raises(c.EngineError, match="logprob_difference_mean is .* expected below 0.0001"):
        loop.train(c.make_batch(samples, torch.zeros(4)))
    ray.kill(loop.trainers[0])


def test_the_saved_model_loads_in_transformers_and_sglang(main_job, two_gpus, engines, tmp_path):
    (folder,) = main_job[0].folder.glob("runs/*/model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("407=", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist()
    assert tokenizer.decode(tokens) == "4444"
    ray.kill(engines[0][1])
    placement = c.plan_engines(c.probe_bundles(two_gpus, 60), 1)[1]
    engine = new_engine(two_gpus, placement, tmp_path / "engine.log")
    c.wait_for([engine.start.remote(c.engine_args(c.Config(device="cpu"), placement, str(folder)))], 120, "start")
    assert ask(engine, ids.tolist(), temperature=0.0, max_new_tokens=4)[0].response_ids == tokens


# ---- GPUs -----------------------------------------------------------------------------------------------------------

SGLANG = tuple(map(int, re.findall(r"\d+", version("sglang"))[:3]))
GRAPH_SIZES = "cuda_graph_bs_decode" if SGLANG >= (0, 5, 14) else "cuda_graph_bs"


def skip_below(count):
    return pytest.mark.skipif(GPUS < count, reason=f"needs {count} GPUs, this machine has {GPUS}")


def gpu_case(count, *values, id):
    return pytest.param(*values, id=id, marks=[pytest.mark.gpu, skip_below(count)])


@functools.cache
def machine_uuids():
    """By physical id, as nvidia-smi lists them."""
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()


# The whole job with a small KV cache and few graphs, so that several share the GPUs.
SMALL_JOB = f"""
import sys
import colocate_rl as c
full = c.engine_args
c.engine_args = lambda *args: full(*args) | dict(max_total_tokens=20000, {GRAPH_SIZES}=[8, 128])
sys.exit(c.main(sys.argv[1:]))
"""
UNSET = None
MAPPINGS = [  # GPUs needed, physical ids in CUDA_VISIBLE_DEVICES, written as UUIDs, gpus_per_engine
    (1, UNSET, False, 1), (1, [0], False, 1), (1, [0], True, 1), (2, [1], False, 1), (2, [1, 0], False, 1),
    (2, [1, 0], True, 2), (3, [1, 2], False, 2), (4, [2, 3], False, 2), (4, [1, 2, 3], False, 1), (4, UNSET, False, 4),
    (4, [3, 1, 2, 0], False, 2), (4, [3, 1, 2, 0], True, 2), (5, [1, 2, 3, 4], False, 4), (8, [4, 5, 6, 7], False, 4),
    (8, [4, 5, 6, 7], False, 2)]


def mapping_id(ids, as_uuids, tp):
    return f"{'unset' if ids is UNSET else ','.join(map(str, ids))}{'-uuids' if as_uuids else ''}-tp{tp}"


EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


@pytest.fixture(scope="module")
def small_jobs(tmp_path_factory):
    """A job of two steps for each mapping that fits this machine, and one with expandable segments; all at once."""
    def start(ids, as_uuids, tp, **env):
        if ids is not UNSET:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(machine_uuids()[i] if as_uuids else str(i) for i in ids)
        folder = tmp_path_factory.mktemp("job")
        command = [sys.executable, "-c", SMALL_JOB, "--steps", "2", "--prompts-per-step", "24", "--gpus-per-engine",
                   str(tp)]  # 24 prompts: equal shares for three GPUs, too
        with open(folder / "output", "w") as output:
            return folder, subprocess.Popen(command, cwd=folder, env=environment(env), stdout=output, stderr=output)

    jobs = {mapping_id(*mapping): start(*mapping) for needed, *mapping in MAPPINGS
            if needed <= GPUS and (mapping[0] is not UNSET or GPUS % mapping[2] == 0)}
    jobs["expandable"] = start([0], False, 1, **EXPANDABLE)
    yield jobs
    for _, job in jobs.values():
        job.kill()


def finished(job):
    """Its summary, once it has ended well; all that it has read of itself is right, but for the reward."""
    folder, process = job
    assert process.wait(timeout=500) == 0, (folder / "output").read_text()
    (summary,) = (json.loads(path.read_text()) for path in folder.glob("runs/*/summary.json"))
    wrong = {what: reading for what, right, reading in summary["checklist"] if right is False}
    # Two steps teach nothing, and the memory is that of all jobs.
    assert set(wrong) <= {"held-out reward", "memory asleep", "memory does not grow"}, wrong
    return summary


@pytest.mark.parametrize(("ids", "as_uuids", "tp"), [
    gpu_case(needed, ids, as_uuids, tp, id=mapping_id(ids, as_uuids, tp)) for needed, ids, as_uuids, tp in MAPPINGS])
def test_trainer_and_engine_share_the_gpus_that_were_named(small_jobs, ids, as_uuids, tp):
    if ids is UNSET and GPUS % tp:
        pytest.skip(f"{GPUS} GPUs do not divide into engines of {tp}")
    summary = finished(small_jobs[mapping_id(ids, as_uuids, tp)])
    expected = machine_uuids() if ids is UNSET else [machine_uuids()[i] for i in ids]
    assert summary["devices"] == [[rank, rank % tp, uuid, uuid] for rank, uuid in enumerate(expected)]


@pytest.mark.gpu
@skip_below(1)
def test_a_run_with_expandable_segments_in_its_environment(small_jobs):
    finished(small_jobs["expandable"])
    (log,) = small_jobs["expandable"][0].glob("runs/*/engine0.log")
    assert "WARNING: expandable_segments taken out" in log.read_text()


@pytest.fixture(scope="module", params=[gpu_case(tp, tp, id=f"tp{tp}") for tp in (2, 4)])
def captured(request, tmp_path_factory):
    """Engines with graphs for messages of 4 MiB; inputs are registered from 2 MiB at TP=2, from 384 KiB at TP=4.

    All start at once. By name: the actor, the error of its start or None, its report.
    """
    tp = request.param
    folder = tmp_path_factory.mktemp("captured")
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"], hidden_size=4096, intermediate_size=4096, num_hidden_layers=4, head_dim=128,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=1024, tie_word_embeddings=True, eos_token_id=1,
    ).save_pretrained(folder)
    ray.init("local", include_dashboard=False, log_to_driver=False, runtime_env={"py_modules": [c.__file__]})
    group = c.create_placement_group(tp, 60)
    plan = c.plan_engines(c.probe_bundles(group, 120), tp)
    args = c.engine_args(c.Config(gpus_per_engine=tp, gpus=tp), plan[0], str(folder)) | {
        "load_format": "dummy", "max_total_tokens": 80_000, "max_running_requests": 512, GRAPH_SIZES: [8, 512]}
    saver_registers = c.GraphPool(True, True, "", "guard off")
    cases = {  # changed arguments, environment, plan or None for the file's own, preferred plan
        "saver, guard off": ({}, {}, saver_registers, ""),
        "expandable, guard off": ({"enable_memory_saver": False}, {}, c.GraphPool(
            False, True, "expandable_segments:True", "guard off"), ""),
        "saver": ({}, {}, None, "saver"),
        "resident": ({}, {}, None, "resident"),
        "expandable": ({}, EXPANDABLE, None, "saver"),
        "no graphs": ({"disable_cuda_graph": True}, {}, None, "saver"),
        "physical id": ({"base_gpu_id": 1, "tp_size": 1}, {"CUDA_VISIBLE_DEVICES": "1"}, None, "saver"),
    }
    engines, starts = {}, {}
    for name, (changes, env, pool, prefer) in cases.items():
        options = c.on_bundle(group, 0, 0.1) | {"runtime_env": {"env_vars": c.ONE_LIST | env}}
        engines[name] = ray.remote(c.Engine).options(**options).remote(str(folder / f"{name}.log"), plan[0])
        starts[name] = engines[name].start.remote(args | changes, prefer, pool)
    result = {}
    for name, start in starts.items():
        try:
            readings, error = c.wait_for([start], 240, name)[0], None
            assert {reading["all_reduce"] for reading in readings} == {"CustomAllReduceV2"}
        except c.EngineError as failure:
            error = str(failure)
        result[name] = engines[name], error, c.parse_engine_log((folder / f"{name}.log").read_text())
    yield result
    ray.shutdown()


EXPORT_FAULT = r"custom_all_reduce.cuh:\d+: CUDA error: invalid argument"


@pytest.mark.parametrize("name", ["saver, guard off", "expandable, guard off"])
def test_graph_memory_that_cuda_ipc_cannot_export_fails_with_the_reported_line(captured, name):
    _, error, report = captured[name]
    if SGLANG < (0, 5, 15):
        assert re.search(EXPORT_FAULT, error) and "CUDA IPC cannot export" in error and "v2" == report.all_reduce
    else:  # SGLang handles both
        assert error is None and len(report.graphs) > 1


@pytest.mark.parametrize("name", ["saver", "resident", "expandable"])
def test_graphs_are_captured_with_the_guard_on(captured, name):
    _, error, report = captured[name]
    assert error is None and report.all_reduce == "v2" and not report.error
    assert len(report.graphs) > 1 and all(sizes == [8, 512] for sizes in report.graphs.values())
    if SGLANG < (0, 5, 14):
        assert report.registered == (9 if name == "resident" else None)


def test_a_physical_id_as_base_is_the_other_error(captured):
    _, error, report = captured["physical id"]
    assert "CUDA error: invalid device ordinal" in error and "maybe a physical id" in error
    assert not re.search(EXPORT_FAULT, error) and report.all_reduce is None


def greedy(engine, prompts, tokens):
    params = [{"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}] * len(prompts)
    return [sample.response_ids for sample in c.wait_for([engine.generate.remote(prompts, params)], 300, "generate")[0]]


def test_greedy_tokens_are_equal_with_and_without_graphs(captured):
    prompts = [[3 + row, 50, 7 * row + 2, 9] for row in range(8)]
    tokens = {name: greedy(captured[name][0], prompts, 16) for name in ("saver", "resident", "expandable", "no graphs")}
    assert all(found == tokens["no graphs"] for found in tokens.values()), tokens


def test_the_default_graph_pool_is_the_faster_one_and_leaves_enough_memory(captured):
    names, seconds, left = ("saver", "resident"), {"saver": [], "resident": []}, {}
    for _ in range(8):  # in turns; the first turns warm up
        for name in names:
            start = time.perf_counter()
            greedy(captured[name][0], [[3 + row % 900, 50, 9] for row in range(512)], 64)
            seconds[name].append(time.perf_counter() - start)
    speeds = {name: sorted(round(512 * 64 / second) for second in seconds[name][3:]) for name in names}
    speed = {name: values[2] for name, values in speeds.items()}  # the median of five
    for name in names:
        engine = captured[name][0]
        assert c.wait_for([engine.report.remote()], 60, "report")[0].replayed
        c.wait_for([engine.sleep.remote()], 60, "sleep")
        asleep = c.wait_for([engine.memory_used.remote()], 60, "memory")[0]
        ray.kill(engine)
        time.sleep(5)
        gone = c.wait_for([captured["no graphs"][0].memory_used.remote()], 60, "memory")[0]
        left[name] = max(a - b for a, b in zip(asleep, gone, strict=True))
        print(f"\ngraph pool {name}: {speed[name]} tokens/s {speeds[name]}, {left[name]:.2f} GiB a GPU left asleep")
    default = c.Config().graph_pool
    assert speed[default] >= 0.98 * max(speed.values()) and left[default] <= 3.2


@pytest.mark.parametrize("tp", [gpu_case(tp, tp, id=f"tp{tp}") for tp in (1, 2)])
def test_a_qwen3_of_600_million_parameters_learns(tmp_path, tp):
    job = Job(tmp_path, "--gpus", str(tp), "--gpus-per-engine", str(tp), "--shape", "0.6B", "--learning-rate", "3e-5",
              "--steps", "20", "--heldout-every", "5", on_gpus=True)
    status, output = job.end(job.until(lambda rows: len(rows) > 2, 300), 300)
    print(output[-3000:])
    assert status == 0, output
    (summary,) = map(json.loads, (path.read_text() for path in tmp_path.glob("runs/*/summary.json")))
    assert all(right or what == "all-reduce v2" and tp == 1 for what, right, _ in summary["checklist"])
    assert summary["heldout_reward_after"] > summary["heldout_reward_before"] + 0.3
    (asleep,) = (reading for what, _, reading in summary["checklist"] if what == "memory asleep")
    assert float(re.search(r"[\d.]+", asleep)[0]) <= 3.2, asleep
