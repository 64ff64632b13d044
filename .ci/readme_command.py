"""Print the shell command that the README shows below a heading, so that what CI runs is what a reader runs."""

import re
import sys
from pathlib import Path

heading = sys.argv[1]
readme = Path(__file__).parents[1].joinpath("README.md").read_text()
found = re.search(rf"^#+ {re.escape(heading)}\n.*?```bash\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
if not found:
    sys.exit(f"The README has no command below the heading {heading!r}.")
print(found.group(1))
