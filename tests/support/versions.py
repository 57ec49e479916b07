"""What a test may expect of the installed transformers: wording and coverage were written down with one version."""

import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

_TEXT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
_FOUND = re.search(r"\(transformers ([\d.]+)\)", _TEXT)
assert _FOUND, "docs/models.md does not say with which version it was written"
DOCUMENTED = Version(_FOUND[1])
INSTALLED = Version(transformers.__version__)

# Models that older versions do not know, or whose attention they call otherwise: there they are refused in other words.
needs_documented = pytest.mark.skipif(
    DOCUMENTED > INSTALLED, reason=f"transformers {INSTALLED} builds this model otherwise than {DOCUMENTED}"
)
