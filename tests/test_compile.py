"""Compiled blocks, attention kernels, and that no training step waits for the device.

What is compiled here uses torch's aot_eager backend, which traces and differentiates as inductor
does but generates no code: the graphs are the same, in a tenth of the time.
"""

import functools
import importlib
import shutil

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

import evaluate
import train
import vit
from images.augment import Normaliser
from images.batches import Batch
from images.feed import Feed, Tolerance
from images.mixing import Mixer
from layers import compile as block_compile
from layers import modules
from options.schema import TrainDataOptions
from parallel import collectives
from tests.support.experts import WaitCounter
from tests.support.networks import build_vit
from tests.support.runs import digest
from training import losses, network, prepare
from training.resume import resume
from vit import Block

CPU = torch.device("cpu")
BATCH = 4
# Deterministic: eager blocks and compiled ones compute the same.
SURE = ["optimizer.name=sgd", "optimizer.betas=[0.9,0.999]", "model.vit.depth=3"]
SURE += [f"dataset.train.batch_size={BATCH}"]
# Everything that could get into the graph of a block, or in between.
BUSY = [
    "model.vit.drop_path_rate=0.2",
    "model.vit.proj_drop_rate=0.1",
    "model.vit.attn_drop_rate=0.1",
    "model.vit.init_values=0.1",
    "dataset.train.mixup=0.8",
    "dataset.train.cutmix=1.0",
    "training.grad_accum_steps=2",
    "training.ema_decay=0.9",
]
EXPERTS = ["model.moe.num_experts=4", "model.moe.mlp_ratio=1"]
# One block with attention, a dense network and experts: inductor compiles C++ for half a minute.
WITH_ALL = [*EXPERTS, "model.moe.every_n=1", "model.moe.shared_ratio=1", "model.vit.depth=1"]
# Every second block: one of three has experts.
NOISY = [*EXPERTS, "model.moe.router=noisy_topk", "model.moe.load_coef=0.1"]
NOISY += ["model.moe.jitter=0.1", "model.moe.capacity_factor=0.9", "model.moe.z_coef=0.01"]


def use_backend(backend):
    """Compile with another backend than inductor, in this process."""
    compile_blocks = functools.partial(block_compile.compile_blocks, backend=backend)
    network.block_compile.compile_blocks = compile_blocks


def batch_of(config, seed):
    generator = torch.Generator().manual_seed(seed)
    vit_options = config.model.vit
    size = config.dataset.train.batch_size
    return Batch(
        torch.randn(size, 3, vit_options.img_size, vit_options.img_size, generator=generator),
        torch.randint(0, vit_options.num_classes, (size,), generator=generator),
        torch.arange(size),
    )


def make_step(run, *, step):
    config = run.config
    accum = config.training.grad_accum_steps
    batches = [batch_of(config, 10 * step + n + 100 * run.world.rank) for n in range(accum)]
    meter = train.Meter.start(run.world.device)
    train.train_step(run, iter(batches), step=step, meter=meter)
    return meter.loss.item() + meter.balance.item()


def counting_backend(calls):
    """aot_eager that notes each call of a forward graph."""

    def compiler(graph, _inputs):
        def call(*args):
            calls.append(1)
            return graph(*args)

        return call

    return aot_autograd(fw_compiler=compiler, bw_compiler=lambda graph, _inputs: graph)


def count_graphs(world, config):
    """Calls of compiled graphs in a step, its units and microbatches, graphs after each use."""
    calls = []
    use_backend(counting_backend(calls))
    run, choices = prepare.prepare(config, world)
    assert choices["compile"] is True
    graphs = []
    make_step(run, step=0)
    graphs.append(counters["stats"]["unique_graphs"])
    calls.clear()
    make_step(run, step=1)
    calls_of_step = len(calls)
    graphs.append(counters["stats"]["unique_graphs"])
    run.model.eval()
    with torch.no_grad():
        for size in (BATCH, 3, BATCH, 3):  # of validation, and its shorter last batch, twice
            run.model(batch_of(config, 0).image_BCHW[:size])
        graphs.append(counters["stats"]["unique_graphs"])
        if run.ema is not None:
            with train.averaged_weights(run, run.ema):
                run.model(batch_of(config, 0).image_BCHW)
    run.model.train()
    make_step(run, step=2)
    graphs.append(counters["stats"]["unique_graphs"])
    units = sum(isinstance(module, Block) for module in run.model.modules())
    return calls_of_step, units, sum(counters["graph_break"].values()), graphs


CASES = {
    "dense": (1, [], 1),
    "all at once": (1, [*BUSY, *NOISY], 3),  # the first block has no drop path
    "experts on 2 ranks": (2, [*BUSY, *NOISY, "distributed.ep=2"], 3),
}


