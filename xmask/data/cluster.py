"""Processes that work for this one, by Dask: of this machine, or of any cluster of machines.

What travels are names and numbers, so all machines have to see the same folders under the same
paths; the jobs of `xmask.study.travel` bring their files along.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import secrets
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import dask
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    Reschedule,
    Worker,
    WorkerPlugin,
    as_completed,
    get_worker,
)

from xmask import memory

_MOST = 25  # items of one task: enough that a task costs little, and few enough to show progress
_TASKS = 20  # of each worker, where there are few items
# no worker is given a task before it is free, so that tasks begin in their order
_IN_ORDER = {"distributed.scheduler.worker-saturation": 1.0,
             "distributed.scheduler.rootish-taskgroup": 1 << 30,
             "distributed.scheduler.rootish-taskgroup-dependencies": 1 << 30}
_ANSWER = "10s"  # after which a scheduler is not there
_DIED = (
    "workers died one after the other before they did anything, for want of memory or because the "
    "calling script lacks `if __name__ == \"__main__\":`. What is done is kept: run again with "
    "one worker")
_GONE = ("{}: the Dask scheduler is gone, and its workers with it. What is done is kept: start "
         "them again, then give the same command")
_log = logging.getLogger("xmask")


@contextmanager
def open_client(workers: int = 2, scheduler: str = "", cluster: str = "",
                processes: bool = True) -> Iterator[Client]:
    """A Dask client; what it needed is ended with it.

    workers: processes of this machine, or jobs of a cluster.
    scheduler: the address of a Dask scheduler that runs already ("tcp://host:8786"), whose workers
    are taken as they are. cluster: "slurm" submits `workers` jobs, as Dask's configuration says
    (`jobqueue.slurm`). With neither, processes of this machine, which listen on loopback only.
    processes: False makes them threads of this process: for jobs that start processes themselves.
    Raises ValueError, one line, for a scheduler that does not answer, a cluster that is unknown,
    or both.
    """
    if scheduler and cluster:
        raise ValueError("scheduler, cluster: give one of them")
    # a worker that died is our message, not their traceback
    for name in ("distributed", "distributed.client", "bokeh"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if scheduler:
            try:
                client = stack.enter_context(Client(scheduler, timeout=_ANSWER))
            except (OSError, ValueError, MemoryError) as error:  # or something else answers
                raise ValueError(f"--scheduler {scheduler}: no Dask scheduler answers there "
                                 f"({str(error)[:100]}). Start one with `dask scheduler`, or leave "
                                 "the option out to use this machine") from None
        elif cluster:
            made = stack.enter_context(_jobs(cluster))
            made.scale(jobs=workers)
            client = stack.enter_context(Client(made))
        else:
            if os.environ.get("MALLOC_TRIM_THRESHOLD_") == "65536":
                del os.environ["MALLOC_TRIM_THRESHOLD_"]  # left by a cluster of Dask's own
            stack.enter_context(dask.config.set({
                **_IN_ORDER, "logging.distributed": "critical",
                "distributed.nanny.pre-spawn-environ":
                    memory.ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
                "distributed.dashboard.link": "http://127.0.0.1:{port}/status"}))
            made = stack.enter_context(LocalCluster(
                n_workers=workers, threads_per_worker=1, memory_limit=0, processes=processes,
                host="127.0.0.1" if processes else None, dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL))
            client = stack.enter_context(Client(made))
        if importlib.util.find_spec("bokeh"):
            _log.warning("Dask shows the work at %s", client.dashboard_link)
        if not client.nthreads():
            _log.warning("%s: no worker yet; the work begins with the first one",
                         client.scheduler.address)
        yield client


def _jobs(cluster: str) -> Any:
    if cluster != "slurm":
        raise ValueError(f"--cluster {cluster}: unknown; known: slurm")
    if not importlib.util.find_spec("dask_jobqueue"):
        raise ValueError('--cluster slurm needs dask-jobqueue: pip install ".[slurm]" in the '
                         'clone')
    from dask_jobqueue import SLURMCluster
    return SLURMCluster()


def work(client: Client, job: Any, items: Sequence[Any], state: Callable[[], object]
         ) -> Generator[Any]:
    """What `job.run_in_worker(item)` returns for every item, as they are finished.

    job: as of `work_in_order`. Where a worker dies, its items are tried again by another.
    state: what changes whenever some work was done or tried; RuntimeError if workers die again and
    again and it stays as it is.
    """
    threads = sum(client.nthreads().values()) or 1
    each = max(1, min(_MOST, len(items) // (_TASKS * threads)))
    parts = {f"items {k}": (items[k:k + each], ()) for k in range(0, len(items), each)}
    while parts:
        before, lost = state(), {}
        for name, found in work_in_order(client, job, parts):
            if isinstance(found, KilledWorker):
                lost[name] = parts[name]
            elif isinstance(found, Exception):
                raise found
            else:
                yield from found
        if lost and state() == before:
            raise RuntimeError(_DIED)
        parts = lost


def work_in_order(client: Client, job: Any,
                  parts: Mapping[str, tuple[Sequence[Any], Sequence[str]]],
                  retries: int = 0) -> Generator[tuple[str, Any]]:
    """The names of all parts of some work with their results, as they are finished.

    parts: by name, the items of each, and the names of the parts that have to be done before; the
    first ones are begun first. A result is a list of what `job.run_in_worker(item, *results)`
    returns for the items, given the results of the parts before; or an exception, after `retries`
    more tries by any worker, or if workers died over it. What needs it has the same exception.
    job: travels to each worker once; `job.begin()` is called there before its first item, and
    `job.end()` when no more is wanted, maybe during one.
    """
    made = {}
    with carried(client, job) as name:
        for k, (title, (items, before)) in enumerate(parts.items()):
            made[title] = client.submit(_run, name, items, *(made[one] for one in before),
                                        key=f"{title.split()[0]}-{k}-{name}", priority=-k,
                                        retries=retries)
        titles = {future.key: title for title, future in made.items()}
        try:
            for future in as_completed(list(made.values())):
                title = titles[future.key]
                del made[title]  # so that its worker need not keep the result
                yield title, _found(future)
        finally:
            with suppress(OSError):  # a worker that has just died cannot be told
                client.cancel(list(made.values()))


@contextmanager
def carried(client: Client, job: Any) -> Iterator[str]:
    """Bring a job, as of `work_in_order`, to all workers; yields the name by which to `ask`."""
    name = f"xmask-{secrets.token_hex(4)}"  # the end of every task's key
    client.register_plugin(_Carrier(job, name), name=name)
    try:
        try:
            client.run(_open, name)  # what cannot begin is known before anything is tried
        except OSError:
            raise RuntimeError(_DIED) from None
        yield name
    finally:
        if client.status == "running":
            with suppress(OSError):
                client.unregister_worker_plugin(name)


def ask(client: Client, name: str, title: str, item: Any) -> Any:
    """What the job `carried` under this name makes of one item; waits for it.

    title: how Dask's web page calls it. Raises what the job does, and RuntimeError where the
    scheduler is gone.
    """
    if client.status != "running":  # it would wait for ever
        raise _gone(client)
    future = client.submit(_run, name, [item], key=f"{title}-{secrets.token_hex(4)}-{name}")
    found = _found(future)
    if isinstance(found, Exception):
        raise found
    return found[0]


def _found(future: Future) -> Any:
    """A task's result, or the exception that it raised."""
    try:
        found = future.exception() or future.result()
        if isinstance(found, CancelledError):
            raise found
    except (OSError, CancelledError):  # what a task itself raises is a result
        raise _gone(future.client) from None
    return found


