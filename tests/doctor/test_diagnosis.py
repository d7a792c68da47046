"""`lmms-plugin doctor`: what it says of machines that are as they should be, and of broken ones."""

import ast
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import pytest
import torch
from helpers import caption_copies, natural_copies, photographs, vqa_copies
from helpers.environments import ROOT, Environment, run
from PIL import Image

from lmms_plugin.cli.main import main
from lmms_plugin.doctor import devices, diagnosis, imports, local_datasets, optional_libraries, packages, places
from lmms_plugin.doctor.packages import Package
from lmms_plugin.doctor.rows import DiagnosisRow, Status
from lmms_plugin.quant_backends import GGUF, SERVED, names
from lmms_plugin.quant_backends.layers.native_kernels import NATIVE_KERNELS
from lmms_plugin.tasks.grounding.expressions import ExpressionDocs
from lmms_plugin.utils import variables
from lmms_plugin.utils.copies import DatasetError

COMMAND = str(Path(sys.executable).parent / "lmms-plugin")


def asked(check, tmp_path, **environment):
    """Rows of one check, as the command runs it."""
    printed = run([sys.executable, "-P", "-m", "lmms_plugin.doctor", check], tmp_path, **environment)
    return [DiagnosisRow(**row) for row in rows_of(printed)]


def rows_of(printed):
    return [json.loads(line) for line in printed.splitlines() if line.startswith('{"check"')]


def doctor(folder, *arguments, **environment):
    """Exit status and standard output of the real command."""
    try:
        return 0, run([COMMAND, "doctor", *arguments], folder, **environment)
    except RuntimeError as error:
        first, _, printed = str(error).partition("\n")
        return int(first.split("exited with ")[1].rstrip(":")), printed


@pytest.mark.slow
def test_where_everything_is_as_it_should_be_nothing_fails(tmp_path):
    status, printed = doctor(tmp_path, "--json")
    rows = json.loads(printed)
    assert status == 0, [row for row in rows if row["status"] == "fail"]
    assert all(row.keys() == {"check", "status", "message", "remedy"} for row in rows)
    by_check = {row["check"]: row for row in rows}
    for check in ("python", "packages", "lmms-eval", "models", "tasks", "gpu", "kernels", "hub", "local copies"):
        assert by_check[check]["status"] == "ok", by_check[check]
    assert {"lock", "dtype", "token", "java", "compiler", "folder of models"} <= by_check.keys()
    # Those of the quantizers, and the served one.
    assert f"all {len(names()) + len((SERVED, GGUF))} models" in by_check["models"]["message"]
    assert "offline" in by_check["hub"]["message"]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def filelock_4(tmp_path):
    """A folder for PYTHONPATH with a filelock that works, but keeps nothing in `filelock._api`, as of its version 4."""
    folder = tmp_path / "front"
    import filelock

    shutil.copytree(Path(filelock.__file__).parent, folder / "filelock", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "filelock" / "_api.py").rename(folder / "filelock" / "_interface.py")
    for file in (folder / "filelock").rglob("*.py"):
        file.write_text(re.sub(r"(?<=[ .])_api\b", "_interface", file.read_text()))
    about = folder / "filelock-4.0.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: filelock\nVersion: 4.0.0\n")
    (about / "top_level.txt").write_text("filelock\n")
    run([sys.executable, "-P", "-c", "import filelock; filelock.FileLock('x')"], tmp_path, PYTHONPATH=str(folder))
    return folder


