"""What makes and measures models worth exporting: recipes, sample checkpoints, the benchmark, the demo."""

from __future__ import annotations

import sys

# ``python -m shortstack.samples...`` imports this package on the way to the command (sys.argv[0] is "-m" until Python
# has found it), and most commands begin with packages that a device does not install. This is the one place which all
# of them pass before that; an ordinary import of the package changes nothing.
if sys.argv[:1] == ["-m"]:
    from shortstack.missing import report_missing_packages

    report_missing_packages()
