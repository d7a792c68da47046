"""Some checks in this process: ``python -m lmms_plugin.doctor CHECK ...``.

Prints each row as a line of JSON as soon as there is one, ``null`` at the end, and nothing else.
"""

import json
import os
import sys

from lmms_plugin.doctor.diagnosis import here
from lmms_plugin.utils.processes.quiet import stdout_to_stderr

if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as lines, stdout_to_stderr():
        for check in sys.argv[1:]:
            for row in here(check):
                print(json.dumps(row.to_dict()), file=lines, flush=True)
        print("null", file=lines, flush=True)