@pytest.mark.slow
def test_an_import_that_lmms_eval_makes_only_while_it_runs_is_found_broken(monkeypatch, capsys, filelock_4):
    monkeypatch.setenv("PYTHONPATH", str(filelock_4))
    monkeypatch.setattr(sys, "argv", ["lmms-plugin", "doctor", "--all"])
    # The test above runs the processes of all other checks.
    monkeypatch.setattr(diagnosis, "CHECKS", [checks for checks in diagnosis.CHECKS if "lmms-eval" in checks])
    monkeypatch.setattr(optional_libraries, "extras", tuple)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("fail  lmms-eval: ")]
    assert "No module named 'filelock._api'" in line
    assert "lmms_eval 0.7.3" in line
    assert "filelock 4.0.0 is installed" in line
    assert re.search(r'-> pip install "filelock(<4|==3)', line)
    assert any(line.startswith("ok    models: ") for line in lines)
    assert "exits with status 0 even after an error" in lines[-1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libcudart.so.99: cannot open shared object file')", "libcudart.so.99"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
        ("raise SystemExit('no')", "SystemExit: no"),
        ("print('[]'); import no_such_library", "No module named 'no_such_library'"),
    ],
    ids=["not importable", "takes the process down", "ends the process", "lacks a library"],
)
def test_a_torch_that_cannot_be_imported_is_a_row_and_keeps_nothing_else_from_running(
    tmp_path, monkeypatch, code, said
):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = diagnosis.apart(("python", "gpu", "packages"))
    assert (rows[0].check, rows[0].status) == ("python", Status.OK)
    (row,) = [row for row in rows if row.status is Status.FAIL]
    assert said in row.message
    assert "gpu" in row.check
    (row,) = diagnosis.apart(("lmms-eval",))
    assert row.status is Status.FAIL
    assert said in row.message
    assert (rows[-1].check == "packages") == ("SIGSEGV" not in said)


def test_the_command_itself_imports_neither_torch_nor_lmms_eval():
    code = "import sys, lmms_plugin.cli.main, lmms_plugin.doctor.diagnosis; print(*sys.modules)"
    loaded = {name.partition(".")[0] for name in run([sys.executable, "-P", "-c", code], ROOT.parent).split()}
    assert not loaded & {"torch", "transformers", "lmms_eval", "numpy", "datasets", "huggingface_hub", "packaging"}


def test_results_are_never_mixed_with_what_libraries_print(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os; print('[1]'); os.system('echo [2]'); raise OSError('x')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (row,) = diagnosis.apart(("gpu",))
    assert row.message.startswith("OSError: x")


def test_an_installed_version_out_of_bounds_fails_with_the_command_that_mends_it(tmp_path):
    about = tmp_path / "transformers-4.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0\n")
    (row,) = asked("packages", tmp_path, PYTHONPATH=str(tmp_path))
    assert row.status == Status.FAIL
    assert re.match(r"lmms-plugin \S+ needs transformers\S*>=5\.17", row.message)
    assert row.message.endswith("transformers 4.0 is installed")
    assert re.match(r'pip install "transformers.*>=5\.17', row.remedy)


def environment_of(*made):
    return {packages.canonicalize_name(package.name): package for package in made}


def test_bounds_are_followed_through_extras_and_cycles():
    ours = Package("ours", "1.0", ("middle[fast]>=2", "absent; python_version < '3'"))
    middle = Package("Middle", "2.0", ("base<3", "ours", "quick>=5 ; extra == 'fast'", "slow>=5 ; extra == 'slow'"))
    found = packages.unmet(packages.bounds(environment_of(ours, middle, Package("base", "3.1")), "ours"))
    assert found.keys() == {"base", "quick"}
    assert packages.explained(found["base"]) == "Middle 2.0 needs base<3; base 3.1 is installed"
    assert packages.explained(found["quick"]) == "Middle 2.0 needs quick>=5; it is not installed"


def test_the_remedy_is_a_version_that_everybody_allows():
    ours = Package("ours", "1.0", ("a", "base>=1.2,<10"))
    a = Package("a", "1", ("base<3,>=1.10,!=2.0",))
    found = packages.bounds(environment_of(ours, a, Package("base", "3.0")), "ours")
    assert packages.mending("base", found) == 'pip install "base!=2.0,<3,>=1.10"'


@pytest.mark.parametrize(("version", "wanted"), [("2.1.0+cu130", "==2.1.0"), ("3.0rc1", ">=2"), ("2.0.post1", ">=2")])
def test_local_and_prerelease_versions_count_as_pip_counts_them(version, wanted):
    assert packages.fits(version, packages.SpecifierSet(wanted))
    assert not packages.fits(version, packages.SpecifierSet("<1"))
    assert not packages.fits("", packages.SpecifierSet(wanted))


def test_the_lock_is_that_of_this_machine():
    text = (
        "# comment\n--extra-index-url x\na==1.0 ; python_version >= '3'\n    # via ours\n"
        "b==2.0 ; sys_platform == 'never'\nC_d==3.0  # via a\n"
    )
    lock = packages.locked(text)
    assert {name: str(one.specifier) for name, one in lock.items()} == {"a": "==1.0", "c-d": "==3.0"}
    there = environment_of(Package("A", "1.1"), Package("c.d", "3.0"))
    assert packages.compared_with_lock(there, lock) == ["A 1.1 (locked 1.0)"]


