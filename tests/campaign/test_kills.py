"""A run that is killed or stopped at any moment ends with the bits of an uninterrupted one."""

import random
import signal
import time

import pytest

from campaign.harness import STRENGTH, Run, finish, metrics, page, result, strict

SECONDS_TO_STOP = 20.0  # on a busy machine; else about one
LINES = {"mnist": 12, "density": 100, "toy": 12}  # of metrics, of a whole run
MOST_LOST = {"mnist": 2, "density": 20, "toy": 2}  # two checkpoints' lines of metrics


def at_the_start(run, rng):
    """While it imports, reads its flags, takes its folder."""
    time.sleep(rng.uniform(0.0, 1.5))


def in_the_first_epoch(run, rng):
    """While it restores, compiles, takes its first steps."""
    run.until(run.begun)
    time.sleep(rng.uniform(0.0, 3.0))


def in_an_epoch(run, rng):
    first = run.lines() + rng.randint(1, 2)
    run.until(lambda: run.lines() >= first)
    time.sleep(rng.uniform(0.0, 0.15))


def in_a_save(run, rng):
    """While a checkpoint has its temporary name, or just after."""
    first = rng.randint(0, 1)
    run.until(lambda: run.lines() >= first)
    run.until(lambda: any((run.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
    time.sleep(rng.choice([0.0, rng.uniform(0.0, 0.02)]))


def in_the_evaluation(run, rng):
    """While it computes the final figures, draws, writes the summary."""
    run.until(lambda: run.said("test figures") or run.lines() == LINES[run.name])
    time.sleep(rng.uniform(0.0, 2.5))


def moments(rng):
    """Each kind once; the last needs a whole training."""
    training = [at_the_start, in_the_first_epoch, in_an_epoch, in_a_save]
    return [*rng.sample(training, len(training)), in_the_evaluation]


def look(workdir):
    """What stands under a file's real name is whole."""
    metrics(workdir)
    for name in ("config.json", "summary.json"):
        if (workdir / name).exists():
            strict((workdir / name).read_bytes())
    if (workdir / "report.html").exists():
        page(workdir)
    else:
        assert not (workdir / "summary.json").exists()


KILL, TERM = signal.SIGKILL, signal.SIGTERM
CASES = [
    *((name, number, seed) for seed in range(STRENGTH) for name in ("mnist", "toy") for number in (KILL, TERM)),
    *(("density", number, seed) for seed in range(max(1, STRENGTH // 5)) for number in (KILL, TERM)[:STRENGTH]),
]


@pytest.mark.slow
def test_a_density_run_that_is_killed_and_then_told_to_stop_ends_as_the_run_in_one_go(whole, tally, tmp_path):
    for number, status in ((KILL, -KILL), (TERM, 128 + TERM)):
        run = Run("density", tmp_path)
        first = 10 if number == KILL else 40
        assert run.until(lambda run=run, first=first: run.lines() >= first)
        assert run.stop(number) == status
        look(tmp_path)
        tally("density killed, then told to stop", "same end bit for bit")
    finish("density", tmp_path)
    assert result(tmp_path) == whole("density")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number", "seed"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_a_run_stopped_at_any_moment_ends_as_the_run_in_one_go(
    data, whole, tally, tmp_path, monkeypatch, name, number, seed
):
    if (name, number) == ("mnist", KILL):  # killed while it compiles and keeps programs, as a first run is
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    rng = random.Random(f"{name} {seed} {number}")
    workdir, done = tmp_path / "run", 0  # lines of metrics, as far as was told
    stops = []  # [moment, lines computed again after it]

    def follow(run):
        nonlocal done
        first = run.resumed_from()
        if first is not None:
            if stops:
                stops[-1][1] = max(0, done - first)
            done = max(first, run.lines())

    for moment in moments(rng):
        run = Run(name, workdir, *data[name])
        moment(run, rng)
        started = time.monotonic()
        status = run.stop(number)
        follow(run)
        if status == 0:  # it was the quicker one
            continue
        assert time.monotonic() - started < SECONDS_TO_STOP
        if number == TERM and (status > 0 or run.begun()):
            assert status == 143
            assert run.said("run the same command again to resume")
        else:
            assert status == -number
        look(workdir)
        stops.append([moment, 0])
    follow(finish(name, workdir, *data[name]))
    assert result(workdir) == whole(name)
    for moment, again in stops:
        # SIGTERM loses nothing; a kill what the checkpoint under way was to hold, and what came since.
        assert again <= (0 if number == TERM else MOST_LOST[name])
        stopped = f"{number.name} {moment.__name__.replace('_', ' ')} ({name})"
        tally(stopped, "same end bit for bit", again)


@pytest.mark.slow
def test_one_ctrl_c_saves(data, whole, tally, tmp_path):
    workdir = tmp_path / "run"
    run = Run("mnist", workdir, *data["mnist"])
    assert run.until(lambda: run.lines() == 3)
    assert run.stop(signal.SIGINT) == 130
    assert run.said("Ctrl-C: finishing the step and saving; a second Ctrl-C ends at once")
    assert run.said("run the same command again to resume it from there")
    done = run.lines()
    assert finish("mnist", workdir, *data["mnist"]).resumed_from() == done
    assert result(workdir) == whole("mnist")
    tally("Ctrl-C once", "saved, 130, same end bit for bit")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tally, tmp_path):
    run = Run("density", tmp_path, "--batch_size=100000", "--steps=1000000")  # a line takes minutes, a step 10 ms
    assert run.until(run.begun)
    time.sleep(6.0)  # it compiles, then trains
    run.process.send_signal(signal.SIGINT)
    assert run.until(lambda: run.said("finishing the step"))
    started = time.monotonic()
    assert run.stop(signal.SIGINT) == 130
    assert time.monotonic() - started < 0.9  # a call to the device takes a second
    assert run.said("stopped at once")
    tally("Ctrl-C twice", "ended at once, 130")
