"""A collection that is killed at any step goes on to the same bytes; one writer at a time; several processes make what one does."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import tl_codebook as tlc
from tests.tiny import make_host
from tl_codebook.errors import CheckpointError, CheckpointExistsError, ConfigError, DataError
from tl_codebook.store.processes import Processes
from tl_codebook.store.sequences import Place, SequenceSource, open_documents
from tl_codebook.store.writing import LOCK, sole_writer

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = ["w5 w6", "", *(" ".join(f"w{3 + (7 * i + j) % 57}" for j in range(5 + 9 * (i % 4))) for i in range(9)), "", " ".join(["w9"] * 70)]


def host_with_codes(**config):
    model = make_host("native")
    tlc.attach(model, "mlp_out", layers=0, **{"n_codes": 16, "k": 2} | config)
    return model


@pytest.fixture(scope="module")
def model():
    return host_with_codes()


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("tl_codebook.store.collect._WINDOW_TOKENS", 1)  # so four batches make a window: 32 tokens below


def gather(model, dataset, path, **options):
    return tlc.collect_codes(model, dataset, path, **{"progress": False, "context_length": 8, "batch_size": 1} | options)


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """What no ``except Exception`` sees."""


class Killer:
    """Raises at the n-th of the steps by which anything gets onto the disk, before it is done."""

    def __init__(self, at):
        self.at, self.n = at, 0

    def __call__(self, function):
        def step(*args, **kwargs):
            self.n += 1
            if self.n == self.at:
                raise Killed
            return function(*args, **kwargs)

        return step

    def arm(self, patch):
        for module, names in ((os, ("fsync", "replace", "truncate")), (shutil, ("rmtree",))):
            for name in names:
                patch.setattr(module, name, self(getattr(module, name)))
        patch.setattr(pathlib.Path, "mkdir", self(pathlib.Path.mkdir))
        patch.setattr("tl_codebook.store.writing.GrowingStore._append", self(tlc.store.writing.GrowingStore._append))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_codebook.store.collect._WINDOW_TOKENS", 1)
        gather(host_with_codes_once(), TEXTS, folder)
    return folder


_ONE = []


def host_with_codes_once():
    if not _ONE:
        torch.manual_seed(0)
        _ONE.append(host_with_codes())
    return _ONE[0]


def test_a_kill_at_any_step(tmp_path):
    """At every third step twice in a row: the second kill comes while the first is being made up for."""
    model, texts, at, n_killed = host_with_codes_once(), [*TEXTS[:5], "", " ".join(["w9"] * 40)], 0, 0
    expected = listing(gather(model, texts, tmp_path / "whole").path)
    while True:
        at += 1
        folder = tmp_path / str(at)
        with pytest.MonkeyPatch.context() as patch:
            Killer(at).arm(patch)
            try:
                gather(model, iter(texts), folder, resume=True)
            except Killed:
                n_killed += 1
            else:
                break
        if not (folder / "manifest.json").exists():
            with pytest.raises(CheckpointError, match=r"is no folder|is an unfinished collection|holds no manifest.json"):
                tlc.CodeStore(folder)
        if at % 3 == 0:
            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
                Killer(at // 2).arm(patch)
                gather(model, iter(texts), folder, resume=True)
        gather(model, iter(texts), folder, resume=True)
        assert listing(folder) == expected, at
    assert n_killed > 30


def test_a_resumed_collection_does_not_run_what_was_done(model, tmp_path):
    ran = []
    with pytest.MonkeyPatch.context() as patch:
        append = tlc.store.writing.GrowingStore._append

        def third_is_last(self, parts, ends, n_tokens):
            if self.n_tokens > 64:
                raise Killed
            append(self, parts, ends, n_tokens)

        patch.setattr("tl_codebook.store.writing.GrowingStore._append", third_is_last)
        with pytest.raises(Killed):
            gather(model, TEXTS, tmp_path / "store")
    with pytest.raises(CheckpointExistsError, match="holds an unfinished collection already"):
        gather(model, TEXTS, tmp_path / "store")
    with pytest.raises(CheckpointError, match="is an unfinished collection"):
        tlc.CodeStore(tmp_path / "store")
    handle = tlc.sites(model)["blocks.0.hook_mlp_out"].hook_codes.register_forward_hook(lambda m, i, o: ran.append(o.shape[:2].numel()))
    try:
        store = gather(model, TEXTS, tmp_path / "store", resume=True)
        n_ran = sum(ran)
        gather(model, TEXTS, tmp_path / "store", resume=True)  # finished: opened
    finally:
        handle.remove()
    assert 64 <= store.n_tokens - n_ran < 64 + 3 * 40
    assert sum(ran) == n_ran


@pytest.fixture
def unfinished(model, tmp_path):
    folder = tmp_path / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_codebook.store.collect.build_index", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            gather(model, TEXTS, folder)
    return folder


def test_only_the_same_things_are_gone_on_with(model, unfinished):
    before, other = listing(unfinished), host_with_codes()
    with torch.no_grad():
        tlc.sites(other)["blocks.0.hook_mlp_out"].codebook.codes[0, 3, 1] += 1e-3
    cases = [
        ({"context_length": 9}, CheckpointError, "context_length: 8 then, 9 now"),
        ({"n_tokens": 50}, CheckpointError, "n_tokens_asked: None then, 50 now"),
        ({"sites": "L0.mlp_out", "column": "story"}, CheckpointError, "column: text then, story now"),
        ({"model": host_with_codes(n_codes=17)}, CheckpointError, "sites.blocks.0.hook_mlp_out.n_codes: 16 then, 17 now"),
        ({"model": other}, CheckpointError, "codes_sha256.blocks.0.hook_mlp_out: "),
        ({"dataset": ["w5 w7", *TEXTS[1:]]}, DataError, "the dataset is not the one that was being collected"),
        ({"dataset": TEXTS[:-1]}, DataError, "the dataset is not the one"),
        ({"dataset": ["w9"]}, DataError, "the dataset is not the one"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            gather(options.get("model", model), options.get("dataset", TEXTS), unfinished, resume=True, **_plain(options))
        assert listing(unfinished) == before
    assert gather(model, TEXTS, unfinished, resume=True).manifest["complete"]
    with pytest.raises(CheckpointError, match="n_tokens_asked: None then, 50 now"):
        gather(model, TEXTS, unfinished, resume=True, n_tokens=50)


def _plain(options):
    return {key: value for key, value in options.items() if key not in ("model", "dataset")}


def test_another_batch_size_may_go_on(model, unfinished, whole):
    store = gather(model, TEXTS, unfinished, resume=True, batch_size=5)
    assert store.n_tokens == tlc.CodeStore(whole).n_tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("progress.json", b"", "cannot be read as JSON"),
        ("progress.json", b'{"format": "tl_codebook.store.unfinished"}', "cannot be used"),
        ("flags.npy", b"", "flags.npy has 0 bytes, and had"),
        ("ids/L0.mlp_out.npy", None, "L0.mlp_out.npy has 0 bytes, and had"),
    ],
)
def test_an_unfinished_collection_that_is_damaged(model, unfinished, name, content, message):
    if content is None:
        (unfinished / name).unlink()
    else:
        (unfinished / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{message}|holds no store"):
        gather(model, TEXTS, unfinished, resume=True)


def test_nothing_is_written_through_a_link(model, unfinished, tmp_path):
    shutil.move(unfinished / "ids", tmp_path / "outside")
    (unfinished / "ids").symlink_to(tmp_path / "outside")
    before = listing(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=r"is a link to .*, outside"):
        gather(model, TEXTS, unfinished, resume=True)
    gather(model, TEXTS, unfinished, overwrite=True)
    assert listing(tmp_path / "outside") == before
    assert not (unfinished / "ids").is_symlink()


def test_a_full_disk_is_told_and_what_was_collected_kept(model, tmp_path, whole):
    model, calls = host_with_codes_once(), []
    with pytest.MonkeyPatch.context() as patch:
        fsync = os.fsync

        def full(descriptor):
            calls.append(descriptor)
            if len(calls) > 20:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\)"):
            gather(model, TEXTS, tmp_path / "store")
    gather(model, TEXTS, tmp_path / "store", resume=True)
    assert listing(tmp_path / "store") == listing(whole)


# --- one writer ---


def test_a_second_writer_is_refused(model, tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    with sole_writer(folder):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(CheckpointError, match=f"is in use: process {os.getpid()} collects into it"):
                gather(model, TEXTS, folder, **options)
    (folder / LOCK).write_text("99999\n")  # left over by a process that was killed
    assert gather(model, TEXTS, folder).n_tokens > 100
    assert not (folder / LOCK).exists()


def test_the_lock_is_given_back_after_an_error(model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tl_codebook.store.reader.CodeReader.read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gather(model, TEXTS, tmp_path / "store")
    assert gather(model, TEXTS, tmp_path / "store", resume=True).n_tokens > 100


CHILD = """
import os, signal, sys
import torch
import tl_codebook as tlc
from tests.tiny import make_host
from tests.unit.test_store_resume import TEXTS, gather, host_with_codes
from tl_codebook.store import collect, writing
torch.manual_seed(0)
collect._WINDOW_TOKENS = 1
commit, n = writing.GrowingStore.commit, 0
def last_word(self):
    global n
    n += 1
    if n == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(self)