def test_the_lock_of_the_repository_can_be_read():
    lock = packages.locked((ROOT / "constraints.txt").read_text())
    assert {"torch", "transformers", "lmms-eval"} <= lock.keys()
    assert all(str(one.specifier).startswith("==") for one in lock.values())
    assert lock == packages.read_lock()


def test_imports_within_functions_are_found_unless_something_catches_them(tmp_path, monkeypatch):
    source = (
        "import os\ndef f():\n    import a.b as c\n    try:\n        import d\n    except ImportError:\n        pass\n"
    )
    (tmp_path / "later.py").write_text(source + "    def g():\n        from e import h\n")
    monkeypatch.syspath_prepend(tmp_path)
    import later

    assert list(map(ast.unparse, imports.late_imports(later))) == ["import a.b as c", "from e import h"]
    with pytest.raises(ModuleNotFoundError, match="No module named 'a'") as failure:
        imports.import_late(later)
    assert (Path(failure.traceback[-1].path), failure.traceback[-1].lineno + 1) == (tmp_path / "later.py", 3)


class Hub(http.server.BaseHTTPRequestHandler):
    """What the hub answers to anybody, and to the one whose token is `right`."""

    def do_GET(self):
        token = self.headers.get("Authorization")
        if self.path.startswith("/api/datasets/") and token is None:
            self.answer(200, {"id": "lmms-lab-encoder/RefCOCOplus", "siblings": [], "tags": []})
        elif self.path.startswith("/api/whoami-v2") and token == "Bearer right":
            self.answer(200, {"type": "user", "name": "somebody", "auth": {}})
        else:
            self.answer(401, {"error": "Invalid user token."})

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        ("right", Status.OK, "of somebody"),
        ("wrong", Status.FAIL, "refuses the token"),
        ("", Status.OK, "there is none"),
    ],
)
def test_token(tmp_path, hub, token, status, said):
    given = {"HF_TOKEN": token, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    reached, row = asked("hub", tmp_path, **given)
    assert (reached.status, row.status) == (Status.OK, status)
    assert said in row.message
    assert "right" not in row.message


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "https://no-such-host.invalid"])
def test_no_network_is_a_warning_that_says_how_to_go_on(tmp_path, endpoint):
    rows = asked("hub", tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    assert [row.status for row in rows] == [Status.WARN, Status.OK]
    assert endpoint in rows[0].message
    assert "HF_HUB_OFFLINE=1" in rows[0].remedy


def test_extras_of_developers_are_not_looked_at():
    assert {"bitsandbytes", "ray"} <= set(optional_libraries.extras())
    assert not {"dev", "docs"} & set(optional_libraries.extras())


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory):
    """An environment with this package in which three libraries of extras are missing, too old and broken."""
    environment = Environment(tmp_path_factory.mktemp("doctor") / "venv")
    source = tmp_path_factory.mktemp("source") / "repository"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=skip)
    environment.install(str(source))
    libraries = environment.folder / "libraries"
    for entry in [*libraries.glob("bitsandbytes*"), *libraries.glob("torchao*"), *libraries.glob("shap*")]:
        entry.unlink()
    for name, version, code in (("torchao", "0.1", ""), ("shap", "99.0", "import numba_of_another_year")):
        (libraries / name).mkdir()
        (libraries / name / "__init__.py").write_text(code)
        about = libraries / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "top_level.txt").write_text(f"{name}\n")
    return environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "status", "said", "remedy"),
    [
        ("bitsandbytes", "warn", "bitsandbytes not installed", 'pip install "lmms-plugin[bitsandbytes]"'),
        ("torchao", "fail", "needs torchao>=0.18; torchao 0.1 is installed", 'pip install "torchao>=0.18"'),
        ("sensitivity", "fail", "No module named 'numba_of_another_year'", "pip install -c"),
        pytest.param(
            *("export", "warn", "none of its libraries is made for Python 3.11", "use another Python"),
            marks=pytest.mark.skipif(sys.version_info >= (3, 12), reason="the library is made for this Python"),
        ),
    ],
)
def test_extras(without_extras, extra, status, said, remedy):
    printed = without_extras.python("-P", "-m", "lmms_plugin.doctor", f"extra {extra}")
    (row,) = rows_of(printed)
    assert row["status"] == status
    assert said in row["message"]
    assert row["remedy"].startswith(remedy)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of half a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails(tmp_path, tiny_disk):
    rows = asked("folders", tmp_path, HF_HOME=str(tiny_disk / "hf"), LMMS_PLUGIN_CACHE="")
    assert [(row.check, row.status) for row in rows[:2]] == [
        ("folder of models", Status.FAIL),
        ("folder of datasets", Status.FAIL),
    ]
    assert "No space left on device" in rows[0].message
    assert "HF_HOME" in rows[0].remedy
    assert not list(tiny_disk.iterdir())


