"""The same code on one CUDA device with NCCL; `pytest -m gpu` on a machine that has one."""

import json
import shutil

import pytest
import torch

import train
from images.augment import Normaliser
from images.mixing import Eraser
from layers import te
from options.schema import TrainDataOptions
from parallel import distributed
from tests.support.runs import digest
from tests.support.sharded import small_vit, train_plainly, train_sharded, worst_error
from training import prepare
from training.resume import resume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def cuda_world():
    with distributed.process_group("cuda", timeout_s=120) as world:
        yield world


@pytest.mark.parametrize("strategy", [0, 1, 2, 3])
@pytest.mark.parametrize("accum", [1, 2])
def test_sharded_training_on_one_rank_with_nccl_equals_plain_pytorch(cuda_world, strategy, accum):
    """Groups of one rank double gradients when the communication dtype differs; ours does not."""
    expected, norms = train_plainly(small_vit(), kind="adamw", accum=accum)
    found, sharded_norms = train_sharded(cuda_world, "adamw", accum, {"strategy": strategy}, {})
    assert worst_error([found], expected) <= 1e-4, "CPU reference, fp32 without TF32"
    assert sharded_norms == pytest.approx(norms, rel=1e-3)


def test_what_is_erased_is_where_it_is_on_a_cpu_and_generators_come_back(cuda_world):
    """Boxes are the same, the noise is the device's; all else of a batch stays as it is."""
    position_B = torch.arange(32)
    found = {}
    for device in (torch.device("cpu"), cuda_world.device):
        eraser = Eraser(TrainDataOptions(reprob=0.5, recount=2), device=device, seed=3)
        before = torch.cuda.get_rng_state(cuda_world.device)
        image_BCHW = torch.full((32, 3, 40, 56), 9.0, device=device)
        once = eraser(image_BCHW.clone(), position_B)
        assert torch.equal(eraser(image_BCHW.clone(), position_B), once)
        assert torch.equal(torch.cuda.get_rng_state(cuda_world.device), before)
        found[device.type] = (once != 9).cpu()
    assert torch.equal(found["cpu"], found["cuda"])
    assert 5 < found["cpu"].flatten(1).any(1).sum() < 27


def test_pixels_are_normalised_as_on_a_cpu(cuda_world):
    image_BCHW = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8)
    normalise = Normaliser((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = normalise.batch(image_BCHW.to(cuda_world.device)).cpu()
    torch.testing.assert_close(found, normalise.batch(image_BCHW), atol=1e-6, rtol=0)


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def learn(small_run, tmp_path, world, *overrides):
    """Overfit 24 images for 60 steps; return the log's first line and its training losses."""
    config = small_run(
        "device=cuda",
        "training.steps=60",
        "training.label_smoothing=0",
        "dataset.train.hflip=0",
        "training.log_interval=5",
        "training.val_interval=60",
        "model.vit.embed_dim=48",
        "dataset.train.batch_size=16",
        "dataset.train.crop_scale=[1,1]",
        *overrides,
    )
    train.train(config, world)
    lines = logged(tmp_path / "run")
    return lines[0], [line["loss"] for line in lines if line["event"] == "train"]


def test_bf16_steps_learn(small_run, tmp_path, cuda_world):
    choices, losses = learn(small_run, tmp_path, cuda_world, "model.backend=torch")
    assert (choices["dtype"], choices["backend"]) == ("bfloat16", "torch")
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("kernel", ["auto", "flash", "efficient", "math"])
def test_compiled_steps_learn_with_each_attention_kernel(
    small_run, tmp_path, cuda_world, experts, kernel
):
    options = ["model.backend=torch", "model.compile=true", f"model.sdpa={kernel}"]
    options += ["model.vit.drop_path_rate=0.1", f"model.moe.num_experts={experts}"]
    choices, losses = learn(small_run, tmp_path, cuda_world, *options)
    assert (choices["compile"], choices["sdpa"]) == (True, kernel)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("fp8", ["null", "delayed", "current"])
def test_transformer_engine_steps_learn(small_run, tmp_path, cuda_world, fp8):
    pytest.importorskip("transformer_engine.pytorch")
    overrides = ["model.backend=te", f"model.te_fp8={fp8}"]
    choices, losses = learn(small_run, tmp_path, cuda_world, *overrides)
    assert choices["backend"] == "te"
    assert losses[-1] < 0.8 * losses[0]


def test_auto_takes_transformer_engine_where_it_imports():
    pytest.importorskip("transformer_engine.pytorch")
    assert te.resolve_backend("auto", torch.device("cuda"))[0] == "te"


def final_digest(config, world):
    run, _ = prepare.prepare(config, world)
    assert resume(run).step == config.training.steps
    return digest(run.tensors())


def test_resume_on_cuda_continues_bit_for_bit(small_run, tmp_path, cuda_world):
    options = ["device=cuda", "model.backend=torch", "model.vit.drop_rate=0.1"]
    options += ["training.steps=4", "training.val_interval=2", "training.log_interval=1"]
    config = small_run(*options)
    train.train(config, cuda_world)
    whole = final_digest(config, cuda_world)
    for folder in (tmp_path / "run").glob("step_4_*"):
        shutil.rmtree(folder)
    train.train(config, cuda_world)
    assert final_digest(config, cuda_world) == whole
