"""Search for compressed models of a task on a target: what a user calls, and what a worker process runs."""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from autocompress.core.errors import InputError, RunError, StageError, unknown
from autocompress.core.front import Limits, parse_objectives
from autocompress.core.profile import Profile
from autocompress.core.recipe import Plan
from autocompress.core.space import SpaceRules
from autocompress.device.hosts import LOCAL, open_host, parse_hosts
from autocompress.loop import Budget, CandidateEvaluator, Session, require_fp32
from autocompress.place import check_kind, check_runtime, placed
from autocompress.progress import Progress, Silent, open_progress
from autocompress.run import Fidelity, Run, RunConfig, Sampler, library_versions, open_run, refuse_existing, utc_now
from autocompress.signals import Interrupted, Signals
from autocompress.warm import take_over
from autocompress.workers import PARENT_VARIABLE, Workers

if TYPE_CHECKING:
    from autocompress.optimize.study import Study
    from autocompress.task import CheckedTask, Task

__all__ = ["Interrupted", "search", "worker"]

RECOVERS = "fitted"  # the recipe of a search with recovery, where nothing else is said
# What a resumed search must share with its run: trials made under other terms are not comparable.
TERMS = ("task_name", "profile", "rules", "objectives", "limits", "fidelity", "recover_steps")


def search(
    task: "Task | str",
    target: Profile | Path | str,
    *,
    space: SpaceRules | Path | str = "default",
    recipe: Plan | Path | str | None = None,
    trials: int | None = 100,
    timeout: float | None = None,
    objectives: Sequence[str] = ("accuracy", "latency"),
    limits: Limits | None = None,
    fidelity: Fidelity = "oneshot",
    recover_steps: int = 0,
    sampler: Sampler = "surrogate",
    warm_start: Run | Path | str | None = None,
    around: Sequence[int] = (),
    storage: str | None = None,
    study: str | None = None,
    workers: int = 1,
    on: str | None = None,
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    progress: Progress | bool | None = None,
) -> Run:
    """Search until the budget is spent, measure the front again, and return the run.

    The fp32 model and the runtime's own uniform INT8 are trials 0 and 1; every finished trial is durable at once.
    SIGINT (Ctrl-C) and SIGTERM abandon the evaluation that is running, keep everything finished, skip the last
    measuring of the front, and raise Interrupted, which carries the run; a second signal ends the process at once.

    Args:
        task: a Task, or a reference to one (built-in name, `file.py`, `file.py:name`, `module:name`).
        target: a profile, its name or its file.
        space: search-space rules, their name or file.
        recipe: how every candidate is made, its name or file; default is what the space lists.
        trials: trials in the record at which to end, baselines and failures counted; None where only time ends it.
        timeout: seconds for all of it. No trial is begun that cannot end in time for the last measuring of the front;
            what of that takes longer than its fifth of the time comes on top.
        objectives: accuracy, latency, and optionally size, memory, energy.
        limits: steer the search towards what meets them; the front holds the rest too.
        fidelity: with `recover` candidates climb a ladder: as made, after a short recovery, after a full one; the front
            holds fully recovered ones.
        recover_steps: training steps of a full recovery; 0 lets `timeout` decide.
        sampler: what proposes candidates: "surrogate", or for comparison "nsga2", "tpe" or "random".
        warm_start: an earlier run of the same task, for another target say: its weights are not trained again, and
            its candidates are tried first.
        around: numbers of trials of that run; with them the search begins with these, and without uniform policies.
        storage: database URL for the record; default is SQLite in the run. It is kept in run.json as given.
        study: name in the storage; default is the run's directory name.
        workers: processes that share the search on this machine; more than one needs `task` as a reference.
        on: where the device is: `local`, `ssh:user@host[:port]` or `adb:SERIAL`, or several devices of one kind with
            commas between them, each of which gets a process of its own; default is where the profile says it is.
        seed: of sampling.
        out: directory of the run; default is runs/<task>-<target>-<UTC time>.
        resume: continue the run in `out` under the same terms.
        progress: True shows it on stderr; an object of one's own is told; default is silence.

    Raises:
        InputError: bad arguments, or a task, profile, space or run that is not what it must be.
        TargetError: target or runtime is not usable here, or fp32 fails on it.
        Interrupted: stopped by a signal.
    """
    from autocompress.config import load_profile, load_recipe, load_space
    from autocompress.task import check_task, digest_of, load_task

    _check_arguments(trials, timeout, workers, fidelity, recover_steps, sampler)
    _check_out(out, resume)
    parse_objectives(objectives)
    profile = target if isinstance(target, Profile) else load_profile(str(target))
    if on is None and resume and out is not None:
        on = open_run(out).config.profile.host
    profile = placed(profile, on)
    hosts = parse_hosts(profile.host)
    workers = max(workers, len(hosts))
    rules = space if isinstance(space, SpaceRules) else load_space(str(space))
    if recipe is not None:
        plan = recipe if isinstance(recipe, Plan) else load_recipe(str(recipe))
        rules = dataclasses.replace(rules, recipes=(plan,))
    elif fidelity == "recover" and not rules.recipes:
        rules = dataclasses.replace(rules, recipes=(load_recipe(RECOVERS),))
    reference = task if isinstance(task, str) else None
    if workers > 1 and reference is None:
        raise InputError("workers > 1 needs the task as a reference, such as 'task.py': each process loads it anew")
    check_runtime(profile)
    checked = check_task(load_task(task) if isinstance(task, str) else task)
    earlier = None if warm_start is None else warm_start if isinstance(warm_start, Run) else open_run(warm_start)
    if out is None:
        out = Path("runs") / f"{checked.task.name}-{profile.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    config = RunConfig(
        task=reference,
        task_name=checked.task.name,
        profile=profile,
        rules=rules,
        objectives=tuple(objectives),
        limits=limits or Limits(),
        fidelity=fidelity,
        recover_steps=recover_steps,
        seed=seed,
        trials=trials,
        timeout_s=timeout,
        storage=storage,
        study=study or Path(out).resolve().name,
        versions=library_versions(),
        created=utc_now(),
        sampler=sampler,
        warm_start=None if earlier is None else str(earlier.path),
        around=tuple(around),
        model=digest_of(checked.model),
    )
    if around and earlier is None:
        raise InputError("`around` names trials of an earlier run: give it as `warm_start`")
    run = _resumed(out, config) if resume else _created(out, config)
    if earlier is not None and not resume:
        take_over(run, earlier)
    shown = open_progress() if progress is True else progress or Silent()
    started = time.monotonic()
    share_cores(workers)
    budget = Budget(trials=trials, deadline=math.inf if timeout is None else started + timeout)
    try:
        with run.lock(), Signals().installed() as signals:
            shown.stage(f"preparing {run.config.task_name} for {profile.name}")
            with _evaluator(checked, run, hosts[0], shown) as evaluator:
                for what, why in evaluator.space.dropped.items():
                    shown.note(f"not searched: {what}: {why}")
                conduct(
                    evaluator,
                    run,
                    budget=budget,
                    progress=shown,
                    signals=signals,
                    workers=workers,
                    hosts=hosts,
                    started=started,
                )
    except Interrupted as stop:
        stop.run = run
        raise
    finally:
        shown.close()
    return run


