"""An option is declared once: one line in options/schema.py, and all that a user meets follows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from options.schema import ROUTERS
from routers.gates import GATES

ROOT = Path(__file__).resolve().parents[1]
NEW_LINE = '    strength: float = option(0.5, "{meaning}", low=0, below=1)\n'
DECLARED = {"ViTOptions": "how strong the blocks are", "MoEOptions": "how strong the gate is"}
# What a user meets: the help, the table of docs/config.md, the check, and the modules' own options.
USED = """
import contextlib, io, sys
import train
from options import compose
from training import network

shown = io.StringIO()
with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
    train.parse(["--help"])
for section in ("vit", "moe"):
    name = f"model.{section}.strength"
    print(shown.getvalue().count(f"| `{name}` |"), compose.options_table().count(f"`{name}`"))
    try:
        compose.compose("vit_moe_tiny_patch8_64", [f"{name}=1"])
    except ValueError as error:
        print(error)
options = ["model.vit.strength=0.25", "model.moe.strength=0.75"]
config = compose.compose("vit_moe_tiny_patch8_64", options)
vit = network.build_model(config, backend="torch", on_meta=True)
router = vit.blocks[1].mlp.router
print(vit.options.strength, router.options.strength)
"""


def test_an_option_of_the_network_and_one_of_the_experts_take_one_line_each(tmp_path):
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py")]:
        if path.parent == ROOT:
            shutil.copy(path, tmp_path)
        elif path.parent.name not in ("tests", "benchmarks"):
            shutil.copytree(path.parent, tmp_path / path.parent.name)
    shutil.copytree(ROOT / "config", tmp_path / "config")
    schema = tmp_path / "options" / "schema.py"
    text = schema.read_text("utf-8")
    for name, meaning in DECLARED.items():
        begin = text.index("    ", text.index('"""\n\n', text.index(f"class {name}:")))
        text = text[:begin] + NEW_LINE.format(meaning=meaning) + text[begin:]
    assert len(text.splitlines()) == len(schema.read_text("utf-8").splitlines()) + len(DECLARED)
    schema.write_text(text, "utf-8")
    done = subprocess.run(
        [sys.executable, "-c", USED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 1",
        "config model.vit.strength=1.0: must be less than 1",
        "1 1",
        "config model.moe.strength=1.0: must be less than 1",
        "0.25 0.75",
    ]


def test_every_router_has_its_facts_and_its_class():
    assert ROUTERS.keys() == GATES.keys()