@pytest.mark.parametrize(
    "case", ["dense", *(pytest.param(name, marks=pytest.mark.slow) for name in [*CASES][1:])]
)
def test_a_step_runs_one_unbroken_graph_per_unit(ranks, small_run, case):
    world_size, options, kinds = CASES[case]
    config = small_run("model.compile=true", *SURE, *options)
    microbatches = config.training.grad_accum_steps
    for calls, units, breaks, graphs in ranks(world_size, count_graphs, config):
        assert units == 3
        assert calls == units * microbatches
        assert breaks == 0
        # Of training; none in its second step; of two sizes in validation; none after that.
        assert graphs == [kinds, kinds, 3 * kinds, 3 * kinds]


def test_recomputed_blocks_run_the_same_graph_again(ranks, small_run):
    options = [*SURE, *NOISY, "model.vit.grad_checkpointing=true", "model.compile=true"]
    ((calls, units, breaks, graphs),) = ranks(1, count_graphs, small_run(*options))
    assert (calls, breaks) == (2 * units, 0)
    assert graphs == [2, 2, 6, 6]


def test_what_breaks_a_graph_is_an_error(ranks, small_run):
    def broken(world):
        use_backend("eager")
        run, _ = prepare.prepare(small_run("model.compile=true", *SURE), world)
        block = run.model.module.blocks[0]
        block.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        with pytest.raises(torch._dynamo.exc.Unsupported):
            make_step(run, step=0)

    ranks(1, broken)


def test_endless_new_graphs_are_an_error(ranks):
    def ever_new(_):
        block_compile.MAX_GRAPHS = 3
        block = torch.nn.Linear(4, 4)
        block_compile.compile_blocks([block], backend="eager")
        for size in (1, 2, 3):
            block(torch.ones(size, 4))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            block(torch.ones(5, 4))

    ranks(1, ever_new)


def trained(world, configs, backend):
    """Figures and weights after three steps of each config."""
    use_backend(backend)
    found = []
    for config in configs:
        run, _ = prepare.prepare(config, world)
        figures = [make_step(run, step=step) for step in range(3)]
        found.append((figures, {shard.name: shard.local.detach() for shard in run.shards}))
    assert counters["stats"]["unique_graphs"] > 0, "one was compiled"
    return found


PARITY = {
    "dense": (1, [], "aot_eager"),
    "experts, recomputed": (1, [*EXPERTS, "model.vit.grad_checkpointing=true"], "aot_eager"),
    "ZeRO 2, 2 ranks": (2, ["fsdp.zero_dp_strategy=2", "training.ema_decay=0.9"], "aot_eager"),
    "experts on 2 ranks": (2, [*EXPERTS, "distributed.ep=2"], "aot_eager"),
    "ZeRO 0": (1, ["fsdp.zero_dp_strategy=0"], "aot_eager"),
    "inductor": (2, [*WITH_ALL, "distributed.ep=2"], "inductor"),
}


SLOW = dict.fromkeys(("ZeRO 2, 2 ranks", "experts on 2 ranks", "inductor"), pytest.mark.slow)


