"""What maps work over jobs: processes of this machine, or Ray Data on this machine or a cluster.

Work is plain functions, the same for every engine, and results come in the order of the jobs, whoever is done first. So
what is written of them does not tell which engine it was.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import pickle
import socket
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import cv2

from lib_portrait.errors import PortraitError

ENGINES = ("local", "ray")
ROOT = Path(__file__).resolve().parents[1]
Job = TypeVar("Job")
Result = TypeVar("Result")
# How many results of a process may wait for the writer.
PENDING_PER_PROCESS = 8
# What a step of Ray's takes of a processor, at most: all of them must fit on a single one. Ray would run those that fit
# to their end, over all jobs, before the first of the next, and hold what comes of it.
RAY_CPUS = 0.5
# How often a job is tried again whose worker was killed. What kills every worker, a want of memory, ends the command.
RETRIES = 3
# Seconds in which a cluster's address must answer.
PATIENCE = 5.0


@dataclass(frozen=True)
class Step:
    """One step of the work: a function that can be pickled, of what the step before it gives.

    network: whether networks are behind it. Then it runs in processes that stay, each with networks of its own.
    """

    function: Callable[[Any], Any]
    network: bool = False


class Engine(Protocol):
    def map(self, steps: Sequence[Step], jobs: Sequence[Any], together: int = 1) -> Generator[Any, None, None]:
        """The results of all steps, one after the other, of each job, in the order of the jobs.

        together: how many jobs may go to a worker at once. Raises what the functions raise, and PortraitError where
        workers are killed again and again.
        """
        ...


@dataclass(frozen=True)
class LocalEngine:
    """So many processes of this machine; one is this very process. A job passes through all steps in one process."""

    processes: int = 1

    def map(self, steps: Sequence[Step], jobs: Sequence[Any], together: int = 1) -> Generator[Any, None, None]:
        functions = tuple(step.function for step in steps)
        return ordered_map(functools.partial(_one_after_the_other, functions), jobs, self.processes)


def _one_after_the_other(functions: Sequence[Callable[[Any], Any]], job: Any) -> Any:
    for function in functions:
        job = function(job)
    return job


def ordered_map(
    function: Callable[[Job], Result], jobs: Iterable[Job], processes: int
) -> Generator[Result, None, None]:
    """The function's results in the order of the jobs, computed by that many processes.

    Raises PortraitError when one of them is killed.
    """
    if processes == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_one_thread) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(function, job))
                if len(pending) == PENDING_PER_PROCESS * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise _killed(str(error)) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _killed(reason: str) -> PortraitError:
    return PortraitError(
        "processes",
        f"a process was killed, or did not start ({reason[:200]})",
        "Start the same command again, it goes on where it was; with fewer --processes if memory was short.",
        status_code=500,
    )


def _one_thread() -> None:
    """The processes share the cores already. OpenMP reads its variable when torch is imported, which comes later."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cv2.setNumThreads(1)


def engine_of(name: str, device: str, processes: int | None = None, address: str | None = None) -> Engine:
    """One of ENGINES. processes: None for one, or with Ray as `RayEngine` has it. address: of a cluster of Ray's.

    Raises PortraitError for what makes no sense, or a device that is not there.
    """
    if processes is not None and processes < 1:
        raise PortraitError("processes", f"{processes} was given", "Give 1 or more.")
    gpu = device.startswith("cuda")
    if name == "ray":
        return RayEngine(address, processes, gpu)
    if address is not None:
        raise PortraitError("ray_address", "the engine is not Ray", "Give --engine ray too, or leave it away.")
    if gpu:
        import torch

        if not torch.cuda.is_available():
            raise PortraitError("device", "there is no CUDA GPU here", "Leave --device away.")
    return LocalEngine(processes or 1)


# ---------------------------------------------------------------------------------------------------------------- Ray