def conduct(
    evaluator: CandidateEvaluator,
    run: Run,
    *,
    budget: Budget,
    progress: Progress,
    signals: Signals,
    workers: int = 1,
    hosts: Sequence[str] = (LOCAL,),
    started: float | None = None,
) -> None:
    """A whole search with an evaluator that is ready: baselines, exploration by all workers, the front again."""
    with _open_study(evaluator, run, offset=0) as study:
        session = Session(evaluator, run, study, budget=budget, progress=progress, signals=signals, started=started)
        run.log("run_started", trials=budget.trials, workers=workers, known=len(study), versions=library_versions())
        try:
            session.baselines()
            session.keep_time()
            session.decide_steps(workers)
            session.feel_out(workers)
            with Workers(run, workers - 1, session.budget, hosts) as others:
                reason = session.explore(session.seeds()[::workers], others.check)
                others.join()
            if run.final() is None:
                _finalise(session, run, progress)
        except Interrupted as stop:
            session.ended(f"{stop}; the front was not measured again")
            raise
        session.ended(reason)


def _finalise(session: Session, run: Run, progress: Progress) -> None:
    """A file that cannot be measured again must not cost the search: its front then stands as it was found."""
    try:
        session.finalise()
    except StageError as error:
        run.log("not_finalised", stage=error.stage, message=str(error))
        progress.stage(f"the front could not be measured again, it stands as found: {error}")


def worker(
    storage: str,
    study: str,
    *,
    index: int | None = None,
    of: int = 1,
    trials: int | None = None,
    timeout: float | None = None,
    on: str | None = None,
) -> Run:
    """Join the search whose record is `study` in `storage`: it says where its run is. Ends with the budget.

    Args:
        index, of: this is worker `index` of `of` that divide the seeds; None takes none of them.
        trials, timeout: budget; default is the run's own number of trials, and no time.
        on: where the device is; default is the run's.

    Raises:
        RunError: there is no such study, or its run is not reachable from here, or it has no fp32 baseline yet.
        Interrupted: stopped by a signal.
    """
    from autocompress.optimize.record import read_attributes
    from autocompress.task import check_task, load_task

    attributes = read_attributes(storage, study)
    if "run" not in attributes:
        raise RunError(f"the study {study!r} names no run: it was not made by `autocompress search`")
    run = open_run(attributes["run"])
    if run.config.task is None:
        raise RunError(f"{run.path} was started in Python with a Task, not a reference: no other process can load it")
    parent = os.environ.get(PARENT_VARIABLE)
    budget = Budget(
        trials=run.config.trials if trials is None else trials,
        deadline=math.inf if timeout is None else time.monotonic() + timeout,
        parent=None if parent is None else int(parent),
    )
    try:
        task, where = check_task(load_task(run.config.task)), parse_hosts(on or run.config.profile.host)[0]
        share_cores(of)
        with Signals().installed() as signals, _evaluator(task, run, where) as evaluator:
            contribute(evaluator, run, budget=budget, signals=signals, index=index, of=of)
    except Interrupted as stop:
        stop.run = run
        raise
    return run


