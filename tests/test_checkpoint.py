"""Saving whole or not at all, finding the newest complete checkpoint, loading strictly."""

import json
import math
import os
import shutil

import pytest
import torch

import checkpoint
from weights import dcp_writer, verify


def tensors(value: float, **extra) -> dict:
    return {"model": {"weight": torch.full((4, 3), value), **extra}}


def save(root, step, value, loss=1.5):
    return checkpoint.save(
        root, tensors(value), state={"step": step, "metrics": {"loss": loss}}, loss=loss
    )


def save_steps(world, root, steps):
    return [save(root, step, float(step)).name for step in steps]


def save_in(root, steps):
    root.mkdir()
    return save_steps(None, root, steps)


def newest(world, root):
    found, rejected = checkpoint.find_newest(root)
    loaded = tensors(-1.0)
    if found is not None:
        checkpoint.load(found, loaded)
    return (
        found and found.step,
        list(rejected.values()),
        loaded["model"]["weight"].unique().tolist(),
    )


def test_saved_values_come_back_from_the_newest_step(ranks, tmp_path):
    assert ranks(2, save_steps, tmp_path, [5, 10, 9])[0] == [
        "step_5_loss_1.500",
        "step_10_loss_1.500",
        "step_9_loss_1.500",
    ]
    assert ranks(2, newest, tmp_path) == [(10, [], [10.0])] * 2


def test_a_step_saved_again_is_a_new_attempt_and_the_newer_wins(ranks, tmp_path):
    def twice(world):
        return save(tmp_path, 3, 1.0).name, save(tmp_path, 3, 2.0).name

    assert ranks(1, twice)[0] == ("step_3_loss_1.500", "step_3_loss_1.500_r2")
    assert ranks(1, newest, tmp_path)[0] == (3, [], [2.0])


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped bit": lambda folder: damage_bytes(folder / "__0_0.distcp"),
    "truncated": lambda folder: os.truncate(folder / "__0_0.distcp", 10),
    "missing file": lambda folder: (folder / "__0_0.distcp").unlink(),
    "extra file": lambda folder: (folder / "extra").write_text(""),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "broken manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest without files": lambda folder: (folder / "manifest.json").write_text("{}"),
    "flipped bit in metadata": lambda folder: damage_bytes(folder / ".metadata"),
    "state changed": lambda folder: (folder / "state.json").write_text('{"step": 99}'),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_older_one_is_used(ranks, tmp_path, kind):
    names = ranks(1, save_steps, tmp_path, [1, 2])[0]
    DAMAGES[kind](tmp_path / names[1])
    step, rejected, values = ranks(1, newest, tmp_path)[0]
    assert (step, values) == (1, [1.0])
    assert len(rejected) == 1
    assert "step_2_loss_1.500" in rejected[0]


def test_if_every_checkpoint_is_damaged_the_run_does_not_start_over(ranks, tmp_path):
    for name in ranks(1, save_steps, tmp_path, [1, 2])[0]:
        damage_bytes(tmp_path / name / "__0_0.distcp")

    def refused(world):
        with pytest.raises(ValueError, match=r"none of 2 can be used: .*step_2.*; .*step_1"):
            checkpoint.find_newest(tmp_path)

    ranks(2, refused)


def test_state_of_another_schema_or_without_a_step_is_refused(ranks, tmp_path):
    folder = tmp_path / ranks(1, save_steps, tmp_path, [1])[0][0]
    for change, message in (
        ({"schema_version": 2}, r"schema_version=2: must be 1"),
        ({"step": "7"}, r"step=7: must be a number from 0 to"),
        ({"step": -1}, r"step=-1: must be a number from 0 to"),
        ({"step": True}, r"step=True: must be a number from 0 to"),
        ({"step": math.nan}, r"step=nan: must be a number from 0 to"),
        ({"metrics": None}, r"metrics=None: must be an object"),
        ({"metrics": {"val_loss": math.nan}}, r"metrics val_loss=nan: must be a finite number"),
    ):
        state = {"schema_version": 1, "step": 1, "metrics": {}} | change
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        facts = {"bytes": (folder / "state.json").stat().st_size}
        facts["sha256"] = dcp_writer.sha256(folder / "state.json")
        manifest["files"]["state.json"] = facts
        (folder / "manifest.json").write_bytes(dcp_writer.encode(manifest))
        with pytest.raises(ValueError, match=message):
            verify.verify(folder)


