"""A folder on the Hugging Face Hub, through its own client, which knows where the token is and resumes big files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mmembed.errors import MmembedError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repository: str) -> None:
    """Raises MmembedError before anything is loaded: the name has no owner, or the Hub is switched off."""
    if not _NAME.fullmatch(repository):
        raise MmembedError(f"--push-to-hub: found '{repository}'; give OWNER/NAME")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise MmembedError("--push-to-hub: HF_HUB_OFFLINE is set in the environment; unset it")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Makes the repository where there is none, and uploads the folder as one commit. Returns its address.

    Raises:
        MmembedError: the Hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by mmembed")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise MmembedError(
            f"--push-to-hub {repository}: {reason[0] if reason else type(error).__name__}; log in with `hf auth login` "
            f"or upload {folder} later with `hf upload {repository} {folder}`"
        ) from error
    return str(address)
