"""Settings of the whole test run."""

from __future__ import annotations

import os

# Nothing is fetched from a hub: what a test needs it has or makes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
