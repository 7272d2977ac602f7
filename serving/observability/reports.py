"""The reports of the versions that are served: where they are told, and their bytes.

A report is looked up among what is served, never by joining a name to a folder, and only if the
manifest lists it; its bytes are compared with the manifest each time. This module knows no HTTP.
"""

import structlog

from kan_bundle.errors import IntegrityError
from kan_bundle.integrity import read_checked
from kan_bundle.layout import REPORT_FILE
from kan_bundle.manifest import Manifest
from serving.errors import ControlRefused, ModelNotFound, ModelNotReady
from serving.models.repository import Repository

_LARGEST = 16 * 2**20  # bytes; it is read as a whole, and may cross to another process

_log = structlog.get_logger()


def report_path(manifest: Manifest) -> str:
    """Give the path under which a version's report is told over HTTP; empty if it has none."""
    record = manifest.files.get(REPORT_FILE)
    if record is None or record.size_bytes > _LARGEST:
        return ""
    return f"/reports/{manifest.name}/{manifest.version}"


def read_report(repository: Repository, name: str, version: str) -> bytes:
    """Read the report of a version that is served.

    Args:
        repository: What is served.
        name: Model name.
        version: Its number in decimal.

    Raises:
        ModelNotFound: There is no such version, it is not served, or it has no report.
        ControlRefused: What lies in its folder is not the report that was exported.
    """
    try:
        model = repository.find(name, version)
    except ModelNotReady as error:
        raise ModelNotFound(str(error)) from error
    if not report_path(model.manifest):
        raise ModelNotFound(f"version {version} of model {name!r} has no report")
    try:
        return read_checked(model.folder / REPORT_FILE, model.manifest.files[REPORT_FILE])
    except IntegrityError as error:
        _log.warning("report_refused", model=name, version=version, reason=str(error))
        raise ControlRefused(
            f"the report of version {version} of model {name!r} is not the one that was exported; "
            "the server's log says more"
        ) from error
