"""`recloop plan`: which worker will hold what, and whether memory suffices, before anything starts.

In:  a recipe, an examples folder or a dataset, a number of workers.  Out: tables, parts, bytes a worker, the verdict.
Knows nothing of Ray. Plans as training does (`embeddings/plan.py`), for machines like this one; what a worker takes is
training/needs.py's.
"""

import argparse
from dataclasses import asdict

import torch

from cluster.config import load_recipe
from cluster.dataset import load_dataset
from cluster.errors import ConfigError, EngineError
from cluster.examples import is_examples, load_examples
from cluster.manifest import TWO_STAGE
from cluster.memory import free_memory
from cluster.output import Result, print_result
from embeddings.plan import TablePlan, plan_tables
from embeddings.tables import TablesConfig, device_type
from training.baselines.config import SystemConfig
from training.needs import RAY_BYTES, Job, WorkerNeed, click_job, two_stage_job, worker_need
from training.run import TrainConfig

_UNLIMITED_BYTES = 1 << 60


def run(args: argparse.Namespace) -> Result | None:
    """Plan: the `recloop plan` command. Raises `ConfigError`, after the figures, where memory does not suffice."""
    overrides = [f"train.workers={args.workers}", "train.min_workers=none"] if args.workers else []
    recipe = load_recipe(args.recipe, [*args.overrides, *overrides])
    if (system := recipe.section(SystemConfig).name) != TWO_STAGE:
        raise ConfigError(f"system.name={system}: has no tables to plan; `recloop train` says if memory is too small")
    workers = recipe.section(TrainConfig).workers
    data = str(args.data or args.home.default_dataset)
    if is_examples(data):
        job = click_job(recipe, load_examples(data), workers)
    else:
        job = two_stage_job(recipe, load_dataset(data), workers, args.home)
    report, reason = plan_job(job, recipe.section(TablesConfig), workers, args.machines)
    report = {"recipe": args.recipe, "data": data, **report}
    print_result(report if args.json else readable(report), as_json=args.json)
    if reason:
        raise ConfigError(reason)
    return None


