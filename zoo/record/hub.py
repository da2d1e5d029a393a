"""Publish a finished checkpoint folder to the Hub; running it again finishes what was interrupted."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError
from ..folder import open_folder
from .schema import read_report

NEEDED = ("config.json", "README.md", "report.json", "recipe.yaml")


def publish(folder: Path, repo_id: str, *, tag: str | None = None, private: bool = False) -> str:
    """Creates the repository if needed, uploads the folder in one commit, and tags that commit.

    Files that the Hub has already are not sent again, so an interrupted upload is finished by a second call.

    Args: folder: a checkpoint that a recipe wrote. repo_id: "org/name". tag: for from_pretrained(..., revision=tag).
    Returns: the URL of the commit.
    Raises: UserError, before anything is created, if the folder is incomplete, the name is not one, or nobody is logged
        in; and if the tag exists on another commit.
    """
    folder = Path(folder)
    check_folder(folder)
    api = check_target(repo_id)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=f"Upload {folder.name}", ignore_patterns=[".*"]
        )
        if tag:
            put_tag(api, repo_id, tag)
    except HfHubHTTPError as error:
        raise UserError(f"publishing to {repo_id} failed ({str(error).splitlines()[0]}); run it again.") from None
    return commit.commit_url


def check_target(repo_id: str) -> HfApi:
    """The Hub's client. Raises: UserError if the name is none, or nobody is logged in."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id_is_valid = False
    else:
        repo_id_is_valid = repo_id.count("/") == 1
    if not repo_id_is_valid:
        raise UserError(f"repository {repo_id!r}: a Hub id of the form org/name is needed.")
    api = HfApi()
    try:
        api.whoami()
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"the Hub does not know you ({str(error).splitlines()[0]}): set HF_TOKEN or run `hf auth login`."
        ) from None
    return api


def put_tag(api: HfApi, repo_id: str, tag: str) -> None:
    """Tags the head of the repository; a tag that is there already must be on it."""
    head = api.model_info(repo_id).sha
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag not in tags:
        api.create_tag(repo_id, tag=tag, revision=head)
    elif tags[tag] != head:
        raise UserError(f"--tag {tag}: {repo_id} has it on another commit ({tags[tag][:12]}); choose a new tag.")


def check_folder(folder: Path) -> None:
    """Refuses a folder that would not load or has no evidence."""
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: a checkpoint folder that a recipe wrote is needed.")
    read_report(folder / "report.json")
    model = open_folder(folder)
    model.tensors  # noqa: B018 (refuses weights that are missing or damaged)
    for module in {name.partition(".")[0] for name in model.config.get("auto_map", {}).values()}:
        if not (folder / f"{module}.py").is_file():
            raise UserError(f"{folder} lacks {module}.py, which its config names: make the checkpoint again.")
    card = metadata_load(folder / "README.md") or {}
    if not card.get("license"):
        raise UserError(f"{folder / 'README.md'}: the card names no license; make the checkpoint again.")
