"""`avdiff serve`: the pipeline behind OpenAI's videos resource."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer


def serve(
    model: Annotated[
        str, typer.Option(help="Folder or hub name of a pipeline; 'presenter' is in the package.")
    ] = "presenter",
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need --token-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Processes that make clips, each with a model.")
    ] = 1,
    folder: Annotated[
        Path, typer.Option(help="Where jobs and clips are kept; a second start goes on there.")
    ] = Path("avdiff-jobs"),
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens that are let in, one a line.")
    ] = None,
    loras: Annotated[
        Path | None, typer.Option(help="Folder of LoRAs that requests may name.")
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(min=0.2, max=3600, help="Longest clip of a request.")
    ] = 60.0,
    keep_days: Annotated[float, typer.Option(min=0.01, help="Clips are removed after.")] = 7.0,
) -> None:
    """Serve clips: any client of OpenAI's videos resource makes them here."""
    try:
        import uvicorn

        from avdiff.serve.app import build_app
    except ImportError as error:
        raise ValueError(
            f"serve: {error.name} is not installed; pip install 'avdiff[serve]'"
        ) from error
    from avdiff.serve.limits import JsonFormatter
    from avdiff.serve.settings import ServeSettings, read_tokens

    settings = ServeSettings(
        folder=folder.absolute(),
        model=model if model == "presenter" else os.path.abspath(model),
        name="presenter" if model == "presenter" else Path(model).name,
        host=host,
        port=port,
        workers=workers,
        tokens=read_tokens(token_file) if token_file is not None else (),
        lora_folder=loras,
        max_seconds=max_seconds,
        keep_seconds=keep_days * 86400,
    )
    app = build_app(settings)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    print(f"http://{host}:{port}/v1 (documentation at /docs); clips in {settings.folder}")
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=15,
        timeout_keep_alive=15,
        server_header=False,
    )
