"""The clock and the log of a run, on a model small enough for a second of training to be many updates."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from t2t_problems import counters, measures, plugin  # noqa: F401
from t2t_problems.budget_hook import BudgetHook, Charge, saver_hook
from t2t_problems.checks import budget_of, check_run
from t2t_problems.hparams import with_budget
from train_large import runlog
from train_large.errors import UserError
from train_large.flops import translation_train_flops
from train_large.sizes import Size

SLEEP = 0.02  # seconds that every update takes


def one_after_a_while(targets):
    time.sleep(SLEEP)
    return np.float32(1)


def model_fn(features, labels, mode):
    """A single weight, whose gradient takes SLEEP seconds to come by."""
    weight = tf.get_variable("weight", [], initializer=tf.ones_initializer())
    features = measures.begin_update(features)
    one = tf.py_func(one_after_a_while, [features["targets"]], tf.float32, stateful=True)
    loss = tf.square(weight * one - 3.0) + 0.0 * tf.reduce_sum(labels)
    train_op = tf.train.GradientDescentOptimizer(0.01).minimize(loss, tf.train.get_or_create_global_step())
    spec = tf.estimator.EstimatorSpec(mode, loss=loss, train_op=train_op)
    measures.end_update(spec)
    return spec


def batches():
    """Three pairs a batch: source sides of 4 word pieces, target sides of 5, of which 2 are no padding."""
    batch = {
        "inputs": tf.ones([3, 4, 1, 1], tf.int32),
        "targets": tf.constant([1, 2, 0, 0, 0] * 3, shape=[3, 5, 1, 1], dtype=tf.int32),
    }
    return tf.data.Dataset.from_tensors((batch, tf.zeros([3]))).repeat()


def training(folder, hparams="", save_every=10, of=model_fn):
    """An Estimator for `folder`, and the hook of its training."""
    config = tf.estimator.RunConfig(
        str(folder), save_checkpoints_steps=save_every, log_step_count_steps=5, keep_checkpoint_max=100
    )
    config.t2t_device_info = {}
    estimator = tf.estimator.Estimator(of, config=config)
    return estimator, BudgetHook(*context(estimator, hparams))


def run(folder, hparams="", save_every=10, hooks=(), max_steps=2000, listeners=()):
    """Train in `folder` by an Estimator, as T2T's trainer does with the hooks of a model. Gives the hook."""
    estimator, hook = training(folder, hparams, save_every)
    all_hooks = [hook, saver_hook(estimator.config, hook), *hooks]
    estimator.train(batches, hooks=all_hooks, max_steps=max_steps, saving_listeners=list(listeners))
    return hook


def context(estimator, hparams):
    values = (
        with_budget(plugin.hparams.transformer.transformer_base())
        .parse("hidden_size=64,filter_size=128,num_heads=1,num_hidden_layers=2")
        .parse(hparams)
    )
    values.problem_hparams = SimpleNamespace(vocab_size={"targets": 50})
    hook_context = SimpleNamespace(estimator=estimator, hparams=values, problem=SimpleNamespace(name="pairs"))
    return hook_context, budget_of(values)


def lines(folder, kind=None):
    return [line for line in runlog.read(str(folder / runlog.NAME)) if kind in (None, line["kind"])]


def test_the_run_stops_within_one_update_of_its_budget(tmp_path):
    run(tmp_path, "budget_seconds=0.5")
    stop = lines(tmp_path, "stop")[0]
    assert stop["reason"] == "budget"
    # Nothing but the updates is charged, so their number follows from what one takes.
    one = stop["train_seconds"] / stop["updates"]
    assert 0.5 <= stop["train_seconds"] < 0.5 + 2 * one
    assert one >= SLEEP
    last = counters.in_checkpoint(counters.latest(str(tmp_path)))
    del last["wall_seconds"]  # that of the saving, a little before
    assert last == {name: stop[name] for name in last}


