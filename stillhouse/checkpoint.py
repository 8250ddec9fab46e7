"""Checkpoints and training states: tensors as safetensors, structure as JSON, never a pickle."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from stillhouse.config import parse
from stillhouse.errors import StillhouseError
from stillhouse.files import MANIFEST, SCHEMA_VERSION, check_folder, replace_folder, sha256, write_json
from stillhouse.networks.multi_task import MultiTaskNetwork, NetworkSpec
from stillhouse.networks.two_columns import TwoColumnNetwork, TwoColumnSpec

WEIGHTS = "weights.safetensors"
SPEC = "spec.json"
STATE_TENSORS = "state.safetensors"
STATE_STRUCTURE = "state.json"
_TENSOR = "__tensor__"


@dataclass(frozen=True)
class Checkpoint:
    """A network with what it was made for.

    Attributes:
        network: in evaluation mode.
        details: what the writer added: environment ids, budgets, ...
        digest: SHA-256 of the manifest, which names every file's hash: the checkpoint's identity.
    """

    network: MultiTaskNetwork
    details: dict[str, Any]
    digest: str


def save_checkpoint(path: Path, network: MultiTaskNetwork, details: dict[str, Any]) -> None:
    """Write the folder ``path``: ``weights.safetensors``, ``spec.json``, ``manifest.json``.

    Args:
        path: the folder; an existing one is replaced at the end, in one rename.
        network: its structure and weights.
        details: plain data kept beside the structure, for example ``{"environments": {"cartpole": {...}}}``.

    Raises:
        StillhouseError: a weight is not finite, or the disk is full or not writable; ``path`` is as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise StillhouseError(f"{path}: weight {name!r} is not finite, so no checkpoint is written")
    with replace_folder(path) as folder:
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
        write_json(
            folder / SPEC,
            {
                "schema_version": SCHEMA_VERSION,
                "network": network.spec.model_dump(mode="json"),
                "details": details,
            },
        )


def load_checkpoint(path: Path, device: str = "cpu") -> Checkpoint:
    """Rebuild the network from its folder, verifying every file's hash first.

    Raises:
        StillhouseError: missing, damaged, of another schema version, or not a checkpoint.
    """
    check_folder(path)
    try:
        spec = json.loads((path / SPEC).read_text())
        if spec["schema_version"] != SCHEMA_VERSION:
            raise StillhouseError(
                f"{path}: checkpoint of schema version {spec['schema_version']}, but this stillhouse reads version "
                f"{SCHEMA_VERSION}; rerun the stage that makes it, or use the release that wrote it"
            )
        network = _build(spec["network"], f"{path / SPEC}")
        network.load_state_dict(safetensors.torch.load_file(path / WEIGHTS))
        details = spec["details"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        text = " ".join(str(error).split())[:200]
        raise StillhouseError(
            f"{path}: not a stillhouse checkpoint ({type(error).__name__}: {text})"
        ) from error
    network.to(device).eval()
    return Checkpoint(network, details, sha256(path / MANIFEST))


def _build(structure: dict[str, Any], where: str) -> MultiTaskNetwork:
    if "shared_column" in structure:
        return TwoColumnNetwork(parse(TwoColumnSpec, structure, where))
    if "columns" not in structure:
        return MultiTaskNetwork(parse(NetworkSpec, structure, where))
    # By name, so that no other stage's inputs hold the code of such networks.
    module = importlib.import_module("stillhouse.transfer.progressive_networks")
    network: MultiTaskNetwork = module.ProgressiveNetwork(parse(module.ProgressiveSpec, structure, where))
    return network


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a nested structure of plain data, NumPy arrays and tensors as a folder.

    Raises:
        StillhouseError: the disk is full or not writable; ``path`` is as it was.
        TypeError: a value that is none of these.
    """
    arrays: dict[str, np.ndarray] = {}
    structure = _take_out(state, "", arrays)
    with replace_folder(path) as folder:
        (folder / STATE_TENSORS).write_bytes(safetensors.numpy.save(arrays))
        write_json(folder / STATE_STRUCTURE, structure)


def load_state(path: Path) -> dict[str, Any]:
    """What ``save_state`` wrote; tensors come back as NumPy arrays, tuples as lists.

    Raises:
        StillhouseError: missing, damaged or of another schema version.
    """
    check_folder(path)
    try:
        arrays = safetensors.numpy.load_file(path / STATE_TENSORS)
        state = _put_back(json.loads((path / STATE_STRUCTURE).read_text()), arrays)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise StillhouseError(f"{path}: not a training state ({type(error).__name__}: {error})") from error
    assert isinstance(state, dict)
    return state


def _take_out(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        arrays[name] = np.ascontiguousarray(value).reshape(value.shape)
        return {_TENSOR: name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) and "/" not in key for key in value):
            raise TypeError(f"state {name or 'root'}: keys must be strings without '/'")
        return {key: _take_out(item, f"{name}/{key}", arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_take_out(item, f"{name}/{index}", arrays) for index, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state {name}: {type(value).__name__} cannot be saved")


def _put_back(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return arrays[value[_TENSOR]]
        return {key: _put_back(item, arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_put_back(item, arrays) for item in value]
    return value