writing.GrowingStore.commit = last_word
gather(host_with_codes(), TEXTS, sys.argv[1])
"""


@pytest.mark.slow
def test_a_real_kill(tmp_path, whole):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    (tmp_path / "store").mkdir()
    for name in (".trial-0a1b2c3d", ".progress.json.77-0a1b2c3d.tmp"):  # of still earlier ones
        (tmp_path / "store" / name).touch()
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "store")], env=environment, cwd=REPOSITORY, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "store" / LOCK).exists()
    gather(host_with_codes_once(), TEXTS, tmp_path / "store", resume=True)
    assert listing(tmp_path / "store") == listing(whole)


# --- where a source stands ---


def source(texts, **options):
    tokenizer = make_host("native").tokenizer
    return SequenceSource(open_documents(texts), **{"length": 8, "tokenizer": tokenizer, "vocabulary": 61, "n_tokens": None} | options)


def test_a_source_goes_on_from_everywhere():
    whole = [row.tolist() for row in source(TEXTS).take(10**6)]
    assert max(map(len, whole)) == 8
    assert [token for row in whole for token in row[1:]] == [int(word[1:]) for text in TEXTS for word in text.split()]
    for n in range(1, 200, 7):
        first = source(TEXTS)
        head = [row.tolist() for row in first.take(n)]
        second = source(TEXTS)
        second.resume(first.place, first.taken)
        assert head + [row.tolist() for row in second.take(10**6)] == whole, n
        assert second.taken == sum(map(len, whole))


def test_a_source_that_has_come_to_its_end():
    first = source(TEXTS, n_tokens=20)
    assert sum(map(len, first.take(10**6))) == 20
    second = source(TEXTS, n_tokens=20)
    second.resume(first.place, first.taken)
    assert second.take(100) == []
    with pytest.raises(DataError, match="its first 3 documents differ"):
        source(TEXTS).resume(Place(2, 1, "0" * 64), 5)


def test_the_number_of_tokens_is_foreseen():
    rows = [[1, *range(3, 3 + n)] for n in (4, 5, 6, 5, 4, 6, 5, 5)]
    ids = source(rows)
    assert ids.expected is None
    ids.take(12)
    assert 40 < ids.expected < 60
    assert source(rows, n_tokens=30).expected == 30
    one = source([" ".join(["w5"] * 100)])
    one.take(1)
    assert 90 <= one.expected <= 110
    assert source(iter(rows)).expected is None


# --- several processes ---


class Together:
    """Threads that behave as the processes of `accelerate launch`."""

    def __init__(self, count):
        self.count, self.here = count, threading.local()
        self.barrier, self.said = threading.Barrier(count, timeout=60), [None] * count

    def current(self, device):
        return Processes(self.here.index, self.count)

    def gathered(self, processes, item):
        self.said[processes.index] = item
        self.barrier.wait()
        found = list(self.said)
        self.barrier.wait()
        return found

    def run(self, work):
        found = [None] * self.count

        def one(index):
            self.here.index = index
            try:
                found[index] = work(index)
            except BaseException as error:
                found[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.fixture
def processes(monkeypatch):
    def several(count):
        together = Together(count)
        monkeypatch.setattr(Processes, "current", together.current)
        monkeypatch.setattr(Processes, "_gathered", lambda self, item: together.gathered(self, item))
        return together

    return several


def models(count):
    found = [host_with_codes() for _ in range(count)]
    books = [tlc.sites(model)["blocks.0.hook_mlp_out"].codebook for model in found]
    one = tlc.sites(host_with_codes_once())["blocks.0.hook_mlp_out"].codebook
    for book in books:
        book.load_state_dict(one.state_dict())
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_write_what_one_does(processes, count, tmp_path, whole):
    hosts = models(count)
    stores = processes(count).run(lambda index: gather(hosts[index], TEXTS, tmp_path / "store"))
    assert all(isinstance(store, tlc.CodeStore) for store in stores), stores
    assert listing(tmp_path / "store") == listing(whole)


def test_of_several_processes_each_is_told_that_one_failed(processes, tmp_path, whole):
    hosts = models(2)
    job = processes(2)
    point = tlc.sites(hosts[1])["blocks.0.hook_mlp_out"]
    handle = point.hook_codes.register_forward_hook(lambda *_: 1 / 0)
    first, second = job.run(lambda index: gather(hosts[index], TEXTS, tmp_path / "store"))
    assert isinstance(second, ZeroDivisionError)
    assert isinstance(first, DataError)
    assert "another process failed" in str(first)
    assert "process 1: division by zero" in str(first)
    handle.remove()
    found = job.run(lambda index: gather(hosts[index], TEXTS, tmp_path / "store"))
    assert all("holds an unfinished collection already" in str(error) for error in found)
    job.run(lambda index: gather(hosts[index], TEXTS, tmp_path / "store", resume=True))
    assert listing(tmp_path / "store") == listing(whole)


def test_another_number_of_processes_does_not_go_on(processes, model, unfinished):
    found = processes(2).run(lambda index: gather(model, TEXTS, unfinished, resume=True))
    assert all("processes: 1 then, 2 now" in str(error) for error in found), found


def test_processes_of_which_accelerate_does_not_know(model, tmp_path, monkeypatch):
    """Each would otherwise collect everything, into the same folder."""
    from types import SimpleNamespace

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: SimpleNamespace(num_processes=1, process_index=0))
    with pytest.raises(ConfigError, match="2 processes were started, and accelerate sees 1 with the model on cpu"):
        gather(model, TEXTS, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_launched_on_two_processes(tmp_path):
    """As `accelerate launch --num_processes 2` starts them."""
    model = host_with_codes()
    tlc.save(model, tmp_path / "model")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    one = tlc.collect_codes(tlc.load(tmp_path / "model"), tmp_path / "a.jsonl", tmp_path / "one", progress=False, context_length=8)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tl_codebook"]
    call = [
        "collect",
        str(tmp_path / "model"),
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "two"),
        "--context_length",
        "8",
        "--device",
        "cpu",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(launch + call, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("open it with tl_codebook.CodeStore") == 1
    assert listing(one.path) == listing(tmp_path / "two")
