"""Files of tensors in the format of safetensors."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file as save_private
from torch import Tensor

from reformer_dist.fs.atomic import sync


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes tensors and syncs the file. Its mode is that of any new file, where safetensors would make it 0600.

    Raises SafetensorError or OSError, for instance on a full disk.
    """
    path.touch()
    # the umask is only readable by setting it, which other threads would notice
    mode = stat.S_IMODE(path.stat().st_mode)
    save_private(dict(tensors), path, metadata=metadata)
    if stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    sync(path)
