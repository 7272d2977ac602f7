"""What an export is asked for, checked: where its bundle goes, and how the files are written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from export.conversion.onnx_graph import check_opset
from export.conversion.precision import check_precision
from export.errors import InputError
from export.signing import Signer, read_signer
from export.sparsity import check_threshold
from kan_bundle.layout import BundleFolder, check_name, check_version, next_version, require_place
from kan_bundle.manifest import Precision

TorchScript = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Options:
    """What an export is asked for.

    Attributes:
        folder: Where the bundle goes.
        force: Whether it may replace another.
        opset: Version of ONNX's standard operators.
        precision: Of the KAN layers' weights and products.
        prune: Largest importance of the edges to leave out, as a share; None leaves out none.
        inline: Whether layers are written as standard operators alone.
        benchmark: Whether every runtime is timed.
        torchscript: Whether a TorchScript file is demanded, left out, or written where it is right.
        signer: Signs the bundle; None leaves it unsigned.
    """

    folder: BundleFolder
    force: bool
    opset: int
    precision: Precision
    prune: float | None
    inline: bool
    benchmark: bool
    torchscript: TorchScript
    signer: Signer | None


def check_options(
    name: str,
    *,
    output: Path | str,
    version: int | None,
    opset: int,
    precision: Precision,
    prune: float | None,
    inline: bool,
    benchmark: bool,
    torchscript: TorchScript,
    sign_key: Path | str | None,
    sign_password: str | None,
    force: bool,
) -> Options:
    """Check what an export is asked for; the arguments are those of `export_checkpoint`.

    Raises:
        LayoutError: The name cannot be used or the version exists.
        SigningError: The key cannot be used.
        InputError: Another of them cannot be used.
        OSError: The repository cannot be read.
    """
    check_name(name)
    repository = Path(output)
    number = next_version(repository, name) if version is None else check_version(version)
    folder = BundleFolder(name, number, repository / name / str(number))
    require_place(folder, force=force)
    signer = None if sign_key is None else read_signer(Path(sign_key), sign_password)
    return Options(
        folder=folder,
        force=force,
        opset=check_opset(opset),
        precision=check_precision(precision),
        prune=None if prune is None else check_threshold(prune),
        inline=inline,
        benchmark=benchmark,
        torchscript=_check_torchscript(torchscript),
        signer=signer,
    )


def _check_torchscript(choice: str) -> TorchScript:
    for known in get_args(TorchScript):
        if choice == known:
            return known  # type: ignore[no-any-return]
    raise InputError(
        f"--torchscript: expected {', '.join(get_args(TorchScript))}, found {choice!r}"
    )
