"""Publish a finished checkpoint folder, or a Space, to the Hub; running it again finishes what was interrupted."""

from __future__ import annotations

import ast
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from packaging.requirements import Requirement

from ..errors import UserError
from ..folder import open_folder
from .schema import read_report

NEEDED = ("config.json", "README.md", "report.json", "recipe.yaml")
OF_A_SPACE = ("app.py", "README.md", "requirements.txt")
OURS = {"zoo": "", "recipes": "recipes"}  # packages that a Space brings along: the extra that each needs


def publish(folder: Path, repo_id: str, *, tag: str | None = None, private: bool = False) -> str:
    """Creates the repository if needed, uploads the folder in one commit, and tags that commit.

    Files that the Hub has already are not sent again, so an interrupted upload is finished by a second call.

    Args: folder: a checkpoint that a recipe wrote, or a Space (it has an app.py). repo_id: "org/name". tag: for
        from_pretrained(..., revision=tag).
    Returns: the URL of the commit.
    Raises: UserError, before anything is created, if the folder is incomplete, the name is not one, or nobody is logged
        in; and if the tag exists on another commit.
    """
    folder = Path(folder)
    is_space = (folder / "app.py").is_file()
    (check_space if is_space else check_folder)(folder)
    api = check_target(repo_id)
    target = {"repo_id": repo_id, "repo_type": "space" if is_space else "model"}
    with TemporaryDirectory() as place:
        content = assemble_space(folder, Path(place) / "space") if is_space else folder
        try:
            api.create_repo(**target, private=private, exist_ok=True, space_sdk="gradio" if is_space else None)
            commit = api.upload_folder(
                **target,
                folder_path=content,
                commit_message=f"Upload {folder.name}",
                ignore_patterns=[".*"],
                delete_patterns=[f"{name}/*" for name in OURS] if is_space else None,  # of an older version
            )
            if tag:
                put_tag(api, tag, **target)
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


def put_tag(api: HfApi, tag: str, repo_id: str, repo_type: str) -> None:
    """Tags the head of the repository; a tag that is there already must be on it."""
    head = api.repo_info(repo_id, repo_type=repo_type).sha
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=repo_type).tags}
    if tag not in tags:
        api.create_tag(repo_id, repo_type=repo_type, tag=tag, revision=head)
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


# ---------------------------------------------------------------------------------------------------------------- Spaces


def assemble_space(folder: Path, target: Path) -> Path:
    """Writes to `target` the Space `folder` with the packages of ours that its app imports, as source, and returns `target`.

    Its requirements.txt names what those packages need beside what the app does: no package index has to know us.
    """
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    requirements = (folder / "requirements.txt").read_text(encoding="utf-8").split("\n")
    for name in our_packages(folder / "app.py"):
        (source,) = find_spec(name).submodule_search_locations
        shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        requirements += requirements_of(OURS[name])
    (target / "requirements.txt").write_text("\n".join(dict.fromkeys(filter(None, requirements))) + "\n")
    return target


def our_packages(app: Path) -> list[str]:
    """zoo, and what else the app imports when it is loaded; an import inside a function is one it can do without."""
    nodes = ast.parse(app.read_text(encoding="utf-8")).body
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    roots = {module.partition(".")[0] for module in modules}
    return [name for name in OURS if name == "zoo" or name in roots]


def requirements_of(extra: str) -> list[str]:
    """What slimzoo needs with one of its extras ("": none), as lines of a requirements.txt."""
    needed = [Requirement(text) for text in metadata.requires("slimzoo")]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": extra})]
    return [str(each).partition(";")[0] for each in needed]


def check_space(folder: Path) -> None:
    """Refuses a folder that the Hub would not start as a Space."""
    missing = [name for name in OF_A_SPACE if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: a Space has {', '.join(OF_A_SPACE)}.")
    card = metadata_load(folder / "README.md") or {}
    if card.get("sdk") != "gradio":
        raise UserError(f"{folder / 'README.md'}: the front matter of a Space says sdk: gradio.")
