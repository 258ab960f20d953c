"""The benchmarks as commands: what they measure is checked first, kept when a run ends early, and
stands in the tables; the GPU's run dry on a CPU."""

import functools
import json
import math
import multiprocessing
import re
import runpy
import shlex
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    checkpoint_save,
    clock,
    common,
    fed,
    launch,
    loader,
    loader_recipes,
    optimizer,
    run,
    scaling,
    step_cases,
    step_gpu,
    steps,
    tables,
    train_step,
)
from benchmarks.clock import interleave, wall_clock
from benchmarks.step_cases import GROUPS, Group, Made, Setting
from layers import compile as block_compile
from tests.support.processes import TIMEOUT_S

CPU = torch.device("cpu")
COMMITTED = tables.read_parts(tables.RESULTS)
HEAD = {"benchmark", "date", "commit", "device", "versions"}
TINY = list(run.TINY)


def in_child(fn, *args):
    """Run in a forked process: process groups and compilers leave nothing behind in this one."""
    process = multiprocessing.get_context("fork").Process(target=fn, args=args)
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "part",
    [fed, loader, optimizer, run, scaling, step_gpu, train_step],
    ids=lambda part: part.__name__,
)
def test_an_unknown_flag_of_a_benchmark_is_one_line(part, capsys):
    with pytest.raises(SystemExit) as end:
        part.main(["--bogus"])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("error: ")


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_of_a_document_are_those_of_the_results(path):
    text = path.read_text()
    assert tables.render(text, COMMITTED) == text, "type: python -m benchmarks.tables"


def test_the_documents_have_every_table_once():
    texts = [path.read_text() for path in tables.DOCUMENTS]
    names = [found["name"] for text in texts for found in tables.MARKS.finditer(text)]
    assert sorted(names) == sorted(tables.TABLES)


@pytest.mark.parametrize("part", COMMITTED, ids=lambda part: f"{part['date']} {part['benchmark']}")
def test_a_committed_result_says_how_it_came_about(part):
    assert set(part) >= HEAD
    assert part.get("rows") or part.get("cases")


def test_no_committed_result_is_of_a_dry_run():
    files = [json.loads(path.read_text()) for path in tables.RESULTS.glob("*.json")]
    assert not [part for part in files if tables.is_dry(part)]


def test_a_table_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"table steps: no such table .*scaling"):
        tables.render("<!-- table: steps -->\nx\n<!-- end -->\n", [])


@pytest.mark.parametrize("name", tables.TABLES)
def test_without_results_a_table_says_so(name):
    lines = tables.TABLES[name]([]).splitlines()
    assert tables.NOT_MEASURED in lines[-1]
    assert len({line.count("|") for line in lines}) == 1


def scaling_part(date, rate, **more):
    head = {"benchmark": "scaling", "date": date, "commit": "abc", "device": "cpu", "versions": {}}
    row = {"config": "c", "loop": "2 ranks", "rounds": 3, "images_per_s": rate, "of_ideal": 0.9}
    return {**head, "rows": [row], **more}


def test_the_newest_result_that_is_no_dry_run_makes_the_table(tmp_path):
    new = scaling_part("2026-01-03T10:00:00+00:00", 30)
    several = {key: new.pop(key) for key in ("date", "commit", "device", "versions")}
    several |= {"benchmark": "cpu", "parts": {"scaling": new}, "faults": {}}
    dry = scaling_part("2026-01-04", 40, is_dry=True)
    files = {"b": scaling_part("2026-01-02", 20), "a": several, "c": dry}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    made = tables.TABLES["scaling"](tables.read_parts(tmp_path))
    assert "| c: 2 ranks | 3 | 30 | 0.9 |" in made
    assert "2026-01-03, commit abc; cpu;" in made


def step_part(date, group, rate, **more):
    row = {"group": group, "loop": "moevit", "batch": 8, "images_per_s": rate, **more}
    head = {"benchmark": "step_gpu", "date": date, "commit": "abc", "device": "H", "versions": {}}
    return {**head, "rows": [row]}


def test_each_groups_newest_run_and_each_loops_best_batch_stand_in_the_table():
    parts = [
        step_part("1", "dense B16 b1", 900),
        step_part("2", "dense B16 b1", 100),
        step_part("3", "dense B16 b2", 200),
        step_part("4", "experts B16 b2", 300),
    ]
    made = tables.TABLES["dense steps"](parts)
    assert "| B16 | moevit | 8 | 200 |" in made
    assert not [rate for rate in ("900", "| 100", "300") if rate in made]


