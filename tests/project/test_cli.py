"""The `lmms-plugin` command as installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from helpers.environments import run

from lmms_plugin.cli.main import app, main
from lmms_plugin.cli.screens.screen import HEIGHT, WIDTH

COMMAND = str(Path(sys.executable).parent / "lmms-plugin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--bits", "1"), "bits"), (("--bits", "7"), "7"), (("--limit", "0"), "limit must be at least 1")],
    ids=["bits out of range", "bits that hqq cannot do", "no limit"],
)
def test_bad_arguments_give_one_line_and_write_nothing(tmp_path, monkeypatch, capfd, arguments, message):
    assert message in refused(monkeypatch, capfd, "demo", "--output", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_demo_writes_table_report_and_pictures(tmp_path):
    printed = run([COMMAND, "demo", "--output", str(tmp_path), "--limit", "2", "--bits", "2"], tmp_path)
    report = (tmp_path / "report.md").read_text()
    for model in ("quant_none", "quant_rtn", "quant_hqq", "quant_awq"):
        assert model in printed
        assert f"| {model} |" in report
    assert "Only the first 2 expressions" in report
    for picture in tmp_path.glob("*.png"):
        assert picture.name in report
    assert len(list(tmp_path.glob("*.png"))) == 2
    page = (tmp_path / "report.html").read_text()
    assert page.count("--limit 2") == 4
    assert "shapes_shift_snow_3" in page
    assert "shapes_shift_fog_3" not in page
    for shown in (printed, report):
        assert "mean over gaussian_noise, defocus_blur, snow, contrast at severity 3" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=demo,method=awq,bits=1", "bits must be an integer from 2 to 8"),
        ("pretrained=demo,method=rtn,bist=4", "did you mean 'bits'"),
        ("pretrained=demo,method=awqq", "did you mean 'awq'"),
        ("pretrained=demo", "method= is missing: one of none, rtn"),
        ("pretrained=demo,type=Q4_0", "prequantized; type= alone is for --format gguf"),
        ("pretrained=/nowhere/at/all,method=rtn", "there is no folder /nowhere/at/all"),
        ("pretrained=demo,method=awq,calibration=dataset:/nowhere", "neither an existing path nor a hub id"),
    ],
    ids=[
        "impossible bits",
        "unknown argument",
        "unknown method",
        "no method",
        "no method but a type",
        "no checkpoint",
        "no calibration data",
    ],
)
def test_inspect_refuses_in_one_line(monkeypatch, capfd, arguments, message):
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "inspect", arguments, "--json"])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lmms-plugin: ")
    assert message in line


@pytest.mark.slow
def test_inspect_prints_nothing_but_the_report(tmp_path, commands):
    arguments = "pretrained=demo,method=rtn,bits=4,dtype=bfloat16"
    done = commands.run("lmms-plugin", "inspect", arguments, "--json", "--held-out", "1", cwd=tmp_path)
    done.check_returncode()
    report = json.loads(done.stdout)
    modules = [module for module in report["modules"] if module["reason"] is None]
    assert report["method"] == "rtn"
    assert report["quantized"] == len(modules) == 28
    assert report["quantized"] + report["skipped"] == len(report["modules"])
    assert 4 < report["bits_per_weight"] < 4.5
    assert report["bytes_after"] < report["bytes_before"]
    assert report["seconds"] > 0
    assert sum(report["kernels"].values()) == 28
    # Weights and outputs are off by about as much; neither is exact at 4 bits.
    assert all(0.02 < module["relative_error"] < 0.3 for module in modules)
    assert all(0.01 < module["held_out_error"] < 0.5 for module in modules)


def refused(monkeypatch, capfd, *arguments):
    """The one line that a command refuses its arguments with."""
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lmms-plugin: ")
    return line


@pytest.mark.parametrize(
    ("command", "name"),
    [(("study", "plan", "FILE"), "models"), (("inspect", "pretrained=demo,method=rtn,plan=FILE"), "rules")],
    ids=["study file", "plan file"],
)
def test_every_error_of_a_file_is_a_line(tmp_path, monkeypatch, capfd, command, name):
    file = tmp_path / "file.yaml"
    file.write_text(f"{name[:-1]}: [a]\n{name}: []\n9: [x]\n" if name == "models" else "rule: []\nskp: []\nrules: 5\n")
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", *(part.replace("FILE", str(file)) for part in command)])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[2].strip().split(":")[1] for line in lines] == ["1", "2", "3"]
    assert f"did you mean {name!r}?" in lines[0]


FILES = [("report", "RESULTS", "--output"), ("selector", "fit", "RESULTS", "--features", "F", "--output")]
FOLDERS = [
    ("demo", "--output"),
    ("report", "RESULTS", "--figures"),
    ("sensitivity", "RESULTS", "--figure"),
    ("export", "RESULTS", "--format", "submission", "--output"),
    ("leaderboard", "SUBMISSION", "--output"),
    ("quantize", "pretrained=demo,method=rtn", "--output"),
    ("selector", "apply", "RESULTS", "--features", "F", "--selector", "S", "--output"),
    ("study", "run", "FILE", "--output"),
]


class TestOutputs:
    """Where nothing can be written is told first: nothing that is to be read is there, and nobody gets to notice."""

    @pytest.mark.parametrize("command", FILES, ids=" ".join)
    def test_a_folder_is_no_file(self, tmp_path, monkeypatch, capfd, command):
        line = refused(monkeypatch, capfd, *command, tmp_path)
        expected = f"{command[-1]}: expected the name of a file, got the folder {tmp_path}; name a file in it"
        assert line == f"lmms-plugin: {expected}"

    @pytest.mark.parametrize("command", FOLDERS, ids=" ".join)
    def test_a_file_is_no_folder(self, tmp_path, monkeypatch, capfd, command):
        (tmp_path / "file").write_text("kept")
        line = refused(monkeypatch, capfd, *command, tmp_path / "file")
        assert line.startswith(f"lmms-plugin: {command[-1]}: ")
        assert f"{tmp_path / 'file'}" in line
        assert "; name a" in line
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize("command", [*FILES, *FOLDERS], ids=" ".join)
    @pytest.mark.parametrize("below", ["file/x", "file/x/y"])
    def test_nothing_lies_below_a_file(self, tmp_path, monkeypatch, capfd, command, below):
        (tmp_path / "file").write_text("kept")
        line = refused(monkeypatch, capfd, *command, tmp_path / below)
        assert line.startswith(f"lmms-plugin: {command[-1]}: expected ")
        assert line.endswith(f"got the file {tmp_path / 'file'}; name another place")

    @pytest.mark.skipif(sys.platform != "linux", reason="writes below /proc")
    @pytest.mark.parametrize("command", [*FILES, *FOLDERS], ids=" ".join)
    def test_some_places_take_nothing(self, monkeypatch, capfd, command):
        line = refused(monkeypatch, capfd, *command, "/proc/x")
        assert line.startswith(f"lmms-plugin: {command[-1]}: cannot write to /proc (")
        assert line.endswith("); name another place")

    @pytest.mark.parametrize("command", [*FILES, *FOLDERS], ids=" ".join)
    def test_names_may_be_too_long(self, tmp_path, monkeypatch, capfd, command):
        line = refused(monkeypatch, capfd, *command, tmp_path / ("x" * 300))
        assert line.startswith(f"lmms-plugin: {command[-1]}: cannot write to {tmp_path}/xxx")
        assert "(file name too long); name another place" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--bist", "3"], "No such option: --bist (Possible options: --bits, --limit); see 'lmms-plugin demo"),
        (["demo", "--bits", "many"], "Invalid value for '--bits': "),
        (["demo", "extra"], "Got unexpected extra argument"),
        (["report"], "Missing argument 'results'; see 'lmms-plugin report --help'"),
        (["study", "run", "FILE"], "Missing option '--output'; see 'lmms-plugin study run --help'"),
        (["sensitivity", "R", "--kind", "gif"], "Invalid value for '--kind': 'gif' is not one of 'png', 'svg', 'pdf'"),
        (["export", "R", "-o", "x", "--format", "csv"], "'csv' is not one of 'submission', "),
        (["nonsense"], "No such command 'nonsense'; see 'lmms-plugin --help'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_told_in_one_line(monkeypatch, capfd, arguments, said):
    line = refused(monkeypatch, capfd, *arguments)
    assert line.startswith("lmms-plugin: error: ")
    assert said in line
    assert line.endswith(" --help'")


def test_without_arguments_there_is_help(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "study"])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 2
    printed = capfd.readouterr()
    assert "analyse" in printed.out + printed.err
    assert "error" not in printed.out + printed.err


def test_the_list_of_commands_fits_one_screen(tmp_path):
    wide = os.environ | {"COLUMNS": str(WIDTH)}
    finished = subprocess.run([COMMAND], cwd=tmp_path, env=wide, capture_output=True, text=True)
    lines = (finished.stdout + finished.stderr).splitlines()
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) <= WIDTH
    for name in ("metrics", "study", "doctor"):
        assert any(line.startswith(f"│ {name} ") for line in lines)


def test_no_paragraph_of_a_help_text_is_broken_by_the_source():
    def texts(command):
        yield command.help or ""
        for one in getattr(command, "commands", {}).values():
            yield from texts(one)

    paragraphs = [part for text in texts(typer.main.get_command(app)) for part in text.split("\n\n")[1:]]
    assert len(paragraphs) > 10
    assert not [part for part in paragraphs if "\n" in part.strip()]


LATE = """
import subprocess
import sys
from lmms_plugin.cli.main import main
for line in sys.argv[1:]:
    sys.argv = ["lmms-plugin", *line.split()]
    try:
        main()
    except SystemExit as end:
        print(end.code, *sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_what_arguments_alone_say_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "plan.yaml").write_text("skp: []")
    quantize = "quantize --output out pretrained=demo,method="
    lines = {
        f"{quantize}rtn,bits=9": "bits must be",
        f"{quantize}rtm": "did you mean 'rtn'?",
        "quantize --output out method=rtn,pretrained=/nowhere/x": "no folder /nowhere/x",
        f"{quantize}rtn,plan=plan.yaml": "did you mean 'skip'?",
        f"{quantize}rtn,calibration=nose": "did you mean 'noise'?",
        f"{quantize}rtn --format ggml": "expected a format of",
        f"{quantize}rtn --format gguf": "GGUF has types of its own",
        "quantize --output out pretrained=demo,bits=4 --format gguf": "bits has no effect",
        "inspect pretrained=demo,method=rtn,bits=9": "bits must be",
        "study plan nofile.yaml": "there is no file nofile.yaml",
        "study plan .": "expected a YAML file, got the folder .",
        "study run nofile.yaml --output out": "there is no file nofile.yaml",
        "study analyse . --file nofile.yaml": "there is no file nofile.yaml",
        "metrics . --estimator joind": "did you mean 'joint'?",
        "compare . . --margin 0": "expected a margin between 0 and 1, such as 0.02 for two points, got 0",
        "compare . . --margin 2": "expected a margin between 0 and 1, such as 0.02 for two points, got 2",
        "strength . --features .": "expected a results file",
        "export . -o out --format eval-results": "--dataset-id is missing",
        "export . -o out --format submission --organization a --relationship friend": "expected a relationship of",
        "export . -o out --format submission --level 2": "expected a confidence level",
    }
    command = [sys.executable, "-c", LATE, *lines]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["2"] * len(lines)
    for said, expected in zip(done.stderr.splitlines(), lines.values(), strict=True):
        assert expected in said