def plan_job(job: Job, tables: TablesConfig, workers: int, machines: int) -> tuple[Result, str]:
    """Return all figures, and why memory does not suffice; empty where it does."""
    if machines > workers:
        raise ConfigError(f"--machines {machines}: more than the {workers} workers; try --machines {workers}")
    device, workers_a_machine = device_type(), -(-workers // machines)
    free = free_memory()
    hbm = torch.cuda.mem_get_info()[0] if device == "cuda" else 0

    def plan(free_bytes: int, hbm_bytes: int) -> TablePlan:
        return plan_tables(
            job.module,
            tables,
            workers=workers,
            workers_a_node=workers_a_machine,
            device=device,
            batch_examples=job.batch_examples,
            pooling=job.pooling,
            free_bytes=free_bytes,
            hbm_bytes=hbm_bytes,
        )

    try:
        planned, is_planned = plan(free, hbm), True
    except EngineError:  # the layout without limits then shows what is too large
        planned, is_planned = plan(_UNLIMITED_BYTES, _UNLIMITED_BYTES), False
    needs = [worker_need(job, planned, worker) for worker in range(workers)]
    by_machine = [
        RAY_BYTES + sum(need.host_bytes for need in needs[first : first + workers_a_machine])
        for first in range(0, workers, workers_a_machine)
    ]
    reason = "" if is_planned else _tables_too_large(needs, tables, device, hbm or free // workers_a_machine)
    reason = reason or _machine_too_small(needs, by_machine, free, workers_a_machine)
    reason = reason or (_gpu_too_small(needs, hbm) if device == "cuda" else "")
    report = {
        "device": device,
        "workers": workers,
        "workers_a_machine": workers_a_machine,
        "machine_needs_bytes": max(by_machine),
        "ray_needs_bytes": RAY_BYTES,
        "machine_free_bytes": free,
        **({"gpu_free_bytes": hbm} if device == "cuda" else {}),
        "fits": not reason,
        "tables": [
            {"table": table.name, "sharding": table.sharding, "rows": table.rows, "dim": table.dim}
            | {"weight_bytes": sum(s.weight_bytes for s in table.shards)}
            | {"optimizer_bytes": sum(s.optimizer_bytes for s in table.shards)}
            for table in planned.tables
        ],
        "parts": [
            {"table": table.name, "worker": s.worker, "first_row": s.first_row, "rows": s.rows}
            | {"first_column": s.first_column, "columns": s.columns, "memory": "host" if s.on_host else "gpu"}
            for table in planned.tables
            for s in table.shards
        ],
        "needs": [asdict(need) | {"total_bytes": need.total_bytes} for need in needs],
    }
    return report, reason


def readable(report: Result) -> Result:
    """Return a report for people: every `x_bytes` as `x`, in units."""

    def shown(name: str, value: object) -> object:
        if isinstance(value, list):
            return [readable(row) for row in value]
        return in_units(value) if name.endswith("_bytes") and isinstance(value, int) else value

    return {name.removesuffix("_bytes"): shown(name, value) for name, value in report.items()}


def in_units(count: int) -> str:
    """Return a count of bytes as text."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{count / (1 << power):,.{2 if power == 30 else 1}f} {unit}"
    return str(count)


def _tables_too_large(needs: list[WorkerNeed], tables: TablesConfig, device: str, free: int) -> str:
    """Say which worker has too much of the tables; the planner found no way to place them."""
    held = [need.weight_bytes + need.optimizer_bytes + need.lookup_bytes for need in needs]
    worker = max(range(len(held)), key=held.__getitem__)
    room = int(free * tables.memory_fraction)
    fixes = ["lower tables.dim or the rows of the largest table", "use more machines or ones with more memory"]
    if sum(held) <= room * len(held) and "column_wise" not in tables.sharding:
        fixes.insert(0, 'split tables by columns: tables.sharding=["table_wise","column_wise"]')
    return (
        f"worker {worker} needs {in_units(held[worker])} for its tables, {in_units(room)} may be filled "
        f"(tables.memory_fraction={tables.memory_fraction} of the {in_units(free)} that each worker's {device} memory "
        f"has free): {'; or '.join(fixes)}"
    )


def _machine_too_small(needs: list[WorkerNeed], by_machine: list[int], free: int, workers_a_machine: int) -> str:
    """Say which machine's workers need more than is free, what of it is most, and what lowers that."""
    machine = max(range(len(by_machine)), key=by_machine.__getitem__)
    if by_machine[machine] <= free:
        return ""
    here = needs[machine * workers_a_machine : (machine + 1) * workers_a_machine]
    worker = max(here, key=lambda need: need.host_bytes)
    fixes = {
        "weight": "lower tables.dim or the rows of the largest table",
        "copy": "lower tables.dim or the rows of the largest table",
        "stream": "lower stream.lanes or stream.shuffle_rows",
        "ids": "lower ids.user_rows or ids.item_rows",
        "process": "use fewer workers",
    }
    largest = max(fixes, key=lambda part: getattr(worker, f"{part}_bytes"))
    workers = f"worker {worker.worker} and Ray need" if len(here) == 1 else f"its {len(here)} workers and Ray need"
    most = "" if len(here) == 1 else f" (most is worker {worker.worker}'s {in_units(worker.host_bytes)})"
    return (
        f"machine {machine}: {workers} {in_units(by_machine[machine])}{most}, {in_units(free)} are free; the largest "
        f"part is {largest}_bytes={in_units(getattr(worker, f'{largest}_bytes'))}: {fixes[largest]}; or spread the "
        "workers over more machines"
    )


def _gpu_too_small(needs: list[WorkerNeed], hbm: int) -> str:
    worker = max(needs, key=lambda need: need.gpu_bytes)
    if worker.gpu_bytes <= hbm:
        return ""
    return (
        f"worker {worker.worker} needs {in_units(worker.gpu_bytes)} of its GPU, {in_units(hbm)} are free: lower "
        "tables.dim or stream.batch_examples; or use more workers"
    )
