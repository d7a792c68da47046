import json
import os
import time
import zipfile
from pathlib import Path

import pytest

from bench import gpu_day
from bench.gpu_day import Part
from bench.gpu_day_wheelhouse import closure
from bench.throughput import bounds

ROOT = Path(__file__).parents[2]


def part(name, code, limit=60.0):
    return Part(name, ("-c", code), limit)


def run(work, one, left=60.0):
    return gpu_day.run(one, work, left, os.environ)


def wheel(folder, name, version="1.0"):
    file = folder / f"{name}-{version}-py3-none-any.whl"
    facts = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{facts}/RECORD", "")


class TestParts:
    def test_one_that_hangs_is_cut_off_with_all_it_started_and_keeps_its_rows(self, tmp_path):
        rows = [{"case": "first", "ratio": 2.0}]
        code = (
            "import json, pathlib, subprocess, sys, time\n"
            f"pathlib.Path({str(tmp_path / 'slow.json')!r}).write_text({json.dumps(rows)!r})\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
            "print('on its way', flush=True)\n"
            "time.sleep(600)"
        )
        outcome = run(tmp_path, part("slow", code, limit=5.0))
        assert outcome.status == "cut off after 5 s"
        assert outcome.rows == rows
        assert outcome.said == "on its way\n"
        child = Path("/proc", (tmp_path / "pid").read_text(), "stat")
        for _ in range(50):
            # Whoever inherits it may leave it as a zombie.
            if not child.exists() or child.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                break
            time.sleep(0.1)
        else:
            pytest.fail("the child of the part runs on")

    def test_one_that_fails_says_why(self, tmp_path):
        outcome = run(tmp_path, part("broken", "raise SystemExit('no such device')"))
        assert (outcome.status, outcome.rows) == ("ended with status 1", [])
        assert outcome.said == "no such device\n"

    def test_none_is_begun_when_the_budget_is_spent(self, tmp_path):
        outcome = run(tmp_path, part("late", f"open({str(tmp_path / 'begun')!r}, 'w')"), left=0.0)
        assert outcome.status.startswith("not begun")
        assert not (tmp_path / "begun").exists()

    def test_what_is_left_of_the_budget_is_a_limit_too(self, tmp_path):
        assert run(tmp_path, part("slow", "import time; time.sleep(60)"), left=0.5).status.startswith("cut off")

    def test_the_tests_are_all_that_are_marked(self):
        assert "tests/quant_backends/layers/test_kernels.py" in gpu_day.gpu_tests()
        listed = gpu_day.parts(Path("/work"), "cuda", "3b", small=False)
        assert listed[0].name == "tests"
        assert set(gpu_day.gpu_tests()) < set(listed[0].command)

    def test_counts_of_tests_are_read_from_the_report(self, tmp_path):
        (tmp_path / "tests.xml").write_text(
            '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"/>'
            '<testcase name="b"><failure message="1 != 2"/></testcase><testcase name="c"><skipped message="no nvcc"/>'
            "</testcase></testsuite></testsuites>"
        )
        (row,) = gpu_day.rows_of(tmp_path, "tests")
        assert (row["tests"], row["failures"], row["skipped"]) == (3, 1, 1)
        assert (row["failed"], row["skipped_for"]) == ({"b": "1 != 2"}, {"c": "no nvcc"})
        said = gpu_day.table({}, [gpu_day.Outcome("tests", "ended with status 1", 3.0, [row], "the end")])
        assert all(word in said for word in ("b: 1 != 2", "c: no nvcc", "| the end"))

    def test_the_table_says_what_its_ratios_are_and_shows_numbers_as_a_person_reads_them(self):
        row = {"case": "rtn", "ratio": 2.0, "within_bound": True, "peak_bytes": 7512345678, "seconds": 3.14159}
        said = gpu_day.table({}, [gpu_day.Outcome("quantize", "done", 3.0, [row])])
        assert "within_bound yes, peak_bytes 7,512,345,678, seconds 3.142" in said
        assert "(ratio: bytes of the dense model over" in said
        assert gpu_day.RATIOS.keys() == gpu_day.LIMITS.keys() - {"tests"}

    def test_of_tests_that_were_cut_off_those_are_counted_that_ran(self, tmp_path):
        (tmp_path / "tests.log").write_text(
            "collecting ...\rcollected 9 items\ntests/a/test_b.py::test_c[torch._int_mm cuda] PASSED   [ 11%]\n"
            "tests/a/test_b.py::test_d FAILED  [ 22%]\ntests/a/test_b.py::test_e SKIPPED (none) [ 33%]\n"
            "tests/a/test_b.py::test_f "
        )
        (row,) = gpu_day.rows_of(tmp_path, "tests")
        assert (row["tests"], row["failures"], row["errors"], row["skipped"]) == (3, 1, 0, 1)
        assert list(row["failed"]) == ["test_d"]

    def test_the_rows_of_one_that_runs_are_told_meanwhile(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu_day, "LOOK", 0.1)
        file = tmp_path / "slow.json"
        code = f"import pathlib, time; pathlib.Path({str(file)!r}).write_text('[{{\"case\": 1}}]'); time.sleep(600)"
        told = []
        outcome = gpu_day.run(part("slow", code, limit=3.0), tmp_path, 60.0, os.environ, told.append)
        assert {one.status for one in told} == {"running"}
        assert told[-1].rows == outcome.rows == [{"case": 1}]

    def test_all_that_is_published_can_be_read_while_a_part_runs(self, tmp_path):
        (tmp_path / "slow.log").write_text("step 1\rstep 2\n")
        output = tmp_path / "out"
        output.mkdir()
        running = gpu_day.Outcome("slow", "running", 1.0, [{"case": "first", "ratio": 2.0}])
        gpu_day.publish(output, tmp_path, {"torch": "2"}, [running])
        assert json.loads((output / "gpu_day.json").read_text())["parts"][0]["rows"] == running.rows
        assert (output / "gpu_day.log").read_text() == "=== slow\nstep 2\n\n"
        assert "slow: running" in (output / "gpu_day.txt").read_text()