def test_folders_that_only_look_like_checkpoints_are_ignored(ranks, tmp_path):
    folder = tmp_path / ranks(1, save_steps, tmp_path, [1])[0][0]
    for name in ("old_step_9_loss_1.0", "step_9", "step_9_loss_1.000.bak", ".staging-9-abc"):
        shutil.copytree(folder, tmp_path / name)
    assert ranks(1, newest, tmp_path)[0] == (1, [], [1.0])


def test_a_link_with_a_checkpoints_name_is_refused(ranks, tmp_path):
    folder = tmp_path / "run" / ranks(1, lambda world: save_in(tmp_path / "run", [1]))[0][0]
    (tmp_path / "run/step_8_loss_1.000").symlink_to(folder)
    reason = "checkpoint step_8_loss_1.000: step_8_loss_1.000 is a symbolic link"
    assert ranks(1, newest, tmp_path / "run")[0] == (1, [reason], [1.0])


def test_an_interrupted_save_leaves_the_previous_checkpoint(ranks, tmp_path):
    ranks(1, save_steps, tmp_path, [1])

    def die_before_the_rename(world):
        dcp_writer.commit = lambda *_: os._exit(9)
        save(tmp_path, 2, 2.0)

    with pytest.raises(pytest.fail.Exception, match="died"):
        ranks(1, die_before_the_rename)
    assert len(list(tmp_path.glob(".staging-*"))) == 1
    assert ranks(1, newest, tmp_path)[0] == (1, [], [1.0])


def test_a_failed_commit_is_an_error_on_every_rank(ranks, tmp_path):
    def refuse(target, metadata, written):
        raise OSError(28, "No space left on device", str(target.folder))

    def failing(world):
        dcp_writer.commit = refuse
        with pytest.raises(OSError, match=r"rank 0: .*No space left.*need 0.00 GiB, free \d"):
            save(tmp_path, 2, 2.0)

    ranks(2, failing)
    assert list(tmp_path.iterdir()) == [], "what was staged is in the way of the next attempt"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"model": {}}, r"unexpected model.weight"),
        (tensors(0.0, bias=torch.zeros(2)), r"missing model.bias"),
        ({"model": {"weight": torch.zeros(3, 4)}}, r"\(4, 3\) torch.float32, .* has \(3, 4\)"),
        ({"model": {"weight": torch.zeros(4, 3).bfloat16()}}, r"float32, the model has .*bfloat16"),
    ],
)
def test_load_lists_differences_before_touching_a_tensor(ranks, tmp_path, wanted, message):
    ranks(1, save_steps, tmp_path, [1])

    def refused(world):
        found, _ = checkpoint.find_newest(tmp_path)
        with pytest.raises(ValueError, match=message):
            checkpoint.load(found, wanted)
        return [bool((tensor == 0).all()) for tensor in wanted["model"].values()]

    assert all(ranks(1, refused)[0])


def test_data_files_are_written_by_one_thread(ranks, tmp_path, monkeypatch):
    """With more, DCP reports a full disk as success (pytorch/pytorch#191391)."""
    seen = []
    real = dcp_writer.FileSystemWriter

    def noted(*args, **kwargs):
        seen.append(kwargs.get("thread_count", 1))
        return real(*args, **kwargs)

    def watched(world):
        dcp_writer.FileSystemWriter = noted
        save(tmp_path, 1, 0.0)
        return seen

    assert set(ranks(1, watched)[0]) == {1}


