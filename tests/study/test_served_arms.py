"""Arms that a server answers: beside local ones in a file, in the plan, in a run and in a report."""

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import imitation, vllm_server
from helpers.environments import run

from lmms_plugin.analysis import axes, logs
from lmms_plugin.arguments import read_arguments
from lmms_plugin.study.file import identity
from lmms_plugin.study.file.expansion import cells
from lmms_plugin.study.file.grid import Cell
from lmms_plugin.study.file.reading import read
from lmms_plugin.study.run import attempt
from lmms_plugin.utils.files import read_json

PLUGIN = Path(sys.executable).parent / "lmms-plugin"
IMITATION = f"{sys.executable} {imitation.__file__} --port {{port}}"
FEW = ["--resamples", "20", "--pictures", "0", "--workers", "1"]
STUDY = """
models: [demo]
tasks: [shapes_rec]
limit: 8
"""


def planned(folder: Path, methods: str, processes: int = 1) -> list[Cell]:
    file = folder / "study.yaml"
    resources = f"resources: {{gpus: 0, processes: {processes}}}\n"
    file.write_text(f"{STUDY}{resources}methods: {methods}\n", encoding="utf-8")
    return list(cells(read(file)))


def test_a_served_arm_stands_beside_local_ones(tmp_path: Path) -> None:
    served = f'{{method: served, name: vllm, launch: "{IMITATION}", stated_method: awq, bits: 4, concurrency: 4}}'
    local, found = planned(tmp_path, f"[none, {served}]")
    assert (local.axes.method, local.launch) == ("none", None)
    assert found.axes.to_dict() == {
        "model": "demo",
        "method": "vllm",
        "bits": 4,
        **dict.fromkeys(("group_size", "components", "calibration", "seed")),
    }
    assert found.model == "quant_served"
    expected = {"pretrained": "demo", "launch": IMITATION, "method": "awq", "bits": 4, "concurrency": 4}
    assert found.arguments == expected
    assert read_arguments(found.model_args) == expected
    assert attempt.command(found, 0)[2] == "quant_served"


def test_a_command_with_commas_and_quotes_arrives_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "serve.txt"
    file.write_text(f"""# A comment.
        {IMITATION} --limits '{{"image": 1, "video": 0}}' \\
        --names a,b "it's"
    """)
    (found,) = planned(tmp_path, f"[{{method: served, launch: {file}}}]")
    arrived = read_arguments(attempt.command(found, 0)[4])["launch"]
    assert found.launch is not None
    assert arrived == found.arguments["launch"] == found.launch.text
    assert found.launch.words[-5:] == ("--limits", '{"image": 1, "video": 0}', "--names", "a,b", "it's")


def key(cell: Cell) -> str:
    return identity.keyed(cell, cuda=False).key


def test_the_key_holds_command_and_what_is_stated_and_what_the_command_reads(tmp_path: Path) -> None:
    served = tmp_path / "checkpoint"
    served.mkdir()
    (served / "config.json").write_text("{}")
    (served / "weights").write_text("one")

    def arm(more: str = "", option: str = "--max-len 512") -> str:
        return f'{{method: served, name: a, launch: "{IMITATION} --model={served} {option}"{more}}}'

    asked = [arm(), arm(option="--max-len 513"), arm(", bits: 4"), arm(", stated_method: awq"), arm(", timeout: 7")]
    keys = [key(planned(tmp_path, f"[{one}]")[0]) for one in asked]
    assert len(set(keys)) == len(keys)
    (served / "weights").write_text("two")
    assert key(planned(tmp_path, f"[{arm()}]")[0]) not in keys


@pytest.mark.parametrize(
    ("arm", "said"),
    [
        ("{method: served}", "expected launch .* or base_url, got neither"),
        (f"{{method: served, base_url: http://127.0.0.1:1/v1, launch: '{IMITATION}'}}", "got both"),
        (f"{{method: rtn, launch: '{IMITATION}'}}", "expected launch for method: served alone, got it for rtn"),
        ("{method: served, launch: 'nobody-serves --port {port}'}", "expected a program on PATH, got 'nobody-serves'"),
        (f"{{method: served, launch: '{sys.executable} serve'}}", r"expected \{port\} where the server's port goes"),
        ("{method: served, base_url: nowhere}", "base_url must be the address of an API"),
        ("{method: served, base_url: http://127.0.0.1:1/v1, dtype: float32}", "dtype has no effect on a served model"),
        ("{method: served, base_url: http://127.0.0.1:1/v1, concurency: 3}", "did you mean 'concurrency'"),
        ("{method: serve, base_url: http://127.0.0.1:1/v1}", "did you mean 'served'"),
    ],
)
def test_what_cannot_be_served_is_told_with_its_place(arm: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"study\.yaml:\d+:\d+: .*{said}"):
        planned(tmp_path, f"[{arm}]")


