"""The folder of a run: another run is refused in one line and leaves nothing; overwriting loses nothing."""

import json
import math
import os
import re
import shlex

import filelock
import pytest
import toy
from html_pages import Page
from matplotlib.figure import Figure
from running import Killed, contents, page_is_of_the_summary, result, start, steps, stop

from planar_vae_jax.runs import folder
from planar_vae_jax.runs._files import RunError
from planar_vae_jax.runs.config import UsageError

pytestmark = pytest.mark.usefixtures("one_step_at_a_time")


# --- Refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed=1"], ["--seed: 0 there, 1 here"]),
        (["--seed=1", "--samples=5"], ["--seed: 0 there, 1 here"]),
        (["--rate=0.2", "--classes=0,1"], ["--rate: 0.1 there, 0.2 here", "--classes: None there, 0,1 here"]),
        (["--samples=5"], ["--samples: 4 there, 5 here", "compute these figures of it by --eval_only"]),
        (["--other"], ["other data: examples from here (CRC-32 00000000) there, examples from here (CRC-32 00000001)"]),
        (["--other_valid"], ["other validation images"]),
        (["--other", "--seed=2"], ["--seed: 0 there", "other data"]),
        (["--resume=never"], ["holds a run already", "--resume=auto"]),
        (["--eval_only", "--rate=0.2"], ["--rate: 0.1 there, 0.2 here"]),
        (["--checkpoint=best"], ["--checkpoint=best needs --eval_only"]),
        (["--overwrite", "--eval_only"], ["--overwrite", "--eval_only"]),
        (["--overwrite", "--resume=always"], ["--overwrite", "--resume=always"]),
        (["--epochs=1"], ["--epochs=1 is less", "epoch 2 and 2 steps (step 10)"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_run_is_refused_with_what_differs(stopped, flags, words, finished):
    if finished:
        start(stopped)
        words = [re.sub("epoch 2 and 2 steps .*", "epoch 3 (step 12)", word) for word in words]
    before = contents(stopped)
    with pytest.raises(UsageError) as caught:
        start(stopped, *flags)
    message = str(caught.value)
    assert "\n" not in message
    assert str(stopped) in message or "needs" in message or "contradicts" in message
    assert all(word in message for word in words), message
    assert ("compute these figures" in message) == (flags == ["--samples=5"])
    assert contents(stopped) == before


def test_another_experiments_folder_is_refused(stopped):
    config = toy.Config(workdir=str(stopped))
    with (
        pytest.raises(UsageError, match=r"another run \(experiments\.toy, not other\)"),
        folder.open_run(config, "other"),
    ):
        pass


def test_a_folder_with_parts_of_a_run_alone_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UsageError, match=r"holds metrics\.jsonl of a run but no config\.json"):
        start(tmp_path)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"flags": 3}', b"\xff"])
