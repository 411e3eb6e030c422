"""`kvfs serve`: a model behind OpenAI's HTTP interface, its KV cache on kvfs.

Owns the command: it checks everything that can be checked before a worker loads weights, starts the workers, routes to them and answers HTTP. This
process computes nothing and needs no torch.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from kvfs.cli import process
from kvfs.cli.cluster_dir import SOCKET_PATH_MAX
from kvfs.cli.context import Options, common_options, console
from kvfs.cli.engine_options import as_arguments, engine_options, model_config, needs_inference
from kvfs.cli.worker_processes import WorkerProcesses
from kvfs.client.locate import locate
from kvfs.common.boundary.world import Boundaries
from kvfs.common.errors import SetupError
from kvfs.common.wire.channel import ChannelPool
from kvfs.common.wire.identity import Identity

READY_S = 30.0
"""For workers elsewhere to answer; those of this command are waited for before."""


@click.command()
@click.argument("model", type=click.Path())
@click.option("--workers", type=click.IntRange(1), default=None, help="Workers that do both prompts and answers. Default: 1.")
@click.option("--prefill", type=click.IntRange(0), default=0, help="Workers for prompts ...")
@click.option("--decode", type=click.IntRange(0), default=0, help="... and for answers; pages go from one to the other through kvfs.")
@click.option("--worker", "remote", multiple=True, metavar="ADDRESS", help="A `kvfs worker` that runs elsewhere (tcp://HOST:PORT); again for more.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: a free one.")
@click.option("--api-key", "api_keys", multiple=True, envvar="KVFS_API_KEY", help="Asked of clients; again for more. Default: $KVFS_API_KEY.")
@click.option("--name", default="", help="What clients call the model. Default: the directory's name.")
@click.option(
    "--log-dir", type=click.Path(file_okay=False), default=None, help="For the workers' logs. Default: a temporary one, kept after a failure."
)
@click.option("--no-disk-cache", is_flag=True, help="Keep no pages on kvfs.")
@engine_options
@common_options
def serve(
    options: Options,
    model: str,
    workers: int | None,
    prefill: int,
    decode: int,
    remote: tuple[str, ...],
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    name: str,
    log_dir: str | None,
    no_disk_cache: bool,
    **engine: Any,
) -> None:
    """Serve the checkpoint MODEL (DeepSeek-V3 architecture, a Hugging Face directory) over HTTP as OpenAI does."""
    needs_inference()
    if bool(prefill) != bool(decode):
        raise click.UsageError("--prefill and --decode go together: a prompt is handed over from one to the other")
    from kvfs.inference.http.config import HttpConfig

    split = ["prefill"] * prefill + ["decode"] * decode
    roles = ["both"] * (workers if workers is not None else 0 if split or remote else 1) + split
    if not no_disk_cache and roles:
        locate(options.cluster_spec())  # a cluster that is not there is said before any weights are read
    http = HttpConfig(host=host, port=port, api_keys=api_keys)
    arguments = [
        str(Path(model).resolve()),
        *as_arguments(engine),
        *(["--no-disk-cache"] if no_disk_cache else ["--cluster", options.cluster_spec()]),
    ]
    process.configure_logging()
    # A socket's path is short (unix(7)), and people may want their logs anywhere.
    sockets = Path(tempfile.mkdtemp(prefix="kvfs-serve-", dir=None if len(tempfile.gettempdir()) < SOCKET_PATH_MAX - 30 else "/tmp"))
    logs = Path(log_dir) if log_dir else sockets
    status = process.EXIT_FAULT
    try:
        logs.mkdir(parents=True, exist_ok=True)
        status = process.run_process(partial(_main, Path(model), name, WorkerProcesses(sockets, logs, roles, arguments), remote, http))
    finally:
        if status == 0 or not any(sockets.glob("*.log")):  # what was said of a failure names a log there
            shutil.rmtree(sockets, ignore_errors=True)
    sys.exit(status)


async def _main(model: Path, name: str, processes: WorkerProcesses, remote: tuple[str, ...], http: Any, ready: process.Ready) -> None:
    from kvfs.inference.http.answers import ServedModel
    from kvfs.inference.http.app import make_app
    from kvfs.inference.http.server import listen
    from kvfs.inference.http.server import serve as serve_http
    from kvfs.inference.http.tokenizer import Tokenizer
    from kvfs.inference.workers.router import Router

    world = Boundaries()
    config = model_config(model)
    tokenizer = await trio.to_thread.run_sync(Tokenizer.load, model)
    listen(http).close()  # a port that is taken, too
    stop, serving = trio.Event(), False
    identity = Identity.of(world.net, cluster_id="", client_id=world.random.bytes(16), role="router")
    addresses = {**processes.addresses, **{f"remote-{number}": (address,) for number, address in enumerate(remote, 1)}}
    async with (
        process.told_to_stop(stop),
        ChannelPool(world.net, world.clock, identity) as pool,
        trio.open_nursery() as nursery,
    ):

        async def end_at_once() -> None:
            """Told so before anything is served. Later, answers under way end before the workers are stopped."""
            await stop.wait()
            if not serving:
                nursery.cancel_scope.cancel()

        nursery.start_soon(end_at_once)
        router = Router(addresses, pool, world.clock, world.random)
        await nursery.start(processes.run)
        nursery.start_soon(router.run)
        with trio.move_on_after(READY_S) as waiting:
            await router.ready()
        if waiting.cancelled_caught:
            silent = ", ".join(worker.addresses[-1] for worker in router.workers.values() if not worker.serving)
            raise SetupError(f"no worker answered at {silent} within {READY_S:g} s: does `kvfs worker --listen` serve there, undrained?")
        models = {worker.status.model for worker in router.workers.values()}
        if len(models) > 1:
            raise SetupError("the workers have different models: each must be started with the same checkpoint")
        served = ServedModel(
            name=name or model.resolve().name,
            tokenizer=tokenizer,
            context_tokens=min(router.context, config.context),
            vocabulary=config.vocabulary,
            created_s=world.clock.wall_ns() // 10**9,
        )
        over = trio.Event()

        async def answer(*, task_status: trio.TaskStatus[str]) -> None:
            await serve_http(make_app(served, router, http, world), http, stop=stop, task_status=task_status)
            over.set()

        url, serving = await nursery.start(answer), True
        console.print(f"{served.name} at {url}/v1 with {len(addresses)} worker{'s' if len(addresses) > 1 else ''}. Ctrl-C stops it.")
        ready({"addresses": [url], "workers": {child.name: child.pid for child in processes.children}})
        await over.wait()
        nursery.cancel_scope.cancel()