def test_a_budget_goes_on_where_the_checkpoint_left_it(tmp_path):
    run(tmp_path, "budget_seconds=0.3")
    first = lines(tmp_path, "stop")[-1]
    run(tmp_path, "budget_seconds=0.6")
    second = lines(tmp_path, "stop")[-1]
    resume = lines(tmp_path, "resume")[0]
    assert {name: resume[name] for name in ("updates", "train_seconds", "tokens", "flops")} == {
        name: first[name] for name in ("updates", "train_seconds", "tokens", "flops")
    }
    assert second["updates"] > first["updates"]
    assert 0.6 <= second["train_seconds"] < 0.6 + 3 * second["train_seconds"] / second["updates"]
    assert second["wall_seconds"] > first["wall_seconds"]


def test_a_resumed_run_makes_no_more_updates_than_it_has_time_for(tmp_path):
    run(tmp_path, "budget_seconds=0.3")
    first = lines(tmp_path, "stop")[-1]
    run(tmp_path, f"budget_seconds={first['train_seconds'] + 0.001}")
    assert lines(tmp_path, "stop")[-1]["updates"] == first["updates"] + 1


def test_without_a_saver_it_ends_all_the_same(tmp_path):
    """As on a worker that is not the chief."""
    estimator, hook = training(tmp_path, "budget_seconds=0.2", save_every=None)
    assert saver_hook(estimator.config, hook) is None
    estimator.train(batches, hooks=[hook], max_steps=2000)
    assert lines(tmp_path, "stop")[0]["reason"] == "budget"


def test_nothing_is_trained_when_the_budget_is_used_up(tmp_path):
    run(tmp_path, "budget_seconds=0.3")
    before = lines(tmp_path, "stop")[-1]
    run(tmp_path, "budget_seconds=0.2")
    after = lines(tmp_path, "stop")[-1]
    assert after["reason"] == "budget"
    assert (after["updates"], after["train_seconds"]) == (before["updates"], before["train_seconds"])


def test_saving_can_be_by_shares_of_the_budget(tmp_path):
    run(tmp_path, "budget_seconds=0.6,budget_evaluations=3", save_every=100000)
    at = [line["train_seconds"] for line in lines(tmp_path, "checkpoint")]
    stop = lines(tmp_path, "stop")[0]
    one = stop["train_seconds"] / stop["updates"]
    assert len(at) == 4
    assert at[0] == 0
    assert all(0 <= seconds - share < 3 * one for seconds, share in zip(at[1:], (0.2, 0.4, 0.6)))


def test_every_share_is_evaluated_whatever_the_throttle(tmp_path):
    evaluated = []

    def train_or_evaluate(features, labels, mode):
        if mode == tf.estimator.ModeKeys.TRAIN:
            return model_fn(features, labels, mode)
        tf.get_variable("weight", [])
        return tf.estimator.EstimatorSpec(mode, loss=tf.reduce_sum(labels))

    class Note(tf.train.SessionRunHook):
        def end(self, session):
            evaluated.append(session.run(tf.train.get_global_step()))

    estimator, hook = training(tmp_path, "budget_seconds=0.6,budget_evaluations=3", of=train_or_evaluate)
    tf.estimator.train_and_evaluate(
        estimator,
        tf.estimator.TrainSpec(batches, max_steps=2000, hooks=[hook, saver_hook(estimator.config, hook)]),
        tf.estimator.EvalSpec(batches, steps=1, hooks=[Note()], start_delay_secs=0, throttle_secs=600),
    )
    assert evaluated == [line["updates"] for line in lines(tmp_path, "checkpoint")][1:]
    assert len(evaluated) == 3


EVALUATING = """
import os, pathlib, signal, sys
sys.path[:0] = {path!r}
import test_budget_hook as tests
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])

class Evaluation(tests.Evaluation):
    def end(self, session):
        if len(self.done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        super().end(session)

class Terminate(tests.tf.train.SessionRunHook):
    calls = 0

    def after_run(self, context, values):
        self.calls += 1
        if self.calls == -number:
            os.kill(os.getpid(), signal.SIGTERM)

tests.evaluate_shares(folder, Evaluation, [Terminate()])
"""


