"""A run folder with links, pipes and files that lie: nothing outside changes, nothing hangs."""

import errno
import fcntl
import json
import os
import time

import pytest

import checkpoint
import train
from options import compose
from tests.support import faults
from training import run_folder
from weights import dcp_writer, verify
from weights.files import write_text

HUGE = "9" * 400
DEEP = '{"a": ' * 900 + "1" + "}" * 900
THEIRS = "somebody's thesis"


@pytest.fixture
def theirs(tmp_path):
    """A file outside of the run folder."""
    path = tmp_path / "theirs.txt"
    path.write_text(THEIRS)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


def save(world, root, steps):
    for step in steps:
        state = {"step": step, "metrics": {"val_loss": 1.0}}
        checkpoint.save(root, faults.tensors(float(step)), state=state, loss=1.0)


def put_special(path, kind, theirs):
    if kind == "link":
        path.symlink_to(theirs)
    elif kind == "hard link":
        path.hardlink_to(theirs)
    elif kind == "dangling link":
        path.symlink_to(theirs.with_name("new"))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe", "folder"])
def test_a_lock_that_is_not_our_file_is_refused_and_its_target_stays(folder, theirs, kind):
    put_special(folder / ".lock", kind, theirs)
    with pytest.raises(OSError, match=r"^file .*/run/\.lock: "):
        run_folder._try_lock(folder)
    assert theirs.read_text() == THEIRS
    assert sorted(path.name for path in folder.parent.iterdir()) == ["run", "theirs.txt"]


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe"])
def test_a_file_written_anew_replaces_a_link_and_not_its_target(folder, theirs, kind):
    put_special(folder / "config.yaml", kind, theirs)
    write_text(folder / "config.yaml", "ours\n")
    assert theirs.read_text() == THEIRS
    assert not (folder / "config.yaml").is_symlink()
    assert (folder / "config.yaml").read_text() == "ours\n"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(folder, theirs):
    (folder / "config.yaml").symlink_to(theirs.parent)
    write_text(folder / "config.yaml", "ours\n")
    assert (folder / "config.yaml").read_text() == "ours\n"
    assert theirs.read_text() == THEIRS
    assert len(list(folder.iterdir())) == 1


def test_a_folder_is_not_deleted_for_a_file(folder):
    (folder / "results").mkdir()
    (folder / "results/a").write_text("kept")
    with pytest.raises(IsADirectoryError, match="results: is a folder"):
        write_text(folder / "results", "{}")
    assert (folder / "results/a").read_text() == "kept"
    assert len(list(folder.iterdir())) == 1


def to_zeros(path):
    path.symlink_to("/dev/zero")


def sparse(path):
    path.touch()
    os.truncate(path, 1 << 40)