def test_a_rank_that_cannot_write_is_an_error_of_one_line_on_every_rank(ranks, tmp_path):
    real = dcp_writer.FileSystemWriter

    class Full(real):
        def write_data(self, plan, planner):
            raise OSError(28, "No space left on device")

    def failing(world):
        if world.rank == 1:
            dcp_writer.FileSystemWriter = Full
        with pytest.raises(OSError, match=r"rank 1: .*No space left"):
            save(tmp_path, 1, 0.0)

    ranks(2, failing)
    assert not list(tmp_path.glob("step_*"))


def test_files_are_not_writable_by_others(ranks, tmp_path):
    def with_umask(world):
        os.umask(0o022)
        return save(tmp_path, 1, 0.0)

    folder = ranks(1, with_umask)[0]
    assert all(path.stat().st_mode & 0o022 == 0 for path in [folder, *folder.iterdir()])


@pytest.mark.parametrize("content", [torch.zeros(2), {"optimizer": {}}, {"model": 3}])
def test_a_file_without_model_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x.pt: has no `model` weights"):
        checkpoint.load_torch_checkpoint(tmp_path / "x.pt", torch.nn.Linear(1, 1))


@pytest.mark.parametrize("where", ["folder", "__0_0.distcp", "manifest.json"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.chmod(path.stat().st_mode | 0o002), r"can be written by every user"),
        (lambda path: os.chown(path, 12345, -1), r"belongs to user 12345"),
    ],
    ids=["writable by others", "owned by another"],
)
def test_what_others_could_have_written_is_refused(ranks, tmp_path, where, spoil, message):
    if os.geteuid() and "12345" in message:
        pytest.skip("only root can give a file away")
    names = ranks(1, save_steps, tmp_path, [1, 2])[0]
    folder = tmp_path / names[1]
    spoil(folder if where == "folder" else folder / where)
    with pytest.raises(ValueError, match=rf"step_2.* {message}"):
        verify.verify(folder)
    assert ranks(1, newest, tmp_path)[0][0] == 1


def test_roots_checkpoints_are_for_every_user(ranks, tmp_path, monkeypatch):
    if os.geteuid():
        pytest.skip("needs files of root")
    folder = tmp_path / ranks(1, save_steps, tmp_path, [1])[0][0]
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert verify.verify(folder).step == 1


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002])
def test_the_umask_alone_decides_who_can_read_and_write(ranks, tmp_path, mask):
    def with_umask(world):
        os.umask(mask)
        return save(tmp_path, 1, 0.0)

    folder = ranks(1, with_umask)[0]
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved_by_any_rank(ranks, tmp_path, bad, where):
    names = ranks(2, save_steps, tmp_path, [1])[0]

    def refused(world):
        content = {"model": {"weight": torch.zeros(4)}, "optimizer": {"weight": torch.zeros(4)}}
        content[where]["weight"][2] = bad
        message = rf"rank \d: {where}.weight is not finite"
        with pytest.raises(dcp_writer.NonFiniteTensorError, match=message):
            state = {"step": 2, "metrics": {}}
            checkpoint.save(tmp_path, content, state=state, loss=1.0)

    ranks(2, refused)
    assert [path.name for path in tmp_path.iterdir()] == names


def test_a_value_that_is_not_a_tensor_is_not_saved(ranks, tmp_path):
    def refused(world):
        with pytest.raises(ValueError, match=r"optimizer.lr is not a tensor"):
            content = {"optimizer": {"lr": 0.1}}
            checkpoint.save(tmp_path, content, state={"step": 2, "metrics": {}}, loss=1.0)

    ranks(2, refused)


def save_figures(world, root, figures):
    for step, metrics in enumerate(figures, start=1):
        state = {"step": step, "metrics": metrics}
        checkpoint.save(root, tensors(float(step)), state=state, loss=1.0)