class TestInstalling:
    def test_what_is_there_stays_and_what_neither_has_is_told(self, tmp_path, monkeypatch):
        house, site = tmp_path / "house", tmp_path / "site"
        house.mkdir()
        for name in ("gpu_day_probe", "numpy"):
            wheel(house, name)
        (house / gpu_day.NEEDED).write_text("gpu-day-probe\nnumpy\ngpu-day-nowhere\n")
        assert gpu_day.install(house, site) == "missing, and not in the wheelhouse: gpu-day-nowhere"
        assert sorted(file.name for file in site.glob("*.py")) == ["gpu_day_probe.py"]

    def test_a_wheel_that_does_not_fit_keeps_no_other_from_being_installed(self, tmp_path):
        house, site = tmp_path / "house", tmp_path / "site"
        house.mkdir()
        wheel(house, "gpu_day_probe")
        wheel(house, "gpu_day_other")
        (house / "gpu_day_other-1.0-py3-none-any.whl").rename(house / "gpu_day_other-1.0-cp27-cp27m-win32.whl")
        (house / gpu_day.NEEDED).write_text("gpu-day-probe\ngpu-day-other\n")
        told = gpu_day.install(house, site)
        assert "pip failed for 1 of 2 wheels" in told
        assert "missing, and not in the wheelhouse: gpu-day-other" in told
        assert [file.name for file in site.glob("*.py")] == ["gpu_day_probe.py"]

    def test_versions_that_the_package_does_not_admit_are_named(self, tmp_path):
        facts = tmp_path / "torch-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
        assert "torch 1.0 (asked for: <3,>=2.10)" in gpu_day.told_unfit(tmp_path)

    def test_a_version_that_the_package_does_not_admit_is_replaced_if_there_is_a_wheel(self, tmp_path, monkeypatch):
        house, site, front = (tmp_path / name for name in ("house", "site", "front"))
        for folder in (house, front):
            folder.mkdir()
        wheel(house, "filelock", "3.99")
        wheel(front, "filelock", "4.0")
        with zipfile.ZipFile(front / "filelock-4.0-py3-none-any.whl") as archive:
            archive.extractall(front)
        monkeypatch.syspath_prepend(str(front))
        (house / gpu_day.NEEDED).write_text("filelock\n")
        assert "filelock 4.0" in gpu_day.told_unfit(site)
        assert gpu_day.install(house, site) == ""
        assert [file.name for file in site.glob("*.py")] == ["filelock.py"]

    def test_another_folder_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a folder that bench/gpu_day_wheelhouse\.py wrote"):
            gpu_day.install(tmp_path, tmp_path / "site")

    def test_what_is_needed_follows_requirements_up_to_what_is_left_out(self):
        found = closure(["lmms-plugin"], "3.12", {"torch", "lmms-eval"})
        assert {"transformers", "tokenizers", "hqq"} <= found.keys()
        assert not {"torch", "lmms-eval", "qwen-vl-utils"} & found.keys()
        # Extras are no requirements.
        assert "ray" not in found


def test_bounds_are_those_of_the_counted_arithmetic():
    seconds = {"auto": 2.0, "lmms_eval": 9.0}
    floor, fewer, ceiling = bounds(seconds, each=100.0, alone=500.0, least=0.01, expressions=7)
    assert (floor["case"], floor["ratio"]) == ("floor@7", 0.5)
    assert (fewer["case"], fewer["ratio"]) == ("fewer_operations@7", 5.0)
    # Nine seconds over the one that the arithmetic takes.
    assert (ceiling["case"], ceiling["ratio"]) == ("ceiling@7", 9.0)
    assert [row["case"] for row in bounds(seconds, 100.0, None, 0.01, 7)] == ["floor@7"]


@pytest.mark.slow
def test_a_dry_run_tells_what_it_ran(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = gpu_day.main(
        ["--dry-run", "--budget", "3000", "--output", str(tmp_path), "--parts", "decode", "static_cache"]
    )
    said = json.loads((tmp_path / "gpu_day.json").read_text())
    assert [one["status"] for one in said["parts"]] == ["done", "done"], said
    assert status == 0
    cases = [row["case"] for one in said["parts"] for row in one["rows"]]
    assert cases == ["4 bits, batch 1", "4 bits, batch 8", "static_vs_plain@1"]
    table = (tmp_path / "gpu_day.txt").read_text()
    assert all(case in table for case in cases)
    assert table in capsys.readouterr().out