@dataclass(frozen=True)
class RayEngine:
    """Ray Data: steps with networks in a pool of actors, others as tasks, which are tried again where one is killed.

    address: of a running cluster, HOST:PORT of its head or "auto" for the one that this machine belongs to; None starts
    one for this command on this machine. processes: how many actors, and for a cluster of its own how many processors;
    None for as many as there are processors, or with `gpu` GPUs. gpu: whether actors share out GPUs.

    Each machine of a cluster needs this very folder with its environment, and the data, all under the same paths.
    """

    address: str | None = None
    processes: int | None = None
    gpu: bool = False

    def map(self, steps: Sequence[Step], jobs: Sequence[Any], together: int = 1) -> Generator[Any, None, None]:
        """As `Engine.map`. Raises PortraitError also where Ray is not installed, or the cluster is not reached."""
        if self.address is not None:
            _reached(self.address)
        ray = _ray()
        with _connected(ray, self.address, self.processes):
            actors, gpus = self._actors(ray)
            pool = ray.data.ActorPoolStrategy(size=min(actors, len(jobs)))
            items = [{"item": pickle.dumps(job)} for job in jobs]
            data = ray.data.from_items(items, override_num_blocks=-(-len(items) // together))
            cpus = min(RAY_CPUS, 1 / len(steps))
            for step in steps:
                with warnings.catch_warnings():
                    # Of retries, what will take the place of `ray_remote_args` says nothing yet; by default there is
                    # no end to them, also where a job kills every worker that takes it.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    data = _mapped(data, step, pool, cpus, gpus)
            try:
                for row in data.iter_rows():
                    result = pickle.loads(row["item"])
                    if isinstance(result, PortraitError):
                        raise result
                    yield result
            except ray.exceptions.RayTaskError:
                raise  # a fault of the code, with its own traceback
            except ray.exceptions.RayError as error:
                cause = error.__cause__ or error
                raise _killed(f"{type(cause).__name__}: {cause}") from error

    def _actors(self, ray: ModuleType) -> tuple[int, float]:
        """How many actors, and how much of a GPU each has."""
        resources = ray.cluster_resources()
        if not self.gpu:
            return self.processes or max(1, int(resources.get("CPU", 1))), 0.0
        gpus = int(resources.get("GPU", 0))
        if not gpus:
            raise PortraitError("device", "Ray has no GPU here", "Give --device cpu, or a cluster's --ray-address.")
        actors = self.processes or gpus
        # Each lies on one GPU whole.
        return actors, 1 / math.ceil(actors / gpus)


def _mapped(data: Any, step: Step, pool: Any, cpus: float, gpus: float) -> Any:
    """The dataset after this step."""
    if not step.network:
        return data.map(_row, fn_args=(step.function,), num_cpus=cpus, num_gpus=0, max_retries=RETRIES)
    return data.map(
        _Actor,
        fn_constructor_args=(step.function,),
        compute=pool,
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )


class _Actor:
    """A step's function in a process that stays."""

    def __init__(self, function: Callable[[Any], Any]):
        self.function = function

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return _row(row, self.function)


def _row(row: dict[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """What Ray Data hands on, a row of one pickled thing, once the function was at it.

    What a user is meant to read goes on as a result: Ray would wrap and log it.
    """
    _one_thread()
    item = pickle.loads(row["item"])
    if not isinstance(item, PortraitError):
        try:
            item = function(item)
        except PortraitError as error:
            item = error
    return {"item": pickle.dumps(item)}


def _ray() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PortraitError(
            "engine",
            f"Ray is not installed ({error})",
            "Run: pip install -r requirements/ray.txt -c requirements/constraints.txt; portrait.py does so by itself "
            "where --engine ray is given.",
        ) from None
    return ray


@contextlib.contextmanager
def _connected(ray: ModuleType, address: str | None, processes: int | None) -> Iterator[None]:
    """Ray, of this process's own or as part of a cluster, as long as it is needed."""
    # Ray would tell its makers that it was started, and users of each actor that can be started again.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    # Workers know nothing of where this process finds its modules.
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    if address is None:
        options |= {"address": "local", "num_cpus": processes or os.cpu_count() or 1, "include_dashboard": False}
    else:
        options |= {"address": address}
    try:
        ray.init(**options)
    except Exception as error:  # Ray answers a foreign or broken cluster with exceptions of many kinds
        where = "Ray does not start here" if address is None else f"the cluster at {address} does not take part"
        raise PortraitError(
            "ray_address" if address else "engine",
            f"{where} ({type(error).__name__}: {str(error)[:200]})",
            "Look whether it runs (ray status), with the Ray and Python of this environment, and whether it asks for a "
            "token (RAY_AUTH_MODE=token)."
            if address
            else "Its own processes must start within seconds: try again when the machine is less busy, or give "
            "--engine local.",
            status_code=500,
        ) from error
    try:
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        yield
    finally:
        ray.shutdown()


def _reached(address: str) -> None:
    """Raises PortraitError where nobody listens at an address HOST:PORT; Ray itself would go on trying for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "//" in address or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise PortraitError(
            "ray_address",
            f"{address!r} was given",
            'Give HOST:PORT of the cluster\'s head, such as 10.0.0.1:6379, on a machine of the cluster, or "auto".',
        )
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except OSError as error:
        raise PortraitError(
            "ray_address",
            f"nobody answers at {address} ({error})",
            "Start the cluster (ray start --head), or give its head's address.",
        ) from None
