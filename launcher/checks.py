"""What can be seen to be wrong before anything heavy is started."""

import os
import socket
from pathlib import Path

from baton.errors import SettingsError
from baton.settings import RECALL_MODEL

HUB_TIMEOUT_S = 5.0


def check_port(host: str, port: int, flag: str) -> None:
    """Raises SettingsError if the port cannot be listened on. (0, any free one, always can.)"""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port just freed seems taken
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        raise SettingsError(
            f"Port {port} on {host} cannot be listened on ({error.strerror}); choose another with {flag} "
            "(0 picks a free one) or --host."
        ) from None


async def check_redis(url: str) -> None:
    """Raises ClusterError or SettingsError if there is no Redis to use at the URL."""
    from baton.cluster.redis_client import connect_redis

    client = await connect_redis(url)
    await client.aclose()


def check_model(model: str) -> None:
    """Raises SettingsError if the model is neither a model's directory nor an id that the hub, or its local
    cache, knows; within seconds. What lies in the checkpoint is the engine's to judge."""
    if model == RECALL_MODEL:
        return
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SettingsError(f"The directory {model} holds no model: it has no config.json.")
        return
    if path.exists() or model.startswith((".", "~", os.sep)) or model.count("/") > 1:
        raise SettingsError(f"The model directory {model} does not exist.")
    check_hub(model)


def check_hub(model: str) -> None:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError):
        raise SettingsError(
            f"{model} is neither a directory here nor a model that the Hugging Face hub shows to you."
        ) from None
    except Exception as error:  # whatever the hub's HTTP client raises when it cannot reach it
        raise SettingsError(
            f"{model} is neither a directory here nor in the local cache, and the Hugging Face hub cannot be asked "
            f"for it ({type(error).__name__})."
        ) from None