def test_a_folder_where_a_file_lies_fails(tmp_path):
    (tmp_path / "file").touch()
    rows = asked("folders", tmp_path, HF_HOME=str(tmp_path / "file" / "hf"), TMPDIR=str(tmp_path))
    assert [row.status for row in rows if row.check != "folder of temporary files"] == [Status.FAIL] * 3


def test_a_file_in_place_of_the_home_of_hugging_face_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").touch()
    rows = asked("folders", tmp_path, HF_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path))
    failures = [row for row in rows if row.status == Status.FAIL]
    assert [row.check for row in failures] == ["folder of models", "folder of datasets", "folder of calibrations"]
    assert all(f"{tmp_path}/file is a file, no folder" in row.message and row.remedy for row in failures)
    (row,) = asked("hub", tmp_path, HF_HOME=str(tmp_path / "file"))
    assert row.status == Status.FAIL
    assert f"{tmp_path}/file/token cannot be read: Not a directory" in row.message
    assert "HF_HOME" in row.remedy


def test_a_home_folder_of_nobody_fails_and_keeps_nothing_else_from_being_looked_at(tmp_path):
    rows = asked("folders", tmp_path, LMMS_PLUGIN_CACHE="~nosuchuser/y")
    (row,) = [row for row in rows if row.status == Status.FAIL]
    assert row.check == "folder of calibrations"
    assert "LMMS_PLUGIN_CACHE=~nosuchuser/y: expected a folder, but ~nosuchuser has no home folder here" in row.message
    assert "LMMS_PLUGIN_CACHE" in row.remedy
    assert rows[-1].check == "folder of temporary files"


