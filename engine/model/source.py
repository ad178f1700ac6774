"""Where a model's files lie: a directory, the hub's cache, the hub, or the bundled demo model's."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from baton.errors import SettingsError, UnsupportedModel
from baton.settings import RECALL_MODEL
from engine.recall.model import recall_model_directory

HUB_TIMEOUT_S = 5
"""How long the hub may take to answer whether it has a model."""
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


def find_model(name: str) -> Path:
    """The directory of a model that can be loaded: it holds a config.json and safetensors files.

    Takes a directory, a hub id or RECALL_MODEL; a hub id that is not in the hub's cache is downloaded.
    Needs no torch. Raises SettingsError when there is no such model, UnsupportedModel when what is there
    is not a model in safetensors.
    """
    directory = recall_model_directory() if name == RECALL_MODEL else _local(name) or _from_hub(name)
    if not (directory / "config.json").is_file():
        raise UnsupportedModel(f"The directory {directory} holds no config.json, so it is not a Hugging Face model.")
    if not any(directory.glob("*.safetensors")):
        raise UnsupportedModel(f"The model in {directory} has no .safetensors files; other formats are not loaded.")
    return directory


def _local(name: str) -> Path | None:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise SettingsError(f"The model {name} is a file; a Hugging Face directory or a hub id is needed.")
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if not is_hub_id:
        raise SettingsError(f"The model directory {name} does not exist.")
    return None


def _from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name, etag_timeout=HUB_TIMEOUT_S, allow_patterns=_HUB_FILES))
    except HFValidationError:
        reason = "it is neither a directory here nor a valid hub id"
    except LocalEntryNotFoundError:
        reason = "it is not a directory, not in the hub's cache, and the hub cannot be reached"
    except HfHubHTTPError as error:
        reason = f"the hub answers {error.response.status_code} (wrong id, or a token with access to it is needed)"
    raise SettingsError(f"There is no model {name}: {reason}.")
