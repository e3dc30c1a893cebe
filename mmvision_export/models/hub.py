"""A checkpoint on the Hugging Face hub: download its configuration and the shards it needs.

A shard is needed if it holds vision tensors. Nothing else is downloaded.
"""

from __future__ import annotations

from pathlib import Path

from mmvision_export.core.errors import CheckpointError
from mmvision_export.core.progress import Progress
from mmvision_export.models import family_from_file
from mmvision_export.models.minimax_m3_vl.checkpoint import (
    CONFIG,
    INDEX,
    SINGLE,
    read_index,
)
from mmvision_export.models.minimax_m3_vl.preprocess import PREPROCESSOR

__all__ = ["folder_from_hub", "is_hub_id"]


def is_hub_id(name: str) -> bool:
    """Whether a `--checkpoint` that is no folder has the form of a hub id, `organisation/model`."""
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def folder_from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    may_download: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Download what the encoder needs into the hub's cache.

    Args:
        repo_id: `organisation/model`.
        revision: Branch, tag or commit; the default branch otherwise.
        may_download: Whether the hub is asked; otherwise what is in the cache must do.
        progress: Told which file is being fetched.

    Returns:
        The snapshot folder in the cache, ready for `checkpoint_from_folder`.

    Raises:
        ConfigError: The repository's configuration is of no supported model family.
        CheckpointError: The hub cannot be reached, or refuses, or the repository is no safetensors
            checkpoint.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    # Its retries are reported as warnings; what finally fails is reported here.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    progress = progress or Progress()
    progress.step(f"looking for {repo_id}")
    offline = not (may_download and _hub_answers(repo_id))

    def download(name: str, *, optional: bool = False) -> Path | None:
        if not may_download:
            return _cached(repo_id, name, revision=revision, optional=optional)
        if not offline:
            progress.step(f"fetching {repo_id}/{name}")
        try:
            return Path(hf_hub_download(repo_id, name, revision=revision, local_files_only=offline))
        except LocalEntryNotFoundError as error:
            # huggingface_hub raises this both offline and when the connection fails. Offline, what
            # is not in the cache may not be in the repository either.
            if optional and offline:
                return None
            raise CheckpointError(
                f"{repo_id}: cannot reach the Hugging Face hub, and {name} is not in its local "
                "cache",
                hint="name a folder with --checkpoint DIR, or try without weights: --preset tiny "
                "--random-weights",
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{repo_id}: {name} could not be downloaded: {reason}",
                hint="check the id and your access (huggingface-cli login), or name a folder with "
                "--checkpoint DIR",
            ) from error

    config = download(CONFIG)
    if config is None:
        raise CheckpointError(f"{repo_id} has no {CONFIG}: not a checkpoint that can be exported")
    download(PREPROCESSOR, optional=True)
    index = download(INDEX, optional=True)
    family = family_from_file(config)
    shards = family.vision_shards(read_index(index)) if index else [SINGLE]
    if not shards:
        raise CheckpointError(
            f"{repo_id}: {INDEX} lists no vision tensors",
            hint="is this a MiniMax-M3-VL checkpoint?",
        )
    for count, shard in enumerate(shards, start=1):
        progress.note(f"shard {count} of {len(shards)}: {shard}")
        if download(shard) is None:
            raise CheckpointError(
                f"{repo_id} has no {shard}", hint="only safetensors checkpoints can be exported"
            )
    return config.parent


def _cached(repo_id: str, name: str, *, revision: str | None, optional: bool) -> Path | None:
    """A file that was downloaded before, found without a word to the network.

    `hf_hub_download(local_files_only=True)` asks the hub for a list of coding agents, to name one
    in its headers.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, name, revision=revision)
    if isinstance(found, str):
        return Path(found)
    if optional:
        return None
    raise CheckpointError(
        f"{repo_id}: {name} is not in the local cache of the Hugging Face hub; a checkpoint that "
        f"a manifest names is never downloaded",
        hint=f"--checkpoint {repo_id} downloads it",
    )


def _hub_answers(repo_id: str) -> bool:
    """Whether the hub can be reached at all.

    Asked once, without the downloader's half minute of retries.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repo_id, CONFIG))
    except HfHubHTTPError:
        return True  # an answer, if a refusal; the download will say which
    except Exception:  # the HTTP client's own, and huggingface_hub has had more than one client
        return False
    return True
