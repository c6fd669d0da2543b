"""The storm of ``benchmarks/storm.py`` judges right, can fail, and passes in miniature."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from storm_lib.baseline import Baseline  # noqa: E402
from storm_lib.cases import KINDS, Case, Command, find_cases, make_command, plan_cases  # noqa: E402
from storm_lib.comparison import compare_runs  # noqa: E402
from storm_lib.judge import judge  # noqa: E402
from storm_lib.kills import KillJob, plan_jobs, run_kills  # noqa: E402
from storm_lib.mutations import Worker  # noqa: E402
from storm_lib.processes import marked_processes  # noqa: E402
from storm_lib.results import Result, figures_text, kinds_table, write_block  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

# So many seconds has a command of these tests.
SECONDS = 8.0


@pytest.fixture(scope="module")
def worker():
    with Worker(SECONDS) as started:
        yield started


@pytest.fixture
def judged(worker, tmp_path):
    """Runs Python code in place of a command and gives the judgement."""

    def run(code, **options):
        command = Command("python", [code], ["bad.pth"], **options)
        outcome = worker.run(command, tmp_path)
        return judge(command, outcome, tmp_path, tmp_path / "marker")

    return run


REFUSE = "raise SystemExit('ValueError: MODEL.WEIGHTS is bad.pth, which is cut short; give a whole file')"


class TestJudgement:
    def test_a_refusal_that_names_the_file(self, judged):
        assert judged(REFUSE) == ("refused", "")
        assert judged(REFUSE, must="refuse") == ("refused", "")

    def test_success(self, judged):
        assert judged("print('done')") == ("handled", "")

    @pytest.mark.parametrize(
        "code, reason",
        [
            ("{}['bad.pth']", "traceback: KeyError: 'bad.pth'"),
            ("import os; os.kill(os.getpid(), 11)", "ended by signal 11"),
            ("import time; time.sleep(1000)", "no end after"),
            ("open('marker', 'w').close()", "code of the file ran"),
            ("open('marker', 'w').close(); " + REFUSE, "code of the file ran"),
            ("bytearray(8 * 2**30)", "traceback: MemoryError"),
            ("raise SystemExit('ValueError: it is cut short')", "the message names none of ['bad.pth']"),
            ("raise SystemExit(1)", "status 1 without a message"),
            (
                "import sys; print('WARNING bad.pth', file=sys.stderr); raise SystemExit(1)",
                "status 1 without a message",
            ),
            ("raise SystemExit('bad.pth\\n' * 200)", "a message of 200 lines"),
            ("raise SystemExit(7)", "ended with status 7"),
            ("print('\\x1b]0;storm\\x07')", "a terminal escape in a name was printed raw"),
        ],
    )
    def test_what_fails(self, judged, code, reason):
        verdict, found = judged(code)
        assert verdict == "FAILED" and found.startswith(reason), found

    def test_what_must_be_refused(self, judged):
        verdict, reason = judged("print('loaded')", must="refuse")
        assert (verdict, reason) == ("FAILED", "accepted with status 0: loaded")

    def test_what_must_be_handled(self, judged):
        verdict, reason = judged(REFUSE, must="handle")
        assert verdict == "FAILED" and reason.startswith("refused with status 1: ValueError")

    @pytest.mark.parametrize(
        "text, status, reason",
        [
            ('{"images": ["a.jpg"]}', 0, ""),
            ('{"images": ["a.jpg"]}', 1, ""),
            ('{"images": []}', 1, "record.json does not name ['a.jpg']"),
            ('{"images": ["a.jpg"', 1, "record.json is not there, or not whole: JSONDecodeError"),
        ],
    )
    def test_a_record(self, judged, tmp_path, text, status, reason):
        record = tmp_path / "record.json"
        code = f"open('record.json', 'w').write({text!r}); raise SystemExit({status})"
        found = judged(code, record=str(record), record_names=["a.jpg"], must="handle")
        assert found == ("FAILED" if reason else "handled", reason)

    def test_a_record_that_was_not_written(self, judged, tmp_path):
        verdict, reason = judged("pass", record=str(tmp_path / "record.json"))
        assert verdict == "FAILED" and reason.startswith("record.json is not there")

    def test_a_worker_goes_on_after_every_end(self, judged):
        judged("import os; os.kill(os.getpid(), 9)")
        assert judged("print('done')") == ("handled", "")


# A training that needs a moment: 40 "iterations", checkpoints, a final file. What it does wrong is in its environment.
FAKE = """
import json, os, pathlib, shutil, subprocess, sys, time
wrong = os.environ.get("STORM_TEST_WRONG", "")
output = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
resume, tag = "--resume" in sys.argv, output / "last_checkpoint"
record = open(os.environ["QMIMIC_STORM_RECORD"], "a")
output.mkdir(parents=True, exist_ok=True)
lock = output / "lock"
if lock.exists() and not resume and wrong != "no lock":
    sys.exit(f"ValueError: OUTPUT_DIR is {output}, which another training writes to")
lock.touch()
if resume and wrong == "status":
    sys.exit("ValueError: no way back")