class Evaluation(tf.train.SessionRunHook):
    """Leaves a line in the log, as ScoreHook does."""

    def __init__(self, folder):
        self.path, self.done = str(folder / runlog.NAME), []

    def end(self, session):
        step = int(session.run(tf.train.get_global_step()))
        self.done.append(step)
        runlog.append(self.path, "valid", {**dict.fromkeys(runlog.COUNTERS, 0), "updates": step}, loss=1.0)


def evaluate_shares(folder, kind, hooks=()):
    """Train and evaluate by shares of a budget."""

    def train_or_evaluate(features, labels, mode):
        if mode == tf.estimator.ModeKeys.TRAIN:
            return model_fn(features, labels, mode)
        tf.get_variable("weight", [])
        return tf.estimator.EstimatorSpec(mode, loss=tf.reduce_sum(labels))

    estimator, hook = training(folder, "budget_seconds=0.8,budget_evaluations=4", of=train_or_evaluate)
    evaluation = kind(folder)
    tf.estimator.train_and_evaluate(
        estimator,
        tf.estimator.TrainSpec(batches, max_steps=2000, hooks=[hook, *hooks, saver_hook(estimator.config, hook)]),
        tf.estimator.EvalSpec(batches, steps=1, hooks=[evaluation], start_delay_secs=0, throttle_secs=600),
    )
    return hook, evaluation


def killed(folder, number):
    here = os.path.dirname(os.path.abspath(__file__))
    code = EVALUATING.format(path=[here, os.path.dirname(os.path.dirname(here))])
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder), str(number)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode


@pytest.mark.slow
def test_a_run_killed_within_an_evaluation_begins_with_it(tmp_path):
    assert killed(tmp_path, 1) == -signal.SIGKILL
    assert len(lines(tmp_path, "valid")) == 1
    at = counters.in_checkpoint(counters.latest(str(tmp_path)))["updates"]
    _, evaluation = evaluate_shares(tmp_path, Evaluation)
    assert evaluation.done[0] == at
    assert len(lines(tmp_path, "valid")) == 4
    # Again, with nothing left to do.
    _, evaluation = evaluate_shares(tmp_path, Evaluation)
    assert not set(evaluation.done) - {lines(tmp_path, "stop")[-1]["updates"]}


@pytest.mark.slow
def test_sigterm_does_not_evaluate(tmp_path):
    assert killed(tmp_path, -12) == -signal.SIGTERM
    stop = lines(tmp_path, "stop")[0]
    assert stop["reason"] == "SIGTERM"
    evaluated = [line["updates"] for line in lines(tmp_path, "valid")]
    assert stop["updates"] not in evaluated
    assert counters.in_checkpoint(counters.latest(str(tmp_path)))["updates"] == stop["updates"]


@pytest.mark.parametrize("given", [[], ["--eval_throttle_seconds=0"], ["--eval_throttle_seconds=60"]])
def test_a_throttle_that_was_asked_for_is_refused(tmp_path, monkeypatch, given):
    trainers = flags.FlagValues()
    flags.DEFINE_integer("eval_throttle_seconds", 600, "as T2T's", flag_values=trainers)
    trainers(["trainer", *given])
    monkeypatch.setattr(flags, "FLAGS", trainers)
    training(tmp_path, "budget_seconds=1")
    if "--eval_throttle_seconds=60" not in given:
        training(tmp_path, "budget_seconds=1,budget_evaluations=3")
        return
    with pytest.raises(UserError, match="--eval_throttle_seconds=60 would leave some of that out"):
        training(tmp_path, "budget_seconds=1,budget_evaluations=3")


def test_a_schedule_that_goes_on_after_the_budget_is_refused(tmp_path, monkeypatch, capsys):
    trainers = flags.FlagValues()
    flags.DEFINE_string("schedule", "train_eval_and_decode", "as T2T's", flag_values=trainers)
    trainers(["trainer"])
    monkeypatch.setattr(flags, "FLAGS", trainers)
    estimator, _ = training(tmp_path, "budget_seconds=1")
    with pytest.raises(SystemExit):
        check_run(context(estimator, "budget_seconds=1")[0])
    assert "--schedule=train_eval_and_decode goes on" in capsys.readouterr().err


