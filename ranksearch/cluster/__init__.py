"""Ray: the cluster that a study's trials run on. Nothing outside this folder imports it.

`connection.py` joins or starts one, `packing.py`, `probe.py` and `room.py` say how many trials fit it, `shared.py` and `pack.py` bring the
task to its workers, `tune.py` runs the trials, on a worker each (`worker.py`) or on several (`group.py`).
"""

import os

# Usage statistics, log files per trial and Tune's own tables stay off; an explicit setting of the user wins. Ray reads these at import.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without a GPU share sees none
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)
