"""What a checkpoint's own files say of its size, without reading a weight.

Headers of a local folder are exact; the index (of a hub model one small file) gives the total and
the names. Both beat what follows from the config: vision towers, tensors of odd types and MTP
layers that were announced but never shipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.checkpoint import Checkpoint, load_index
from models.errors import InputError
from models.location import local_directory
from models.model_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Bytes and tensors of all weights, and what of it MTP layers are.

    `mtp_bytes` is None where only the names of MTP tensors are known (an index).
    """

    origin: str  # "headers" or "index"
    num_bytes: int
    num_tensors: int
    mtp: bool
    mtp_bytes: int | None


def find_listing(model: str, spec: ModelSpec) -> Listing | None:
    """The listing of a folder or hub model, None where only the config is there.

    Raises InputError when there are shards and they are damaged or incomplete, which every other
    job would refuse.
    """
    root = local_directory(model)
    if root is not None and any(root.glob("*.safetensors")):
        tensors = Checkpoint.open(root).tensors
        mtp_bytes = sum(t.nbytes for name, t in tensors.items() if _is_mtp(name, spec))
        return Listing(
            origin="headers",
            num_bytes=sum(t.nbytes for t in tensors.values()),
            num_tensors=len(tensors),
            mtp=mtp_bytes > 0,
            mtp_bytes=mtp_bytes,
        )
    index = load_index(model)
    if index is None:
        return None
    metadata, names = index.get("metadata"), index.get("weight_map")
    size = metadata.get("total_size") if isinstance(metadata, dict) else None
    if not isinstance(size, int) or size < 1 or not isinstance(names, dict):
        raise InputError(f"{model}: its index has no total_size or weight_map; download it again")
    mtp = any(_is_mtp(name, spec) for name in names)
    return Listing(
        origin="index",
        num_bytes=size,
        num_tensors=len(names),
        mtp=mtp,
        mtp_bytes=None if mtp else 0,
    )


def _is_mtp(name: str, spec: ModelSpec) -> bool:
    place = spec.place(name)
    return place.kind == "mtp" or (place.layer is not None and place.layer in spec.mtp_layers)
