"""`kvfs worker`: one inference worker in the foreground, as `kvfs serve`, systemd or a container runs it."""

from __future__ import annotations

import sys
from typing import Any

import click
import trio

from kvfs.cli import process
from kvfs.cli.context import Options, common_options
from kvfs.cli.engine_options import engine_options, needs_inference


@click.command()
@click.argument("model", type=click.Path())
@click.option("--role", type=click.Choice(["both", "prefill", "decode"]), default="both", show_default=True, help="What a router gives it.")
@click.option("--listen", multiple=True, default=("tcp://127.0.0.1:0",), show_default=True, help="Address; may be given again.")
@click.option("--no-disk-cache", is_flag=True, help="Keep no pages on kvfs.")
@engine_options
@common_options
def worker(options: Options, model: str, role: str, listen: tuple[str, ...], no_disk_cache: bool, **engine: Any) -> None:
    """Run an inference worker of the checkpoint MODEL in the foreground; `kvfs serve --worker ADDRESS` routes requests to it."""
    needs_inference()
    from kvfs.inference.workers.config import WorkerConfig
    from kvfs.inference.workers.worker import serve

    process.configure_logging()
    cluster = "" if no_disk_cache else options.cluster_spec()
    config = WorkerConfig(model=model, role=role, listen=listen, cluster=cluster, disk_cache=not no_disk_cache, **engine)

    async def main(ready: process.Ready) -> None:
        async with trio.open_nursery() as nursery:
            ready(await nursery.start(serve_worker, config))

    async def serve_worker(config: WorkerConfig, *, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
        await serve(config, task_status=task_status)

    sys.exit(process.run_process(main))
