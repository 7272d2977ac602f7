"""What MkDocs does for this site beside its own: files next to docs/, links to code, formulas.

Pages link to the repository as it is (`../export/pipeline.py`), so that they can be read without
being built. A linked file that is part of the site is linked there; of every other the name is
left. One that does not exist is a warning, which ends a strict build.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LOG = logging.getLogger("mkdocs.hooks")
_BESIDE = "repository/"  # where they are in the site: SECURITY.md is not security.md
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_IMAGE = re.compile(r"(!\[[^\]]*\])\(([^)\s]+)\)")


def on_config(config: MkDocsConfig) -> None:
    """Have fences of `math` become MathML, which browsers draw without a script."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences["custom_fences"] = [{"name": "math", "class": "math", "format": _formula}]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the files beside docs/ that are part of the site."""
    root = Path(config.config_file_path).parent
    for name in config.extra["beside"]:
        path = str(root / name)
        files.append(File.generated(config, f"{_BESIDE}{name}", abs_src_path=path))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links that leave docs/."""
    root = Path(config.config_file_path).parent
    source = page.file.src_uri
    beside = source.startswith(_BESIDE)
    here = posixpath.dirname(source.removeprefix(_BESIDE) if beside else f"docs/{source}")

    def target(link: str) -> tuple[str, str | None]:
        """Find where a link leads in the repository, and what it is from this page of the site."""
        path = posixpath.normpath(posixpath.join(here, link))
        name = path.removeprefix("docs/") if path.startswith("docs/") else _BESIDE + path
        if files.get_file_from_path(name) is None:
            return path, None
        return path, posixpath.relpath(name, posixpath.dirname(source) or ".")

    def rewrite(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        if ":" in link:
            return match[0]
        path, found = target(link)
        if found is not None:
            return f"[{text}]({found}{anchor or ''})"
        if not (root / path).exists():
            _LOG.warning("%s links to %s, which is not there", source, link)
        return text if text.startswith("`") else f"`{text}`".replace("\\", "")

    def picture(match: re.Match[str]) -> str:
        _, found = target(match[2])
        return match[0] if found is None else f"{match[1]}({found})"

    # Code is left alone.
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`(?!\]))", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if i % 2 else _IMAGE.sub(picture, _LINK.sub(rewrite, part))
        for i, part in enumerate(parts)
    )


def _formula(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="math">{convert(source, display="block")}</div>'
