"""Threads that compute alone: what they leave as it was, and what they survive."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.unit.test_snap import SELECTIONS, normal
from tl_codebook.snap import cpu, snap, workers

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30  # seconds until something counts as a deadlock


def finished(function):
    """Run a function on a thread of its own; fail if it hangs, raise what it raises, return what it returns."""
    answers = []

    def target():
        try:
            answers.append((function(), None))
        except BaseException as error:
            answers.append((None, error))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it hangs"
    result, error = answers[0]
    if error is not None:
        raise error
    return result


def a_snap(seed=0, selection="residual"):
    x, codes = normal(300, 2, 8, seed=seed), normal(2, 90, 8, seed=seed + 1)
    return cpu.snap(x, codes, 3, "euclidean", selection, "sum")


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 50])
def test_every_task_is_done_once_and_the_threads_of_torch_stay(n_threads, n_workers, threads):
    threads(n_threads)
    done, names = [], set()

    def work(task):
        names.add(threading.current_thread().name)
        done.append(task)
        time.sleep(0.002)

    assert finished(lambda: (workers.run(work, iter(range(20)), n_workers), torch.get_num_threads())[1]) == n_threads
    workers.run(work, range(20, 40), n_workers)
    assert sorted(done) == list(range(40))
    assert torch.get_num_threads() == n_threads
    at_once = min(n_workers, n_threads)
    assert len(names) <= (2 if at_once == 1 else at_once)  # one thread at a time is the caller's own, and there were two callers
    workers.run(work, [], n_workers)
    assert torch.get_num_threads() == n_threads


def test_there_really_are_several(threads):
    threads(2)
    meeting = threading.Barrier(2)
    workers.run(lambda _: meeting.wait(PATIENCE), range(2), 2)  # raises unless two tasks run at the same time


@pytest.mark.parametrize("n_threads", [2, 3])
def test_each_of_them_uses_one_core(n_threads, threads, monkeypatch):
    """Torch looks up how many threads to use when a thread first computes, which is after the pool has started."""
    monkeypatch.setattr(workers, "_pools", {})
    threads(n_threads)
    used = []

    def work(_):
        a = torch.ones(400, 400)
        used.append((torch.get_num_threads(), (a @ a).sum().item(), torch.get_num_threads()))

    workers.run(work, range(8), n_threads)
    assert {(before, after) for before, _, after in used} == {(1, 1)}
    for pool in workers._pools.values():
        pool.shutdown()


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_new_thread_of_torch_has_the_threads_it_would_have_had(n_threads, threads, monkeypatch):
    """What a worker sets for itself is also what torch gives to threads that start later."""
    monkeypatch.setattr(workers, "_pools", {})
    threads(n_threads)
    a_snap()
    assert finished(torch.get_num_threads) == n_threads
    assert torch.get_num_threads() == n_threads
    for pool in workers._pools.values():
        pool.shutdown()


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_an_error_in_a_task_is_raised_and_the_next_tasks_run(n_threads, threads):
    threads(n_threads)

    def work(task):
        if task == 5:
            raise ValueError(f"task {task} has failed")

    for _ in range(3):
        with pytest.raises(ValueError, match="task 5 has failed"):
            workers.run(work, range(10), 3)
        assert torch.get_num_threads() == n_threads
    done = []
    workers.run(done.append, range(10), 3)
    assert sorted(done) == list(range(10))


def test_memory_of_one_thread_is_not_that_of_another(threads):
    threads(2)
    meeting, wrong = threading.Barrier(2), []

    def work(task):
        memory = workers.scratch("a test", (100,), torch.float32)
        memory.fill_(task)
        meeting.wait(PATIENCE)
        wrong.extend(memory[memory != task].tolist())

    workers.run(work, range(2), 2)
    assert not wrong


@pytest.mark.parametrize("shapes", [[(3, 4), (2, 6), (10, 10), (1, 1), (0, 5), (50, 3)]])
def test_scratch_has_the_shape_and_dtype_asked_for(shapes):
    for dtype in (torch.float32, torch.int32, torch.float32):
        for shape in shapes:
            memory = workers.scratch("another test", shape, dtype)
            assert memory.shape == shape
            assert memory.dtype == dtype
            assert memory.is_contiguous()
            memory.fill_(7)


def test_scratch_is_reused():
    first = workers.scratch("a third test", (100, 100), torch.float32)
    assert workers.scratch("a third test", (50, 30), torch.float32).data_ptr() == first.data_ptr()
    assert workers.scratch("a fourth test", (100, 100), torch.float32).data_ptr() != first.data_ptr()


@pytest.mark.parametrize("inference", [True, False])
def test_workers_compute_in_the_mode_of_the_caller(inference, threads):
    threads(2)
    seen = []
    with torch.inference_mode(inference):
        workers.run(lambda _: seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled())), range(8), 2)
    assert set(seen) == {(inference, False)}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_several_threads_of_the_user_at_once(selection, threads):
    threads(2)
    expected = [a_snap(seed, selection) for seed in range(12)]

    def all_of_them():
        with ThreadPoolExecutor(4) as users:
            return list(users.map(lambda seed: a_snap(seed % 12, selection), range(48)))

    for i, (out, ids) in enumerate(finished(all_of_them)):
        assert torch.equal(ids, expected[i % 12][1])
        assert torch.equal(out, expected[i % 12][0])
    assert torch.get_num_threads() == 2


def test_pools_that_are_started_at_the_same_time(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(workers, "_pools", {})
    expected = a_snap()
    meeting = threading.Barrier(4)

    def user(_):
        meeting.wait(PATIENCE)
        return a_snap()

    def all_of_them():
        with ThreadPoolExecutor(4) as users:
            return list(users.map(user, range(4)))

    for out, ids in finished(all_of_them):
        assert torch.equal(ids, expected[1])
        assert torch.equal(out, expected[0])
    for pool in workers._pools.values():
        pool.shutdown()


NESTED = """
import torch
from tests.unit.test_snap_workers import a_snap
from tl_codebook.snap import workers