def test_little_space_is_a_warning(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=places.GIB // 2))
    row = places.written("models", tmp_path / "not" / "yet", places.GIB, "clean up")
    assert (row.status, row.remedy) == (Status.WARN, "clean up")
    assert "0.5 GiB free" in row.message
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def good_copies(tmp_path_factory):
    """Environment that names a good local copy of every dataset."""
    folder = tmp_path_factory.mktemp("copies")
    captions = caption_copies.write(folder / "captions")
    return {
        **natural_copies.write(folder / "natural"),
        **vqa_copies.write(folder / "vqa"),
        **captions,
        "LMMS_PLUGIN_COCO_CAPTION2017": captions["LMMS_PLUGIN_COCO_CAPTION2014"],
        "LMMS_PLUGIN_REFCOCOPLUS_REVIEWED": str(natural_copies.write_reviewed(folder / "reviewed")),
        "LMMS_PLUGIN_COCO_INSTANCES": str(natural_copies.write_instances(folder / "instances")),
    }


def checked(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return list(local_datasets.check_copies())


def test_good_copies_of_every_dataset_are_good(monkeypatch, good_copies):
    rows = checked(monkeypatch, good_copies)
    assert len(rows) == len(good_copies)
    assert good_copies.keys() == local_datasets.known().keys()
    assert [row for row in rows if row.status is Status.FAIL] == []
    warned = {row.message.split("=")[0]: row.message for row in rows if row.status is Status.WARN}
    assert warned == {}


def test_of_a_large_copy_rows_from_all_over_it_are_read(monkeypatch, good_copies):
    monkeypatch.setattr(local_datasets, "WHOLE", 0)
    monkeypatch.setattr(local_datasets, "ROWS", 2)
    rows = checked(monkeypatch, {"LMMS_PLUGIN_VQAV2": good_copies["LMMS_PLUGIN_VQAV2"]})
    assert [row.status for row in rows] == [Status.OK]
    assert "2 of 120 rows looked at" in rows[0].message


@pytest.mark.parametrize(
    ("column", "change", "said"),
    [
        ("bbox", lambda rows: rows.rename_column("bbox", "box"), "column 'bbox' is missing"),
        ("answer", lambda rows: rows.map(lambda row: {"answer": "one"}), "column 'answer': expected a list of strings"),
        ("bbox", lambda rows: rows.map(lambda row: {"bbox": [1, 2, 0, 0]}), "column 'bbox'"),
    ],
    ids=["missing", "of another type", "a box without size"],
)
def test_a_copy_with_a_wrong_column_fails_and_names_it(tmp_path, monkeypatch, column, change, said):
    folder = photographs.write(tmp_path / "copy")
    rows = photographs.rows("testB")
    if said.startswith("column 'answer'"):
        rows = rows.remove_columns("answer").add_column("answer", ["one"] * len(rows))
    else:
        rows = change(rows)
    rows.to_parquet(folder / "testB-00000-of-00001.parquet")
    (row,) = checked(monkeypatch, {"LMMS_PLUGIN_REFCOCOPLUS": str(folder)})
    assert row.status == Status.FAIL
    assert f"{folder}: testB: " in row.message
    assert said in row.message


def damaged(row, change):
    """A row of RefCOCO+ that no run gets through."""
    image = row["image"]["bytes"]
    if change == "truncated":
        image = image[: len(image) // 2]
    elif change == "float":
        buffer = io.BytesIO()
        Image.new("F", (512, 512)).save(buffer, "TIFF")
        image = buffer.getvalue()
    box = [5000.0, 5.0, 50.0, 50.0] if change == "outside" else row["bbox"]
    return {**row, "image": None if change == "absent" else {"bytes": image, "path": None}, "bbox": box}


@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("truncated", "column 'image' cannot be decoded: image file is truncated"),
        ("float", "column 'image' cannot be decoded: expected an image of integers, got mode F"),
        ("absent", "column 'image' is empty"),
        ("outside", r"column 'bbox': expected \[x, y, width, height\] in pixels inside the"),
    ],
)
def test_a_copy_with_a_row_that_a_run_refuses_fails_and_names_it(tmp_path, monkeypatch, change, said, number):
    rows = photographs.rows("testB").cast_column("image", datasets.Image(decode=False)).to_list()
    rows[number] = damaged(rows[number], change)
    folder = photographs.write(tmp_path / "copy")
    file = folder / "testB-00000-of-00001.parquet"
    datasets.Dataset.from_list(rows, features=photographs.FEATURES).to_parquet(file)
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(folder))
    (row,) = local_datasets.check_copies()
    assert row.status is Status.FAIL
    assert re.match(rf"LMMS_PLUGIN_REFCOCOPLUS={folder}: testB: row {number} \(\S+\): {said}", row.message)
    # It is what the task itself says.
    loaded = datasets.load_dataset("parquet", data_files={"testB": str(file)}, split="testB", cache_dir=tmp_path / "c")
    with pytest.raises(DatasetError) as failure:
        list(ExpressionDocs(loaded))
    assert str(failure.value) == row.message


def test_the_first_and_the_last_image_and_a_sample_are_decoded(monkeypatch, good_copies):
    assert local_datasets.spread(5, 16) == [0, 1, 2, 3, 4]
    chosen = local_datasets.spread(1000, local_datasets.DECODED)
    assert (len(chosen), chosen[0], chosen[-1]) == (16, 0, 999)
    (row,) = checked(monkeypatch, {"LMMS_PLUGIN_VQAV2": good_copies["LMMS_PLUGIN_VQAV2"]})
    assert row.message.endswith("validation: 120 rows, images of 16 documents decoded")


