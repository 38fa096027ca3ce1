"""The documentation says what is true: its commands parse, its paths and links exist, its snippets run."""

import fnmatch
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import config
import denoise
import hubconf
from support import checkpoint
from unet import UNet

README = ROOT / "README.md"
DOCS = [README, ROOT / "CONTRIBUTING.md", ROOT / "model" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train", "overfit", "visualize", "evaluate", "denoise")
OTHER_FLAGS = {"--help"}  # of every script
# What a reader or a run makes, and the scripts of version 1.
NOT_OURS = ("noisy.png", "clean.png", "new.pth", "*unet32_e*.pth", "*log.csv", ".images-*")
PATH = r"[\w./-]+\.(py|md|pth|png|ipynb|txt|cff|csv)|(support|docs|tests|benchmarks)/\S*"
by_name = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


def code(text):
    """The lines of code in Markdown: fenced, indented and inline, continued lines joined."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^    (.+)", text, re.M)
    inline = [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", text)]
    return [line for block in fenced for line in block.splitlines()] + indented + inline


def commands(text):
    """[(module, arguments)] of the lines that run a script of this repository."""
    found = []
    for line in code(text):
        match = re.match(
            r"(?:\w+=\S+ )?(?:python|torchrun(?: --\S+)*) (?:-m )?((?:benchmarks\.)?\w+)(?:\.py)?(?: |$)", line
        )
        if match and match[1] != "pytest" and "venv" not in line:
            found.append((match[1], shlex.split(line[match.end() :], comments=True)))
    return found


def test_commands_are_found():
    text = (
        "`python train.py\n--epochs 1`\n\n    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 train.py --lr \\\n  1  # so"
    )
    assert commands(text) == [("train", ["--lr", "1"]), ("train", ["--epochs", "1"])]


@by_name
def test_the_commands_parse(path, capsys):
    for name, arguments in commands(path.read_text()):
        module = importlib.import_module(name)
        if "--help" not in arguments and not (name == "denoise" and not arguments):
            config.parse(module.__doc__, module.SETTINGS, getattr(module, "PRESETS", None), arguments)


@by_name
def test_the_flags_exist(path):
    benchmarks = ("faults", "fit_noise_level", "noise_level", "real_noise", "speed", "time_to_loss")
    modules = map(importlib.import_module, (*SCRIPTS, *(f"benchmarks.{name}" for name in benchmarks)))
    settings = {name: setting for module in modules for name, setting in module.SETTINGS.items()}
    flags = {"--" + name.replace("_", "-") for name in settings} | OTHER_FLAGS
    flags |= {"--no-" + name.replace("_", "-") for name, setting in settings.items() if setting.kind is bool}
    assert set(re.findall(r"(?<![\w-])--[a-z0-9-]+\b(?!_)", path.read_text())) <= flags


@by_name
def test_the_paths_exist(path):
    text = path.read_text()
    named = [word for line in code(text) for word in re.split(r"[\s:,=]+", line)]
    named += re.findall(r'src="([^"]+)"', text) + re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    named = filter(re.compile(PATH).fullmatch, named)
    folders = (ROOT, path.parent, ROOT / "support", ROOT / "support" / "datasets")
    ours = {n for n in named if not any(fnmatch.fnmatch(n, pattern) for pattern in NOT_OURS)}
    assert ours
    assert not {n for n in ours if not any((folder / n).exists() for folder in folders)}


@by_name
def test_the_links_lead_to_headings(path):
    for target, heading in re.findall(r"\]\(([^):]*)#([^)]+)\)", path.read_text()):
        text = ((path.parent / target) if target else path).read_text()
        headings = [re.sub(r"[^\w\- ]", "", line).strip().lower() for line in re.findall(r"^#+ (.+)", text, re.M)]
        assert heading in [line.replace(" ", "-") for line in headings]


def test_readme_is_short_and_its_lines_too():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "<img"))]


def test_readme_names_every_module():
    modules = {path.name for path in [*ROOT.glob("*.py"), *(ROOT / "support").rglob("*.py")]}
    named = set(re.findall(r"\w+\.py", README.read_text()))
    assert modules - {"__init__.py", "hubconf.py"} <= named


def test_readme_test_command_is_what_ci_runs():
    assert "`make test` runs the tests" in README.read_text()
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_readme_snippet_runs(tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(snippet.splitlines()) <= 11
    Image.effect_noise((44, 40), 30).convert("RGB").save(tmp_path / "noisy.png")
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(snippet, names := {})
    assert names["clean"].size == (44, 40)
    assert names["x0_hat"].shape == names["x0"].shape


# ---- PyTorch Hub -------------------------------------------------------------------------------------------------


def test_hub_gives_the_trained_networks():
    for name in ("unet32", "photo"):
        saved = checkpoint.load(ROOT / "model" / f"{name}.pth")["model"]
        network = torch.hub.load(str(ROOT), name, source="local")
        assert isinstance(network, UNet) and not network.training
        assert sum(p.numel() for p in network.parameters()) == 2_176_515
        for key, value in network.state_dict().items():
            assert torch.equal(value, saved[key].float())


def test_hub_gives_untrained_networks_and_the_denoiser():
    assert not torch.hub.load(str(ROOT), "unet32", pretrained=False, source="local").training
    assert torch.hub.load(str(ROOT), "denoiser", source="local") is denoise.denoise
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)


def test_an_import_leaves_the_program_as_it_was():
    state = "Image.MAX_IMAGE_PIXELS, torch.backends.cudnn.allow_tf32"
    code = f"import torch; from PIL import Image; before = {state}; import hubconf; assert before == ({state})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- the notebook ------------------------------------------------------------------------------------------------


def test_the_notebook_holds_the_outputs_of_one_run():
    path = ROOT / "tour.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert path.stat().st_size < 1_000_000
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in cells)
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")


@pytest.mark.slow
def test_the_notebook_runs():
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "tour.ipynb", as_version=4)
    settings = dict(timeout=None, startup_timeout=600, kernel_name="python3")
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}, **settings).execute()