torch.set_num_threads(2)
expected, results, done = a_snap()[1], [], []
workers.run(lambda _: results.append(a_snap()[1]), range(8), 2)
assert len(results) == 8 and all(torch.equal(ids, expected) for ids in results)
workers.run(lambda task: workers.run(lambda inner: done.append((task, inner)), range(3), 2), range(4), 2)
assert sorted(done) == [(task, inner) for task in range(4) for inner in range(3)]
print("done")
"""


def test_inside_of_a_worker_nothing_waits_for_a_worker():
    """In a process of its own: threads that wait for each other would hold up the end of this one."""
    done = subprocess.run([sys.executable, "-c", NESTED], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.strip() == "done", done.stderr


@pytest.mark.parametrize("n_before", [1, 2])
def test_after_a_fork(n_before, threads):
    """The threads of the parent are gone in a child, such as a worker of a DataLoader."""
    if "fork" not in multiprocessing.get_all_start_methods() or not hasattr(os, "register_at_fork"):
        pytest.skip("this system does not fork")
    threads(n_before)
    expected = a_snap()[1].tolist()  # starts the threads of the parent, where there are two
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(2)
        sender.send([a_snap()[1].tolist(), a_snap(3)[1].tolist()])

    process = context.Process(target=child, daemon=True)
    process.start()
    try:
        assert receiver.poll(PATIENCE), "the child hangs"
        answers = receiver.recv()
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        if process.is_alive():
            process.kill()
    assert answers == [expected, a_snap(3)[1].tolist()]
    threads(2)
    assert a_snap()[1].tolist() == expected  # the parent goes on


def test_training_on_a_thread_of_the_user(threads):
    threads(2)

    def step():
        x, codes = normal(300, 1, 8).requires_grad_(), normal(1, 90, 8, seed=1).requires_grad_()
        out, _ = snap(x, codes, 2)
        out.square().sum().backward()
        return codes.grad

    assert torch.equal(finished(step), step())