@pytest.mark.parametrize("case", [pytest.param(name, marks=SLOW.get(name, ())) for name in PARITY])
def test_compiled_training_is_eager_training(ranks, small_run, case):
    world_size, options, backend = PARITY[case]
    configs = [
        small_run(*SURE, "model.vit.depth=2", *options, f"model.compile={is_compiled}")
        for is_compiled in ("false", "true")
    ]
    for (expected, expected_shards), (figures, shards) in ranks(
        world_size, trained, configs, backend
    ):
        assert figures == pytest.approx(expected, rel=1e-6)
        assert list(shards) == list(expected_shards), "names are as without compiling"
        for name, values in shards.items():
            torch.testing.assert_close(values, expected_shards[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_goes_on_uncompiled(ranks, small_run, tmp_path):
    options = [*BUSY, *NOISY, "training.steps=3", "training.val_interval=2"]
    options += [f"dataset.train.batch_size={BATCH}", "training.checkpoint.keep_last=9"]

    def final(world, is_compiled):
        config = small_run(*options, f"model.compile={is_compiled}")
        train.train(config, world)
        run, _ = prepare.prepare(config, world)
        assert resume(run).step == 3
        return digest(run.tensors())

    def whole_and_parted(world):
        use_backend("aot_eager")
        digests = []
        for is_compiled in ("true", "true", "false"):
            digests.append(final(world, is_compiled))
            (last,) = (tmp_path / "run").glob("step_3_*")
            shutil.rmtree(last)
        return digests

    ((whole, parted, uncompiled),) = ranks(1, whole_and_parted)
    assert parted == whole
    assert uncompiled != whole, "its drop path draws as timm's does"


def test_compiled_drop_path_drops_whole_images_and_keeps_the_mean(ranks):
    def dropped(_):
        torch.manual_seed(0)
        results = []
        for rate in (0.25, 0.75):
            module = vit.DropPath(rate)
            run = torch.compile(module.forward, fullgraph=True, backend="aot_eager")
            ones_BLD = torch.ones(20_000, 2, 3)
            y_BLD = run(ones_BLD)
            results.append((y_BLD.mean().item(), y_BLD.unique().tolist()))
            assert torch.equal(y_BLD, y_BLD[:, :1, :1].expand(-1, 2, 3))
            assert torch.equal(torch.compile(module.eval().forward)(ones_BLD), ones_BLD)
        return results, counters["stats"]["unique_graphs"]

    (((one, other), _),) = ranks(1, dropped)
    assert one == (pytest.approx(1, abs=0.02), pytest.approx([0, 4 / 3]))
    assert other == (pytest.approx(1, abs=0.05), pytest.approx([0, 4]))


def refused(world, config, message):
    with pytest.raises(ValueError, match=message):
        prepare.prepare(config, world)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.sdpa=cudnn"],
            r"model.sdpa=cudnn: does not work for .*cpu.*\(use auto, flash, math",
        ),
        (["model.sdpa=efficient"], "model.sdpa=efficient: does not work"),
        (["model.sdpa=flash", "model.vit.attn_drop_rate=0.1"], "model.sdpa=flash.*dropout 0.1"),
    ],
)
def test_an_attention_kernel_that_does_not_work_is_refused(ranks, small_run, options, message):
    ranks(1, refused, small_run(*options), message)


def test_without_a_compiler_nothing_starts(ranks, small_run):
    def without(world):
        import torch._inductor.config as inductor

        inductor.cpp.cxx = ("no-such-compiler",)
        refused(world, small_run("model.compile=true"), "model.compile=true: needs a C.. compiler")

    ranks(1, without)


def test_transformer_engine_is_not_compiled_and_has_its_own_attention(small_run):
    config = small_run("model.compile=true")
    with pytest.raises(ValueError, match=r"model.compile=true: needs model.backend=torch, not te"):
        network.check_compile(config, backend="te", reason="auto: it imports", device=CPU)
    with pytest.raises(ValueError, match=r"model.sdpa=flash: has no effect with backend te"):
        network.block_choices(small_run("model.sdpa=flash"), "te", CPU)


