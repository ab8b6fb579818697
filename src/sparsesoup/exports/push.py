"""`sparsesoup push`: upload a model with its card and masks to the Hub, without local paths."""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from sparsesoup.core.errors import UserError, one_line
from sparsesoup.core.files import DIGESTS, atomic_write, digests_of, read_table, write_json, write_table, write_text
from sparsesoup.core.manifest import check_export
from sparsesoup.core.ticket import FACTS, MASKS
from sparsesoup.exports import WEIGHTS
from sparsesoup.exports.source import BESIDE, check_finished, run_folder_of
from sparsesoup.hub.data.files import hub_is_reachable
from sparsesoup.hub.tasks import zero_shot
from sparsesoup.report.model_card import render_model_card
from sparsesoup.report.terminal import read_report
from sparsesoup.runs.config import OBJECTS, config_from_dict
from sparsesoup.runs.resume_checks import check_run_or_model

NAMED = ("_name_or_path", "name_or_path", "pruning_config")  # config keys that may contain a path
HERE = ("is_local", "local_files_only")  # tokenizer keys about how it was loaded
CARD, CONFIG, FORM = "README.md", "config.json", "export.json"
PARTS = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"


def is_local(value: Any) -> bool:
    """Return True for a text that looks like a local path, rather than a name.

    >>> is_local("/home/me/bert"), is_local("~/bert"), is_local("owner/bert"), is_local("https://hf.co/owner/bert")
    (True, True, False, False)
    """
    text = value if isinstance(value, str) else ""
    begins = text.startswith(("/", "~", "./", "../", "\\\\")) or bool(re.match(r"[A-Za-z]:[\\/]", text))
    deep = text.count("/") > 1 and "://" not in text and not re.search(r"\s", text)
    return len(text) > 1 and (begins or deep)