def test_what_does_not_work_stands_in_the_table_with_its_reason():
    part = step_part("1", "dense B16 b1", 0, reason="ImportError: no TE") | {"cut": ["sdpa S16 b1"]}
    made = tables.TABLES["dense steps"]([part])
    assert "moevit: ImportError: no TE" in made
    assert "no time for: sdpa S16 b1." in made


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run.choose("cpu", ["lauch"]), "--parts lauch: .*train_step.*launch"),
        (lambda: step_gpu.main(["--dry", "--match", "B17"]), "--match B17: .*experts S16 b2"),
        (lambda: step_gpu.main(["--dry", "--contenders", "x"]), "--contenders x: .*moevit"),
    ],
)
def test_a_wrong_name_is_refused_with_those_that_there_are(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_gpu_only_a_dry_run_starts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part in (step_gpu, fed):
        with pytest.raises(ValueError, match="no CUDA device: --dry"):
            part.main([])


def test_make_passes_options_on():
    for target, kind in (("bench", "cpu"), ("bench-gpu", "gpu")):
        command = ["make", "-n", target, "ARGS=--dry"]
        done = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=True)
        assert f"benchmarks.run {kind} --dry" in done.stdout


def test_every_part_is_a_program_that_knows_its_arguments():
    for part in {part for parts in run.PARTS.values() for part in parts}:
        text = (run.ROOT / "benchmarks" / f"{part.module}.py").read_text()
        names = [word for word in (*part.arguments, *part.dry, "--out") if word.startswith("--")]
        names += ["--limit-s"]
        assert not [name for name in names if f'"{name}"' not in text]


def test_the_commands_of_the_documents_name_what_there_is():
    text = "".join(path.read_text() for path in tables.DOCUMENTS)
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    words = [shlex.split(line) for line in lines]
    programs = {"benchmarks.run": run.parse, "benchmarks.step_gpu": step_gpu.parse}
    found = [(w[2], programs[w[2]](w[3:])) for w in words if w[0] == "python" and w[2] in programs]
    kinds = {"bench": "cpu", "bench-gpu": "gpu"}
    for word in words:
        if word[0] == "make":
            given = shlex.split(word[2].removeprefix("ARGS=")) if word[2:] else []
            found.append(("benchmarks.run", run.parse([kinds[word[1]], *given])))
    assert len(found) > 6
    for program, options in found:
        step_gpu.choose(options.match or "", step_gpu.all_groups(is_dry=False))
        if program == "benchmarks.run":
            run.choose(options.kind, options.parts)