def contribute(
    evaluator: CandidateEvaluator, run: Run, *, budget: Budget, signals: Signals, index: int | None, of: int
) -> None:
    """A worker's part with an evaluator that is ready: its share of the seeds, then what the study proposes."""
    with _open_study(evaluator, run, offset=os.getpid() if index is None else index) as study:
        require_fp32(study)
        session = Session(evaluator, run, study, budget=budget, progress=Silent(), signals=signals)
        try:
            session.ended(session.explore([] if index is None else session.seeds()[index::of]))
        except Interrupted as stop:
            session.ended(str(stop))
            raise


def share_cores(workers: int) -> None:
    """Let each of so many processes train on its share of the processor's cores."""
    if workers > 1:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@contextlib.contextmanager
def _evaluator(
    task: "CheckedTask", run: Run, on: str, progress: Progress | None = None
) -> Iterator[CandidateEvaluator]:
    from autocompress.evaluate import Evaluator

    config = run.config
    with open_host(on, config.profile) as host:
        known = next((t.measurement for t in run.trials() if t.measurement is not None), None)
        if on != LOCAL and known is not None:
            check_kind(on, host.fingerprint(), known.fingerprint)
        yield Evaluator(task, run, config.profile, config.rules, host, progress or Silent())


def _open_study(evaluator: CandidateEvaluator, run: Run, *, offset: int) -> "Study":
    from autocompress.optimize.study import Study

    space, config = evaluator.space, run.config
    return Study(
        run.storage,
        config.study,
        config.objectives,
        space.variables,
        digest=lambda values: space.decode(values).digest,
        seed=config.seed + offset,
        sampler=config.sampler,
        claims=run.path / "claims",
        attributes={"run": str(run.path)},
    )


def _check_arguments(
    trials: int | None, timeout: float | None, workers: int, fidelity: str, recover_steps: int, sampler: str
) -> None:
    if trials is None and timeout is None:
        raise InputError("a search needs an end: give `trials`, `timeout` or both")
    if trials is not None and trials < 1:
        raise InputError(f"`trials` must be at least 1, got {trials}")
    if timeout is not None and not timeout > 0:
        raise InputError(f"`timeout` must be positive seconds, got {timeout}")
    if workers < 1:
        raise InputError(f"`workers` must be at least 1, got {workers}")
    if fidelity not in ("oneshot", "recover"):
        raise InputError(f"`fidelity` must be 'oneshot' or 'recover', got {fidelity!r}")
    if recover_steps < 0:
        raise InputError(f"`recover_steps` must be at least 0, got {recover_steps}")
    if fidelity == "oneshot" and recover_steps:
        raise InputError(f"fidelity 'oneshot' trains nothing: it does not go with {recover_steps} recover steps")
    if fidelity == "recover" and not recover_steps and timeout is None:
        raise InputError("fidelity 'recover' needs `recover_steps`, or a `timeout` that they are divided from")
    if sampler not in get_args(Sampler):
        raise InputError(unknown("sampler", sampler, get_args(Sampler)))


def _check_out(out: Path | str | None, resume: bool) -> None:
    """Say what is wrong with the run before the model is loaded."""
    if resume:
        if out is None:
            raise InputError("`resume` needs `out`: the run to continue")
        open_run(out)
    elif out is not None:
        refuse_existing(out)


def _created(out: Path | str, config: RunConfig) -> Run:
    if config.storage is not None:
        from autocompress.optimize.record import count_trials

        if count_trials(config.storage, config.study):
            raise RunError(f"the storage has a study {config.study!r} already: resume its run, or name another study")
    return Run.create(out, config)


def _resumed(out: Path | str, config: RunConfig) -> Run:
    run = open_run(out)
    if config.storage not in (None, run.config.storage):
        raise RunError(f"{out} has its record elsewhere than in the storage given: leave `storage` out when resuming")
    for name in TERMS:
        before, now = getattr(run.config, name), getattr(config, name)
        if name == "recover_steps" and not now:  # the run has decided
            continue
        if name == "profile":  # the same kind of device may stand elsewhere by now
            now = placed(now, before.host)
        if before != now:
            shown: tuple[Any, Any] = (getattr(before, "name", before), getattr(now, "name", now))
            if shown[0] == shown[1]:
                raise RunError(f"{out} was started with another version of {name.replace('_', ' ')} {shown[0]!r}")
            raise RunError(f"{out} was started with `{name}` = {shown[0]!r}, not {shown[1]!r}: resume it with the same")
    return run
