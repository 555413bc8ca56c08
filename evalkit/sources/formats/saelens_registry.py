"""Opens dictionaries of sae-lens's own registry by release and id, with the installed library.

The library downloads into Hugging Face's cache and converts other layouts; ``saelens.describe_source`` makes the source
from the config and tensors it returns. With a local copy of the release's repository, nothing is downloaded and matrices
stay on disk. Uses only public functions of the library; knows nothing of architectures.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, EvalkitError, MissingFile, require
from evalkit.sources.formats.common import check_options
from evalkit.sources.formats.saelens import CONFIG, WEIGHTS, SaeLensReader, describe_source, open_folder
from evalkit.sources.sae.source import SaeSource
from evalkit.util.tensor_files import Stored

__all__ = ["open_registered", "split_registered"]

_DIRECTORY = "sae_lens.loading.pretrained_saes_directory"


def open_registered(release: str, sae_id: str, **options: Any) -> SaeSource:
    """Open the dictionary ``sae_id`` of a release.

    ``release``: a name in the registry, a repository ``owner/name`` of sae-lens folders, or a local folder (which does not
    need the library).
    ``options``: those of ``SaeLensReader``, and ``folder``: a local copy of the release's repository in sae-lens's own
    layout, which is read instead of downloading.

    Raises MissingExtra, BadConfig (no such release or id), MissingFile (download failed, no such file), BadFile, BadShape.
    """
    subject = f"saelens:{release}/{sae_id}"
    check_options(Path(subject), options, SaeLensReader.options | {"folder"})
    folder = options.pop("folder", None)
    if folder is None and Path(release).is_dir():
        return _open_local(Path(release), sae_id, options)
    known = require(_DIRECTORY, "saelens").get_pretrained_saes_directory().get(release)
    _check_known(subject, release, sae_id, known)
    card = _card(known, sae_id)
    if folder is None:
        return _open_loaded(subject, release, sae_id, options, card)
    within = sae_id if known is None else known.saes_map[sae_id]
    overrides = {} if known is None else known.config_overrides or {}
    factor = None if known is None else known.norm_scaling_factor.get(sae_id)
    return _open_local(Path(folder), within, options, card, overrides, factor)


def split_registered(text: str) -> tuple[str, str]:
    """Split ``RELEASE/ID`` into release and id, where RELEASE is in the registry or ``owner/name``. Raises BadConfig."""
    directory = require(_DIRECTORY, "saelens").get_pretrained_saes_directory()
    release, _, sae_id = text.partition("/")
    if release not in directory:
        owner, _, rest = text.partition("/")
        name, _, sae_id = rest.partition("/")
        release = f"{owner}/{name}"
    if not sae_id:
        raise BadConfig(
            f"saelens:{text}",
            expected="saelens:RELEASE/ID, or saelens:OWNER/REPOSITORY/ID",
            seen="no id",
            fix="look up both in sae-lens's list of pretrained SAEs",
        )
    return release, sae_id


def _open_local(
    folder: Path,
    within: str,
    options: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    factor: float | None = None,
) -> SaeSource:
    place = folder / within
    if not (place / CONFIG).is_file() or not (place / WEIGHTS).is_file():
        raise MissingFile(
            str(place),
            expected=f"{CONFIG} and {WEIGHTS}",
            seen="a folder without both files" if place.is_dir() else "no such folder",
            fix="download the release's repository again; for another layout, open the folder without saelens:",
        )
    return open_folder(place, options, overrides=overrides, factor=factor, card=card)


def _open_loaded(
    subject: str, release: str, sae_id: str, options: Mapping[str, Any], card: Mapping[str, Any]
) -> SaeSource:
    """Open through the library, which downloads, converts other layouts, and scales weights if the registry says so."""
    library = require("sae_lens", "saelens")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sae-lens warns of input transforms, which our steps apply
            loaded, config, sparsity = library.SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id, device="cpu")
    except EvalkitError:
        raise
    except Exception as error:  # the network and the converters of many layouts raise many kinds
        seen = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingFile(
            subject,
            expected="a dictionary that sae-lens can download or has downloaded before",
            seen=f"{type(error).__name__}: {seen}"[:300],
            fix="check the network, or give a local copy of its repository with the option folder=",
        ) from error
    file = Path(subject)
    tensors = {name: _held(file, name, value) for name, value in loaded.state_dict().items()}
    rates = None if sparsity is None else _held(file, "sparsity", sparsity)
    return describe_source(file / WEIGHTS, file / CONFIG, config, tensors, options, rates, card)


def _held(file: Path, name: str, value: Any) -> Stored:
    return Stored(f"{file}: {name}", tuple(value.shape), file, loaded=value.detach().cpu())


def _check_known(subject: str, release: str, sae_id: str, known: Any) -> None:
    if known is None and "/" not in release:
        raise BadConfig(
            subject,
            expected="a release in sae-lens's registry, a repository owner/name, or a local folder",
            seen="none of these",
            fix="check the name in sae-lens's list of pretrained SAEs, or update sae-lens",
        )
    if known is not None and sae_id not in known.saes_map:
        some = list(known.saes_map)
        raise BadConfig(
            subject,
            expected=f"an id in that release: {', '.join(some[:5])}{', …' if len(some) > 5 else ''}",
            seen=sae_id,
            fix="choose one of them",
        )


def _card(known: Any, sae_id: str) -> dict[str, Any]:
    """L0 and FVU from the registry, which writes 0 for an unknown L0 and 1 for an unknown explained variance."""
    if known is None:
        return {}
    found: dict[str, Any] = {}
    if l0 := known.expected_l0.get(sae_id):
        found["l0"] = l0
    explained = known.expected_var_explained.get(sae_id)
    if isinstance(explained, int | float) and explained < 1:
        found["fvu"] = 1 - explained
    return found