if wrong == "orphan" and not resume and "reference" not in str(output):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
start = int(tag.read_text()) if resume and tag.exists() else 0
record.write(json.dumps({"start": start}) + "\\n")
for iteration in range(start, 40):
    time.sleep(0.01)
    loss = 1.0 / (iteration + 1) + (0.1 if resume and wrong == "losses" else 0.0)
    record.write(json.dumps({"iteration": iteration, "values": {"total_loss": loss.hex()}}) + "\\n")
    record.flush()
    if iteration % 20 == 19 and not (resume and wrong == "rows"):
        with open(output / "metrics.json", "a") as file:
            file.write(json.dumps({"iteration": iteration, "AP": float(iteration)}) + "\\n")
    if iteration % 5 == 4:
        tag.write_text(str(iteration + 1))
final = output.parent.parent / ("other.pth" if resume and wrong == "weights" else "weights.pth")
shutil.copy(final, output / "model_final.pth")
"""

JOB = KillJob(0, 0, 1, ("after a checkpoint's tag",), (False,))
SECOND_WRITER = KillJob(1, 0, 1, has_second_writer=True)


@pytest.fixture
def fake_storm(tmp_path, monkeypatch):
    """Runs jobs on the training above and gives their results."""
    (tmp_path / "kills").mkdir()
    (tmp_path / "fake.py").write_text(FAKE)
    for name, value in (("weights", 1.0), ("other", 2.0)):
        torch.save({"model": {"weight": torch.tensor([value])}}, tmp_path / "kills" / f"{name}.pth")

    def run(wrong, *jobs):
        monkeypatch.setenv("STORM_TEST_WRONG", wrong)
        monkeypatch.setattr("storm_lib.kills._SECONDS_TO_GO", 1.0)
        results = []
        places = (Baseline(tmp_path), tmp_path / "kills", 1)
        run_kills(*places, jobs, 2, lambda text: None, results, script=tmp_path / "fake.py")
        return results

    return run


class TestKills:
    def test_equal_trainings_and_a_second_writer_that_is_refused(self, fake_storm):
        killed, second = fake_storm("", JOB, SECOND_WRITER)
        assert (killed.outcome, killed.reason, killed.kills) == ("equal", "", 1)
        assert (second.outcome, second.reason, second.kills) == ("refused", "", 0)

    @pytest.mark.parametrize(
        "wrong, reason",
        [
            ("losses", "total_loss is"),
            ("rows", "metrics.json has no row of iteration 39"),
            ("weights", "model_final.pth differs from the uninterrupted one in 1 entries: ['/model/weight']"),
            ("status", "--resume ended with status 1: ValueError: no way back"),
            ("orphan", "1 s after the kill at 'after a checkpoint's tag' 1 processes still run"),
        ],
    )
    def test_what_fails(self, fake_storm, wrong, reason):
        (killed,) = fake_storm(wrong, JOB)
        assert killed.outcome == "FAILED" and reason in killed.reason
        assert not marked_processes(f"{os.getpid()}-{JOB.id}-steps")

    def test_a_second_writer_that_is_let_in(self, fake_storm):
        (second,) = fake_storm("no lock", SECOND_WRITER)
        assert second.outcome == "FAILED" and second.reason.startswith("the second training ended with status 0")


class TestComparison:
    @pytest.fixture
    def write(self, tmp_path):
        def write(name, losses, starts=(0,), rows=(), weight=1.0):
            folder = tmp_path / name
            folder.mkdir()
            lines = [{"start": each} for each in starts]
            lines += [{"iteration": i, "values": {"loss": each.hex(), "time": (1.0).hex()}} for i, each in losses]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
            (folder / "metrics.json").write_text("".join(json.dumps(each) + "\n" for each in rows))
            torch.save({"model": {"w": torch.tensor([weight])}}, folder / "model_final.pth")
            return folder, tmp_path / f"{name}.jsonl"

        return write

    LOSSES = [(index, float(index)) for index in range(6)]
    ROWS = [{"iteration": 5, "loss": 2.5, "time": 3.0, "bbox/AP": 7.0}]

    def compared(self, write, losses=LOSSES, rows=ROWS, **options):
        return compare_runs(*write("one", self.LOSSES, rows=self.ROWS), *write("two", losses, rows=rows, **options))

    def test_equal_though_a_part_was_computed_twice(self, write):
        assert self.compared(write, self.LOSSES[:4] + self.LOSSES[2:], starts=(0, 2)) == []

    def test_medians_begin_anew_after_a_resume(self, write):
        rows = [{**self.ROWS[0], "loss": 4.0}]  # of 3, 4, 5
        assert self.compared(write, rows=rows, starts=(0, 3)) == []

    def test_medians_of_no_process(self, write):
        (problem,) = self.compared(write, rows=[{**self.ROWS[0], "loss": 4.0}], starts=(0, 2))
        assert problem == "metrics.json: loss of iteration 5 is 4.0, uninterrupted 2.5"

    def test_an_evaluation_that_differs(self, write):
        (problem,) = self.compared(write, rows=[{**self.ROWS[0], "bbox/AP": 8.0}])
        assert problem == "metrics.json: bbox/AP of iteration 5 is 8.0, uninterrupted 7.0"

    def test_an_evaluation_that_is_lost(self, write):
        (problem,) = self.compared(write, rows=[{"iteration": 5, "loss": 2.5}])
        assert problem == "metrics.json's row of iteration 5 lacks ['bbox/AP']"

    def test_an_iteration_that_was_left_out(self, write):
        assert self.compared(write, self.LOSSES[:5]) == ["iterations [5] were never computed"]

    def test_weights_that_differ_in_the_last_bit(self, write):
        (problem,) = self.compared(write, weight=1.0 + 2**-23)
        assert problem.startswith("model_final.pth differs")


class TestPlan:
    def test_kills_cover_workers_and_processes(self):
        jobs = plan_jobs(1, 24)
        assert sum(len(job.moments) for job in jobs) == 24
        shapes = {(job.workers, job.processes) for job in jobs if job.moments}
        assert shapes == {(0, 1), (2, 1), (0, 2), (2, 2)}
        assert [job.processes for job in jobs if job.has_second_writer] == [1, 2]
        assert jobs == plan_jobs(1, 24) and jobs != plan_jobs(2, 24)

    def test_cases_have_ids_of_their_own(self):
        cases = plan_cases(1000, 1)
        assert len(cases) == len({case.id for case in cases}) == 1000
        assert set(KINDS) == {case.kind for case in cases} and len(KINDS) >= 200
        assert find_cases(cases[-1].id) == [cases[-1]]
        assert find_cases("nothing-0") == find_cases("nothing") == []

    def test_a_sample_where_there_are_fewer_than_kinds(self):
        assert plan_cases(10, 1) == plan_cases(10, 1) != plan_cases(10, 2)
        assert len(set(plan_cases(10, 1))) == 10

    def test_a_seed_makes_the_same_files(self, tmp_path):
        baseline = Baseline(tmp_path)
        baseline.plain.write_text("SEED: 1\nMODEL: {DEVICE: cpu}\n")
        case = Case("config: noise", 3)
        files = []
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            make_command(case, baseline, tmp_path / name, seed)
            files.append((tmp_path / name / "mutated.yaml").read_bytes())
        assert files[0] == files[1] != files[2]


class TestResults:
    RESULTS = [
        Result("a-0", "a: b", "refused"),
        Result("a-1", "a: c", "FAILED", "why"),
        Result("k", "k", "equal", kills=3),
    ]

    def test_table(self):
        table = kinds_table(self.RESULTS, tablefmt="plain").splitlines()
        assert table[0].split() == ["kind", "equal", "refused", "handled", "FAILED"]
        assert table[-1].split() == ["all", "1", "1", "0", "1"]

    def test_block_in_the_docs(self, tmp_path):
        path = tmp_path / "page.md"
        path.write_text("before\n<!-- storm: begin -->\nold\n<!-- storm: end -->\nafter\n")
        write_block(path, figures_text(self.RESULTS, "storm.py", 120.0, {"Python": "3.9"}))
        text = path.read_text()
        assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
        assert "`storm.py`: 3 kills, 2 other cases, 2 minutes." in text

    def test_a_page_without_marks(self, tmp_path):
        path = tmp_path / "page.md"
        path.write_text("nothing")
        with pytest.raises(ValueError, match="lacks the marks"):
            write_block(path, "text")

    def test_the_docs_have_them(self):
        text = (ROOT / "docs" / "reliability.md").read_text()
        assert text.index("<!-- storm: begin -->") < text.index("<!-- storm: end -->")


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "benchmarks" / "storm.py")
    command = [sys.executable, "-W", "ignore", script, "--output", str(folder), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


def processes_of(folder):
    """Command lines of processes that name a folder, or work below it."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command, place = (each / "cmdline").read_bytes().decode(errors="replace"), os.readlink(each / "cwd")
        except OSError:
            continue
        if str(folder) in command or place.startswith(str(folder)):
            found.append(command)
    return found


def test_miniature_storm(tmp_path):
    process = start(
        tmp_path / "storm", "--seed", "1", "--kills", "1", "--mutations", "10", "--json", str(tmp_path / "a.json")
    )
    text, _ = process.communicate()
    assert process.returncode == 0, text
    written = json.loads((tmp_path / "a.json").read_text())
    assert written["kills"] == 1 and written["failed"] == []
    assert [each["outcome"] for each in written["results"]].count("equal") == 1 and len(written["results"]) == 11
    assert not processes_of(tmp_path)


def test_ctrl_c_leaves_nothing_running(tmp_path):
    process = start(tmp_path / "storm", "--only", "kills", "--kills", 2)
    while not list((tmp_path / "storm").glob("kills/*/steps.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    text, _ = process.communicate()
    assert process.returncode == 130 and "stopped before its end" in text, text
    assert not processes_of(tmp_path)


def test_an_unknown_case_is_refused(tmp_path):
    process = start(tmp_path / "storm", "--case", "nothing-0")
    text, _ = process.communicate()
    assert process.returncode == 1 and "has no such case" in text