class Slow(tf.train.CheckpointSaverListener):
    """An evaluation that takes longer than the training."""

    def after_save(self, session, global_step_value):
        time.sleep(0.3)


def test_saving_and_what_comes_with_it_is_not_charged(tmp_path):
    run(tmp_path, "budget_seconds=0.4", save_every=4, listeners=[Slow()])
    stop = lines(tmp_path, "stop")[0]
    saved = len(lines(tmp_path, "checkpoint"))
    assert saved >= 3
    assert stop["updates"] * SLEEP <= stop["train_seconds"] < 0.4 + 2 * stop["train_seconds"] / stop["updates"]
    assert stop["wall_seconds"] - lines(tmp_path, "start")[0]["wall_seconds"] > 0.3 * (saved - 1) + 0.3


def test_waiting_for_data_is_charged(tmp_path, monkeypatch):
    quick = batches

    def wait(value):
        time.sleep(10 * SLEEP)
        return value

    def slow_batches():
        def slowly(features, labels):
            return features, tf.reshape(tf.py_func(wait, [labels], tf.float32, stateful=True), [3])

        return quick().map(slowly)

    monkeypatch.setitem(globals(), "batches", slow_batches)
    run(tmp_path, max_steps=10)
    # Computing alone takes 10 * SLEEP, computing and waiting ten times that; while the session was not yet timed, or
    # between two calls, the input pipeline may have prepared a batch or two in advance.
    assert lines(tmp_path, "stop")[0]["train_seconds"] >= 5 * 10 * SLEEP


def test_the_log_counts_tokens_and_flops(tmp_path):
    hook = run(tmp_path, max_steps=12)
    stop = lines(tmp_path, "stop")[0]
    assert stop["reason"] == "ended"
    assert stop["updates"] == 12
    assert stop["tokens"] == 12 * 6
    assert stop["flops"] == 12 * translation_train_flops(Size(2, 64, 128, 1), 50, 4, 5, 3)
    start = lines(tmp_path, "start")[0]
    expected = {"size": "2l_64h", "ffn": 128, "heads": 1, "parameters": 1, "vocabulary": 50, "problem": "pairs"}
    assert {name: start[name] for name in expected} == expected
    assert start["budget_seconds"] is None
    assert hook.updates == 12


def test_the_log_has_the_mean_loss_between_its_lines(tmp_path):
    run(tmp_path, max_steps=10)
    weight, losses = 1.0, []
    for _ in range(10):
        losses.append((weight - 3.0) ** 2)
        weight -= 0.01 * 2 * (weight - 3.0)
    logged = [(line["updates"], line["loss"]) for line in lines(tmp_path, "train")]
    assert [updates for updates, _ in logged] == [5, 10]
    assert [loss for _, loss in logged] == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5], rel=1e-5)


def test_the_wall_clock_counts_everything(tmp_path):
    run(tmp_path, "budget_clock=wall,budget_seconds=100000", max_steps=3)
    stop = lines(tmp_path, "stop")[0]
    assert stop["wall_seconds"] > stop["train_seconds"] + 0.1  # TensorFlow's own import is in it


def test_a_calibrated_budget_is_a_number_of_updates(tmp_path):
    run(tmp_path, "budget_clock=calibrated,budget_seconds=3.5,budget_seconds_per_update=0.5")
    assert lines(tmp_path, "stop")[0]["updates"] == 7


CHILD = """
import pathlib, sys
sys.path[:0] = {path!r}
import test_budget_hook as tests
tests.run(pathlib.Path(sys.argv[1]), "budget_seconds=60", save_every=10)
"""


def child(folder):
    here = os.path.dirname(os.path.abspath(__file__))
    code = CHILD.format(path=[here, os.path.dirname(os.path.dirname(here))])
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(folder)], stderr=subprocess.DEVNULL)