def strip_local_paths(value: Any, key: str = "") -> Any:
    """Remove the folders from local paths; the last part stays.

    >>> strip_local_paths({"model": "/home/me/bert", "data_root": "/data", "files": ["pruning/ticket.json"]})
    {'model': 'bert', 'files': ['pruning/ticket.json']}
    """
    if isinstance(value, Mapping):
        return {k: strip_local_paths(v, k) for k, v in value.items() if k != "data_root"}
    if isinstance(value, list):
        return value if key == "files" else [strip_local_paths(part, key) for part in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if is_local(value) else value


def strip_local_config(config: dict[str, Any]) -> dict[str, Any]:
    """Remove local information from a config. Labels and tokens stay, although they may look like paths."""
    return {key: strip_local_paths(v) if key in NAMED else v for key, v in config.items() if key not in HERE}


def portable_command(facts: Mapping[str, Any]) -> str | None:
    """Return the command line that repeats a run, without local folders; None if there is none, as of objects."""
    settings = dict(facts.get("settings") or {})
    if settings.get(OBJECTS):
        return None
    method = dict(settings.pop("method", {}))
    name = str(method.pop("name", None))
    try:
        line = str(facts.get("command") or config_from_dict(name, {**settings, "method": method}).repeat_command())
    except (UserError, TypeError):
        return None
    words, called = shlex.split(line), {settings.get("dataset"): facts.get("dataset")}  # glue/sst2 for its local folder
    return shlex.join(
        (called.get(word) or strip_local_paths(word)) if is_local(word) else word
        for before, word in zip(["", *words], words, strict=False)
        if "--data-root" not in (before, word)
    )


@dataclass(frozen=True)
class HubUpload:
    """Content of an upload."""

    folder: Path
    files: tuple[str, ...]  # names in the folder
    facts: dict[str, Any]  # content of report.json or ticket.json
    form: dict[str, Any]  # content of export.json; empty for a run


def push_to_hub(
    run: Path, repo: str, *, out: Path | None = None, private: bool = False, license: str = "unknown",
    token_from_env: str = "",
) -> str:  # fmt: skip
    """Upload a model to the Hub in one commit and return its URL; or only write the upload to a folder, `out`.

    A variable that is named for the token has to hold one in either case.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: {one_line(error)}") from error
    upload = open_upload(run)
    if out is not None:
        if token_from_env:
            _read_token(token_from_env, "leave it out of a dry run")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is there already; give a folder that does not exist")
        with atomic_write(out) as temporary:
            temporary.mkdir()
            write_upload(upload, temporary, repo, license)
        return str(out)
    api = _open_hub(repo, _read_token(token_from_env))
    with tempfile.TemporaryDirectory() as temporary_name:
        write_upload(upload, Path(temporary_name), repo, license)
        return _upload_files(api, Path(temporary_name), repo, private)


def open_upload(run: Path) -> HubUpload:
    """Return the model of a finished run, or of an export, for uploading."""
    run = run_folder_of(run)
    if (run / FORM).is_file():
        upload = _open_export(run)
    elif (run / "report.json").is_file():
        check_run_or_model(run, facts := read_report(run))
        upload = HubUpload(run / "model", _files_of_run(run / "model", facts), facts, {})
    else:
        check_finished(run)
        raise UserError(
            f"no run at {run}: give a finished run's directory (seed-<n>) or what `sparsesoup export` wrote"
        )
    if not any(name.endswith(WEIGHTS) and "/" not in name for name in upload.files):
        raise UserError(
            f"no model in {upload.folder}: expected config.json and model.safetensors; prune or export again"
        )
    for path in (upload.folder / name for name in upload.files):
        if not path.resolve().is_relative_to(run.resolve()):  # not part of the run, and may be a secret
            raise UserError(f"{path} leads out of {run} by a link; put a copy in its place, or remove it")
    return upload


def _open_export(folder: Path) -> HubUpload:
    form, ticket = read_table(folder / FORM), folder / "pruning" / FACTS
    facts = read_table(ticket) if ticket.is_file() else form.get("source", {})
    files, verified = form.get("files", []), form.get("verified", {})
    known = isinstance(files, list) and all(isinstance(name, str) for name in files) and isinstance(verified, Mapping)
    # A name that leads out of the folder would be read and written elsewhere.
    if not known or any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise UserError(
            f"damaged {folder / FORM}: no list of the files beside it, or of what was verified; export it again"
        )
    if lost := [name for name in files if not (folder / name).is_file()]:
        raise UserError(f"damaged export: {folder / lost[0]} is missing, which {FORM} names; export it again")
    check_export(folder, form)
    # Verifying an export opens the test split, if nobody has before.
    facts = {"test": verified.get("scores_of_source"), "test_splits": verified.get("test_splits"), **facts}
    return HubUpload(folder, tuple(files), facts, form)


def _files_of_run(folder: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the files that the run wrote: weights, configs, tokenizer and masks; no pickles, and no other files."""
    written = facts.get("digests")  # of its files; older versions recorded none
    if isinstance(written, Mapping):
        names = [name.removeprefix("model/") for name in written if name.startswith("model/") and ".." not in name]
        return tuple(sorted(names))
    known = re.compile(rf"({BESIDE.pattern})|{PARTS}|pruning/({MASKS}|{FACTS}|{zero_shot.NAME}\.\w+)")
    found = [p for each in ("*", "pruning/*") for p in sorted(folder.glob(each)) if p.is_file()]
    return tuple(name for p in found if known.fullmatch(name := p.relative_to(folder).as_posix()))


def write_upload(upload: HubUpload, folder: Path, repo: str, license: str) -> None:
    """Write the folder to upload."""
    for name in upload.files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.rpartition("/")[2] in (FACTS, FORM):
            write_table(target, strip_local_paths(read_table(upload.folder / name)))
        elif name.endswith(CONFIG):
            write_json(target, strip_local_config(read_table(upload.folder / name)))
        else:
            shutil.copyfile(upload.folder / name, target)
    if upload.form.get(DIGESTS):  # some files have changed: this machine's folders were removed
        form = read_table(folder / FORM)
        write_table(folder / FORM, form | {DIGESTS: digests_of(folder, set(upload.files) & {*form[DIGESTS]})})
    config = read_table(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    try:
        text = _render_card(upload, config, repo, license)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"damaged report, ticket or {FORM}: what {upload.folder} contains cannot be determined "
            f"({one_line(error)}); export it again, or prune again"
        ) from error
    write_text(folder / CARD, text)


def _render_card(upload: HubUpload, config: Mapping[str, Any], repo: str, license: str) -> str:
    full = upload.facts
    facts = {**strip_local_paths(full), "command": portable_command(full)}
    # Local paths of the run are listed, since a folder owner/bert looks like a name on the Hub.
    named = {"model": full.get("model"), "dataset": full.get("settings", {}).get("dataset")}
    facts["local"] = [str(facts[key]) for key in named if key in full.get("local", []) or is_local(named[key])]
    return render_model_card(facts, strip_local_paths(upload.form), config, repo, license)


def _read_token(variable: str, otherwise: str = "--dry-run needs none") -> str:
    token = os.environ.get(variable, "").strip() if variable else huggingface_hub.get_token()
    if not token:
        lacking = f"the environment variable {variable} is empty" if variable else "HF_TOKEN is empty, nobody logged in"
        raise UserError(f"no token for the Hub: {lacking}; set it, or run `hf auth login`; {otherwise}")
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"what {variable or 'HF_TOKEN'} holds is no token: a token is one word; {otherwise}")
    return token


def _open_hub(repo: str, token: str) -> HfApi:
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or use --dry-run")
    api = HfApi(token=token)
    if not hub_is_reachable(api.model_info, repo):
        raise UserError(f"the Hub at {api.endpoint} does not answer; try again later, or use --dry-run")
    return api


def _upload_files(api: HfApi, folder: Path, repo: str, private: bool) -> str:
    """Upload all files in one commit; return the URL of the model."""
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(made.repo_id).private:
            raise UserError(f"{repo} is there already and public; make it private on the Hub, or leave --private out")
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Upload a model of sparsesoup")
    except UserError:
        raise
    except Exception as error:  # from the Hub, the network or the disk; the classes depend on the HTTP library
        code = getattr(getattr(error, "response", None), "status_code", 0) if isinstance(error, HfHubHTTPError) else 0
        message = one_line(error).replace(str(api.token), "***")[:300].rstrip(".")
        hint = {401: "the token is not valid; use another", 403: "the token may not write there; use one that may"}
        remedy = hint.get(code, f"{message}; the same command tries again")
        raise UserError(f"cannot push to {repo}: {remedy}") from error
    return str(made)
