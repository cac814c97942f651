"""MLflow's server in one process, on a socket that is already listening.

    python -m ranksearch.tracking.mlflow_private DESCRIPTOR HOST PORT [ROOT]

`mlflow server` loads MLflow twice, in a process that checks its options and in the server which that one starts. This takes half of the
seconds until a page answers. Here we set what that command sets for its server, by names that are not MLflow's public interface; if a
version has other names, its own command is run.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import uuid

STORE = "MLFLOW_BACKEND_STORE_URI"
"""The environment variable for the store: whoever lists processes reads command lines, and the URI may hold a password."""
OWN_FILES = "./mlartifacts"
"""Where `mlflow server` keeps files by default, for experiments that leave the place to the server."""


def serve(descriptor: int, host: str, port: int, root: str | None) -> None:
    """Runs the server until it is ended.

    Args:
        descriptor: that of the socket, which is bound to `host` and `port`.
        root: where files of new experiments go; None leaves it to the server.
    """
    gc.disable()  # saves a fifth of the time that the imports take
    try:
        import uvicorn  # first, because MLflow checks whether it is loaded by a server
        from mlflow.server import constants
        from mlflow.server.handlers import initialize_backend_stores

        store = os.environ[STORE]
        os.environ |= {
            constants.BACKEND_STORE_URI_ENV_VAR: store,
            constants.REGISTRY_STORE_URI_ENV_VAR: store,
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
            constants.ARTIFACTS_DESTINATION_ENV_VAR: OWN_FILES,
            "_MLFLOW_SGI_NAME": "uvicorn",
            "_MLFLOW_SERVER_BOOT_ID": uuid.uuid4().hex,  # a server makes no code of what a store holds
            "_MLFLOW_IN_JOB_EXECUTOR": "false",
        } | ({constants.ARTIFACT_ROOT_ENV_VAR: root} if root else {})
        from mlflow.server.fastapi_app import app
    except (ImportError, AttributeError):
        os.close(descriptor)
        options = [
            "--host",
            host,
            "--port",
            str(port),
            "--workers",
            "1",
            *(["--default-artifact-root", root] if root else []),
        ]
        os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *options])
    initialize_backend_stores(store, store, root)
    gc.enable()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
