"""Works on several candidates: side by side in slots, and what fails does not sink the others."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import TypeVar

from flows.execute import end_all
from flows.machine import gpus
from schemas.errors import RetryableError, StageError, UserError

T = TypeVar("T")

#: What the stages of a work find in their environment: its share of the machine.
SLOT: ContextVar[dict[str, str] | None] = ContextVar("slot", default=None)


def slots(jobs: int) -> list[dict[str, str]]:
    """The environment of each slot: a share of the cores, and one GPU where there are some.

    One slot alone has the whole machine, and nothing is said to it.
    """
    if jobs == 1:
        return [{}]
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number, _ in enumerate(gpus())]
    if not names:
        return [threads] * jobs
    return [threads | {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} for slot in range(jobs)]


def fan_out(
    works: Mapping[str, Callable[[], T]], jobs: int, failed: Callable[[str, Exception], None]
) -> dict[str, T]:
    """The results by name, in the order of `works`, without those that failed; they are told to
    `failed`. A full disk, an absent server and an interruption are nobody's own, and end all.

    Raises:
        UserError | StageError: every work failed, with what each one met.
    """
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for slot in slots(jobs):
        free.put(slot)

    def in_slot(work: Callable[[], T]) -> T:
        slot = free.get()
        token = SLOT.set(slot)
        try:
            return work()
        finally:
            SLOT.reset(token)
            free.put(slot)

    done: dict[str, T] = {}
    errors: dict[str, Exception] = {}
    with ThreadPoolExecutor(jobs, thread_name_prefix="candidate") as pool:
        # Prefect knows its flow run by a context variable, which each thread must be given.
        running = {
            name: pool.submit(copy_context().run, in_slot, work) for name, work in works.items()
        }
        try:
            for name, future in running.items():
                try:
                    done[name] = future.result()
                except RetryableError:
                    raise
                except (UserError, StageError) as error:
                    errors[name] = error
                    failed(name, error)
        except BaseException:
            # What is under way would else be waited for, however long it takes, and what is
            # between two stages begins another one.
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in running.values()):
                end_all()
                time.sleep(0.1)
            raise
    if errors and not done:
        raise together(errors)
    return done


def together(errors: dict[str, Exception]) -> Exception:
    """Several works' errors as one."""
    if len(errors) == 1:
        return next(iter(errors.values()))
    users = [error for error in errors.values() if isinstance(error, UserError)]
    if len(users) == len(errors):
        return UserError([problem for error in users for problem in error.problems])
    return StageError("\n".join(f"{name}: {error}" for name, error in errors.items()))