@pytest.mark.parametrize("override", ["model.compile=true", "model.sdpa=math"])
def test_evaluate_refuses_what_is_for_training(override, capsys):
    arguments = evaluate.parse(["nowhere", override])
    with pytest.raises(ValueError, match=f"config {override}: has no effect here"):
        evaluate.check_used(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_usable_kernel_computes_the_same_attention_and_no_other_runs(dtype):
    sizes = {"head_dim": 12, "num_tokens": 21}
    usable = modules.usable_kernels(device=CPU, dtype=dtype, **sizes)
    assert usable == ("flash", "math")
    q, k, v = torch.randn(3, 2, 3, 21, 12, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
    for name in modules.KERNELS:
        with modules.only(name):
            if name in usable:
                torch.testing.assert_close(attend(q, k, v), attend(q, k, v), **tolerance)
            else:
                with pytest.raises(RuntimeError):
                    attend(q, k, v)


# What makes the host wait for a device, as it is called in Python: on a CPU some of it does not
# reach the dispatcher, where WaitCounter would see it.
READS = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "equal", "allclose", "is_nonzero"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__array__", "masked_select"}


def is_of(tensor, others):
    return any(tensor is other or tensor._base is other for other in others)


class ReadCounter(TorchFunctionMode):
    """Notes each read of a tensor's values but of those in `host`, which are on no device."""

    def __init__(self, host):
        super().__init__()
        self.host = host
        self.reads = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS and not is_of(args[0], self.host):
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


class HostAwareWaitCounter(WaitCounter):
    """Notes what would wait for the device, but for reads of the tensors in `host`."""

    def __init__(self, host):
        super().__init__()
        self.host = host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and is_of(args[0], self.host):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def reads_of_a_step(world, config):
    run, _ = prepare.prepare(config, world)
    proxy = vars(importlib.import_module("megatron_fsdp.param_and_grad_buffer"))["torch"]
    synchronized = []
    vars(proxy.cuda)["synchronize"] = lambda *_: synchronized.append("cuda.synchronize")
    make_step(run, step=0)
    batches = [batch_of(config, n) for n in range(config.training.grad_accum_steps)]
    meter = train.Meter.start(world.device)
    # In host memory whatever the device: the stream positions, from which follows what is mixed,
    # and the optimizer's counts of steps.
    host = [b.position_B for b in batches]
    host += [state["step"] for state in run.optimizer.state.values() if "step" in state]
    with HostAwareWaitCounter(host) as waits, ReadCounter(host) as reads:
        train.train_step(run, iter(batches), step=1, meter=meter)
    with ReadCounter([]) as of_log_line:
        train.read_meter(run, meter, step=2)
    return [*waits.waits, *reads.reads, *synchronized], of_log_line.reads


SYNCS = {
    "dense": [],
    "all at once": [*BUSY, *NOISY, "dataset.train.batch_size=4", "training.loss=bce"],
    "lamb, recomputed": ["optimizer.name=lamb", "model.vit.grad_checkpointing=true", *EXPERTS],
}


@pytest.mark.parametrize("case", SYNCS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_training_step_reads_no_tensor_and_a_log_line_does(ranks, small_run, case, world_size):
    config = small_run(*SYNCS[case])
    for of_step, of_log_line in ranks(world_size, reads_of_a_step, config):
        assert of_step == []
        assert "tolist" in of_log_line, "the counter sees what there is"


def test_experts_on_several_ranks_wait_once_per_layer_for_the_counts(ranks, small_run):
    """An all-to-all needs to know how many rows arrive; nothing else is read by the host."""
    options = [*EXPERTS, "model.moe.every_n=1", "distributed.ep=2", "training.grad_accum_steps=2"]
    for of_step, _ in ranks(2, reads_of_a_step, small_run(*options)):
        assert of_step == ["cpu"] * 2 * 2, "layers x microbatches"


# The meta device stands for CUDA: what goes between it and the host is counted.
def test_mixing_model_and_loss_copy_nothing_between_host_and_device():
    model = build_vit(
        img_size=16, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=5
    ).to("meta")
    o = TrainDataOptions(mixup=0.8, cutmix=1.0)
    mixer = Mixer(o, smoothing=0.1, num_classes=5, seed=0)
    image_BCHW = torch.empty(4, 3, 16, 16, device="meta")
    label_B = torch.empty(4, dtype=torch.int64, device="meta")
    with WaitCounter() as counter:
        image_BCHW, target_BY = mixer(image_BCHW, label_B, group=0)
        loss = losses.smoothed_loss(model(image_BCHW), target_BY, smoothing=0.1)
        loss = loss + losses.binary_loss(
            model(image_BCHW), target_BY, smoothing=0.1, threshold=0.2, is_sum=False
        )
        loss.backward()
    assert counter.waits == []


def test_positions_of_a_batch_stay_on_the_host():
    image_BCHW = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    batch = Batch(image_BCHW, torch.zeros(2, dtype=torch.int64), torch.arange(2))
    loader = torch.utils.data.DataLoader([batch], batch_sampler=[[0]], collate_fn=lambda b: b[0])
    feed = Feed(
        loader,
        split="train",
        device=torch.device("meta"),
        normaliser=Normaliser((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        tolerance=Tolerance(None),
    )
    (moved,) = feed
    assert (moved.image_BCHW.device.type, moved.label_B.device.type) == ("meta", "meta")
    assert torch.equal(moved.position_B, batch.position_B)


def test_ranks_agree_to_stop_without_waiting_in_a_step(ranks):
    """Asked in step 1 on one rank, all answer yes after step 2, and not before."""

    def answers(world):
        from training.stopping import StopSignals

        stop = StopSignals()
        found = [stop.agreed_before()]
        if world.rank == 1:
            stop._name = "SIGTERM"
        found += [stop.agreed_before(), stop.agreed_before(), stop.agreed()]
        collectives.require_equal("other collectives", "in between")
        return found

    assert ranks(2, answers) == [[False, False, True, True]] * 2
    assert ranks(1, answers) == [[False] * 4]


def test_ranks_whose_steps_are_long_agree_at_once(ranks):
    """One rank's step is long: from the next call on both wait, and answer in the step itself."""

    def answers(world):
        from training.stopping import StopSignals

        stop = StopSignals()
        stop._polled_at -= 60 * world.rank
        found = [stop.agreed_before(), stop.agreed_before()]
        stop._polled_at -= 60 * world.rank
        found.append(stop.agreed_before())
        if world.rank == 1:
            stop._name = "SIGTERM"
        found.append(stop.agreed_before())
        return found

    assert ranks(2, answers) == [[False, False, False, True]] * 2