STATES = {
    "a link to /dev/zero": (to_zeros, "Too many levels of symbolic links"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a terabyte": (sparse, "1099511627776 bytes, at most"),
    "deep": (lambda path: path.write_text(DEEP), "more than 32 levels"),
    "deeper than the stack": (lambda path: path.write_text("[" * 10**6), "not JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not JSON"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_folder_named_like_a_checkpoint_does_not_stop_a_good_save(ranks, tmp_path, kind):
    make, message = STATES[kind]
    ranks(1, save, tmp_path, [2, 3])
    bad = tmp_path / "step_1_loss_1.000"
    bad.mkdir()
    make(bad / "state.json")
    started = time.monotonic()
    assert verify.score(bad, "-val_loss") == -float("inf")
    with pytest.raises((OSError, ValueError), match=message):
        verify._read_json(bad / "state.json")
    known = frozenset(tmp_path.glob("step_[23]*"))
    options = {"keep_last": 1, "keep_best": 1, "metric": "-val_loss"}
    keep = run_folder.Retention(known=known, protected=frozenset(), **options)
    assert keep.surplus(tmp_path) == [tmp_path / "step_2_loss_1.000", bad]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("figure", [HUGE, f"-{HUGE}", "1e999", "NaN", "true", '"1"', "[1]"])
def test_a_figure_that_is_no_number_is_no_score(tmp_path, figure):
    (tmp_path / "state.json").write_text(f'{{"metrics": {{"top1": {figure}}}}}')
    assert verify.score(tmp_path, "+val_top1") == -float("inf")


def test_a_link_named_like_a_checkpoint_has_no_score_and_is_never_deleted(tmp_path, folder, ranks):
    ranks(1, save, folder, [2, 3])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/state.json").write_text('{"metrics": {"val_loss": 0.1}}')
    link = folder / "step_1_loss_1.000"
    link.symlink_to(tmp_path / "elsewhere")
    assert verify.score(link, "-val_loss") == -float("inf")
    known = frozenset(folder.glob("step_3*"))
    options = {"keep_last": 1, "keep_best": 0, "metric": "-val_loss"}
    keep = run_folder.Retention(known=known, protected=frozenset(), **options)
    assert keep.sweep(folder) == {}
    assert {path.name for path in folder.iterdir()} == {"step_1_loss_1.000", "step_3_loss_1.000"}
    assert (tmp_path / "elsewhere/state.json").exists()


def rewrite(folder, state):
    """Put a state into a checkpoint, with the manifest that fits."""
    (folder / "state.json").write_text(state)
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = {"bytes": len(state), "sha256": dcp_writer.sha256(folder / "state.json")}
    manifest["files"]["state.json"] = facts
    (folder / "manifest.json").write_bytes(dcp_writer.encode(manifest))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (f'"step": {HUGE}, "metrics": {{}}', r"step=9+: must be a number from 0 to 2\^63 - 1"),
        (f'"step": 1, "metrics": {{"loss": {HUGE}}}', "metrics loss=9+: must be a finite number"),
        (f'"step": 1, "metrics": {{}}, "config": {DEEP}', "has more than 32 levels"),
    ],
    ids=["step", "figure", "depth"],
)
def test_a_state_that_cannot_be_is_one_line(ranks, tmp_path, fields, message):
    ranks(1, save, tmp_path, [1])
    folder = tmp_path / "step_1_loss_1.000"
    rewrite(folder, f'{{"schema_version": 1, {fields}}}')
    found, rejected = verify.first_whole([folder])
    assert found is None
    with pytest.raises(ValueError, match=f"^checkpoint step_1_loss_1.000: state.json {message}"):
        raise ValueError(rejected[folder])


def test_a_deep_manifest_is_one_line(ranks, tmp_path):
    ranks(1, save, tmp_path, [1])
    folder = tmp_path / "step_1_loss_1.000"
    (folder / "manifest.json").write_text(f'{{"schema_version": 1, "files": {{}}, "x": {DEEP}}}')
    with pytest.raises(ValueError, match=r"manifest\.json has more than 32 levels"):
        verify.verify(folder)


def test_what_a_kill_left_of_a_file_is_swept_and_names_of_users_are_not(folder, theirs):
    token = "0123456789abcdef" * 2
    litter = [f".config.yaml.partial-{token}", f".versions.json.partial-{token}"]
    for name in [*litter, "notes.partial-1", f"my.partial-{token}"]:
        (folder / name).write_text("")
    (folder / f".trash-{token}").symlink_to(theirs.parent)
    options = {"keep_last": 1, "keep_best": 0, "metric": "-val_loss"}
    keep = run_folder.Retention(known=frozenset(), protected=frozenset(), **options)
    assert keep.sweep(folder) == {}
    assert sorted(path.name for path in folder.iterdir()) == [
        f"my.partial-{token}",
        "notes.partial-1",
    ]
    assert theirs.read_text() == THEIRS


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_run_folder_is_refused(path):
    with pytest.raises(ValueError, match=r"training\.checkpoint\.path=.*must be a folder"):
        compose.compose("vit_moe_tiny_patch8_64", [f"training.checkpoint.path='{path}'"])


@pytest.mark.parametrize("inside", ["train", "train/run", "val/a/b/run", "link/run"])
def test_a_run_folder_inside_a_split_is_refused_and_leaves_nothing(
    ranks, small_run, image_folder, tmp_path, inside
):
    (tmp_path / "link").symlink_to(image_folder / "train")
    root = tmp_path if inside.startswith("link") else image_folder
    config = small_run(f"training.checkpoint.path={root / inside}")
    before = set(image_folder.rglob("*"))

    def refused(world):
        with pytest.raises(ValueError, match=r"path=.*: is inside the images of .*; use a folder"):
            train.train(config, world)

    ranks(1, refused)
    made = set(image_folder.rglob("*")) - before
    assert [path for path in made if not path.name.startswith(".moevit-index")] == []


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks_needs_an_option_which_the_error_names(
    ranks, tmp_path, monkeypatch
):
    monkeypatch.setattr(fcntl, "lockf", no_locks)

    def take(world):
        says = r"No locks available \(on a file system without locks: training\.checkpoint\.lock=f"
        with pytest.raises(OSError, match=says), run_folder.locked(tmp_path / "run"):
            pass
        with run_folder.locked(tmp_path / "run", lock=False):
            return sorted(path.name for path in (tmp_path / "run").iterdir())

    assert ranks(2, take) == [[], []]


def test_a_mount_where_every_file_is_0777_needs_an_option_which_the_error_names(ranks, tmp_path):
    def probe(world):
        os.umask(0)
        says = r"\(mode 0777\).* training\.checkpoint\.any_mode=true\)"
        with pytest.raises(OSError, match=says):
            run_folder.check_writable(tmp_path, 1000)
        run_folder.check_writable(tmp_path, 1000, any_mode=True)
        save(world, tmp_path, [1])
        with pytest.raises(ValueError, match="can be written by every user"):
            checkpoint.find_newest(tmp_path)
        return checkpoint.find_newest(tmp_path, any_mode=True)[0].step

    assert ranks(2, probe) == [1, 1]


def test_a_run_on_a_mount_without_modes_and_locks_resumes(ranks, small_run, tmp_path, monkeypatch):
    """The options reach what they are for, from train.py's door on."""
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    options = ["training.checkpoint.lock=false", "training.checkpoint.any_mode=true"]

    def run(world):
        os.umask(0)
        for steps in (1, 2):
            train.train(small_run(*options, f"training.steps={steps}"), world)

    ranks(1, run)
    folders = verify.candidates(next(tmp_path.rglob("config.yaml")).parent)
    assert [verify.verify(path, any_mode=True).step for path in folders] == [2, 1]
