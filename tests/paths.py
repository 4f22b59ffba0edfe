"""Where the tests find the project and their data."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
MINI = DATA / "synth-sysu-mini"
"""A few rendered people in the layout of SYSU-MM01."""
CONFORMANCE = DATA / "conformance"
"""Distance matrices with the figures that public evaluation code gives for them."""
