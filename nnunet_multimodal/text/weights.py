"""Weights of text encoders: from the cache of this computer, else downloaded, else an error within seconds.

open_clip left alone asks the hub again and again: 47 s until it gives up offline (measured with open_clip 3.3.0). So
the cache is looked at first, then one question with a short time limit tells whether a download can work at all.
"""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from nnunet_multimodal.errors import EnvironmentProblem

PATIENCE = 3.0  # seconds for the one question
URL_CACHE = Path("~/.cache/clip")  # where open_clip, and OpenAI's clip, keep what they fetch from a URL
INSTEAD = (
    "Or --from-file FILE (embeddings made on another computer, where this command needs no more than dataset.json), "
    "or --one-hot (no text)."
)


def find_in_hub_cache(repository: str, names: Sequence[str]) -> Path | None:
    """The first of these files of a Hugging Face repository that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def fetch_from_hub(repository: str, names: Sequence[str], what: str, as_checkpoint: bool = False) -> Path:
    """The first of these files that the cache or the hub has; the hub is asked only if it answers at all.

    Args:
        repository: such as ``timm/vit_base_patch32_clip_224.openai``.
        names: files that serve equally, the best first.
        what: they are, for messages.
        as_checkpoint: whether the user could hand the file over as ``--checkpoint``.

    Raises:
        EnvironmentProblem: it is not cached, and the hub cannot be reached, is switched off by HF_HUB_OFFLINE, or has
            none of the files (faults.md 34).
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    found = find_in_hub_cache(repository, names)
    if found is not None:
        return found
    folder = Path(constants.HF_HUB_CACHE)
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    if reason is None:
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except RepositoryNotFoundError as error:
                reason = f"the hub has no {repository}, or it is not public ({_first_line(error)})"
                break
            except EntryNotFoundError:
                reason = f"{repository} has none of {', '.join(names)}"
            except (OSError, ValueError, RuntimeError) as error:
                reason = _first_line(error)
                break
    url = f"{constants.ENDPOINT}/{repository}/resolve/main/{names[0]}"
    by_hand = f"Or download {url} and give it as --checkpoint FILE. " if as_checkpoint else ""
    raise EnvironmentProblem(
        f"{what} not found in {folder}, and cannot be downloaded: {reason}. Where there is a network, run "
        f"'hf download {repository}' and copy its folder models--{repository.replace('/', '--')} to {folder}. "
        f"{by_hand}{INSTEAD}"
    )


def find_in_url_cache(url: str) -> Path | None:
    path = URL_CACHE.expanduser() / url.rsplit("/", 1)[-1]
    return path if path.is_file() else None


def fetch_from_url(url: str, what: str) -> Path:
    """A file that open_clip knows only by URL.

    Raises:
        EnvironmentProblem: it is not cached and the host does not answer (faults.md 34).
    """
    from huggingface_hub import constants
    from open_clip.pretrained import download_pretrained_from_url

    folder = URL_CACHE.expanduser()
    offline = constants.HF_HUB_OFFLINE  # whoever sets it wants no downloads, from wherever
    found = find_in_url_cache(url)
    if found is not None:
        return found
    reason = "HF_HUB_OFFLINE is set" if offline else unreachable(url)
    if reason is None:
        try:
            return Path(download_pretrained_from_url(url))
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            (folder / url.rsplit("/", 1)[-1]).unlink(missing_ok=True)  # it writes under the final name
            reason = _first_line(error)
    raise EnvironmentProblem(
        f"{what} not found in {folder}, and cannot be downloaded: {reason}. Download {url} to {folder}. {INSTEAD}"
    )


def unreachable(url: str) -> str | None:
    """Why nothing can be downloaded from there; None if the host answers, whatever it answers, within ``PATIENCE``.

    Asked in a thread, because looking up a host's name knows no time limit; through the proxy, if one is set.
    """
    parts = urlsplit(url)
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{parts.scheme}://{parts.netloc}/", method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE).close()
            outcome.append(None)
        except urllib.error.HTTPError:
            outcome.append(None)  # it speaks, even if it does not like the question
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            outcome.append(f"{parts.netloc} cannot be reached ({reason})")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return outcome[0] if outcome else f"{parts.netloc} does not answer within {PATIENCE:g} s"


@contextlib.contextmanager
def hub_from_cache_only() -> Iterator[None]:
    """What open_clip and transformers ask of the hub in here is answered by the cache, at once."""
    from huggingface_hub import constants

    variable = "HF_HUB_OFFLINE"
    flag, value = constants.HF_HUB_OFFLINE, os.environ.get(variable)
    constants.HF_HUB_OFFLINE, os.environ[variable] = True, "1"  # read at import and at call, by different versions
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = flag
        if value is None:
            del os.environ[variable]
        else:
            os.environ[variable] = value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
