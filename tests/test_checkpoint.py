"""Saving whole or not at all, finding the newest complete checkpoint, loading strictly."""

import json
import os
import shutil

import pytest
import torch

import checkpoint


def tensors(value: float, **extra) -> dict:
    return {"model": {"weight": torch.full((4, 3), value), **extra}}


def save(root, step, value, loss=1.5):
    return checkpoint.save(
        root, tensors(value), state={"step": step, "metrics": {"loss": loss}}, loss=loss
    )


def save_steps(world, root, steps):
    return [save(root, step, float(step)).name for step in steps]


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
        ({"step": "7"}, r"step=7: must be a int"),
        ({"metrics": None}, r"metrics=None: must be a dict"),
    ):
        state = {"schema_version": 1, "step": 1, "metrics": {}} | change
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"]["sha256"] = checkpoint._sha256(folder / "state.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=message):
            checkpoint.verify(folder)


def test_folders_that_only_look_like_checkpoints_are_ignored(ranks, tmp_path):
    folder = tmp_path / ranks(1, save_steps, tmp_path, [1])[0][0]
    for name in ("old_step_9_loss_1.0", "step_9", "step_9_loss_1.000.bak", ".staging-9-abc"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "step_8_loss_1.000").symlink_to(folder)
    assert ranks(1, newest, tmp_path)[0] == (1, [], [1.0])


def test_an_interrupted_save_leaves_the_previous_checkpoint(ranks, tmp_path):
    ranks(1, save_steps, tmp_path, [1])

    def die_before_the_rename(world):
        checkpoint._commit = lambda staging, target: os._exit(9)
        save(tmp_path, 2, 2.0)

    with pytest.raises(pytest.fail.Exception, match="died"):
        ranks(1, die_before_the_rename)
    assert len(list(tmp_path.glob(".staging-*"))) == 1
    assert ranks(1, newest, tmp_path)[0] == (1, [], [1.0])
    newest_folder = tmp_path / "step_1_loss_1.500"
    checkpoint.sweep(tmp_path, newest_folder, keep_last=1, rejected=())
    assert [path.name for path in tmp_path.iterdir()] == ["step_1_loss_1.500"]


def test_a_failed_commit_is_an_error_on_every_rank(ranks, tmp_path):
    def refuse(staging, target):
        raise OSError(28, "No space left on device", str(target))

    def failing(world):
        checkpoint._commit = refuse
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, 2.0)

    ranks(2, failing)


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


def save_losses(world, root, losses):
    for step, (loss, val_loss) in enumerate(losses, start=1):
        metrics = {"loss": loss} | ({} if val_loss is None else {"val_loss": val_loss})
        state = {"step": step, "metrics": metrics}
        checkpoint.save(root, tensors(0.0), state=state, loss=val_loss or loss)


def test_sweep_keeps_the_newest_and_the_best_validated_one(ranks, tmp_path):
    # Step 2 has the lowest loss of all, but it is a training loss.
    losses = [(0.9, 0.5), (0.1, None), (0.9, 0.9), (0.9, 0.8), (0.9, 0.7)]
    ranks(1, save_losses, tmp_path, losses)
    newest_folder = tmp_path / "step_5_loss_0.700"
    deleted = checkpoint.sweep(tmp_path, newest_folder, keep_last=2, rejected=())
    assert sorted(path.name for path in deleted) == ["step_2_loss_0.100", "step_3_loss_0.900"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step_1_loss_0.500", "step_4_loss_0.800", "step_5_loss_0.700"]


def test_sweep_neither_counts_nor_deletes_rejected_ones_and_never_what_was_just_saved(
    ranks, tmp_path
):
    ranks(1, save_losses, tmp_path, [(0.9, 0.9)] * 5)
    folders = sorted(tmp_path.iterdir())
    rejected, newest_folder = folders[3:], folders[2]
    deleted = checkpoint.sweep(tmp_path, newest_folder, keep_last=1, rejected=rejected)
    assert deleted == [folders[1], folders[0]], "of equals the newest is the best"
    assert newest_folder.is_dir()
    assert all(path.is_dir() for path in rejected)


def test_data_files_are_written_by_one_thread(ranks, tmp_path, monkeypatch):
    """With more, DCP reports a full disk as success (pytorch/pytorch#191391)."""
    seen = []
    real = checkpoint.FileSystemWriter

    def noted(*args, **kwargs):
        seen.append(kwargs)
        return real(*args, **kwargs)

    def watched(world):
        checkpoint.FileSystemWriter = noted
        save(tmp_path, 1, 0.0)
        return seen

    assert ranks(1, watched)[0] == [{"thread_count": 1, "sync_files": True}]


def test_a_rank_that_cannot_write_is_an_error_of_one_line_on_every_rank(ranks, tmp_path):
    real = checkpoint.FileSystemWriter

    class Full(real):
        def write_data(self, plan, planner):
            raise OSError(28, "No space left on device")

    def failing(world):
        if world.rank == 1:
            checkpoint.FileSystemWriter = Full
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
