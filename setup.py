"""The long description for a package index: README.md without links to files, which an index doesn't have."""

import re
from pathlib import Path

from setuptools import setup

RELATIVE = r"\]\((?!https?:)[^)]*\)"
readme = re.sub(rf"!\[[^\]]*{RELATIVE}\n*", "", Path(__file__).with_name("README.md").read_text(encoding="utf-8"))
setup(
    long_description=re.sub(rf"\[([^\]]*){RELATIVE}", r"\1", readme),
    long_description_content_type="text/markdown",
)