def _gone(client: Client) -> RuntimeError:
    return RuntimeError(_GONE.format(client.scheduler.address if client.scheduler else "Dask"))


class _Carrier(WorkerPlugin):
    """Brings the job to every worker, also to those that come later."""

    def __init__(self, job: Any, name: str) -> None:
        self.packed, self.name, self.opened, self.over = pickle.dumps(job), name, None, False

    def setup(self, worker: Worker) -> None:
        self.alone = threading.Lock()  # a worker may have several threads, and a job has one image
        if worker.nanny and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the nanny, which ends it

    def transition(self, key: Any, start: str, finish: str, **_: Any) -> None:
        if (start, finish) == ("executing", "released") and str(key).endswith(self.name):
            self.teardown()  # nobody waits for it any more

    def teardown(self, worker: Worker | None = None) -> None:
        self.over = True  # the one who asked is gone: what is left of a task is for nobody
        if self.opened is not None:
            self.opened.end()

    def job(self) -> Any:
        if self.opened is None:  # within a task, so that an error is told
            opened = pickle.loads(self.packed)
            opened.begin()
            self.opened = opened
        return self.opened


def _open(name: str, dask_worker: Worker) -> None:  # Dask gives it by this name
    with dask_worker.plugins[name].alone:
        dask_worker.plugins[name].job()


def _run(name: str, items: Sequence[Any], *results: Any) -> list[Any]:
    carrier, found = get_worker().plugins[name], []
    with carrier.alone:
        if carrier.over and get_worker().plugins.get(name) is carrier:  # another task was let go
            carrier.opened, carrier.over = None, False
        for item in items:
            if carrier.over:  # Dask brought the job twice, or nobody waits any more
                raise Reschedule
            found.append(carrier.job().run_in_worker(item, *results))
    return found