@pytest.mark.parametrize("name", ["LMMS_PLUGIN_REFCOCO", "LMMS_PLUGIN_VIZWIZ", "LMMS_PLUGIN_FLICKR30K"])
def test_copies_in_part_or_with_rows_again_fail_whatever_the_dataset(tmp_path, monkeypatch, good_copies, name):
    folder = shutil.copytree(good_copies[name], tmp_path / "copy")
    split = local_datasets.known()[name][-1].name
    (file,) = folder.rglob(f"{split}*.parquet")
    whole = file.rename(file.with_name(f"{split}-00000-of-00002.parquet"))
    (row,) = checked(monkeypatch, {name: str(folder)})
    assert row.status is Status.FAIL
    assert f"{split}-00001-of-00002.parquet is missing" in row.message
    rows = datasets.Dataset.from_parquet(str(whole), cache_dir=str(tmp_path / "cache"))
    identity = "filename" if "filename" in rows.column_names else "question_id"
    again = rows.cast_column("image", datasets.Image(decode=False)).to_list()
    again = [{**one, identity: f"new-{one[identity]}"} for one in again]
    second = whole.with_name(f"{split}-00001-of-00002.parquet")
    datasets.Dataset.from_list(again, features=rows.features).to_parquet(second)
    (row,) = local_datasets.check_copies()
    assert row.status is Status.FAIL
    assert f"{split}: expected every row once, but of {2 * len(rows)} rows {len(rows)} repeat" in row.message


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
    folder = photographs.write(tmp_path / "copy")
    file = folder / "testA-00000-of-00001.parquet"
    whole = file.read_bytes()
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(folder))
    for content in (b"", whole[: len(whole) // 2], whole[:4] + bytes(len(whole) // 2) + whole[len(whole) // 2 + 4 :]):
        file.write_bytes(content)
        (row,) = local_datasets.check_copies()
        assert row.status is Status.FAIL
        assert str(file) in row.message
        assert "fetch it again" in row.message


def test_a_copy_that_is_not_there_or_of_one_split_only(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(tmp_path / "nowhere"))
    (row,) = local_datasets.check_copies()
    assert (row.status, "there is no such folder" in row.message) == (Status.FAIL, True)
    folder = photographs.write(tmp_path / "copy")
    (folder / "val-00000-of-00001.parquet").unlink()
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLUS", str(folder))
    (row,) = local_datasets.check_copies()
    assert (row.status, row.remedy) == (Status.WARN, "tasks on val cannot run")
    (folder / "testA-00000-of-00001.parquet").write_bytes(b"no parquet")
    (row,) = local_datasets.check_copies()
    assert (row.status, "testA" in row.message) == (Status.FAIL, True)


def test_a_variable_that_nobody_reads_is_a_warning_with_the_nearest_name(monkeypatch):
    monkeypatch.setenv("LMMS_PLUGIN_REFCOCOPLSU", "/data")
    row = next(local_datasets.check_copies())
    assert row.status is Status.WARN
    assert "LMMS_PLUGIN_REFCOCOPLSU" in row.message
    assert "did you mean LMMS_PLUGIN_REFCOCOPLUS?" in row.remedy


def test_the_key_of_a_server_is_a_known_variable_and_is_not_shown(monkeypatch):
    monkeypatch.setenv(variables.API_KEY, "sk-secret")
    rows = list(local_datasets.check_copies())
    assert not any(variables.API_KEY in str(row) or "sk-secret" in str(row) for row in rows)


@pytest.mark.parametrize(
    ("written", "status", "told"),
    [("0:30:60", Status.WARN, "30 images at most"), ("half", Status.FAIL, "expected seed:start:stop")],
)
def test_a_part_of_the_images_is_told(monkeypatch, written, status, told):
    monkeypatch.setenv(variables.IMAGES, written)
    row = next(local_datasets.check_copies())
    assert row.status is status
    assert told in row.message
    assert row.remedy.startswith(f"unset {variables.IMAGES}")


def test_every_variable_of_the_documentation_is_known():
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for text in texts for name in re.findall(r"LMMS_PLUGIN_[A-Z0-9_]+", text.read_text())}
    # The documentation's own example of a dataset that a user adds.
    assert named == {*local_datasets.known(), *variables.OF_NO_DATASET, "LMMS_PLUGIN_WAREHOUSE"}


def test_a_kernel_with_wrong_products_is_a_warning(monkeypatch):
    kind = next(kind for kind in NATIVE_KERNELS if kind.name == "torch CPU int8")
    before = {row.message for row in devices.check_kernels() if row.status is Status.OK}
    assert any("torch CPU int8 gives the dense product" in message for message in before)
    monkeypatch.setattr(kind, "matmul", lambda self, x: torch.zeros(len(x), self.rows, dtype=x.dtype))
    (row,) = [row for row in devices.check_kernels() if row.status is Status.WARN]
    assert "torch CPU int8 is 1 away from the dequantized product for bits 8" in row.message


def test_rows_are_one_line_whatever_libraries_say():
    row = DiagnosisRow("x", Status.FAIL, "several\n  lines", "do\nthis")
    assert row.line() == "fail  x: several lines -> do this"