def wait_for(folder, updates):
    for _ in range(1200):
        time.sleep(0.1)
        log = folder / runlog.NAME
        if log.exists() and any(line["updates"] >= updates for line in runlog.read_all(str(log))):
            return
    raise AssertionError(f"no {updates} updates")


@pytest.mark.slow
def test_sigkill_loses_what_came_after_the_checkpoint_and_no_more(tmp_path):
    process = child(tmp_path)
    wait_for(tmp_path, 25)
    process.kill()
    process.wait()
    kept = counters.in_checkpoint(counters.latest(str(tmp_path)))
    assert kept["updates"] >= 20
    run(tmp_path, "budget_seconds=60", max_steps=kept["updates"] + 4)
    resume, stop = lines(tmp_path, "resume")[0], lines(tmp_path, "stop")[0]
    assert resume["updates"] == kept["updates"]
    assert resume["train_seconds"] == kept["train_seconds"]
    assert stop["tokens"] == 6 * stop["updates"]
    # The wall clock goes on through what was lost.
    lost = [line["wall_seconds"] for line in runlog.read_all(str(tmp_path / runlog.NAME)) if line["kind"] == "train"]
    assert resume["wall_seconds"] >= max(lost[:-1])


@pytest.mark.slow
def test_sigterm_saves_and_does_not_call_it_success(tmp_path):
    process = child(tmp_path)
    wait_for(tmp_path, 15)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    stop = lines(tmp_path, "stop")[0]
    assert stop["reason"] == "SIGTERM"
    assert counters.in_checkpoint(counters.latest(str(tmp_path)))["updates"] == stop["updates"]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_the_first_update_counts_as_the_second(seconds):
    charge = Charge(None)
    assert charge.of(seconds[0]) == 0
    total = sum(charge.of(one) for one in seconds[1:]) + charge.rest()
    assert math.isclose(total, sum(seconds[1:]) + min(seconds[0], seconds[1]))


@given(st.floats(0, 100), st.floats(0, 100))
def test_the_first_update_after_a_resume_counts_as_those_before(usual, seconds):
    charge = Charge(usual)
    assert charge.of(seconds) == min(seconds, usual)
    assert charge.of(seconds) == seconds
    assert charge.rest() == 0


@given(st.floats(0, 100))
def test_an_only_update_counts_as_it_is(seconds):
    charge = Charge(None)
    assert charge.rest() == 0  # as when a session saves before its first update
    assert charge.of(seconds) == 0
    assert charge.rest() == seconds
    assert charge.rest() == 0


def test_fewer_evaluations_than_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="budget_evaluations=-4 is below zero"):
        training(tmp_path, "budget_seconds=1,budget_evaluations=-4")


def test_the_mean_loss_is_of_word_pieces_not_of_batches(tmp_path):
    _, hook = training(tmp_path)
    hook.tokens = hook.flops = hook._loss_sum = hook._loss_tokens = 0
    for tokens, loss in ((6, 1.0), (2, 5.0)):
        hook._count({"tokens": tokens, "loss": loss, "source_length": 4, "target_length": 5, "sentences": 3})
    assert hook._loss_sum / hook._loss_tokens == pytest.approx((6 * 1 + 2 * 5) / 8)


def test_a_session_of_one_update_is_charged(tmp_path):
    """There is no second one to go by."""
    run(tmp_path, max_steps=1)
    stop = lines(tmp_path, "stop")[0]
    assert stop["updates"] == 1
    assert stop["train_seconds"] >= SLEEP


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("budget_evaluations=3", "budget_evaluations needs budget_seconds"),
        ("budget_seconds=1,bleu_sentences=-1", "bleu_sentences=-1 is below zero"),
        ("budget_seconds=0", "budget_seconds=0 leaves no time to train"),
        ("budget_seconds=1,budget_clock=calibrated", "budget_clock=calibrated needs budget_seconds_per_update"),
    ],
)
def test_hparams_that_cannot_be_are_refused(tmp_path, given, words):
    with pytest.raises(UserError, match=words):
        training(tmp_path, given)