PROGRAM = """
import json, pathlib, sys, time
result = dict(benchmark="x", date="2026-01-01", commit="abc", device="cpu", versions={}, rows=[1])
pathlib.Path(sys.argv[1]).write_text(json.dumps(result))
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def test_a_part_past_its_time_is_ended_and_keeps_what_it_wrote(tmp_path, monkeypatch, capsys):
    arguments = {"fine": ("0", "0"), "wrong": ("0", "3"), "late": ("600", "0")}
    parts = tuple(run.Part(name, name, 1) for name in arguments)
    monkeypatch.setitem(run.PARTS, "cpu", parts)

    def command(part, *, out, **_):
        return [sys.executable, "-c", PROGRAM, str(out), *arguments[part.name]]

    monkeypatch.setattr(run, "command", command)
    out = tmp_path / "result.json"
    assert run.main(["cpu", "--dry", "--limit-s", "9", "--out", str(out)]) == 1, "one is wrong"
    result = json.loads(out.read_text())
    assert set(result["parts"]) == set(arguments)
    assert result["commit"] == "abc"
    assert "commit" not in result["parts"]["fine"], "what all share stands once"
    assert result["faults"] == {"wrong": "exit code 3"}
    assert re.fullmatch(r"ended after its \d s, with 1 rows written", result["unfinished"]["late"])
    assert result["parts"]["late"]["fault"] == result["unfinished"]["late"]
    assert "late: ended after its" in capsys.readouterr().err


def test_a_run_never_writes_over_another(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    first = run.free_path("NVIDIA H200", date="2026-01-01")
    first.write_text("")
    second = run.free_path("NVIDIA H200", date="2026-01-01")
    assert (first.name, second.name) == (
        "2026-01-01-nvidia-h200.json",
        "2026-01-01-nvidia-h200-2.json",
    )
    assert run.free_path("cpu, 2 threads", date="2026-01-01").name == "2026-01-01-cpu.json"


def test_without_time_there_is_one_round_after_one_that_warms_up():
    calls = []
    times = interleave({"a": lambda: calls.append("a")}, wall_clock, repeats=50, end_s=0)
    assert (len(times["a"]), len(calls)) == (1, 2)
    assert set(common.summarise(times, rival="a")[0]) == {"loop", "median_ms", "ratio"}


def test_rounds_end_with_the_time(monkeypatch):
    seconds = iter([1, 2, 3, 9, 10, 11])
    monkeypatch.setattr(clock.time, "monotonic", lambda: next(seconds))
    assert list(clock.rounds(50, warm_up=2, end_s=10)) == [False, False, True, True, True]
    seconds = iter([1, 12, 13])
    assert list(clock.rounds(50, warm_up=2, end_s=10)) == [False, True]
    seconds = iter(range(9))
    assert list(clock.rounds(2, warm_up=1, end_s=100)) == [False, True, True]


def test_the_time_of_a_part_begins_with_its_process():
    program = "import time; time.sleep(0.5); from benchmarks import clock; print({})"
    shown = program.format("clock.process_age_s(), clock.end_of(100) - time.monotonic()")
    started = time.monotonic()
    words = [sys.executable, "-c", shown]
    done = subprocess.run(words, cwd=run.ROOT, capture_output=True, text=True, check=True)
    age_s, left_s = map(float, done.stdout.split())
    assert 0.4 < age_s < time.monotonic() - started + 0.1
    assert left_s == pytest.approx(100 - age_s, abs=1)


def test_a_part_without_a_row_when_its_time_is_up_is_said_and_is_no_failure(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(run.PARTS, "cpu", (run.Part("slow", "slow", 1),))
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(run, "command", lambda *_, **__: words)
    out = tmp_path / "result.json"
    assert run.main(["cpu", "--dry", "--limit-s", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["unfinished"] == {
        "slow": "ended after its 1 s, with 0 rows written"
    }
    assert "slow: ended after its 1 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit_s", "expected"),
    [
        (math.inf, (640, 8)),
        # An image: 0.02 s to make, twice 0.01 (4 x 8 + 14) s to measure: 0.94 s.
        (640 * 0.94 + 0.1, (640, 8)),
        (128 * 0.94 + 0.1, (128, 8)),
        # With 2 epochs 0.02 + 0.02 (4 x 2 + 14) = 0.46 s; with 3 it would be 0.54 s.
        (128 * 0.46 + 0.1, (128, 2)),
        (1, (64, 1)),
        (-1, (64, 1)),
    ],
)
def test_on_a_slow_day_the_loader_has_fewer_images_then_shorter_passes(limit_s, expected):
    found = loader.fitting(640, 8, make_s=0.02, image_s=0.01, limit_s=limit_s)
    assert found == expected


def dry_steps(out):
    # In place of inductor, whose compiler takes a minute; dynamo and its graphs are the real ones.
    blocks = functools.partial(block_compile.compile_blocks, backend="eager")
    block_compile.compile_blocks = blocks
    torch.compile = functools.partial(torch.compile, backend="eager")
    step_gpu.main(["--dry", "--repeats", "2", "--out", str(out)])


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    out = tmp_path_factory.mktemp("dry") / "steps.json"
    in_child(dry_steps, out)
    return json.loads(out.read_text())


def test_a_dry_run_has_a_row_for_every_contender(dry):
    expected = {
        (Group(*place).label, name) for place in step_cases.DRY_GRID for name in GROUPS[place[0]]
    }
    assert {(row["group"], row["loop"]) for row in dry["rows"]} == expected
    assert len(dry["rows"]) == len(expected)
    assert set(dry) >= HEAD | {"cut", "peak", "unavailable", "dtype"}
    assert (dry["is_dry"], dry["cut"]) == (True, [])


def test_only_what_needs_a_gpu_fails_in_a_dry_run(dry):
    failed = {row["loop"]: row["reason"] for row in dry["rows"] if row["status"] == "error"}
    assert set(failed) == {"moevit, TE bf16", "moevit, TE fp8", "moevit, sdpa cudnn"}
    assert "TransformerEngine needs CUDA" in failed["moevit, TE fp8"]


def test_rows_have_times_floors_and_ratios(dry):
    for row in dry["rows"]:
        if row["status"] == "ok":
            assert row["median_ms"] > 0
            assert row["floor_ms"] > 0
            assert row["images_per_s"] == pytest.approx(2000 / row["median_ms"], rel=0.01)
            assert row["rival"] in GROUPS[row["group"].split()[0]]
            assert row["ratio"] == 1 or row["rival"] != row["loop"]
    rivals = {row["loop"]: row["rival"] for row in dry["rows"] if row["group"] == "experts S16 b2"}
    assert rivals["experts"] == "moevit"
    assert rivals["experts, compiled"] == "moevit, compiled"
    assert rivals["experts, python loop"] == "experts"


def test_experts_have_the_active_flops_of_the_dense_network(dry):
    floors = {row["loop"]: row["floor_ms"] for row in dry["rows"] if "experts S16" in row["group"]}
    assert 1 < floors["experts"] / floors["moevit"] < 1.02, "the router is what they have more"
    assert floors["experts, python loop"] == floors["experts"]


def setting():
    world = SimpleNamespace(device=CPU)
    return Setting(world, torch.float32, None, num_classes=3, is_dry=True)


def made(*losses):
    values = iter([*losses, *[losses[-1]] * 100])
    return lambda group, setting: Made(lambda: torch.tensor(next(values)), 1000)


def test_a_contender_with_another_loss_is_an_error_row(monkeypatch):
    def failing(group, setting):
        raise RuntimeError("no kernel\nfor this")

    makers = {"a": made(1.0), "b": made(1.001), "c": made(float("nan")), "d": failing}
    makers["experts"] = made(2.0)
    monkeypatch.setattr(step_cases, "makers", lambda: makers)
    ready, failed = step_gpu.prepare(Group("dense", "S16", 2), list(makers), setting())
    assert set(ready) == {"a", "experts"}
    assert [row["loop"] for row in failed] == ["b", "c", "d"]
    assert "first loss 1.001 is not the 1" in failed[0]["reason"]
    assert failed[2]["reason"] == "RuntimeError: no kernel"


def test_groups_without_time_are_listed_and_the_others_kept(monkeypatch, tmp_path):
    out = tmp_path / "result.json"
    clock = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(step_gpu, "measure", lambda group, *_, **__: [{"group": group.label}])
    monkeypatch.setattr(step_gpu.time, "monotonic", lambda: next(clock))
    options = step_gpu.parse(["--dry", "--limit-s", "10", "--out", str(out)])
    groups = [Group("dense", "S16", 2), Group("dense", "B16", 2), Group("sdpa", "B16", 2)]
    step_gpu.run_groups(options, groups, setting())
    result = json.loads(out.read_text())
    assert [row["group"] for row in result["rows"]] == ["dense S16 b2"]
    assert result["cut"] == ["dense B16 b2", "sdpa B16 b2"]


def profiled(out):
    match = ["--match", "wrapper", "--contenders", "ours, plain"]
    step_gpu.main(["--dry", "--profile", *match, "--out", str(out)])


def test_a_profile_lists_kernels_by_their_time(tmp_path):
    in_child(profiled, tmp_path / "profile.json")
    result = json.loads((tmp_path / "profile.json").read_text())
    shares = [row["share"] for row in result["rows"]]
    assert result["benchmark"] == "profile"
    assert len(shares) == step_gpu.KERNELS_SHOWN
    assert shares == sorted(shares, reverse=True)
    assert any("mm" in row["kernel"] for row in result["rows"])


def cpu_parts(folder):
    out = lambda name: ["--out", str(folder / f"{name}.json")]  # noqa: E731
    train_step.main(
        ["--batches", "2", "--repeats", "2", "--threads", "1", *TINY, *out("train_step")]
    )
    optimizer.main(["--repeats", "2", "--streamed-bytes", "1000000", *TINY, *out("optimizer")])


def test_parts_write_what_the_tables_need(tmp_path):
    in_child(cpu_parts, tmp_path)
    parts = tables.read_parts(tmp_path)
    made = {name: tables.TABLES[name](parts) for name in ("train_step", "optimizer")}
    rows = [line for text in made.values() for line in text.splitlines() if line.startswith("| ")]
    loops = ["plain timm", "plain timm, default", "ours, plain", "ours, FSDP2", "moevit"]
    updates = [*optimizer.WAYS, optimizer.OURS]
    starts = ["loop", *(f"batch 2: {loop}" for loop in loops), "update", *updates]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == starts
    assert not [row for row in rows if "|  |" in row], "no cell is empty"


def loaders(folder):
    for part in (loader, loader_recipes):
        out = str(folder / f"{part.__name__}.json")
        limit = ["--limit-s", "0.1"] if part is loader else []
        part.main(["--images", "72", "--epochs", "2", "--rounds", "2", "--out", out, *limit])


def test_loaders_write_what_their_tables_need(tmp_path):
    in_child(loaders, tmp_path)
    parts = tables.read_parts(tmp_path)
    made = {name: tables.TABLES[name](parts) for name in ("loader", "loader recipes")}
    rows = {
        name: [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
        for name, text in made.items()
    }
    assert {"| torchvision", "| torchvision, tensors"} < {row[0] for row in rows["loader"]}
    cut = "no time for: 8 of 72 images, 1 of 2 epochs, 1 of 2 rounds."
    assert cut in made["loader"]
    assert [row[0] for row in rows["loader recipes"]] == [
        f"| {side}, {recipe}" for recipe in loader_recipes.RECIPES for side in ("timm", "moevit")
    ]
    assert all("" not in row for row in rows["loader recipes"]), "no cell is empty"


def as_program(words):
    assert words[1] == "-m"
    sys.argv = words[2:]
    runpy.run_module(words[2], run_name="__main__", alter_sys=True)


@pytest.mark.slow
def test_the_other_parts_for_a_gpu_run_dry_by_the_runner(tmp_path, monkeypatch):
    """All but step_gpu, which is above, and moe_gpu, which has a file of tests of its own.

    Each is run as `python -m` would run it, but forked from here, where torch is imported already.
    """
    monkeypatch.setattr(run, "finish", lambda words, **_: in_child(as_program, words))
    names = [part.name for part in run.PARTS["gpu"] if part.name not in ("step_gpu", "moe_gpu")]
    out = tmp_path / "gpu.json"
    assert run.main(["gpu", "--dry", "--parts", *names, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["parts"]) == names
    assert result["is_dry"]
    loops = {name: [row["loop"] for row in part["rows"]] for name, part in result["parts"].items()}
    assert loops["fed"] == [fed.SYNTHETIC, fed.ALONE, fed.FED]
    assert loops["optimizer"] == [*optimizer.WAYS, optimizer.OURS]
    assert {"moevit, background", "moevit, load"} < set(loops["checkpoint_save"])
    assert {"plain timm script", "train.py"} < set(loops["launch"])


def test_a_loop_with_another_loss_is_not_timed():
    steps_made = {train_step.RIVAL: lambda: torch.tensor(1.0), "b": lambda: torch.tensor(1.01)}
    with pytest.raises(ValueError, match=r"b: first loss 1\.01 is not the 1 of plain timm"):
        train_step.check(steps_made)
    assert steps.loss_fault(1.01, 1.0, dtype=torch.bfloat16) is None
    assert steps.loss_fault(float("nan"), 1.0, dtype=torch.bfloat16)


def test_ranks_that_compute_something_else_than_the_processes_apart_are_not_timed():
    scaling.check([1.0, 2.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"2 ranks, rank 1: first loss 2\.1"):
        scaling.check([1.0, 2.1, 1.0, 2.0])


def test_an_optimizer_that_computes_something_else_is_not_timed():
    weights = {"w": torch.ones(3)}
    ways = {optimizer.REFERENCE: (lambda: None, lambda: weights)}
    ways["b"] = (lambda: None, lambda: {"w": torch.ones(3) * 1.0001})
    with pytest.raises(ValueError, match=r"b: w is 1\.0e-04 off that of AdamW, loop"):
        optimizer.check(ways)


def test_a_load_that_does_not_bring_everything_back_is_not_timed():
    tensors = {"model": {"a": torch.ones(3), "b": torch.ones(2)}}
    checkpoint_save.check_load(
        lambda: [t.fill_(1) for t in tensors["model"].values()], tensors, name="x"
    )
    with pytest.raises(ValueError, match=r"x: model.b is not as it was saved"):
        checkpoint_save.check_load(lambda: tensors["model"]["a"].fill_(1), tensors, name="x")


def test_the_time_to_a_line_is_until_it_is_printed_and_the_process_is_ended():
    program = "import time; time.sleep(0.3); print('train step=1 x', flush=True); time.sleep(600)"
    assert 300 < launch.time_to_line([sys.executable, "-c", program], launch.FIRST_STEP) < 60_000
    with pytest.raises(ChildProcessError, match=r"ended before.*\n?.*no such option"):
        launch.time_to_line([sys.executable, "-c", "print('no such option')"], launch.FIRST_STEP)


def test_a_result_has_the_commit_and_whether_it_was_changed(tmp_path):
    common.write("x", out=tmp_path / "x.json", conditions={"rounds": 3}, rows=[{"loop": "a"}])
    result = json.loads((tmp_path / "x.json").read_text())
    assert set(result) == HEAD | {"is_dirty", "rounds", "rows"}
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["device"].startswith("cpu, ")
