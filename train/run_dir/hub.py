"""Share a finished model on the Hugging Face hub, by its own client and its own login.

Nothing is sent before a run has ended, and a failure to send changes nothing on this machine.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from preprocess.progress import say


def later(repo: str, folder: Path, private: bool) -> str:
    """Return the command that shares a folder."""
    flag = " --private" if private else ""
    return f"hf upload {shlex.quote(repo)} {shlex.quote(str(folder))} .{flag}"


def announce(repo: str) -> None:
    """Say what will be shared, and warn where nobody is logged in: an hour later is too late."""
    if not repo:
        return
    from huggingface_hub import get_token

    say(f"at the end the model is pushed to {repo} on the hub" if get_token() else
        f"warning: --push_to_hub {repo}: nobody is logged in to the hub on this machine; type "
        "`hf auth login` before the run ends")


def push(folder: Path, repo: str, private: bool, write_card: Callable[[str], None]) -> bool:
    """Push a finished `hf/` folder to a repository, which is made if it is absent.

    Whatever goes wrong, the run has ended well: a warning says how to push the model later.

    Args:
        write_card: writes the folder's card for a repository of this name.
    Returns:
        Whether it is there.
    """
    from huggingface_hub import HfApi

    write_card(repo)
    try:
        api = HfApi()
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        if made.repo_id != repo:
            write_card(made.repo_id)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder,
                          commit_message="Model trained with selmask")
    except Exception as error:  # no network, no login, no right, a name that is taken
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"warning: --push_to_hub {repo}: not pushed ({first}); the model is whole in {folder}: "
            f"to push it later, type {later(repo, folder, private)}")
        return False
    say(f"pushed {folder} to {made}")
    return True
