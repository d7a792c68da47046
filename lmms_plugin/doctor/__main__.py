"""One check in this process: ``python -m lmms_plugin.doctor CHECK`` prints its rows as JSON, and nothing else."""

import json
import sys

from lmms_plugin.doctor.diagnosis import here
from lmms_plugin.quiet import stdout_to_stderr

if __name__ == "__main__":
    with stdout_to_stderr():
        found = here(sys.argv[1])
    print(json.dumps([row.to_dict() for row in found]), flush=True)
