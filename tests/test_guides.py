"""The guides: their commands, the memory that they give, and what each of them has to say."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest

from mmvision_export.models.minimax_m3_vl.config import EncoderConfig
from mmvision_export.models.minimax_m3_vl.memory import LaunchMemory, gigabytes
from tests.support.command import Command
from tests.support.markdown import anchors_in
from tests.support.shell_lines import commands_in, fault_of

ROOT = Path(__file__).parents[1]
GUIDES = sorted(path for path in (ROOT / "docs" / "guides").glob("*.md") if path.stem != "README")
WITH_COMMANDS = [*GUIDES, ROOT / "docker" / "README.md", ROOT / "examples" / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_command_of_a_page_is_one(page: Path) -> None:
    commands = list(commands_in(page.read_text()))
    assert commands
    assert {command: fault for command in commands if (fault := fault_of(command))} == {}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_command_of_an_examples_docstring_is_one(example: Path) -> None:
    """Its own command is run in `test_examples.py`; the server's is the server's."""
    docstring = ast.get_docstring(ast.parse(example.read_text())) or ""
    for command in re.findall(r"^ +(mmvision .+)$", docstring, re.M):
        assert fault_of(command) == ""


@pytest.mark.parametrize(
    ("command", "fact"),
    [
        ("mmvision exprt --onnx", "exprt"),
        ("mmvision build-engine --fp61", "--fp61"),
        ("mmvision build --target jetson-nano", "jetson-nano"),
        ("mmvision run --model x --backend tpu", "tpu"),
        (".venv/bin/mmvision bundle --model x", "target"),
        ("pip install '.[tensorrt-cu11]'", "tensorrt-cu11"),
        ("pip install -c constraints-jetpack5.txt '.[engine]'", "constraints-jetpack5.txt"),
        ("docker build -f docker/jetpack5.Dockerfile -t x .", "jetpack5"),
        ("docker build -f docker/python.Dockerfile -t x --build-arg EXTRA=cpu .", "EXTRA"),
        ("docker run --rm mmvision:jetpack5 doctor", "jetpack5"),
        ("docker run --rm -v x:/x mmvision:cpu doctr", "doctr"),
        ("sudo nvpmodel --mode 0", "form"),
        ("rm -rf /", "rm"),
    ],
)
def test_control_a_command_that_is_none_is_found(command: str, fact: str) -> None:
    assert fact in fault_of(command)


@each_guide
def test_what_a_guide_does_without_a_gpu_works(
    guide: Path, mmvision: Command, exported: Path, tmp_path: Path
) -> None:
    """With a small model in place of the full one, and `build` as a dry run."""
    shutil.copytree(exported, tmp_path / "engines" / "MiniMax-M3")
    commands = [command for command in commands_in(guide.read_text()) if "--target" in command]
    commands += [f"mmvision verify {archive}" for archive in archives_in(guide)]
    assert [command.split()[1] for command in commands] == ["build", "bundle", "verify"]
    for command in commands:
        small = command.replace(
            "--checkpoint MiniMaxAI/MiniMax-M3", "--preset tiny --random-weights"
        )
        more = ["--dry-run"] if " build " in small else []
        if more:
            small = small.replace("engines/MiniMax-M3", "engines/other")
        result = mmvision(*shlex.split(small)[1:], *more)
        assert (result.code, result.errors) == (0, []), small
    # What the pages have a target do lies in the archive.
    (archive,) = archives_in(guide)
    with tarfile.open(archive) as opened:
        names = {Path(name).name for name in opened.getnames()}
    scripts = {
        word
        for command in commands_in(guide.read_text())
        for word in command.split()
        if "./" in word
    }
    assert {Path(script).name for script in scripts} <= names
    assert f"cd {Path(archive).stem}" in list(commands_in(guide.read_text()))


def archives_in(guide: Path) -> set[str]:
    """Archives that are unpacked on the target."""
    return {
        command.split()[2]
        for command in commands_in(guide.read_text())
        if command.startswith("tar xf ")
    }


def test_control_commands_are_found_in_blocks_without_a_language() -> None:
    page = "```\n$ a --b   # why\nc && d\n```\n```python\ne\n```\n`f`\n"
    assert list(commands_in(page)) == ["a --b", "c", "d"]


def memory_rows() -> list[str]:
    """Of a launch of one image in float16, beside the weights."""
    config = EncoderConfig()
    sizes = {2304: (672, 672), 4096: (896, 896), 13824: (2016, 1344), 20736: (2016, 2016)}
    rows = []
    for patches, (width, height) in sizes.items():
        assert patches == width * height // 14**2
        needs = [
            LaunchMemory(config=config, way="uniform", itemsize=2, fused=True),
            LaunchMemory(config=config, way="dense", itemsize=2, fused=True),
            LaunchMemory(config=config, way="dense", itemsize=2),
        ]
        totals = " | ".join(gigabytes(need.image(patches).total) for need in needs)
        rows.append(f"| {patches:,} | {width} x {height} | {totals} |")
    return rows


def weights_gb() -> str:
    """Of the full encoder in float16."""
    import torch

    from mmvision_export.models.minimax_m3_vl.encoder import VisionEncoderModule

    with torch.device("meta"):
        parameters = sum(each.numel() for each in VisionEncoderModule(EncoderConfig()).parameters())
    return f"{2 * parameters / 1e9:.2f}"


@each_guide
def test_the_memory_is_what_the_planner_counts(guide: Path) -> None:
    text = guide.read_text()
    given = [line for line in text.splitlines() if re.match(r"\| [\d,]+ \| \d+ x \d+ \|", line)]
    assert given == memory_rows()
    assert f"take {weights_gb()} GB in float16" in text


def test_what_is_left_on_an_orin_is_the_difference() -> None:
    text = (ROOT / "docs" / "guides" / "jetson-orin.md").read_text()
    rows = re.findall(r"^\| [\w, ]+ \| (\d+) GB \| ([\d.]+) GB \|$", text, re.M)
    assert [int(memory) for memory, _ in rows] == [8, 16, 32, 64]
    launch = LaunchMemory(config=EncoderConfig(), way="uniform", itemsize=2, fused=True)
    used = float(weights_gb()) + launch.image(2304).total / 1e9
    for memory, left in rows:
        assert f"{int(memory) - used:.1f}" == left


@each_guide
def test_a_guide_has_all_its_parts(guide: Path) -> None:
    text = guide.read_text()
    parts = {
        "what-you-need",
        "docker",
        "power",
        "memory",
        "dla-no",
        "what-has-never-run",
        "sources",
    }
    assert parts <= anchors_in(text)
    # Each source that the text names is there, and each that is there is named.
    body, _, sources = text.partition("\n## Sources\n")
    numbers = {int(number) for number in re.findall(r"^(\d+)\. ", sources, re.M)}
    assert {int(number) for number in re.findall(r"\[(\d+)\]", body)} == numbers
    for command in ("build", "bundle", "verify", "build-engine", "run", "verify-gpu"):
        assert re.search(rf"^mmvision {command} ", body, re.M), command


def test_the_index_leads_from_each_machine_to_its_guide() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    overview = (ROOT / "docs" / "guides" / "README.md").read_text()
    for guide in GUIDES:
        assert f"(guides/{guide.name})" in index
        assert f"({guide.name}" in overview
