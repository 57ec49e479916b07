"""Fetch a model's files from the hub: configuration, tokenizer and safetensors, nothing else."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from evals.downloads import refuse_insecure_hub
from evals.visible import reason
from src.errors import InputError

FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
# Second copies of the weights for other software, gigabytes each.
NOT = ["original/*", "consolidated*", "onnx/*"]


def snapshot(hub_id: str, revision: str, with_code: bool = False) -> Path:
    """The local folder with this model's files, downloaded once; its name is the commit.

    Whatever goes wrong here has one remedy, a reachable hub or a folder, so every error ends in that advice.
    """
    wanted = f"model.hub_id={hub_id}"
    refuse_insecure_hub()
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=[*FILES, "*.py"] if with_code else FILES,
                ignore_patterns=NOT,
            )
        )
    except GatedRepoError as error:
        raise InputError(
            f"{wanted}: gated; accept its licence at https://huggingface.co/{hub_id} and run "
            "`hf auth login`, or set model.path=FOLDER to a local copy"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"model.revision={revision}: {hub_id} has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{wanted}: the hub has no such model, or it is private; check the name, run `hf auth login`, "
            "or set model.path=FOLDER to a local copy"
        ) from error
    except Exception as error:  # no network, a proxy, HF_HUB_OFFLINE, a full disk, an invalid name, ...
        raise InputError(
            f"{wanted}: not in the cache and not reachable ({reason(error)}); run `hf download {hub_id}` where "
            "there is network, set model.path=FOLDER to a local copy, or take model=smollm2-135m (bundled)"
        ) from error