def test_several_processes_cannot_share_what_one_of_them_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one process, got 2"):
        planned(tmp_path, f"[{{method: served, launch: '{IMITATION}'}}]", processes=2)


@pytest.mark.slow
def test_cells_share_a_server_and_go_on_after_its_death(tmp_path: Path) -> None:
    launch = f"{IMITATION} --dies-at 4 --once died"
    served = f"{{method: served, name: imitated, launch: '{launch}', bits: 8, stated_method: rtn, concurrency: 1}}"
    file, output = tmp_path / "study.yaml", tmp_path / "out"
    lists = "[[shapes_rec], [shapes_rejection]]"
    text = STUDY.replace("[shapes_rec]", lists) + f"resources: {{gpus: 0}}\nmethods: [{served}]\n"
    file.write_text(text, encoding="utf-8")
    command = [str(PLUGIN), "study", "run", str(file), "--output", str(output), "--retry-failed"]
    # The server dies of a question of the first served cell; the second one gets another server.
    with pytest.raises(RuntimeError, match="the server has ended; it says: RuntimeError: no kernel image"):
        run(command, cwd=tmp_path)
    assert len(list((output / "cells").iterdir())) == 1
    run(command, cwd=tmp_path)
    done = {path.parent: read_json(path) for path in output.glob("cells/demo_imitated*/cell.json")}
    assert len(done) == 2
    assert [folder for folder in done if "going on with 3 answers" in (folder / "log.txt").read_text()]
    assert not any((output / ".kept").iterdir())
    started = [log.read_text().split()[1] for log in (output / ".servers").iterdir()]
    assert len(started) == 2
    assert not any(Path(f"/proc/{process}").exists() for process in started)
    assert {read_json(folder / "quant_report.json")["served"]["launch"] for folder in done} == {launch}
    (config,) = {axes.of(one.file, output, one.content).config for one in map(logs.read, logs.find(output))}
    assert config.label == "imitated 8"
    assert {"method=rtn", "quantization=stated, not verified"} < set(config.options)
    assert not any(option.startswith("launch=") for option in config.options)


@pytest.mark.slow
@pytest.mark.served
def test_local_arms_and_vllm_in_one_report(tmp_path: Path) -> None:
    vllm_server.expect_environment()
    file, output, page = tmp_path / "study.yaml", tmp_path / "out", tmp_path / "page.html"
    (tmp_path / "serve.txt").write_text(vllm_server.launch(), encoding="utf-8")
    served = f"{{method: served, name: vllm float32, launch: serve.txt, launch_timeout: {vllm_server.LIMIT}}}"
    file.write_text(
        f"models: [demo]\ntasks: [shapes_rec]\nlimit: 30\nresources: {{gpus: 0}}\n"
        f"grids:\n  - methods: [none]\n  - {{methods: [rtn], bits: [8, 4]}}\n"
        f"  - methods: [{served}]\n    tasks: [[shapes_rec], [shapes_rejection]]\n",
        encoding="utf-8",
    )
    plan = run([str(PLUGIN), "study", "plan", str(file), "--all"], cwd=tmp_path)
    assert "demo_vllm-float32-" in plan
    run([str(PLUGIN), "study", "run", str(file), "--output", str(output)], cwd=tmp_path)
    accounts = [read_json(path)["served"] for path in output.glob("cells/demo_vllm*/quant_report.json")]
    assert len(accounts) == 2
    assert len({account["base_url"] for account in accounts}) == len(list((output / ".servers").iterdir())) == 1
    found = map(logs.read, logs.find(output))
    runs = {axes.of(one.file, output, one.content).config.label: one for one in found if "shapes_rec" in one.tasks}
    assert len(runs) == 4
    dense, vllm_run = runs["unquantized"].tasks["shapes_rec"], runs["vllm float32"].tasks["shapes_rec"]
    np.testing.assert_allclose(vllm_run.score, dense.score, atol=1e-4)
    for name, values in dense.confidence.items():
        np.testing.assert_allclose(vllm_run.confidence[name], values, atol=1e-4, err_msg=name)
    run([str(PLUGIN), "report", str(output), "--output", str(page), *FEW], cwd=tmp_path)
    assert all(told in page.read_text() for told in ("vllm float32", "rtn 8", "rtn 4", "unquantized"))
