"""The folder as a Space, and as a part of the installed package."""

import importlib
import re
import subprocess
import sys

import pytest

from modeling_sparrow import cli
from sparrow_processing.overlays import PALETTE

from .conftest import ROOT

FOLDER = ROOT / "spaces_demo"


def package_names(lines):
    return {re.match(r"[A-Za-z0-9_-]+", line)[0].lower() for line in lines}


def requirements_of(text: str, name: str) -> list[str]:
    """The strings of a list in pyproject.toml (Python 3.10 has no reader for it)."""
    block = re.search(rf"^{name} = \[(.*?)\]$", text, flags=re.MULTILINE | re.DOTALL)[1]
    return re.findall(r'"([^"]+)"', re.sub(r"#.*", "", block))


def test_requirements_are_those_of_the_package():
    lines = (FOLDER / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    project = (ROOT / "pyproject.toml").read_text()
    needed = requirements_of(project, "dependencies") + requirements_of(project, "demo")
    assert package_names(lines) == package_names(needed)
    pins = (ROOT / "constraints.txt").read_text().split()
    assert set(pins) <= set(lines)
    gradio = next(line for line in lines if line.startswith("gradio"))
    assert gradio == requirements_of(project, "demo")[0]


def test_header_of_the_space():
    header = (FOLDER / "README.md").read_text().split("---")[1]
    fields = dict(line.split(": ", 1) for line in header.strip().splitlines() if ": " in line)
    assert fields["sdk"] == "gradio" and (FOLDER / fields["app_file"]).is_file()
    assert f"gradio>={fields['sdk_version'].removesuffix('.0')}\n" in (FOLDER / "requirements.txt").read_text()
    assert len(fields["short_description"]) <= 60


def test_the_app_finds_a_checkout_that_is_not_installed(tmp_path):
    """As after `pip install -r requirements.txt`: none of the packages is installed."""
    code = (
        "import sys, os, runpy\n"
        "ours = lambda p: any(os.path.isdir(os.path.join(p, n)) for n in ('modeling_sparrow', 'sparrow_processing'))\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' in p or not ours(p)]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '') and "
        "'editable' not in getattr(f, '__name__', '').lower()]\n"
        f"app = runpy.run_path({str(FOLDER / 'app.py')!r})\n"
        "assert app['main'](['--model', '/no/such/folder']) == 2\n"
        "import modeling_sparrow, sparrow_processing, sparrow_space\n"
        "print(*(m.__path__[0] for m in (modeling_sparrow, sparrow_processing, sparrow_space)), sep='\\n')\n"
    )
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert "no such folder" in run.stderr
    assert run.stdout.splitlines() == [str(ROOT / "modeling_sparrow"), str(ROOT / "processing"), str(FOLDER)]


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sparrow_space.interface", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'sparrow-video-grounding[demo]'" in capsys.readouterr().err


def test_a_missing_model_is_told_before_the_page_opens(capsys):
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    assert cli.main(["demo", "--model", "/no/such/folder"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_examples_of_the_page_exist():
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    interface = importlib.import_module("sparrow_space.interface")
    assert all((FOLDER / "examples" / name).is_file() for name, _ in interface.EXAMPLES)


def test_colours_of_the_page_are_those_of_the_pictures():
    pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")
    fragments = importlib.import_module("sparrow_space.fragments")
    assert fragments.colours(1) == "--object: rgb({}, {}, {}); --outline: dashed".format(*PALETTE[1])