@pytest.mark.parametrize(
    ("metric", "order"),
    [("+top1", [4, 2, 1, 3, 5]), ("-val_loss", [3, 1, 4, 2, 5]), (None, [5, 4, 3, 2, 1])],
)
def test_resume_takes_the_best_complete_one_of_a_figure(ranks, tmp_path, metric, order):
    """Of equals the newest; one without the figure comes last; a damaged one is passed over."""
    figures = [(20.0, 0.3), (30.0, 0.9), (10.0, 0.2), (30.0, 0.4)]
    metrics = [{"top1": top1, "val_loss": loss} for top1, loss in figures]
    ranks(1, save_figures, tmp_path, [*metrics, {"loss": 0.1}])
    for step in order:
        found, _ = ranks(1, lambda world: checkpoint.find_newest(tmp_path, metric=metric))[0]
        assert found.step == step
        damage_bytes(found.folder / "__0_0.distcp")


def test_what_is_on_disk_is_compared_with_what_was_written(ranks, tmp_path):
    """The last look before the commit: the writers' word is not taken for it."""
    real = dcp_writer.commit

    def cut_and_commit(target, metadata, written):
        os.truncate(target.staging / "__0_0.distcp", 100)
        return real(target, metadata, written)

    def refused(world):
        dcp_writer.commit = cut_and_commit
        with pytest.raises(OSError, match=r"__0_0.distcp has 100 bytes, written were \d{4}"):
            save(tmp_path, 1, 1.0)

    ranks(2, refused)
    assert list(tmp_path.iterdir()) == []


def test_the_digests_are_of_what_was_meant_not_of_what_is_on_disk(ranks, tmp_path):
    real = dcp_writer.commit

    def damage_and_commit(target, metadata, written):
        damage_bytes(target.staging / "__0_0.distcp")
        return real(target, metadata, written)

    def save_damaged(world):
        dcp_writer.commit = damage_and_commit
        return save(tmp_path, 1, 1.0)

    folder = ranks(1, save_damaged)[0]
    with pytest.raises(ValueError, match=r"__0_0.distcp sha256 \w{8} != manifest \w{8}"):
        verify.verify(folder)


def test_ranks_whose_tensors_differ_from_the_checkpoint_all_stop(ranks, tmp_path):
    """The difference is in a tensor of one rank: the others must not go on and wait for it."""
    ranks(1, save_steps, tmp_path, [1])

    def refused(world):
        found, _ = checkpoint.find_newest(tmp_path)
        wanted = tensors(0.0)
        if world.rank == 1:
            wanted["model"]["weight"] = torch.zeros(4, 3, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"1 differences: .*the model has .*float64"):
            checkpoint.load(found, wanted)

    ranks(2, refused)


def fail_at(call: str, nth: int) -> None:
    """Let call number `nth` of os.`call` fail, as a disk that is about to die."""
    real, calls = getattr(os, call), []

    def fail_once(*arguments, **options):
        calls.append(1)
        if len(calls) == nth:
            raise OSError(5, "Input/output error")
        return real(*arguments, **options)

    setattr(os, call, fail_once)


CALLS = {"mkdir": 1, "fsync": 5, "rename": 2, "open": 3}


@pytest.mark.parametrize(
    ("call", "nth"), [(c, n + 1) for c, top in CALLS.items() for n in range(top)]
)
def test_an_error_of_any_call_is_an_error_of_the_save(ranks, tmp_path, call, nth):
    def failing(world):
        save(tmp_path, 1, 1.0)
        fail_at(call, nth)
        with pytest.raises(OSError, match="Input/output error"):
            save(tmp_path, 2, 2.0)
        return [path.name for path in tmp_path.iterdir()]

    assert ranks(1, failing)[0] == ["step_1_loss_1.500"]
    ranks(1, save_steps, tmp_path, [3])
    assert ranks(1, newest, tmp_path)[0] == (3, [], [3.0])


def test_the_size_of_a_checkpoint_is_that_of_all_ranks_tensors(ranks):
    def size(world):
        own = {f"of_rank_{world.rank}": torch.zeros(10, dtype=torch.bfloat16)}
        return dcp_writer.num_bytes({"model": {"shared": torch.zeros(100)}, "optimizer": own})

    assert ranks(2, size) == [440, 440]