def test_a_config_that_cannot_be_read_is_reported_in_a_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        start(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("flag", ["--resume=always", "--eval_only"])
def test_there_must_be_a_run_to_resume(tmp_path, flag):
    with pytest.raises(UsageError, match=rf"{flag} needs a run.*holds none"):
        start(tmp_path / "new" / "run", flag)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://x", "file:///tmp/run"])
def test_a_workdir_elsewhere_is_refused(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(f"--workdir must be a folder of this machine; got '{url}'")):
        start(url)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file", "file/run", "\0", "x" * 300, "loop/run", "\udcff", "~nobody-here/run"])
def test_a_workdir_that_cannot_be_a_folder(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="--workdir must be a folder that can be written") as caught:
        start(where if where.startswith("~") else tmp_path / where)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


# --- One process


def test_a_folder_is_used_by_one_process_and_another_leaves_nothing(tmp_path):
    with folder.open_run(toy.Config(workdir=str(tmp_path / "run")), "toy"):
        before = sorted(os.listdir(tmp_path / "run"))
        for flags in ([], ["--overwrite"]):
            with pytest.raises(UsageError, match=r"--workdir=.* is in use by another process"):
                start(tmp_path / "run", *flags)
        assert sorted(os.listdir(tmp_path / "run")) == before
    start(tmp_path / "run")


def test_where_files_cannot_be_locked_a_run_warns_and_trains(tmp_path, monkeypatch, capsys):
    def acquire(self, **_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    start(tmp_path)
    assert "make sure that no other run uses the folder" in " ".join(capsys.readouterr().err.split())


# --- Overwritten


def test_overwrite_moves_the_old_run_aside(stopped, tmp_path):
    for number in (1, 2):
        before = contents(stopped)
        with pytest.raises(UsageError):  # nothing is moved for a command that is wrong
            start(stopped, "--epochs=1", "--overwrite", "--rate=-1")
        assert contents(stopped) == before
        start(stopped, "--epochs=1", "--overwrite")
        assert contents(tmp_path / f"run.old-{number}") == before
        assert steps(stopped) == [4]


@pytest.mark.parametrize("function", ["_move_aside", "_make", "_locked", "write_json"])
@pytest.mark.parametrize("after", [False, True])
def test_overwriting_killed_at_each_of_its_steps_loses_nothing(stopped, tmp_path, monkeypatch, function, after):
    where = folder.RunFolder if function == "_move_aside" else folder
    original = getattr(where, function)
    nth = {"_make": 2, "_locked": 2}.get(function, 1)  # first for the folder that is there
    calls = 0

    def killed(*args):
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            raise Killed
        value = original(*args)
        if calls == nth:
            raise Killed
        return value

    before = contents(stopped)
    monkeypatch.setattr(where, function, killed)
    with pytest.raises(Killed):
        start(stopped, "--overwrite")
    monkeypatch.undo()
    start(stopped, "--overwrite", "--epochs=1")
    kept = [contents(path) for path in sorted(tmp_path.glob("run.old-*"))]
    assert kept[0] == before
    assert all(set(old) <= {"config.json"} for old in kept[1:])
    assert steps(stopped) == [4]


# --- Its files


def test_figures_and_the_summary_are_whole_or_not_there(tmp_path):
    class Figure:
        def savefig(self, path):
            path.write_text("half")
            raise OSError(28, "No space left on device")

    with folder.open_run(toy.Config(workdir=str(tmp_path)), "toy") as run:
        with pytest.raises(RunError, match=r"a\.png could not be written: No space left on device"):
            run.save_figure("a.png", Figure())
        assert not (tmp_path / "a.png").exists()
        run.finish({"loss": float("nan"), "seconds": run.seconds()})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss"] is None
    assert 0.0 < summary["seconds"] < 60.0


# --- Its page


def test_the_page_is_written_before_the_summary_and_goes_with_it(tmp_path, monkeypatch, whole):
    def killed(path, content):
        if path.name == "summary.json":
            raise Killed
        write(path, content)

    write = folder.write_json
    start(tmp_path)
    stop(tmp_path, 1, "--epochs=4")
    assert not {"summary.json", "report.html"} & set(contents(tmp_path))
    monkeypatch.setattr(folder, "write_json", killed)
    with pytest.raises(Killed):
        start(tmp_path, "--epochs=4")
    monkeypatch.undo()
    assert "report.html" in contents(tmp_path)
    assert "summary.json" not in contents(tmp_path)
    start(tmp_path, "--epochs=4")
    assert result(tmp_path) == whole("--epochs=4")  # asserts that the page is of the summary


@pytest.mark.parametrize("flags", ["", "--rate=0.2 --classes=0,1 --keep=2", "--data=none --other --epochs=2 --seed=7"])
def test_the_command_on_the_page_is_that_of_the_run(tmp_path, flags, capsys):
    workdir = tmp_path / "it's a <run>"
    start(workdir, *flags.split())
    page = (workdir / "report.html").read_text()
    _, words = re.search(r"(<pre class=\"command\">)(.*?)</pre>", page).groups()
    program, file, *arguments = shlex.split(Page(f"<!DOCTYPE html>{words}").text)
    assert (program, file) == ("python", "toy.py")
    assert {f"--workdir={workdir}", *flags.split()} <= set(arguments)
    assert len(arguments) <= len(flags.split()) + 2  # the folder, and the seed
    capsys.readouterr()
    toy.main(arguments)
    assert "is finished" in capsys.readouterr().out


def test_the_page_of_another_checkpoint_says_so(stopped):
    start(stopped, "--eval_only", "--samples=2")
    assert page_is_of_the_summary(stopped / "step-10-samples=2")
    page = Page((stopped / "step-10-samples=2" / "report.html").read_text())
    assert "run, step-10-samples=2" in page.text
    assert "--samples=2" in page.text
    assert not (stopped / "report.html").exists()


def test_the_page_shows_the_pictures_of_this_run_in_their_order(tmp_path):
    (tmp_path / "old.png").write_bytes(b"of somebody else")
    with folder.open_run(toy.Config(workdir=str(tmp_path)), "toy") as run:
        for name in ("b.png", "a.png", "c.svg"):
            figure = Figure()
            figure.suptitle(f"Picture {name}")
            run.save_figure(name, figure)
        run.trained([{"epoch": 1, "loss": 2.5}], best=True)
        run.finish({"seconds": 1.0, "by": {1: {"loss": math.nan}}, "pair": (3, 8)})
    page = Page((tmp_path / "report.html").read_text())
    assert [image["alt"] for image in page.images] == ["Picture b.png", "Picture a.png"]
    assert [page.png(0), page.png(1)] == [(tmp_path / name).read_bytes() for name in ("b.png", "a.png")]
    assert "loss 2.5" in page.text
    assert "pair 3, 8" in page.text
    assert ["1", "-"] in page.rows
    assert f'read_checkpoint(Path("{tmp_path}") / "checkpoints", "best")' in page.text


def test_a_page_that_cannot_be_written_leaves_the_run_unfinished(tmp_path, monkeypatch, whole):
    def full(path, *args, **kwargs):
        if "report" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    write = type(tmp_path).write_text
    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(RunError, match=r"report\.html could not be written: No space left on device"):
        start(tmp_path)
    monkeypatch.undo()
    assert not {"summary.json", "report.html"} & set(contents(tmp_path))
    start(tmp_path)
    assert result(tmp_path) == whole()
